//! The kernel's soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`, Documentation/admin-guide/mm/soft-dirty.rst).
//!
//! Role: the tracker for kernels whose userfaultfd has no write protection. Neighbours: `sys::Pagemap`. Invariants: bits are read, then cleared, and both are steps of their own: a write between
//! them would be lost, so nothing may be written meanwhile; they are cleared for the whole process at once, so one pager of a process reads all regions that are followed this
//! way before it clears them, and no other may.
//!
//! Told too often, never too seldom: what a store has filled counts as written, and so does all of a mapping that the kernel has merged with a new one.

use super::{Piece, Tracker};
use crate::{
    Extent, TrackerKind,
    pager::{residency::Plane, written::Written},
    sys::{Pagemap, Trap, Userfault},
};
use std::{
    io,
    sync::atomic::{AtomicUsize, Ordering},
};

/// The pager that may clear the bits of this process, and its users.
static OWNER: AtomicUsize = AtomicUsize::new(0);

/// See the module header.
#[derive(Debug)]
pub(in crate::pager) struct SoftDirty {
    pagemap: Pagemap,
    /// Pages that held something when they were looked at last: one that holds nothing any more was discarded.
    populated: Plane,
}

impl SoftDirty {
    pub(in crate::pager) fn new(pages: u64) -> io::Result<SoftDirty> {
        let populated = bitvec::vec::BitVec::repeat(false, crate::pager::residency::index(pages));
        Ok(SoftDirty { pagemap: Pagemap::open()?, populated })
    }

    fn look(&mut self, piece: Piece<'_>, mut changed: impl FnMut(Extent)) -> io::Result<()> {
        let populated = &mut self.populated;
        self.pagemap.read(piece.address, piece.len(), |address, bits| {
            let page = piece.extent_of(&(address..address + piece.page.len()));
            let before = populated.replace(crate::pager::residency::index(page.first()), bits.populated());
            if bits.populated() && bits.soft_dirty() || before && !bits.populated() {
                changed(page);
            }
        })
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

    fn arm(&mut self, _: &Userfault, piece: Piece<'_>, written: &mut Written) {
        if let Err(error) = self.look(piece, |_| {}) {
            tracing::warn!(%error, extent = %piece.extent, "reading which pages were written failed: they count as written");
            written.wrote(piece.extent);
        }
    }

    fn take(&mut self, _: &Userfault, piece: Piece<'_>, written: &mut Written) -> Vec<Extent> {
        if self.look(piece, |page| written.wrote(page)).is_err() {
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
