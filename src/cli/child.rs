//! Children of this process for `demo` and `bench`: a router of their own in a temporary directory. They end with us,
//! however we end, and leave nothing behind unless we are killed.

use std::fs::{DirBuilder, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reqwest::Method;
use rustix::process::{Pid, Signal, kill_process};

use super::api::{Api, Call, Failure, Who};
use super::error::CliError;

/// How long a router may take until it is ready.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// How often a starting router is asked, and an ending child looked at.
const POLL: Duration = Duration::from_millis(10);

/// How long a child may take to end before it is killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(15);

/// What stands before the URL in the line by which a child says where it listens.
pub(crate) const ANNOUNCEMENT: &str = "listens on ";

/// What a router of our own logs: where it listens, and what goes wrong.
const LOG_FILTER: &str = "warn,backbone::app=info";

/// Bytes at the end of a child's log that an error quotes.
const LOG_QUOTED: u64 = 2000;

/// A directory that is removed with everything in it when it is dropped.
pub(crate) struct TemporaryDir(PathBuf);

impl TemporaryDir {
    /// A fresh one, for us alone, in `parent` or else where the system keeps such things.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(crate) fn create(parent: Option<&Path>, what: &str) -> Result<Self, CliError> {
        let parent = parent.map_or_else(std::env::temp_dir, Path::to_owned);
        let path = parent.join(format!("backbone-{what}-{:08x}", rand::random::<u32>()));
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|error| CliError::failed(format!("cannot create {}: {error}; pass --dir", path.display())))?;
        Ok(Self(path))
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// Whether it lies in memory, where an fsync costs nothing.
    pub(crate) fn is_in_memory(&self) -> bool {
        /// `TMPFS_MAGIC` of linux/magic.h.
        const TMPFS: u64 = 0x0102_1994;
        rustix::fs::statfs(&self.0).is_ok_and(|stat| u64::try_from(stat.f_type).is_ok_and(|kind| kind == TMPFS))
    }
}

impl Drop for TemporaryDir {
    fn drop(&mut self) {
        // Best effort: a file left over in a temporary directory harms nobody.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A process of this same program.
pub(crate) struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts this program again with `arguments` and, of the environment, `variables` only. What it says goes to
    /// `log`.
    ///
    /// # Errors
    /// When the system does not start it.
    pub(crate) fn start(arguments: &[&str], variables: &[(&str, &str)], log: &Path) -> Result<Self, CliError> {
        let cannot = |error: io::Error| CliError::failed(format!("cannot start {}: {error}", arguments.join(" ")));
        let output = File::create(log).map_err(cannot)?;
        let child = Command::new(std::env::current_exe().map_err(cannot)?)
            .args(arguments)
            .env_clear()
            .envs(variables.iter().copied())
            .current_dir(log.parent().unwrap_or(Path::new("/")))
            .stdin(Stdio::piped())
            .stdout(output.try_clone().map_err(cannot)?)
            .stderr(output)
            // Ctrl-C is for us to hear; we end it in order.
            .process_group(0)
            .spawn()
            .map_err(cannot)?;
        Ok(Self { child, log: log.to_owned() })
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Its resident memory now, in bytes, where the system says so.
    pub(crate) fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
    }

    /// An error if it has ended, with what it said last.
    ///
    /// # Errors
    /// When it has ended.
    pub(crate) fn check(&mut self) -> Result<(), CliError> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => {
                Err(CliError::failed(format!("the router that was started ended with {status}: {}", self.last_words())))
            }
            Err(error) => Err(CliError::failed(format!("lost the router that was started: {error}"))),
        }
    }

    /// Waits until it says where it listens. It takes a free port itself: one that was looked for here could be
    /// somebody else's by the time it is used, and the load would meet the wrong server.
    ///
    /// # Errors
    /// When it ends before that, or takes too long.
    pub(crate) async fn url(&mut self) -> Result<String, CliError> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            // Not there yet is as good as empty.
            if let Some(url) = announced(&std::fs::read_to_string(&self.log).unwrap_or_default()) {
                return Ok(url.to_owned());
            }
            self.check()?;
            if Instant::now() > deadline {
                return Err(CliError::failed(format!("the router did not start in time: {}", self.last_words())));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    fn last_words(&self) -> String {
        let mut text = Vec::new();
        let read = File::open(&self.log).and_then(|mut log| {
            let length = log.metadata()?.len();
            log.seek(SeekFrom::Start(length.saturating_sub(LOG_QUOTED)))?;
            log.read_to_end(&mut text)
        });
        match read {
            Ok(0) => "it said nothing".into(),
            Ok(_) => String::from_utf8_lossy(&text).into_owned(),
            Err(error) => format!("cannot read {}: {error}", self.log.display()),
        }
    }

    /// Asks it to end, waits, and kills it if it does not.
    pub(crate) async fn stop(mut self) {
        if let Some(pid) = i32::try_from(self.id()).ok().and_then(Pid::from_raw) {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        while Instant::now() < deadline {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            tokio::time::sleep(POLL).await;
        }
        // Drop kills it.
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has ended already.
        if self.child.kill().is_ok() {
            let _ = self.child.wait();
        }
    }
}

/// What a router of our own is like.
#[derive(Debug, Default)]
pub(crate) struct Settings<'a> {
    /// `demo` or `bench`: names the directory.
    pub(crate) what: &'a str,
    /// Where its directory is made.
    pub(crate) parent: Option<&'a Path>,
    /// Its port; 0 for a free one.
    pub(crate) port: u16,
    /// `SOAR_BROKER_URL`.
    pub(crate) broker: Option<&'a str>,
    /// `SOAR_QUEUE_TYPE`.
    pub(crate) queue_type: Option<&'a str>,
    /// `SOAR_WEBHOOK_ALLOW`.
    pub(crate) webhook_allow: Option<&'a str>,
    /// `SOAR_TRACE_MESSAGES`.
    pub(crate) trace_messages: Option<&'a str>,
}

