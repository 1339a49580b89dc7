//! One session at the end that takes a program: from its first TAKE until every page is here.
//!
//! Role: carries out [`DestinationHandover`]. Neighbours: `destination` starts it and holds what comes of it; a [`Peer`] carries the handover's stream and the pages, an [`Arrival`] for
//! each region puts them in place; a [`Pager`] fills the regions once the program runs here. Invariants: S6: nothing runs here before COMMIT; what is read of the source before
//! it may be written again there, and is replaced or given up before the program runs here.

use super::{
    MoveError, MoveEvent, Strategy,
    arrival::Arrival,
    destination::Moved,
    follow::{Follow, Word},
    handover::{DestinationAction, DestinationEvent, DestinationHandover, DestinationState, SessionId},
    image::LAST,
};
use crate::{
    FaultAround, LossPolicy, NetError, Pager, Peer, Region,
    net::{
        FeedReader, FrameReader, FrameWriter, StreamError,
        wire::{ErrorCode, Frame, Message, OfferedRegion},
    },
    options::PullPlan,
    region::Upstream,
};
use bytes::{Bytes, BytesMut};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{broadcast, watch};

/// One session.
pub(super) struct Taking {
    pub(super) means: Means,
    pub(super) session: SessionId,
    strategy: Strategy,
    pub(super) handover: DestinationHandover,
    /// If it stands by.
    pub(super) follow: Option<Follow>,
    /// By the source's last OFFER.
    offered: Vec<OfferedRegion>,
    pub(super) regions: Vec<Region>,
    /// The attempt that they were mapped for.
    mapped_since: u64,
    /// One for each of them.
    arrivals: Vec<Arrival>,
    pub(super) state: Bytes,
    /// Since READY was sent.
    undecided_since: Option<Instant>,
    /// Since the connection broke, until the source has answered again.
    lost_since: Option<Instant>,
    pub(super) events: broadcast::Sender<MoveEvent>,
    pub(super) completion: watch::Sender<Option<Result<(), MoveError>>>,
}

/// How this end came by the program.
pub(super) enum Taken {
    Committed(Box<Stream>),
    /// By its caller's, without the source's.
    ByWord,
}

/// What a session is taken with.
pub(super) struct Means {
    pub(super) peer: Peer,
    pub(super) pager: Pager,
    pub(super) loss: LossPolicy,
    pub(super) fault_around: Option<FaultAround>,
    pub(super) step_limit: Duration,
    pub(super) decision_limit: Duration,
    pub(super) events: broadcast::Sender<MoveEvent>,
}

pub(super) struct Stream {
    pub(super) writer: FrameWriter,
    pub(super) reader: FrameReader,
}

/// What the source said, or did not.
pub(super) struct Heard {
    pub(super) event: DestinationEvent,
    pub(super) reason: String,
}

impl Heard {
    pub(super) fn lost(error: &StreamError) -> Heard {
        Heard { event: DestinationEvent::Lost, reason: error.to_string() }
    }
}

impl Taking {
    pub(super) fn new(means: Means, session: SessionId, strategy: Strategy) -> Taking {
        let events = means.events.clone();
        Taking {
            means,
            session,
            strategy,
            handover: DestinationHandover::new(),
            follow: None,
            offered: Vec::new(),
            regions: Vec::new(),
            mapped_since: 0,
            arrivals: Vec::new(),
            state: Bytes::new(),
            undecided_since: None,
            lost_since: None,
            events,
            completion: watch::Sender::new(None),
        }
    }

    pub(super) async fn run(mut self) -> Result<Moved, MoveError> {
        match self.hand_over().await {
            Ok(Taken::Committed(stream)) => Ok(self.moved_here(*stream).await),
            Ok(Taken::ByWord) => Err(MoveError::Closed),
            Err(error) => {
                // The caller may try again at the same addresses when it hears of it.
                self.unmap().await;
                Err(error)
            }
        }
    }

