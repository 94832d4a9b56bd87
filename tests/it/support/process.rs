//! The real program as a child process: started, asked to stop, killed, started again on what it left.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use super::wait::{SOON, eventually};

/// A router of its own: `backbone serve` in its own directory, at its own address.
pub(crate) struct RouterProcess {
    data_dir: PathBuf,
    address: SocketAddr,
    env: BTreeMap<String, String>,
    log: PathBuf,
    child: Option<Child>,
}

impl RouterProcess {
    /// Starts it on `data_dir`, with these variables and no others, and waits until it is ready.
    pub(crate) async fn start(data_dir: &Path, env: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut router = Self::prepare(data_dir, env);
        router.spawn();
        router.wait_until_ready().await;
        router
    }

    /// One on `data_dir`, with these variables and no others; not started yet.
    pub(crate) fn prepare(data_dir: &Path, env: impl IntoIterator<Item = (String, String)>) -> Self {
        Self {
            data_dir: data_dir.to_owned(),
            address: free_address(),
            env: env.into_iter().collect(),
            log: data_dir.with_extension("log"),
            child: None,
        }
    }

    /// Where it listens, across restarts.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The token that it made, or was given, for its administrator.
    pub(crate) fn admin_token(&self) -> String {
        if let Some(token) = self.env.get("SOAR_ADMIN_TOKEN") {
            return token.clone();
        }
        let path = self.data_dir.join("admin-token");
        let token = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        token.trim().to_owned()
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the router runs").id()
    }

    /// Whether the process is there.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| child.try_wait().expect("a child can be waited for").is_none())
    }

    /// Everything that it has logged, over all its lives.
    pub(crate) fn log(&self) -> String {
        std::fs::read(&self.log).map(|log| String::from_utf8_lossy(&log).into_owned()).unwrap_or_default()
    }

    /// Starts the process; does not wait.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(&self.log).expect("a log file");
        let mut command = Command::new(program());
        command
            .arg("serve")
            .env_clear()
            .env("DATA_DIR", &self.data_dir)
            .env("SOAR_BIND", self.address.to_string())
            .env("RUST_BACKTRACE", "1")
            .envs(&self.env)
            // No .env of whoever runs the tests.
            .current_dir(self.data_dir.parent().expect("a directory has a parent"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("a second handle"))
            .stderr(log);
        self.child = Some(command.spawn().expect("the program starts"));
    }

    /// Waits until `/readyz` says 200, or that all is well but for a disk that is nearly full: then it hands out.
    ///
    /// # Panics
    /// With the log's end when it does not, or when the process exits.
    pub(crate) async fn wait_until_ready(&mut self) {
        self.wait_until_200("/readyz").await;
    }

    /// Waits until `/livez` says 200: it answers, whether or not the broker takes messages.
    pub(crate) async fn wait_until_alive(&mut self) {
        self.wait_until_200("/livez").await;
    }

    async fn wait_until_200(&mut self, path: &str) {
        let url = format!("http://{}{path}", self.address);
        let http = super::http::client();
        eventually(&format!("{url} answers 200"), SOON, async || {
            if !self.is_running() {
                panic!("the router exited; its log ends:\n{}", tail(&self.log()));
            }
            let answer = http.get(&url).timeout(Duration::from_secs(5)).send().await.ok()?;
            let ready = answer.status() == 200;
            let problem: serde_json::Value = answer.json().await.ok()?;
            let only_full = problem["reasons"].as_array().is_some_and(|reasons| {
                reasons.len() == 1 && reasons[0].as_str().is_some_and(|reason| reason.contains("disk is nearly full"))
            });
            (ready || only_full).then_some(())
        })
        .await;
    }

    /// SIGKILL: no word of farewell.
    pub(crate) fn kill(&mut self) {
        kill(&mut self.child);
    }

    /// Starts again where it was, and waits until it is ready.
    pub(crate) async fn restart(&mut self) {
        self.kill();
        self.spawn();
        self.wait_until_ready().await;
    }

    /// SIGTERM; does not wait.
    pub(crate) fn terminate(&self) {
        signal(self.pid(), Signal::TERM);
    }

    /// SIGKILL; for when others still borrow it. [`RouterProcess::kill`] or `restart` must follow.
    pub(crate) fn kill_without_waiting(&self) {
        signal(self.pid(), Signal::KILL);
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// With the log's end when there is none.
    pub(crate) async fn wait_for_exit(&mut self, deadline: Duration) -> ExitStatus {
        let child = self.child.as_mut().expect("the router runs");
        let wait = async || child.try_wait().expect("a child can be waited for");
        let status = eventually("the router exits", deadline, wait).await;
        self.child = None;
        status
    }
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- the router's log ends:\n{}", tail(&self.log()));
        }
        kill_if_there(&mut self.child);
    }
}

/// SIGKILL, when there is a child; waits for its end.
pub(crate) fn kill(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        child.kill().expect("a child can be killed");
        child.wait().expect("a child can be waited for");
    }
}

/// The same for when a test is over: one that failed may leave it in any state, and what matters is that nothing is left
/// behind.
pub(crate) fn kill_if_there(child: &mut Option<Child>) {
    if let Some(mut child) = child.take() {
        let _ = child.kill();
        let _ = child.wait();
    }
}

/// Sends a child a signal, such as STOP and CONT: a program that hangs.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).expect("a process id");
    kill_process(pid, signal).expect("a child can be signalled");
}

/// The program: what cargo built for the tests, unless `BACKBONE_TEST_PROGRAM` names another, to measure a release build.
fn program() -> PathBuf {
    #[expect(clippy::disallowed_methods, reason = "set by whoever measures, for the tests only")]
    let named = std::env::var_os("BACKBONE_TEST_PROGRAM");
    named.map_or_else(|| env!("CARGO_BIN_EXE_backbone").into(), PathBuf::from)
}

/// Whether tests of size take the full one (`BACKBONE_TEST_FULL=1`), which is for release builds and a quiet machine.
pub(crate) fn is_full_size() -> bool {
    #[expect(clippy::disallowed_methods, reason = "set by whoever measures, for the tests only")]
    let size = std::env::var_os("BACKBONE_TEST_FULL");
    size.is_some_and(|value| value == "1")
}

/// An address that no other test has: a loopback address made of the process id and a counter, and a port that was free
/// on it a moment ago. So a router that is started again finds its address free.
fn free_address() -> SocketAddr {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(64).wrapping_add(STARTED.fetch_add(1, Ordering::Relaxed));
    let [_, a, b, c] = number.to_be_bytes();
    // 127.0.x.y is what everybody uses.
    let ip = IpAddr::V4(Ipv4Addr::new(127, a | 1, b, c.clamp(1, 254)));
    let listener = TcpListener::bind((ip, 0)).expect("Linux has all of 127.0.0.0/8");
    listener.local_addr().expect("a bound socket has an address")
}

/// The last lines.
pub(crate) fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(40)..].join("\n")
}
