//! The client's end of a connection, and the regions of a peer as stores.
//!
//! Role: hops *request* and *reply*. Neighbours: a pager reads [`RemoteStore`]s; `lane` and `pull` carry the requests. Invariants: everything runs on the peer's
//! service, also when a caller's own runtime asks (S2); a lost connection is an error at once and is dialled again by the next request (S3 is
//! the pager's policy); a peer is who its key says or nobody (S7).

use super::{
    identity::{Identity, PeerId},
    lane::{CONTROL_PRIORITY, Lane},
    pull::RemotePull,
    stream::{FrameReader, FrameWriter},
    tls::{self, Trust},
    transport::{PrivateRuntime, TransportOptions},
    wire::{Access, Agent, Class, EncodedRun, Frame, Name, PROTOCOL_VERSION, PullExtents, RunExtent},
};
use crate::{Extent, Hops, NetError, PageSize, PageStore, Pull, ReadAfterRead, Run, Service, StoreError};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// A connection to a server, dialled again when it is lost. Cheap to clone; closed with its last clone and last [`RemoteStore`].
///
/// ```no_run
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Identity, Peer, Region};
/// let identity = Identity::load("client.pem")?;
/// let server = "5f2c8c0e6b1f4d3a9e7b5c1d2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c".parse()?;
/// let peer = Peer::connect("192.0.2.7:4433".parse()?, server, &identity).await?;
/// let region = Region::builder().store(peer.open("world").await?).open()?;
/// # let _ = region;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Peer {
    inner: Arc<Inner>,
}

struct Inner {
    address: SocketAddr,
    trusted: Trust,
    name: String,
    own: PeerId,
    options: TransportOptions,
    service: Service,
    endpoint: quinn::Endpoint,
    link: Mutex<Option<Arc<Link>>>,
    /// Held while dialling, so that many waiters dial once.
    dialling: tokio::sync::Mutex<()>,
    hops: Arc<Hops>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"closed");
    }
}

/// One live connection.
struct Link {
    connection: quinn::Connection,
    control: tokio::sync::Mutex<(FrameWriter, FrameReader)>,
    lanes: [Mutex<Vec<Arc<Lane>>>; 3],
    /// Numbers of regions opened on this connection.
    regions: Mutex<HashMap<String, Opened>>,
}

#[derive(Clone, Copy)]
struct Opened {
    region: u32,
    access: Access,
    page: PageSize,
    size_bytes: u64,
}

/// How many lanes of each class may be open. Demand: one a thread of the largest machine is pointless; 16 keep 16 slow answers apart.
const LANES_MAX: [usize; 3] = [4, 8, 16];

/// Describes a connection, see [`Peer::builder`].
#[derive(Debug)]
pub struct PeerBuilder<'a> {
    address: SocketAddr,
    trusted: Trust,
    identity: &'a Identity,
    options: TransportOptions,
    service: Option<Service>,
}

impl PeerBuilder<'_> {
    /// Default [`TransportOptions::default`].
    #[must_use]
    pub fn transport(mut self, options: TransportOptions) -> Self {
        self.options = options;
        self
    }

    /// The thread that carries it: that of the pager that reads from it ([`Pager::service`](crate::Pager::service)) makes a fault cross the fewest threads. Default: one of its own.
    #[must_use]
    pub fn service(mut self, service: &Service) -> Self {
        self.service = Some(service.clone());
        self
    }

    /// Dials, and returns when the server has let this end in.
    ///
    /// # Errors
    /// As for [`Peer::connect`].
    pub async fn connect(self) -> Result<Peer, NetError> {
        self.options.check()?;
        let service = match self.service {
            Some(service) => service,
            None => Service::start("pageferry-peer", crate::DEFAULT_POLL_BUDGET).map_err(|error| NetError::Socket {
                call: "starting a thread for",
                address: self.address,
                source: Arc::new(error),
            })?,
        };
        let crypto = tls::client_config(self.identity, &self.trusted, &[tls::ALPN])?;
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(self.options.quinn()?));
        let local: SocketAddr = match self.address {
            SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
            SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
        };
        let mut endpoint = self.options.endpoint(local, None, &PrivateRuntime::of(&service))?;
        endpoint.set_default_client_config(config);
        let peer = Peer {
            inner: Arc::new(Inner {
                address: self.address,
                trusted: self.trusted,
                name: self.address.to_string(),
                own: self.identity.peer_id(),
                options: self.options,
                service,
                endpoint,
                link: Mutex::new(None),
                dialling: tokio::sync::Mutex::new(()),
                hops: Arc::default(),
            }),
        };
        peer.on_service(|inner| async move { inner.link().await.map(|_| ()) }).await?;
        Ok(peer)
    }
}

