//! Pages in bulk: encoded ahead of the network, and kept within what the other end can take.
//!
//! Role: hop *serve* of whatever moves many pages over one stream. Neighbours: `pull` sends what a client asked for, `feed` what a source has to say. Invariants: what is on
//! the way stays within the other end's credit; a page sent because it was demanded is left out if it has yet to be reached; while threads fault, little is queued ahead of their pages.

use super::{
    super::{
        codec::{Compress, Shrinks, encode_run, kinds_of},
        pull::CREDIT_STEP_BYTES,
        server::Shared,
        stream::{FrameReader, FrameWriter, StreamError},
        wire::{DataHead, EncodedRun, Encoding, ErrorCode, Frame, WireError},
    },
    DEMANDED_US, Demanded, Refusal, Session, split,
};
use crate::{Extent, PULL_EXTENT_BYTES, PageStore, Run};
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Acquire, Relaxed, Release},
        },
    },
    time::{Duration, Instant},
};

/// A bulk read keeps at least this much on the way, and more by what the path is seen to hold. Not by much more: what is ahead sits in this process's send buffer,
/// where quinn looks for each packet's bytes from the front, and by then out of the cache.
const PULL_AHEAD_MIN_BYTES: u64 = 2 << 20;
/// The same while threads fault: one run, and what a client may have used without saying so yet.
const PULL_AHEAD_DEMANDED_BYTES: u64 = PULL_EXTENT_BYTES + CREDIT_STEP_BYTES;

/// Pages that were sent on demand, as words of 64 bits by number: memory follows from what was sent, not from how large the store says it is.
#[derive(Default)]
pub(super) struct Sent {
    words: Mutex<HashMap<u64, u64>>,
    /// The page behind those that were sent last, and whether there are any since that was asked.
    behind_last: AtomicU64,
    any_new: AtomicBool,
}

impl Sent {
    fn words(&self) -> std::sync::MutexGuard<'_, HashMap<u64, u64>> {
        self.words.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where to go on so that what is likely to be touched next comes next; once for each time that something was sent.
    fn take_behind_last(&self) -> Option<u64> {
        self.any_new.swap(false, Acquire).then(|| self.behind_last.load(Relaxed))
    }

    pub(super) fn add(&self, extent: Extent) {
        self.behind_last.store(extent.end(), Relaxed);
        self.any_new.store(true, Release);
        let mut words = self.words();
        for page in extent.pages() {
            *words.entry(page / 64).or_default() |= 1 << (page % 64);
        }
    }

    fn holds_all(&self, extent: Extent) -> bool {
        let words = self.words();
        extent.pages().all(|page| holds(&words, page))
    }

    /// The parts of an extent that were not sent.
    fn unsent(&self, extent: Extent) -> Vec<Extent> {
        let words = self.words();
        let mut parts = Vec::new();
        let mut first = extent.first();
        for page in extent.pages() {
            if holds(&words, page) {
                parts.push(Extent::between(first, page));
                first = page + 1;
            }
        }
        parts.push(Extent::between(first, extent.end()));
        parts.retain(|part| !part.is_empty());
        parts
    }
}

fn holds(words: &HashMap<u64, u64>, page: u64) -> bool {
    words.get(&(page / 64)).is_some_and(|word| word & (1 << (page % 64)) != 0)
}

/// Sends pages of one region on a stream, as much as its other end has given credit for.
pub(super) struct Bulk {
    shared: Arc<Shared>,
    store: Arc<dyn PageStore>,
    sent: Arc<Sent>,
    credit: Credit,
    /// Of pages that were sent and weigh something.
    full_bytes: u64,
}

/// Why no more can be sent.
pub(super) enum BulkError {
    Refused(Refusal),
    Stream(StreamError),
}

impl From<StreamError> for BulkError {
    fn from(error: StreamError) -> BulkError {
        BulkError::Stream(error)
    }
}

impl From<WireError> for BulkError {
    fn from(error: WireError) -> BulkError {
        BulkError::Stream(error.into())
    }
}

impl Session {
    /// Begins to send pages of a region: what is sent on demand from now on is left out.
    pub(super) fn bulk(&self, region: u32, credit_bytes: u64, reader: FrameReader) -> Result<Bulk, Refusal> {
        let open = self.region(region)?;
        let sent = Arc::<Sent>::default();
        let at = (region as usize).saturating_sub(1);
        if let Some(open) = self.regions().get_mut(at) {
            open.sent = Some(sent.clone());
        }
        let credit = Credit::new(self.connection.clone(), reader, credit_bytes, self.demanded.clone());
        Ok(Bulk { shared: self.shared.clone(), store: open.granted.store, sent, credit, full_bytes: 0 })
    }
}

