//! What the attempts of a source share: the program, who has it, and what one attempt leaves for the next.
//!
//! Role: the memory of a source between streams. Neighbours: `source` makes it and asks it; each `attempt` decides and acts through it. Invariants: a decision is made under one lock, in which
//! nothing waits; what a destination lacks is kept for its session alone, and for a while only.

use super::{
    MoveError, MoveEvent,
    copy::{Parked, Throttle},
    gate::Gate,
    handover::{SessionId, SourceAction, SourceEvent, SourceHandover, SourceState, Turn},
    source::Departed,
};
use crate::{
    PeerId, Region, Service,
    net::{Feed, wire::OfferedRegions},
};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::sync::{broadcast, watch};

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
    pub(super) throttle: Option<Throttle>,
    /// Streams that destinations listen on for pages, until their attempt takes them.
    pub(super) feeds: watch::Sender<Vec<Feed>>,
    /// Raised by [`Source::finalize`](super::Source::finalize), for the attempt that is going on.
    pub(super) finalize: watch::Sender<Option<Turn>>,
    /// Held by the attempt that copies, until it has parked that or given it up.
    pub(super) copying: Arc<tokio::sync::Mutex<()>>,
    /// Held for as long as anything follows the program's writes.
    pub(super) following: Arc<tokio::sync::Mutex<()>>,
    /// Of the session whose connection broke last, until when it is kept.
    pub(super) parked: Mutex<Option<(SessionId, Parked)>>,
    /// For how long.
    pub(super) reconnect_limit: Duration,
    /// The attempt that the source's owner called off.
    pub(super) cancelled: Mutex<Option<Turn>>,
    pub(super) keep_memory: bool,
    pub(super) service: Service,
    pub(super) events: broadcast::Sender<MoveEvent>,
    pub(super) times: Mutex<Times>,
    pub(super) departed: watch::Sender<Option<Result<Departed, MoveError>>>,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("handover", &self.handover).field("gate", &self.gate).finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
pub(super) struct Times {
    /// Of the session that asked last, when it did first.
    asked: Option<(SessionId, Instant)>,
    pub(super) paused: Option<Instant>,
    pub(super) resumed: Option<Instant>,
    /// Of the attempt that committed.
    pub(super) rounds: u32,
    pub(super) sent_bytes: u64,
}

impl Times {
    pub(super) fn asked_by(&mut self, session: SessionId) {
        if self.asked.is_none_or(|(before, _)| before != session) {
            self.asked = Some((session, Instant::now()));
        }
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
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
    pub(super) async fn feeds_of(&self, turn: Turn) -> Vec<Feed> {
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

    pub(super) fn times(&self) -> MutexGuard<'_, Times> {
        lock(&self.times)
    }

    /// Keeps what a destination lacks whose connection broke, for a while.
    pub(super) fn park(&self, session: SessionId, parked: Parked) {
        *lock(&self.parked) = Some((session, parked));
        let (me, limit) = (self.me.clone(), self.reconnect_limit);
        let until = Instant::now() + limit;
        self.service.spawn(async move {
            tokio::time::sleep_until(until.into()).await;
            if let Some(shared) = me.upgrade() {
                let mut parked = lock(&shared.parked);
                // Another may have taken its place, with its own time.
                parked.take_if(|(_, parked)| parked.since() <= until - limit);
            }
        });
    }

    pub(super) fn tell(&self, event: MoveEvent) {
        tracing::info!(?event, "migration");
        let _ = self.events.send(event);
    }

    pub(super) fn release(&self) {
        if !self.keep_memory {
            for region in &self.regions {
                if let Err(error) = region.discard(0..region.len() as u64) {
                    tracing::warn!(%error, region = region.name(), "the memory of a region that moved away could not be given back");
                }
            }
        }
    }

    /// A standby has taken the program over. What was written here since its last point stays, for whoever wants to look at it.
    pub(super) fn deposed(&self, turn: Turn) {
        self.gate.stop();
        drop(lock(&self.parked).take());
        let taken_over = MoveError::TakenOver { epoch: turn.epoch };
        let first = self.departed.send_if_modified(|departed| departed.replace(Err(taken_over)).is_none());
        if first {
            self.tell(MoveEvent::Deposed { epoch: turn.epoch });
        }
    }

    pub(super) fn depart(&self, turn: Turn, peer: PeerId) {
        let times = self.times();
        let downtime = times.paused.zip(times.resumed).map_or(Duration::ZERO, |(paused, resumed)| resumed - paused);
        let total = times.asked.map_or(Duration::ZERO, |(_, asked)| asked.elapsed());
        let (rounds, sent_bytes) = (times.rounds, times.sent_bytes);
        drop(times);
        self.departed.send_replace(Some(Ok(Departed { peer, epoch: turn.epoch, downtime, total, rounds, sent_bytes })));
        self.tell(MoveEvent::Released);
    }
}
