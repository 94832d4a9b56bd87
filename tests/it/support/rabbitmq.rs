//! RabbitMQ nodes of the tests' own: on loopback, each with its name, directories, ports and cookie; killed by pid.
//!
//! - [`Node`]: one node, private to a test, that can be killed, started again, and told things by `rabbitmqctl`.
//! - [`Cluster`]: several that form one.
//! - [`VirtualHost`]: a corner of a node that many tests share, for tests that do nothing to the node itself. It is
//!   shared by the test processes of a run when `BACKBONE_TEST_RABBITMQ` names a directory (`scripts/test.sh` does, and
//!   kills the node at the end); else it is on a node of its own.
//!
//! A node listens on loopback addresses that no other test has, so the usual ports are free there, before and after a
//! restart. It is the child process itself: a kill hits RabbitMQ and not a shell around it.

use std::fs::File;
use std::io::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::process;
use super::wait::eventually;

/// Where the Debian package has its programs. `BACKBONE_TEST_RABBITMQ_PROGRAMS` names the directory of another version.
const PROGRAMS: &str = "/usr/lib/rabbitmq/bin";
/// How long a node may take to start. A few seconds on an idle machine.
const START: Duration = Duration::from_secs(90);
/// Erlang's schedulers.
const SCHEDULERS: &str = "+S 1:1 +SDcpu 1:1 +SDio 4 +A 4";
const USER: &str = "tests";
const PASSWORD: &str = "tests-password";
const AMQP_PORT: u16 = 5672;
const MANAGEMENT_PORT: u16 = 15672;

/// What all nodes of a cluster, or a single node, have in common.
struct Home {
    directory: PathBuf,
    epmd_port: u16,
    /// `None` when it is another process's: the shared node's.
    _epmd: Option<Epmd>,
}

/// The daemon by which Erlang nodes find each other, in the foreground as a child.
struct Epmd(Child);

impl Drop for Epmd {
    fn drop(&mut self) {
        // It may have ended; what matters is that nothing is left behind.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that was free on every address a moment ago.
fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a free port");
    listener.local_addr().expect("a bound socket has an address").port()
}

fn spawn_epmd(directory: &Path, addresses: &[Ipv4Addr]) -> (u16, Child) {
    let port = free_port();
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let log = File::create(directory.join("epmd.log")).expect("a log file");
    let mut command = Command::new("epmd");
    command.args(["-port", &port.to_string(), "-address", &addresses.join(",")]);
    command.env("ERL_EPMD_RELAXED_COMMAND_CHECK", "1");
    command.process_group(0).stdin(Stdio::null()).stdout(log.try_clone().expect("a second handle")).stderr(log);
    (port, command.spawn().expect("epmd starts: is rabbitmq-server installed?"))
}

/// Starts a process that stays on one CPU, number `number` of those that this thread may use, counted round.
///
/// Erlang's scheduler and its threads for files wake each other for each module that is loaded. Across CPUs that takes
/// more than half of the time in which a node starts.
fn on_one_cpu<T>(number: usize, start: impl FnOnce() -> T) -> T {
    let all = sched_getaffinity(None).expect("a thread knows its CPUs");
    let allowed: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu)).collect();
    let mut one = CpuSet::new();
    one.set(allowed[number % allowed.len()]);
    // A process inherits this from the thread that starts it.
    sched_setaffinity(None, &one).expect("a thread may choose among its CPUs");
    let started = start();
    sched_setaffinity(None, &all).expect("a thread may go back to its CPUs");
    started
}

/// A loopback address that no other node of any test has.
fn own_address() -> Ipv4Addr {
    static STARTED: AtomicU32 = AtomicU32::new(0);
    let number = std::process::id().wrapping_mul(16).wrapping_add(STARTED.fetch_add(1, Ordering::Relaxed));
    let [_, _, a, b] = (number / 250).to_be_bytes();
    let c = u8::try_from(number % 250 + 1).expect("at most 250");
    // Routers have odd second bytes, and 127.0.x.y is what everybody uses.
    Ipv4Addr::new(127, (a | 3) ^ 1, b, c)
}

/// The Erlang name of the node at an address: epmd, which nodes of a cluster share, knows them by what is before the `@`.
fn name_at(address: Ipv4Addr) -> String {
    format!("rabbit-{:08x}@{address}", u32::from(address))
}