impl Bulk {
    pub(super) fn store(&self) -> &dyn PageStore {
        &*self.store
    }

    /// Bytes of content that were sent, and those of them that the other end has said to have used.
    pub(super) fn sent_and_used_bytes(&self) -> (u64, u64) {
        (self.credit.sent_bytes, self.credit.used_bytes())
    }

    /// Bytes of the pages that were sent and weigh something on the way.
    pub(super) fn full_bytes(&self) -> u64 {
        self.full_bytes
    }

    /// See [`Feed::demanded`](super::Feed::demanded).
    pub(super) fn demanded(&self) -> Option<u64> {
        self.sent.take_behind_last()
    }

    pub(super) fn round_trip(&self) -> Duration {
        self.credit.connection.min_rtt()
    }

    fn steps(&self, extents: Vec<Extent>) -> impl Iterator<Item = Extent> + Send + use<> {
        let step = (PULL_EXTENT_BYTES / self.store.page_size().bytes()).max(1);
        extents.into_iter().flat_map(move |extent| extent.chunks(step))
    }

    /// Sends extents in order. Reads ahead of the network by a few steps, on other threads where there is compressing to do.
    pub(super) async fn send(&mut self, extents: Vec<Extent>, writer: &mut FrameWriter) -> Result<(), BulkError> {
        self.send_steps(self.steps(extents).map(Step::Read), writer).await
    }

    /// Pages as they are now, to be sent later.
    pub(super) async fn read(&self, extents: Vec<Extent>) -> Result<Vec<Run>, Refusal> {
        let mut runs = Vec::new();
        for extent in self.steps(extents) {
            runs.extend(self.store.read(extent).await?);
        }
        Ok(runs)
    }

    /// The same for pages that were read before.
    pub(super) async fn send_runs(&mut self, runs: Vec<Run>, writer: &mut FrameWriter) -> Result<(), BulkError> {
        self.send_steps(runs.into_iter().map(Step::Have), writer).await
    }

    async fn send_steps(
        &mut self,
        mut steps: impl Iterator<Item = Step> + Send,
        writer: &mut FrameWriter,
    ) -> Result<(), BulkError> {
        let mut ready: VecDeque<tokio::task::JoinHandle<Result<Vec<EncodedRun>, Refusal>>> = VecDeque::new();
        loop {
            while ready.len() < ENCODE_AHEAD
                && let Some(step) = steps.next()
            {
                let (store, sent) = (self.store.clone(), self.sent.clone());
                let compress = match (self.shared.options.compress, self.credit.pace.bytes_s < COMPRESS_BELOW_BYTES_S) {
                    (false, _) => Compress::Nothing,
                    (true, false) => Compress::Little,
                    (true, true) => Compress::All,
                };
                ready.push_back(self.shared.service.spawn(async move { encode_step(&*store, &sent, step, compress).await }));
            }
            let Some(next) = ready.pop_front() else { return Ok(()) };
            let panicked = |_| BulkError::Refused(Refusal(ErrorCode::StoreFailed, "the store panicked".into()));
            let (mut together, mut bytes) = (Vec::new(), 0);
            for run in next.await.map_err(panicked)?.map_err(BulkError::Refused)? {
                let run_bytes = run.bytes().len() as u64;
                if bytes + run_bytes > TOGETHER_BYTES {
                    self.send_together(std::mem::take(&mut together), writer).await?;
                    bytes = 0;
                }
                bytes += run_bytes;
                together.push(run);
            }
            self.send_together(together, writer).await?;
        }
    }

    async fn send_together(&mut self, mut runs: Vec<EncodedRun>, writer: &mut FrameWriter) -> Result<(), BulkError> {
        // Demanded and sent while it was being encoded.
        runs.retain(|run| !self.sent.holds_all(run.extent()));
        if runs.is_empty() {
            return Ok(());
        }
        self.credit.take(runs.iter().map(|run| run.bytes().len() as u64).sum()).await?;
        let frame = |run: &EncodedRun| {
            let head = DataHead::new(run.encoding(), run.extent(), 0, run.bytes().len())?;
            Ok((head, run.bytes().clone()))
        };
        let frames = runs.iter().map(frame).collect::<Result<Vec<_>, WireError>>()?;
        writer.send_data(frames).await?;
        let page = self.store.page_size();
        let full = runs.iter().filter(|run| run.encoding() != Encoding::Zero);
        self.full_bytes += full.map(|run| run.extent().bytes(page)).sum::<u64>();
        Ok(())
    }
}

