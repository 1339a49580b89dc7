//! What a program holds: a range of its memory that pageferry fills and follows.
//!
//! Role: chooses the backend of a region, reads and writes it soundly, and ends it without a zero page. Neighbours: `pager` fills it; `migrate` moves it; `net`
//! serves it through [`RegionStore`]. Invariants: S1 (a drop unmaps before anything is unregistered), S8 (no `&[u8]` of live memory).

mod arrival;
mod budget;
mod buffers;
mod builder;
mod capabilities;
mod frozen;
mod serve;
mod tracking;

use crate::{
    Extent, Hops, LossPolicy, PageSize, PageStore, Pager, RegionError, RegionEvent, Stats,
    options::PullPlan,
    pager::{Core, Engine, Entry, RegionId},
    stats::Counters,
    sys::{Mapping, Trap},
};
use std::{
    mem::ManuallyDrop,
    ops::Range,
    sync::{
        Arc, Mutex, OnceLock, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};
use tokio::{sync::broadcast, task::JoinHandle};

pub(crate) use arrival::{Landing, Upstream};
pub(crate) use budget::Step;
pub use builder::RegionBuilder;
pub use capabilities::Capabilities;
pub use frozen::Frozen;
pub use serve::RegionStore;
pub use tracking::{Program, Tracking, Written};

/// A page-aligned range of this process's memory. Cheap to clone; the memory goes with the last clone.
///
/// Without a store it is plain zeroed memory. With one ([`RegionBuilder::store`]) it starts empty: the first touch of a page, from any thread and from
/// inside system calls too, waits until the page has come from the store.
///
/// Reading and writing: other threads, and the pager, change the memory at any time, so no `&[u8]` of it is ever given out (S8,
/// docs/safety.md). Safe code copies ([`read_at`](Region::read_at), [`write_at`](Region::write_at)) or shares atomics
/// ([`atomics_u64`](Region::atomics_u64)). [`as_ptr`](Region::as_ptr) is for programs that bring their own discipline.
///
/// Threads: all methods may be called from any thread. A thread that touches a missing page blocks, whatever runs on it: a worker of an asynchronous runtime
/// does no other work meanwhile. [`populate`](Region::populate) waits without blocking.
///
/// Dropping the last clone unmaps the memory. Threads that still wait for a page of it get SIGSEGV, never a page of zeros.
///
/// ```
/// use pageferry::Region;
/// let region = Region::builder().name("scores").size(1 << 20).open()?;
/// region.write_at(4096, b"hello")?;
/// let mut five = [0; 5];
/// region.read_at(4096, &mut five)?;
/// assert_eq!(&five, b"hello");
/// # Ok::<(), pageferry::RegionError>(())
/// ```
#[derive(Clone)]
pub struct Region {
    inner: Arc<Inner>,
}

/// See [`Region::downgrade`].
#[derive(Clone)]
pub(crate) struct WeakRegion {
    inner: Weak<Inner>,
}

impl WeakRegion {
    pub(crate) fn upgrade(&self) -> Option<Region> {
        self.inner.upgrade().map(|inner| Region { inner })
    }
}

struct Inner {
    name: String,
    size_bytes: u64,
    page: PageSize,
    fixed: bool,
    /// `None` only while the drop unmaps it.
    mapping: Option<Arc<Mapping>>,
    /// With a store: from the beginning, or from when its program arrived.
    paged: OnceLock<Arc<Paged>>,
    /// Of a region without a store, while its writes are followed, or it is frozen.
    followed: Mutex<Option<Arc<Paged>>>,
    /// Held while that changes.
    changing: Mutex<()>,
    /// Who is to follow them.
    follower: Option<Pager>,
    read_only: bool,
}

/// The part of a region that a pager fills, or follows.
struct Paged {
    pager: Pager,
    id: RegionId,
    counters: Arc<Counters>,
    any_lost: Arc<AtomicBool>,
    events: broadcast::Sender<RegionEvent>,
    /// Whether a discard shall say when it is done.
    tracked: AtomicBool,
    /// Whether a discard shall first have kept what it discards.
    frozen: AtomicBool,
    /// Whether the region leaves when it is neither.
    guest: bool,
}

impl std::fmt::Debug for Paged {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paged").field("pager", &self.pager).field("id", &self.id).finish_non_exhaustive()
    }
}

/// Receivers of region events that fall this far behind miss the oldest.
const EVENTS_KEPT: usize = 64;

