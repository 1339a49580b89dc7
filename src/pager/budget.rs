//! How much of a region may be here, and which pages go when it is too much.
//!
//! Role: the marks and the clock of a region with a budget. Neighbours: `core` holds one and tells it what came and went; `evict` asks which pages shall go. Invariants: only pages that are here
//! and that the caller calls clean are chosen; a page that is chosen is *leaving* until it is said to be gone or to stay, and is not chosen twice; three bits a page. A reply that was under way when its page went never brings
//! older bytes back (S4): a page that is asked for does not go, and once pages have gone no pull brings any.
//!
//! The kernel tells of no reads of pages that are here, so recent is what a fault brought or a message of a write named: such a page is passed over once by the hand. What came as a
//! neighbour or with a pull goes at the first pass.

use super::residency::{Plane, Residency, index, slice};
use crate::Extent;
use bitvec::prelude::BitVec;

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    limit_pages: u64,
    /// Pages that are here.
    held_pages: u64,
    /// Nothing could be evicted: what is wanted comes all the same.
    lifted: bool,
    recent: Plane,
    leaving: Plane,
    /// A request for them is on its way, though they may have come by another. What it brings is older than what may be written meanwhile, so they stay until it is over.
    requested: Plane,
    /// Pages have gone: what a pull read before that may be older than what the store has now.
    any_went: bool,
    hand: u64,
}

/// What a look around the clock found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Chosen {
    /// In the order of the hand; no two of them touch unless the hand passed the end between them.
    pub(crate) extents: Vec<Extent>,
    /// Pages that the hand passed.
    pub(crate) passed: u64,
}

impl Budget {
    pub(crate) fn new(pages: u64, limit_pages: u64) -> Budget {
        let none: Plane = BitVec::repeat(false, index(pages));
        let (recent, leaving, requested) = (none.clone(), none.clone(), none);
        Budget { limit_pages, held_pages: 0, lifted: false, recent, leaving, requested, any_went: false, hand: 0 }
    }

    pub(crate) fn limit_pages(&self) -> u64 {
        self.limit_pages
    }

    /// Eviction begins above it, so that a fault rarely waits for room.
    pub(crate) fn high_pages(&self) -> u64 {
        self.limit_pages - self.limit_pages / 32
    }

    /// Eviction ends there, and a pull.
    pub(crate) fn low_pages(&self) -> u64 {
        Budget::low_of(self.limit_pages)
    }

    pub(crate) fn low_of(limit_pages: u64) -> u64 {
        limit_pages - limit_pages / 16
    }

    pub(crate) fn held_pages(&self) -> u64 {
        self.held_pages
    }

    /// How many pages may be asked for beside those on their way.
    pub(crate) fn room(&self, on_the_way_pages: u64) -> u64 {
        if self.lifted { u64::MAX } else { self.limit_pages.saturating_sub(self.held_pages + on_the_way_pages) }
    }

    /// From now on nothing waits for room, or it does again.
    pub(crate) fn lift(&mut self, lifted: bool) {
        self.lifted = lifted;
    }

    pub(crate) fn is_lifted(&self) -> bool {
        self.lifted
    }

    pub(crate) fn came(&mut self, pages: u64) {
        self.held_pages += pages;
    }

    pub(crate) fn went(&mut self, extent: Extent, pages: u64) {
        self.held_pages = self.held_pages.saturating_sub(pages);
        slice(&mut self.recent, extent).fill(false);
        self.stays(extent);
    }

    /// They go because of the budget.
    pub(crate) fn evicted(&mut self, extent: Extent, pages: u64) {
        self.any_went = true;
        self.went(extent, pages);
    }

    pub(crate) fn any_went(&self) -> bool {
        self.any_went
    }

    /// A request for them is made, or is over.
    pub(crate) fn request(&mut self, extent: Extent, under_way: bool) {
        slice(&mut self.requested, extent).fill(under_way);
    }

    /// A thread was seen to touch them.
    pub(crate) fn touched(&mut self, extent: Extent) {
        slice(&mut self.recent, extent).fill(true);
    }

    pub(crate) fn is_leaving(&self, page: u64) -> bool {
        self.leaving[index(page)]
    }