/// Steps of a bulk read that are read and encoded while an earlier one is sent.
const ENCODE_AHEAD: usize = 3;
/// Runs are given to the stream together up to this many bytes: each time takes the connection's lock and wakes its driver.
const TOGETHER_BYTES: u64 = 64 * 1024;

/// What is encoded at once.
enum Step {
    Read(Extent),
    Have(Run),
}

async fn encode_step(store: &dyn PageStore, sent: &Sent, step: Step, compress: Compress) -> Result<Vec<EncodedRun>, Refusal> {
    let mut runs = Vec::new();
    match step {
        Step::Read(extent) => {
            for part in sent.unsent(extent) {
                runs.extend(store.read(part).await?);
            }
        }
        Step::Have(run) => runs.push(run),
    }
    let page = store.page_size();
    let parts: Vec<(Shrinks, Run)> = runs.into_iter().flat_map(|run| kinds_of(run, page, compress)).collect();
    // Sorting the pages is quick, compressing is not.
    let slow = parts.iter().any(|(shrinks, _)| *shrinks == Shrinks::Well);
    let encode = move || -> Result<Vec<EncodedRun>, WireError> {
        let parts = parts.into_iter().flat_map(|(shrinks, run)| split(run, page).into_iter().map(move |run| (shrinks, run)));
        parts
            .map(|(shrinks, run)| {
                let (encoding, bytes) = encode_run(run.content, shrinks != Shrinks::No);
                EncodedRun::new(run.extent, encoding, bytes)
            })
            .collect()
    };
    let failed = |error: String| Refusal(ErrorCode::StoreFailed, error);
    let encoded =
        if slow { tokio::task::spawn_blocking(encode).await.map_err(|error| failed(error.to_string()))? } else { encode() };
    encoded.map_err(|error| failed(error.to_string()))
}

/// How much a bulk read may have on the way.
struct Credit {
    connection: quinn::Connection,
    total: tokio::sync::watch::Receiver<u64>,
    window_bytes: u64,
    sent_bytes: u64,
    pace: Pace,
    demanded: Arc<Demanded>,
}

/// How fast the client uses what is sent, by its credit.
struct Pace {
    since: Instant,
    used_bytes: u64,
    bytes_s: u64,
    /// The last look found much more than the one before.
    rises: bool,
}

impl Pace {
    fn new(now: Instant) -> Pace {
        Pace { since: now, used_bytes: 0, bytes_s: 0, rises: false }
    }

    /// Whether nothing is known yet.
    fn is_unknown(&self) -> bool {
        self.bytes_s == 0
    }

    fn look(&mut self, used_bytes: u64, round_trip: Duration, now: Instant) {
        if used_bytes == 0 {
            // The first pages are still on their way, which says nothing about how many fit on it.
            self.since = now;
        }
        // A shorter look would count bursts, a longer one would miss that the pace changed.
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= round_trip + PACE_LOOK {
            let bytes = u128::from(used_bytes.saturating_sub(self.used_bytes));
            let bytes_s = u64::try_from(bytes * 1_000_000 / elapsed.as_micros().max(1)).unwrap_or(u64::MAX);
            self.rises = bytes_s > self.bytes_s / 4 * 5;
            // Falls slowly: a pause of the client says nothing about the path, and one look differs from the next by half.
            self.bytes_s = bytes_s.max(self.bytes_s / 16 * 15);
            (self.since, self.used_bytes) = (now, used_bytes);
        }
    }

    /// What twice the path holds at this pace: enough to keep it full and to find out whether it takes more.
    fn ahead_bytes(&self, round_trip: Duration) -> u64 {
        self.path_bytes(round_trip + PACE_LOOK).saturating_mul(2)
    }

    /// What the path holds at this pace.
    fn path_bytes(&self, round_trip: Duration) -> u64 {
        u64::try_from(u128::from(self.bytes_s) * round_trip.as_micros() / 1_000_000).unwrap_or(u64::MAX)
    }

    /// The same while threads wait: twice it while the pace rises, as in BBR's start, then half as much again, because a path that is never offered more than it
    /// carried before is never found to carry more.
    fn demanded_bytes(&self, round_trip: Duration) -> u64 {
        let path = self.path_bytes(round_trip);
        if self.rises { path.saturating_mul(2) } else { path.saturating_add(path / 2) }
    }
}

/// Compressing is for paths that are slower than a core: LZ4 takes text in at about 400 MB/s and leaves 55 %, and QUIC itself sends 600 MB/s a core, so
/// where the path carries more than this the core is better spent on sending (bench `throughput`, `pull_vmlike_mb_s`).
const COMPRESS_BELOW_BYTES_S: u64 = 200_000_000;

/// Credit comes in steps, and its thread may be late by this much.
const PACE_LOOK: Duration = Duration::from_millis(1);

