//! Where the router is, and who asks: URL and credentials from arguments and the environment.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::Args;

use super::api::{Api, Who};
use super::error::CliError;
use super::output::Output;

/// Where the router listens unless told otherwise (docs/contract.md, section 8).
const DEFAULT_BIND: &str = "127.0.0.1:3000";

/// The options that every command takes.
#[derive(Debug, Args)]
#[command(next_help_heading = "Router and credentials")]
pub(crate) struct Globals {
    /// The router's address [default: from SOAR_BIND, http://127.0.0.1:3000]
    #[arg(long, global = true, env = "SOAR_URL", value_name = "URL")]
    pub(crate) url: Option<String>,
    /// The admin token [default: from DATA_DIR/admin-token]; `@FILE` reads it from a file
    #[arg(long, global = true, env = "SOAR_ADMIN_TOKEN", hide_env_values = true, value_name = "TOKEN")]
    pub(crate) admin_token: Option<String>,
    /// Act as this client
    #[arg(long = "as", global = true, env = "SOAR_CLIENT_ID", value_name = "ID")]
    pub(crate) client_id: Option<String>,
    /// That client's secret; `@FILE` reads it from a file, out of sight of the process list
    #[arg(long, global = true, env = "SOAR_CLIENT_SECRET", hide_env_values = true, value_name = "SECRET")]
    pub(crate) secret: Option<String>,
    /// A PEM file to trust besides the system's certificates
    #[arg(long, global = true, value_name = "FILE")]
    pub(crate) ca_cert: Option<PathBuf>,
    /// The router's data directory, where its admin token lies
    #[arg(long, global = true, env = "DATA_DIR", hide = true, default_value = "./data")]
    pub(crate) data_dir: PathBuf,
    #[arg(long, global = true, env = "SOAR_BIND", hide = true)]
    pub(crate) bind: Option<String>,
    #[arg(long, global = true, env = "SOAR_TLS_CERT", hide = true)]
    pub(crate) tls_cert: Option<PathBuf>,
    /// Print JSON lines instead of tables
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
}

/// What a command works with.
pub(crate) struct Context {
    /// Where data goes.
    pub(crate) out: Output,
    /// Whether `--url` was typed, not taken from the environment: `bench` must not hit the router of this directory's
    /// `.env` by surprise.
    pub(crate) url_was_typed: bool,
    globals: Globals,
}

impl Context {
    /// A context for this process.
    pub(crate) fn new(globals: Globals, url_was_typed: bool) -> Self {
        Self { out: Output::stdout(globals.json), url_was_typed, globals }
    }

    /// The router.
    ///
    /// # Errors
    /// Wrong usage, when the URL is none.
    pub(crate) fn api(&self) -> Result<Api, CliError> {
        let globals = &self.globals;
        let given = globals.url.as_deref().filter(|url| !url.is_empty());
        let local_cert = globals.tls_cert.as_ref().filter(|path| given.is_none() && !path.as_os_str().is_empty());
        let url = match given {
            Some(url) => url.to_owned(),
            None => local_url(globals.bind.as_deref().filter(|bind| !bind.is_empty()), local_cert.is_some())?,
        };
        Api::new(&url, globals.ca_cert.as_ref().or(local_cert).map(PathBuf::as_path))
    }

    /// The operator.
    ///
    /// # Errors
    /// When there is no admin token to be found.
    pub(crate) fn admin(&self) -> Result<Who, CliError> {
        if let Some(token) = self.globals.admin_token.as_deref().filter(|token| !token.is_empty()) {
            return Ok(Who::Admin(from_file_if_asked(token, "--admin-token")?));
        }
        let path = self.globals.data_dir.join("admin-token");
        match std::fs::read_to_string(&path) {
            Ok(token) => Ok(Who::Admin(token.trim().to_owned())),
            Err(error) => Err(CliError::failed(format!(
                "no admin token: cannot read {} ({}); run this in the directory where the router was started, or set \
                 DATA_DIR to the router's, or pass --admin-token",
                path.display(),
                error.kind()
            ))),
        }
    }

