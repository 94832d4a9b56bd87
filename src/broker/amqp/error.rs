//! What RabbitMQ and lapin say, as [`BrokerError`]s.

use lapin::ErrorKind;
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};

use crate::broker::{BrokerError, BrokerErrorKind};
use crate::db::{DbError, DbErrorKind};

/// What a failed AMQP call was, as far as the broker behind it acts on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// 404: no such queue or exchange. The channel is closed.
    NotFound,
    /// 406 or 405: it exists with other properties, or is somebody's own. The channel is closed.
    Conflict,
    /// 403: the user may not. The channel is closed.
    Refused,
    /// Another error of the channel: it is closed, the connection lives.
    Channel,
    /// The connection is gone, or going.
    Connection,
}

/// Which fault it is.
pub(super) fn fault_of(error: &lapin::Error) -> Fault {
    match error.kind() {
        ErrorKind::ProtocolError(error) => match error.kind() {
            AMQPErrorKind::Soft(AMQPSoftError::NOTFOUND) => Fault::NotFound,
            AMQPErrorKind::Soft(AMQPSoftError::PRECONDITIONFAILED | AMQPSoftError::RESOURCELOCKED) => Fault::Conflict,
            AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED) => Fault::Refused,
            AMQPErrorKind::Soft(_) => Fault::Channel,
            AMQPErrorKind::Hard(_) => Fault::Connection,
        },
        ErrorKind::InvalidChannel(_) | ErrorKind::InvalidChannelState(..) | ErrorKind::ChannelsLimitReached => {
            Fault::Channel
        }
        _ => Fault::Connection,
    }
}

/// A failed AMQP call as a broker error. `action` says what was being done, with its input.
pub(super) fn broker_error(action: impl Into<String>, error: lapin::Error) -> BrokerError {
    let kind = match fault_of(&error) {
        Fault::NotFound => BrokerErrorKind::NotFound,
        Fault::Conflict => BrokerErrorKind::Conflict,
        Fault::Refused => BrokerErrorKind::Internal,
        Fault::Channel | Fault::Connection => BrokerErrorKind::Unavailable,
    };
    let mut action = action.into();
    if kind == BrokerErrorKind::Conflict {
        action = format!("{action}: {error}; {WAY_OUT}");
    }
    BrokerError::new(kind, action).caused_by(error)
}

/// What to do about a queue that exists with other properties.
const WAY_OUT: &str = "set SOAR_QUEUE_TYPE to the type that the queues have, or empty and delete them with \
    `rabbitmqctl delete_queue` so that they are declared anew";

/// The broker cannot be reached now.
pub(super) fn unavailable(action: impl Into<String>) -> BrokerError {
    BrokerError::new(BrokerErrorKind::Unavailable, action)
}

/// The error with what is below it, for the log.
pub(super) fn with_cause(error: &BrokerError) -> String {
    match std::error::Error::source(error) {
        // What a conflict is about is in its text.
        Some(cause) if error.kind != BrokerErrorKind::Conflict => format!("{error}: {cause}"),
        _ => error.to_string(),
    }
}

/// A failed look-up or note in the file as a broker error.
pub(super) fn db_error(action: impl Into<String>, error: DbError) -> BrokerError {
    let kind = match error.kind {
        DbErrorKind::Full => BrokerErrorKind::DiskFull,
        DbErrorKind::Closed => BrokerErrorKind::Closed,
        DbErrorKind::Locked | DbErrorKind::Internal => BrokerErrorKind::Internal,
    };
    BrokerError::new(kind, action).caused_by(error)
}
