//! Write protection that the kernel lifts by itself (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7), asked for by `PAGEMAP_SCAN`.
//!
//! Role: the tracker of choice: no message, no thread, 1 us for the first write of a page. Neighbours: `sys::Pagemap`. Invariants: finding and protecting a page is one step of the kernel's;
//! pages that hold nothing are never marked, because a mark keeps the kernel from filling a missing page with zeros or poison.

use super::{Piece, Tracker};
use crate::{
    Extent, TrackerKind,
    pager::written::Written,
    sys::{Pagemap, Trap, Userfault},
};

/// See the module header.
#[derive(Debug)]
pub(in crate::pager) struct WpAsync {
    pagemap: Pagemap,
}

impl WpAsync {
    pub(in crate::pager) fn new() -> std::io::Result<WpAsync> {
        Ok(WpAsync { pagemap: Pagemap::open()? })
    }
}

impl Tracker for WpAsync {
    fn kind(&self) -> TrackerKind {
        TrackerKind::WpAsync
    }

    fn trap(&self, filled_from_a_store: bool) -> Option<Trap> {
        Some(if filled_from_a_store { Trap::MissingAndWrites } else { Trap::Writes })
    }

    fn arm(&mut self, _: &Userfault, piece: Piece<'_>, written: &mut Written) {
        if let Err(errno) = self.pagemap.take_written(piece.address, piece.len(), |_| {}) {
            tracing::warn!(%errno, extent = %piece.extent, "writes to these pages cannot be followed: they count as written");
            written.wrote(piece.extent);
        }
    }

    fn take(&mut self, _: &Userfault, piece: Piece<'_>, written: &mut Written) -> Vec<Extent> {
        let known = written.take(piece.extent);
        let mut taken: Vec<Extent> = Vec::new();
        let scanned = self.pagemap.take_written(piece.address, piece.len(), |range| {
            let extent = piece.extent_of(&range);
            match taken.last_mut() {
                // Where the kernel's answer was cut.
                Some(last) if last.end() == extent.first() => *last = Extent::between(last.first(), extent.end()),
                _ => taken.push(extent),
            }
        });
        if scanned.is_err() {
            written.wrote(piece.extent);
            return vec![piece.extent];
        }
        if !known.is_empty() {
            let mut all = Written::new(piece.extent.end());
            known.into_iter().chain(taken).for_each(|extent| all.wrote(extent));
            taken = all.take(piece.extent);
        }
        taken
    }

    fn disarm(&mut self, _: &Userfault, _: Piece<'_>) {
        // What is protected still is let go at the first write, by the kernel.
    }
}
