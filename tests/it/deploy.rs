//! `deploy/` and `.env.example`, held against the settings that the program knows; and `run-compose.sh` against a stand-in
//! for Docker. What only a Docker engine can show is not shown here: that the image builds and its containers run.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use backbone::config::Config;

/// Variables that only Compose and its script read.
const COMPOSE_ONLY: [&str; 7] = [
    "PUBLISH_ADDRESS",
    "RABBITMQ_DEFAULT_USER",
    "RABBITMQ_DEFAULT_PASS",
    "RABBITMQ_IMAGE",
    "BACKBONE_IMAGE",
    "BACKBONE_UID",
    "BACKBONE_GID",
];

/// Settings that Compose does not hand on, and says so: TLS is a proxy's.
const NOT_UNDER_COMPOSE: [&str; 2] = ["SOAR_TLS_CERT", "SOAR_TLS_KEY"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn names(all: &[&str]) -> BTreeSet<String> {
    all.iter().map(|&name| name.to_owned()).collect()
}

/// `#NAME=value` and `NAME=value` of `.env.example`, in order.
fn example() -> Vec<(String, String)> {
    let text = read(".env.example");
    let assignments = text.lines().filter_map(|line| line.trim_start_matches('#').split_once('='));
    assignments
        .filter(|(name, _)| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_'))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// The entries of a mapping in `compose.yaml` under this path of keys; indentation is by two spaces a level.
fn compose(keys: &[&str]) -> BTreeMap<String, String> {
    let text = read("deploy/compose.yaml");
    let mut lines = text.lines().filter(|line| !line.trim_start().starts_with('#')).peekable();
    for (depth, key) in keys.iter().enumerate() {
        let wanted = format!("{}{key}:", "  ".repeat(depth));
        assert!(lines.any(|line| line == wanted), "compose.yaml has {keys:?}");
    }
    let indent = "  ".repeat(keys.len());
    let entries = lines.take_while(|line| line.starts_with(&indent) || line.is_empty());
    let own = entries.filter_map(|line| line.strip_prefix(&indent).filter(|rest| !rest.starts_with(' ')));
    own.filter_map(|line| line.split_once(':')).map(|(key, value)| (key.to_owned(), value.trim().to_owned())).collect()
}

/// The names in `${NAME…}`.
fn interpolated(text: &str) -> BTreeSet<String> {
    let parts = text.split("${").skip(1);
    parts.map(|part| part.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect()).collect()
}

#[test]
fn every_setting_is_in_the_example_and_nothing_else_is() {
    let listed: Vec<String> = example().into_iter().map(|(name, _)| name).collect();
    let once: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(once.len(), listed.len(), "each once: {listed:?}");
    let mut known = names(Config::VARIABLES);
    known.extend(names(Config::COMMAND_LINE_VARIABLES));
    known.extend(names(&COMPOSE_ONLY));
    assert_eq!(once, known);
}

#[test]
fn the_example_shows_the_defaults() {
    let shown = example().into_iter().filter(|(_, value)| !value.starts_with("e.g."));
    let config = Config::from_variables(shown).expect("valid");
    assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
}

#[test]
fn the_contract_has_every_setting() {
    let contract = read("docs/contract.md");
    for name in Config::VARIABLES.iter().chain(Config::COMMAND_LINE_VARIABLES) {
        assert!(contract.contains(&format!("`{name}`")), "{name}");
    }
}

#[test]
fn compose_hands_every_setting_on() {
    let environment = compose(&["services", "backbone", "environment"]);
    let given: BTreeSet<String> = environment.keys().cloned().collect();
    let mut wanted = names(Config::VARIABLES);
    for name in NOT_UNDER_COMPOSE {
        assert!(wanted.remove(name));
    }
    // For the command line inside of the container.
    wanted.insert("SOAR_URL".into());
    assert_eq!(given, wanted);
    let known: BTreeSet<String> = example().into_iter().map(|(name, _)| name).collect();
    let used = interpolated(&read("deploy/compose.yaml"));
    assert!(used.is_subset(&known), "{:?}", used.difference(&known).collect::<Vec<_>>());
    for name in COMPOSE_ONLY {
        assert!(used.contains(name), "{name} is used");
    }
}

#[test]
fn what_compose_gives_by_default_is_a_valid_configuration() {
    let environment = compose(&["services", "backbone", "environment"]);
    let variables = environment.into_iter().map(|(name, value)| {
        let value = value
            .replace("${RABBITMQ_DEFAULT_USER:-backbone}", "backbone")
            .replace("${RABBITMQ_DEFAULT_PASS}", "0123456789abcdef")
            .replace("${SOAR_BROKER_URL:-", "")
            .replace("${SOAR_RABBITMQ_MANAGEMENT_URL-", "");
        (name, value.trim_end_matches('}').to_owned())
    });
    let config = Config::from_variables(variables).expect("valid");
    let backbone::config::BrokerChoice::Amqp(url) = &config.broker else { panic!("{config:?}") };
    assert_eq!(url, "amqp://backbone:0123456789abcdef@rabbitmq:5672/%2f");
    assert_eq!(config.rabbitmq_management_url.as_deref(), Some("http://rabbitmq:15672"));
    assert_eq!(config.data_dir, Path::new("/data"));
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
}

#[test]
fn the_image_is_built_from_what_the_build_reads() {
    let dockerfile = read("deploy/Dockerfile");
    let ignored = read(".dockerignore");
    for needed in ["Cargo.toml", "Cargo.lock", "src", "benches"] {
        assert!(dockerfile.lines().any(|line| line.starts_with("COPY ") && line.contains(needed)), "copies {needed}");
        assert!(ignored.lines().any(|line| line == format!("!{needed}")), "{needed} is not ignored");
    }
    assert!(dockerfile.contains("\nUSER 65532:65532\n"));
    // One health check in both, which asks for nothing of single clients.
    let check = r#"["/usr/local/bin/backbone", "status", "--clients", "0"]"#;
    assert!(dockerfile.contains(&format!("CMD {check}")));
    assert!(read("deploy/compose.yaml").contains(&check.replace("[\"", "[\"CMD\", \"")));
}

/// A copy of what `run-compose.sh` works on, and a `docker` that notes what it is asked.
struct Checkout {
    directory: tempfile::TempDir,
}

impl Checkout {
    fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let at = |path: &str| directory.path().join(path);
        for made in ["deploy", "bin"] {
            std::fs::create_dir(at(made)).expect("makes a directory");
        }
        for copied in [".env.example", "deploy/run-compose.sh", "deploy/compose.yaml"] {
            std::fs::copy(root().join(copied), at(copied)).expect("copies");
        }
        let docker = "#!/bin/sh\necho \"$BACKBONE_UID:$BACKBONE_GID $*\" >>\"$DOCKER_LOG\"\n";
        std::fs::write(at("bin/docker"), docker).expect("writes");
        std::fs::set_permissions(at("bin/docker"), std::fs::Permissions::from_mode(0o755)).expect("sets the mode");
        Self { directory }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.path().join(path)
    }

    /// Runs the script; returns what it said, and what it asked of Docker.
    fn run(&self, arguments: &[&str]) -> (String, Vec<String>) {
        let log = self.at("docker.log");
        // There may be none yet.
        let _ = std::fs::remove_file(&log);
        let Output { status, stdout, stderr } = Command::new("bash")
            .arg(self.at("deploy/run-compose.sh"))
            .args(arguments)
            .env_clear()
            .env("PATH", format!("{}:/usr/bin:/bin", self.at("bin").display()))
            .env("DOCKER_LOG", &log)
            .output()
            .expect("there is a bash");
        assert!(status.success(), "{}{}", String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
        let asked = std::fs::read_to_string(log).expect("asks Docker");
        (String::from_utf8(stdout).expect("text"), asked.lines().map(str::to_owned).collect())
    }

    fn env(&self) -> String {
        std::fs::read_to_string(self.at(".env")).expect("there is a .env")
    }
}

#[test]
fn run_compose_sets_everything_up_once() {
    let checkout = Checkout::new();
    let (said, asked) = checkout.run(&[]);
    let mode = std::fs::metadata(checkout.at(".env")).expect("made").permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "it has a password");
    let made: Vec<String> = checkout
        .env()
        .lines()
        .filter_map(|line| line.strip_prefix("RABBITMQ_DEFAULT_PASS="))
        .map(str::to_owned)
        .collect();
    let [password] = &made[..] else { panic!("one password: {made:?}") };
    assert!(password.len() == 48 && password.bytes().all(|byte| byte.is_ascii_hexdigit()), "{password}");
    assert!(!said.contains(password), "it is not shown");
    assert!(said.contains("http://127.0.0.1:3000") && said.contains("./data/admin-token"), "{said}");
    assert!(checkout.at("data").is_dir());
    let last = asked.last().expect("asked");
    assert!(last.ends_with("--env-file .env -f deploy/compose.yaml up --build --detach"), "{asked:?}");
    let user = last.split_once(' ').expect("a user").0;
    assert!(user.split(':').all(|id| id.parse::<u32>().is_ok_and(|id| id > 0)), "not as root: {user}");

    // Again, with another command: everything is as it was made.
    let before = checkout.env();
    let (_, asked) = checkout.run(&["logs", "-f"]);
    assert_eq!(checkout.env(), before);
    assert!(asked.last().expect("asked").ends_with("-f deploy/compose.yaml logs -f"), "{asked:?}");
}

#[test]
fn run_compose_takes_what_the_env_file_says() {
    let checkout = Checkout::new();
    let data = checkout.at("elsewhere");
    let env = format!(
        "DATA_DIR={}\nRABBITMQ_DEFAULT_PASS=mine\nBACKBONE_UID=1234\nBACKBONE_GID=1235\nPUBLISH_ADDRESS=\"0.0.0.0\"\n",
        data.display()
    );
    std::fs::write(checkout.at(".env"), &env).expect("writes");
    if rustix::process::geteuid().is_root() {
        // Root gives the directory to that user.
        let (said, asked) = checkout.run(&[]);
        assert!(asked.last().expect("asked").starts_with("1234:1235 "), "{asked:?}");
        assert!(said.contains("http://0.0.0.0:3000"), "{said}");
        let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(&data).expect("made"));
        assert_eq!(owner, 1234);
    } else {
        checkout.run(&[]);
        assert!(data.is_dir());
    }
    assert_eq!(checkout.env(), env);
}
