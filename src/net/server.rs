//! Serves stores to the peers that were granted them.
//!
//! Role: hop *serve*: the server's end of connections. Neighbours: `serve` answers the requests on a stream; `migrate` hangs its handover in here. Invariants:
//! S7: a peer has proved a key that was let in before its first byte is read, and reaches only what that key was granted; S2: everything runs
//! on the server's own service.

use super::{
    identity::{Identity, PeerId},
    serve::{Feed, Session},
    stream::{FrameReader, FrameWriter},
    tls::{self, Trust},
    transport::{PrivateRuntime, TransportOptions, recognisable},
    wire::{Access, Frame, Plan},
};
use crate::{NetError, PageStore, Service};
use std::{
    collections::HashMap,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, RwLock},
};

/// What a peer may do with a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// Read its pages.
    Read,
    /// Read and write them.
    ReadWrite,
}

/// Serves stores over QUIC. Stops when dropped.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Extent, Grant, Identity, MemoryStore, PageSize, PageStore, Peer, Server};
/// let (ours, theirs) = (Identity::generate()?, Identity::generate()?);
/// let store = MemoryStore::from_bytes(vec![9; 1 << 20], PageSize::KIB_4);
/// let server = Server::builder(&ours)
///     .grant(theirs.peer_id(), "world", store, Grant::Read)
///     .listen("127.0.0.1:0".parse()?)?;
/// let peer = Peer::connect(server.local_addr(), ours.peer_id(), &theirs).await?;
/// let mut page = [0; 4096];
/// peer.open("world").await?.read_into(Extent::page(3), &mut page).await?;
/// assert_eq!(page, [9; 4096]);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    endpoint: quinn::Endpoint,
    local: SocketAddr,
    /// Keeps the thread.
    _service: Service,
}

/// What all connections of a server share.
pub(super) struct Shared {
    trust: Trust,
    grants: RwLock<Grants>,
    connections: Mutex<HashMap<usize, (PeerId, quinn::Connection)>>,
    pub(super) options: TransportOptions,
    pub(super) service: Service,
    pub(super) extension: Option<Arc<dyn Extension>>,
}

#[derive(Default)]
struct Grants {
    by_peer: HashMap<PeerId, HashMap<String, Granted>>,
    to_all: HashMap<String, Granted>,
}

/// A store and what may be done with it.
#[derive(Clone)]
pub(super) struct Granted {
    pub(super) store: Arc<dyn PageStore>,
    pub(super) access: Access,
}

impl Granted {
    fn new(store: Arc<dyn PageStore>, grant: Grant) -> Granted {
        let access = match grant {
            Grant::Read => Access::Read,
            Grant::ReadWrite => Access::ReadWrite,
        };
        Granted { store, access }
    }
}

/// A stream that is neither of reads nor of a pull: the handover's.
pub(crate) struct TakeStream {
    pub(crate) peer: PeerId,
    pub(crate) session: u128,
    pub(crate) plan: Plan,
    pub(crate) writer: FrameWriter,
    pub(crate) reader: FrameReader,
}

/// What `migrate` hangs into a server.
pub(crate) trait Extension: Send + Sync {
    /// A peer asks to take over the program (TAKE). Runs on the server's service until the future ends.
    fn take(&self, stream: TakeStream) -> Pin<Box<dyn Future<Output = ()> + Send>>;

    /// A peer listens for the pages of a region (FEED). Dropping it ends the stream.
    fn feed(&self, feed: Feed);

    /// A peer says that it has taken the program over (DEPOSE); what it is answered.
    fn depose(&self, peer: PeerId, session: u128, epoch: u64) -> Frame;
}

/// See [`Server::builder`].
pub struct ServerBuilder<'a> {
    identity: &'a Identity,
    trust: Trust,
    grants: Grants,
    options: TransportOptions,
    service: Option<Service>,
    extension: Option<Arc<dyn Extension>>,
}

impl std::fmt::Debug for ServerBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerBuilder").field("trust", &self.trust).finish_non_exhaustive()
    }
}

impl<'a> ServerBuilder<'a> {
    /// Lets `peer` in and grants it `store` under a name of 1 to 255 bytes.
    #[must_use]
    pub fn grant(self, peer: PeerId, name: &str, store: impl PageStore, grant: Grant) -> Self {
        self.grant_shared(peer, name, Arc::new(store), grant)
    }

    /// As [`grant`](ServerBuilder::grant), for a store that others use too.
    #[must_use]
    pub fn grant_shared(mut self, peer: PeerId, name: &str, store: Arc<dyn PageStore>, grant: Grant) -> Self {
        self.trust.let_in(peer);
        self.grants.by_peer.entry(peer).or_default().insert(name.to_owned(), Granted::new(store, grant));
        self
    }

    /// Grants a store to everybody that `trust` lets in.
    #[must_use]
    pub fn grant_all(mut self, name: &str, store: impl PageStore, grant: Grant) -> Self {
        self.grants.to_all.insert(name.to_owned(), Granted::new(Arc::new(store), grant));
        self
    }

    /// Who is let in beside the peers named in grants, for instance those whose certificates an authority signed. Default: nobody. Comes before the grants.
    #[must_use]
    pub fn trust(mut self, trust: Trust) -> Self {
        for peer in self.grants.by_peer.keys() {
            trust.let_in(*peer);
        }
        self.trust = trust;
        self
    }

