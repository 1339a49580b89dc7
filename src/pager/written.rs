//! Which pages of a region were written and not yet taken.
//!
//! Role: the memory of trackers. Neighbours: `tracking` alone holds one for each region that is followed; trackers add what the kernel tells. Invariants: a page leaves only by
//! being taken, and comes back when what was taken is not acknowledged (S5); two bits a page, and one where it is kept what is clean.
//!
//! A page that the program discards is told before the kernel drops it. Until it is known to be dropped it stays *in doubt*: it is given with every take, because one
//! that came between the two might have been followed by a read of the old bytes. That the page is empty proves nothing: it may have been so before, and be written before it is
//! dropped.

use super::residency::{Plane, index, slice};
use crate::Extent;
use bitvec::prelude::BitVec;

/// See the module header.
#[derive(Clone, Debug)]
pub(super) struct Written {
    known: Plane,
    /// Whether there is anything in `known`: most trackers rarely put something there.
    any_known: bool,
    in_doubt: Plane,
    any_in_doubt: bool,
    /// Taken and not acknowledged, if that is kept.
    taken: Option<Plane>,
}

impl Written {
    pub(super) fn new(pages: u64) -> Written {
        let none: Plane = BitVec::repeat(false, index(pages));
        Written { known: none.clone(), any_known: false, in_doubt: none, any_in_doubt: false, taken: None }
    }

    /// Keeps what is taken from now on until it is acknowledged or given back, for [`Written::is_clean`].
    pub(super) fn keep_taken(&mut self) {
        self.taken.get_or_insert_with(|| BitVec::repeat(false, self.known.len()));
    }

    /// Whoever took these pages has them, or gives them back.
    pub(super) fn settled(&mut self, extent: Extent) {
        self.taken.iter_mut().for_each(|taken| slice(taken, extent).fill(false));
    }

    /// Whether nothing was written to the page since what was taken of it was acknowledged; only if that is kept.
    pub(super) fn is_clean(&self, page: u64) -> bool {
        let page = index(page);
        self.taken.as_ref().is_some_and(|taken| !self.known[page] && !self.in_doubt[page] && !taken[page])
    }

    /// Pages that were written and are not acknowledged.
    pub(super) fn dirty_pages(&self) -> u64 {
        let taken = self.taken.as_ref().map_or(&[][..], |taken| taken.as_raw_slice());
        let all = self.known.as_raw_slice().iter().zip(self.in_doubt.as_raw_slice()).enumerate();
        all.map(|(at, (known, doubt))| u64::from((known | doubt | taken.get(at).unwrap_or(&0)).count_ones())).sum()
    }

    /// These pages were written, or may have been.
    pub(super) fn wrote(&mut self, extent: Extent) {
        slice(&mut self.known, extent).fill(true);
        self.any_known = true;
    }

    /// The kernel will drop these pages, nobody knows when.
    pub(super) fn doubt(&mut self, extent: Extent) {
        slice(&mut self.in_doubt, extent).fill(true);
        self.any_in_doubt = true;
    }

    /// The kernel has dropped what it was to drop of these pages.
    pub(super) fn no_doubt(&mut self, extent: Extent) {
        if self.any_in_doubt {
            slice(&mut self.in_doubt, extent).fill(false);
            self.any_in_doubt = self.in_doubt.any();
        }
    }

    /// What the next take gives of `within`, in order.
    pub(super) fn known(&self, within: Extent) -> Vec<Extent> {
        match (self.any_known, self.any_in_doubt) {
            (false, false) => Vec::new(),
            (true, false) => runs(&self.known, within),
            (false, true) => runs(&self.in_doubt, within),
            (true, true) => runs(&(self.known.clone() | &self.in_doubt), within),
        }
    }

    /// Gives what was written of `within`, in order, and forgets it, except what is in doubt.
    pub(super) fn take(&mut self, within: Extent) -> Vec<Extent> {
        let taken = self.known(within);
        if self.any_known {
            slice(&mut self.known, within).fill(false);
            self.any_known = self.known.any();
        }
        if let Some(kept) = &mut self.taken {
            taken.iter().for_each(|extent| slice(kept, *extent).fill(true));
        }
        taken
    }

    pub(super) fn heap_bytes(&self) -> usize {
        (self.known.capacity() + self.in_doubt.capacity() + self.taken.as_ref().map_or(0, Plane::capacity)) / 8
    }
}

/// The set bits of `within` as extents.
fn runs(plane: &Plane, within: Extent) -> Vec<Extent> {
    let (mut at, end) = (index(within.first()), index(within.end()).min(plane.len()));
    let mut found = Vec::new();
    while let Some(skip) = plane.get(at..end).and_then(|rest| rest.first_one()) {
        let first = at + skip;
        at = plane[first..end].first_zero().map_or(end, |len| first + len);
        found.push(Extent::between(first as u64, at as u64));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeSet;

    const PAGES: u64 = 200;

    #[derive(Clone, Debug)]
    enum Op {
        Wrote(Extent),
        Doubt(Extent),
        NoDoubt(Extent),
        Take(Extent),
    }

    fn op() -> impl Strategy<Value = Op> {
        let extent = (0..PAGES, 0u64..80).prop_map(|(first, count)| Extent::between(first, (first + count).min(PAGES)));
        (0..4, extent).prop_map(|(kind, extent)| match kind {
            0 => Op::Wrote(extent),
            1 => Op::Doubt(extent),
            2 => Op::NoDoubt(extent),
            _ => Op::Take(extent),
        })
    }

    #[test]
    fn a_page_is_clean_when_what_was_taken_of_it_is_settled_and_nothing_was_written_since() {
        let mut written = Written::new(4);
        assert!(!written.is_clean(0));
        written.keep_taken();
        assert!(written.is_clean(0));
        written.wrote(Extent::between(0, 2));
        let taken = written.take(Extent::between(0, 4));
        assert_eq!((taken.len(), written.is_clean(0), written.dirty_pages()), (1, false, 2));
        written.wrote(Extent::page(1));
        written.settled(taken[0]);
        assert_eq!([0, 1, 2].map(|page| written.is_clean(page)), [true, false, true]);
        written.doubt(Extent::page(2));
        assert_eq!((written.is_clean(2), written.dirty_pages()), (false, 2));
    }

    proptest! {
        #[test]
        fn a_page_leaves_only_by_being_taken(ops in vec(op(), 0..60)) {
            let mut written = Written::new(PAGES);
            let (mut known, mut doubtful) = (BTreeSet::new(), BTreeSet::new());
            for op in ops {
                match op {
                    Op::Wrote(extent) => {
                        written.wrote(extent);
                        known.extend(extent.pages());
                    }
                    Op::Doubt(extent) => {
                        written.doubt(extent);
                        doubtful.extend(extent.pages());
                    }
                    Op::NoDoubt(extent) => {
                        written.no_doubt(extent);
                        doubtful.retain(|page| !extent.contains(*page));
                    }
                    Op::Take(within) => {
                        let taken: Vec<u64> = written.take(within).into_iter().flat_map(Extent::pages).collect();
                        let expected: Vec<u64> = known.union(&doubtful).copied().filter(|page| within.contains(*page)).collect();
                        prop_assert_eq!(taken, expected);
                        known.retain(|page| !within.contains(*page));
                    }
                }
            }
        }
    }
}
