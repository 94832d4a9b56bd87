//! From the environment's strings to a valid [`Config`], with every error named.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use super::{BrokerChoice, Config, QueueType, TlsFiles};
use crate::token::TokenSecret;

/// Variables that the command line reads, not the server: known, so not worth a warning.
const COMMAND_LINE_VARIABLES: [&str; 4] = ["SOAR_URL", "SOAR_CLIENT_ID", "SOAR_CLIENT_SECRET", "SOAR_WEBHOOK_SECRET"];

/// Longest message that can be configured, in bytes. A request may be 16 times as long and must fit into memory;
/// RabbitMQ takes bodies of up to 128 MiB (16 MiB from 4.0 on, unless configured).
const MESSAGE_BYTES_MAX: u64 = 64 << 20;

/// An admin token shorter than this, in characters, can be guessed.
const ADMIN_TOKEN_CHARS_WARN: usize = 16;

/// One wrong value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The variable.
    pub variable: &'static str,
    /// Its value, unless that may be secret.
    pub value: Option<String>,
    /// What it should be.
    pub expected: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Some(value) => write!(f, "{}={value}: expected {}", self.variable, self.expected),
            None => write!(f, "{}: expected {}", self.variable, self.expected),
        }
    }
}

/// Everything that is wrong in the environment; prints one line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors(pub Vec<ConfigError>);

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.0.iter().enumerate() {
            if n > 0 {
                f.write_str("\n")?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// The flat struct that envy fills. Strings only: envy stops at the first value that it cannot parse, and all wrong
/// values are to be named.
macro_rules! variables {
    ($($field:ident $name:literal),* $(,)?) => {
        #[derive(Default, Deserialize)]
        struct Variables { $($field: Option<String>),* }
        const NAMES: &[&str] = &[$($name),*];
    };
}

variables! {
    data_dir "DATA_DIR",
    soar_bind "SOAR_BIND",
    soar_tls_cert "SOAR_TLS_CERT",
    soar_tls_key "SOAR_TLS_KEY",
    soar_broker_url "SOAR_BROKER_URL",
    soar_queue_type "SOAR_QUEUE_TYPE",
    soar_rabbitmq_management_url "SOAR_RABBITMQ_MANAGEMENT_URL",
    soar_admin_token "SOAR_ADMIN_TOKEN",
    soar_token_lifetime "SOAR_TOKEN_LIFETIME",
    soar_token_secret "SOAR_TOKEN_SECRET",
    soar_query_auth "SOAR_QUERY_AUTH",
    soar_max_message_bytes "SOAR_MAX_MESSAGE_BYTES",
    soar_dedup_window "SOAR_DEDUP_WINDOW",
    soar_trace_messages "SOAR_TRACE_MESSAGES",
    soar_metrics_bind "SOAR_METRICS_BIND",
    soar_webhook_allow "SOAR_WEBHOOK_ALLOW",
    soar_webhook_ca "SOAR_WEBHOOK_CA",
    soar_attempt_retention "SOAR_ATTEMPT_RETENTION",
    soar_shutdown_timeout "SOAR_SHUTDOWN_TIMEOUT",
    rust_log "RUST_LOG",
}

impl Config {
    /// The name of every variable that the router reads.
    pub const VARIABLES: &'static [&'static str] = NAMES;

    /// The name of every other one that the command line reads.
    pub const COMMAND_LINE_VARIABLES: &'static [&'static str] = &COMMAND_LINE_VARIABLES;

    /// Reads the environment (`.env` has been read into it before, if there is one).
    ///
    /// # Errors
    /// Every wrong value at once.
    #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
    pub fn from_env() -> Result<Self, ConfigErrors> {
        let mut not_unicode = Vec::new();
        let mut variables = Vec::new();
        for (name, value) in std::env::vars_os() {
            let Ok(name) = name.into_string() else { continue };
            match (value.into_string(), NAMES.iter().find(|known| **known == name)) {
                (Ok(value), _) => variables.push((name, value)),
                (Err(_), Some(known)) => not_unicode.push(known),
                (Err(_), None) => {}
            }
        }
        match (Self::from_variables(variables), not_unicode.is_empty()) {
            (Ok(config), true) => Ok(config),
            (result, _) => {
                let mut errors = result.err().map_or_else(Vec::new, |errors| errors.0);
                errors.extend(not_unicode.into_iter().map(|variable| ConfigError {
                    variable,
                    value: None,
                    expected: "text in UTF-8".into(),
                }));
                Err(ConfigErrors(errors))
            }
        }
    }

    /// The same from given variables; those that the backbone does not know are ignored, those that look like its own
    /// are warned of.
    ///
    /// # Errors
    /// Every wrong value at once.
    pub fn from_variables(variables: impl IntoIterator<Item = (String, String)>) -> Result<Self, ConfigErrors> {
        let mut warnings = Vec::new();
        let known = variables.into_iter().filter(|(name, value)| {
            if NAMES.contains(&name.as_str()) {
                return !value.trim().is_empty();
            }
            if name.starts_with("SOAR_") && !COMMAND_LINE_VARIABLES.contains(&name.as_str()) {
                warnings.push(format!("{name} is set, but there is no such setting: misspelt?"));
            }
            false
        });
        let variables: Variables = envy::from_iter(known.collect::<Vec<_>>()).unwrap_or_else(|error| {
            // All fields are optional strings and each name is given once, so nothing can fail.
            unreachable!("reading strings from the environment: {error}")
        });
        let mut judge = Judge { errors: Vec::new(), warnings };
        let config = judge.config(variables);
        if judge.errors.is_empty() {
            Ok(Self { warnings: judge.warnings, ..config })
        } else {
            Err(ConfigErrors(judge.errors))
        }
    }
}

