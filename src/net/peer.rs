//! The client's end of a connection.
//!
//! Role: hops *request* and *reply*. Neighbours: `remote` asks it for lanes; `lane` and `pull` carry the requests. Invariants: everything runs on the peer's
//! service, also when a caller's own runtime asks (S2); a lost connection is an error at once and is dialled again by the next request (S3 is
//! the pager's policy); a peer is who its key says or nobody (S7).

use super::{
    identity::{Identity, PeerId},
    lane::{CONTROL_PRIORITY, Lane, Setting},
    remote::RemoteStore,
    stream::{FrameReader, FrameWriter, StreamError},
    tls::{self, Trust},
    transport::{PrivateRuntime, TransportOptions},
    wire::{Access, Agent, Class, ErrorCode, Frame, Name, PROTOCOL_VERSION, Plan},
};
use crate::{Extent, Hops, NetError, PageSize, Run, Service, StoreError};
use std::{
    collections::HashMap,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
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
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    address: SocketAddr,
    trusted: Trust,
    own: PeerId,
    pub(super) options: TransportOptions,
    pub(super) setting: Setting,
    endpoint: quinn::Endpoint,
    link: Mutex<Option<Arc<Link>>>,
    /// Held while dialling, so that many waiters dial once; when an attempt failed last, and how.
    dialling: tokio::sync::Mutex<Option<(Instant, NetError)>>,
    /// See [`Peer::bind_session`].
    session: Mutex<Option<(u128, u64)>>,
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.endpoint.close(0u32.into(), b"closed");
    }
}

/// One live connection.
pub(super) struct Link {
    pub(super) connection: quinn::Connection,
    control: tokio::sync::Mutex<(FrameWriter, FrameReader)>,
    lanes: [Mutex<Vec<Lane>>; 3],
    /// Numbers of regions opened on this connection.
    regions: Mutex<HashMap<String, Opened>>,
}

/// A region of the peer as it was opened on one connection.
#[derive(Clone, Copy)]
pub(super) struct Opened {
    pub(super) region: u32,
    pub(super) access: Access,
    pub(super) page: PageSize,
    pub(super) size_bytes: u64,
}

/// How many lanes of each class may be open. Demand: one a thread of the largest machine is pointless; 16 keep 16 slow answers apart.
const LANES_MAX: [usize; 3] = [4, 8, 16];