impl Peer {
    /// Connects to the server whose key has the id `server`.
    ///
    /// Cancellation: dropping the future gives up.
    ///
    /// # Errors
    /// [`NetError::Rejected`] if either end does not accept the other, [`NetError::NoConnection`] if nobody answers within
    /// [`TransportOptions::connect_timeout`], [`NetError::Socket`].
    pub async fn connect(address: SocketAddr, server: PeerId, identity: &Identity) -> Result<Peer, NetError> {
        Peer::builder(address, Trust::ids([server]), identity).connect().await
    }

    /// Starts to describe a connection to a server that `trust` accepts.
    #[must_use]
    pub fn builder(address: SocketAddr, trust: Trust, identity: &Identity) -> PeerBuilder<'_> {
        PeerBuilder { address, trusted: trust, identity, options: TransportOptions::default(), service: None }
    }

    /// A region of the server as a store. The server must have granted it to this end's id.
    ///
    /// # Errors
    /// [`NetError::Refused`] if it is not granted or does not exist (which of the two is not told), and as for [`Peer::connect`].
    pub async fn open(&self, name: &str) -> Result<RemoteStore, NetError> {
        let region = Name::new(name).map_err(|error| NetError::InvalidOption {
            option: "name",
            value: name.to_owned(),
            allowed: error.to_string(),
        })?;
        let opened = self.on_service(|inner| async move { inner.link().await?.open(&region).await }).await?;
        Ok(RemoteStore { peer: self.clone(), name: name.to_owned(), page: opened.page, size_bytes: opened.size_bytes })
    }

    /// Latency by hop of all requests on it: [`Hop::Request`](crate::Hop::Request), `Wire`, `Serve`, `Reply`.
    #[must_use]
    pub fn hops(&self) -> &Hops {
        &self.inner.hops
    }

    /// The smoothed round trip; `None` while not connected.
    #[must_use]
    pub fn rtt(&self) -> Option<Duration> {
        self.inner.live().map(|link| link.connection.rtt())
    }

    /// The datagram size in use, in bytes of UDP payload; `None` while not connected.
    #[must_use]
    pub fn mtu_bytes(&self) -> Option<u16> {
        self.inner.live().map(|link| link.connection.stats().path.current_mtu)
    }

    /// The thread that carries it.
    #[must_use]
    pub fn service(&self) -> &Service {
        &self.inner.service
    }

    /// A stream of its own for a handover.
    pub(crate) async fn open_stream(&self) -> Result<(FrameWriter, FrameReader), NetError> {
        self.on_service(|inner| async move {
            let link = inner.link().await?;
            let (send, receive) = link.connection.open_bi().await.map_err(|error| inner.lost(&error))?;
            let writer = FrameWriter::new(send);
            writer.prioritise(CONTROL_PRIORITY);
            Ok((writer, FrameReader::new(receive)))
        })
        .await
    }

    /// Runs on the service, whoever asks: connections and their tasks must not belong to a runtime whose threads may fault.
    async fn on_service<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, NetError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetError>> + Send + 'static,
    {
        let work = work(self.inner.clone());
        if self.inner.service.is_current() {
            return work.await;
        }
        self.inner.service.spawn(work).await.map_err(|_| NetError::Closed)?
    }
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peer").field("address", &self.inner.address).field("trusted", &self.inner.trusted).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn live(&self) -> Option<Arc<Link>> {
        lock(&self.link).clone().filter(|link| link.connection.close_reason().is_none())
    }

    fn lost(&self, error: &quinn::ConnectionError) -> NetError {
        let (address, waited) = (self.address, self.options.connect_timeout);
        match tls::rejection(error, self.own) {
            Some(reason) => NetError::Rejected { address, reason },
            None => NetError::NoConnection { address, waited, reason: error.to_string() },
        }
    }

    /// The connection, dialled if there is none.
    async fn link(&self) -> Result<Arc<Link>, NetError> {
        if let Some(link) = self.live() {
            return Ok(link);
        }
        let _one_at_a_time = self.dialling.lock().await;
        if let Some(link) = self.live() {
            return Ok(link);
        }
        let (address, waited) = (self.address, self.options.connect_timeout);
        let dialled = tokio::time::timeout(waited, self.dial()).await;
        let late = |_| NetError::NoConnection { address, waited, reason: "no answer".into() };
        let link = Arc::new(dialled.map_err(late)??);
        *lock(&self.link) = Some(link.clone());
        Ok(link)
    }

    async fn dial(&self) -> Result<Link, NetError> {
        let refused = |error: quinn::ConnectError| NetError::Identity { reason: error.to_string() };
        let connecting = self.endpoint.connect(self.address, tls::SERVER_NAME).map_err(refused)?;
        let connection = connecting.await.map_err(|error| self.lost(&error))?;
        let (send, receive) = connection.open_bi().await.map_err(|error| self.lost(&error))?;
        let (mut writer, mut reader) = (FrameWriter::new(send), FrameReader::new(receive));
        writer.prioritise(CONTROL_PRIORITY);
        // The server may refuse this end's key only now: the handshake ends here before it ends there (RFC 8446, 4.4).
        let ended = |reason: String| match connection.close_reason() {
            Some(error) => self.lost(&error),
            None => NetError::Protocol(reason),
        };
        let hello = Frame::Hello { version: VERSION, agent: Agent::cut(AGENT) };
        writer.send(&hello).await.map_err(|error| ended(error.to_string()))?;
        match reader.next().await.map_err(|error| ended(error.to_string()))? {
            Some(Frame::Welcome { version, .. }) if version == VERSION => {}
            Some(Frame::Failed { code, message }) => {
                return Err(NetError::Refused { code: code.into(), message: message.to_string() });
            }
            other => return Err(ended(format!("WELCOME was expected, got {:?}", other.map(|frame| frame.kind().name())))),
        }
        Ok(Link {
            connection,
            control: tokio::sync::Mutex::new((writer, reader)),
            lanes: Default::default(),
            regions: Mutex::default(),
        })
    }
}