/// Collects what is wrong while going through the variables; a wrong value leaves the default in its place.
struct Judge {
    errors: Vec<ConfigError>,
    warnings: Vec<String>,
}

impl Judge {
    fn config(&mut self, v: Variables) -> Config {
        let default = Config::default();
        let bind = self.parsed("SOAR_BIND", v.soar_bind, ADDRESS).unwrap_or(default.bind);
        let metrics_bind = self.parsed("SOAR_METRICS_BIND", v.soar_metrics_bind, ADDRESS);
        if metrics_bind == Some(bind) && bind.port() != 0 {
            self.wrong("SOAR_METRICS_BIND", Some(bind.to_string()), "another address than SOAR_BIND");
        }
        Config {
            data_dir: v.data_dir.map_or(default.data_dir, PathBuf::from),
            bind,
            tls: self.tls(v.soar_tls_cert, v.soar_tls_key),
            broker: self.broker(v.soar_broker_url),
            queue_type: self.queue_type(v.soar_queue_type),
            rabbitmq_management_url: self.management_url(v.soar_rabbitmq_management_url),
            admin_token: self.admin_token(v.soar_admin_token),
            token_lifetime: hours(self.number("SOAR_TOKEN_LIFETIME", v.soar_token_lifetime, 24, 1, 8760, "hours")),
            token_secret: self.token_secret(v.soar_token_secret),
            query_auth: self.boolean("SOAR_QUERY_AUTH", v.soar_query_auth, default.query_auth),
            max_message_bytes: index(self.number(
                "SOAR_MAX_MESSAGE_BYTES",
                v.soar_max_message_bytes,
                1 << 20,
                1,
                MESSAGE_BYTES_MAX,
                "bytes",
            )),
            dedup_window: Duration::from_secs(self.number(
                "SOAR_DEDUP_WINDOW",
                v.soar_dedup_window,
                600,
                0,
                604_800,
                "seconds",
            )),
            trace_messages: index(self.number(
                "SOAR_TRACE_MESSAGES",
                v.soar_trace_messages,
                100_000,
                0,
                10_000_000,
                "messages",
            )),
            metrics_bind,
            webhook_allow: self.networks(v.soar_webhook_allow),
            webhook_ca: v.soar_webhook_ca.and_then(|path| self.file("SOAR_WEBHOOK_CA", &path)),
            attempt_retention: hours(
                24 * self.number("SOAR_ATTEMPT_RETENTION", v.soar_attempt_retention, 7, 1, 3650, "days"),
            ),
            shutdown_timeout: Duration::from_secs(self.number(
                "SOAR_SHUTDOWN_TIMEOUT",
                v.soar_shutdown_timeout,
                30,
                1,
                3600,
                "seconds",
            )),
            log_filter: self.log_filter(v.rust_log).unwrap_or(default.log_filter),
            warnings: Vec::new(),
        }
    }

    fn wrong(&mut self, variable: &'static str, value: Option<String>, expected: impl Into<String>) {
        self.errors.push(ConfigError { variable, value, expected: expected.into() });
    }

    fn parsed<T: FromStr>(&mut self, variable: &'static str, text: Option<String>, expected: &str) -> Option<T> {
        let text = text?;
        match text.trim().parse() {
            Ok(value) => Some(value),
            Err(_) => {
                self.wrong(variable, Some(text), expected);
                None
            }
        }
    }

