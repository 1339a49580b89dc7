//! The end that has the program: offers it, pauses it, gives it up, serves its pages until the last has gone.
//!
//! Role: carries out [`SourceHandover`]. Neighbours: a [`Server`] brings it TAKE streams and serves the regions' pages; the [`Gate`] pauses the program. Invariants: S6; a pause
//! ends within its limit, by commit or by resume, whatever the network does; after the commit the regions stay as they are until the destination has
//! all of them.

use super::{
    MoveError, MoveEvent,
    gate::Gate,
    handover::{SessionId, SourceAction, SourceEvent, SourceHandover, SourceState, Turn},
};
use crate::{
    Grant, Identity, NetError, PeerId, Region, RegionStore, Server, ServerBuilder, Service, TransportOptions,
    net::{
        Extension, FrameReader, FrameWriter, StreamError, TakeStream,
        wire::{
            ErrorCode, Frame, MAX_STATE_BYTES, MAX_STATE_PIECE_BYTES, Message, Name, OfferedRegion, OfferedRegions, StateLength,
            StatePiece, WireError,
        },
    },
};
use bytes::Bytes;
use std::{
    collections::HashSet,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::sync::{broadcast, watch};

type StateOf = Arc<dyn Fn() -> Vec<u8> + Send + Sync>;

/// A program that may move away.
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Gate, Identity, Pass, Region, Source};
/// let identity = Identity::load("source.pem")?;
/// let region = Region::builder().name("world").size(1 << 30).open()?;
/// let gate = Gate::new();
/// let source = Source::builder(&identity)
///     .grant("5f2c8c0e6b1f4d3a9e7b5c1d2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c".parse()?, [&region])
///     .gate(&gate)
///     .listen("0.0.0.0:4433".parse()?)?;
/// let thread = gate.enter();
/// std::thread::spawn(move || {
///     while thread.pass() == Pass::Run {
///         // world.tick(&region)
///     }
/// });
/// let departed = source.departed().await?; // the program runs elsewhere, and every page has arrived there
/// println!("paused for {:?}", departed.downtime);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Source {
    shared: Arc<Shared>,
    server: Server,
}

/// How a program left.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Departed {
    /// Who has it now.
    pub peer: PeerId,
    /// Its number as the owner.
    pub epoch: u64,
    /// From the last thread parking to the destination's word that the program runs there: the pause that the program saw, and at most half a round trip more.
    /// Zero if that word was lost with its connection.
    pub downtime: Duration,
    /// From the destination's asking to its having every page.
    pub total: Duration,
}

/// See [`Source::builder`].
pub struct SourceBuilder<'a> {
    identity: &'a Identity,
    server: ServerBuilder<'a>,
    regions: Vec<Region>,
    peers: HashSet<PeerId>,
    gate: Gate,
    state: StateOf,
    epoch: u64,
    pause_limit: Duration,
    offer_limit: Duration,
    keep_memory: bool,
}

impl std::fmt::Debug for SourceBuilder<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SourceBuilder").field("regions", &self.regions).field("peers", &self.peers).finish_non_exhaustive()
    }
}

