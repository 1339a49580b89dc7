//! Sends a program's pages to its next host: while it runs, while it is paused, and after it has gone.
//!
//! Role: carries out what [`Rounds`] decides, at the source. Neighbours: an `attempt` holds one and tells it when the program pauses; a tracker says what was written;
//! a [`Feed`] for each region carries the pages. Invariants: S5: trackers are asked before pages are read, and what they told is owed until it was sent after that; what is said
//! to be lacking is exactly what is owed while nothing is written. What was sent and not acknowledged when a connection broke is owed again.

use super::{
    attempt::RunsOn,
    gate::Gate,
    owed::{Owed, Tick},
    points::Points,
    rounds::{Look, Rounds, Verdict},
    shared::Shared,
    strategy::Strategy,
};
use crate::{
    Extent, PageSize, Program, Region, RegionError, TrackerKind, Tracking, Written,
    net::{Feed, StreamError, wire::Copying},
};
use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::OwnedMutexGuard;

/// See the module header.
pub(super) struct Copy {
    pub(super) parts: Vec<Part>,
    pub(super) feeds: Vec<Feed>,
    /// The attempt in which all was owed.
    began: u64,
    pub(super) tick: Tick,
    pub(super) rounds: Rounds,
    /// If the destination is a standby.
    pub(super) points: Option<Points>,
    dirtied_bytes: u64,
    start: Instant,
    /// For how long something was on the way, up to when.
    busy: Duration,
    looked: Instant,
    on_the_way: bool,
    gate: Gate,
    pause_limit: Duration,
    pace: Pace,
    pub(super) throttle: Throttled,
}

/// Tells the program how fast it may write, and in the end that it may do as it likes.
pub(super) struct Throttled {
    hook: Option<Throttle>,
    speed: f64,
}

/// See [`SourceBuilder::throttle`](super::SourceBuilder::throttle).
pub(super) type Throttle = Arc<dyn Fn(f64) + Send + Sync>;

impl Throttled {
    pub(super) fn set(&mut self, speed: f64) {
        if speed.to_bits() != self.speed.to_bits() {
            self.speed = speed;
            if let Some(hook) = &self.hook {
                hook(speed);
            }
        }
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        self.set(1.0);
    }
}

pub(super) struct Part {
    /// `None` if the program's writes while it runs do not matter: nothing is sent before it pauses.
    pub(super) followed: Option<Arc<Followed>>,
    pub(super) owed: Owed,
    page: PageSize,
    /// Sent, and not yet said to be in place: by how many bytes had been sent on the feed then.
    pub(super) unacknowledged: VecDeque<(u64, Vec<Extent>)>,
}

/// A region has one follower at a time, so the next waits until the last task that uses this one has let go.
pub(super) struct Followed {
    tracking: Tracking,
    _alone: Arc<Alone>,
}

/// Held by the one attempt that copies.
pub(super) type Alone = OwnedMutexGuard<()>;

/// What the destination of a session lacks, while there is no connection to it.
pub(super) struct Parked {
    parts: Vec<Part>,
    began: u64,
    tick: Tick,
    points: Option<Points>,
    since: Instant,
}

impl Parked {
    /// The attempt in which all was owed: it says what was sent in that one and since.
    pub(super) fn began(&self) -> u64 {
        self.began
    }

    /// When the connection broke.
    pub(super) fn since(&self) -> Instant {
        self.since
    }
}

impl std::fmt::Debug for Parked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Parked").field("regions", &self.parts.len()).field("tick", &self.tick).finish_non_exhaustive()
    }
}

/// Keeps background traffic under a limit.
#[derive(Clone, Copy)]
struct Pace {
    bytes_s: Option<u64>,
    /// When the next may go.
    next: Instant,
}

/// Why copying cannot go on.
#[derive(Debug)]
pub(super) enum CopyError {
    /// The connection is lost, or the destination has left the feed.
    Lost(String),
    Failed(String),
}

impl From<StreamError> for CopyError {
    fn from(error: StreamError) -> CopyError {
        CopyError::Lost(format!("sending pages: {error}"))
    }
}

