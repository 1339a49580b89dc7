//! [`CacheStore`]: a file on this host in front of a store that may go away.
//!
//! Role: reads come from the file where it has the page, writes go to it and are pushed later. Neighbours: `shared` takes the steps that
//! block, `fetches` asks the remote store once for what many want, `push` brings it what was written. Invariants: what a flush
//! acknowledged outlives the process and the power; what is not known to be durable in the remote store is kept here (S5, S9).

mod disk;
mod fetches;
mod journal;
mod push;
mod shared;
mod spans;

use super::{FileStore, Layout, blocking::run_blocking, pull_by_reading};
use crate::{Extent, PageSize, PageStore, Pull, Run, StoreError};
use async_trait::async_trait;
use bytes::Bytes;
use fetches::{Fetches, Part, cut};
use push::Pusher;
use shared::{Found, Shared, State};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

/// How long what was flushed may wait for its push to begin, if nothing else is said: as a mount's push.
const PUSH_EVERY: Duration = Duration::from_secs(1);
/// What twice bandwidth times latency of 1 GB/s and 4 ms is.
const PUSH_BYTES: u64 = 8 << 20;

/// When a flush of a [`CacheStore`] returns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheDurability {
    /// When what was written is durable in the cache's file; the push to the remote store begins then.
    #[default]
    Local,
    /// When the remote store has it and has flushed it too. Fails while that store is away; what was written is kept.
    Remote,
}

/// What a [`CacheStore`] holds, at one moment.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CacheStatus {
    /// Pages that are read without the remote store, the dirty ones included.
    pub cached_pages: u64,
    /// Pages that were written and are not known to be durable in the remote store.
    pub dirty_pages: u64,
    /// The same in bytes.
    pub dirty_bytes: u64,
    /// Why the last push failed; `None` once one has succeeded.
    pub push_error: Option<StoreError>,
    /// Why something that was read could not be kept, last; such as a full disk. Only reads are slower for it.
    pub keep_error: Option<StoreError>,
}

/// How a [`CacheStore`] is opened, see [`CacheStore::builder`].
#[derive(Clone)]
#[must_use = "nothing happens before `open`"]
pub struct CacheBuilder {
    remote: Arc<dyn PageStore>,
    path: PathBuf,
    identity: Vec<u8>,
    durability: CacheDurability,
    push_every: Option<Duration>,
    push_bytes: u64,
}

/// A local file in front of any store: a cache that survives restarts and outages.
///
/// What was read once is read from the file from then on, also while the remote store is away. What is written goes to the file and is
/// pushed in the background. The file, sparse and as large as the remote store, stands at the path that was given; a journal beside it,
/// with `.journal` at the end of its name, says which of its pages count. Both belong to one `CacheStore` at a time, and the
/// remote store must not be written by anybody else: what is cached is not asked for again.
///
/// After a crash every page is as the last [`flush`](PageStore::flush) left it or as it was written since. What a flush with
/// [`CacheDurability::Local`] acknowledged is not in the remote store before a [`push`](CacheStore::push).
///
/// A write that does not fit on the disk fails, and what was written before is kept; a read that cannot be kept is answered all the same.
///
/// Cancellation: a dropped `write` leaves old or new pages; a push goes on. Threads: any; work
/// that blocks runs on the blocking threads of the runtime that polls, and pushes on a thread of the cache's own. Dropping the last handle ends that thread, without
/// another push, and waits for its last system call.
///
/// ```
/// use pageferry::{CacheStore, Extent, MemoryStore, PageSize, PageStore};
/// # use std::sync::Arc;
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let path = dir.path().join("world.cache");
/// let remote = MemoryStore::zeroed(64 * 1024, PageSize::KIB_4);               // or a peer's
/// let cache = CacheStore::open(Arc::new(remote.clone()), &path)?;
/// cache.write(Extent::page(2), &[7; 4096]).await?;
/// cache.flush().await?;                                                       // durable on this host, whatever the remote does
/// cache.push().await?;                                                        // and there
/// assert_eq!(cache.status().dirty_pages, 0);
/// let mut page = [0; 4096];
/// remote.read_into(Extent::page(2), &mut page).await?;
/// assert_eq!(page, [7; 4096]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct CacheStore {
    inner: Arc<Inner>,
    /// Ends with the last handle; the thread itself holds `inner` only.
    pusher: Arc<Pusher>,
}