impl SourceBuilder<'_> {
    /// Lets `peer` take the program, whose memory is `regions`. They need names of 1 to 255 bytes that differ. Several peers may be granted; one takes it.
    #[must_use]
    pub fn grant<'r>(mut self, peer: PeerId, regions: impl IntoIterator<Item = &'r Region>) -> Self {
        self.peers.insert(peer);
        for region in regions {
            self.server = self.server.grant(peer, region.name(), RegionStore::new(region), Grant::Read);
            if !self.regions.iter().any(|known| known.name() == region.name()) {
                self.regions.push(region.clone());
            }
        }
        self
    }

    /// Where the program pauses. Default: a gate that nothing passes, for a program that is not running.
    #[must_use]
    pub fn gate(mut self, gate: &Gate) -> Self {
        self.gate = gate.clone();
        self
    }

    /// The program's small state, asked for while it is paused: what is not in the regions (registers, counters, open files by name). At most 64 MiB; it counts into the pause.
    /// Runs on a thread that serves nobody, so it may touch regions. Default: none.
    #[must_use]
    pub fn state(mut self, state: impl Fn() -> Vec<u8> + Send + Sync + 'static) -> Self {
        self.state = Arc::new(state);
        self
    }

    /// The number of this owner, for a program that moved here: [`Moved::epoch`](super::Moved::epoch). Default 1.
    #[must_use]
    pub fn epoch(mut self, epoch: u64) -> Self {
        self.epoch = epoch;
        self
    }

    /// The longest pause: from asking the program to park until the destination is ready. At its end the program runs on. Default 2 s: a handover takes
    /// one and a half round trips and the state.
    #[must_use]
    pub fn pause_limit(mut self, limit: Duration) -> Self {
        self.pause_limit = limit;
        self
    }

    /// Keeps the source's copy after the destination has everything, for whoever wants to look at it. Default: its memory goes back to the kernel, and reads as zeros.
    #[must_use]
    pub fn keep_memory(mut self) -> Self {
        self.keep_memory = true;
        self
    }

    /// Default [`TransportOptions::default`].
    #[must_use]
    pub fn transport(mut self, options: TransportOptions) -> Self {
        self.server = self.server.transport(options);
        self
    }

    /// Offers the program at `address` from then on. It runs on meanwhile.
    ///
    /// # Errors
    /// As for [`ServerBuilder::listen`], and [`NetError::InvalidOption`] for a region without a name.
    pub fn listen(self, address: SocketAddr) -> Result<Source, NetError> {
        let invalid = |error: WireError| NetError::InvalidOption {
            option: "regions",
            value: format!("{:?}", self.regions),
            allowed: error.to_string(),
        };
        let offered = self.regions.iter().map(|region| {
            let address = region.fixed_address().map_or(0, |address| address as u64);
            Ok(OfferedRegion {
                name: Name::new(region.name())?,
                page_size: region.page_size(),
                size_bytes: region.size_bytes(),
                address,
            })
        });
        let offered = offered.collect::<Result<Vec<_>, WireError>>().and_then(OfferedRegions::new).map_err(invalid)?;
        let service = Service::start("pageferry-source", crate::DEFAULT_POLL_BUDGET).map_err(|error| NetError::Socket {
            call: "starting a thread for",
            address,
            source: Arc::new(error),
        })?;
        let shared = Arc::new_cyclic(|me| Shared {
            me: me.clone(),
            handover: Mutex::new(SourceHandover::new(self.epoch)),
            offered,
            regions: self.regions,
            peers: self.peers,
            gate: self.gate,
            state: self.state,
            pause_limit: self.pause_limit,
            offer_limit: self.offer_limit,
            keep_memory: self.keep_memory,
            service: service.clone(),
            events: broadcast::Sender::new(64),
            times: Mutex::default(),
            departed: watch::Sender::new(None),
        });
        let server = self.server.service(&service).extension(shared.clone()).listen(address)?;
        tracing::info!(id = %self.identity.peer_id(), address = %server.local_addr(), "the program may be taken");
        Ok(Source { shared, server })
    }
}