    /// The source has committed: the program is this end's.
    pub(super) async fn moved_here(mut self, mut stream: Stream) -> Moved {
        let epoch = self.handover.epoch();
        self.means.peer.bind_session(self.session, epoch);
        let resumed = stream.writer.send(&Frame::Resumed { session: self.session, epoch }).await;
        if let Err(error) = resumed {
            // Only the source's measurement of the pause depends on it.
            tracing::debug!(%error, "the source did not hear that the program runs");
        }
        let (regions, state, events) = (self.regions.clone(), self.state.clone(), self.events.clone());
        let moved = Moved { regions, state, epoch, completion: self.completion.subscribe(), events };
        self.tell(MoveEvent::Resumed);
        if let Some(mut follow) = self.follow.take() {
            follow.image.leave().await;
        }
        let service = self.means.pager.service().clone();
        // Weak handles: a caller that drops the program ends its pull.
        let weak = self.regions.iter().map(Region::downgrade).collect();
        self.regions.clear();
        service.spawn(self.bring_the_rest(stream, weak));
        moved
    }

    /// Returns when the program belongs to this end.
    pub(super) async fn hand_over(&mut self) -> Result<Taken, MoveError> {
        let mut stream = self.ask().await?;
        let mut asked = Instant::now();
        let mut heard = self.listen(&mut stream, Some(self.means.step_limit)).await?;
        loop {
            let Heard { event, reason } = heard;
            match self.handover.on(event) {
                DestinationAction::MapAndSayMapped => {
                    (self.undecided_since, self.lost_since) = (None, None);
                    self.undecided(false);
                    heard = match self.map().await {
                        Ok(()) => {
                            let (session, epoch, since) = (self.session, self.handover.epoch(), self.mapped_since);
                            let mapped = stream.writer.send(&Frame::Mapped { session, epoch, since }).await;
                            self.after(mapped, &mut stream, self.means.step_limit).await?
                        }
                        // Listening for pages needs the connection.
                        Err(MoveError::Net(error @ NetError::NoConnection { .. })) => {
                            Heard { event: DestinationEvent::Lost, reason: error.to_string() }
                        }
                        Err(error) => {
                            self.abort(&mut stream.writer, &error).await;
                            return Err(error);
                        }
                    };
                }
                DestinationAction::SendReady => {
                    self.undecided_since = Some(Instant::now());
                    self.undecided(true);
                    let (session, epoch) = (self.session, self.handover.epoch());
                    let ready = stream.writer.send(&Frame::Ready { session, epoch }).await;
                    heard = self.after(ready, &mut stream, self.means.decision_limit).await?;
                }
                DestinationAction::Run => return Ok(Taken::Committed(Box::new(stream))),
                DestinationAction::RunAndDepose => return Ok(Taken::ByWord),
                DestinationAction::AskAgain => {
                    if self.lost_since.is_none() && self.stands_by() {
                        self.tell(MoveEvent::Interrupted { reason: reason.clone() });
                    }
                    self.lost_since.get_or_insert_with(Instant::now);
                    let left = self.decision_left();
                    if left.is_zero() {
                        heard = Heard { event: DestinationEvent::TimedOut, reason };
                        continue;
                    }
                    let again = async {
                        tokio::time::sleep_until((asked + ASK_AGAIN).into()).await;
                        asked = Instant::now();
                        tokio::time::timeout(left, self.ask()).await
                    };
                    let again = tokio::select! {
                        biased;
                        word = self.word() => Err(word),
                        again = again => Ok(again),
                    };
                    match again {
                        Ok(Ok(Ok(again))) => {
                            stream = again;
                            heard = self.listen(&mut stream, Some(self.answer_limit())).await?;
                        }
                        Ok(Ok(Err(error))) => heard = Heard { event: DestinationEvent::Lost, reason: error.to_string() },
                        Ok(Err(_)) => heard = Heard { event: DestinationEvent::TimedOut, reason },
                        Err(word) => heard = word.heard()?,
                    }
                }
                DestinationAction::GiveUp => return Err(self.give_up(event, reason)),
                DestinationAction::Ignore | DestinationAction::SendComplete | DestinationAction::Finish => {
                    // What says nothing gives no more time either.
                    let waits = self.undecided_since.is_some() || self.lost_since.is_some();
                    let limit = if waits { self.answer_limit() } else { self.means.step_limit };
                    heard = self.listen(&mut stream, Some(limit)).await?;
                }
            }
        }
    }