#[allow(clippy::cast_possible_truncation, reason = "a constant of 1")]
pub(super) const VERSION: u16 = PROTOCOL_VERSION as u16;
pub(super) const AGENT: &str = concat!("pageferry/", env!("CARGO_PKG_VERSION"));

impl Link {
    async fn open(&self, name: &Name) -> Result<Opened, NetError> {
        if let Some(opened) = lock(&self.regions).get(&***name) {
            return Ok(*opened);
        }
        let mut control = self.control.lock().await;
        let (writer, reader) = &mut *control;
        let protocol = |error: super::stream::StreamError| NetError::Protocol(error.to_string());
        writer.send(&Frame::Open { name: name.clone() }).await.map_err(protocol)?;
        match reader.next().await.map_err(protocol)? {
            Some(Frame::Opened { region, access, page_size, size_bytes }) => {
                let opened = Opened { region, access, page: page_size, size_bytes };
                lock(&self.regions).insert((***name).to_owned(), opened);
                Ok(opened)
            }
            Some(Frame::Failed { code, message }) => Err(NetError::Refused { code: code.into(), message: message.to_string() }),
            other => Err(NetError::Protocol(format!("OPENED was expected, got {:?}", other.map(|frame| frame.kind().name())))),
        }
    }

    /// An idle lane, a new one, or the least loaded.
    async fn lane(&self, inner: &Inner, class: Class) -> Result<Arc<Lane>, StoreError> {
        let slot = &self.lanes[class as usize];
        {
            let mut lanes = lock(slot);
            lanes.retain(|lane| !lane.ended());
            let least = lanes.iter().min_by_key(|lane| lane.load());
            if let Some(lane) = least
                && (lane.load() == 0 || lanes.len() >= LANES_MAX[class as usize])
            {
                return Ok(lane.clone());
            }
        }
        let lane = Lane::open(&self.connection, class, &inner.service, inner.hops.clone(), &inner.name).await?;
        lock(slot).push(lane.clone());
        Ok(lane)
    }
}

/// A region of a peer as a [`PageStore`]: pages come over QUIC, from a connection that is dialled again when it is lost.
///
/// See [`Peer::open`].
#[derive(Clone, Debug)]
pub struct RemoteStore {
    peer: Peer,
    name: String,
    page: PageSize,
    size_bytes: u64,
}

/// How much one READ asks for.
const READ_MAX_BYTES: u64 = 1 << 20;

