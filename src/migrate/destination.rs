//! The end that takes the program: maps its regions, becomes its owner, runs it while its pages come in.
//!
//! Role: carries out [`DestinationHandover`]. Neighbours: a [`Peer`] carries the handover's stream and the pages; a [`Pager`] fills the regions. Invariants: S6: nothing runs here before COMMIT; what
//! is read of the source before it may be written again there, and is replaced or given up before the program runs here.

use super::{
    MoveError, MoveEvent, Strategy,
    arrival::Arrival,
    handover::{DestinationAction, DestinationEvent, DestinationHandover, DestinationState, SessionId},
};
use crate::{
    FaultAround, Identity, LossPolicy, NetError, Pager, PagerOptions, Peer, PeerId, Region, TransportOptions, Trust,
    net::{
        FeedReader, FrameReader, FrameWriter, StreamError,
        wire::{ErrorCode, Frame, Message, OfferedRegion},
    },
    region::Upstream,
};
use bytes::{Bytes, BytesMut};
use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{broadcast, watch};

/// A host that can take a program.
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Destination, Gate, Identity, Strategy};
/// let identity = Identity::load("destination.pem")?;
/// let source = "5f2c8c0e6b1f4d3a9e7b5c1d2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c".parse()?;
/// let destination = Destination::connect("192.0.2.7:4433".parse()?, source, &identity).await?;
/// let moved = destination.take(Strategy::post_copy()).await?; // this host owns the program now
/// let (world, state) = (moved.region("world").expect("it was offered"), moved.state());
/// // run it: pages still arrive behind it
/// moved.complete().await?;
/// # let _ = (world, state);
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Destination {
    peer: Peer,
    pager: Pager,
    loss: LossPolicy,
    fault_around: Option<FaultAround>,
    step_limit: Duration,
    decision_limit: Duration,
}

/// See [`Destination::builder`].
#[derive(Debug)]
pub struct DestinationBuilder<'a> {
    address: SocketAddr,
    trust: Trust,
    identity: &'a Identity,
    pager: Option<Pager>,
    transport: TransportOptions,
    loss: LossPolicy,
    fault_around: Option<FaultAround>,
    decision_limit: Duration,
}

impl DestinationBuilder<'_> {
    /// The pager of the regions; the connection runs on its thread. Default: one of its own.
    #[must_use]
    pub fn pager(mut self, pager: &Pager) -> Self {
        self.pager = Some(pager.clone());
        self
    }

    /// Default [`TransportOptions::default`].
    #[must_use]
    pub fn transport(mut self, options: TransportOptions) -> Self {
        self.transport = options;
        self
    }

    /// What happens to threads that wait for pages if the source is lost before the last has come. Default [`LossPolicy::default`].
    #[must_use]
    pub fn loss(mut self, policy: LossPolicy) -> Self {
        self.loss = policy;
        self
    }

    /// What comes with a fault. Default: the pager's.
    #[must_use]
    pub fn fault_around(mut self, around: FaultAround) -> Self {
        self.fault_around = Some(around);
        self
    }

    /// For how long a lost connection is dialled again when only the source knows whether the program changed hands. Default 30 s.
    #[must_use]
    pub fn decision_limit(mut self, limit: Duration) -> Self {
        self.decision_limit = limit;
        self
    }

    /// Connects to the source.
    ///
    /// # Errors
    /// [`MoveError::Net`]; [`MoveError::Region`] if this host may not use userfaultfd: better known before the program has left.
    pub async fn connect(self) -> Result<Destination, MoveError> {
        let pager = self.pager.map_or_else(|| Pager::start(&PagerOptions::default()), Ok)?;
        let peer = Peer::builder(self.address, self.trust, self.identity).transport(self.transport).service(pager.service());
        Ok(Destination {
            peer: peer.connect().await?,
            pager,
            loss: self.loss,
            fault_around: self.fault_around,
            step_limit: Duration::from_secs(30),
            decision_limit: self.decision_limit,
        })
    }
}

impl Destination {
    /// Connects to the source whose key has the id `source`, with default options.
    ///
    /// # Errors
    /// As for [`DestinationBuilder::connect`].
    pub async fn connect(address: SocketAddr, source: PeerId, identity: &Identity) -> Result<Destination, MoveError> {
        Destination::builder(address, Trust::ids([source]), identity).connect().await
    }