struct Inner {
    shared: Arc<Shared>,
    remote: Arc<dyn PageStore>,
    fetches: Arc<Fetches>,
    path: PathBuf,
    durability: CacheDurability,
    push_bytes: u64,
    push_error: Mutex<Option<StoreError>>,
}

impl CacheStore {
    /// Opens the cache of `remote` at `path`, or makes it, with what [`builder`](CacheStore::builder) has by default.
    ///
    /// # Errors
    /// As for [`CacheBuilder::open`].
    pub fn open(remote: Arc<dyn PageStore>, path: impl AsRef<Path>) -> Result<CacheStore, StoreError> {
        CacheStore::builder(remote, path).open()
    }

    /// How to open the cache of `remote` at `path`.
    ///
    /// ```
    /// # use pageferry::{CacheDurability, CacheStore, MemoryStore, PageSize};
    /// # use std::{sync::Arc, time::Duration};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let dir = tempfile::tempdir()?;
    /// # let remote = Arc::new(MemoryStore::zeroed(64 * 1024, PageSize::KIB_4));
    /// let cache = CacheStore::builder(remote, dir.path().join("world.cache"))
    ///     .identity("world of host 7")
    ///     .durable(CacheDurability::Remote)
    ///     .push_every(Some(Duration::from_millis(200)))
    ///     .open()?;
    /// assert_eq!(cache.status().cached_pages, 0);
    /// # Ok(()) }
    /// ```
    pub fn builder(remote: Arc<dyn PageStore>, path: impl AsRef<Path>) -> CacheBuilder {
        let (path, identity) = (path.as_ref().to_owned(), Vec::new());
        let durability = CacheDurability::default();
        CacheBuilder { remote, path, identity, durability, push_every: Some(PUSH_EVERY), push_bytes: PUSH_BYTES }
    }

    /// Brings everything that was written before this call to the remote store, and returns when that store has flushed it.
    ///
    /// Pages that are written meanwhile stay dirty. Pushes take turns.
    ///
    /// Cancellation: the push goes on.
    ///
    /// # Errors
    /// What the remote store or the cache's file met; what was written is kept, and the next push begins with it.
    pub async fn push(&self) -> Result<(), StoreError> {
        self.pusher.push().await
    }

    /// What it holds now. Takes as long as it has runs of pages, microseconds for some thousand.
    #[must_use]
    pub fn status(&self) -> CacheStatus {
        let (cached_pages, dirty_pages) = {
            let pages = self.inner.shared.pages();
            (pages.pages(|_| true), pages.pages(State::is_dirty))
        };
        let dirty_bytes = self.page_size().offset_of(dirty_pages);
        let push_error = self.inner.push_error.lock().unwrap_or_else(PoisonError::into_inner).clone();
        CacheStatus { cached_pages, dirty_pages, dirty_bytes, push_error, keep_error: self.inner.fetches.keep_error() }
    }

    async fn read_as(&self, extent: Extent, behind: bool) -> Result<Vec<Run>, StoreError> {
        self.inner.shared.layout.check(extent)?;
        // To be looked at, the next one last.
        let (mut left, mut runs) = (vec![extent], Vec::new());
        while let Some(next) = left.pop() {
            let shared = self.inner.shared.clone();
            let found = run_blocking("read", next, move |_| shared.look(next)).await?;
            // What is missing is asked for at once, and awaited in order.
            let mut parts = Vec::new();
            for found in found {
                match found {
                    Found::Here(run) => parts.push(Part::Here(run)),
                    Found::Missing(missing) => {
                        parts.extend(self.inner.fetches.ask(&self.inner.shared, &self.inner.remote, missing, behind));
                    }
                }
            }
            for part in parts {
                let again = match part {
                    Part::Here(run) => {
                        runs.push(run);
                        continue;
                    }
                    Part::Coming(extent, mut coming) => match coming.wait_for(Option::is_some).await.map(|answer| answer.clone()) {
                        Ok(answer) => {
                            runs.extend(cut(&answer.unwrap_or(Err(StoreError::Closed))?, extent, self.page_size()));
                            continue;
                        }
                        // Its runtime ended under it.
                        Err(_) => extent,
                    },
                    Part::Again(extent) => extent,
                };
                // From here to the end: runs come in order.
                left.push(Extent::between(again.first(), next.end()));
                break;
            }
        }
        Ok(runs)
    }
}