impl From<RegionError> for CopyError {
    fn from(error: RegionError) -> CopyError {
        CopyError::Failed(format!("following the program's writes: {error}"))
    }
}

/// The tick of what is owed from the beginning.
pub(super) const FIRST: Tick = 1;

/// Sent between two looks: a round trip or so of a fast link, so that trackers are asked now and then and a limit is not overrun by much.
const STEP: Duration = Duration::from_millis(50);
const STEP_MIN_BYTES: u64 = 1 << 20;
const STEP_MAX_BYTES: u64 = 32 << 20;
/// See [`Copy::drain`].
const DRAIN_LIMIT: Duration = Duration::from_millis(500);
const DRAIN_LOOK: Duration = Duration::from_micros(500);
/// Between two looks when there is nothing to send.
const IDLE: Duration = Duration::from_millis(10);

impl Copy {
    /// Everything is owed. Unless the program moves first, its writes are followed from here on.
    pub(super) async fn begin(
        shared: Arc<Shared>,
        strategy: Strategy,
        feeds: Vec<Feed>,
        began: u64,
        alone: Alone,
    ) -> Result<Copy, CopyError> {
        let alone = Arc::new(alone);
        let mut parts = Vec::with_capacity(feeds.len());
        for region in &shared.regions {
            let followed = if strategy.copies_first() { Some(follow(region, &alone).await?) } else { None };
            let owed = Owed::all(region.extent(), FIRST);
            parts.push(Part { followed, owed, page: region.page_size(), unacknowledged: VecDeque::new() });
        }
        let points = strategy.behind().map(|behind| Points::new(behind, FIRST));
        Ok(Copy::go_on(&shared, strategy, feeds, Parked { parts, began, tick: FIRST, points, since: Instant::now() }))
    }

    /// What was owed when the connection broke still is, and what the program has written since.
    pub(super) fn go_on(shared: &Shared, strategy: Strategy, feeds: Vec<Feed>, parked: Parked) -> Copy {
        let Parked { parts, began, tick, points, .. } = parked;
        Copy {
            parts,
            feeds,
            began,
            tick,
            rounds: Rounds::new(strategy, tick),
            points: points.map(|points| points.go_on(tick)),
            dirtied_bytes: 0,
            start: Instant::now(),
            busy: Duration::ZERO,
            looked: Instant::now(),
            on_the_way: false,
            gate: shared.gate.clone(),
            pause_limit: shared.pause_limit,
            pace: Pace { bytes_s: shared.background_limit, next: Instant::now() },
            throttle: Throttled { hook: shared.throttle.clone(), speed: 1.0 },
        }
    }

    /// Of a program that moves first. Said now, it takes nothing from the pause.
    pub(super) async fn say_all_lacking(&mut self, strategy: Strategy) -> Result<(), CopyError> {
        if strategy.copies_first() { Ok(()) } else { self.say_lacking().await }
    }

    /// The connection broke. The program runs on, and what it writes is followed.
    pub(super) fn park(self) -> Parked {
        let Copy { mut parts, feeds, began, tick, points, .. } = self;
        for (part, feed) in parts.iter_mut().zip(&feeds) {
            part.acknowledge(feed);
            for (_, extents) in std::mem::take(&mut part.unacknowledged) {
                part.owed.wrote(tick, &extents);
            }
        }
        Parked { parts, began, tick, points, since: Instant::now() }
    }

    /// Looks once, and sends a little while it asks the trackers.
    pub(super) async fn step(&mut self, finalize: bool) -> Result<Verdict, CopyError> {
        let look = self.look(finalize);
        let verdict = self.rounds.look(&look);
        if verdict != Verdict::GoOn {
            return Ok(verdict);
        }
        self.throttle.set(self.rounds.speed());
        self.send_some().await?;
        Ok(Verdict::GoOn)
    }

