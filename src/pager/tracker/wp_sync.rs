//! Write protection that the pager lifts, page by page as messages come (Linux 5.7).
//!
//! Role: the tracker for kernels without `WP_ASYNC`; 8 to 45 us for the first write of a page. Neighbours: `tracking` adds the page of each message to what was written before it lets the writer
//! go. Invariants: a page is taken before it is protected anew; only pages that hold something are protected where a store fills the region, because a mark on another keeps the
//! kernel from filling it with zeros or poison.

use super::{Piece, Tracker};
use crate::{
    Extent, TrackerKind,
    pager::{place::page_len, written::Written},
    sys::{Features, Stop, Trap, Userfault},
};

/// As many pages that are protected still are protected again rather than passed over by a second call: a call takes 1.0 to 1.7 us, a page in it 0.12 us (bench
/// `dirty`).
const GAP: u64 = 8;

/// See the module header.
#[derive(Debug)]
pub(in crate::pager) struct WpSync {
    filled_from_a_store: bool,
    /// Pages that hold nothing can be protected (`WP_UNPOPULATED`, Linux 6.4); elsewhere they must be touched first.
    marks: bool,
}

impl WpSync {
    pub(in crate::pager) fn new(filled_from_a_store: bool, features: Features) -> WpSync {
        WpSync { filled_from_a_store, marks: features.contains(Features::WP_UNPOPULATED) }
    }

    /// Protects pages; those that cannot be, count as written.
    fn protect(&self, uffd: &Userfault, piece: Piece<'_>, extent: Extent, written: &mut Written) {
        let holding = piece.residency.map_or_else(|| vec![extent], |residency| residency.resident(extent).collect());
        for extent in holding {
            let address = piece.address_of(extent);
            match uffd.write_protect(address, page_len(piece.page, extent.count()), true) {
                None => {}
                // It may span mappings, which kernels before 6.4 refuse as a whole.
                Some(Stop::Gone) if extent.count() > 1 => {
                    for page in extent.chunks(1) {
                        if uffd.write_protect(piece.address_of(page), piece.page.len(), true).is_some() {
                            written.wrote(page);
                        }
                    }
                }
                Some(_) => written.wrote(extent),
            }
        }
    }
}

impl Tracker for WpSync {
    fn kind(&self) -> TrackerKind {
        TrackerKind::WpSync
    }

    fn trap(&self, filled_from_a_store: bool) -> Option<Trap> {
        Some(if filled_from_a_store { Trap::MissingAndWrites } else { Trap::Writes })
    }

    fn needs_touch(&self) -> bool {
        !self.filled_from_a_store && !self.marks
    }

    fn arm(&mut self, uffd: &Userfault, piece: Piece<'_>, written: &mut Written) {
        self.protect(uffd, piece, piece.extent, written);
    }

    fn take(&mut self, uffd: &Userfault, piece: Piece<'_>, written: &mut Written) -> Vec<Extent> {
        let taken = written.take(piece.extent);
        for near in taken.chunk_by(|extent, next| next.first() - extent.end() <= GAP) {
            // What is between them is protected, or was taken too.
            let all = Extent::between(near[0].first(), near[near.len() - 1].end());
            self.protect(uffd, piece, all, written);
        }
        taken
    }

    fn disarm(&mut self, uffd: &Userfault, piece: Piece<'_>) {
        if uffd.write_protect(piece.address, piece.len(), false).is_some() {
            for page in piece.extent.chunks(1) {
                // Whoever writes a page that is left protected sends a message, and is let go by it.
                let _ = uffd.write_protect(piece.address_of(page), piece.page.len(), false);
            }
        }
    }
}
