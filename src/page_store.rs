//! Words: [`PageStore`], the one trait of everything that has pages.
//!
//! Role: pages come from and go to a store: memory, a file, a live region, a peer over QUIC. Neighbours: the pager calls
//! `read` and `pull` on its own thread; `net::server` calls them to answer a peer. Invariants: a read gives exactly the pages
//! asked for; a store never touches a region of the pager that calls it (S2).

use crate::{Extent, PageSize, StoreError, flow::Flow};
use async_trait::async_trait;
use bytes::Bytes;
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// What the pages of one extent hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// Every byte is zero; nothing was transferred.
    Zero,
    /// The bytes, exactly as long as the extent. The buffer needs no alignment.
    Bytes(Bytes),
}

/// Consecutive pages of a store with their content: the unit a store answers with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// Which pages.
    pub extent: Extent,
    /// What they hold.
    pub content: Content,
}

impl Run {
    /// Pages that hold zeros only.
    #[must_use]
    pub fn zero(extent: Extent) -> Run {
        Run { extent, content: Content::Zero }
    }

    /// Pages that hold `bytes`.
    #[must_use]
    pub fn bytes(extent: Extent, bytes: Bytes) -> Run {
        Run { extent, content: Content::Bytes(bytes) }
    }

    /// None, if it is zeros.
    pub(crate) fn content_bytes(&self) -> usize {
        match &self.content {
            Content::Zero => 0,
            Content::Bytes(bytes) => bytes.len(),
        }
    }
}

/// Where pages come from and go to.
///
/// Pages are numbered from zero. A store whose size is not a multiple of the page size ends in a partial page: bytes past its end read as
/// zeros, and bytes written past its end are ignored. Reads and writes may run concurrently; a read that overlaps a
/// write sees each page either before or after it.
///
/// Cancellation: dropping a `read` or `flush` future has no effect on the store; after dropping a `write` future the
/// extent holds old pages, new pages or a mixture of whole pages.
///
/// Threads: futures run on the private runtime of a [`Pager`](crate::Pager) or [`Server`](crate::Server). They must not touch a
/// region served by it (S2 in docs/safety.md), and must not block for long: hand blocking work to `tokio::task::spawn_blocking`.
///
/// ```
/// use pageferry::{Extent, MemoryStore, PageSize, PageStore};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), pageferry::StoreError> {
/// let store = MemoryStore::zeroed(64 * 1024, PageSize::KIB_4);
/// store.write(Extent::page(3), &[7; 4096]).await?;
/// let mut page = vec![0; 4096];
/// store.read_into(Extent::page(3), &mut page).await?;
/// assert_eq!(page, [7; 4096]);
/// # Ok(()) }
/// ```
#[async_trait]
pub trait PageStore: Send + Sync + 'static {
    /// Size in bytes. Fixed for the life of the store.
    fn size(&self) -> u64;

    /// The unit in which extents count.
    fn page_size(&self) -> PageSize;

    /// Reads an extent: runs in order, without gaps, that together cover it exactly.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`] if the extent ends past [`extent()`](PageStore::extent), else what the store met.
    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError>;

    /// Writes an extent; `bytes` is exactly as long as it.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`], [`StoreError::WrongLength`], [`StoreError::ReadOnly`], else what the store met.
    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError>;

    /// Returns when every write that returned before this call is as durable as the store can make it.
    ///
    /// # Errors
    /// What the store met; the caller must assume that unflushed writes are lost.
    async fn flush(&self) -> Result<(), StoreError>;

    /// Reads ahead: a hint that a reader wants `extent` soon, behind what is asked for with [`read`](PageStore::read).
    /// The same contract as `read`, at a lower priority where the store has any.
    ///
    /// # Errors
    /// As for [`read`](PageStore::read).
    async fn read_behind(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read(extent).await
    }

    /// Starts a bulk read of many extents, in order. The default reads [`PULL_EXTENT_BYTES`] at a time; a peer streams
    /// without a round trip an extent, and may leave out pages that it sent in answer to a `read` meanwhile.
    ///
    /// # Errors
    /// As for [`read`](PageStore::read).
    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError>;

    /// Whether an extent lies inside the store.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`].
    fn check(&self, extent: Extent) -> Result<(), StoreError> {
        let whole = self.extent();
        if whole.covers(extent) { Ok(()) } else { Err(StoreError::OutOfRange { extent, store_pages: whole.count() }) }
    }

    /// Whether `bytes` may be written to an extent.
    ///
    /// # Errors
    /// [`StoreError::OutOfRange`], [`StoreError::WrongLength`].
    fn check_write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check(extent)?;
        let (expected_bytes, got_bytes) = (extent.bytes(self.page_size()), bytes.len() as u64);
        if expected_bytes == got_bytes { Ok(()) } else { Err(StoreError::WrongLength { expected_bytes, got_bytes }) }
    }

    /// All its pages, the last perhaps partial.
    fn extent(&self) -> Extent {
        Extent::between(0, self.page_size().pages_for(self.size()))
    }

    /// Reads an extent into a buffer exactly as long.
    ///
    /// # Errors
    /// As for [`read`](PageStore::read), and [`StoreError::WrongLength`].
    async fn read_into(&self, extent: Extent, into: &mut [u8]) -> Result<(), StoreError> {
        let expected_bytes = extent.bytes(self.page_size());
        if into.len() as u64 != expected_bytes {
            return Err(StoreError::WrongLength { expected_bytes, got_bytes: into.len() as u64 });
        }
        let mut rest = into;
        for run in self.read(extent).await? {
            let len = usize::try_from(run.extent.bytes(self.page_size())).unwrap_or(usize::MAX);
            let Some((head, tail)) = std::mem::take(&mut rest).split_at_mut_checked(len) else {
                return Err(StoreError::WrongLength { expected_bytes, got_bytes: len as u64 });
            };
            match run.content {
                Content::Zero => head.fill(0),
                Content::Bytes(bytes) if bytes.len() == len => head.copy_from_slice(&bytes),
                Content::Bytes(bytes) => {
                    return Err(StoreError::WrongLength { expected_bytes: len as u64, got_bytes: bytes.len() as u64 });
                }
            }
            rest = tail;
        }
        if rest.is_empty() {
            Ok(())
        } else {
            Err(StoreError::WrongLength { expected_bytes, got_bytes: expected_bytes - rest.len() as u64 })
        }
    }
}

