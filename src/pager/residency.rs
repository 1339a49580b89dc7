//! Which pages are missing, asked for, resident, discarded or lost.
//!
//! Role: the memory of hop *decide*. Neighbours: `core` alone holds one. Invariants: four bits a page and no more (the budget is one
//! byte); a page is *missing* when it is neither resident nor discarded nor lost, and only a missing page is ever asked for.

use crate::Extent;
use bitvec::prelude::{BitSlice, BitVec, Lsb0};

pub(super) type Plane = BitVec<u64, Lsb0>;

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct Residency {
    resident: Plane,
    asked: Plane,
    discarded: Plane,
    lost: Plane,
}

/// What is known of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageState {
    Missing,
    Asked,
    Resident,
    /// The program gave it back; it reads as zeros from now on, whatever the store holds.
    Discarded,
    /// Resident now, but discarded at some time: if the kernel says it is missing again, it is zeros.
    ResidentOnceDiscarded,
    /// Poisoned by the loss policy.
    Lost,
}

impl Residency {
    /// `pages` pages, all missing, or all resident.
    pub(crate) fn new(pages: u64, resident: bool) -> Residency {
        let len = index(pages);
        let empty: Plane = BitVec::repeat(false, len);
        Residency { resident: BitVec::repeat(resident, len), asked: empty.clone(), discarded: empty.clone(), lost: empty }
    }

    /// These pages are missing, to begin with.
    pub(crate) fn lack(&mut self, extent: Extent) {
        slice(&mut self.resident, extent).fill(false);
    }

    pub(crate) fn extent(&self) -> Extent {
        Extent::between(0, self.resident.len() as u64)
    }

    pub(crate) fn state(&self, page: u64) -> PageState {
        let page = index(page);
        if self.lost[page] {
            PageState::Lost
        } else if self.resident[page] {
            if self.discarded[page] { PageState::ResidentOnceDiscarded } else { PageState::Resident }
        } else if self.discarded[page] {
            PageState::Discarded
        } else if self.asked[page] {
            PageState::Asked
        } else {
            PageState::Missing
        }
    }

    /// The request for these pages is on its way.
    pub(crate) fn ask(&mut self, extent: Extent) {
        slice(&mut self.asked, extent).fill(true);
    }

    /// The request is over without these pages being installed.
    pub(crate) fn unask(&mut self, extent: Extent) {
        slice(&mut self.asked, extent).fill(false);
    }

    pub(crate) fn install(&mut self, extent: Extent) {
        slice(&mut self.resident, extent).fill(true);
        slice(&mut self.asked, extent).fill(false);
    }

    pub(crate) fn discard(&mut self, extent: Extent) {
        slice(&mut self.resident, extent).fill(false);
        slice(&mut self.asked, extent).fill(false);
        // MADV_DONTNEED clears a poison marker as well.
        slice(&mut self.lost, extent).fill(false);
        slice(&mut self.discarded, extent).fill(true);
    }

    /// These pages were here, and the store has them: they are missing, as if they had never come. What was discarded before is in the store by now.
    pub(crate) fn evict(&mut self, extent: Extent) {
        slice(&mut self.resident, extent).fill(false);
        slice(&mut self.discarded, extent).fill(false);
    }

    pub(crate) fn lose(&mut self, extent: Extent) {
        slice(&mut self.asked, extent).fill(false);
        slice(&mut self.lost, extent).fill(true);
    }

