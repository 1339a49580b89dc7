//! Writes what the program wrote to the store.
//!
//! Role: the push of a mount. Neighbours: a [`Tracking`] says what was written; the store takes it; `Flow` says how much at once. Invariants: S5: pages are taken before they are read, and
//! acknowledged when the store has said that they are durable; one push at a time, so that an older read of a page never lands over a newer one.

use super::{MountError, MountEvent, Pushed};
use crate::{
    Content, Extent, PULL_EXTENT_BYTES, PageStore, Pager, Program, Region, RegionStore, Service, StoreError, Tracking, flow::Flow,
};
use bytes::Bytes;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Mutex, Notify, broadcast, watch},
    task::JoinSet,
};

/// See the module header.
pub(super) struct Pusher {
    tracking: Arc<Tracking>,
    reader: RegionStore,
    store: Arc<dyn PageStore>,
    pager: Pager,
    keep_trying: Duration,
    /// Of pushes in the background.
    bytes_s: Option<u64>,
    hooks: Hooks,
    events: broadcast::Sender<MountEvent>,
    /// Flushes that wait or run: nothing is held back for a while.
    flushes: AtomicUsize,
    hurry: Notify,
    /// Held by the one push.
    turn: Mutex<Flow>,
}

/// What the program wants to know of pushes.
#[derive(Clone, Default)]
pub(super) struct Hooks {
    pub(super) before: Option<Arc<dyn Fn() + Send + Sync>>,
    pub(super) after: Option<Arc<After>>,
}

/// Told of what came of a push.
type After = dyn Fn(&Result<Pushed, MountError>) + Send + Sync;

/// Memory for copies that are on their way.
const ON_THE_WAY_MAX_BYTES: u64 = 64 << 20;
/// Until answers say how much the path holds: eight writes, which a path of 4 Gbit/s and 25 ms grows to in three round trips.
const BEGINS_WITH_BYTES: u64 = 8 * PULL_EXTENT_BYTES;
/// Between attempts, growing.
const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// Between pushes that fail.
const FAILED_WAIT_MAX: Duration = Duration::from_secs(30);

struct Failure {
    extent: Extent,
    attempts: u32,
    cause: StoreError,
}

impl Pusher {
    pub(super) fn new(
        tracking: Tracking,
        store: Arc<dyn PageStore>,
        pager: Pager,
        (keep_trying, bytes_s): (Duration, Option<u64>),
        hooks: Hooks,
        events: broadcast::Sender<MountEvent>,
    ) -> Pusher {
        let reader = RegionStore::new(tracking.region());
        let turn = Mutex::new(Flow::new(BEGINS_WITH_BYTES, ON_THE_WAY_MAX_BYTES, Instant::now()));
        Pusher {
            tracking: Arc::new(tracking),
            reader,
            store,
            pager,
            keep_trying,
            bytes_s,
            hooks,
            events,
            flushes: AtomicUsize::new(0),
            hurry: Notify::new(),
            turn,
        }
    }

    pub(super) fn service(&self) -> &Service {
        self.pager.service()
    }

    pub(super) fn region(&self) -> &Region {
        self.tracking.region()
    }

    /// Pushes after each `interval`, until told to stop.
    pub(super) async fn every(self: Arc<Self>, interval: Duration, mut stopped: watch::Receiver<()>) {
        let mut wait = interval;
        loop {
            let over = tokio::time::timeout(wait, stopped.changed()).await;
            if over.is_ok() {
                return;
            }
            let pushed = self.push_at(self.bytes_s).await;
            wait = if pushed.is_ok() { interval } else { (wait * 2).clamp(interval, FAILED_WAIT_MAX.max(interval)) };
        }
    }