/// How much one step of a bulk read asks a plain store for: large enough that an install ioctl is bulk, small enough that a
/// fault waits behind it for about 0.1 ms (256 KiB at 2.6 GB/s, bench `throughput`).
pub const PULL_EXTENT_BYTES: u64 = 256 * 1024;

/// A bulk read in progress, see [`PageStore::pull`].
///
/// Dropping it ends the read.
#[async_trait]
pub trait Pull: Send {
    /// The next pages, or `None` when all that was asked for has been given or left out as already sent; `None` ever after.
    ///
    /// # Errors
    /// What the store met; the pull is over then.
    async fn next(&mut self) -> Result<Option<Run>, StoreError>;
}

/// The [`Pull`] of a store that answers one read at a time: it reads extent after extent, as many at once as the store's latency needs.
///
/// How many that is follows from how fast answers come: a store that answers at once is read step by step, one that is 25 ms away by as many bytes as twice what its path holds. Reads run as tasks of
/// the runtime that asks for the first pages.
///
/// ```
/// # use pageferry::{Extent, MemoryStore, PageSize, PageStore, Pull};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), pageferry::StoreError> {
/// let store = MemoryStore::zeroed(64 * 1024, PageSize::KIB_4);
/// let mut pull = store.pull(vec![store.extent()]).await?;
/// let mut pages = 0;
/// while let Some(run) = pull.next().await? { pages += run.extent.count(); }
/// assert_eq!(pages, 16);
/// # Ok(()) }
/// ```
pub struct ReadAfterRead<S> {
    store: S,
    left: VecDeque<Extent>,
    /// In the order asked for.
    reading: VecDeque<Reading>,
    reading_bytes: u64,
    ready: VecDeque<Run>,
    flow: Flow,
}

/// Memory for answers that came before they are wanted.
const READING_MAX_BYTES: u64 = 64 << 20;

/// Ends with the pull.
struct Reading {
    bytes: u64,
    task: JoinHandle<(Result<Vec<Run>, StoreError>, Duration, Instant)>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<S: PageStore + Clone> ReadAfterRead<S> {
    /// A pull that reads `extents` from `store` in steps of [`PULL_EXTENT_BYTES`].
    pub fn new(store: S, extents: Vec<Extent>) -> ReadAfterRead<S> {
        let flow = Flow::new(PULL_EXTENT_BYTES, READING_MAX_BYTES, Instant::now());
        let (reading, ready) = (VecDeque::new(), VecDeque::new());
        ReadAfterRead { store, left: extents.into(), reading, reading_bytes: 0, ready, flow }
    }

    /// Asks for as much more as may be on the way.
    fn ask(&mut self) {
        let page = self.store.page_size();
        let step = (PULL_EXTENT_BYTES / page.bytes()).max(1);
        while let Some(extent) = self.left.front().copied() {
            let now = Extent::between(extent.first(), extent.end().min(extent.first().saturating_add(step)));
            let bytes = now.bytes(page);
            if !self.flow.allows(self.reading_bytes, bytes) {
                return;
            }
            self.left.pop_front();
            let later = Extent::between(now.end(), extent.end());
            if !later.is_empty() {
                self.left.push_front(later);
            }
            if now.is_empty() {
                continue;
            }
            let (store, asked) = (self.store.clone(), Instant::now());
            let read = async move {
                let answer = store.read(now).await;
                (answer, asked.elapsed(), Instant::now())
            };
            self.reading_bytes += bytes;
            self.reading.push_back(Reading { bytes, task: tokio::spawn(read) });
        }
    }
}

#[async_trait]
impl<S: PageStore + Clone> Pull for ReadAfterRead<S> {
    async fn next(&mut self) -> Result<Option<Run>, StoreError> {
        loop {
            if let Some(run) = self.ready.pop_front() {
                return Ok(Some(run));
            }
            self.ask();
            let Some(reading) = self.reading.front_mut() else { return Ok(None) };
            // Taken out once it is answered: a dropped `next` goes on where it stopped.
            let answered = (&mut reading.task).await;
            let bytes = reading.bytes;
            self.reading_bytes -= bytes;
            self.reading.pop_front();
            let outcome = answered.map_err(|_| StoreError::Protocol("the store panicked in a read".into()));
            let outcome = outcome.and_then(|(runs, latency, at)| {
                self.flow.answered(bytes, latency, at);
                runs
            });
            match outcome {
                Ok(runs) => self.ready.extend(runs),
                Err(error) => {
                    (self.left, self.reading) = Default::default();
                    self.reading_bytes = 0;
                    return Err(error);
                }
            }
        }
    }
}

impl<S> std::fmt::Debug for ReadAfterRead<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ReadAfterRead({} extents left)", self.left.len())
    }
}