    /// Extents inside `within` whose pages have no data yet and should have: asked for or not.
    pub(crate) fn missing(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| !this.resident[page] && !this.discarded[page] && !this.lost[page])
    }

    /// Extents inside `within` that are missing and that nobody asked for.
    pub(crate) fn unasked(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| !this.resident[page] && !this.discarded[page] && !this.lost[page] && !this.asked[page])
    }

    /// Extents inside `within` that are missing and asked for.
    pub(crate) fn asked(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| this.asked[page] && !this.resident[page] && !this.discarded[page] && !this.lost[page])
    }

    /// Extents inside `within` that were discarded and hold nothing since.
    pub(crate) fn discarded(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| this.discarded[page] && !this.resident[page])
    }

    /// Extents inside `within` that were lost.
    pub(crate) fn lost(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| this.lost[page])
    }

    pub(crate) fn any_lost(&self) -> bool {
        self.lost.any()
    }

    /// Extents inside `within` that were not lost.
    pub(crate) fn not_lost(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| !this.lost[page])
    }

    /// Extents inside `within` that hold data.
    pub(crate) fn resident(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        self.runs(within, |this, page| this.resident[page])
    }

    pub(crate) fn is_resident(&self, page: u64) -> bool {
        self.resident[index(page)]
    }

    /// How many pages of `extent` hold data.
    pub(crate) fn resident_in(&self, extent: Extent) -> u64 {
        let end = index(extent.end()).min(self.resident.len());
        self.resident[index(extent.first()).min(end)..end].count_ones() as u64
    }

    pub(crate) fn resident_pages(&self) -> u64 {
        self.resident.count_ones() as u64
    }

    pub(crate) fn discarded_pages(&self) -> u64 {
        let words = self.discarded.as_raw_slice().iter().zip(self.resident.as_raw_slice());
        words.map(|(discarded, resident)| u64::from((discarded & !resident).count_ones())).sum()
    }

    pub(crate) fn lost_pages(&self) -> u64 {
        self.lost.count_ones() as u64
    }

    /// Bytes of memory used.
    pub(crate) fn heap_bytes(&self) -> usize {
        [&self.resident, &self.asked, &self.discarded, &self.lost].iter().map(|plane| plane.capacity() / 8).sum()
    }

    fn runs<'a>(&'a self, within: Extent, holds: impl Fn(&Residency, usize) -> bool + 'a) -> impl Iterator<Item = Extent> + 'a {
        let within = within.intersect(self.extent()).unwrap_or_default();
        let mut next = within.first();
        std::iter::from_fn(move || {
            while next < within.end() && !holds(self, index(next)) {
                next += 1;
            }
            let first = next;
            while next < within.end() && holds(self, index(next)) {
                next += 1;
            }
            let run = Extent::between(first, next);
            (!run.is_empty()).then_some(run)
        })
    }
}

/// Page numbers index bits: a region's pages fit in memory many times over, so they fit `usize`.
#[allow(clippy::cast_possible_truncation, reason = "a page number of a region of this process is far below usize::MAX")]
pub(super) fn index(page: u64) -> usize {
    page as usize
}

pub(super) fn slice(plane: &mut Plane, extent: Extent) -> &mut BitSlice<u64, Lsb0> {
    let end = index(extent.end()).min(plane.len());
    let first = index(extent.first()).min(end);
    &mut plane[first..end]
}

#[cfg(test)]
mod tests {
    use super::{
        super::model::{ResidencyOp, try_residency},
        *,
    };
    use proptest::{collection::vec, prelude::*};

    proptest! {
        #[test]
        fn bit_planes_agree_with_a_naive_model(ops in vec(any::<[u8; 4]>().prop_map(ResidencyOp::of), 0..40), within: [u8; 2]) {
            let tried = try_residency(within, &ops);
            prop_assert!(tried.is_ok(), "{}", tried.unwrap_err());
        }
    }

    #[test]
    fn what_is_evicted_is_missing_and_not_discarded() {
        let mut residency = Residency::new(8, false);
        let extent = Extent::between(2, 6);
        residency.install(extent);
        residency.discard(Extent::page(3));
        residency.install(Extent::page(3));
        residency.evict(Extent::between(3, 5));
        let states = [2, 3, 4, 5].map(|page| residency.state(page));
        assert_eq!(states, [PageState::Resident, PageState::Missing, PageState::Missing, PageState::Resident]);
        assert_eq!((residency.resident_in(Extent::between(0, 8)), residency.is_resident(4)), (2, false));
    }

    #[test]
    fn a_page_costs_half_a_byte() {
        let pages = 1 << 20;
        assert!(Residency::new(pages, false).heap_bytes() as u64 <= pages / 2 + 64);
    }
}