    /// Those of `within` that are about to be dropped, or were and nobody has said so yet.
    pub(crate) fn leaving(&self, within: Extent) -> impl Iterator<Item = Extent> + '_ {
        within.pages().filter(|page| self.is_leaving(*page)).map(Extent::page)
    }

    pub(crate) fn stays(&mut self, extent: Extent) {
        slice(&mut self.leaving, extent).fill(false);
    }

    /// Chooses up to `most_pages` pages to go, among the next `look_pages` of the clock.
    pub(crate) fn choose(
        &mut self,
        residency: &Residency,
        clean: impl Fn(u64) -> bool,
        (most_pages, look_pages): (u64, u64),
    ) -> Chosen {
        let (pages, mut chosen, mut count) = (self.recent.len() as u64, Chosen::default(), 0);
        while chosen.passed < look_pages.min(pages) && count < most_pages {
            let page = self.hand;
            (self.hand, chosen.passed) = ((page + 1) % pages, chosen.passed + 1);
            if !residency.is_resident(page) || self.is_leaving(page) || self.requested[index(page)] {
                continue;
            }
            if self.recent[index(page)] {
                self.recent.set(index(page), false);
            } else if clean(page) {
                self.leaving.set(index(page), true);
                count += 1;
                match chosen.extents.last_mut() {
                    Some(last) if last.end() == page => *last = Extent::between(last.first(), page + 1),
                    _ => chosen.extents.push(Extent::page(page)),
                }
            }
        }
        chosen
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        [&self.recent, &self.leaving, &self.requested].iter().map(|plane| plane.capacity() / 8).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    #[test]
    fn marks_lie_below_the_limit_and_room_ends_there() {
        let mut budget = Budget::new(1000, 320);
        assert_eq!((budget.low_pages(), budget.high_pages(), budget.limit_pages()), (300, 310, 320));
        budget.came(300);
        assert_eq!((budget.room(0), budget.room(15), budget.room(50)), (20, 5, 0));
        budget.lift(true);
        assert_eq!(budget.room(50), u64::MAX);
        budget.lift(false);
        budget.went(Extent::between(0, 100), 100);
        assert_eq!((budget.room(0), budget.held_pages()), (120, 200));
    }

    #[test]
    fn a_page_that_was_touched_is_passed_over_once() {
        let (mut budget, mut residency) = (Budget::new(8, 8), Residency::new(8, true));
        budget.touched(Extent::page(1));
        let first = budget.choose(&residency, |_| true, (3, 8));
        assert_eq!(first, Chosen { extents: vec![Extent::page(0), Extent::between(2, 4)], passed: 4 });
        residency.evict(Extent::page(0));
        budget.went(Extent::page(0), 1);
        // Once around: 4 to 7, then 1, and those that are leaving are not chosen again.
        let next = budget.choose(&residency, |page| page != 5, (8, 8));
        assert_eq!(next.extents, [Extent::page(4), Extent::between(6, 8), Extent::page(1)]);
    }

    proptest! {
        /// Beside a list of records that is walked in the same way.
        #[test]
        fn the_clock_agrees_with_a_naive_model(steps in vec((0u8..5, 0u64..70, 1u64..9, any::<u64>()), 0..60)) {
            const PAGES: u64 = 70;
            #[derive(Clone, Copy, Default)]
            struct Record { here: bool, recent: bool, leaving: bool }
            let (mut budget, mut residency) = (Budget::new(PAGES, 32), Residency::new(PAGES, false));
            let (mut naive, mut hand) = ([Record::default(); PAGES as usize], 0usize);
            for (kind, first, count, dirty) in steps {
                let extent = Extent::between(first, (first + count).min(PAGES));
                let records = &mut naive[index(extent.first())..index(extent.end())];
                match kind {
                    0 => {
                        let new = extent.count() - residency.resident_in(extent);
                        residency.install(extent);
                        budget.came(new);
                        records.iter_mut().for_each(|page| page.here = true);
                    }
                    1 => {
                        budget.touched(extent);
                        records.iter_mut().for_each(|page| page.recent = true);
                    }
                    2 => {
                        budget.went(extent, residency.resident_in(extent));
                        residency.evict(extent);
                        records.fill(Record::default());
                    }
                    3 => {
                        budget.stays(extent);
                        records.iter_mut().for_each(|page| page.leaving = false);
                    }
                    _ => {
                        let clean = |page: u64| dirty >> (page % 64) & 1 == 0;
                        let chosen = budget.choose(&residency, clean, (count, 3 * count));
                        let (mut expected, mut passed) = (Vec::new(), 0);
                        while passed < 3 * count && (expected.len() as u64) < count {
                            let page = &mut naive[hand];
                            if page.here && !page.leaving {
                                if page.recent {
                                    page.recent = false;
                                } else if clean(hand as u64) {
                                    page.leaving = true;
                                    expected.push(hand as u64);
                                }
                            }
                            (hand, passed) = ((hand + 1) % naive.len(), passed + 1);
                        }
                        let pages: Vec<u64> = chosen.extents.into_iter().flat_map(Extent::pages).collect();
                        prop_assert_eq!((pages, chosen.passed), (expected, passed));
                    }
                }
                prop_assert_eq!(budget.held_pages(), naive.iter().filter(|page| page.here).count() as u64);
                for (page, record) in (0..).zip(&naive) {
                    prop_assert_eq!(budget.is_leaving(page), record.leaving);
                }
            }
        }
    }
}
