//! What the pages of a frozen region held at the moment when it was frozen.
//!
//! Role: the memory of copying before writing. Neighbours: `freezing` alone holds one for each region that is frozen, and reads and protects pages as it says. Invariants: a page is decided
//! once: saved, zeros, lost or released; until then the region itself holds what it held at the moment, and a write of it has to wait. Three bits a page, beside the bytes that
//! were saved.

use super::residency::{Plane, index, slice};
use crate::Extent;
use bitvec::prelude::BitVec;
use bytes::Bytes;
use std::collections::BTreeMap;

/// See the module header.
#[derive(Clone, Debug)]
pub(super) struct Moment {
    /// The region need not hold the content any more.
    decided: Plane,
    lost: Plane,
    released: Plane,
    /// Of decided pages; one that is in none of these holds zeros.
    saved: BTreeMap<u64, Bytes>,
    saved_bytes: u64,
    /// Pages that were copied before they were written or discarded, in all.
    saved_pages: u64,
}

/// Why the content of pages cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Gone {
    /// The program took the memory away.
    Lost,
    /// The reader said that it is done with them.
    Released,
}

/// Pages whose content is not what the region holds now: their bytes, or zeros.
pub(crate) type Kept = Vec<(u64, Option<Bytes>)>;

impl Moment {
    pub(super) fn new(pages: u64) -> Moment {
        let none: Plane = BitVec::repeat(false, index(pages));
        Moment { decided: none.clone(), lost: none.clone(), released: none, saved: BTreeMap::new(), saved_bytes: 0, saved_pages: 0 }
    }

    /// Whether a write of the page may go on.
    pub(super) fn is_decided(&self, page: u64) -> bool {
        self.decided.get(index(page)).is_none_or(|decided| *decided)
    }

    /// What the region itself holds still, in order.
    pub(super) fn undecided(&self, within: Extent) -> Vec<Extent> {
        let (mut at, end) = (index(within.first()), index(within.end()).min(self.decided.len()));
        let mut found = Vec::new();
        while let Some(skip) = self.decided.get(at..end).and_then(|rest| rest.first_zero()) {
            let first = at + skip;
            at = self.decided[first..end].first_one().map_or(end, |len| first + len);
            found.push(Extent::between(first as u64, at as u64));
        }
        found
    }

    /// Keeps the content of a page, unless it is decided.
    pub(super) fn save(&mut self, page: u64, bytes: Bytes) {
        if self.is_decided(page) {
            return;
        }
        self.decided.set(index(page), true);
        self.saved_pages += 1;
        if !is_zero(&bytes) {
            self.saved_bytes += bytes.len() as u64;
            self.saved.insert(page, bytes);
        }
    }

    /// These pages held zeros, as far as they are not decided.
    pub(super) fn zeros(&mut self, extent: Extent) {
        slice(&mut self.decided, extent).fill(true);
    }

    /// What these pages held is not known any more, as far as they are not decided.
    pub(super) fn lose(&mut self, extent: Extent) {
        for lost in self.undecided(extent) {
            slice(&mut self.lost, lost).fill(true);
            slice(&mut self.decided, lost).fill(true);
        }
    }

    /// Nobody will ask for these pages again.
    pub(super) fn release(&mut self, extent: Extent) {
        slice(&mut self.released, extent).fill(true);
        slice(&mut self.decided, extent).fill(true);
        let pages: Vec<u64> = self.saved.range(extent.pages()).map(|(page, _)| *page).collect();
        for page in pages {
            self.saved_bytes -= self.saved.remove(&page).map_or(0, |bytes| bytes.len() as u64);
        }
    }

    /// The pages whose content is not what the region holds now; an error with the first whose content cannot be had.
    pub(super) fn look(&self, within: Extent) -> Result<Kept, (Extent, Gone)> {
        let mut kept = Kept::new();
        for page in within.pages() {
            let at = index(page);
            if !self.decided[at] {
                continue;
            }
            for (plane, gone) in [(&self.released, Gone::Released), (&self.lost, Gone::Lost)] {
                if plane[at] {
                    let end = plane[at..index(within.end())].first_zero().map_or(within.end(), |len| page + len as u64);
                    return Err((Extent::between(page, end), gone));
                }
            }
            kept.push((page, self.saved.get(&page).cloned()));
        }
        Ok(kept)
    }