impl Source {
    /// Starts to describe a source with this key.
    #[must_use]
    pub fn builder(identity: &Identity) -> SourceBuilder<'_> {
        SourceBuilder {
            identity,
            server: Server::builder(identity),
            regions: Vec::new(),
            peers: HashSet::new(),
            gate: Gate::new(),
            state: Arc::new(Vec::new),
            epoch: 1,
            pause_limit: Duration::from_secs(2),
            offer_limit: Duration::from_secs(30),
            keep_memory: false,
        }
    }

    /// The address it is bound to.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.server.local_addr()
    }

    /// News from now on. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MoveEvent> {
        self.shared.events.subscribe()
    }

    /// Whether the program still belongs to this end. Once false it never becomes true again.
    #[must_use]
    pub fn owns(&self) -> bool {
        !matches!(self.shared.handover().state(), SourceState::Committed(_) | SourceState::Released(_))
    }

    /// Calls off an attempt that has not committed: the program runs on here, and may be asked for again. Whether there was one.
    pub async fn cancel(&self) -> bool {
        let turn = match self.shared.handover().state() {
            SourceState::Offered(turn) | SourceState::Paused(turn) => turn,
            _ => return false,
        };
        self.shared.fail(turn, "cancelled by the source").await;
        self.owns()
    }

    /// Returns when the program runs elsewhere and every page has arrived there. Until then this process must live.
    ///
    /// Cancellation: dropping the future changes nothing.
    ///
    /// # Errors
    /// [`MoveError::Closed`] if the source is shut down first.
    pub async fn departed(&self) -> Result<Departed, MoveError> {
        let mut departed = self.shared.departed.subscribe();
        let departed = departed.wait_for(Option::is_some).await.map_err(|_| MoveError::Closed)?;
        departed.clone().ok_or(MoveError::Closed)
    }
}

struct Shared {
    me: Weak<Shared>,
    handover: Mutex<SourceHandover>,
    offered: OfferedRegions,
    regions: Vec<Region>,
    peers: HashSet<PeerId>,
    gate: Gate,
    state: StateOf,
    pause_limit: Duration,
    offer_limit: Duration,
    keep_memory: bool,
    service: Service,
    events: broadcast::Sender<MoveEvent>,
    times: Mutex<Times>,
    departed: watch::Sender<Option<Departed>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("handover", &self.handover).field("gate", &self.gate).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
struct Times {
    asked: Option<Instant>,
    paused: Option<Instant>,
    resumed: Option<Instant>,
}

impl Extension for Shared {
    fn take(&self, stream: TakeStream) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let Some(shared) = self.me.upgrade() else { return Box::pin(async {}) };
        Box::pin(async move {
            let TakeStream { peer, session, writer, reader } = stream;
            Attempt { shared, peer, session, writer, reader, turn: None, deadline: None }.run().await;
        })
    }
}

impl Shared {
    fn handover(&self) -> MutexGuard<'_, SourceHandover> {
        self.handover.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, event: MoveEvent) {
        tracing::info!(?event, "migration");
        let _ = self.events.send(event);
    }

    /// The attempt is over without a commit, if it had not committed: the program runs on.
    async fn fail(&self, turn: Turn, reason: &str) {
        let before = self.handover().state();
        let action = self.handover().on(SourceEvent::Failed(turn));
        if action == SourceAction::Resume {
            self.gate.resume().await;
        }
        if matches!(before, SourceState::Offered(of) | SourceState::Paused(of) if of == turn) {
            self.tell(MoveEvent::Aborted { reason: reason.to_owned() });
        }
    }

    fn release(&self, turn: Turn, peer: PeerId) {
        self.tell(MoveEvent::Complete);
        if !self.keep_memory {
            for region in &self.regions {
                if let Err(error) = region.discard(0..region.len() as u64) {
                    tracing::warn!(%error, region = region.name(), "the memory of a region that moved away could not be given back");
                }
            }
        }
        let times = self.times();
        let downtime = times.paused.zip(times.resumed).map_or(Duration::ZERO, |(paused, resumed)| resumed - paused);
        let total = times.asked.map_or(Duration::ZERO, |asked| asked.elapsed());
        drop(times);
        self.departed.send_replace(Some(Departed { peer, epoch: turn.epoch, downtime, total }));
        self.tell(MoveEvent::Released);
    }
}

/// One TAKE stream.
struct Attempt {
    shared: Arc<Shared>,
    peer: PeerId,
    session: SessionId,
    writer: FrameWriter,
    reader: FrameReader,
    turn: Option<Turn>,
    /// When this step is given up.
    deadline: Option<Instant>,
}