/// A router of our own, ready.
pub(crate) struct Router {
    // Before the directory: fields are dropped in this order.
    process: Process,
    dir: TemporaryDir,
    url: String,
}

impl Router {
    /// Starts one and waits until it is ready.
    ///
    /// # Errors
    /// When it ends or is not ready in time; says what it logged.
    pub(crate) async fn start(settings: &Settings<'_>) -> Result<Self, CliError> {
        let dir = TemporaryDir::create(settings.parent, settings.what)?;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, settings.port)).to_string();
        let data_dir = dir.path().display().to_string();
        let mut variables =
            vec![("SOAR_BIND", address.as_str()), ("DATA_DIR", data_dir.as_str()), ("RUST_LOG", LOG_FILTER)];
        let optional = [
            ("SOAR_BROKER_URL", settings.broker),
            ("SOAR_QUEUE_TYPE", settings.queue_type),
            ("SOAR_WEBHOOK_ALLOW", settings.webhook_allow),
            ("SOAR_TRACE_MESSAGES", settings.trace_messages),
        ];
        variables.extend(optional.into_iter().filter_map(|(name, value)| Some((name, value?))));
        let mut process = Process::start(&["serve", "--until-stdin-ends"], &variables, &dir.path().join("router.log"))?;
        let url = process.url().await?;
        let mut router = Self { process, dir, url };
        let api = Api::new(&router.url, None)?;
        let deadline = Instant::now() + START_TIMEOUT;
        while let Err(failure) = api.call(&Call::new(Method::GET, &["readyz"], &Who::Anyone)).await {
            router.process.check()?;
            if Instant::now() > deadline {
                return Err(router.not_ready(&failure));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(router)
    }

    fn not_ready(&self, failure: &Failure) -> CliError {
        let words = self.process.last_words();
        CliError::failed(format!("the router was not ready after {} s: {failure}: {words}", START_TIMEOUT.as_secs()))
    }

    /// Where it listens.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Its directory.
    pub(crate) fn dir(&self) -> &TemporaryDir {
        &self.dir
    }

    /// Its process.
    pub(crate) fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Where its admin token lies.
    pub(crate) fn admin_token_path(&self) -> PathBuf {
        crate::config::admin_token_path(self.dir.path())
    }

    /// The operator of it.
    ///
    /// # Errors
    /// When it has written no admin token.
    pub(crate) fn admin(&self) -> Result<Who, CliError> {
        let path = self.admin_token_path();
        let token = std::fs::read_to_string(&path)
            .map_err(|error| CliError::failed(format!("cannot read {}: {error}", path.display())))?;
        Ok(Who::Admin(token.trim().to_owned()))
    }

    /// Ends it and removes its directory.
    pub(crate) async fn stop(self) {
        let Self { process, dir, .. } = self;
        process.stop().await;
        drop(dir);
    }
}

/// The URL in the line by which a child says where it listens, once the line is whole.
fn announced(log: &str) -> Option<&str> {
    let (_, rest) = log.split_once(ANNOUNCEMENT)?;
    let (url, _) = rest.split_once(|c: char| c.is_whitespace())?;
    url.starts_with("http").then_some(url)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_is_read_once_its_line_is_whole() {
        let line =
            "[INFO  backbone::app] Communications Backbone 0.1.0 listens on http://127.0.0.1:3977 (console: x)\n";
        assert_eq!(announced(line), Some("http://127.0.0.1:3977"));
        assert_eq!(announced("… listens on http://127.0.0.1:39"), None, "the rest may follow");
        assert_eq!(announced("starting\n"), None);
    }

    #[test]
    fn a_temporary_directory_goes_with_its_owner() {
        let dir = TemporaryDir::create(None, "test").expect("the system has a temporary directory");
        let path = dir.path().to_owned();
        std::fs::write(path.join("file"), "x").expect("ours to write");
        drop(dir);
        assert!(!path.exists());
    }
}