    /// Bytes of pages that are kept now.
    pub(super) fn saved_bytes(&self) -> u64 {
        self.saved_bytes
    }

    /// Pages that were copied before they were written or discarded, in all.
    pub(super) fn saved_pages(&self) -> u64 {
        self.saved_pages
    }

    #[allow(clippy::cast_possible_truncation, reason = "bytes in memory fit usize")]
    pub(super) fn heap_bytes(&self) -> usize {
        let planes: usize = [&self.decided, &self.lost, &self.released].iter().map(|plane| plane.capacity() / 8).sum();
        planes + self.saved_bytes as usize + self.saved.len() * size_of::<(u64, Bytes)>()
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    // Without a branch inside a part, so that the compiler makes vector instructions of it.
    bytes.chunks(512).all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    const PAGES: u64 = 100;

    #[derive(Clone, Debug)]
    enum Op {
        Save(u64, u8),
        Zeros(Extent),
        Lose(Extent),
        Release(Extent),
    }

    fn op() -> impl Strategy<Value = Op> {
        let extent = (0..PAGES, 0u64..40).prop_map(|(first, count)| Extent::between(first, (first + count).min(PAGES)));
        (0..6, extent, 0u8..3).prop_map(|(kind, extent, byte)| match kind {
            0..3 => Op::Save(extent.first(), byte),
            3 => Op::Zeros(extent),
            4 => Op::Lose(extent),
            _ => Op::Release(extent),
        })
    }

    #[derive(Clone, Copy, PartialEq, Debug)]
    enum Page {
        InPlace,
        Holds(u8),
        Gone(Gone),
    }

    proptest! {
        #[test]
        fn a_page_is_decided_once_and_only_a_release_undoes_that(ops in vec(op(), 0..60)) {
            let mut moment = Moment::new(PAGES);
            let mut model = [Page::InPlace; PAGES as usize];
            for op in ops {
                let (extent, becomes) = match op {
                    Op::Save(page, byte) => {
                        moment.save(page, Bytes::from(vec![byte; 16]));
                        (Extent::page(page), Page::Holds(byte))
                    }
                    Op::Zeros(extent) => {
                        moment.zeros(extent);
                        (extent, Page::Holds(0))
                    }
                    Op::Lose(extent) => {
                        moment.lose(extent);
                        (extent, Page::Gone(Gone::Lost))
                    }
                    Op::Release(extent) => {
                        moment.release(extent);
                        model[index(extent.first())..index(extent.end())].fill(Page::Gone(Gone::Released));
                        continue;
                    }
                };
                for page in extent.pages().map(index) {
                    if model[page] == Page::InPlace {
                        model[page] = becomes;
                    }
                }
            }
            for (page, expected) in (0..).zip(model) {
                let found = match moment.look(Extent::page(page)) {
                    Err((_, gone)) => Page::Gone(gone),
                    Ok(kept) => kept.first().map_or(Page::InPlace, |(_, bytes)| Page::Holds(bytes.as_ref().map_or(0, |bytes| bytes[0]))),
                };
                prop_assert_eq!(found, expected, "page {}", page);
                prop_assert_eq!(moment.is_decided(page), expected != Page::InPlace);
            }
            let undecided: Vec<u64> = moment.undecided(Extent::between(0, PAGES)).into_iter().flat_map(Extent::pages).collect();
            let expected: Vec<u64> = (0..PAGES).filter(|page| model[index(*page)] == Page::InPlace).collect();
            prop_assert_eq!(undecided, expected);
            let kept = model.iter().filter(|page| matches!(page, Page::Holds(1..))).count() as u64;
            prop_assert_eq!(moment.saved_bytes(), kept * 16);
        }
    }
}