/// A RabbitMQ node. Dropped, it is killed.
pub(crate) struct Node {
    address: Ipv4Addr,
    /// Where other nodes find it. One of its own, because a node that starts looks whether it is free on all addresses.
    distribution_port: u16,
    directory: PathBuf,
    home: Arc<Home>,
    has_management: bool,
    /// On which CPU it runs; see [`on_one_cpu`].
    cpu: usize,
    child: Option<Child>,
    _temporary: Option<Arc<TempDir>>,
}

impl Node {
    /// Starts one and waits until it takes connections.
    pub(crate) async fn start() -> Self {
        let node = Self::prepare("");
        Self::started(node).await
    }

    /// The same without the management API: up in half the time.
    pub(crate) async fn start_plain() -> Self {
        let mut node = Self::prepare("");
        std::fs::write(node.directory.join("enabled_plugins"), "[].\n").expect("writes");
        let configuration = std::fs::read_to_string(node.directory.join("rabbitmq.conf")).expect("reads");
        let plain = configuration.lines().filter(|line| !line.starts_with("management."));
        let plain = plain.map(|line| format!("{line}\n")).collect::<String>();
        std::fs::write(node.directory.join("rabbitmq.conf"), plain).expect("writes");
        node.has_management = false;
        Self::started(node).await
    }

    /// One that is not started yet: its address is known.
    pub(crate) fn prepare(configuration: &str) -> Self {
        let temporary = Arc::new(tempfile::tempdir().expect("a temporary directory"));
        let address = own_address();
        let home = Arc::new(Home::new(temporary.path(), &[address], true));
        let mut node = Self::on(home, address, &temporary.path().join("node"), configuration);
        node._temporary = Some(temporary);
        node
    }

    async fn started(mut self) -> Self {
        self.spawn();
        self.wait_until_up().await;
        self
    }

    fn on(home: Arc<Home>, address: Ipv4Addr, directory: &Path, configuration: &str) -> Self {
        std::fs::create_dir_all(directory).expect("makes the node's directory");
        let configuration = format!(
            "listeners.tcp.1 = {address}:{AMQP_PORT}\n\
             management.tcp.ip = {address}\nmanagement.tcp.port = {MANAGEMENT_PORT}\n\
             default_user = {USER}\ndefault_pass = {PASSWORD}\n\
             default_user_tags.administrator = true\n\
             loopback_users = none\ndisk_free_limit.absolute = 50MB\nlog.file.level = info\n{configuration}\n"
        );
        std::fs::write(directory.join("rabbitmq.conf"), configuration).expect("writes");
        std::fs::write(directory.join("enabled_plugins"), "[rabbitmq_management].\n").expect("writes");
        let distribution_port = free_port();
        let directory = directory.to_owned();
        let cpu = rand::random_range(0..64);
        Self { address, distribution_port, directory, home, has_management: true, cpu, child: None, _temporary: None }
    }

    /// Its Erlang name.
    pub(crate) fn name(&self) -> String {
        name_at(self.address)
    }

    /// Where it takes AMQP connections.
    pub(crate) fn amqp_address(&self) -> SocketAddr {
        (self.address, AMQP_PORT).into()
    }

    /// Adds lines to the `rabbitmq.conf` of one that is not started yet.
    pub(crate) fn configure(&self, lines: &str) {
        let path = self.directory.join("rabbitmq.conf");
        let configuration = std::fs::read_to_string(&path).expect("reads") + lines + "\n";
        std::fs::write(&path, configuration).expect("writes");
    }

    /// `amqp://…` of its default virtual host.
    pub(crate) fn url(&self) -> String {
        amqp_url(self.amqp_address(), "%2f")
    }

    /// The management API's `http://…`, with credentials.
    pub(crate) fn management_url(&self) -> String {
        format!("http://{USER}:{PASSWORD}@{}:{MANAGEMENT_PORT}", self.address)
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the node runs").id()
    }

    /// Everything that it has logged, over all its lives.
    pub(crate) fn log(&self) -> String {
        std::fs::read(self.directory.join("node.log"))
            .map(|log| String::from_utf8_lossy(&log).into_owned())
            .unwrap_or_default()
    }

