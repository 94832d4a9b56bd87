//! Why an attempt brought no answer, in words that a receiver's developer understands.

use std::time::Duration;

/// How far an attempt had come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Resolving the name and connecting.
    Connecting,
    /// TLS handshake.
    Securing,
    /// The request is sent, or being sent; nothing came back.
    Waiting,
    /// The answer has begun.
    Reading,
}

/// What kind of failure it is: few, for metrics.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FailureKind {
    /// The URL cannot be used, or its address may not be reached.
    Refused,
    /// The name cannot be resolved.
    Dns,
    /// No connection.
    Connect,
    /// No TLS session.
    Tls,
    /// No answer, or not all of it, in time.
    Timeout,
    /// The connection broke.
    Closed,
    /// What came is not an HTTP answer.
    Malformed,
}

impl FailureKind {
    /// Every kind, for metrics.
    pub const ALL: [Self; 7] =
        [Self::Refused, Self::Dns, Self::Connect, Self::Tls, Self::Timeout, Self::Closed, Self::Malformed];

    /// The name in metrics.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Refused => "refused_address",
            Self::Dns => "dns",
            Self::Connect => "connect",
            Self::Tls => "tls",
            Self::Timeout => "timeout",
            Self::Closed => "closed",
            Self::Malformed => "malformed",
        }
    }
}

/// Why an attempt brought no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{words}")]
pub struct Failure {
    /// Its kind.
    pub kind: FailureKind,
    /// The same in words: no internal addresses, no secrets.
    pub words: String,
}

impl Failure {
    /// A failure of this kind.
    pub fn new(kind: FailureKind, words: impl Into<String>) -> Self {
        Self { kind, words: words.into() }
    }

    /// The address is not one that webhooks may reach. Does not name it: what a name resolves to inside the
    /// operator's network is not the client's to learn.
    pub fn refused_address() -> Self {
        Self::new(FailureKind::Refused, "the host is not at a public address, which is where webhooks may go")
    }

    /// An `http` URL whose address is not listed.
    pub fn refused_cleartext() -> Self {
        Self::new(FailureKind::Refused, "http is for addresses that the operator listed only; use https")
    }

    /// Time ran out in this phase.
    pub fn timeout(phase: Phase, limit: Duration) -> Self {
        let limit_s = limit.as_secs();
        let words = match phase {
            Phase::Connecting => format!("no connection within {limit_s} s"),
            Phase::Securing => format!("the TLS handshake did not end within {limit_s} s"),
            Phase::Waiting => format!("no answer within {limit_s} s"),
            Phase::Reading => format!("the answer began, but did not end within {limit_s} s"),
        };
        Self::new(FailureKind::Timeout, words)
    }

    /// Connecting failed.
    pub fn connect(error: &std::io::Error) -> Self {
        use std::io::ErrorKind as E;
        let words = match error.kind() {
            E::ConnectionRefused => "the connection was refused: nothing listens on that port".to_owned(),
            E::ConnectionReset | E::ConnectionAborted => "the connection was reset while connecting".to_owned(),
            E::HostUnreachable => "the host cannot be reached".to_owned(),
            E::NetworkUnreachable => "the network cannot be reached".to_owned(),
            E::TimedOut => "connecting timed out".to_owned(),
            other => format!("cannot connect: {other}"),
        };
        Self::new(FailureKind::Connect, words)
    }

    /// The TLS handshake failed.
    pub fn tls(error: &std::io::Error) -> Self {
        let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
        let words = match cause {
            Some(rustls::Error::InvalidCertificate(certificate)) => certificate_words(certificate),
            Some(rustls::Error::AlertReceived(alert)) => format!("TLS handshake refused by the endpoint: {alert:?}"),
            Some(rustls::Error::InvalidMessage(_)) => "what listens on that port does not speak TLS".to_owned(),
            Some(other) => format!("TLS handshake failed: {other}"),
            None => "the connection was closed during the TLS handshake".to_owned(),
        };
        Self::new(FailureKind::Tls, words)
    }

    /// The connection broke in this phase.
    pub fn closed(phase: Phase) -> Self {
        let words = match phase {
            Phase::Reading => "the connection was closed before the answer was complete",
            Phase::Connecting | Phase::Securing | Phase::Waiting => "the connection was closed before an answer came",
        };
        Self::new(FailureKind::Closed, words)
    }

    /// What came is not an HTTP answer; `what` says why.
    pub fn malformed(what: &str) -> Self {
        Self::new(FailureKind::Malformed, format!("what came back is not a valid HTTP/1.1 answer: {what}"))
    }
}

fn certificate_words(error: &rustls::CertificateError) -> String {
    use rustls::CertificateError as C;
    match error {
        C::Expired | C::ExpiredContext { .. } => "the certificate has expired".to_owned(),
        C::NotValidYet | C::NotValidYetContext { .. } => "the certificate is not valid yet".to_owned(),
        C::NotValidForName | C::NotValidForNameContext { .. } => "the certificate is for another name".to_owned(),
        // The latter when it names an authority that is known, but was signed by another of that name.
        C::UnknownIssuer | C::BadSignature => "the certificate is not signed by a known authority".to_owned(),
        C::Revoked => "the certificate was revoked".to_owned(),
        other => format!("the certificate cannot be trusted: {other}"),
    }
}