    /// Starts to describe a connection to a source that `trust` accepts.
    #[must_use]
    pub fn builder(address: SocketAddr, trust: Trust, identity: &Identity) -> DestinationBuilder<'_> {
        DestinationBuilder {
            address,
            trust,
            identity,
            pager: None,
            transport: TransportOptions::default(),
            loss: LossPolicy::default(),
            fault_around: None,
            decision_limit: Duration::from_secs(30),
        }
    }

    /// The connection to the source, for its round trip and latencies.
    #[must_use]
    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    /// Takes the program. When this returns `Ok`, this host owns it: its threads may run, and fault their pages in.
    ///
    /// Cancellation: dropping the future does not stop the handover, which then ends with a program that nobody here runs: keep it until it returns.
    ///
    /// # Errors
    /// [`MoveError::Aborted`] and [`MoveError::Lost`]: the program runs on at the source. [`MoveError::Region`]: a region cannot be mapped here, for instance because its
    /// fixed address is taken; the program runs on at the source. [`MoveError::Unknown`]: see there.
    pub async fn take(&self, strategy: Strategy) -> Result<Moved, MoveError> {
        let mut session = [0; 16];
        let random = ring::rand::SecureRandom::fill(&ring::rand::SystemRandom::new(), &mut session);
        random.map_err(|_| MoveError::Protocol("the operating system gives no random numbers".into()))?;
        let attempt = Taking {
            peer: self.peer.clone(),
            pager: self.pager.clone(),
            loss: self.loss.clone(),
            fault_around: self.fault_around,
            step_limit: self.step_limit,
            decision_limit: self.decision_limit,
            session: u128::from_le_bytes(session),
            strategy,
            handover: DestinationHandover::new(),
            regions: Vec::new(),
            arrivals: Vec::new(),
            state: Bytes::new(),
            undecided_since: None,
            events: broadcast::Sender::new(64),
            completion: watch::Sender::new(None),
        };
        // On the service: the stream's tasks, and the pull after it, must not depend on threads that may fault (S2).
        self.pager.service().spawn(attempt.run()).await.map_err(|_| MoveError::Closed)?
    }
}

/// A program that lives here now.
#[derive(Debug)]
pub struct Moved {
    regions: Vec<Region>,
    state: Bytes,
    epoch: u64,
    completion: watch::Receiver<Option<Result<(), MoveError>>>,
    events: broadcast::Sender<MoveEvent>,
}

impl Moved {
    /// The region of that name.
    #[must_use]
    pub fn region(&self, name: &str) -> Option<Region> {
        self.regions.iter().find(|region| region.name() == name).cloned()
    }

    /// All its regions, in the order in which the source granted them.
    #[must_use]
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The program's small state, as the source's state function gave it.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        &self.state
    }

    /// The number of this owner. A source that hands the program on starts with it ([`SourceBuilder::epoch`](super::SourceBuilder::epoch)).
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// News from now on. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MoveEvent> {
        self.events.subscribe()
    }

    /// Returns when every page is here and the source has let go, or had [`LossPolicy::keep_trying`] to be told so.
    ///
    /// Cancellation: dropping the future changes nothing; dropping the `Moved` and its regions ends the pull.
    ///
    /// # Errors
    /// [`MoveError::Region`] with [`RegionError::Lost`](crate::RegionError::Lost) if the source was lost for good before.
    pub async fn complete(&self) -> Result<(), MoveError> {
        let mut completion = self.completion.clone();
        let done = completion.wait_for(Option::is_some).await.map_err(|_| MoveError::Closed)?;
        done.clone().unwrap_or(Err(MoveError::Closed))
    }
}

/// One session.
struct Taking {
    peer: Peer,
    pager: Pager,
    loss: LossPolicy,
    fault_around: Option<FaultAround>,
    step_limit: Duration,
    decision_limit: Duration,
    session: SessionId,
    strategy: Strategy,
    handover: DestinationHandover,
    regions: Vec<Region>,
    /// One for each of them.
    arrivals: Vec<Arrival>,
    state: Bytes,
    undecided_since: Option<Instant>,
    events: broadcast::Sender<MoveEvent>,
    completion: watch::Sender<Option<Result<(), MoveError>>>,
}

struct Stream {
    writer: FrameWriter,
    reader: FrameReader,
}

/// What the source said, or did not.
struct Heard {
    event: DestinationEvent,
    reason: String,
}

impl Heard {
    fn lost(error: &StreamError) -> Heard {
        Heard { event: DestinationEvent::Lost, reason: error.to_string() }
    }
}

