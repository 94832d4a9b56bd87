//! Opens connections to endpoints: resolves the name, judges every address, connects, secures.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_rustls::TlsConnector;

use super::address::Guard;
use super::failure::{Failure, FailureKind, Phase};

/// How long a resolved name is used for further connections: long enough for the connections that an endpoint needs at
/// once. Each connection's address is judged all the same.
const RESOLVED_FOR: Duration = Duration::from_secs(5);
/// How long a name that did not resolve is not asked for again.
const UNRESOLVED_FOR: Duration = Duration::from_secs(1);
/// Lookups of one name that are under way at once, over all endpoints: each takes a thread, of which there are a few
/// hundred, and a name whose servers do not answer must not take them all.
const LOOKUPS_PER_NAME: usize = 4;
/// Head start of one address before the next is tried as well (RFC 8305, section 5).
const NEXT_ADDRESS_AFTER: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried at most.
const ADDRESSES_MAX: usize = 8;

/// Resolves a name, blocking; the port is passed through. [`system_resolver`], or a test's own.
pub type Resolver = Arc<dyn Fn(&str, u16) -> std::io::Result<Vec<SocketAddr>> + Send + Sync>;

/// The system's resolver: `/etc/hosts`, DNS, and what else the system is set up to ask.
pub fn system_resolver() -> Resolver {
    Arc::new(|name, port| std::net::ToSocketAddrs::to_socket_addrs(&(name, port)).map(Iterator::collect))
}

/// The lookups that are under way, by name; shared by all endpoints, those included that are made for one test call.
/// Bounded by the number of names in use, twice over.
#[derive(Debug, Default)]
pub struct Lookups(Mutex<NamesInUse>);

#[derive(Debug, Default)]
struct NamesInUse {
    names: HashMap<Arc<str>, Weak<Semaphore>>,
    /// How many names there may be before those that are out of use are forgotten.
    sweep_at: usize,
}

impl Lookups {
    /// Who looks this name up takes a permit of these.
    fn of(&self, name: &Arc<str>) -> Arc<Semaphore> {
        let mut inner = self.0.lock();
        let NamesInUse { names, sweep_at } = &mut *inner;
        if let Some(permits) = names.get(name).and_then(Weak::upgrade) {
            return permits;
        }
        if names.len() >= *sweep_at {
            names.retain(|_, permits| permits.strong_count() > 0);
            *sweep_at = 2 * names.len() + 64;
        }
        let permits = Arc::new(Semaphore::new(LOOKUPS_PER_NAME));
        names.insert(Arc::clone(name), Arc::downgrade(&permits));
        permits
    }
}

/// A connection's bytes, in the clear or not.
pub trait Stream: AsyncRead + AsyncWrite + Unpin {}
impl<T: AsyncRead + AsyncWrite + Unpin> Stream for T {}

/// Where an endpoint is.
#[derive(Debug, Clone)]
pub enum Host {
    /// The URL's host is an address.
    Literal(IpAddr),
    /// It is a name.
    Name(Arc<str>),
}

/// What a lookup brought.
type Resolved = Result<Rc<[SocketAddr]>, Failure>;

