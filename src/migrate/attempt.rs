//! One destination's attempt to take the program, at the source: one TAKE stream from its first frame to its last.
//!
//! Role: carries out [`SourceHandover`]. Neighbours: `source` describes and owns what the attempts share; a `Server` brings the streams; the
//! [`Gate`] pauses the program. Invariants: S6; a pause ends within its limit, by commit or by resume, whatever the network does; the attempt that paused
//! the program is the one that lets it go, so that no resume falls into the pause of another.

use super::{
    MoveEvent,
    copy::{Copy, CopyError},
    gate::Gate,
    handover::{SessionId, SourceAction, SourceEvent, SourceHandover, SourceState, Turn},
    rounds::Verdict,
    source::Departed,
    strategy::Strategy,
};
use crate::{
    PeerId, Region, Service,
    net::{
        Extension, Feed, FrameReader, FrameWriter, StreamError, TakeStream,
        wire::{ErrorCode, Frame, MAX_STATE_BYTES, MAX_STATE_PIECE_BYTES, Message, OfferedRegions, StateLength, StatePiece},
    },
};
use bytes::Bytes;
use std::{
    collections::HashSet,
    future::{Future, pending},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::sync::{OwnedMutexGuard, broadcast, watch};

pub(super) type StateOf = Arc<dyn Fn() -> Vec<u8> + Send + Sync>;

/// What the attempts of a source share with it.
pub(super) struct Shared {
    pub(super) me: Weak<Shared>,
    /// Watched by each attempt, to see when somebody else has ended it.
    pub(super) handover: watch::Sender<SourceHandover>,
    /// Held by the attempt that pauses the program until it has let it go.
    pub(super) pausing: Arc<tokio::sync::Mutex<()>>,
    pub(super) offered: OfferedRegions,
    pub(super) regions: Vec<Region>,
    pub(super) peers: HashSet<PeerId>,
    pub(super) gate: Gate,
    pub(super) state: StateOf,
    pub(super) pause_limit: Duration,
    pub(super) offer_limit: Duration,
    /// Bytes a second of pages that no fault waits for.
    pub(super) background_limit: Option<u64>,
    /// Streams that destinations listen on for pages, until their attempt takes them.
    pub(super) feeds: watch::Sender<Vec<Feed>>,
    /// Raised by [`Source::finalize`](super::Source::finalize), for the attempt that is going on.
    pub(super) finalize: watch::Sender<Option<Turn>>,
    pub(super) keep_memory: bool,
    pub(super) service: Service,
    pub(super) events: broadcast::Sender<MoveEvent>,
    pub(super) times: Mutex<Times>,
    pub(super) departed: watch::Sender<Option<Departed>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("handover", &self.handover).field("gate", &self.gate).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
pub(super) struct Times {
    asked: Option<Instant>,
    paused: Option<Instant>,
    resumed: Option<Instant>,
}

impl Extension for Shared {
    fn take(&self, stream: TakeStream) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let Some(shared) = self.me.upgrade() else { return Box::pin(async {}) };
        Box::pin(async move {
            let TakeStream { peer, session, plan, writer, reader } = stream;
            let strategy = Strategy::from(plan);
            let attempt =
                Attempt { shared, peer, session, strategy, writer, reader, turn: None, copy: None, pause: None, deadline: None };
            attempt.run().await;
        })
    }

    fn feed(&self, feed: Feed) {
        // Of the attempt that is going on, or of nobody.
        let wanted = |turn: Turn| turn.session == feed.session && turn.epoch == feed.epoch && self.peers.contains(&feed.peer);
        if self.state().turn().is_some_and(wanted) {
            self.feeds.send_modify(|feeds| feeds.push(feed));
        }
    }
}

impl Shared {
    pub(super) fn state(&self) -> SourceState {
        self.handover.borrow().state()
    }

    /// Nothing waits inside: the decision alone is made under the lock.
    pub(super) fn decide(&self, event: SourceEvent) -> SourceAction {
        let mut action = SourceAction::Ignore;
        self.handover.send_modify(|handover| action = handover.on(event));
        action
    }

    /// Waits for the streams of an attempt, one a region, and gives them in the order of the regions.
    async fn feeds_of(&self, turn: Turn) -> Vec<Feed> {
        let of_turn = |feed: &Feed| feed.session == turn.session && feed.epoch == turn.epoch;
        let of_region =
            |feeds: &[Feed], region: &Region| feeds.iter().position(|feed| of_turn(feed) && *feed.name == *region.name());
        let mut arrived = self.feeds.subscribe();
        let all_here = |feeds: &Vec<Feed>| self.regions.iter().all(|region| of_region(feeds, region).is_some());
        // The sender is this struct's own.
        let _ = arrived.wait_for(all_here).await;
        let mut taken = Vec::with_capacity(self.regions.len());
        self.feeds.send_modify(|feeds| {
            taken.extend(self.regions.iter().filter_map(|region| of_region(feeds, region).map(|at| feeds.remove(at))));
            // Whatever else there is came twice, or for an attempt that is over.
            feeds.clear();
        });
        taken
    }

    /// Ends an attempt that has not committed; it sees that by itself, and lets the program run on. Whether this call did it.
    pub(super) fn end(&self, turn: Turn) -> bool {
        self.handover.send_if_modified(|handover| {
            let before = handover.state();
            handover.on(SourceEvent::Failed(turn));
            handover.state() != before
        })
    }

    fn times(&self) -> MutexGuard<'_, Times> {
        self.times.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn tell(&self, event: MoveEvent) {
        tracing::info!(?event, "migration");
        let _ = self.events.send(event);
    }

    fn release(&self) {
        if !self.keep_memory {
            for region in &self.regions {
                if let Err(error) = region.discard(0..region.len() as u64) {
                    tracing::warn!(%error, region = region.name(), "the memory of a region that moved away could not be given back");
                }
            }
        }
    }

    fn depart(&self, turn: Turn, peer: PeerId) {
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
    strategy: Strategy,
    writer: FrameWriter,
    reader: FrameReader,
    turn: Option<Turn>,
    /// From MAPPED to the commit, and whether what is owed is to be sent in the pause.
    copy: Option<(Copy, bool)>,
    /// While the program is paused by this attempt.
    pause: Option<OwnedMutexGuard<()>>,
    /// When this step is given up.
    deadline: Option<Instant>,
}

/// For how long a step may go on: until its deadline, and while nobody else has ended the attempt.
struct Bound {
    deadline: Option<Instant>,
    attempt: Option<(watch::Receiver<SourceHandover>, Turn)>,
}

impl Bound {
    async fn wait<T>(self, work: impl Future<Output = T>) -> Result<T, End> {
        let Bound { deadline, attempt } = self;
        let ended = async {
            let Some((mut handover, turn)) = attempt else { return pending().await };
            let _ = handover.wait_for(|handover| handover.state().turn() != Some(turn)).await;
        };
        let late = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => pending().await,
            }
        };
        tokio::select! {
            biased;
            () = ended => Err(End::Failed("the source called the attempt off".into())),
            done = work => Ok(done),
            () = late => Err(End::Failed("the destination, or the program's state, took longer than the step may take".into())),
        }
    }
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

impl From<CopyError> for End {
    fn from(CopyError(reason): CopyError) -> End {
        End::Failed(reason)
    }
}

/// How often the destination is told how far copying is.
const PROGRESS: Duration = Duration::from_millis(100);

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
        let ended = self.turn.is_some_and(|turn| self.shared.end(turn));
        if let Some(pause) = self.pause.take() {
            // Does nothing once the program belongs to the destination.
            self.shared.gate.resume().await;
            drop(pause);
        }
        if ended {
            self.shared.tell(MoveEvent::Aborted { reason: reason.to_owned() });
        }
        if let End::Failed(reason) = end {
            let _ = tokio::time::timeout(LAST_WORD_LIMIT, self.abort(ErrorCode::Aborted, &reason)).await;
        }
        self.writer.finish();
        // The destination closes the stream once it has read the last word.
        let _ = tokio::time::timeout(LAST_WORD_LIMIT, self.writer.delivered()).await;
    }

    async fn serve(&mut self) -> End {
        let mut event = SourceEvent::Take(self.session);
        loop {
            let action = self.shared.decide(event);
            match self.carry_out(action).await {
                Ok(None) => {}
                Ok(Some(next)) => {
                    event = next;
                    continue;
                }
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

    /// What follows by itself, if anything does.
    async fn carry_out(&mut self, action: SourceAction) -> Result<Option<SourceEvent>, End> {
        match action {
            // `Resume` answers a failure, which is not decided here.
            SourceAction::Ignore | SourceAction::Resume => {}
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
            SourceAction::Copy(turn) => {
                self.copy(turn).await?;
                return Ok(Some(SourceEvent::Copied(turn)));
            }
            SourceAction::PauseAndPrepare(turn) => self.pause_and_prepare(turn).await?,
            SourceAction::StopAndCommit(turn) => {
                // In this order: nothing that the program writes from here on would arrive.
                self.shared.gate.stop();
                self.deadline = None;
                // Told first: it is true even if COMMIT finds no connection.
                self.shared.tell(MoveEvent::Committed { epoch: turn.epoch });
                let sent = self.send(&Frame::Commit { session: turn.session, epoch: turn.epoch }).await;
                if let Some((copy, _)) = self.copy.take() {
                    self.shared.service.spawn(async move {
                        // The destination asks for what does not come.
                        if let Err(CopyError(reason)) = copy.push().await {
                            tracing::debug!(reason, "pushing ended early");
                        }
                    });
                }
                sent?;
            }
            SourceAction::CommitAgain(turn) => {
                self.turn = Some(turn);
                self.deadline = None;
                self.send(&Frame::Commit { session: turn.session, epoch: turn.epoch }).await?;
            }
            SourceAction::ResumeAndRefuse => {
                // It was paused by the attempt of another stream, which sees that it was ended.
                drop(self.shared.pausing.lock().await);
                let reason = "the destination asked again before the program had changed hands";
                self.shared.tell(MoveEvent::Aborted { reason: reason.into() });
                return Err(End::Failed(reason.into()));
            }
            SourceAction::Release(turn) => {
                self.shared.tell(MoveEvent::Complete);
                let shared = self.shared.clone();
                // Giving the memory back is a system call of milliseconds.
                let released = tokio::task::spawn_blocking(move || shared.release()).await;
                if let Err(error) = released {
                    tracing::error!(%error, "releasing the regions failed");
                }
                let sent = self.send(&Frame::Released { session: turn.session, epoch: turn.epoch }).await;
                self.writer.finish();
                // Many a source ends when its program has departed, and RELEASED with it if that were said before it has arrived.
                let _ = tokio::time::timeout(LAST_WORD_LIMIT, self.writer.delivered()).await;
                self.shared.depart(turn, self.peer);
                return sent.and(Err(End::Orderly));
            }
            SourceAction::ReleasedAgain(turn) => {
                self.send(&Frame::Released { session: turn.session, epoch: turn.epoch }).await?;
            }
            SourceAction::Refuse => {
                self.abort(ErrorCode::NotOwner, "the program belongs, or is being handed over, to another session").await?;
                return Err(End::Orderly);
            }
        }
        Ok(None)
    }

    /// Copies pages while the program runs, until it is to move.
    async fn copy(&mut self, turn: Turn) -> Result<(), End> {
        let feeds = self.bound().wait(self.shared.feeds_of(turn)).await?;
        // From here on it takes as long as the strategy says. The destination hears of it meanwhile.
        self.deadline = None;
        let bound = self.bound();
        bound.wait(self.copy_until_handover(turn, feeds)).await?
    }

    async fn copy_until_handover(&mut self, turn: Turn, feeds: Vec<Feed>) -> Result<(), End> {
        let mut copy = Copy::begin(&self.shared, self.strategy, feeds).await?;
        let mut told = Instant::now();
        loop {
            let finalize = *self.shared.finalize.borrow() == Some(turn);
            let verdict = {
                let mut step = std::pin::pin!(copy.step(finalize));
                loop {
                    tokio::select! {
                        verdict = &mut step => break verdict?,
                        frame = self.reader.next() => match frame? {
                            Some(Frame::Mapped { .. }) => {}
                            Some(Frame::Abort { message, .. }) => {
                                return Err(End::Failed(format!("the destination gave up: {}", &*message)));
                            }
                            Some(other) => return Err(End::Failed(format!("{} came while pages are copied", other.kind().name()))),
                            None => return Err(End::Orderly),
                        },
                    }
                }
            };
            // There is nothing to tell of what copies nothing.
            let last = verdict != Verdict::GoOn && self.strategy.copies_first();
            if told.elapsed() >= PROGRESS || last {
                told = Instant::now();
                let copying = copy.progress();
                self.writer.send(&Frame::Progress { session: turn.session, epoch: turn.epoch, copying }).await?;
                self.shared.tell(copying.into());
            }
            match verdict {
                Verdict::GoOn => {}
                Verdict::HandOver { copy_rest } => {
                    self.copy = Some((copy, copy_rest));
                    return Ok(());
                }
                Verdict::Cancel { reason } => return Err(End::Failed(reason)),
            }
        }
    }

    async fn pause_and_prepare(&mut self, turn: Turn) -> Result<(), End> {
        let limit = self.shared.pause_limit;
        self.deadline = Some(Instant::now() + limit);
        let alone = self.bound().wait(self.shared.pausing.clone().lock_owned());
        self.pause = Some(alone.await?);
        self.deadline = Some(Instant::now() + limit);
        // The gate keeps to the limit by itself, and says which threads were late.
        let pause = Bound { deadline: None, ..self.bound() }.wait(self.shared.gate.pause(limit));
        pause.await?.map_err(|error| End::Failed(error.to_string()))?;
        self.shared.times().paused = Some(Instant::now());
        let state_of = self.shared.state.clone();
        let state = tokio::task::spawn_blocking(move || Bytes::from(state_of()));
        let bound = self.bound();
        let last = async {
            match &mut self.copy {
                Some((copy, copy_rest)) => copy.last(*copy_rest).await,
                None => Ok(()),
            }
        };
        let (state, said) = bound.wait(async { tokio::join!(state, last) }).await?;
        said?;
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
        let frame = match self.bound().wait(self.reader.next()).await?? {
            None => return Err(End::Orderly),
            Some(frame) => frame,
        };
        let event = match frame {
            Frame::Mapped { session, epoch } => SourceEvent::Mapped(Turn { session, epoch }),
            // Only what this stream prepared can be ready: the program may still run.
            Frame::Ready { .. } if self.pause.is_none() => return Err(End::Failed("READY came before PREPARE".into())),
            Frame::Ready { session, epoch } => SourceEvent::Ready(Turn { session, epoch }),
            Frame::Complete { session, epoch } => SourceEvent::Complete(Turn { session, epoch }),
            Frame::Resumed { session, epoch } => {
                let gone = matches!(self.shared.state(), SourceState::Committed(to) | SourceState::Released(to) if to == Turn { session, epoch });
                if !gone {
                    return Err(End::Failed("RESUMED came before COMMIT".into()));
                }
                self.shared.times().resumed.get_or_insert_with(Instant::now);
                self.shared.tell(MoveEvent::Resumed);
                return Ok(None);
            }
            Frame::Abort { message, .. } => return Err(End::Failed(format!("the destination gave up: {}", &*message))),
            other => return Err(End::Failed(format!("{} came in a handover", other.kind().name()))),
        };
        Ok(Some(event))
    }

    fn bound(&self) -> Bound {
        let attempt = self.turn.map(|turn| (self.shared.handover.subscribe(), turn));
        Bound { deadline: self.deadline, attempt }
    }

    async fn send(&mut self, frame: &Frame) -> Result<(), End> {
        Ok(self.bound().wait(self.writer.send(frame)).await??)
    }

    async fn abort(&mut self, code: ErrorCode, message: &str) -> Result<(), StreamError> {
        let (session, epoch) = (self.session, self.turn.map_or(0, |turn| turn.epoch));
        self.writer.send(&Frame::Abort { session, epoch, code, message: Message::cut(message) }).await
    }
}

/// How long a last word may take; nothing depends on its arrival.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(1);

impl Drop for Attempt {
    fn drop(&mut self) {
        // Does something only if `run` did not come to its end: a hook of the gate panicked, or the thread that serves ends.
        if self.turn.is_some_and(|turn| self.shared.end(turn)) {
            self.shared.tell(MoveEvent::Aborted { reason: "the attempt broke off".into() });
        }
        if let Some(pause) = self.pause.take() {
            let gate = RunsOn(self.shared.gate.clone());
            self.shared.service.spawn(async move {
                gate.0.resume().await;
                drop(pause);
            });
        }
    }
}

/// A gate that is let go at the latest when this is dropped, even if there is no time left for its hook.
pub(super) struct RunsOn(pub(super) Gate);

impl Drop for RunsOn {
    fn drop(&mut self) {
        self.0.run_on();
    }
}
