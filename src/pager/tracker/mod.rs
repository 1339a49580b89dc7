//! Ways to learn from the kernel which pages were written.
//!
//! Role: a trait and the three that there are. Neighbours: `tracking` holds one for each region that is followed, and keeps what it finds; `sys` makes the calls. Invariants: a
//! write that is not told by one [`take`](Tracker::take) is told by the next (S5); what cannot be protected counts as written for as long as that is so, never as clean.

mod soft_dirty;
mod wp_async;
mod wp_sync;

pub(super) use soft_dirty::{SoftDirty, give_back, reserve};
pub(super) use wp_async::WpAsync;
pub(super) use wp_sync::WpSync;

use super::{place::page_len, residency::Residency, written::Written};
use crate::{
    Extent, PageSize, TrackerKind,
    sys::{Trap, Userfault},
};
use std::ops::Range;

/// A part of a region that lies in one piece.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece<'a> {
    pub(super) address: usize,
    pub(super) extent: Extent,
    /// Which pages hold data, where a store fills the region. Elsewhere all do.
    pub(super) residency: Option<&'a Residency>,
    pub(super) page: PageSize,
}

impl Piece<'_> {
    pub(super) fn len(&self) -> usize {
        page_len(self.page, self.extent.count())
    }

    pub(super) fn address_of(&self, extent: Extent) -> usize {
        self.address + page_len(self.page, extent.first() - self.extent.first())
    }

    /// The pages of a range of addresses inside it.
    pub(super) fn extent_of(&self, range: &Range<usize>) -> Extent {
        let page = |address: usize| self.extent.first() + self.page.page_of((address - self.address) as u64);
        Extent::between(page(range.start), page(range.end))
    }
}

/// See the module header.
pub(super) trait Tracker: Send + std::fmt::Debug {
    fn kind(&self) -> TrackerKind;

    /// What must be registered of a region's memory; `None`: nothing.
    fn trap(&self, filled_from_a_store: bool) -> Option<Trap>;

    /// Whether [`finish`](Tracker::finish) must follow the takes of all regions that are followed this way, with nothing written from the first of them on.
    fn needs_pause(&self) -> bool {
        false
    }

    /// Whether the pages of a region without a store must hold something to be followed: they are touched when following begins, and whenever they were told.
    fn needs_touch(&self) -> bool {
        false
    }

    /// Begins: writes to the piece are told from the return on. What cannot be followed is added to `written`.
    fn arm(&mut self, uffd: &Userfault, piece: Piece<'_>, written: &mut Written);

    /// Takes what was written of the piece since it was armed or taken last, together with what `written` knows of it, in order, and goes on following. What cannot be
    /// followed on stays in `written`.
    fn take(&mut self, uffd: &Userfault, piece: Piece<'_>, written: &mut Written) -> Vec<Extent>;

    /// See [`needs_pause`](Tracker::needs_pause).
    fn finish(&mut self) -> std::io::Result<()> {
        Ok(())
    }

    /// Lets go: nobody waits to write when this returns, and nobody will. The piece may be written freely.
    fn disarm(&mut self, uffd: &Userfault, piece: Piece<'_>);
}