    /// Default [`TransportOptions::default`].
    #[must_use]
    pub fn transport(mut self, options: TransportOptions) -> Self {
        self.options = options;
        self
    }

    /// The thread that serves. Default: one of its own.
    #[must_use]
    pub fn service(mut self, service: &Service) -> Self {
        self.service = Some(service.clone());
        self
    }

    #[must_use]
    pub(crate) fn extension(mut self, extension: Arc<dyn Extension>) -> Self {
        self.extension = Some(extension);
        self
    }

    /// Binds `address` (port 0: any free port) and serves from then on.
    ///
    /// # Errors
    /// [`NetError::Socket`], [`NetError::Identity`], [`NetError::InvalidOption`].
    pub fn listen(self, address: SocketAddr) -> Result<Server, NetError> {
        self.options.check()?;
        let socket = |call, error| NetError::Socket { call, address, source: Arc::new(error) };
        let service = match self.service {
            Some(service) => service,
            None => Service::start("pageferry-serve", crate::DEFAULT_POLL_BUDGET)
                .map_err(|error| socket("starting a thread for", error))?,
        };
        let crypto = tls::server_config(self.identity, &self.trust, &[tls::ALPN])?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
        config.transport_config(Arc::new(self.options.quinn()?));
        let recognisable = recognisable(self.identity);
        let endpoint = self.options.endpoint(address, Some(config), recognisable, &PrivateRuntime::of(&service))?;
        let local = endpoint.local_addr().map_err(|error| socket("looking up the local address of", error))?;
        let shared = Arc::new(Shared {
            trust: self.trust,
            grants: RwLock::new(self.grants),
            connections: Mutex::default(),
            options: self.options,
            service: service.clone(),
            extension: self.extension,
        });
        service.spawn(accept(endpoint.clone(), Arc::downgrade(&shared)));
        Ok(Server { shared, endpoint, local, _service: service })
    }
}

impl Server {
    /// Starts to describe a server with this key.
    #[must_use]
    pub fn builder(identity: &Identity) -> ServerBuilder<'_> {
        ServerBuilder {
            identity,
            trust: Trust::ids([]),
            grants: Grants::default(),
            options: TransportOptions::default(),
            service: None,
            extension: None,
        }
    }

    /// The address it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// Grants more while it runs. A peer's open regions keep the store they had.
    pub fn grant(&self, peer: PeerId, name: &str, store: impl PageStore, grant: Grant) {
        let granted = Granted::new(Arc::new(store), grant);
        let mut grants = self.shared.grants.write().unwrap_or_else(PoisonError::into_inner);
        grants.by_peer.entry(peer).or_default().insert(name.to_owned(), granted);
        drop(grants);
        self.shared.trust.let_in(peer);
    }

    /// Takes back all grants of a peer and closes its connections.
    pub fn revoke(&self, peer: PeerId) {
        self.shared.trust.shut_out(peer);
        self.shared.grants.write().unwrap_or_else(PoisonError::into_inner).by_peer.remove(&peer);
        for (owner, connection) in self.shared.connections().values() {
            if *owner == peer {
                connection.close(CLOSE_REVOKED.into(), b"the grant was taken back");
            }
        }
    }

    /// How many connections are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections().len()
    }
}

/// Codes with which connections are closed, docs/protocol.md.
const CLOSE_REVOKED: u32 = 2;
pub(super) const CLOSE_BAD_FRAME: u32 = 5;

impl Drop for Server {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"the server was shut down");
    }
}

impl Shared {
    fn connections(&self) -> std::sync::MutexGuard<'_, HashMap<usize, (PeerId, quinn::Connection)>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `peer` was granted under a name.
    pub(super) fn granted(&self, peer: PeerId, name: &str) -> Option<Granted> {
        let grants = self.grants.read().unwrap_or_else(PoisonError::into_inner);
        let own = grants.by_peer.get(&peer).and_then(|regions| regions.get(name));
        own.or_else(|| grants.to_all.get(name)).cloned()
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("trust", &self.trust).finish_non_exhaustive()
    }
}

async fn accept(endpoint: quinn::Endpoint, shared: std::sync::Weak<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        let Some(shared) = shared.upgrade() else { return };
        let service = shared.service.clone();
        service.spawn(async move {
            let remote = incoming.remote_address();
            match incoming.await {
                Ok(connection) => serve_connection(connection, shared).await,
                Err(error) => tracing::info!(%remote, %error, "a connection was refused"),
            }
        });
    }
}

async fn serve_connection(connection: quinn::Connection, shared: Arc<Shared>) {
    let Some(peer) = tls::peer_id_of(&connection) else {
        connection.close(CLOSE_REVOKED.into(), b"no certificate");
        return;
    };
    tracing::info!(%peer, remote = %connection.remote_address(), "a peer connected");
    let id = connection.stable_id();
    shared.connections().insert(id, (peer, connection.clone()));
    let session = Arc::new(Session::new(peer, connection.clone(), shared.clone()));
    let reason = loop {
        match connection.accept_bi().await {
            Ok((send, receive)) => {
                let session = session.clone();
                shared.service.spawn(async move { session.serve(FrameWriter::new(send), FrameReader::new(receive)).await });
            }
            Err(error) => break error,
        }
    };
    tracing::info!(%peer, %reason, "a peer is gone");
    shared.connections().remove(&id);
}