    /// Sends a little, and asks the trackers.
    pub(super) async fn send_some(&mut self) -> Result<(), CopyError> {
        let batch = self.batch(true);
        let gates = (self.gate.clone(), self.pause_limit);
        let followed = self.followed();
        // Side by side: what is written is owed again, whether it was sent before or after that.
        let (sent, taken) = tokio::join!(self.send(batch), take_running(followed, gates));
        sent?;
        self.owe(taken?);
        Ok(())
    }

    /// Asks the trackers after a while.
    pub(super) async fn wait(&mut self, time: Duration) -> Result<(), CopyError> {
        tokio::time::sleep(time).await;
        let taken = take_running(self.followed(), (self.gate.clone(), self.pause_limit)).await?;
        self.owe(taken);
        Ok(())
    }

    fn followed(&self) -> Vec<Option<Arc<Followed>>> {
        self.parts.iter().map(|part| part.followed.clone()).collect()
    }

    pub(super) fn look(&mut self, finalize: bool) -> Look {
        self.parts.iter_mut().zip(&self.feeds).for_each(|(part, feed)| part.acknowledge(feed));
        let counted = self.feeds.iter().map(Feed::sent_and_used_bytes);
        let (sent, used) = counted.fold((0, 0), |(sent, used), more| (sent + more.0, used + more.1));
        // Pages of zeros weigh nothing, and say nothing about how fast others go.
        let full: u64 = self.feeds.iter().map(Feed::full_bytes).sum();
        let arrived = scale(full, used, sent);
        let now = Instant::now();
        if self.on_the_way {
            self.busy += now - self.looked;
        }
        (self.looked, self.on_the_way) = (now, used < sent);
        Look {
            at: self.start.elapsed(),
            tick: self.tick,
            owed_bytes: self.owed_bytes() + full.saturating_sub(arrived),
            oldest: self.parts.iter_mut().filter_map(|part| part.owed.oldest()).min(),
            dirtied_bytes: self.dirtied_bytes,
            arrived_bytes: arrived,
            busy: self.busy,
            round_trip: self.feeds.iter().map(Feed::round_trip).max().unwrap_or_default(),
            finalize,
        }
    }

