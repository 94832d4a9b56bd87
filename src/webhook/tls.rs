//! TLS for webhooks: certificates are always verified, against the system's authorities and those that the operator
//! adds (`SOAR_WEBHOOK_CA`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::Resumption;
use rustls::{ClientConfig, RootCertStore};
use tokio_rustls::TlsConnector;

/// TLS sessions remembered for a quicker handshake, over all endpoints.
const SESSIONS_MAX: usize = 1024;

/// The CA bundle cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// The file cannot be read.
    #[error("read CA bundle {path}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It holds no certificate, or one that is broken.
    #[error("CA bundle {path} has no certificate that can be read")]
    Empty {
        /// Which file.
        path: PathBuf,
    },
}

/// A connector that trusts the system's authorities and, if given, those in a PEM file.
///
/// # Errors
/// [`CaError`] when the file was given and cannot be used. A system without authorities is not an error: then no https
/// endpoint is trusted but those under the given file, and the log says so.
pub fn connector(ca: Option<&Path>) -> Result<TlsConnector, CaError> {
    let mut roots = RootCertStore::empty();
    let system = rustls_native_certs::load_native_certs();
    for error in &system.errors {
        log::warn!("cannot read some of the system's certificate authorities: {error}");
    }
    let (added, _) = roots.add_parsable_certificates(system.certs);
    if let Some(path) = ca {
        add_bundle(&mut roots, path)?;
    } else if added == 0 {
        log::warn!("the system has no certificate authorities: https webhooks will fail; see SOAR_WEBHOOK_CA");
    }
    // The provider is named here rather than taken from the process, so that nothing depends on who came first.
    let mut config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .expect("ring supports TLS 1.2 and 1.3")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config.resumption = Resumption::in_memory_sessions(SESSIONS_MAX);
    Ok(TlsConnector::from(Arc::new(config)))
}

fn add_bundle(roots: &mut RootCertStore, path: &Path) -> Result<(), CaError> {
    let read = |source| CaError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(read)?;
    let mut added = 0;
    for certificate in rustls_pemfile::certs(&mut std::io::BufReader::new(file)) {
        let certificate = certificate.map_err(read)?;
        roots.add(certificate).map_err(|_| CaError::Empty { path: path.to_owned() })?;
        added += 1;
    }
    if added == 0 { Err(CaError::Empty { path: path.to_owned() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_that_cannot_be_used_is_named() {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let path = directory.path().join("ca.pem");
        assert!(matches!(connector(Some(&path)), Err(CaError::Read { .. })));
        std::fs::write(&path, "nothing here").expect("writes");
        assert!(matches!(connector(Some(&path)), Err(CaError::Empty { .. })));
        let authority = rcgen::generate_simple_self_signed(["x".to_owned()]).expect("a certificate");
        std::fs::write(&path, authority.cert.pem()).expect("writes");
        assert!(connector(Some(&path)).is_ok());
    }
}
