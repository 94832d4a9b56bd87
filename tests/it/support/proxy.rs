//! A TCP proxy between a router and its broker that does what networks do: it cuts, delays, falls silent, loses one
//! direction, and forgets connections that one end believes in.
//!
//! It runs on a thread of its own, so that a test that is busy does not slow the network down. Bytes that it has taken
//! are never lost while a connection lives: a silence that ends is what TCP makes of a cable that is plugged in again.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};

/// Bytes that are on their way at once, in one direction of one connection.
const CHUNK_BYTES: usize = 64 << 10;

/// How the network is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Network {
    /// It passes everything on.
    Good,
    /// It passes everything on, this much later.
    Slow(Duration),
    /// Connections, new ones as well, stay open; nothing is passed on.
    Silent,
    /// What the router says arrives; what the broker says does not.
    Deaf,
    /// New connections are closed at once. Those that there are stay.
    Closed,
}

/// What the proxy's connections go by.
#[derive(Debug, Clone, Copy)]
struct State {
    network: Network,
    /// Connections of an earlier cut are closed, both ends.
    cuts: u64,
    /// Connections from before are closed towards the broker, and stay open and silent towards the router.
    forgotten: u64,
}

/// See the module. Dropped, it closes everything.
pub(crate) struct Proxy {
    address: SocketAddr,
    state: watch::Sender<State>,
    /// Ends the thread when it is dropped.
    _stop: oneshot::Sender<()>,
}

impl Proxy {
    /// Starts one in front of `upstream`.
    pub(crate) async fn start(upstream: SocketAddr) -> Self {
        let (state, follow) = watch::channel(State { network: Network::Good, cuts: 0, forgotten: 0 });
        let (stop, stopped) = oneshot::channel();
        let (listening, address) = oneshot::channel();
        let body = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(async move {
                let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a free port");
                let address = listener.local_addr().expect("a bound socket has an address");
                listening.send(address).expect("the test waits for it");
                tokio::select! {
                    () = accept(&listener, upstream, follow) => {}
                    // Only ever dropped.
                    _ = stopped => {}
                }
            });
        };
        std::thread::Builder::new().name("proxy".into()).spawn(body).expect("a thread");
        let address = address.await.expect("the proxy listens");
        Self { address, state, _stop: stop }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Changes the network, for the connections that there are and for new ones.
    pub(crate) fn set(&self, network: Network) {
        self.state.send_modify(|state| state.network = network);
    }

    /// Closes every connection, at both ends.
    pub(crate) fn cut(&self) {
        self.state.send_modify(|state| state.cuts += 1);
    }

    /// Closes every connection towards the broker only. The router's ends stay open, and nothing ever comes on them: a
    /// firewall that forgot them.
    pub(crate) fn forget(&self) {
        self.state.send_modify(|state| state.forgotten += 1);
    }
}

async fn accept(listener: &TcpListener, upstream: SocketAddr, state: watch::Receiver<State>) {
    loop {
        let (router, _) = listener.accept().await.expect("a listener accepts");
        if state.borrow().network == Network::Closed {
            reset(&router);
            continue;
        }
        let state = state.clone();
        tokio::spawn(async move {
            // How a connection ended is the business of its ends.
            let _ = connect(router, upstream, state).await;
        });
    }
}

/// Makes a stream close with a reset instead of a farewell.
fn reset(stream: &TcpStream) {
    // Should that fail it is closed in the usual way.
    let _ = stream.set_zero_linger();
}

/// How a connection ends.
enum End {
    /// One end closed it.
    Closed,
    Cut,
    Forgotten,
}

async fn connect(router: TcpStream, upstream: SocketAddr, mut state: watch::Receiver<State>) -> io::Result<()> {
    let born = *state.borrow();
    let is_cut = move |now: &State| now.cuts > born.cuts;
    // Through a silent network nobody connects; to the router it looks as if it had.
    let state_then = state.wait_for(|now| now.network != Network::Silent || is_cut(now)).await;
    let is_over = state_then.map_or(true, |now| is_cut(&now));
    if is_over {
        reset(&router);
        return Ok(());
    }
    let mut router = router;
    let mut broker = TcpStream::connect(upstream).await?;
    router.set_nodelay(true)?;
    broker.set_nodelay(true)?;
    let (mut cut, mut forgotten) = (state.clone(), state.clone());
    let end = {
        let (from_router, to_router) = router.split();
        let (from_broker, to_broker) = broker.split();
        let there = pass(from_router, to_broker, state.clone(), &[Network::Silent]);
        let back = pass(from_broker, to_router, state.clone(), &[Network::Silent, Network::Deaf]);
        tokio::select! {
            _ = there => End::Closed,
            _ = back => End::Closed,
            _ = cut.wait_for(is_cut) => End::Cut,
            _ = forgotten.wait_for(|now| now.forgotten > born.forgotten) => End::Forgotten,
        }
    };
    match end {
        End::Closed => {}
        End::Cut => {
            reset(&router);
            reset(&broker);
        }
        End::Forgotten => {
            drop(broker);
            let swallow = async {
                let mut nowhere = vec![0; CHUNK_BYTES];
                while router.read(&mut nowhere).await.is_ok_and(|bytes| bytes > 0) {}
            };
            tokio::select! {
                () = swallow => {}
                _ = cut.wait_for(is_cut) => {}
            }
        }
    }
    Ok(())
}

/// Passes bytes on in one direction, but while the network is one of `lost`.
async fn pass(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut state: watch::Receiver<State>,
    lost: &[Network],
) -> io::Result<()> {
    let mut bytes = vec![0; CHUNK_BYTES];
    loop {
        let count = from.read(&mut bytes).await?;
        if count == 0 {
            return Ok(());
        }
        // The test's end drops the sender, and then the thread.
        let passes = state.wait_for(|now| !lost.contains(&now.network)).await.map_err(io::Error::other)?.network;
        if let Network::Slow(delay) = passes {
            tokio::time::sleep(delay).await;
        }
        to.write_all(&bytes[..count]).await?;
    }
}
