//! What a region held at one moment, while its program goes on.
//!
//! Role: the handle of a frozen region, and its content as a store. Neighbours: `pager` copies pages aside before they are written; `migrate::snapshot` copies them to a store, servers give them
//! to peers. Invariants: a reader reads the region as it is, and then asks what was written meanwhile; S2 and S8 as in `serve`; whoever waits to write goes on when it is dropped.

use super::{Paged, Program, Region, Tracking, buffers::Buffers, serve::store_error};
use crate::{
    Extent, PageSize, PageStore, Pager, Pull, ReadAfterRead, RegionError, Run, StoreError, TrackerKind,
    pager::{Gone, Kept, Look},
    sys::Trap,
};
use async_trait::async_trait;
use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// What a region held at the moment when it was [frozen](Region::freeze), for as long as a clone of this lives; the program goes on meanwhile. A read-only [`PageStore`]: copy it to
/// another store, or grant it to any number of peers, each of which gets a copy of the program as it was at one instant.
///
/// The first write of each page waits until the pager has copied the page aside: about 11 us where the pager's thread runs, 45 us where a processor must be woken for it (bench
/// `dirty`, `frozen_first_write_us`), and a thread more where a store fills the region. What was copied is held until it is [released](Frozen::release), or until the last clone is dropped: at most the region's
/// size, [`saved_bytes`](Frozen::saved_bytes) says how much. Pages of zeros cost nothing.
///
/// A page that the program discards by [`Region::discard`] is copied first. One that it takes away by madvise(2), munmap(2) or mremap(2) itself is gone, because the kernel tells of that
/// when it cannot be held up any more: reading it is [`StoreError::Gone`], never a page of zeros. Not seen is what a device writes to memory that is pinned for it, and guard pages
/// (`MADV_GUARD_INSTALL`, Linux 6.13), of which the kernel tells nothing: put none on a frozen region.
///
/// Reads come from the region where a page was not written: of memory that no store fills on the thread that asks, elsewhere from a thread that may block. A page that is missing still is
/// brought in, as if the program had touched it. Cancellation: dropping a read has no effect.
///
/// ```
/// use pageferry::{Extent, PageStore, Program, Region, StoreError};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # if pageferry::Capabilities::probe().write_protect() {
/// let region = Region::builder().name("scores").size(1 << 20).open()?;
/// region.write_at(4096, b"before")?;
/// let frozen = region.freeze(Program::Paused)?;       // nothing writes just now; from here on everything may
/// region.write_at(4096, b"after!")?;
/// let mut page = [0; 4096];
/// frozen.read_into(Extent::page(1), &mut page).await?;
/// assert_eq!(&page[..6], b"before");
/// assert_eq!(frozen.saved_bytes(), 4096);             // held until it is released
/// frozen.release(Extent::page(1));
/// assert_eq!(frozen.saved_bytes(), 0);
/// assert!(matches!(frozen.read(Extent::page(1)).await, Err(StoreError::Gone { .. })));
/// # }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Frozen {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    region: Region,
    joined: Arc<Paged>,
    armed_in: Duration,
    buffers: Arc<Buffers>,
}

/// Why a read did not come to its end.
enum Failed {
    /// The program was changing its mappings.
    Again,
    Read(RegionError),
    Store(StoreError),
}

/// For how long a read is tried again while the program changes its mappings without a pause.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
const PACE: Duration = Duration::from_micros(200);
const LOST: &str =
    "the program took the memory away by itself while it was frozen; discard with `Region::discard`, which copies it first";
const RELEASED: &str = "it was released";