impl CacheBuilder {
    /// Names the remote store, in at most 1024 bytes. A cache that was made with one name is not opened with another.
    pub fn identity(mut self, identity: impl AsRef<[u8]>) -> CacheBuilder {
        self.identity = identity.as_ref().to_vec();
        self
    }

    /// When a flush returns: [`CacheDurability::Local`] by default.
    pub fn durable(mut self, durability: CacheDurability) -> CacheBuilder {
        self.durability = durability;
        self
    }

    /// How often what was written is pushed by a thread of the cache: every second by default, and after each flush. After a failure
    /// it waits longer each time, up to 30 s. `None`: only [`CacheStore::push`] does, and a flush that is durable remotely.
    pub fn push_every(mut self, interval: Option<Duration>) -> CacheBuilder {
        self.push_every = interval;
        self
    }

    /// How many bytes of a push may be on the way at once: 8 MiB by default; one write of up to 1 MiB always may.
    pub fn push_bytes(mut self, bytes: u64) -> CacheBuilder {
        self.push_bytes = bytes;
        self
    }

    /// Opens the cache. Blocks for some system calls.
    ///
    /// # Errors
    /// [`StoreError::Io`] with the path: it is open already, belongs to a store of another size, page size or identity, or is damaged; the
    /// text says what to do. Else what the system refused.
    pub fn open(self) -> Result<CacheStore, StoreError> {
        let layout = Layout { size_bytes: self.remote.size(), page_size: self.remote.page_size() };
        let (journal, marks, lock) = disk::open(&self.path, layout, &self.identity)?;
        let data = FileStore::open(&self.path, layout.page_size)?;
        let shared = Arc::new(Shared::new(layout, data, journal, &marks, lock));
        let inner = Arc::new(Inner {
            shared,
            remote: self.remote,
            fetches: Arc::default(),
            path: self.path,
            durability: self.durability,
            push_bytes: self.push_bytes,
            push_error: Mutex::default(),
        });
        let pusher = Arc::new(Pusher::start(&inner, self.push_every)?);
        Ok(CacheStore { inner, pusher })
    }
}

#[async_trait]
impl PageStore for CacheStore {
    fn size(&self) -> u64 {
        self.inner.shared.layout.size_bytes
    }

    fn page_size(&self) -> PageSize {
        self.inner.shared.layout.page_size
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read_as(extent, false).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.shared.layout.check_write(extent, bytes)?;
        let (shared, fetches, bytes) = (self.inner.shared.clone(), self.inner.fetches.clone(), Bytes::copy_from_slice(bytes));
        run_blocking("write", extent, move |abandoned| {
            shared.write(extent, &bytes, || abandoned.load(Ordering::Acquire), |piece| fetches.retire(piece))
        })
        .await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        match self.inner.durability {
            CacheDurability::Local => {
                let shared = self.inner.shared.clone();
                run_blocking("flush", self.extent(), move |_| shared.settle()).await?;
                self.pusher.wake();
                Ok(())
            }
            CacheDurability::Remote => self.push().await,
        }
    }

    async fn read_behind(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.read_as(extent, true).await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        pull_by_reading(self, extents)
    }
}

impl fmt::Debug for CacheStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let status = self.status();
        let (cached, dirty) = (status.cached_pages, status.dirty_pages);
        write!(f, "CacheStore({}, {} bytes, {cached} pages cached, {dirty} dirty)", self.inner.path.display(), self.size())
    }
}

impl fmt::Debug for CacheBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CacheBuilder({}, {:?}, pushed every {:?})", self.path.display(), self.durability, self.push_every)
    }
}