    fn number(
        &mut self,
        variable: &'static str,
        text: Option<String>,
        default: u64,
        min: u64,
        max: u64,
        unit: &str,
    ) -> u64 {
        let Some(text) = text else { return default };
        match text.trim().parse() {
            Ok(number) if (min..=max).contains(&number) => number,
            _ => {
                self.wrong(variable, Some(text), format!("a whole number of {unit}, {min} to {max}"));
                default
            }
        }
    }

    fn boolean(&mut self, variable: &'static str, text: Option<String>, default: bool) -> bool {
        match text.as_deref().map(|text| text.trim().to_ascii_lowercase()).as_deref() {
            None => default,
            Some("true" | "1" | "yes" | "on") => true,
            Some("false" | "0" | "no" | "off") => false,
            Some(_) => {
                self.wrong(variable, text, "true or false");
                default
            }
        }
    }

    fn file(&mut self, variable: &'static str, path: &str) -> Option<PathBuf> {
        match std::fs::File::open(path).and_then(|file| file.metadata()) {
            Ok(metadata) if metadata.is_file() => Some(PathBuf::from(path)),
            Ok(_) => {
                self.wrong(variable, Some(path.into()), "a file in PEM");
                None
            }
            Err(error) => {
                self.wrong(variable, Some(path.into()), format!("a readable file in PEM ({error})"));
                None
            }
        }
    }

    fn tls(&mut self, cert: Option<String>, key: Option<String>) -> Option<TlsFiles> {
        match (cert, key) {
            (None, None) => None,
            (Some(cert), Some(key)) => {
                let (cert, key) = (self.file("SOAR_TLS_CERT", &cert), self.file("SOAR_TLS_KEY", &key));
                Some(TlsFiles { cert: cert?, key: key? })
            }
            (Some(_), None) => {
                self.wrong("SOAR_TLS_KEY", None, "the private key's file, as SOAR_TLS_CERT is set");
                None
            }
            (None, Some(_)) => {
                self.wrong("SOAR_TLS_CERT", None, "the certificate's file, as SOAR_TLS_KEY is set");
                None
            }
        }
    }

    /// A URL may hold a password, so its value is never shown.
    fn broker(&mut self, text: Option<String>) -> BrokerChoice {
        let Some(text) = text else { return BrokerChoice::Embedded };
        BrokerChoice::parse(&text).unwrap_or_else(|| {
            self.wrong("SOAR_BROKER_URL", None, "embedded, amqp://user:password@host:5672/vhost or amqps://…");
            BrokerChoice::Embedded
        })
    }

    fn management_url(&mut self, text: Option<String>) -> Option<String> {
        let text = text?;
        match url_with_host(text.trim()) {
            Some("http" | "https") => Some(text.trim().into()),
            _ => {
                self.wrong("SOAR_RABBITMQ_MANAGEMENT_URL", None, "http://user:password@host:15672 or https://…");
                None
            }
        }
    }

    fn queue_type(&mut self, text: Option<String>) -> QueueType {
        match text.as_deref().map(str::trim) {
            None | Some("quorum") => QueueType::Quorum,
            Some("classic") => QueueType::Classic,
            Some(_) => {
                self.wrong("SOAR_QUEUE_TYPE", text, "quorum or classic");
                QueueType::Quorum
            }
        }
    }

    /// It travels in a header (RFC 6750, section 2.1), so only visible ASCII will ever arrive.
    fn admin_token(&mut self, text: Option<String>) -> Option<String> {
        let text = text?;
        let token = text.trim();
        if !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            self.wrong("SOAR_ADMIN_TOKEN", None, "visible ASCII characters without spaces");
            return None;
        }
        if token.len() < ADMIN_TOKEN_CHARS_WARN {
            self.warnings.push(format!(
                "SOAR_ADMIN_TOKEN is shorter than {ADMIN_TOKEN_CHARS_WARN} characters and can be guessed"
            ));
        }
        Some(token.into())
    }

    fn token_secret(&mut self, text: Option<String>) -> Option<String> {
        let text = text?;
        if TokenSecret::parse(text.trim()).is_err() {
            self.wrong("SOAR_TOKEN_SECRET", None, "a PASERK k4.local.… (`backbone token-key` prints a fresh one)");
            return None;
        }
        Some(text.trim().into())
    }

    fn log_filter(&mut self, text: Option<String>) -> Option<String> {
        let text = text?;
        if !is_log_filter(&text) {
            self.wrong(
                "RUST_LOG",
                Some(text),
                "off, error, warn, info, debug or trace, or target=level, comma-separated",
            );
            return None;
        }
        Some(text)
    }

    fn networks(&mut self, text: Option<String>) -> Vec<ipnet::IpNet> {
        let mut networks = Vec::new();
        for item in text.as_deref().unwrap_or("").split(',').map(str::trim).filter(|item| !item.is_empty()) {
            let single = || item.parse().map(|address: std::net::IpAddr| ipnet::IpNet::from(address));
            match item.parse().or_else(|_| single()) {
                Ok(network) => networks.push(network),
                Err(_) => self.wrong(
                    "SOAR_WEBHOOK_ALLOW",
                    Some(item.into()),
                    "comma-separated networks such as 10.0.0.0/8,fd00::/8",
                ),
            }
        }
        networks
    }
}