impl Region {
    /// Keeps what the region holds now, while its program goes on as soon as this returns. `program` says that nothing writes the region from before the call until it returns:
    /// protecting page after page would keep the state of no moment otherwise, so [`Program::Running`] is refused.
    ///
    /// Takes about 37 ms a GiB of memory (bench `dirty`, `frozen_arm_ms`), whether it holds anything or not; where the writes are followed already, by
    /// [`TrackerKind::WpSync`], 3 ms if 1 % was written since it was taken last, because only that has to be protected. A [`Snapshot`](crate::Snapshot) does that by itself. A region that no store fills, and whose writes nobody follows, is with a pager
    /// of its own kind meanwhile (one thread, `pageferry-pager`, from its first use on); [`Region::track`] then works by [`TrackerKind::WpSync`]. Every other
    /// region needs a pager of that kind from the beginning ([`PagerOptions::tracker`](crate::PagerOptions::tracker)); it may be followed at the same time, and need not be filled yet.
    ///
    /// With user-mode faults only ([`Capabilities::faults_in_system_calls`](crate::Capabilities::faults_in_system_calls)), a system call that writes a page which was not written since
    /// fails with EFAULT. Forked children are not kept.
    ///
    /// # Errors
    /// [`RegionError::CannotFreeze`] with the remedy, [`RegionError::AlreadyFrozen`], [`RegionError::NoUserfaultfd`], [`RegionError::System`]. Nothing is frozen then.
    pub fn freeze(&self, program: Program) -> Result<Frozen, RegionError> {
        if program == Program::Running {
            return Err(RegionError::CannotFreeze {
                reason: "pages that are protected one after the other, while the program writes, are of no single moment".into(),
                remedy: "pause it until `freeze` returns, for instance by its `Gate`, and say `Program::Paused`".into(),
            });
        }
        let _changing = self.changing();
        let start = Instant::now();
        let joined = self.join_to_freeze()?;
        // Before anybody can rely on it. It stays if somebody else's moment is kept.
        let was_frozen = joined.frozen.swap(true, Ordering::AcqRel);
        if let Err(error) = joined.pager.engine().freeze(joined.id, self.mapping().address(), self.paged().is_some()) {
            joined.frozen.store(was_frozen, Ordering::Release);
            self.part_if_idle(&joined);
            return Err(error);
        }
        let armed_in = start.elapsed();
        tracing::debug!(region = self.name(), ?armed_in, "frozen");
        Ok(Frozen { inner: Arc::new(Inner { region: self.clone(), joined, armed_in, buffers: Arc::default() }) })
    }

    /// Protects it while the program runs still, so that [`freeze`](Region::freeze) has to protect only what is written until then. `None` where somebody follows it already, or it cannot be
    /// prepared.
    pub(crate) fn prepare_to_freeze(&self) -> Result<Option<Tracking>, RegionError> {
        let _changing = self.changing();
        let joined = self.join_to_freeze()?;
        let can = joined.pager.engine().tracker_kind().is_ok_and(|kind| kind == TrackerKind::WpSync);
        if !can || joined.tracked.load(Ordering::Acquire) {
            return Ok(None);
        }
        match self.track_by(joined.clone()) {
            Ok(tracking) => Ok(Some(tracking)),
            Err(error) => {
                self.part_if_idle(&joined);
                Err(error)
            }
        }
    }

    /// A pager that can: its own, or another for as long as that is needed.
    fn join_to_freeze(&self) -> Result<Arc<Paged>, RegionError> {
        if let Some(joined) = self.joined() {
            match joined.pager.engine().can_freeze() {
                Ok(()) => return Ok(joined),
                Err(error) if self.paged().is_some() || joined.tracked.load(Ordering::Acquire) => return Err(error),
                // Nobody follows it any more.
                Err(_) => self.part(),
            }
        }
        let (pager, guest) = match &self.inner.follower {
            Some(own) if own.engine().can_freeze().is_ok() => (own.clone(), false),
            _ => (Pager::freezing()?, true),
        };
        pager.engine().can_freeze()?;
        self.join_plain(pager, Some(Trap::Writes), guest)
    }
}

impl Frozen {
    /// The region.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.inner.region
    }

    /// How long it took to begin: for so long the program had to be paused for this region.
    #[must_use]
    pub fn armed_in(&self) -> Duration {
        self.inner.armed_in
    }

    /// Bytes of pages that were copied aside and are held now.
    #[must_use]
    pub fn saved_bytes(&self) -> u64 {
        self.inner.keeping().saved_bytes
    }

    /// Pages that were copied aside before they were written or discarded, those of zeros and those released included.
    #[must_use]
    pub fn saved_pages(&self) -> u64 {
        self.inner.keeping().saved_pages
    }

    /// Says that nobody will read these pages again: what was copied of them is freed, and what is written from now on is not copied. Pages past the end are ignored.
    pub fn release(&self, extent: Extent) {
        if let Some(extent) = extent.intersect(self.inner.region.extent()) {
            self.inner.joined.pager.engine().release(self.inner.joined.id, extent);
        }
    }
}

impl Inner {
    fn keeping(&self) -> crate::pager::Keeping {
        self.joined.pager.engine().keeping(self.joined.id)
    }