impl Taking {
    async fn run(mut self) -> Result<Moved, MoveError> {
        let mut stream = match self.hand_over().await {
            Ok(stream) => stream,
            Err(error) => {
                let regions = std::mem::take(&mut self.regions);
                for arrival in self.arrivals {
                    arrival.cancel().await;
                }
                // Unmapped when the caller hears of it, and may try again at the same addresses; on another thread, for the unmapping waits for this one.
                let _ = tokio::task::spawn_blocking(move || drop(regions)).await;
                return Err(error);
            }
        };
        let epoch = self.handover.epoch();
        self.peer.bind_session(self.session, epoch);
        let resumed = stream.writer.send(&Frame::Resumed { session: self.session, epoch }).await;
        if let Err(error) = resumed {
            // Only the source's measurement of the pause depends on it.
            tracing::debug!(%error, "the source did not hear that the program runs");
        }
        let (regions, state, events) = (self.regions.clone(), self.state.clone(), self.events.clone());
        let moved = Moved { regions, state, epoch, completion: self.completion.subscribe(), events };
        self.tell(MoveEvent::Resumed);
        let service = self.pager.service().clone();
        // Weak handles: a caller that drops the program ends its pull.
        let weak = self.regions.iter().map(Region::downgrade).collect();
        self.regions.clear();
        service.spawn(self.bring_the_rest(stream, weak));
        Ok(moved)
    }

    /// Returns when the program belongs to this end.
    async fn hand_over(&mut self) -> Result<Stream, MoveError> {
        let mut stream = self.ask().await?;
        let mut asked = Instant::now();
        let mut heard = self.listen(&mut stream, Some(self.step_limit)).await?;
        loop {
            let Heard { event, reason } = heard;
            match self.handover.on(event) {
                DestinationAction::MapAndSayMapped => {
                    self.listen_for_pages().await?;
                    let (session, epoch) = (self.session, self.handover.epoch());
                    let mapped = stream.writer.send(&Frame::Mapped { session, epoch }).await;
                    heard = self.after(mapped, &mut stream, self.step_limit).await?;
                }
                DestinationAction::SendReady => {
                    self.undecided_since = Some(Instant::now());
                    let (session, epoch) = (self.session, self.handover.epoch());
                    let ready = stream.writer.send(&Frame::Ready { session, epoch }).await;
                    heard = self.after(ready, &mut stream, self.decision_limit).await?;
                }
                DestinationAction::Run => return Ok(stream),
                DestinationAction::AskAgain => {
                    let left = self.decision_left();
                    if left.is_zero() {
                        heard = Heard { event: DestinationEvent::TimedOut, reason };
                        continue;
                    }
                    tokio::time::sleep_until((asked + ASK_AGAIN).into()).await;
                    asked = Instant::now();
                    match tokio::time::timeout(left, self.ask()).await {
                        Ok(Ok(again)) => {
                            stream = again;
                            heard = self.listen(&mut stream, Some(self.decision_left())).await?;
                        }
                        Ok(Err(error)) => heard = Heard { event: DestinationEvent::Lost, reason: error.to_string() },
                        Err(_) => heard = Heard { event: DestinationEvent::TimedOut, reason },
                    }
                }
                DestinationAction::GiveUp => return Err(self.give_up(event, reason)),
                DestinationAction::Ignore | DestinationAction::SendComplete | DestinationAction::Finish => {
                    // What says nothing gives no more time either.
                    let limit = if self.undecided_since.is_some() { self.decision_left() } else { self.step_limit };
                    heard = self.listen(&mut stream, Some(limit)).await?;
                }
            }
        }
    }

    fn tell(&self, event: MoveEvent) {
        tracing::info!(?event, "migration");
        let _ = self.events.send(event);
    }

    fn decision_left(&self) -> Duration {
        self.undecided_since.map_or(Duration::ZERO, |since| self.decision_limit.saturating_sub(since.elapsed()))
    }

    fn give_up(&self, event: DestinationEvent, reason: String) -> MoveError {
        match (event, self.undecided_since) {
            (DestinationEvent::TimedOut, Some(since)) => MoveError::Unknown { waited: since.elapsed(), reason },
            (DestinationEvent::Lost | DestinationEvent::TimedOut, _) => MoveError::Lost { reason },
            _ => MoveError::Aborted { reason },
        }
    }

    /// A stream on which the session is asked for.
    async fn ask(&self) -> Result<Stream, NetError> {
        let (mut writer, reader) = self.peer.open_stream().await?;
        let sent = writer.send(&Frame::Take { session: self.session, plan: self.strategy.into() }).await;
        sent.map_err(|error| NetError::Protocol(error.to_string()))?;
        Ok(Stream { writer, reader })
    }