    pub(super) fn tell(&self, event: MoveEvent) {
        tracing::info!(?event, "migration");
        let _ = self.events.send(event);
    }

    /// How long a source may take that was asked again.
    fn answer_limit(&self) -> Duration {
        if self.stands_by() { self.means.step_limit } else { self.decision_left() }
    }

    fn decision_left(&self) -> Duration {
        if self.stands_by() {
            // Its caller decides for how long.
            return Duration::MAX;
        }
        let since = self.undecided_since.or(self.lost_since);
        since.map_or(Duration::ZERO, |since| self.means.decision_limit.saturating_sub(since.elapsed()))
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
        let (mut writer, reader) = self.means.peer.open_stream().await?;
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
            let next = {
                let mut next = std::pin::pin!(frame_and_state(&mut stream.reader, limit));
                loop {
                    tokio::select! {
                        biased;
                        word = self.word() => {
                            if matches!(word, Word::Leave) {
                                // Or the source would keep its account for somebody who may come back.
                                self.abort(&mut stream.writer, &MoveError::Closed).await;
                            }
                            return word.heard();
                        }
                        // Beside what is being read, which would be lost with a part of a state in it.
                        () = self.promotion() => self.ask_for_promotion(&mut stream.writer).await,
                        next = &mut next => break next,
                    }
                }
            };
            match next {
                None => {
                    let event = if self.stands_by() { DestinationEvent::Lost } else { DestinationEvent::TimedOut };
                    return Ok(Heard { event, reason: format!("no answer within {limit:?}") });
                }
                // It is at work: the limit begins anew.
                Some(Ok((Some(Frame::Progress { copying, .. }), _))) => self.tell(copying.into()),
                Some(Ok((Some(Frame::Point { number, age_us, .. }), state))) => {
                    if let Some(heard) = self.point(stream, number, Duration::from_micros(age_us), state).await? {
                        return Ok(heard);
                    }
                }
                Some(next) => break next,
            }
        };
        let event = match next {
            Err(error) => return Ok(Heard::lost(&error)),
            Ok((Some(Frame::Prepare { epoch, .. }), state)) => {
                if self.handover.state() == DestinationState::Mapped && self.handover.epoch() == epoch {
                    self.state = state;
                    let attached = tokio::time::timeout(self.means.step_limit, self.attached()).await;
                    match attached.unwrap_or_else(|_| Err(MoveError::Lost { reason: "the pages did not come".into() })) {
                        Ok(()) => {}
                        Err(MoveError::Lost { reason }) => return Ok(Heard { event: DestinationEvent::Lost, reason }),
                        Err(error) => {
                            self.abort(&mut stream.writer, &error).await;
                            return Err(error);
                        }
                    }
                }
                DestinationEvent::Prepared { epoch }
            }
            Ok((None, _)) => return Ok(Heard { event: DestinationEvent::Lost, reason: "the source ended the stream".into() }),
            Ok((Some(Frame::Offer { epoch, regions, .. }), _)) => {
                self.offered = regions.to_vec();
                DestinationEvent::Offer { epoch }
            }
            Ok((Some(Frame::Commit { epoch, .. }), _)) => DestinationEvent::Commit { epoch },
            Ok((Some(Frame::Released { epoch, .. }), _)) => DestinationEvent::Released { epoch },
            Ok((Some(Frame::Abort { code, message, .. }), _)) => {
                if self.goes_on_after(code, &message) {
                    return Ok(Heard { event: DestinationEvent::Lost, reason: message.to_string() });
                }
                return Ok(Heard { event: DestinationEvent::Abort, reason: message.to_string() });
            }
            Ok((Some(Frame::Failed { code, message }), _)) => {
                return Err(NetError::Refused { code: code.into(), message: message.to_string() }.into());
            }
            Ok((Some(other), _)) => return Err(MoveError::Protocol(format!("{} came in a handover", other.kind().name()))),
        };
        Ok(Heard { event, reason: String::new() })
    }

    pub(super) async fn abort(&self, writer: &mut FrameWriter, error: &MoveError) {
        let (session, epoch) = (self.session, self.handover.epoch());
        let (code, message) = (ErrorCode::Aborted, Message::cut(&error.to_string()));
        let _ = writer.send(&Frame::Abort { session, epoch, code, message }).await;
        writer.finish();
    }

    /// Has what is offered mapped, as plain memory, and the source send its pages as it sees fit. What an earlier attempt brought is kept, unless that one had come so
    /// far that regions wait for pages.
    async fn map(&mut self) -> Result<(), MoveError> {
        let is_offered = |(region, offered): (&Region, &OfferedRegion)| {
            let address = region.fixed_address().map_or(0, |address| address as u64);
            (region.name(), region.size_bytes(), address) == (&**offered.name, offered.size_bytes, offered.address)
        };
        let same = self.regions.len() == self.offered.len() && self.regions.iter().zip(&self.offered).all(is_offered);
        let mut keeps = same && !self.regions.is_empty() && self.regions.iter().all(Region::is_plain);
        for arrival in self.arrivals.drain(..) {
            keeps &= arrival.cancel().await;
        }
        let mut has_point = false;
        if let Some(follow) = &mut self.follow {
            keeps &= follow.image.cancel().await;
            has_point = follow.image.has_point();
        }
        if has_point && !same {
            return Err(MoveError::Protocol("the source offers other regions than those that are followed".into()));
        }
        if !keeps && has_point {
            self.mapped_since = self.handover.epoch();
        } else if !keeps {
            self.unmap().await;
            self.mapped_since = self.handover.epoch();
            for OfferedRegion { name, size_bytes, address, .. } in &self.offered {
                let mut region = Region::builder().name(&***name).size(*size_bytes).pager(&self.means.pager);
                if *address != 0 {
                    region = region.at(usize::try_from(*address).unwrap_or(usize::MAX));
                }
                self.regions.push(region.open()?);
            }
            if let Some(follow) = &mut self.follow {
                self.regions.iter().try_for_each(|region| follow.image.map(region.clone()))?;
            }
        }
        for (at, region) in self.regions.clone().into_iter().enumerate() {
            let store = self.means.peer.open(region.name()).await?;
            let feed = FeedReader::start(&store, self.session, self.handover.epoch()).await?;
            if let Some(follow) = &mut self.follow {
                follow.image.listen(at, feed);
                continue;
            }
            let (pager, loss) = (self.means.pager.clone(), self.means.loss.clone());
            let upstream = Upstream { pager, store: Arc::new(store), fault_around: self.means.fault_around, loss };
            self.arrivals.push(Arrival::start(region, feed, upstream));
        }
        Ok(())
    }

    /// Nothing is mapped when this returns.
    pub(super) async fn unmap(&mut self) {
        for arrival in self.arrivals.drain(..) {
            arrival.cancel().await;
        }
        if let Some(follow) = &mut self.follow {
            follow.image.leave().await;
        }
        let regions = std::mem::take(&mut self.regions);
        // On another thread, for the unmapping waits for this one.
        let _ = tokio::task::spawn_blocking(move || drop(regions)).await;
    }

    async fn attached(&mut self) -> Result<(), MoveError> {
        if let Some(follow) = &mut self.follow {
            follow.image.reached(LAST).await?;
            return follow.show(self.state.clone(), Duration::ZERO).await.map(drop);
        }
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
            let told = tokio::time::timeout(self.means.loss.keep_trying, self.tell_complete(stream)).await;
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
            let Some(pull) = region.upgrade().map(|region| region.pull_owned(PullPlan::default())) else {
                return Err(MoveError::Closed);
            };
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

/// The next frame, with the state that belongs to it; `None` if that took longer than `limit`.
async fn frame_and_state(reader: &mut FrameReader, limit: Option<Duration>) -> Option<Result<(Option<Frame>, Bytes), StreamError>> {
    let next = async {
        let frame = reader.next().await?;
        match &frame {
            Some(Frame::Prepare { state_bytes, .. } | Frame::Point { state_bytes, .. }) => {
                let state = read_state(reader, **state_bytes).await?;
                Ok((frame, state))
            }
            _ => Ok((frame, Bytes::new())),
        }
    };
    match limit {
        None => Some(next.await),
        Some(limit) => tokio::time::timeout(limit, next).await.ok(),
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