    /// Reads the region as it is, and puts in what was kept of it. May block where a store fills the region.
    fn fill(&self, extent: Extent, into: &mut [u8]) -> Result<(), Failed> {
        let page = self.region.page_size();
        let read = self.region.mapping().read_live(page.offset_of(extent.first()), into);
        let kept = match self.joined.pager.engine().look(self.joined.id, extent) {
            Look::Kept(kept) => kept,
            Look::Again => return Err(Failed::Again),
            Look::Over => return Err(Failed::Store(StoreError::Closed)),
            Look::Gone(extent, gone) => {
                let reason = if gone == Gone::Lost { LOST } else { RELEASED };
                return Err(Failed::Store(StoreError::Gone { extent, reason }));
            }
        };
        match read {
            Ok(()) => {}
            // What was kept may be there no more.
            Err(_) if kept.len() as u64 == extent.count() => {}
            Err(error) if extent.count() == 1 => return Err(Failed::Read(error)),
            Err(_) => {
                let pages = extent.chunks(1).zip(into.chunks_mut(page.len()));
                return pages.into_iter().try_for_each(|(extent, into)| self.fill(extent, into));
            }
        }
        put(kept, extent, page, into);
        Ok(())
    }

    async fn read(self: &Arc<Self>, extent: Extent) -> Result<bytes::Bytes, Failed> {
        let page = self.region.page_size();
        let len = usize::try_from(extent.bytes(page)).unwrap_or(usize::MAX);
        if self.region.is_plain() {
            return self.buffers.fill(len, |into| self.fill(extent, into));
        }
        let offset = page.offset_of(extent.first());
        let populated = self.region.populate(offset..offset + len as u64).await;
        let this = self.clone();
        // A page may be discarded between the populate and the copy, and the copy then waits for the pager.
        let copy = tokio::task::spawn_blocking(move || this.buffers.fill(len, |into| this.fill(extent, into)));
        let copied = copy.await.map_err(|_| Failed::Store(StoreError::Closed))?;
        // Why a page could not be had says more than that it could not be read.
        copied.map_err(|failed| match (failed, populated) {
            (Failed::Read(_), Err(error)) => Failed::Read(error),
            (failed, _) => failed,
        })
    }
}

fn put(kept: Kept, extent: Extent, page: PageSize, into: &mut [u8]) {
    for (at, bytes) in kept {
        #[allow(clippy::cast_possible_truncation, reason = "inside the buffer")]
        let from = page.offset_of(at - extent.first()) as usize;
        let into = &mut into[from..from + page.len()];
        match bytes {
            Some(bytes) => into.copy_from_slice(&bytes),
            None => into.fill(0),
        }
    }
}

#[async_trait]
impl PageStore for Frozen {
    fn size(&self) -> u64 {
        self.inner.region.size_bytes()
    }

    fn page_size(&self) -> PageSize {
        self.inner.region.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.check(extent)?;
        if extent.is_empty() {
            return Ok(Vec::new());
        }
        let give_up = Instant::now() + LOOK_LIMIT;
        loop {
            match self.inner.read(extent).await {
                Ok(bytes) => return Ok(vec![Run::bytes(extent, bytes)]),
                Err(Failed::Again) if Instant::now() < give_up => tokio::time::sleep(PACE).await,
                Err(Failed::Again) => {
                    let source = io::Error::new(io::ErrorKind::TimedOut, "the program changes its mappings without a pause");
                    return Err(StoreError::Io { operation: "reading a frozen region", extent, source: Arc::new(source) });
                }
                Err(Failed::Read(error)) => return Err(store_error("reading a frozen region", extent, error)),
                Err(Failed::Store(error)) => return Err(error),
            }
        }
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_write(extent, bytes)?;
        Err(StoreError::ReadOnly)
    }

    /// Nothing is ever written.
    async fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        extents.iter().try_for_each(|extent| self.check(*extent))?;
        Ok(Box::new(ReadAfterRead::new(self.clone(), extents)))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _changing = self.region.changing();
        // Where the region leaves the pager all of it may be written anyway.
        let leaves = self.joined.guest && !self.joined.tracked.load(Ordering::Acquire);
        self.joined.pager.engine().unfreeze(self.joined.id, !leaves);
        self.joined.frozen.store(false, Ordering::Release);
        self.region.part_if_idle(&self.joined);
    }
}