impl Credit {
    /// Reads CREDIT frames until the stream ends.
    fn new(connection: quinn::Connection, mut reader: FrameReader, credit_bytes: u64, demanded: Arc<Demanded>) -> Credit {
        let (granted, total) = tokio::sync::watch::channel(credit_bytes);
        tokio::spawn(async move {
            while let Ok(Some(Frame::Credit { total_bytes })) = reader.next().await {
                if granted.send(total_bytes).is_err() {
                    return;
                }
            }
        });
        Credit { connection, total, window_bytes: credit_bytes, sent_bytes: 0, pace: Pace::new(Instant::now()), demanded }
    }

    /// What the client has used up, by its own word.
    fn used_bytes(&self) -> u64 {
        self.total.borrow().saturating_sub(self.window_bytes)
    }

    /// Waits until `bytes` more may be sent.
    async fn take(&mut self, bytes: u64) -> Result<(), StreamError> {
        loop {
            let total = *self.total.borrow_and_update();
            // What the client has used up, by its own word.
            let used_bytes = total.saturating_sub(self.window_bytes);
            let round_trip = self.connection.min_rtt();
            self.pace.look(used_bytes, round_trip, Instant::now());
            // While threads wait for faults only what the path itself holds is kept on the way: priority orders what is still here, and what
            // queues behind it, in the other end's socket, is waited for.
            let limit = if self.demanded.recently() {
                PULL_AHEAD_DEMANDED_BYTES + self.pace.demanded_bytes(round_trip)
            } else {
                PULL_AHEAD_MIN_BYTES + self.pace.ahead_bytes(round_trip)
            };
            // Before the client has used anything, QUIC knows better what the path holds: by what it was used for before.
            let limit = if self.pace.is_unknown() { limit.max(self.connection.stats().path.cwnd) } else { limit };
            let limit = limit.min(self.window_bytes);
            let ahead = self.sent_bytes.saturating_sub(used_bytes);
            // A run longer than the whole credit goes alone.
            if ahead == 0 || ahead + bytes <= limit {
                self.sent_bytes += bytes;
                return Ok(());
            }
            // The limit rises by itself once no thread faults any more.
            let more = tokio::time::timeout(Duration::from_micros(DEMANDED_US), self.total.changed()).await;
            if matches!(more, Ok(Err(_))) {
                return Err(StreamError::Ended("the client left the bulk read".into()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Looks in a path that carries `path_bytes_s`, of which a bulk read beside waiting threads uses no more than it may: how many round trips until it is full, and what is on the way then.
    fn looks_until_full(path_bytes_s: u64, round_trip: Duration) -> (u32, u64) {
        let start = Instant::now();
        let (mut pace, mut now, mut used) = (Pace::new(start), start, 1);
        for look in 1..100 {
            let allowed = PULL_AHEAD_DEMANDED_BYTES + pace.demanded_bytes(round_trip);
            now += round_trip + PACE_LOOK;
            let path = u64::try_from(u128::from(path_bytes_s) * (round_trip + PACE_LOOK).as_micros() / 1_000_000).unwrap();
            used += allowed.min(path);
            pace.look(used, round_trip, now);
            if allowed >= path {
                return (look, PULL_AHEAD_DEMANDED_BYTES + pace.demanded_bytes(round_trip));
            }
        }
        panic!("it never fills the path: {} of {path_bytes_s} bytes a second", pace.bytes_s);
    }

    /// It was held to what had come in the last round trip, and so never found that the path carries more: 214 MB/s at 25 ms where 450 were to be had.
    #[test]
    fn a_pull_beside_waiting_threads_fills_a_far_path() {
        for (ms, looks_max) in [(1, 3), (5, 5), (25, 8), (50, 9)] {
            let round_trip = Duration::from_millis(ms);
            let (looks, allowed) = looks_until_full(500_000_000, round_trip);
            assert!(looks <= looks_max, "{ms} ms: {looks} round trips");
            assert!(allowed <= PULL_AHEAD_DEMANDED_BYTES + 2 * 500_000 * (ms + 1), "{ms} ms: {allowed} bytes");
        }
    }

    #[test]
    fn nothing_is_known_before_something_was_used() {
        let start = Instant::now();
        let mut pace = Pace::new(start);
        pace.look(0, Duration::from_millis(25), start + Duration::from_secs(1));
        pace.look(1 << 20, Duration::from_millis(25), start + Duration::from_millis(1010));
        assert!(pace.is_unknown());
        pace.look(2 << 20, Duration::from_millis(25), start + Duration::from_millis(1026));
        assert_eq!(pace.bytes_s, (2 << 20) * 1000 / 26);
    }
}