    fn command(&self, program: &str) -> Command {
        #[expect(clippy::disallowed_methods, reason = "whoever runs the tests chooses the version")]
        let named = std::env::var_os("BACKBONE_TEST_RABBITMQ_PROGRAMS");
        let programs = named.map_or_else(|| PathBuf::from(PROGRAMS), PathBuf::from);
        let mut command = Command::new(programs.join(program));
        let address = self.address;
        let path = |name: &str| self.directory.join(name);
        let tuple = address.to_string().replace('.', ",");
        command
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LANG", "C.UTF-8")
            .env("HOME", &self.home.directory)
            .env("ERL_EPMD_PORT", self.home.epmd_port.to_string())
            .env("ERL_EPMD_ADDRESS", address.to_string())
            .env("RABBITMQ_NODENAME", self.name())
            .env("RABBITMQ_USE_LONGNAME", "true")
            .env("RABBITMQ_DIST_PORT", self.distribution_port.to_string())
            .env("RABBITMQ_BASE", &self.directory)
            .env("RABBITMQ_MNESIA_BASE", path("mnesia"))
            .env("RABBITMQ_MNESIA_DIR", path("mnesia/data"))
            .env("RABBITMQ_LOG_BASE", path("log"))
            .env("RABBITMQ_LOGS", path("node.log"))
            .env("RABBITMQ_SCHEMA_DIR", path("schema"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", path("config"))
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq.conf"))
            .env("RABBITMQ_ADVANCED_CONFIG_FILE", path("advanced.config"))
            .env("RABBITMQ_CONF_ENV_FILE", path("none.conf"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("enabled_plugins"))
            .env("RABBITMQ_PID_FILE", path("pid"))
            // The script becomes the node instead of waiting for it.
            .env("RUNNING_UNDER_SYSTEMD", "true")
            .env(
                "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS",
                // One scheduler: a node of a test has little to do, and starts quicker with the machine to share.
                format!("-start_epmd false -kernel inet_dist_use_interface {{{tuple}}} {}", SCHEDULERS),
            )
            .stdin(Stdio::null())
            .current_dir(&self.home.directory);
        command
    }

    /// Starts the process; does not wait.
    pub(crate) fn spawn(&mut self) {
        assert!(self.child.is_none(), "it runs already");
        let path = self.directory.join("output.log");
        let output = std::fs::OpenOptions::new().create(true).append(true).open(path).expect("a log file");
        let mut command = self.command("rabbitmq-server");
        // Out of the test's process group: a shared node outlives its test.
        command.process_group(0).stdout(output.try_clone().expect("a second handle")).stderr(output);
        let child = on_one_cpu(self.cpu, || command.spawn());
        self.child = Some(child.expect("rabbitmq-server starts: is it installed?"));
    }

    /// Waits until it takes connections, and its management answers.
    ///
    /// # Panics
    /// With the log's end when it does not, or when it exits.
    pub(crate) async fn wait_until_up(&mut self) {
        let overview = format!("{}/api/overview", self.management_url());
        let http = super::http::client();
        eventually("RabbitMQ is up", START, async || {
            if let Some(child) = &mut self.child
                && let Some(status) = child.try_wait().expect("a child can be waited for")
            {
                panic!("the node exited ({status}); its output ends:\n{}", self.tail());
            }
            // The last thing that a node does when it starts.
            std::net::TcpStream::connect(self.amqp_address()).ok()?;
            if self.has_management {
                let answer = http.get(&overview).timeout(Duration::from_secs(2)).send().await.ok()?;
                return (answer.status() == 200).then_some(());
            }
            Some(())
        })
        .await;
    }

    fn tail(&self) -> String {
        let output = std::fs::read_to_string(self.directory.join("output.log")).unwrap_or_default();
        process::tail(&(output + &self.log()))
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        process::kill(&mut self.child);
    }

    /// Starts it again on what it left, and waits until it is up.
    pub(crate) async fn restart(&mut self) {
        self.kill();
        self.spawn();
        self.wait_until_up().await;
    }

    /// Sends it a signal, such as STOP and CONT: a node that hangs.
    pub(crate) fn signal(&self, signal: Signal) {
        process::signal(self.pid(), signal);
    }

    /// `rabbitmqctl`; takes a second or two.
    ///
    /// # Panics
    /// With what it said, when it fails.
    pub(crate) async fn ctl(&self, arguments: &[&str]) -> String {
        let mut command = self.command("rabbitmqctl");
        command.args(["--longnames", "-n", &self.name()]).args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        // Not where the node has its work to do.
        let cpu = self.cpu + 1;
        let run = actix_rt::task::spawn_blocking(move || on_one_cpu(cpu, || command.output()));
        let Output { status, stdout, stderr } = run.await.expect("does not panic").expect("rabbitmqctl starts");
        let said = String::from_utf8_lossy(&stdout).into_owned();
        assert!(status.success(), "rabbitmqctl {arguments:?}: {said}{}", String::from_utf8_lossy(&stderr));
        said
    }

    /// A call to the management API; the answer, if it is JSON.
    ///
    /// # Panics
    /// When it is not a 2xx.
    pub(crate) async fn manage(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
        manage(&self.management_url(), method, path, body).await
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() && self.child.is_some() {
            eprintln!("---- the node's log ends:\n{}", self.tail());
        }
        process::kill_if_there(&mut self.child);
    }
}

impl Home {
    fn new(directory: &Path, addresses: &[Ipv4Addr], own_epmd: bool) -> Self {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o700)).expect("sets the mode");
        let cookie = format!("{:032x}", rand::random::<u128>());
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o400)
            .open(directory.join(".erlang.cookie"))
            .expect("a cookie file");
        file.write_all(cookie.as_bytes()).expect("writes");
        let (epmd_port, epmd) = spawn_epmd(directory, addresses);
        let epmd = if own_epmd {
            Some(Epmd(epmd))
        } else {
            note_pid(directory, epmd.id());
            None
        };
        Self { directory: directory.to_owned(), epmd_port, _epmd: epmd }
    }
}

