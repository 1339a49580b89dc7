//! Sends a program's pages to its next host: while it runs, while it is paused, and after it has gone.
//!
//! Role: carries out what [`Rounds`] decides, at the source. Neighbours: an `attempt` holds one and tells it when the program pauses; a tracker says what was written;
//! a [`Feed`] for each region carries the pages. Invariants: S5: trackers are asked before pages are read, and what they told is owed until it was sent after that; what is said
//! to be lacking is exactly what is owed while nothing is written.

use super::{
    attempt::{RunsOn, Shared},
    gate::Gate,
    owed::{Owed, Tick},
    rounds::{Look, Rounds, Verdict},
    strategy::Strategy,
};
use crate::{
    Extent, PageSize, Program, Region, RegionError, TrackerKind, Tracking,
    net::{Feed, StreamError, wire::Copying},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};

/// See the module header.
pub(super) struct Copy {
    parts: Vec<Part>,
    tick: Tick,
    rounds: Rounds,
    dirtied_bytes: u64,
    /// Of pages that were sent, whatever they weighed on the way.
    sent_bytes: u64,
    start: Instant,
    /// For how long something was on the way, up to when.
    busy: Duration,
    looked: Instant,
    on_the_way: bool,
    gate: Gate,
    pause_limit: Duration,
    pace: Pace,
}

struct Part {
    feed: Feed,
    /// `None` if the program's writes while it runs do not matter: nothing is sent before it pauses.
    tracking: Option<Arc<Tracking>>,
    owed: Owed,
    page: PageSize,
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
pub(super) struct CopyError(pub(super) String);

impl From<StreamError> for CopyError {
    fn from(error: StreamError) -> CopyError {
        CopyError(format!("sending pages: {error}"))
    }
}

impl From<RegionError> for CopyError {
    fn from(error: RegionError) -> CopyError {
        CopyError(format!("following the program's writes: {error}"))
    }
}

/// Sent between two looks: a round trip or so of a fast link, so that trackers are asked now and then and a limit is not overrun by much.
const STEP: Duration = Duration::from_millis(50);
const STEP_MIN_BYTES: u64 = 1 << 20;
const STEP_MAX_BYTES: u64 = 32 << 20;
/// Between two looks when there is nothing to send.
const IDLE: Duration = Duration::from_millis(10);

impl Copy {
    /// Everything is owed. Unless the program moves first, its writes are followed from here on.
    pub(super) async fn begin(shared: &Shared, strategy: Strategy, feeds: Vec<Feed>) -> Result<Copy, CopyError> {
        const FIRST: Tick = 1;
        let mut parts = Vec::with_capacity(feeds.len());
        for (region, feed) in shared.regions.iter().zip(feeds) {
            let tracking = if strategy.copies_first() { Some(Arc::new(follow(region).await?)) } else { None };
            parts.push(Part { feed, tracking, owed: Owed::all(region.extent(), FIRST), page: region.page_size() });
        }
        if !strategy.copies_first() {
            // Said now, it takes nothing from the pause.
            for part in &mut parts {
                let all = part.owed.extents();
                part.feed.lacks(&all).await?;
            }
        }
        Ok(Copy {
            parts,
            tick: FIRST,
            rounds: Rounds::new(strategy, FIRST),
            dirtied_bytes: 0,
            sent_bytes: 0,
            start: Instant::now(),
            busy: Duration::ZERO,
            looked: Instant::now(),
            on_the_way: false,
            gate: shared.gate.clone(),
            pause_limit: shared.pause_limit,
            pace: Pace { bytes_s: shared.background_limit, next: Instant::now() },
        })
    }

    /// Looks once, and sends a little while it asks the trackers.
    pub(super) async fn step(&mut self, finalize: bool) -> Result<Verdict, CopyError> {
        let look = self.look(finalize);
        let verdict = self.rounds.look(&look);
        if verdict != Verdict::GoOn {
            return Ok(verdict);
        }
        let batch = self.batch(true);
        let gates = (self.gate.clone(), self.pause_limit);
        let trackings: Vec<Option<Arc<Tracking>>> = self.parts.iter().map(|part| part.tracking.clone()).collect();
        // Side by side: what is written is owed again, whether it was sent before or after that.
        let (sent, taken) = tokio::join!(self.send(batch), take_running(trackings, gates));
        sent?;
        self.owe(taken?);
        Ok(Verdict::GoOn)
    }

    fn look(&mut self, finalize: bool) -> Look {
        let counted = self.parts.iter().map(|part| part.feed.sent_and_used_bytes());
        let (sent, used) = counted.fold((0, 0), |(sent, used), more| (sent + more.0, used + more.1));
        // Pages that weigh nothing are there as soon as they are sent.
        let arrived = if sent == 0 { self.sent_bytes } else { scale(self.sent_bytes, used, sent) };
        let now = Instant::now();
        if self.on_the_way {
            self.busy += now - self.looked;
        }
        (self.looked, self.on_the_way) = (now, used < sent);
        Look {
            at: self.start.elapsed(),
            tick: self.tick,
            owed_bytes: self.owed_bytes() + self.sent_bytes.saturating_sub(arrived),
            oldest: self.parts.iter_mut().filter_map(|part| part.owed.oldest()).min(),
            dirtied_bytes: self.dirtied_bytes,
            arrived_bytes: arrived,
            busy: self.busy,
            round_trip: self.parts.iter().map(|part| part.feed.round_trip()).max().unwrap_or_default(),
            finalize,
        }
    }

