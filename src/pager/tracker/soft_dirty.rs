//! The kernel's soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`, Documentation/admin-guide/mm/soft-dirty.rst).
//!
//! Role: the tracker for kernels whose userfaultfd has no write protection. Neighbours: `sys::Pagemap`. Invariants: bits are read, then cleared, and both are steps of their own: a write between
//! them would be lost, so nothing may be written meanwhile; they are cleared for the whole process at once, so one pager of a process reads all regions that are followed this
//! way before it clears them, and no other may.
//!
//! Told too often, never too seldom: what a store has filled counts as written, and so does all of a mapping that the kernel has merged with a new one.
//!
//! Discards: the kernel tells of them where a store fills the region. Plain memory is registered for nothing, so there each page is made to hold something when following begins and
//! whenever it was told; one that holds nothing was discarded since. Without that an empty page would say nothing: it may have been written, read by whoever follows, and discarded.

use super::{Piece, Tracker};
use crate::{
    Extent, TrackerKind,
    pager::written::Written,
    sys::{Pagemap, Trap, Userfault},
};
use std::{
    io,
    ops::Range,
    sync::atomic::{AtomicUsize, Ordering},
};

/// The pager that may clear the bits of this process, and its users.
static OWNER: AtomicUsize = AtomicUsize::new(0);

/// See the module header.
#[derive(Debug)]
pub(in crate::pager) struct SoftDirty {
    pagemap: Pagemap,
    filled_from_a_store: bool,
}

impl SoftDirty {
    pub(in crate::pager) fn new(filled_from_a_store: bool) -> io::Result<SoftDirty> {
        Ok(SoftDirty { pagemap: Pagemap::open()?, filled_from_a_store })
    }

    fn look(&self, piece: Piece<'_>, mut changed: impl FnMut(Extent)) -> io::Result<()> {
        let mut run = piece.address..piece.address;
        let mut changed = |run: &Range<usize>| {
            if !run.is_empty() {
                changed(piece.extent_of(run));
            }
        };
        self.pagemap.read(piece.address, piece.len(), |address, bits| {
            let written = if bits.populated() { bits.soft_dirty() } else { !self.filled_from_a_store };
            if written {
                if run.end != address {
                    changed(&run);
                    run.start = address;
                }
                run.end = address + piece.page.len();
            }
        })?;
        changed(&run);
        Ok(())
    }
}

impl Tracker for SoftDirty {
    fn kind(&self) -> TrackerKind {
        TrackerKind::SoftDirty
    }

    fn trap(&self, filled_from_a_store: bool) -> Option<Trap> {
        filled_from_a_store.then_some(Trap::Missing)
    }

    fn needs_pause(&self) -> bool {
        true
    }

    fn needs_touch(&self) -> bool {
        !self.filled_from_a_store
    }

    // The bits have been kept all the time.
    fn arm(&mut self, _: &Userfault, _: Piece<'_>, _: &mut Written) {}

    fn take(&mut self, _: &Userfault, piece: Piece<'_>, written: &mut Written) -> Vec<Extent> {
        if self.look(piece, |extent| written.wrote(extent)).is_err() {
            written.wrote(piece.extent);
        }
        written.take(piece.extent)
    }

    fn finish(&mut self) -> io::Result<()> {
        Pagemap::clear_soft_dirty()
    }

    fn disarm(&mut self, _: &Userfault, _: Piece<'_>) {}
}

/// Reserves the bits of this process for the pager `who`, an address that is its alone. Whether it has them.
pub(in crate::pager) fn reserve(who: usize) -> bool {
    let had = OWNER.compare_exchange(0, who, Ordering::AcqRel, Ordering::Acquire);
    had.is_ok() || had == Err(who)
}

/// Gives them back.
pub(in crate::pager) fn give_back(who: usize) {
    let _ = OWNER.compare_exchange(who, 0, Ordering::AcqRel, Ordering::Acquire);
}