fn note_pid(directory: &Path, pid: u32) {
    let path = directory.join("pids");
    let mut pids = std::fs::OpenOptions::new().create(true).append(true).open(path).expect("opens the list of pids");
    writeln!(pids, "{pid}").expect("writes");
}

fn amqp_url(address: SocketAddr, virtual_host: &str) -> String {
    format!("amqp://{USER}:{PASSWORD}@{address}/{virtual_host}")
}

async fn manage(base: &str, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
    let mut call = super::http::client().request(method, format!("{base}/api/{path}"));
    if let Some(body) = body {
        call = call.header("content-type", "application/json").body(body.to_string());
    }
    let answer = call.send().await.unwrap_or_else(|error| panic!("management API: {path}: {error}"));
    let status = answer.status();
    let text = answer.text().await.unwrap_or_default();
    assert!(status.is_success(), "management API: {path}: {status} {text}");
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

/// Nodes that form a cluster. Quorum queues have a member on each.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
}

impl Cluster {
    /// Starts `count` nodes and joins them.
    pub(crate) async fn start(count: usize) -> Self {
        let temporary = Arc::new(tempfile::tempdir().expect("a temporary directory"));
        let addresses: Vec<Ipv4Addr> = (0..count).map(|_| own_address()).collect();
        let home = Arc::new(Home::new(temporary.path(), &addresses, true));
        // The first forms a cluster of its own; the others find it in their configuration, and join it as they start.
        let mut nodes: Vec<Node> = Vec::new();
        for address in addresses {
            let first = nodes.first().map(Node::name);
            let mut peers = "cluster_formation.peer_discovery_backend = classic_config\n".to_owned();
            for (at, name) in (1..).zip(first.into_iter().chain([name_at(address)])) {
                peers += &format!("cluster_formation.classic_config.nodes.{at} = {name}\n");
            }
            let directory = temporary.path().join(address.to_string());
            let mut node = Node::on(Arc::clone(&home), address, &directory, &peers);
            node._temporary = Some(Arc::clone(&temporary));
            node.spawn();
            if nodes.is_empty() {
                node.wait_until_up().await;
            }
            nodes.push(node);
        }
        for node in &mut nodes {
            node.wait_until_up().await;
        }
        let members = nodes[0].manage(reqwest::Method::GET, "nodes?columns=name,running", None).await;
        let running = members.as_array().map_or(0, |all| all.iter().filter(|node| node["running"] == true).count());
        assert_eq!(running, count, "all nodes are members of one cluster: {members}");
        Self { nodes }
    }

    /// The URLs of all nodes, with commas between.
    pub(crate) fn url(&self) -> String {
        self.nodes.iter().map(Node::url).collect::<Vec<_>>().join(",")
    }
}

/// A virtual host of its own, deleted when dropped.
pub(crate) struct VirtualHost {
    name: String,
    address: SocketAddr,
    management_url: String,
    /// The node, when it is not shared.
    _node: Option<Node>,
}