const ADDRESS: &str = "an IP address and a port, such as 127.0.0.1:3000 or [::]:3000";

/// The scheme of a URL that has a host; `None` for anything else.
fn url_with_host(text: &str) -> Option<&str> {
    let url = reqwest::Url::parse(text).ok()?;
    url.host_str().filter(|host| !host.is_empty())?;
    text.split_once("://").map(|(scheme, _)| scheme)
}

/// Whether env_logger can read all of it; what it cannot it leaves out. A word alone would be a target, which logs
/// everything, while all else falls silent: taken for this program's modules only, as it is a misspelt level otherwise.
fn is_log_filter(text: &str) -> bool {
    let is_level = |level: &str| level.trim().parse::<log::LevelFilter>().is_ok();
    let (directives, contains) = text.split_once('/').unwrap_or((text, ""));
    let mut directives = directives.split(',').map(str::trim).filter(|directive| !directive.is_empty());
    !contains.contains('/')
        && directives.all(|directive| match directive.split_once('=') {
            Some((target, level)) => !target.trim().is_empty() && (level.trim().is_empty() || is_level(level)),
            None => is_level(directive) || directive == "backbone" || directive.starts_with("backbone::"),
        })
}

fn hours(hours: u64) -> Duration {
    Duration::from_secs(hours * 3600)
}

fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

impl Config {
    /// The file with everything durable.
    pub fn database_path(&self) -> PathBuf {
        self.data_dir.join("backbone.db")
    }

    /// Where a generated admin token lies, and where the command line finds it.
    pub fn admin_token_path(&self) -> PathBuf {
        admin_token_path(&self.data_dir)
    }

    /// Where a generated token secret lies.
    pub fn token_key_path(&self) -> PathBuf {
        self.data_dir.join("token-key")
    }
}

impl BrokerChoice {
    /// `embedded`, or a URL of RabbitMQ; `None` when it is neither.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        if text == "embedded" {
            return Some(Self::Embedded);
        }
        matches!(url_with_host(text), Some("amqp" | "amqps")).then(|| Self::Amqp(text.into()))
    }
}

