//! Which pages a program writes, as the owner of a region asks.
//!
//! Role: the handle of a tracker. Neighbours: the pager follows; migrations, and whoever writes a region back to a store, take. Invariants: S5: what is taken comes back unless it is
//! acknowledged; a region has one follower at a time.

use super::{Paged, Region};
use crate::{
    Extent, LossPolicy, Pager, RegionError, TrackerKind,
    pager::{Around, Core},
    store::MemoryStore,
    sys::Trap,
};
use std::sync::{Arc, MutexGuard, PoisonError, atomic::Ordering};

/// Whether the program may write while it is asked what it wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Program {
    /// It may.
    Running,
    /// Nothing writes any region of this process from before the call until it returns.
    Paused,
}

/// Follows the writes to a region, from any thread and from inside system calls too. Dropping it stops that.
///
/// Read pages *after* taking them, never before: a write between the two is then told by the next take.
///
/// ```
/// use pageferry::{Extent, Program, Region};
/// # if pageferry::Capabilities::probe().write_protect() {
/// let region = Region::builder().name("scores").size(1 << 20).open()?;
/// let tracking = region.track()?;
/// region.write_at(5 * 4096, b"new")?;
/// let written = tracking.take(Program::Running)?;
/// assert_eq!(written.extents(), [Extent::page(5)]);
/// // Send or store them. Without this the next take would give them again:
/// written.acknowledge();
/// assert_eq!(tracking.take(Program::Running)?.pages(), 0);
/// # }
/// # Ok::<(), pageferry::RegionError>(())
/// ```
#[derive(Debug)]
pub struct Tracking {
    region: Region,
    joined: Arc<Paged>,
    kind: TrackerKind,
}

/// Pages that were written, taken by [`Tracking::take`]. Dropped without [`acknowledge`](Written::acknowledge), they come with the next take again.
#[derive(Debug)]
#[must_use = "dropping it puts the pages back, to be taken again"]
pub struct Written {
    /// Keeps the memory.
    _region: Region,
    joined: Arc<Paged>,
    extents: Vec<Extent>,
}

impl Region {
    /// Begins to follow writes: each one from the return on is told. What was written before is not: whoever needs it takes all pages as written.
    ///
    /// Costs the first write of each page after it was taken as much as [`TrackerKind`] says. Takes tens of milliseconds a GiB, in which threads that write go on. Forked children are not
    /// followed. Works on a region that is still being filled: what comes from the store is no write (but for pages of zeros, which are told).
    ///
    /// # Errors
    /// [`RegionError::NoTracker`] with the remedy, [`RegionError::AlreadyTracked`], [`RegionError::NoUserfaultfd`], [`RegionError::System`].
    pub fn track(&self) -> Result<Tracking, RegionError> {
        let _changing = self.changing();
        let joined = match self.joined() {
            Some(joined) => joined,
            None => self.follow()?,
        };
        self.track_by(joined)
    }

    /// The caller holds [`changing`](Region::changing).
    pub(super) fn track_by(&self, joined: Arc<Paged>) -> Result<Tracking, RegionError> {
        let kind = joined.pager.engine().track(joined.id, self.paged().is_some())?;
        joined.tracked.store(true, Ordering::Release);
        tracing::debug!(region = self.name(), %kind, "following writes");
        Ok(Tracking { region: self.clone(), joined, kind })
    }

    /// What a pager knows it by.
    pub(super) fn joined(&self) -> Option<Arc<Paged>> {
        let followed = || self.inner.followed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.inner.paged.get().cloned().or_else(followed)
    }

    /// Held while it joins a pager or leaves one.
    pub(super) fn changing(&self) -> MutexGuard<'_, ()> {
        self.inner.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Joins the pager that follows it.
    fn follow(&self) -> Result<Arc<Paged>, RegionError> {
        let pager = self.inner.follower.clone().map_or_else(Pager::shared, Ok)?;
        let trap = pager.engine().trap_of_plain_memory()?;
        self.join_plain(pager, trap, false)
    }

    /// Joins a pager that has nothing to fill. `guest`: for as long as it is followed or frozen.
    pub(super) fn join_plain(&self, pager: Pager, trap: Option<Trap>, guest: bool) -> Result<Arc<Paged>, RegionError> {
        let core = Core::new(self.extent().count(), true, Around::new(1, 1, 0), 1);
        // Never asked: no page is missing.
        let store = Arc::new(MemoryStore::zeroed(self.size_bytes(), self.page_size()));
        let mut joined = Paged::join(self.name(), self.mapping(), pager, core, store, LossPolicy::default(), trap)?;
        joined.guest = guest;
        let joined = Arc::new(joined);
        *self.inner.followed.lock().unwrap_or_else(PoisonError::into_inner) = Some(joined.clone());
        Ok(joined)
    }

    /// Leaves the pager that follows it. The caller holds [`changing`](Region::changing), and nobody follows it or keeps it frozen.
    pub(super) fn part(&self) {
        let followed = self.inner.followed.lock().unwrap_or_else(PoisonError::into_inner).take();
        followed.inspect(|joined| joined.pager.engine().part(joined.id, self.mapping().address(), self.mapping().len()));
    }

    /// Leaves a pager that it is with for as long as it is followed or frozen, if that is over. The caller holds [`changing`](Region::changing).
    pub(super) fn part_if_idle(&self, joined: &Paged) {
        if joined.guest && !joined.tracked.load(Ordering::Acquire) && !joined.frozen.load(Ordering::Acquire) {
            self.part();
        }
    }
}

impl Tracking {
    /// By which means.
    #[must_use]
    pub fn kind(&self) -> TrackerKind {
        self.kind
    }

    /// The region.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Takes the pages that were written since they were taken last, in order and each once. From the return on, later writes are told by the next take.
    ///
    /// Pages that the program gives back with madvise(2) by itself are told by every take up to the next of a paused program, because nobody says when the kernel has dropped
    /// them: use [`Region::discard`].
    ///
    /// Blocks for a few milliseconds a GiB; faults of other threads wait for at most a part of that.
    ///
    /// # Errors
    /// [`RegionError::MustPause`] if this tracker cannot be asked while the program runs; [`RegionError::System`].
    pub fn take(&self, program: Program) -> Result<Written, RegionError> {
        let extents = self.joined.pager.engine().take_written(self.joined.id, program == Program::Paused)?;
        Ok(Written { _region: self.region.clone(), joined: self.joined.clone(), extents })
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        let _changing = self.region.changing();
        self.joined.tracked.store(false, Ordering::Release);
        self.joined.pager.engine().untrack(self.joined.id);
        self.region.part_if_idle(&self.joined);
    }
}

impl Written {
    /// Which pages, in order; no two extents touch.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// How many.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.extents.iter().map(|extent| extent.count()).sum()
    }

    /// Says that they have arrived where they were to go.
    pub fn acknowledge(mut self) {
        self.joined.pager.engine().acknowledged(self.joined.id, &self.extents);
        self.extents.clear();
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if !self.extents.is_empty() {
            self.joined.pager.engine().give_back_written(self.joined.id, &self.extents);
        }
    }
}