impl VirtualHost {
    /// Makes one, on the shared node of this run if there is to be one.
    pub(crate) async fn create() -> Self {
        #[expect(clippy::disallowed_methods, reason = "how test processes of a run find each other")]
        let shared = std::env::var_os("BACKBONE_TEST_RABBITMQ");
        let (address, management_url, node) = match shared {
            Some(directory) => {
                let (address, management_url) = shared_node(Path::new(&directory)).await;
                (address, management_url, None)
            }
            None => {
                let node = Node::start().await;
                (node.amqp_address(), node.management_url(), Some(node))
            }
        };
        let name = format!("test-{}", uuid::Uuid::now_v7().simple());
        let host = Self { name, address, management_url, _node: node };
        host.manage(reqwest::Method::PUT, &format!("vhosts/{}", host.name), None).await;
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        host.manage(reqwest::Method::PUT, &format!("permissions/{}/{USER}", host.name), Some(all)).await;
        host
    }

    /// Its `amqp://…`.
    pub(crate) fn url(&self) -> String {
        amqp_url(self.address, &self.name)
    }

    /// Where its node takes AMQP connections.
    pub(crate) fn amqp_address(&self) -> SocketAddr {
        self.address
    }

    /// Its `amqp://…` through a proxy at another address.
    pub(crate) fn url_through(&self, proxy: SocketAddr) -> String {
        amqp_url(proxy, &self.name)
    }

    /// Its `amqp://…` for this user.
    pub(crate) fn url_of(&self, user: &str, password: &str) -> String {
        format!("amqp://{user}:{password}@{}/{}", self.address, self.name)
    }

    /// Makes a user that may do everything here, but is not the one that [`VirtualHost::url`] names.
    pub(crate) async fn make_user(&self, user: &str, password: &str) {
        let body = json!({"password": password, "tags": ""});
        self.manage(reqwest::Method::PUT, &format!("users/{user}"), Some(body)).await;
        let all = json!({"configure": ".*", "write": ".*", "read": ".*"});
        self.manage(reqwest::Method::PUT, &format!("permissions/{}/{user}", self.name), Some(all)).await;
    }

    /// Its name.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The management API's `http://…`, with credentials.
    pub(crate) fn management_url(&self) -> &str {
        &self.management_url
    }

    /// A call to the management API; the answer, if it is JSON.
    pub(crate) async fn manage(&self, method: reqwest::Method, path: &str, body: Option<Value>) -> Value {
        manage(&self.management_url, method, path, body).await
    }
}

impl Drop for VirtualHost {
    fn drop(&mut self) {
        if self._node.is_some() {
            return;
        }
        // A thread, because the test's runtime may be at its end.
        let call = format!("{}/api/vhosts/{}", self.management_url, self.name);
        let delete = move || {
            let runtime = actix_rt::Runtime::new()?;
            runtime.block_on(async { super::http::client().delete(call).send().await }).map_err(std::io::Error::other)
        };
        match std::thread::spawn(delete).join() {
            Ok(Ok(_)) => {}
            failed => eprintln!("a virtual host is left over until the node is killed: {failed:?}"),
        }
    }
}

/// The node that the test processes of a run share. The first to need it starts it; who started them all kills it.
async fn shared_node(directory: &Path) -> (SocketAddr, String) {
    std::fs::create_dir_all(directory).expect("makes the directory");
    let lock = File::create(directory.join("lock")).expect("a lock file");
    let ready = directory.join("ready");
    let lock = actix_rt::task::spawn_blocking(move || {
        flock(&lock, FlockOperation::LockExclusive).expect("locks");
        lock
    });
    let lock = lock.await.expect("does not panic");
    if !ready.exists() {
        let address = own_address();
        let home = Arc::new(Home::new(directory, &[address], false));
        let mut node = Node::on(home, address, &directory.join("node"), "");
        node.spawn();
        note_pid(directory, node.pid());
        node.wait_until_up().await;
        let found = json!({"amqp": node.amqp_address().to_string(), "management": node.management_url()});
        std::fs::write(&ready, found.to_string()).expect("writes");
        // Not a child that ends with this test.
        drop(node.child.take());
    }
    drop(lock);
    let found: Value = serde_json::from_slice(&std::fs::read(&ready).expect("reads")).expect("JSON");
    let text = |name: &str| found[name].as_str().expect("text").to_owned();
    (text("amqp").parse().expect("an address"), text("management"))
}