    /// What comes after a frame was sent, or could not be.
    async fn after(&mut self, sent: Result<(), StreamError>, stream: &mut Stream, limit: Duration) -> Result<Heard, MoveError> {
        match sent {
            Ok(()) => self.listen(stream, Some(limit)).await,
            Err(error) => Ok(Heard::lost(&error)),
        }
    }

    /// The next thing the source says. What belongs to it (mapping what is offered, reading the state) is done here, so that the event is
    /// true when it is told.
    async fn listen(&mut self, stream: &mut Stream, limit: Option<Duration>) -> Result<Heard, MoveError> {
        let next = loop {
            let next = async {
                let frame = stream.reader.next().await?;
                let Some(Frame::Prepare { epoch, state_bytes, .. }) = frame else { return Ok::<_, StreamError>((frame, None)) };
                let state = read_state(&mut stream.reader, *state_bytes).await?;
                Ok((None, Some((epoch, state))))
            };
            let next = match limit {
                None => next.await,
                Some(limit) => match tokio::time::timeout(limit, next).await {
                    Ok(next) => next,
                    Err(_) => {
                        return Ok(Heard { event: DestinationEvent::TimedOut, reason: format!("no answer within {limit:?}") });
                    }
                },
            };
            match next {
                // It is at work: the limit begins anew.
                Ok((Some(Frame::Progress { copying, .. }), _)) => self.tell(copying.into()),
                next => break next,
            }
        };
        let event = match next {
            Err(error) => return Ok(Heard::lost(&error)),
            Ok((_, Some((epoch, state)))) => {
                if self.handover.state() == DestinationState::Mapped && self.handover.epoch() == epoch {
                    self.state = state;
                    let attached = tokio::time::timeout(self.step_limit, self.attached()).await;
                    if let Err(error) =
                        attached.unwrap_or_else(|_| Err(MoveError::Lost { reason: "the pages did not come".into() }))
                    {
                        self.abort(stream, &error).await;
                        return Err(error);
                    }
                }
                DestinationEvent::Prepared { epoch }
            }
            Ok((None, None)) => return Ok(Heard { event: DestinationEvent::Lost, reason: "the source ended the stream".into() }),
            Ok((Some(Frame::Offer { epoch, regions, .. }), None)) => {
                if self.handover.state() == DestinationState::Asked
                    && let Err(error) = self.map(&regions).await
                {
                    self.abort(stream, &error).await;
                    return Err(error);
                }
                let reason = format!("the program runs on at the source, which offers it anew (epoch {epoch})");
                return Ok(Heard { event: DestinationEvent::Offer { epoch }, reason });
            }
            Ok((Some(Frame::Commit { epoch, .. }), None)) => DestinationEvent::Commit { epoch },
            Ok((Some(Frame::Released { epoch, .. }), None)) => DestinationEvent::Released { epoch },
            Ok((Some(Frame::Abort { message, .. }), None)) => {
                return Ok(Heard { event: DestinationEvent::Abort, reason: message.to_string() });
            }
            Ok((Some(Frame::Failed { code, message }), None)) => {
                return Err(NetError::Refused { code: code.into(), message: message.to_string() }.into());
            }
            Ok((Some(other), None)) => return Err(MoveError::Protocol(format!("{} came in a handover", other.kind().name()))),
        };
        Ok(Heard { event, reason: String::new() })
    }

    async fn abort(&self, stream: &mut Stream, error: &MoveError) {
        let (session, epoch) = (self.session, self.handover.epoch());
        let (code, message) = (ErrorCode::Aborted, Message::cut(&error.to_string()));
        let _ = stream.writer.send(&Frame::Abort { session, epoch, code, message }).await;
        stream.writer.finish();
    }

    /// Maps what is offered, as plain memory. Not a page of it is read.
    async fn map(&mut self, offered: &[OfferedRegion]) -> Result<(), MoveError> {
        for OfferedRegion { name, size_bytes, address, .. } in offered {
            let mut region = Region::builder().name(&***name).size(*size_bytes).pager(&self.pager);
            if *address != 0 {
                region = region.at(usize::try_from(*address).unwrap_or(usize::MAX));
            }
            self.regions.push(region.open()?);
        }
        Ok(())
    }

    /// Has the source send the pages of each region as it sees fit.
    async fn listen_for_pages(&mut self) -> Result<(), MoveError> {
        for region in self.regions.clone() {
            let store = self.peer.open(region.name()).await?;
            let feed = FeedReader::start(&store, self.session, self.handover.epoch()).await?;
            let (pager, loss) = (self.pager.clone(), self.loss.clone());
            let upstream = Upstream { pager, store: Arc::new(store), fault_around: self.fault_around, loss };
            self.arrivals.push(Arrival::start(region, feed, upstream));
        }
        Ok(())
    }