impl Paged {
    fn join(
        name: &str,
        mapping: &Arc<Mapping>,
        pager: Pager,
        core: Core,
        store: Arc<dyn PageStore>,
        loss: LossPolicy,
        trap: Option<Trap>,
    ) -> Result<Paged, RegionError> {
        let counters = Arc::default();
        let events = broadcast::Sender::new(EVENTS_KEPT);
        let weak = Arc::downgrade(mapping);
        let entry = Entry::new(name.to_owned(), core, store, loss, Arc::clone(&counters), events.clone(), weak);
        let any_lost = entry.any_lost.clone();
        let joined = pager.engine().join(mapping.address(), entry, trap);
        let id = joined.map_err(|error| RegionError::system("registering with userfaultfd", error))?;
        let (tracked, frozen) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Paged { pager, id, counters, any_lost, events, tracked, frozen, guest: false })
    }
}

/// Counts of pages by state; they add up to `pages`.
///
/// ```
/// let region = pageferry::Region::builder().size(10 * 4096).open()?;
/// let residency = region.residency();
/// assert_eq!((residency.pages, residency.resident, residency.missing()), (10, 10, 0));
/// # Ok::<(), pageferry::RegionError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResidencySnapshot {
    /// All pages of the region.
    pub pages: u64,
    /// Pages that hold their data here. A region without a store counts all.
    pub resident: u64,
    /// Pages the program discarded and has not touched since; they read as zeros.
    pub discarded: u64,
    /// Pages given up by the loss policy.
    pub lost: u64,
}

impl ResidencySnapshot {
    /// Pages whose data has not come yet.
    #[must_use]
    pub fn missing(&self) -> u64 {
        self.pages - self.resident - self.discarded - self.lost
    }
}

impl Region {
    /// Starts to describe a region.
    #[must_use]
    pub fn builder() -> RegionBuilder {
        RegionBuilder::new()
    }