    fn owed_bytes(&self) -> u64 {
        self.parts.iter().map(|part| part.page.offset_of(part.owed.pages())).sum()
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
        let part = &mut self.parts[at];
        let least = if self.pace.bytes_s.is_some() { part.page.bytes() } else { STEP_MIN_BYTES };
        let pages = (bytes.clamp(least, STEP_MAX_BYTES) / part.page.bytes()).max(1);
        Some((at, part.owed.take(pages, oldest_first)))
    }

    async fn send(&mut self, batch: Option<(usize, Vec<Extent>)>) -> Result<(), CopyError> {
        let Some((at, extents)) = batch else {
            tokio::time::sleep(IDLE).await;
            return Ok(());
        };
        let Part { feed, page, .. } = &mut self.parts[at];
        self.on_the_way = true;
        self.sent_bytes += extents.iter().map(|extent| extent.bytes(*page)).sum::<u64>();
        let (before, _) = feed.sent_and_used_bytes();
        feed.send(extents).await?;
        self.pace.sent(feed.sent_and_used_bytes().0 - before).await;
        Ok(())
    }

    fn owe(&mut self, taken: Vec<Vec<Extent>>) {
        self.tick += 1;
        for (part, extents) in self.parts.iter_mut().zip(taken) {
            let pages: u64 = extents.iter().map(|extent| extent.count()).sum();
            self.dirtied_bytes += part.page.offset_of(pages);
            part.owed.wrote(self.tick, &extents);
        }
    }

    /// The program is paused: finds out what it wrote last, sends it if that is wanted, and says what the destination lacks.
    pub(super) async fn last(&mut self, copy_rest: bool) -> Result<(), CopyError> {
        if self.parts.iter().all(|part| part.tracking.is_none()) {
            return Ok(());
        }
        let trackings: Vec<_> = self.parts.iter().map(|part| part.tracking.clone()).collect();
        let taken = tokio::task::spawn_blocking(move || take(&trackings, Program::Paused)).await.map_err(panicked)??;
        self.owe(taken);
        for part in &mut self.parts {
            if copy_rest {
                let rest = part.owed.take(u64::MAX, true);
                part.feed.send(rest).await?;
            }
            let lacking = part.owed.extents();
            part.feed.lacks(&lacking).await?;
        }
        Ok(())
    }

    /// The program has gone: sends what the destination lacks, those pages first that were written last, for the program is about to touch them.
    pub(super) async fn push(mut self) -> Result<(), CopyError> {
        let trackings: Vec<_> = self.parts.iter_mut().filter_map(|part| part.tracking.take()).collect();
        // Letting go takes a while, and nobody waits for it.
        let let_go = tokio::task::spawn_blocking(move || drop(trackings));
        while let Some(batch) = self.batch(false) {
            self.send(Some(batch)).await?;
        }
        for part in self.parts {
            part.feed.end().await?;
        }
        let_go.await.map_err(panicked)
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
    CopyError(format!("following the program's writes: {error}"))
}

async fn follow(region: &Region) -> Result<Tracking, CopyError> {
    let region = region.clone();
    Ok(tokio::task::spawn_blocking(move || region.track()).await.map_err(panicked)??)
}

/// Takes what was written of each. It is owed from then on, so the trackers need not keep it.
fn take(trackings: &[Option<Arc<Tracking>>], program: Program) -> Result<Vec<Vec<Extent>>, RegionError> {
    let take = |tracking: &Option<Arc<Tracking>>| {
        let Some(tracking) = tracking else { return Ok(Vec::new()) };
        let written = tracking.take(program)?;
        let extents = written.extents().to_vec();
        written.acknowledge();
        Ok(extents)
    };
    trackings.iter().map(take).collect()
}

async fn take_running(trackings: Vec<Option<Arc<Tracking>>>, gates: (Gate, Duration)) -> Result<Vec<Vec<Extent>>, CopyError> {
    let must_pause = trackings.iter().flatten().any(|tracking| tracking.kind() == TrackerKind::SoftDirty);
    if !must_pause {
        return Ok(tokio::task::spawn_blocking(move || take(&trackings, Program::Running)).await.map_err(panicked)??);
    }
    let (gate, limit) = gates;
    // It runs on whatever becomes of this.
    let _runs_on = RunsOn(gate.clone());
    gate.pause(limit).await.map_err(|error| CopyError(format!("pausing the program to see what it wrote: {error}")))?;
    let taken = tokio::task::spawn_blocking(move || take(&trackings, Program::Paused)).await;
    gate.resume().await;
    Ok(taken.map_err(panicked)??)
}