/// Where the admin token of a router with this data directory lies.
pub fn admin_token_path(data_dir: &Path) -> PathBuf {
    data_dir.join("admin-token")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(variables: &[(&str, &str)]) -> Result<Config, ConfigErrors> {
        Config::from_variables(variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn an_empty_environment_gives_the_defaults() {
        let config = config(&[("PATH", "/bin"), ("SOAR_BIND", ""), ("SOAR_URL", "http://x")]).expect("valid");
        assert_eq!(format!("{config:?}"), format!("{:?}", Config::default()));
    }

    #[test]
    fn every_value_is_read() {
        let secret = TokenSecret::generate();
        let config = config(&[
            ("DATA_DIR", "/var/lib/backbone"),
            ("SOAR_BIND", "[::]:8080"),
            ("SOAR_BROKER_URL", "amqps://u:p@rabbit:5671/%2f"),
            ("SOAR_QUEUE_TYPE", "classic"),
            ("SOAR_RABBITMQ_MANAGEMENT_URL", "http://u:p@rabbit:15672"),
            ("SOAR_ADMIN_TOKEN", "0123456789abcdef"),
            ("SOAR_TOKEN_LIFETIME", "1"),
            ("SOAR_TOKEN_SECRET", &secret.to_paserk()),
            ("SOAR_QUERY_AUTH", "false"),
            ("SOAR_MAX_MESSAGE_BYTES", "1000"),
            ("SOAR_DEDUP_WINDOW", "5"),
            ("SOAR_TRACE_MESSAGES", "0"),
            ("SOAR_METRICS_BIND", "127.0.0.1:9000"),
            ("SOAR_WEBHOOK_ALLOW", "10.0.0.0/8, 127.0.0.1,::1"),
            ("SOAR_ATTEMPT_RETENTION", "2"),
            ("SOAR_SHUTDOWN_TIMEOUT", "3"),
            ("RUST_LOG", "debug"),
        ])
        .expect("valid");
        assert_eq!(config.data_dir, Path::new("/var/lib/backbone"));
        assert_eq!(config.bind.to_string(), "[::]:8080");
        assert_eq!(config.broker, BrokerChoice::Amqp("amqps://u:p@rabbit:5671/%2f".into()));
        assert_eq!(config.queue_type, QueueType::Classic);
        assert_eq!(config.token_lifetime, Duration::from_secs(3600));
        assert_eq!(config.token_secret, Some(secret.to_paserk()));
        assert!(!config.query_auth);
        assert_eq!((config.max_message_bytes, config.trace_messages), (1000, 0));
        assert_eq!(config.webhook_allow.len(), 3);
        assert_eq!(config.attempt_retention, Duration::from_secs(2 * 86_400));
        assert_eq!(config.log_filter, "debug");
        assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    }

    #[test]
    fn every_wrong_value_is_reported_at_once_and_no_secret_is_shown() {
        let errors = config(&[
            ("SOAR_BIND", "localhost"),
            ("SOAR_TLS_CERT", "/nonexistent"),
            ("SOAR_BROKER_URL", "mysql://u:hunter2@x"),
            ("SOAR_QUEUE_TYPE", "mirrored"),
            ("SOAR_RABBITMQ_MANAGEMENT_URL", "hunter2"),
            ("SOAR_ADMIN_TOKEN", "hunter2 \u{e9}"),
            ("SOAR_TOKEN_LIFETIME", "0"),
            ("SOAR_TOKEN_SECRET", "hunter2"),
            ("SOAR_QUERY_AUTH", "maybe"),
            ("SOAR_MAX_MESSAGE_BYTES", "1MB"),
            ("SOAR_DEDUP_WINDOW", "-1"),
            ("SOAR_TRACE_MESSAGES", "all"),
            ("SOAR_METRICS_BIND", "9000"),
            ("SOAR_WEBHOOK_ALLOW", "10.0.0.0/8,10.0.0.0/99"),
            ("SOAR_WEBHOOK_CA", "/nonexistent"),
            ("SOAR_ATTEMPT_RETENTION", "1.5"),
            ("SOAR_SHUTDOWN_TIMEOUT", "soon"),
            ("RUST_LOG", "loud"),
        ])
        .expect_err("all are wrong");
        let text = errors.to_string();
        assert_eq!(errors.0.len(), 18, "{text}");
        assert_eq!(text.lines().count(), 18);
        assert!(!text.contains("hunter2"), "{text}");
        assert!(text.contains("SOAR_TOKEN_LIFETIME=0: expected a whole number of hours, 1 to 8760"), "{text}");
    }

    #[test]
    fn a_log_filter_is_one_that_env_logger_reads_whole() {
        for good in [
            "info",
            "DEBUG",
            "off",
            "info,backbone::webhook=debug",
            " warn , lapin = trace ,",
            "backbone",
            "backbone::http",
            "backbone=",
            "backbone=debug,info/noc-c2",
        ] {
            assert_eq!(config(&[("RUST_LOG", good)]).expect(good).log_filter, good);
        }
        for bad in ["loud", "debgu", "info,backbone=loud", "info;debug", "a=b=c", "=info", "info/a/b"] {
            let errors = config(&[("RUST_LOG", bad)]).expect_err(bad);
            assert_eq!(errors.0[0].variable, "RUST_LOG");
        }
    }

    #[test]
    fn unknown_variables_of_ours_are_warned_of() {
        let config = config(&[("SOAR_BINDD", "x"), ("SOAR_ADMIN_TOKEN", "short"), ("OTHER", "x")]).expect("valid");
        assert_eq!(config.warnings.len(), 2, "{:?}", config.warnings);
        assert!(config.warnings[0].contains("SOAR_BINDD"));
    }

    #[test]
    fn two_listeners_on_one_address_are_refused() {
        assert!(config(&[("SOAR_BIND", "127.0.0.1:1"), ("SOAR_METRICS_BIND", "127.0.0.1:1")]).is_err());
        assert!(config(&[("SOAR_BIND", "127.0.0.1:0"), ("SOAR_METRICS_BIND", "127.0.0.1:0")]).is_ok());
    }
}