    /// The client named by `--as`.
    ///
    /// # Errors
    /// Wrong usage, when no client or no secret is given.
    pub(crate) fn client(&self) -> Result<Who, CliError> {
        let id = self.client_id();
        let secret = self.globals.secret.as_deref().filter(|secret| !secret.is_empty());
        match (id, secret) {
            (Some(id), Some(secret)) => {
                Ok(Who::Client { id: id.to_owned(), secret: from_file_if_asked(secret, "--secret")? })
            }
            (None, _) => Err(CliError::usage(
                "which client? pass --as ID --secret SECRET, or set SOAR_CLIENT_ID and SOAR_CLIENT_SECRET",
            )),
            (Some(id), None) => Err(CliError::usage(format!(
                "the secret of client {id} is missing: pass --secret SECRET, or set SOAR_CLIENT_SECRET"
            ))),
        }
    }

    /// The id given by `--as`, if any.
    pub(crate) fn client_id(&self) -> Option<&str> {
        self.globals.client_id.as_deref().filter(|id| !id.is_empty())
    }

    /// For a call that an operator and the client itself may make: the client, if its credentials are at hand, else
    /// the operator. Also says whose resource it is about: `id`, or the client given by `--as`.
    ///
    /// # Errors
    /// When neither has credentials, or no client is named.
    pub(crate) fn owner_or_admin(&self, id: Option<&str>) -> Result<(String, Who), CliError> {
        let Some(id) = id.or(self.client_id()) else {
            return Err(CliError::usage("which client? name its ID, or pass --as ID --secret SECRET"));
        };
        let is_owner = self.client_id() == Some(id) && self.globals.secret.as_deref().is_some_and(|s| !s.is_empty());
        let who = if is_owner { self.client()? } else { self.admin()? };
        Ok((id.to_owned(), who))
    }

    /// For a call that an operator and some client may make: the operator, if there is a token, else the client.
    ///
    /// # Errors
    /// When neither has credentials.
    pub(crate) fn admin_or_client(&self) -> Result<Who, CliError> {
        self.admin().or_else(|no_token| match self.client_id() {
            Some(_) => self.client(),
            None => Err(no_token),
        })
    }
}

/// `value`, or what is in the file that `@FILE` names.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn from_file_if_asked(value: &str, option: &str) -> Result<String, CliError> {
    let Some(path) = value.strip_prefix('@') else { return Ok(value.to_owned()) };
    let text = std::fs::read_to_string(path)
        .map_err(|error| CliError::failed(format!("cannot read {path}, named by {option}: {error}")))?;
    Ok(text.trim().to_owned())
}

/// The URL of a router that listens on `bind`: the loopback address where it listens on all.
fn local_url(bind: Option<&str>, tls: bool) -> Result<String, CliError> {
    let bind = bind.unwrap_or(DEFAULT_BIND);
    let scheme = if tls { "https" } else { "http" };
    let Ok(mut address) = bind.parse::<SocketAddr>() else {
        return Err(CliError::usage(format!("SOAR_BIND is not an address like 127.0.0.1:3000: {bind}")));
    };
    if address.port() == 0 {
        return Err(CliError::usage("SOAR_BIND has port 0, so the router's port is not known: pass --url or SOAR_URL"));
    }
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    Ok(format!("{scheme}://{address}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_follows_from_where_the_router_listens() {
        for (bind, tls, url) in [
            (None, false, "http://127.0.0.1:3000"),
            (Some("0.0.0.0:8080"), false, "http://127.0.0.1:8080"),
            (Some("[::]:8080"), true, "https://[::1]:8080"),
            (Some("192.0.2.1:80"), false, "http://192.0.2.1:80"),
        ] {
            assert_eq!(local_url(bind, tls).expect("valid"), url);
        }
        assert!(matches!(local_url(Some("127.0.0.1:0"), false), Err(CliError::Usage(_))));
        assert!(matches!(local_url(Some("here"), false), Err(CliError::Usage(_))));
    }
}