    /// The name it was given, by which peers ask for it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The size asked for, in bytes.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.inner.size_bytes
    }

    /// The unit in which it is filled.
    #[must_use]
    pub fn page_size(&self) -> PageSize {
        self.inner.page
    }

    /// All its pages.
    #[must_use]
    pub fn extent(&self) -> Extent {
        Extent::between(0, self.inner.page.pages_for(self.inner.size_bytes))
    }

    /// The address it was opened at, if one was asked for: the program keeps pointers into it.
    #[must_use]
    pub fn fixed_address(&self) -> Option<usize> {
        self.inner.fixed.then(|| self.mapping().address())
    }

    /// Start of the memory, valid for [`len`](Region::len) bytes while a clone of the region lives. See docs/safety.md for what may be done with it: in short, a
    /// slice made from it is sound only while nobody writes the range, and a touch may block or, when the peer is lost, raise
    /// SIGBUS. Parts may be unmapped or moved away (`munmap`, `mremap`) if something keeps their addresses taken until the region is dropped, such as
    /// `mmap` with `PROT_NONE`: the drop unmaps the whole range, whatever is there.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.mapping().as_ptr()
    }

    /// Bytes mapped: the size rounded up to whole pages.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "a region is never empty")]
    pub fn len(&self) -> usize {
        self.mapping().len()
    }

    /// Copies bytes out. Each aligned 8-byte word is read at once; a racing writer's words are old or new.
    ///
    /// Blocks while a page is missing.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`]; [`RegionError::Lost`] instead of a signal if pages of the range were given up before the call.
    pub fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), RegionError> {
        self.refuse_lost(offset, into.len())?;
        self.mapping().read_at(offset, into)
    }

    /// Copies bytes in, as [`read_at`](Region::read_at) copies out.
    ///
    /// # Errors
    /// As for [`read_at`](Region::read_at), and [`RegionError::ReadOnly`].
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        self.refuse_read_only()?;
        self.refuse_lost(offset, bytes.len())?;
        self.mapping().write_at(offset, bytes)
    }

    /// `count` words at `offset` (a multiple of 8) as shared atomics: the way to keep a data structure in a region in safe code.
    /// No page is touched before the words are.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], [`RegionError::Misaligned`].
    pub fn atomics_u64(&self, offset: u64, count: usize) -> Result<&[AtomicU64], RegionError> {
        self.mapping().words64(offset, count)
    }

    /// As [`atomics_u64`](Region::atomics_u64), for 32 bits.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], [`RegionError::Misaligned`].
    pub fn atomics_u32(&self, offset: u64, count: usize) -> Result<&[AtomicU32], RegionError> {
        self.mapping().words32(offset, count)
    }

    /// Brings a range of bytes in and returns when it is resident: for buffers that go to system calls where only user-mode
    /// faults are served, and to wait without blocking a thread.
    ///
    /// Cancellation: what was asked for still comes.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], [`RegionError::Lost`].
    pub async fn populate(&self, range: Range<u64>) -> Result<(), RegionError> {
        let within = self.pages_of(range)?;
        let Some(paged) = self.paged() else { return Ok(()) };
        let (engine, id) = (paged.pager.engine().clone(), paged.id);
        // On the service: the requests belong to its runtime, the waiting task may be the caller's.
        paged.pager.service().spawn(engine.populate(id, within)).await.map_err(|_| RegionError::PagerStopped)?
    }

    /// As [`populate`](Region::populate), blocking the calling thread.
    ///
    /// # Errors
    /// As for [`populate`](Region::populate), and [`RegionError::PagerStopped`] on the pager's own thread, which would wait for itself.
    pub fn populate_blocking(&self, range: Range<u64>) -> Result<(), RegionError> {
        let within = self.pages_of(range)?;
        let Some(paged) = self.paged() else { return Ok(()) };
        let (engine, id) = (paged.pager.engine().clone(), paged.id);
        paged.pager.service().run(engine.populate(id, within)).unwrap_or(Err(RegionError::PagerStopped))
    }

    /// Begins to record which pages threads wait for.
    pub(crate) fn record_touches(&self) {
        if let Some(paged) = self.paged() {
            paged.pager.engine().with_entry(paged.id, |entry| entry.touched = Some(Vec::new()));
        }
    }

    /// What was recorded, in order; a page is in it once for each thread that waited for it.
    pub(crate) fn touched(&self) -> Vec<u64> {
        let look = |paged: &Paged| paged.pager.engine().with_entry(paged.id, |entry| entry.touched.clone());
        self.paged().and_then(look).flatten().unwrap_or_default()
    }

    /// As [`populate`](Region::populate), and does not wait.
    pub(crate) fn bring(&self, range: Range<u64>) -> Result<(), RegionError> {
        let within = self.pages_of(range)?;
        if let Some(paged) = self.paged() {
            drop(paged.pager.service().spawn(paged.pager.engine().clone().populate(paged.id, within)));
        }
        Ok(())
    }

    /// Streams everything that is missing in the background; returns when nothing is. Faults overtake it.
    ///
    /// Cancellation: dropping the future leaves the pull running; dropping the region ends it.
    ///
    /// # Errors
    /// [`RegionError::Lost`] when pages were given up, [`RegionError::PagerStopped`] when the region was dropped meanwhile.
    pub async fn pull(&self) -> Result<(), RegionError> {
        self.pull_owned(PullPlan::default()).await
    }

    /// As [`pull`](Region::pull), without holding the region: dropping its last handle ends the pull.
    pub(crate) fn pull_owned(&self, plan: PullPlan) -> impl Future<Output = Result<(), RegionError>> + Send + use<> {
        let pull = self.begin_pull(plan);
        async move {
            match pull {
                None => Ok(()),
                Some(pull) => pull.await.map_err(|_| RegionError::PagerStopped)?,
            }
        }
    }

    /// The task of a pull; `None` if there is nothing to pull.
    pub(crate) fn begin_pull(&self, plan: PullPlan) -> Option<JoinHandle<Result<(), RegionError>>> {
        let paged = self.paged()?;
        let pull = Engine::pull(Arc::downgrade(paged.pager.engine()), paged.id, plan);
        Some(paged.pager.service().spawn(pull))
    }

    /// A handle that does not keep the memory.
    pub(crate) fn downgrade(&self) -> WeakRegion {
        WeakRegion { inner: Arc::downgrade(&self.inner) }
    }

    /// Gives pages back to the kernel (`MADV_DONTNEED`): they read as zeros from then on, whatever the store holds. `range` in bytes must be
    /// whole pages.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`], [`RegionError::Misaligned`], [`RegionError::ReadOnly`].
    pub fn discard(&self, range: Range<u64>) -> Result<(), RegionError> {
        self.refuse_read_only()?;
        for offset in [range.start, range.end] {
            if !offset.is_multiple_of(self.inner.page.bytes()) {
                return Err(RegionError::Misaligned { offset, align: self.inner.page.len() });
            }
        }
        let extent = self.pages_of(range)?;
        if extent.is_empty() {
            return Ok(());
        }
        let len = usize::try_from(extent.bytes(self.inner.page)).unwrap_or(usize::MAX);
        let offset = self.inner.page.offset_of(extent.first());
        let Some(joined) = self.joined() else { return self.mapping().discard(offset, len) };
        if joined.frozen.load(Ordering::Acquire) {
            if self.paged().is_some() {
                // What is lost by then is an error to whoever reads the moment.
                let _ = self.populate_blocking(offset..offset + len as u64);
            }
            joined.pager.engine().save(joined.id, self.mapping().address(), extent);
        }
        if !joined.tracked.load(Ordering::Acquire) {
            return self.mapping().discard(offset, len);
        }
        #[allow(clippy::cast_possible_truncation, reason = "inside the mapping")]
        let start = self.mapping().address() + offset as usize;
        joined.pager.engine().discarding(joined.id, start, len);
        let discarded = self.mapping().discard(offset, len);
        joined.pager.engine().was_discarded(joined.id, extent, start, len);
        discarded
    }

    /// How many pages are in which state, now.
    #[must_use]
    pub fn residency(&self) -> ResidencySnapshot {
        let pages = self.extent().count();
        let look = |paged: &Paged| {
            paged.pager.engine().with_entry(paged.id, |entry| {
                let residency = entry.residency();
                let (resident, discarded, lost) = (residency.resident_pages(), residency.discarded_pages(), residency.lost_pages());
                ResidencySnapshot { pages, resident, discarded, lost }
            })
        };
        let all = ResidencySnapshot { pages, resident: pages, discarded: 0, lost: 0 };
        self.paged().and_then(look).unwrap_or(all)
    }

    /// The extents that hold their data here, in order.
    #[must_use]
    pub fn resident_extents(&self) -> Vec<Extent> {
        let all = self.extent();
        let look = |paged: &Paged| {
            paged.pager.engine().with_entry(paged.id, |entry| entry.residency().resident(all).collect::<Vec<Extent>>())
        };
        self.paged().and_then(look).unwrap_or_else(|| vec![all])
    }

    /// What happened so far. All zero for a region without a store.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.paged().map(|paged| paged.counters.snapshot()).unwrap_or_default()
    }

    /// Latency by hop; `None` for a region without a store.
    #[must_use]
    pub fn hops(&self) -> Option<&Hops> {
        self.paged().map(|paged| &paged.counters.hops)
    }

    /// Bytes of memory that following this region's pages takes, beside the pages themselves.
    #[must_use]
    pub fn overhead_bytes(&self) -> usize {
        let look = |paged: &Paged| paged.pager.engine().with_entry(paged.id, |entry| entry.heap_bytes());
        self.joined().as_deref().and_then(look).unwrap_or(0) + size_of::<Inner>() + size_of::<Counters>()
    }

    /// News of this region from now on. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<RegionEvent> {
        self.paged().map_or_else(|| broadcast::channel(1).1, |paged| paged.events.subscribe())
    }

    fn paged(&self) -> Option<&Paged> {
        self.inner.paged.get().map(Arc::as_ref)
    }

    fn mapping(&self) -> &Arc<Mapping> {
        let Some(mapping) = &self.inner.mapping else { unreachable!("a region is unmapped only by the drop of its last handle") };
        mapping
    }

    fn pages_of(&self, range: Range<u64>) -> Result<Extent, RegionError> {
        let len = range.end.saturating_sub(range.start);
        let out = RegionError::OutOfRange { offset: range.start, len, size_bytes: self.len() as u64 };
        if range.end > self.len() as u64 || range.start > range.end {
            return Err(out);
        }
        self.inner.page.extent_of(range.start, len).ok_or(out)
    }

    fn refuse_read_only(&self) -> Result<(), RegionError> {
        if self.inner.read_only { Err(RegionError::ReadOnly { region: self.name().to_owned() }) } else { Ok(()) }
    }

    fn refuse_lost(&self, offset: u64, len: usize) -> Result<(), RegionError> {
        let Some(paged) = self.paged() else { return Ok(()) };
        if !paged.any_lost.load(Ordering::Acquire) {
            return Ok(());
        }
        let Some(extent) = self.inner.page.extent_of(offset, len as u64) else { return Ok(()) };
        let lost = paged.pager.engine().with_entry(paged.id, |entry| entry.first_lost(extent)).flatten();
        lost.map_or(Ok(()), |(extent, cause)| Err(RegionError::Lost { extent, cause }))
    }
}