    /// Makes durable what was written before.
    pub(super) async fn push(&self) -> Result<Pushed, MountError> {
        /// However this future ends.
        struct Waits<'a>(&'a AtomicUsize);
        impl Drop for Waits<'_> {
            fn drop(&mut self) {
                self.0.fetch_sub(1, SeqCst);
            }
        }
        self.flushes.fetch_add(1, SeqCst);
        let _waits = Waits(&self.flushes);
        self.hurry.notify_waiters();
        self.push_at(None).await
    }

    /// Waits until `due`, unless somebody flushes.
    async fn hold_back(&self, due: Instant) {
        let mut hurried = std::pin::pin!(self.hurry.notified());
        hurried.as_mut().enable();
        if self.flushes.load(SeqCst) == 0 {
            tokio::select! {
                () = hurried => {}
                () = tokio::time::sleep_until(due.into()) => {}
            }
        }
    }

    async fn push_at(&self, bytes_s: Option<u64>) -> Result<Pushed, MountError> {
        let mut flow = self.turn.lock().await;
        if let Some(before) = self.hooks.before.clone() {
            // What it panics with is its own; what it did not write is not pushed.
            let _ = tokio::task::spawn_blocking(move || before()).await;
        }
        let pushed = self.push_taken(&mut flow, bytes_s).await;
        if !matches!(pushed, Ok(Pushed { pages: 0, .. })) {
            let event = pushed.clone().map_or_else(MountEvent::PushFailed, MountEvent::Pushed);
            let _ = self.events.send(event);
        }
        if let Some(after) = self.hooks.after.clone() {
            let pushed = pushed.clone();
            let _ = tokio::task::spawn_blocking(move || after(&pushed)).await;
        }
        pushed
    }

    async fn push_taken(&self, flow: &mut Flow, bytes_s: Option<u64>) -> Result<Pushed, MountError> {
        let (start, tracking) = (Instant::now(), self.tracking.clone());
        let taken = tokio::task::spawn_blocking(move || tracking.take(Program::Running)).await;
        let written = taken.map_err(|_| MountError::Closed)??;
        let (extents, failures) = self.write(written.extents(), flow, bytes_s).await;
        let pages = written.pages();
        let failed: u64 = failures.iter().map(|failure| failure.extent.count()).sum();
        if let Some(Failure { extent, attempts, cause }) = failures.into_iter().min_by_key(|failure| failure.extent.first()) {
            return Err(MountError::Push { extent, attempts, more_pages: failed - extent.count(), cause });
        }
        if pages > 0 {
            self.store.flush().await.map_err(|cause| MountError::Flush { pages, cause })?;
        }
        // Only now: until it is durable a page counts as written.
        written.acknowledge();
        Ok(Pushed { pages, extents, took: start.elapsed() })
    }

    /// Writes pages as they are now. How many writes that took, and which failed.
    async fn write(&self, extents: &[Extent], flow: &mut Flow, bytes_s: Option<u64>) -> (u64, Vec<Failure>) {
        let page = self.store.page_size();
        let step = (PULL_EXTENT_BYTES / page.bytes()).max(1);
        let (mut writes, mut failures) = (JoinSet::new(), Vec::new());
        let (mut on_the_way, mut count, start, mut sent) = (0, 0, Instant::now(), 0u64);
        for extent in extents.iter().flat_map(|extent| extent.chunks(step)) {
            let bytes = extent.bytes(page);
            while !flow.allows(on_the_way, bytes) {
                on_the_way -= ended(writes.join_next().await, flow, &mut failures);
            }
            if let Some(bytes_s) = bytes_s {
                let due_us = u128::from(sent) * 1_000_000 / u128::from(bytes_s.max(1));
                self.hold_back(start + Duration::from_micros(u64::try_from(due_us).unwrap_or(u64::MAX))).await;
            }
            (on_the_way, count, sent) = (on_the_way + bytes, count + 1, sent + bytes);
            let write = write_one(self.reader.clone(), self.store.clone(), extent, self.keep_trying);
            writes.spawn(async move { (bytes, write.await) });
        }
        while let Some(write) = writes.join_next().await {
            ended(Some(write), flow, &mut failures);
        }
        (count, failures)
    }
}

type Ended = (u64, Result<Duration, Failure>);

/// How many bytes are not on the way any more.
fn ended(write: Option<Result<Ended, tokio::task::JoinError>>, flow: &mut Flow, failures: &mut Vec<Failure>) -> u64 {
    match write {
        Some(Ok((bytes, Ok(latency)))) => {
            flow.answered(bytes, latency, Instant::now());
            bytes
        }
        Some(Ok((bytes, Err(failure)))) => {
            failures.push(failure);
            bytes
        }
        // A store that panics; which pages it had is not known here.
        Some(Err(_)) | None => {
            failures.push(Failure { extent: Extent::page(0), attempts: 1, cause: StoreError::Closed });
            0
        }
    }
}

/// Reads pages and writes them, again while the store is away. How long the write took that succeeded.
async fn write_one(
    reader: RegionStore,
    store: Arc<dyn PageStore>,
    extent: Extent,
    keep_trying: Duration,
) -> Result<Duration, Failure> {
    let (start, mut attempts) = (Instant::now(), 0);
    loop {
        attempts += 1;
        let cause = match read(&reader, extent).await {
            Ok(bytes) => {
                let asked = Instant::now();
                match store.write(extent, &bytes).await {
                    Ok(()) => return Ok(asked.elapsed()),
                    Err(error) => error,
                }
            }
            Err(error) => error,
        };
        let wait = (FIRST_WAIT * (1 << (attempts - 1).min(8))).min(LONGEST_WAIT);
        // Any number will do to spread them.
        let wait = wait * (75 + u32::try_from(extent.first() % 50).unwrap_or(0)) / 100;
        if !cause.is_transient() || start.elapsed() + wait > keep_trying {
            return Err(Failure { extent, attempts, cause });
        }
        tokio::time::sleep(wait).await;
    }
}

async fn read(reader: &RegionStore, extent: Extent) -> Result<Bytes, StoreError> {
    let mut runs = reader.read(extent).await?;
    match runs.pop() {
        Some(crate::Run { content: Content::Bytes(bytes), .. }) if runs.is_empty() => Ok(bytes),
        _ => Err(StoreError::Protocol("a region gave no bytes".into())),
    }
}

impl std::fmt::Debug for Pusher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pusher").field("region", self.region()).finish_non_exhaustive()
    }
}