/// Small requests that are made together share a lane: as many as their answers fill a large part of a megabyte with, which a server reads at once.
const TOGETHER_MAX: usize = 16;
const TOGETHER_MAX_BYTES: u64 = 64 * 1024;

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
        let mut endpoint = self.options.endpoint(local, None, quinn::EndpointConfig::default(), &PrivateRuntime::of(&service))?;
        endpoint.set_default_client_config(config);
        let peer = Peer {
            inner: Arc::new(Inner {
                address: self.address,
                trusted: self.trusted,
                own: self.identity.peer_id(),
                setting: Setting {
                    service,
                    hops: Arc::default(),
                    peer: self.address.to_string().into(),
                    answer_timeout: self.options.answer_timeout,
                },
                options: self.options,
                endpoint,
                link: Mutex::new(None),
                dialling: tokio::sync::Mutex::default(),
                session: Mutex::default(),
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
        let name = region.clone();
        let opened = self.on_service(|inner| async move { inner.link().await?.open(&inner, &name).await }).await?;
        Ok(RemoteStore::new(self.clone(), region, opened))
    }

    /// Latency by hop of all requests on it: [`Hop::Request`](crate::Hop::Request), `Wire`, `Serve`, `Reply`.
    #[must_use]
    pub fn hops(&self) -> &Hops {
        &self.inner.setting.hops
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
        &self.inner.setting.service
    }

    /// A stream of its own for a handover.
    pub(crate) async fn open_stream(&self) -> Result<(FrameWriter, FrameReader), NetError> {
        let opened = self.on_service(|inner| async move { inner.link().await?.stream(&inner).await }).await;
        opened.inspect(|(writer, _)| writer.prioritise(CONTROL_PRIORITY))
    }

    /// From now on a server is used only if it is the source that committed this session: one that was started anew at the same address, with the same
    /// key and the same names, has other memory behind them (S1).
    pub(crate) fn bind_session(&self, session: u128, epoch: u64) {
        *lock(&self.inner.session) = Some((session, epoch));
    }

    /// Runs on the service, whoever asks: connections and their tasks must not belong to a runtime whose threads may fault. A task of its own, so
    /// that a caller who gives up does not cut an exchange on the control stream in half.
    pub(super) async fn on_service<T, F>(&self, work: impl FnOnce(Arc<Inner>) -> F) -> Result<T, NetError>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, NetError>> + Send + 'static,
    {
        self.inner.setting.service.spawn(work(self.inner.clone())).await.map_err(|_| NetError::Closed)?
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
    pub(super) fn live(&self) -> Option<Arc<Link>> {
        lock(&self.link).clone().filter(|link| link.connection.close_reason().is_none())
    }

    fn lost(&self, error: &quinn::ConnectionError) -> NetError {
        match tls::rejection(error, self.own) {
            Some(reason) => NetError::Rejected { address: self.address, reason },
            None => self.no_connection(error.to_string()),
        }
    }

    fn no_connection(&self, reason: impl Into<String>) -> NetError {
        NetError::NoConnection { address: self.address, waited: self.options.connect_timeout, reason: reason.into() }
    }

    /// The connection, dialled if there is none.
    pub(super) async fn link(&self) -> Result<Arc<Link>, NetError> {
        if let Some(link) = self.live() {
            return Ok(link);
        }
        let asked_at = Instant::now();
        let mut failed = self.dialling.lock().await;
        if let Some(link) = self.live() {
            return Ok(link);
        }
        // Whoever waited for an attempt shares its failure: one after the other, many would wait many time-outs.
        if let Some((failed_at, error)) = &*failed
            && *failed_at >= asked_at
        {
            return Err(error.clone());
        }
        let dialled = tokio::time::timeout(self.options.connect_timeout, self.dial()).await;
        let link = match dialled.unwrap_or_else(|_| Err(self.no_connection("no answer"))) {
            Ok(link) => Arc::new(link),
            Err(error) => {
                *failed = Some((Instant::now(), error.clone()));
                return Err(error);
            }
        };
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
        let session = *lock(&self.session);
        if let Some((session, epoch)) = session {
            self.confirm(&connection, session, epoch).await?;
        }
        Ok(Link {
            connection,
            control: tokio::sync::Mutex::new((writer, reader)),
            lanes: Default::default(),
            regions: Mutex::default(),
        })
    }

    /// Asks for a session that was committed: its source answers COMMIT for as long as it lives.
    async fn confirm(&self, connection: &quinn::Connection, session: u128, epoch: u64) -> Result<(), NetError> {
        let (send, receive) = connection.open_bi().await.map_err(|error| self.lost(&error))?;
        let (mut writer, mut reader) = (FrameWriter::new(send), FrameReader::new(receive));
        writer.prioritise(CONTROL_PRIORITY);
        let ended = |error: StreamError| self.no_connection(error.to_string());
        // How it would come means nothing to a session that has come.
        let plan = Plan::POST_COPY;
        writer.send(&Frame::Take { session, plan }).await.map_err(ended)?;
        match reader.next().await.map_err(ended)? {
            Some(Frame::Commit { session: of, epoch: at }) if (of, at) == (session, epoch) => Ok(()),
            None => Err(self.no_connection("the source did not say whether it knows the migration")),
            Some(_) => Err(NetError::Refused {
                code: ErrorCode::NoSession.into(),
                message: "this source does not know the migration: it was started anew, and its memory is not the program's".into(),
            }),
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "a constant of 1")]
pub(super) const VERSION: u16 = PROTOCOL_VERSION as u16;
pub(super) const AGENT: &str = concat!("pageferry/", env!("CARGO_PKG_VERSION"));

impl Link {
    /// The region, if it was opened on this connection.
    pub(super) fn opened(&self, name: &Name) -> Option<Opened> {
        lock(&self.regions).get(&***name).copied()
    }

    pub(super) async fn stream(&self, inner: &Inner) -> Result<(FrameWriter, FrameReader), NetError> {
        let opened = tokio::time::timeout(inner.options.answer_timeout, self.connection.open_bi()).await;
        let (send, receive) =
            opened.map_err(|_| inner.no_connection("the peer allows no more streams"))?.map_err(|error| inner.lost(&error))?;
        Ok((FrameWriter::new(send), FrameReader::new(receive)))
    }

    pub(super) async fn open(&self, inner: &Inner, name: &Name) -> Result<Opened, NetError> {
        if let Some(opened) = self.opened(name) {
            return Ok(opened);
        }
        let mut control = self.control.lock().await;
        let (writer, reader) = &mut *control;
        let exchange = async {
            writer.send(&Frame::Open { name: name.clone() }).await?;
            reader.next().await
        };
        let answer = match tokio::time::timeout(inner.options.answer_timeout, exchange).await {
            Ok(Ok(Some(Frame::Opened { region, access, page_size, size_bytes }))) => {
                let opened = Opened { region, access, page: page_size, size_bytes };
                lock(&self.regions).insert((***name).to_owned(), opened);
                return Ok(opened);
            }
            Ok(Ok(Some(Frame::Failed { code, message }))) => {
                return Err(NetError::Refused { code: code.into(), message: message.to_string() });
            }
            Ok(Ok(Some(other))) => NetError::Protocol(format!("OPENED was expected, got {}", other.kind().name())),
            Ok(Err(StreamError::Wire(error))) => NetError::Protocol(error.to_string()),
            Ok(Err(StreamError::Ended(reason))) => inner.no_connection(reason),
            Ok(Ok(None)) => inner.no_connection("the peer ended the control stream"),
            Err(_) => inner.no_connection("no answer to OPEN on a connection that is alive"),
        };
        // Whatever comes now on the control stream answers nothing any more.
        self.connection.close(0u32.into(), b"the control stream is out of step");
        Err(answer)
    }

    /// Makes a request: on the lane that is about to write others if it is a small one, else on an idle lane, a new one, or the least loaded. The future
    /// is that of [`Lane::ask`].
    pub(super) fn ask(
        &self,
        setting: &Setting,
        class: Class,
        frame: Frame,
        extent: Option<Extent>,
        page: PageSize,
    ) -> impl Future<Output = Option<Result<Vec<Run>, StoreError>>> + use<> {
        let mut lanes = lock(&self.lanes[class as usize]);
        lanes.retain(|lane| !lane.ended());
        let small = extent.is_some_and(|extent| extent.bytes(page) <= TOGETHER_MAX_BYTES);
        let company = lanes.iter().position(|lane| small && (1..TOGETHER_MAX).contains(&lane.unwritten()));
        let least = || lanes.iter().enumerate().min_by_key(|(_, lane)| lane.load()).map(|(at, lane)| (at, lane.load()));
        let at = match (company, least()) {
            (Some(at), _) => at,
            (None, Some((at, load))) if load == 0 || lanes.len() >= LANES_MAX[class as usize] => at,
            _ => {
                lanes.push(Lane::open(&self.connection, class, setting.clone()));
                lanes.len() - 1
            }
        };
        lanes[at].ask(frame, extent, page)
    }
}