/// Why a stream is over.
enum End {
    Orderly,
    /// The destination is told, if it still listens.
    Failed(String),
}

impl From<StreamError> for End {
    fn from(error: StreamError) -> End {
        End::Failed(error.to_string())
    }
}

impl Attempt {
    async fn run(mut self) {
        if !self.shared.peers.contains(&self.peer) {
            let _ = self.abort(ErrorCode::NotGranted, "this peer was not granted the program").await;
            return;
        }
        let end = self.serve().await;
        let reason = match &end {
            End::Orderly => "the destination ended the stream",
            End::Failed(reason) => reason.as_str(),
        };
        if let Some(turn) = self.turn {
            self.shared.fail(turn, reason).await;
        }
        if let End::Failed(reason) = end {
            let _ = tokio::time::timeout(ABORT_LIMIT, self.abort(ErrorCode::Aborted, &reason)).await;
        }
        self.writer.finish();
        // The destination closes the stream once it has read the last word.
        let _ = tokio::time::timeout(ABORT_LIMIT, self.writer.delivered()).await;
    }

    async fn serve(&mut self) -> End {
        let mut event = SourceEvent::Take(self.session);
        loop {
            // The lock is held for the decision alone.
            let action = self.shared.handover().on(event);
            let step = self.carry_out(action);
            match step.await {
                Ok(()) => {}
                Err(end) => return end,
            }
            event = loop {
                match self.next_event().await {
                    Ok(Some(event)) => break event,
                    Ok(None) => {}
                    Err(end) => return end,
                }
            };
        }
    }

    async fn carry_out(&mut self, action: SourceAction) -> Result<(), End> {
        match action {
            SourceAction::Ignore => {}
            SourceAction::SendOffer(turn) => {
                self.turn = Some(turn);
                self.deadline = Some(Instant::now() + self.shared.offer_limit);
                self.shared.times().asked = Some(Instant::now());
                let state_bytes = StateLength::new(u64::from(MAX_STATE_BYTES)).map_err(StreamError::from)?;
                let Turn { session, epoch } = turn;
                let regions = self.shared.offered.clone();
                self.send(&Frame::Offer { session, epoch, state_bytes, regions }).await?;
                self.shared.tell(MoveEvent::Offered { epoch });
            }
            SourceAction::PauseAndPrepare(turn) => self.pause_and_prepare(turn).await?,
            SourceAction::StopAndCommit(turn) => {
                // In this order: nothing that the program writes from here on would arrive.
                self.shared.gate.stop();
                self.deadline = None;
                self.send(&Frame::Commit { session: turn.session, epoch: turn.epoch }).await?;
                self.shared.tell(MoveEvent::Committed { epoch: turn.epoch });
            }
            SourceAction::CommitAgain(turn) => {
                self.turn = Some(turn);
                self.deadline = None;
                self.send(&Frame::Commit { session: turn.session, epoch: turn.epoch }).await?;
            }
            SourceAction::Resume => self.shared.gate.resume().await,
            SourceAction::ResumeAndRefuse => {
                self.shared.gate.resume().await;
                let reason = "the destination asked again before the program had changed hands";
                self.shared.tell(MoveEvent::Aborted { reason: reason.into() });
                return Err(End::Failed(reason.into()));
            }
            SourceAction::Release(turn) => {
                let (shared, peer) = (self.shared.clone(), self.peer);
                // Giving the memory back is a system call of milliseconds.
                let released = tokio::task::spawn_blocking(move || shared.release(turn, peer)).await;
                if let Err(error) = released {
                    tracing::error!(%error, "releasing the regions failed");
                }
                self.send(&Frame::Released { session: turn.session, epoch: turn.epoch }).await?;
            }
            SourceAction::Refuse => {
                self.abort(ErrorCode::NotOwner, "the program belongs, or is being handed over, to another session").await?;
                return Err(End::Orderly);
            }
        }
        Ok(())
    }