impl std::fmt::Debug for Region {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Region")
            .field("name", &self.inner.name)
            .field("start", &self.as_ptr())
            .field("residency", &self.residency())
            .finish()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let followed = self.followed.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        let (mapping, Some(paged)) = (self.mapping.take(), self.paged.take().or(followed)) else { return };
        let Some((start, len)) = mapping.as_ref().map(|mapping| (mapping.address(), mapping.len())) else { return };
        let on_its_thread = paged.pager.service().is_current();
        paged.pager.engine().leave(paged.id, start, len);
        // munmap(2) of a registered range waits until the pager has read the message about it; only after it are waiters woken, so none ever
        // finds a page there (S1).
        // Not dropped but leaked where no thread can be had: unmapping on this one would be the pager waiting for itself.
        let (mapping, paged) = (ManuallyDrop::new(mapping), ManuallyDrop::new(paged));
        let unmap = move || {
            drop(ManuallyDrop::into_inner(mapping));
            let paged = ManuallyDrop::into_inner(paged);
            paged.pager.engine().left(paged.id, start, len);
        };
        // A store or callback may hold the last handle: then this is the pager's thread, which must not wait for itself (S2).
        if on_its_thread {
            if std::thread::Builder::new().name("pageferry-unmap".into()).spawn(unmap).is_err() {
                tracing::error!(start, len, "no thread to unmap a region from; the range leaks");
            }
        } else {
            unmap();
        }
    }
}
