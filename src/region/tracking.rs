//! Which pages a program writes, as the owner of a region asks.
//!
//! Role: the handle of a tracker. Neighbours: the pager follows; migrations, and whoever writes a region back to a store, take. Invariants: S5: what is taken comes back unless it is
//! acknowledged; a region has one follower at a time.

use super::{Paged, Region};
use crate::{
    Extent, LossPolicy, Pager, RegionError, TrackerKind,
    pager::{Around, Core},
    store::MemoryStore,
};
use std::sync::{Arc, Mutex, PoisonError, atomic::Ordering};

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
    kind: TrackerKind,
}

/// Pages that were written, taken by [`Tracking::take`]. Dropped without [`acknowledge`](Written::acknowledge), they come with the next take again.
#[derive(Debug)]
#[must_use = "dropping it puts the pages back, to be taken again"]
pub struct Written {
    region: Region,
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
        let joined = match self.joined() {
            Some(joined) => joined,
            None => self.follow()?,
        };
        let kind = joined.pager.engine().track(joined.id, self.inner.paged.get().is_some())?;
        joined.tracked.store(true, Ordering::Release);
        tracing::debug!(region = self.name(), %kind, "following writes");
        Ok(Tracking { region: self.clone(), kind })
    }

    /// What a pager knows it by.
    pub(super) fn joined(&self) -> Option<&Paged> {
        self.inner.paged.get().or_else(|| self.inner.followed.get())
    }

    /// Joins a pager that has nothing to fill.
    fn follow(&self) -> Result<&Paged, RegionError> {
        static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
        let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(joined) = self.inner.followed.get() {
            return Ok(joined);
        }
        let pager = self.inner.follower.clone().map_or_else(Pager::shared, Ok)?;
        let trap = pager.engine().trap_of_plain_memory()?;
        let core = Core::new(self.extent().count(), true, Around::new(1, 1), 1);
        // Never asked: no page is missing.
        let store = Arc::new(MemoryStore::zeroed(self.size_bytes(), self.page_size()));
        let joined = Paged::join(self.name(), self.mapping(), pager, core, store, LossPolicy::default(), trap)?;
        Ok(self.inner.followed.get_or_init(|| joined))
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
        let joined = self.region.joined().ok_or(RegionError::PagerStopped)?;
        let extents = joined.pager.engine().take_written(joined.id, program == Program::Paused)?;
        Ok(Written { region: self.region.clone(), extents })
    }
}

impl Drop for Tracking {
    fn drop(&mut self) {
        if let Some(joined) = self.region.joined() {
            joined.tracked.store(false, Ordering::Release);
            joined.pager.engine().untrack(joined.id);
        }
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
        self.extents.clear();
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        if !self.extents.is_empty()
            && let Some(joined) = self.region.joined()
        {
            joined.pager.engine().give_back_written(joined.id, &self.extents);
        }
    }
}