    async fn pause_and_prepare(&mut self, turn: Turn) -> Result<(), End> {
        let (gate, limit) = (self.shared.gate.clone(), self.shared.pause_limit);
        self.deadline = Some(Instant::now() + limit);
        gate.pause(limit).await.map_err(|error| End::Failed(error.to_string()))?;
        self.shared.times().paused = Some(Instant::now());
        let state_of = self.shared.state.clone();
        let state = self.bounded(tokio::task::spawn_blocking(move || Bytes::from(state_of()))).await?;
        let state = state.map_err(|_| End::Failed("the program's state function panicked".into()))?;
        let too_large =
            |_| End::Failed(format!("the program's state has {} bytes, at most {MAX_STATE_BYTES} can move", state.len()));
        let state_bytes = StateLength::new(state.len() as u64).map_err(too_large)?;
        self.send(&Frame::Prepare { session: turn.session, epoch: turn.epoch, state_bytes }).await?;
        let mut rest = state;
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(MAX_STATE_PIECE_BYTES as usize));
            let bytes = StatePiece::new(piece).map_err(StreamError::from)?;
            self.send(&Frame::State { bytes }).await?;
        }
        self.shared.tell(MoveEvent::Paused);
        Ok(())
    }

    async fn next_event(&mut self) -> Result<Option<SourceEvent>, End> {
        let next = match self.deadline {
            None => self.reader.next().await,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), self.reader.next()).await {
                Ok(next) => next,
                Err(_) => return Err(End::Failed("the destination did not answer in time".into())),
            },
        };
        let frame = match next? {
            None => return Err(End::Orderly),
            Some(frame) => frame,
        };
        let event = match frame {
            Frame::Mapped { session, epoch } => SourceEvent::Mapped(Turn { session, epoch }),
            Frame::Ready { session, epoch } => SourceEvent::Ready(Turn { session, epoch }),
            Frame::Complete { session, epoch } => SourceEvent::Complete(Turn { session, epoch }),
            Frame::Resumed { .. } => {
                self.shared.times().resumed.get_or_insert_with(Instant::now);
                self.shared.tell(MoveEvent::Resumed);
                return Ok(None);
            }
            Frame::Abort { message, .. } => return Err(End::Failed(format!("the destination gave up: {}", &*message))),
            other => return Err(End::Failed(format!("{} came in a handover", other.kind().name()))),
        };
        Ok(Some(event))
    }

    /// Waits no longer than the step may take.
    async fn bounded<T>(&self, work: impl Future<Output = T>) -> Result<T, End> {
        match self.deadline {
            None => Ok(work.await),
            Some(deadline) => {
                let late = |_| End::Failed("the handover took longer than its limit".into());
                tokio::time::timeout_at(deadline.into(), work).await.map_err(late)
            }
        }
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), End> {
        let deadline = self.deadline;
        let sent = self.writer.send(frame);
        match deadline {
            None => sent.await?,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), sent).await {
                Ok(sent) => sent?,
                Err(_) => return Err(End::Failed("the handover took longer than its limit".into())),
            },
        }
        Ok(())
    }

    async fn abort(&mut self, code: ErrorCode, message: &str) -> Result<(), StreamError> {
        let (session, epoch) = (self.session, self.turn.map_or(0, |turn| turn.epoch));
        self.writer.send(&Frame::Abort { session, epoch, code, message: Message::cut(message) }).await
    }
}

/// How long a last word may take; nothing depends on its arrival.
const ABORT_LIMIT: Duration = Duration::from_secs(1);

impl Drop for Attempt {
    fn drop(&mut self) {
        // The server was shut down in the middle: the program must not stay paused.
        let Some(turn) = self.turn else { return };
        if self.shared.handover().on(SourceEvent::Failed(turn)) == SourceAction::Resume {
            let gate = self.shared.gate.clone();
            gate.run_on();
            self.shared.service.spawn(async move { gate.resume().await });
        }
    }
}