    fn owed_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.page.offset_of(part.owed.pages())).sum()
    }

    /// Since the beginning of the copying.
    pub(super) fn at(&self) -> Duration {
        self.start.elapsed()
    }

    /// Of copying while the program ran.
    pub(super) fn rounds_begun(&self) -> u32 {
        if self.parts.iter().any(|part| part.followed.is_some()) { self.rounds.round() } else { 0 }
    }

    pub(super) fn progress(&self) -> Copying {
        Copying {
            round: self.rounds.round(),
            owed_bytes: self.owed_bytes(),
            dirty_bytes_s: self.rounds.dirty_bytes_s(),
            bandwidth_bytes_s: self.rounds.bandwidth_bytes_s(),
            predicted_us: u64::try_from(self.rounds.predicted().as_micros()).unwrap_or(u64::MAX),
        }
    }

    /// What is sent next: of one region, the pages that were written longest ago, or last.
    fn batch(&mut self, oldest_first: bool) -> Option<(usize, Vec<Extent>)> {
        let ticks = self.parts.iter_mut().enumerate().filter_map(|(at, part)| {
            let tick = if oldest_first { part.owed.oldest() } else { part.owed.newest().map(|tick| Tick::MAX - tick) };
            Some((tick?, at))
        });
        let (_, at) = ticks.min()?;
        let bandwidth = self.pace.bytes_s.unwrap_or(self.rounds.bandwidth_bytes_s().max(STEP_MIN_BYTES));
        let bytes = u64::try_from(u128::from(bandwidth) * STEP.as_millis() / 1000).unwrap_or(u64::MAX);
        // After the handover, what is touched meanwhile leads elsewhere.
        let bytes = if oldest_first { bytes } else { bytes.min(STEP_MIN_BYTES) };
        let part = &mut self.parts[at];
        let least = if self.pace.bytes_s.is_some() { part.page.bytes() } else { STEP_MIN_BYTES };
        let pages = (bytes.clamp(least, STEP_MAX_BYTES) / part.page.bytes()).max(1);
        Some((at, part.owed.take(pages, oldest_first)))
    }

    /// What is near the page that the program touched last: in which region, from where on.
    fn near(&mut self, on_from: &mut Option<(usize, u64)>) -> Option<(usize, Vec<Extent>)> {
        let demanded = |(at, feed): (usize, &Feed)| feed.demanded().map(|page| (at, page));
        if let Some(demanded) = self.feeds.iter().enumerate().find_map(demanded) {
            *on_from = Some(demanded);
        }
        let (at, page) = on_from.take()?;
        let part = &mut self.parts[at];
        let pages = (STEP_MIN_BYTES / part.page.bytes()).max(1);
        let (extents, next) = part.owed.take_from(page, pages);
        if part.followed.is_none() && !extents.is_empty() {
            *on_from = Some((at, next));
        }
        (!extents.is_empty()).then_some((at, extents))
    }

    async fn send(&mut self, batch: Option<(usize, Vec<Extent>)>) -> Result<(), CopyError> {
        let Some((at, extents)) = batch else {
            tokio::time::sleep(IDLE).await;
            return Ok(());
        };
        self.on_the_way = true;
        let (before, _) = self.feeds[at].sent_and_used_bytes();
        self.send_from(at, extents).await?;
        self.pace.sent(self.feeds[at].sent_and_used_bytes().0 - before).await;
        Ok(())
    }

    async fn send_from(&mut self, at: usize, extents: Vec<Extent>) -> Result<(), CopyError> {
        let (part, feed) = (&mut self.parts[at], &mut self.feeds[at]);
        // Before it is sent: whatever becomes of this future, it is not forgotten.
        part.unacknowledged.push_back((u64::MAX, extents.clone()));
        feed.send(extents).await?;
        if let Some((sent, _)) = part.unacknowledged.back_mut() {
            *sent = feed.sent_and_used_bytes().0;
        }
        Ok(())
    }

    /// Owes what was written. Only then do the trackers forget it.
    fn owe(&mut self, taken: Vec<Option<Written>>) {
        self.tick += 1;
        for (part, written) in self.parts.iter_mut().zip(taken) {
            if let Some(written) = written {
                self.dirtied_bytes += part.page.offset_of(written.pages());
                part.owed.wrote(self.tick, written.extents());
                written.acknowledge();
            }
        }
    }

    /// Waits until what was sent has arrived, while the program runs: what it lacks is said behind that, and the pause would wait for it.
    pub(super) async fn drain(&mut self) {
        let start = Instant::now();
        let arrived = |feed: &Feed| {
            let (sent, used) = feed.sent_and_used_bytes();
            sent == used
        };
        // A destination that says nothing for so long is slow, and no wait makes it faster.
        while !self.feeds.iter().all(arrived) && start.elapsed() < DRAIN_LIMIT {
            tokio::time::sleep(DRAIN_LOOK).await;
        }
    }

    /// The program is paused: finds out what it wrote last, sends it if that is wanted, and says what the destination lacks.
    pub(super) async fn last(&mut self, copy_rest: bool) -> Result<(), CopyError> {
        if self.parts.iter().all(|part| part.followed.is_none()) {
            // It was said already: everything.
            return Ok(());
        }
        self.take_of_paused().await?;
        for at in 0..self.parts.len() {
            if copy_rest {
                let rest = self.parts[at].owed.take(u64::MAX, true);
                self.send_from(at, rest).await?;
            }
        }
        self.say_lacking().await
    }

    /// The program is paused: what it wrote last is owed.
    pub(super) async fn take_of_paused(&mut self) -> Result<(), CopyError> {
        let followed = self.followed();
        let taken = tokio::task::spawn_blocking(move || take(&followed, Program::Paused)).await.map_err(panicked)??;
        self.owe(taken);
        Ok(())
    }

    async fn say_lacking(&mut self) -> Result<(), CopyError> {
        for (part, feed) in self.parts.iter().zip(&mut self.feeds) {
            feed.lacks(&part.owed.extents()).await?;
        }
        Ok(())
    }

    /// The program has gone: sends what the destination lacks, those pages first that were written last, for the program is about to touch them. Where it touches one that has
    /// yet to come, what lies behind that goes next: a fault costs a thread a round trip, and the next is likely to be near. If nobody knows what was written last, on from there.
    pub(super) async fn push(mut self, sent: impl Fn(u64)) -> Result<(), CopyError> {
        let sent_bytes = |feeds: &[Feed]| feeds.iter().map(|feed| feed.sent_and_used_bytes().0).sum();
        sent(sent_bytes(&self.feeds));
        let mut on_from = None;
        while let Some(batch) = self.near(&mut on_from).or_else(|| self.batch(false)) {
            self.send(Some(batch)).await?;
            sent(sent_bytes(&self.feeds));
        }
        for feed in self.feeds {
            feed.end().await?;
        }
        // Letting go takes a while, and the program that has just begun elsewhere may need the processor.
        tokio::task::spawn_blocking(move || drop(self.parts)).await.map_err(panicked)
    }
}

