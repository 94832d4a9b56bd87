//! The brokers that every test runs on.
//!
//! To add one: a variant of [`BrokerKind`], a line in `broker_tests!`, and the arms that the compiler then asks for.

use backbone::config::QueueType;

use super::rabbitmq::VirtualHost;

/// Which broker a test runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BrokerKind {
    /// In the process, on a file in a fresh directory.
    Embedded,
    /// RabbitMQ with classic queues.
    RabbitmqClassic,
    /// RabbitMQ with quorum queues.
    RabbitmqQuorum,
}

/// What a router needs of a broker that is a process of its own.
#[derive(Default)]
pub(crate) struct Provision {
    /// Variables for the router: `SOAR_BROKER_URL` and the like.
    pub(crate) router_env: Vec<(String, String)>,
    /// What must live as long as the router: a node, or a virtual host on one.
    pub(crate) _keep: Option<Box<dyn std::any::Any>>,
}

impl BrokerKind {
    /// Starts what a router on this broker needs; nothing for the embedded one.
    pub(crate) async fn provision(self) -> Provision {
        match self {
            Self::Embedded => Provision::default(),
            Self::RabbitmqClassic | Self::RabbitmqQuorum => {
                let host = VirtualHost::create().await;
                let router_env = self.router_env(host.url());
                Provision { router_env, _keep: Some(Box::new(host)) }
            }
        }
    }

    /// The variables by which a router uses the RabbitMQ at `url` with queues of this kind.
    pub(crate) fn router_env(self, url: String) -> Vec<(String, String)> {
        let kind = match self.queue_type() {
            QueueType::Classic => "classic",
            QueueType::Quorum => "quorum",
        };
        vec![("SOAR_BROKER_URL".into(), url), ("SOAR_QUEUE_TYPE".into(), kind.into())]
    }

    /// Of which type its queues are; what the embedded broker has counts as quorum.
    pub(crate) fn queue_type(self) -> QueueType {
        match self {
            Self::RabbitmqClassic => QueueType::Classic,
            Self::Embedded | Self::RabbitmqQuorum => QueueType::Quorum,
        }
    }

    /// Whether it is RabbitMQ.
    pub(crate) fn is_rabbitmq(self) -> bool {
        self != Self::Embedded
    }
}

/// What a test is given. Started fresh for each test on each broker.
pub(crate) trait Fixture: Sized {
    /// Starts it.
    async fn start(kind: BrokerKind) -> Self;

    /// Stops it, and fails the test when something is left over that should not be. Not called when the test failed.
    async fn finish(self);
}

impl Fixture for BrokerKind {
    async fn start(kind: BrokerKind) -> Self {
        kind
    }

    async fn finish(self) {}
}

/// Makes each `async fn name(x: &mut SomeFixture)` a test on every broker: `embedded::name` and so on. Once in a file.
macro_rules! broker_tests {
    ($( $(#[$meta:meta])* async fn $name:ident($env:ident: &mut $fixture:ty) $body:block )*) => {
        $( $(#[$meta])* async fn $name($env: &mut $fixture) $body )*
        broker_tests!(@on embedded Embedded [$($name: $fixture,)*]);
        broker_tests!(@on rabbitmq_classic RabbitmqClassic [$($name: $fixture,)*]);
        broker_tests!(@on rabbitmq_quorum RabbitmqQuorum [$($name: $fixture,)*]);
    };
    (@on $module:ident $kind:ident [$($name:ident: $fixture:ty,)*]) => {
        mod $module {
            #[allow(unused_imports, reason = "the fixture's type may be named by its whole path")]
            use super::*;
            $(
                #[actix_rt::test]
                async fn $name() {
                    use $crate::support::fixture::{BrokerKind, Fixture};
                    let mut fixture = <$fixture as Fixture>::start(BrokerKind::$kind).await;
                    super::$name(&mut fixture).await;
                    Fixture::finish(fixture).await;
                }
            )*
        }
    };
}

/// Makes each `async fn name(kind: BrokerKind)` a test on RabbitMQ with queues of each type: `classic::name` and
/// `quorum::name`. For what is about RabbitMQ itself, in a module that has `rabbitmq` in its path. Once in a file.
macro_rules! queue_type_tests {
    ($( $(#[$meta:meta])* async fn $name:ident($kind:ident: BrokerKind) $body:block )*) => {
        $( $(#[$meta])* async fn $name($kind: $crate::support::fixture::BrokerKind) $body )*
        queue_type_tests!(@on classic RabbitmqClassic [$($name,)*]);
        queue_type_tests!(@on quorum RabbitmqQuorum [$($name,)*]);
    };
    (@on $module:ident $kind:ident [$($name:ident,)*]) => {
        mod $module {
            $(
                #[actix_rt::test]
                async fn $name() {
                    super::$name($crate::support::fixture::BrokerKind::$kind).await;
                }
            )*
        }
    };
}

/// Makes each `async fn name(x: &mut SomeFixture)` a test on the embedded broker alone: for what is about the router's own
/// disk, on which no message lies when there is RabbitMQ. Once in a file.
macro_rules! embedded_tests {
    ($( $(#[$meta:meta])* async fn $name:ident($env:ident: &mut $fixture:ty) $body:block )*) => {
        $( $(#[$meta])* async fn $name($env: &mut $fixture) $body )*
        broker_tests!(@on embedded Embedded [$($name: $fixture,)*]);
    };
}

/// Makes each `async fn name(x: &mut SomeFixture)` a test on RabbitMQ with either type of queues. Once in a file.
macro_rules! rabbitmq_tests {
    ($( $(#[$meta:meta])* async fn $name:ident($env:ident: &mut $fixture:ty) $body:block )*) => {
        $( $(#[$meta])* async fn $name($env: &mut $fixture) $body )*
        broker_tests!(@on rabbitmq_classic RabbitmqClassic [$($name: $fixture,)*]);
        broker_tests!(@on rabbitmq_quorum RabbitmqQuorum [$($name: $fixture,)*]);
    };
}