/// Dials one endpoint. Stays on one thread.
pub struct Dialer {
    host: Host,
    port: u16,
    /// The name that the certificate must carry; `None` for http.
    tls: Option<(TlsConnector, ServerName<'static>)>,
    guard: Arc<Guard>,
    resolver: Resolver,
    /// One lookup at a time: the others wait for its answer. The permit goes along into the blocking call, so that
    /// one that was given up still counts, and a resolver that hangs costs an endpoint one thread.
    lookup: Arc<Semaphore>,
    /// Those of the same name by all endpoints.
    lookups: Arc<Semaphore>,
    resolved: RefCell<Option<(Instant, Resolved)>>,
}

impl Dialer {
    /// A dialer for this host; over TLS when there is a connector and a name for the certificate.
    pub fn new(
        host: Host,
        port: u16,
        tls: Option<(TlsConnector, ServerName<'static>)>,
        guard: Arc<Guard>,
        resolver: Resolver,
        lookups: &Lookups,
    ) -> Self {
        let lookups = match &host {
            Host::Name(name) => lookups.of(name),
            Host::Literal(_) => Arc::new(Semaphore::new(0)),
        };
        let lookup = Arc::new(Semaphore::new(1));
        Self { host, port, tls, guard, resolver, lookup, lookups, resolved: RefCell::new(None) }
    }

    /// Opens a connection. Tells `phase` how far it has come. Safe to drop.
    ///
    /// # Errors
    /// When the name does not resolve, no address may be dialled, none answers, or the certificate is not trusted.
    pub async fn dial(&self, phase: &std::cell::Cell<Phase>) -> Result<Box<dyn Stream>, Failure> {
        phase.set(Phase::Connecting);
        let addresses = match &self.host {
            Host::Literal(address) => Rc::from([SocketAddr::new(*address, self.port)]),
            Host::Name(name) => self.resolve(name).await?,
        };
        let tcp = self.connect(&addresses).await?;
        if let Err(error) = tcp.set_nodelay(true) {
            // Slower, not wrong.
            log::debug!("cannot set TCP_NODELAY: {error}");
        }
        let Some((connector, name)) = &self.tls else {
            return Ok(Box::new(tcp));
        };
        phase.set(Phase::Securing);
        let tls = connector.connect(name.clone(), tcp).await.map_err(|error| Failure::tls(&error))?;
        Ok(Box::new(tls))
    }

    async fn resolve(&self, name: &Arc<str>) -> Resolved {
        let permit = take(&self.lookup).await?;
        if let Some((at, result)) = &*self.resolved.borrow() {
            let fresh_for = if result.is_ok() { RESOLVED_FOR } else { UNRESOLVED_FOR };
            if at.elapsed() < fresh_for {
                return result.clone();
            }
        }
        let permits = (permit, take(&self.lookups).await?);
        let (resolver, asked, port) = (Arc::clone(&self.resolver), Arc::clone(name), self.port);
        let answer = tokio::task::spawn_blocking(move || {
            let answer = resolver(&asked, port);
            drop(permits);
            answer
        })
        .await;
        let result = match answer {
            Ok(Ok(addresses)) if !addresses.is_empty() => Ok(Rc::from(addresses)),
            // The resolver's own words name its inside ("Temporary failure in name resolution"), and help nobody more.
            _ => Err(Failure::new(FailureKind::Dns, format!("the name {name} cannot be resolved"))),
        };
        *self.resolved.borrow_mut() = Some((Instant::now(), result.clone()));
        result
    }

    /// Connects to the first allowed address that answers; each gets a head start before the next is tried as well.
    async fn connect(&self, addresses: &[SocketAddr]) -> Result<TcpStream, Failure> {
        let https = self.tls.is_some();
        let mut allowed = addresses.iter().filter(|a| self.guard.admits(a.ip(), https)).take(ADDRESSES_MAX);
        let Some(first) = allowed.next() else {
            let would_do = addresses.iter().any(|a| self.guard.admits(a.ip(), true));
            return Err(if would_do { Failure::refused_cleartext() } else { Failure::refused_address() });
        };
        let mut tries: FuturesUnordered<Pin<Box<dyn Future<Output = std::io::Result<TcpStream>>>>> =
            FuturesUnordered::new();
        tries.push(Box::pin(TcpStream::connect(*first)));
        loop {
            let next = allowed.clone().next();
            tokio::select! {
                Some(result) = tries.next() => match result {
                    Ok(stream) => return Ok(stream),
                    Err(error) if tries.is_empty() && next.is_none() => return Err(Failure::connect(&error)),
                    Err(_) => {}
                },
                () = tokio::time::sleep(NEXT_ADDRESS_AFTER), if next.is_some() => {}
            }
            if let Some(address) = allowed.next() {
                tries.push(Box::pin(TcpStream::connect(*address)));
            }
        }
    }
}

async fn take(permits: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, Failure> {
    let permit = Arc::clone(permits).acquire_owned().await;
    permit.map_err(|_| Failure::new(FailureKind::Dns, "the name cannot be resolved"))
}

impl std::fmt::Debug for Dialer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dialer").field("host", &self.host).field("port", &self.port).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn dialer(allow: &str, port: u16, resolver: Resolver) -> Dialer {
        dialer_among(&Lookups::default(), "hooks.example", allow, port, resolver)
    }

    fn dialer_among(lookups: &Lookups, name: &str, allow: &str, port: u16, resolver: Resolver) -> Dialer {
        let allow: Vec<ipnet::IpNet> = vec![allow.parse().expect("a CIDR")];
        Dialer::new(Host::Name(name.into()), port, None, Arc::new(Guard::new(allow)), resolver, lookups)
    }

    fn answers(all: &[&str]) -> Resolver {
        let all: Vec<IpAddr> = all.iter().map(|a| a.parse().expect("an address")).collect();
        Arc::new(move |_, port| Ok(all.iter().map(|a| SocketAddr::new(*a, port)).collect()))
    }

    async fn listener() -> (tokio::net::TcpListener, u16) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let port = listener.local_addr().expect("bound").port();
        (listener, port)
    }