impl Part {
    pub(super) fn bytes_of(&self, extents: &[Extent]) -> u64 {
        extents.iter().map(|extent| extent.bytes(self.page)).sum()
    }

    /// Forgets what the other end has in place.
    fn acknowledge(&mut self, feed: &Feed) {
        let (_, used) = feed.sent_and_used_bytes();
        while self.unacknowledged.front().is_some_and(|(sent, _)| *sent <= used) {
            self.unacknowledged.pop_front();
        }
    }
}

impl Pace {
    async fn sent(&mut self, bytes: u64) {
        let Some(bytes_s) = self.bytes_s else { return };
        #[allow(clippy::cast_precision_loss, reason = "a time")]
        let takes = Duration::from_secs_f64(bytes as f64 / bytes_s.max(1) as f64);
        // What was not used while nothing was sent is not caught up with.
        self.next = self.next.max(Instant::now()) + takes;
        tokio::time::sleep_until(self.next.into()).await;
    }
}

fn scale(bytes: u64, by: u64, of: u64) -> u64 {
    u64::try_from(u128::from(bytes) * u128::from(by) / u128::from(of.max(1))).unwrap_or(u64::MAX)
}

fn panicked(error: tokio::task::JoinError) -> CopyError {
    CopyError::Failed(format!("following the program's writes: {error}"))
}

async fn follow(region: &Region, alone: &Arc<Alone>) -> Result<Arc<Followed>, CopyError> {
    let (region, alone) = (region.clone(), alone.clone());
    let follow = move || region.track().map(|tracking| Arc::new(Followed { tracking, _alone: alone }));
    Ok(tokio::task::spawn_blocking(follow).await.map_err(panicked)??)
}

/// Takes what was written of each. The trackers have it back unless it is acknowledged.
fn take(followed: &[Option<Arc<Followed>>], program: Program) -> Result<Vec<Option<Written>>, RegionError> {
    let take = |followed: &Option<Arc<Followed>>| followed.as_ref().map(|followed| followed.tracking.take(program)).transpose();
    followed.iter().map(take).collect()
}

async fn take_running(followed: Vec<Option<Arc<Followed>>>, gates: (Gate, Duration)) -> Result<Vec<Option<Written>>, CopyError> {
    let must_pause = followed.iter().flatten().any(|followed| followed.tracking.kind() == TrackerKind::SoftDirty);
    if !must_pause {
        return Ok(tokio::task::spawn_blocking(move || take(&followed, Program::Running)).await.map_err(panicked)??);
    }
    let (gate, limit) = gates;
    // It runs on whatever becomes of this.
    let _runs_on = RunsOn(gate.clone());
    gate.pause(limit).await.map_err(|error| CopyError::Failed(format!("pausing the program to see what it wrote: {error}")))?;
    let taken = tokio::task::spawn_blocking(move || take(&followed, Program::Paused)).await;
    gate.resume().await;
    Ok(taken.map_err(panicked)??)
}