impl RemoteStore {
    /// The peer it belongs to.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    fn unreachable(&self, error: NetError) -> StoreError {
        match error {
            NetError::Refused { code, message } => StoreError::Refused { code, message },
            NetError::Protocol(what) => StoreError::Protocol(what),
            other => StoreError::Unreachable { peer: self.peer.inner.name.clone(), reason: other.to_string() },
        }
    }

    /// The connection, and this region on it.
    async fn opened(&self) -> Result<(Arc<Link>, Opened), StoreError> {
        if let Some(link) = self.peer.inner.live() {
            let opened = lock(&link.regions).get(&self.name).copied();
            if let Some(opened) = opened {
                return Ok((link, opened));
            }
        }
        let name = Name::new(self.name.as_str()).map_err(|error| StoreError::Protocol(error.to_string()))?;
        let work = |inner: Arc<Inner>| async move {
            let link = inner.link().await?;
            let opened = link.open(&name).await?;
            Ok((link, opened))
        };
        let (link, opened) = self.peer.on_service(work).await.map_err(|error| self.unreachable(error))?;
        if opened.size_bytes != self.size_bytes || opened.page != self.page {
            return Err(StoreError::Protocol(format!(
                "region {:?} has {} bytes now and had {} when it was opened",
                self.name, opened.size_bytes, self.size_bytes
            )));
        }
        Ok((link, opened))
    }

    async fn read_class(&self, extent: Extent, class: Class) -> Result<Vec<Run>, StoreError> {
        self.check(extent)?;
        let mut runs = Vec::new();
        for part in extent.chunks(READ_MAX_BYTES / self.page.bytes()) {
            let (link, opened) = self.opened().await?;
            let lane = self.lane(&link, class).await?;
            let part_extent = RunExtent::new(part).map_err(|error| StoreError::Protocol(error.to_string()))?;
            let request = Frame::Read { region: opened.region, extent: part_extent };
            let answer = lane.ask(&request, Some(part), self.page).await?;
            if runs.is_empty() {
                runs = answer;
            } else {
                runs.extend(answer);
            }
        }
        Ok(runs)
    }

    async fn lane(&self, link: &Arc<Link>, class: Class) -> Result<Arc<Lane>, StoreError> {
        link.lane(&self.peer.inner, class).await
    }
}

#[async_trait]
impl PageStore for RemoteStore {
    fn size(&self) -> u64 {
        self.size_bytes
    }

    fn page_size(&self) -> PageSize {
        self.page
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read_class(extent, Class::Demand).await
    }

    async fn read_behind(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read_class(extent, Class::Behind).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_write(extent, bytes)?;
        let page_len = self.page.len();
        for part in extent.chunks(READ_MAX_BYTES / self.page.bytes()) {
            let (link, opened) = self.opened().await?;
            if opened.access == Access::Read {
                return Err(StoreError::ReadOnly);
            }
            #[allow(clippy::cast_possible_truncation, reason = "inside `bytes`, whose length was checked against the extent")]
            let (from, len) = ((part.first() - extent.first()) as usize * page_len, part.count() as usize * page_len);
            let content = crate::Content::Bytes(Bytes::copy_from_slice(&bytes[from..from + len]));
            let (encoding, content) = super::codec::encode_run(content, self.peer.inner.options.compress);
            let run = EncodedRun::new(part, encoding, content).map_err(|error| StoreError::Protocol(error.to_string()))?;
            let lane = self.lane(&link, Class::Background).await?;
            lane.ask(&Frame::Write { region: opened.region, run }, None, self.page).await?;
        }
        Ok(())
    }

    async fn flush(&self) -> Result<(), StoreError> {
        let (link, opened) = self.opened().await?;
        let lane = self.lane(&link, Class::Background).await?;
        lane.ask(&Frame::Flush { region: opened.region }, None, self.page).await.map(|_| ())
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        extents.iter().try_for_each(|extent| self.check(*extent))?;
        let Ok(listed) = PullExtents::new(extents.clone()) else {
            // So fragmented that the list does not fit a frame: ask piece by piece.
            return Ok(Box::new(ReadAfterRead::new(self.clone(), extents)));
        };
        let (link, opened) = self.opened().await?;
        let lost = |reason: String| StoreError::Unreachable { peer: self.peer.inner.name.clone(), reason };
        let (send, receive) = link.connection.open_bi().await.map_err(|error| lost(error.to_string()))?;
        let window_bytes = u64::from(self.peer.inner.options.stream_window_bytes);
        let pull = RemotePull::start(send, receive, opened.region, listed, window_bytes, self.page, &self.peer.inner.name);
        Ok(Box::new(pull.await?))
    }
}