    #[actix_rt::test]
    async fn only_the_allowed_addresses_of_a_name_are_dialled() {
        let (_listener, port) = listener().await;
        let resolver = answers(&["10.255.255.1", "127.0.0.2", "::1", "127.0.0.1"]);
        let stream = dialer("127.0.0.1/32", port, resolver).dial(&Cell::new(Phase::Connecting)).await;
        assert!(stream.is_ok());
        let resolver = answers(&["10.0.0.1", "127.0.0.1", "::ffff:127.0.0.1"]);
        let refused = dialer("192.168.0.0/16", port, resolver).dial(&Cell::new(Phase::Connecting)).await;
        assert_eq!(refused.err(), Some(Failure::refused_address()));
    }

    #[actix_rt::test]
    async fn cleartext_goes_to_listed_addresses_only() {
        let refused = dialer("127.0.0.1/32", 1, answers(&["8.8.8.8"])).dial(&Cell::new(Phase::Connecting)).await;
        assert_eq!(refused.err(), Some(Failure::refused_cleartext()));
    }

    #[actix_rt::test]
    async fn an_answer_that_changes_is_judged_again() {
        let (_listener, port) = listener().await;
        let turns = Arc::new(Mutex::new(vec!["169.254.169.254", "127.0.0.1"]));
        let resolver: Resolver = Arc::new(move |_, port| {
            let next = turns.lock().pop().unwrap_or("169.254.169.254");
            Ok(vec![SocketAddr::new(next.parse().expect("an address"), port)])
        });
        let dialer = dialer("127.0.0.1/32", port, resolver);
        assert!(dialer.dial(&Cell::new(Phase::Connecting)).await.is_ok());
        dialer.resolved.borrow_mut().take();
        let second = dialer.dial(&Cell::new(Phase::Connecting)).await;
        assert_eq!(second.err(), Some(Failure::refused_address()));
    }

    #[actix_rt::test]
    async fn an_address_that_refuses_is_followed_by_the_next() {
        let (_listener, port) = listener().await;
        let dialer = dialer("127.0.0.0/8", port, answers(&["127.0.0.3", "127.0.0.1"]));
        assert!(dialer.dial(&Cell::new(Phase::Connecting)).await.is_ok());
    }

    #[actix_rt::test]
    async fn a_resolver_that_hangs_costs_one_thread() {
        let asked = Arc::new(Mutex::new(0));
        let (let_go, gate) = std::sync::mpsc::channel::<()>();
        let resolver: Resolver = {
            let (asked, gate) = (Arc::clone(&asked), Mutex::new(gate));
            Arc::new(move |_, port| {
                *asked.lock() += 1;
                // Ends when the sender is dropped.
                let _ = gate.lock().recv();
                Ok(vec![SocketAddr::new([127, 0, 0, 1].into(), port)])
            })
        };
        let dialer = dialer("127.0.0.0/8", 9, resolver);
        let phase = Cell::new(Phase::Connecting);
        for _ in 0..20 {
            assert!(tokio::time::timeout(Duration::from_millis(5), dialer.dial(&phase)).await.is_err());
        }
        assert_eq!(*asked.lock(), 1);
        drop(let_go);
    }

    #[actix_rt::test]
    async fn a_name_that_hangs_costs_a_few_threads_whoever_asks_for_it() {
        let asked = Arc::new(Mutex::new(0));
        let (let_go, gate) = std::sync::mpsc::channel::<()>();
        let hangs: Resolver = {
            let (asked, gate) = (Arc::clone(&asked), Mutex::new(gate));
            Arc::new(move |_, _| {
                *asked.lock() += 1;
                let _ = gate.lock().recv();
                Ok(vec![])
            })
        };
        let (lookups, phase) = (Lookups::default(), Cell::new(Phase::Connecting));
        for _ in 0..20 {
            // An endpoint made anew each time, as a test call does.
            let dialer = dialer_among(&lookups, "hangs.example", "127.0.0.0/8", 9, Arc::clone(&hangs));
            assert!(tokio::time::timeout(Duration::from_millis(5), dialer.dial(&phase)).await.is_err());
        }
        assert_eq!(*asked.lock(), LOOKUPS_PER_NAME);
        let (_listener, port) = listener().await;
        let other = dialer_among(&lookups, "other.example", "127.0.0.0/8", port, answers(&["127.0.0.1"]));
        assert!(other.dial(&phase).await.is_ok(), "another name is looked up meanwhile");
        drop(let_go);
    }

    #[test]
    fn names_out_of_use_are_forgotten() {
        let lookups = Lookups::default();
        let kept: Vec<_> = (0..50).map(|n| lookups.of(&format!("kept-{n}").into())).collect();
        (0..10_000).for_each(|n| drop(lookups.of(&format!("gone-{n}").into())));
        assert!(lookups.0.lock().names.len() <= 2 * kept.len() + 65, "{}", lookups.0.lock().names.len());
        assert!(Arc::ptr_eq(&kept[7], &lookups.of(&"kept-7".into())));
    }
}
