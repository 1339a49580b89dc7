//! One destination's attempt to take the program, at the source: one TAKE stream from its first frame to its last.
//!
//! Role: carries out [`SourceHandover`]. Neighbours: `shared` is what it has in common with the others; a `Server` brings the streams; the
//! [`Gate`] pauses the program. Invariants: S6; a pause ends within its limit, by commit or by resume, whatever the network does; the attempt that paused
//! the program is the one that lets it go, so that no resume falls into the pause of another.

use super::{
    MoveEvent,
    copy::{Copy, CopyError, Parked},
    gate::Gate,
    handover::{SessionId, SourceAction, SourceEvent, SourceHandover, SourceState, Turn},
    rounds::Verdict,
    shared::{Shared, lock},
    strategy::Strategy,
};
use crate::{
    PeerId,
    net::{
        Extension, Feed, FrameReader, FrameWriter, StreamError, TakeStream,
        wire::{ErrorCode, Frame, MAX_STATE_BYTES, MAX_STATE_PIECE_BYTES, Message, StateLength, StatePiece},
    },
};
use bytes::Bytes;
use std::{
    future::{Future, pending},
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{Notify, OwnedMutexGuard, watch};

impl Extension for Shared {
    fn take(&self, stream: TakeStream) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let Some(shared) = self.me.upgrade() else { return Box::pin(async {}) };
        Box::pin(async move {
            let TakeStream { peer, session, plan, writer, reader } = stream;
            let strategy = Strategy::from(plan);
            let attempt = Attempt {
                shared,
                peer,
                session,
                strategy,
                mapped_since: 0,
                writer,
                reader,
                turn: None,
                copying: None,
                copy: None,
                pause: None,
                deadline: None,
                resumed: Arc::default(),
            };
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

    fn depose(&self, peer: PeerId, session: SessionId, epoch: u64) -> Frame {
        let (code, message) = if !self.peers.contains(&peer) {
            (ErrorCode::NotGranted, "this peer was not granted the program")
        } else if let SourceAction::StopAndSayDeposed(turn) = self.decide(SourceEvent::Depose(Turn { session, epoch })) {
            self.deposed(turn);
            return Frame::Deposed { session, epoch };
        } else {
            (ErrorCode::NotOwner, "it does not stand by for this program, or another has it")
        };
        Frame::Abort { session, epoch, code, message: Message::cut(message) }
    }
}

/// One TAKE stream.
pub(super) struct Attempt {
    pub(super) shared: Arc<Shared>,
    peer: PeerId,
    session: SessionId,
    pub(super) strategy: Strategy,
    /// The attempt for which the destination mapped its regions: it has what came in that one and since.
    mapped_since: u64,
    pub(super) writer: FrameWriter,
    pub(super) reader: FrameReader,
    turn: Option<Turn>,
    /// While it has `copy`.
    copying: Option<OwnedMutexGuard<()>>,
    /// From MAPPED to the commit, and whether what is owed is to be sent in the pause.
    pub(super) copy: Option<(Copy, bool)>,
    /// While the program is paused by this attempt.
    pub(super) pause: Option<OwnedMutexGuard<()>>,
    /// When this step is given up.
    pub(super) deadline: Option<Instant>,
    /// Told when the program runs at the destination.
    resumed: Arc<Notify>,
}

/// How long a push waits for the program's first steps at the destination: with all processors at work on pages they would wait for a slice of the scheduler, 3 ms. Where RESUMED takes longer to come,
/// the path is long, and idle for no longer than this.
const FIRST_STEPS: Duration = Duration::from_millis(5);

/// For how long a step may go on: until its deadline, and while nobody else has ended the attempt.
pub(super) struct Bound {
    deadline: Option<Instant>,
    attempt: Option<(watch::Receiver<SourceHandover>, Turn)>,
}

impl Bound {
    pub(super) async fn wait<T>(self, work: impl Future<Output = T>) -> Result<T, End> {
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
            () = ended => Err(End::CalledOff),
            done = work => Ok(done),
            () = late => Err(End::Failed("the destination, or the program's state, took longer than the step may take".into())),
        }
    }
}

/// Why a stream is over.
pub(super) enum End {
    Orderly,
    /// The connection is lost; the destination may come back.
    Lost(String),
    /// Somebody else has ended the attempt.
    CalledOff,
    /// The destination is told, if it still listens.
    Failed(String),
}

impl From<StreamError> for End {
    fn from(error: StreamError) -> End {
        match error {
            StreamError::Ended(reason) => End::Lost(reason),
            StreamError::Wire(error) => End::Failed(error.to_string()),
        }
    }
}

impl From<CopyError> for End {
    fn from(error: CopyError) -> End {
        match error {
            CopyError::Lost(reason) => End::Lost(reason),
            CopyError::Failed(reason) => End::Failed(reason),
        }
    }
}

/// How often the destination is told how far copying is.
pub(super) const PROGRESS: Duration = Duration::from_millis(100);

impl Attempt {
    async fn run(mut self) {
        if !self.shared.peers.contains(&self.peer) {
            let _ = self.abort(ErrorCode::NotGranted, "this peer was not granted the program").await;
            return;
        }
        let end = self.serve().await;
        let reason = match &end {
            End::Orderly => "the destination ended the stream",
            End::CalledOff => "the source called the attempt off",
            End::Lost(reason) | End::Failed(reason) => reason.as_str(),
        };
        let ended = self.turn.is_some_and(|turn| self.shared.end(turn));
        if let Some(pause) = self.pause.take() {
            // Does nothing once the program belongs to the destination.
            self.shared.gate.resume().await;
            drop(pause);
        }
        let comes_back = match &end {
            End::Lost(_) => true,
            // By the owner, or by the destination that asks again on another stream.
            End::CalledOff => *lock(&self.shared.cancelled) != self.turn,
            End::Orderly | End::Failed(_) => false,
        };
        if let Some((copy, _)) = self.copy.take()
            && comes_back
        {
            self.shared.park(self.session, copy.park());
        }
        self.copying = None;
        if ended {
            let reason = reason.to_owned();
            self.shared.tell(if comes_back { MoveEvent::Interrupted { reason } } else { MoveEvent::Aborted { reason } });
        }
        if matches!(end, End::Failed(_) | End::CalledOff) {
            let reason = reason.to_owned();
            let for_good = matches!(end, End::CalledOff) && !comes_back;
            let code = if for_good { ErrorCode::CalledOff } else { ErrorCode::Aborted };
            let _ = tokio::time::timeout(LAST_WORD_LIMIT, self.abort(code, &reason)).await;
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
            // `Resume` answers a failure, `StopAndSayDeposed` a stream of its own: neither is decided here.
            SourceAction::Ignore | SourceAction::Resume | SourceAction::StopAndSayDeposed(_) => {}
            SourceAction::SendOffer(turn) => self.offer(turn).await?,
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
                    let shared = self.shared.clone();
                    shared.times().rounds = copy.rounds_begun();
                    let resumed = self.resumed.clone();
                    self.shared.service.spawn(async move {
                        let _ = tokio::time::timeout(FIRST_STEPS, resumed.notified()).await;
                        // Said before the destination can say that it has all.
                        let sent = |bytes| shared.times().sent_bytes = bytes;
                        // The destination asks for what does not come.
                        if let Err(error) = copy.push(sent).await {
                            tracing::debug!(?error, "pushing ended early");
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
            SourceAction::ResumeAndOffer(turn) => {
                // It was paused by the attempt of another stream, which sees that it was ended.
                drop(self.shared.pausing.lock().await);
                self.offer(turn).await?;
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

    async fn offer(&mut self, turn: Turn) -> Result<(), End> {
        self.turn = Some(turn);
        self.deadline = Some(Instant::now() + self.shared.offer_limit);
        self.shared.times().asked_by(turn.session);
        let state_bytes = StateLength::new(u64::from(MAX_STATE_BYTES)).map_err(StreamError::from)?;
        let Turn { session, epoch } = turn;
        let regions = self.shared.offered.clone();
        self.send(&Frame::Offer { session, epoch, state_bytes, regions }).await?;
        self.shared.tell(MoveEvent::Offered { epoch });
        Ok(())
    }

    /// Copies pages while the program runs, until it is to move.
    async fn copy(&mut self, turn: Turn) -> Result<(), End> {
        let feeds = self.bound().wait(self.shared.feeds_of(turn)).await?;
        self.copying = Some(self.bound().wait(self.shared.copying.clone().lock_owned()).await?);
        // An account of what was sent to regions that are no more is of no use, whoever thinks that they are still there.
        let holds = |(session, parked): &(SessionId, Parked)| *session == turn.session && self.mapped_since <= parked.began();
        let parked = lock(&self.shared.parked).take().filter(holds);
        let copy = match parked {
            Some((_, parked)) => Copy::go_on(&self.shared, self.strategy, feeds, parked),
            None => {
                let alone = self.bound().wait(self.shared.following.clone().lock_owned()).await?;
                // On a task of its own: it ends what it began, whoever calls it off.
                let begun = Copy::begin(self.shared.clone(), self.strategy, feeds, turn.epoch, alone);
                let begun = self.bound().wait(self.shared.service.spawn(begun)).await?;
                begun.map_err(|error| End::Failed(error.to_string()))??
            }
        };
        let (copy, _) = self.copy.insert((copy, false));
        copy.say_all_lacking(self.strategy).await?;
        // From here on it takes as long as the strategy says. The destination hears of it meanwhile.
        self.deadline = None;
        let bound = self.bound();
        if self.strategy.behind().is_some() {
            bound.wait(self.stand(turn)).await?
        } else {
            bound.wait(self.copy_until_handover(turn)).await?
        }
    }

    async fn copy_until_handover(&mut self, turn: Turn) -> Result<(), End> {
        let Some((copy, copy_rest)) = &mut self.copy else { return Err(End::CalledOff) };
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
                Verdict::HandOver { copy_rest: wanted } => {
                    *copy_rest = wanted;
                    copy.drain().await;
                    return Ok(());
                }
                Verdict::Cancel { reason } => return Err(End::Failed(reason)),
            }
        }
    }

    /// Pauses the program, which is this attempt's to let go from then on.
    pub(super) async fn pause(&mut self) -> Result<(), End> {
        let limit = self.shared.pause_limit;
        self.deadline = Some(Instant::now() + limit);
        let alone = self.bound().wait(self.shared.pausing.clone().lock_owned());
        self.pause = Some(alone.await?);
        self.deadline = Some(Instant::now() + limit);
        // The gate keeps to the limit by itself, and says which threads were late.
        let gate = self.shared.gate.clone();
        // On a task of its own: a hook of the program that panics ends the attempt, not this task, which has to say so.
        let mut pause = self.shared.service.spawn(async move { gate.pause(limit).await });
        let paused = Bound { deadline: None, ..self.bound() }.wait(&mut pause).await;
        if paused.is_err() {
            pause.abort();
            let _ = pause.await;
        }
        let paused = paused?.map_err(|error| End::Failed(format!("pausing the program: {error}")))?;
        paused.map_err(|error| End::Failed(error.to_string()))
    }

    /// The program's state, while it is paused.
    pub(super) fn state(&self) -> impl Future<Output = Result<Bytes, End>> + Send + use<> {
        let state_of = self.shared.state.clone();
        let state = tokio::task::spawn_blocking(move || Bytes::from(state_of()));
        async move { state.await.map_err(|_| End::Failed("the program's state function panicked".into())) }
    }

    async fn pause_and_prepare(&mut self, turn: Turn) -> Result<(), End> {
        self.pause().await?;
        self.shared.times().paused = Some(Instant::now());
        self.shared.tell(MoveEvent::Paused);
        let state = self.state();
        let bound = self.bound();
        let last = async {
            match &mut self.copy {
                Some((copy, copy_rest)) => copy.last(*copy_rest).await,
                None => Ok(()),
            }
        };
        let (state, said) = bound.wait(async { tokio::join!(state, last) }).await?;
        said?;
        let state = state?;
        let state_bytes = length_of(&state)?;
        self.send(&Frame::Prepare { session: turn.session, epoch: turn.epoch, state_bytes }).await?;
        self.send_state(state).await
    }

    pub(super) async fn send_state(&mut self, mut rest: Bytes) -> Result<(), End> {
        while !rest.is_empty() {
            let piece = rest.split_to(rest.len().min(MAX_STATE_PIECE_BYTES as usize));
            let bytes = StatePiece::new(piece).map_err(StreamError::from)?;
            self.send(&Frame::State { bytes }).await?;
        }
        Ok(())
    }

    async fn next_event(&mut self) -> Result<Option<SourceEvent>, End> {
        let frame = match self.bound().wait(self.reader.next()).await?? {
            None => return Err(End::Orderly),
            Some(frame) => frame,
        };
        let event = match frame {
            Frame::Mapped { session, epoch, since } => {
                self.mapped_since = since;
                SourceEvent::Mapped(Turn { session, epoch })
            }
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
                self.resumed.notify_one();
                self.shared.tell(MoveEvent::Resumed);
                return Ok(None);
            }
            Frame::Abort { message, .. } => return Err(End::Failed(format!("the destination gave up: {}", &*message))),
            other => return Err(End::Failed(format!("{} came in a handover", other.kind().name()))),
        };
        Ok(Some(event))
    }

    pub(super) fn bound(&self) -> Bound {
        let attempt = self.turn.map(|turn| (self.shared.handover.subscribe(), turn));
        Bound { deadline: self.deadline, attempt }
    }

    pub(super) async fn send(&mut self, frame: &Frame) -> Result<(), End> {
        Ok(self.bound().wait(self.writer.send(frame)).await??)
    }

    async fn abort(&mut self, code: ErrorCode, message: &str) -> Result<(), StreamError> {
        let (session, epoch) = (self.session, self.turn.map_or(0, |turn| turn.epoch));
        self.writer.send(&Frame::Abort { session, epoch, code, message: Message::cut(message) }).await
    }
}

pub(super) fn length_of(state: &Bytes) -> Result<StateLength, End> {
    let bytes = state.len();
    let too_large = |_| End::Failed(format!("the program's state has {bytes} bytes, at most {MAX_STATE_BYTES} can move"));
    StateLength::new(bytes as u64).map_err(too_large)
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