    async fn attached(&mut self) -> Result<(), MoveError> {
        for arrival in &mut self.arrivals {
            arrival.attached().await?;
        }
        Ok(())
    }

    /// After the commit: pulls what the program has not touched, and tells the source when all is here.
    async fn bring_the_rest(mut self, stream: Stream, regions: Vec<crate::region::WeakRegion>) {
        let outcome = self.pull(&regions).await;
        if outcome.is_ok() {
            self.tell(MoveEvent::Complete);
            let told = tokio::time::timeout(self.loss.keep_trying, self.tell_complete(stream)).await;
            if told.is_err() {
                tracing::warn!("the source was not told that it may let go");
            }
        }
        self.completion.send_replace(Some(outcome));
    }

    async fn pull(&mut self, regions: &[crate::region::WeakRegion]) -> Result<(), MoveError> {
        let progress = tokio::spawn(report_progress(regions.to_vec(), self.events.clone()));
        let _ends_with_the_pull = AbortOnDrop(progress.abort_handle());
        // The source sends by itself; the rest is asked for.
        for arrival in &mut self.arrivals {
            arrival.ended().await;
        }
        let mut outcome = Ok(());
        for region in regions {
            // Held only to start the pull, which itself ends when the region goes.
            let Some(pull) = region.upgrade().map(|region| region.pull_owned()) else { return Err(MoveError::Closed) };
            // What one region has lost is no reason to leave the others.
            outcome = outcome.and(pull.await);
        }
        Ok(outcome?)
    }

    async fn tell_complete(&mut self, stream: Stream) {
        let mut stream = Some(stream);
        let mut asked = Instant::now();
        let mut event = DestinationEvent::AllHere;
        loop {
            let action = self.handover.on(event);
            event = match (action, stream.as_mut()) {
                (DestinationAction::Finish, _) => {
                    self.tell(MoveEvent::Released);
                    return;
                }
                (DestinationAction::SendComplete, Some(open)) => {
                    let (session, epoch) = (self.session, self.handover.epoch());
                    match open.writer.send(&Frame::Complete { session, epoch }).await {
                        Ok(()) => self.heard(open).await,
                        Err(_) => DestinationEvent::Lost,
                    }
                }
                (DestinationAction::AskAgain, _) => {
                    tokio::time::sleep_until((asked + ASK_AGAIN).into()).await;
                    asked = Instant::now();
                    match self.ask().await {
                        Ok(again) => self.heard(stream.insert(again)).await,
                        Err(_) => DestinationEvent::Lost,
                    }
                }
                (_, Some(open)) => self.heard(open).await,
                (_, None) => DestinationEvent::Lost,
            };
        }
    }

    async fn heard(&mut self, stream: &mut Stream) -> DestinationEvent {
        self.listen(stream, None).await.map_or(DestinationEvent::Lost, |heard| heard.event)
    }
}

/// A source is asked again no sooner than this after it was asked before.
const ASK_AGAIN: Duration = Duration::from_millis(100);
/// How often progress is told.
const PROGRESS: Duration = Duration::from_millis(100);

struct AbortOnDrop(tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn report_progress(regions: Vec<crate::region::WeakRegion>, events: broadcast::Sender<MoveEvent>) {
    loop {
        tokio::time::sleep(PROGRESS).await;
        let (mut resident_pages, mut pages) = (0, 0);
        for region in regions.iter().filter_map(crate::region::WeakRegion::upgrade) {
            let residency = region.residency();
            resident_pages += residency.pages - residency.missing();
            pages += residency.pages;
        }
        let _ = events.send(MoveEvent::Progress { resident_pages, pages });
    }
}

/// Reads STATE frames until there are `len` bytes.
async fn read_state(reader: &mut FrameReader, len: u64) -> Result<Bytes, StreamError> {
    let mut state = BytesMut::new();
    while (state.len() as u64) < len {
        match reader.next().await? {
            Some(Frame::State { bytes }) => state.extend_from_slice(&bytes),
            Some(Frame::Abort { message, .. }) => return Err(StreamError::Ended(message.to_string())),
            Some(other) => return Err(StreamError::Ended(format!("{} came where STATE is expected", other.kind().name()))),
            None => return Err(StreamError::Ended("the source ended the stream in the middle of the state".into())),
        }
    }
    if state.len() as u64 > len {
        return Err(StreamError::Ended(format!("{} bytes of state came, {len} were announced", state.len())));
    }
    Ok(state.freeze())
}
