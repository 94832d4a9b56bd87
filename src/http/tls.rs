//! https: certificate and key from PEM files.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::crypto::ring;

use crate::config::TlsFiles;

/// TLS 1.2 and 1.3 with this certificate chain and key (PKCS #8, PKCS #1 or SEC 1).
///
/// # Errors
/// When a file cannot be read, holds none, or key and certificate do not belong together; says which file.
pub(crate) fn server_config(files: &TlsFiles) -> io::Result<ServerConfig> {
    let (cert, key) = (&files.cert, &files.key);
    let chain = rustls_pemfile::certs(&mut open(cert)?)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| about(cert, &error.to_string()))?;
    if chain.is_empty() {
        return Err(about(cert, "holds no certificate in PEM"));
    }
    let private = rustls_pemfile::private_key(&mut open(key)?)
        .map_err(|error| about(key, &error.to_string()))?
        .ok_or_else(|| about(key, "holds no private key in PEM"))?;
    ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .map_err(|error| about(cert, &error.to_string()))?
        .with_no_client_auth()
        .with_single_cert(chain, private)
        .map_err(|error| about(key, &format!("does not go with {}: {error}", cert.display())))
}

fn open(path: &Path) -> io::Result<BufReader<File>> {
    File::open(path).map(BufReader::new).map_err(|error| about(path, &error.to_string()))
}

fn about(path: &Path, detail: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("{}: {detail}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_wrong_with_a_file_names_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let files = TlsFiles { cert: directory.path().join("cert.pem"), key: directory.path().join("key.pem") };
        let absent = server_config(&files).expect_err("there is no file").to_string();
        assert!(absent.contains("cert.pem"), "{absent}");
        std::fs::write(&files.cert, "no PEM").expect("writes");
        let empty = server_config(&files).expect_err("there is no certificate").to_string();
        assert!(empty.ends_with("holds no certificate in PEM"), "{empty}");
    }
}
