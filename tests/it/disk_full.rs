//! A disk that fills up: senders are told, nothing that was accepted is lost, and it goes on once there is room.
//!
//! Needs a small file system of its own, so it needs root. Without it the tests say so and do nothing.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::support::fixture::{BrokerKind, Fixture};
use crate::support::http::messages;
use crate::support::wait::SOON;
use crate::support::{TestApp, eventually};

/// A mounted tmpfs; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Mounts one of this size in MiB; `None` when the user is not root.
    fn mount(directory: &Path, mib: u32) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIPPED: a small disk can only be mounted by root");
            return None;
        }
        let path = directory.join("disk");
        std::fs::create_dir(&path).expect("a mount point");
        let size = format!("size={mib}m");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(&path).output();
        let mount = mount.expect("there is mount(8)");
        assert!(mount.status.success(), "mount a tmpfs: {}", String::from_utf8_lossy(&mount.stderr));
        Some(Self(path))
    }

    /// Fills it to the last byte with a file, which is returned.
    fn fill(&self) -> PathBuf {
        use std::io::Write as _;
        let path = self.0.join("filler");
        let mut file = std::fs::File::create(&path).expect("a file");
        for size in [1 << 20, 4096, 1] {
            while file.write_all(&vec![0; size]).is_ok() {}
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a router that a failed test left behind may still have a file open.
        let unmounted = Command::new("umount").arg("-l").arg(&self.0).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("cannot unmount {}", self.0.display());
        }
    }
}

embedded_tests! {
    async fn a_full_disk_refuses_senders_and_loses_nothing(kind: &mut BrokerKind) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let Some(disk) = SmallDisk::mount(directory.path(), 48) else { return };
        let data_dir = disk.0.join("data");
        std::fs::create_dir(&data_dir).expect("a data directory");
        let mut app = TestApp::start_at(*kind, directory, &data_dir, &[]).await;
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let mut accepted: Vec<Value> = Vec::new();
        let body = |n: usize| json!({"topic": "x", "message": format!("{n:0>60000}"), "id": n.to_string()});
        let refused = loop {
            let n = accepted.len();
            assert!(n < 2000, "120 MB fit on a disk of 48 MiB");
            let answer = sender.post("/send").json(&body(n)).send().await;
            if answer.status != 202 {
                break answer;
            }
            accepted.push(body(n)["message"].clone());
        };
        refused.problem(507, "disk_full");
        assert!(accepted.len() > 50, "only {} fitted", accepted.len());
        let next = accepted.len();

        // A stranger takes the rest of it.
        let filler = disk.fill();
        sender.post("/send").json(&body(next)).send().await.problem(507, "disk_full");
        sender.post("/send").json(&json!([body(next), body(next + 1)])).send().await.problem(507, "disk_full");
        assert_eq!(app.api.get("/livez").send().await.status, 200);
        receiver.record().await;

        // There is room again, and the refused ones left no trace of their ids.
        std::fs::remove_file(filler).expect("removes the file");
        let half = accepted.len() / 2;
        let mut came = messages(&receiver.receive_exactly(half, "").await);
        eventually("it takes messages again", SOON, async || {
            let answer = sender.post("/send").json(&body(next)).send().await;
            if answer.status == 507 {
                return None;
            }
            assert_eq!(answer.ok(202)["duplicates"], 0);
            Some(())
        })
        .await;
        accepted.push(body(next)["message"].clone());
        came.extend(messages(&receiver.receive_exactly(accepted.len() - half, "").await));
        assert!(came == accepted, "all that was accepted, in order, and nothing else");
        app.finish().await;
    }

    async fn a_kill_on_a_full_disk_loses_nothing(kind: &mut BrokerKind) {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let Some(disk) = SmallDisk::mount(directory.path(), 48) else { return };
        let data_dir = disk.0.join("data");
        std::fs::create_dir(&data_dir).expect("a data directory");
        let mut app = TestApp::start_at(*kind, directory, &data_dir, &[]).await;
        let sender = app.onboard("sender", &[]).await;
        let receiver = app.onboard("receiver", &["x"]).await;
        let mut accepted: Vec<Value> = Vec::new();
        loop {
            let n = accepted.len();
            let answer = sender.post("/send").json(&json!({"topic": "x", "message": format!("{n:0>60000}")})).send().await;
            if answer.status != 202 {
                answer.problem(507, "disk_full");
                break;
            }
            accepted.push(json!(format!("{n:0>60000}")));
        }
        let filler = disk.fill();
        app.router.kill();
        std::fs::remove_file(filler).expect("removes the file");
        // It hands out, and says that it takes nothing yet.
        app.router.spawn();
        app.router.wait_until_alive().await;
        assert_eq!(app.api.get("/readyz").send().await.status, 503);
        assert_eq!(messages(&receiver.receive_exactly(accepted.len(), "").await), accepted);
        app.router.wait_until_ready().await;
        // What was received is given back to the disk in small steps.
        eventually("it takes messages again", SOON, async || {
            let answer = sender.post("/send").json(&json!({"topic": "x", "message": "goes on"})).send().await;
            if answer.status == 507 {
                return None;
            }
            answer.ok(202);
            Some(())
        })
        .await;
        assert_eq!(messages(&receiver.receive_exactly(1, "").await), [json!("goes on")]);
        app.finish().await;
    }
}
