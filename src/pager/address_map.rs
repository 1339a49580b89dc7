//! Where in this process the pages of regions are.
//!
//! Role: hop *fault*: address -> region and page; hop *install*: page -> address. Neighbours: `engine` changes it as UNMAP and REMAP
//! messages tell. Invariants: segments do not overlap, are whole pages, and no two of one region show the same page.

use crate::{Extent, PageSize};
use std::collections::BTreeMap;

/// Names a region of one pager; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct RegionId(pub(crate) u64);

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct AddressMap {
    page: PageSize,
    /// Start address -> what is there.
    segments: BTreeMap<u64, Segment>,
    /// The same the other way round: region and first page -> start address.
    places: BTreeMap<(RegionId, u64), u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) region: RegionId,
    pub(crate) extent: Extent,
}

impl AddressMap {
    pub(crate) fn new(page: PageSize) -> AddressMap {
        AddressMap { page, segments: BTreeMap::new(), places: BTreeMap::new() }
    }

    pub(crate) fn insert(&mut self, start: u64, segment: Segment) {
        self.remove(start, segment.extent.bytes(self.page));
        self.put(start, segment);
    }

    fn put(&mut self, at: u64, segment: Segment) {
        self.segments.insert(at, segment);
        self.places.insert((segment.region, segment.extent.first()), at);
    }

    /// The region and page at `address`.
    pub(crate) fn find(&self, address: u64) -> Option<(RegionId, u64)> {
        let (start, segment) = self.segments.range(..=address).next_back()?;
        let page = segment.extent.first() + self.page.page_of(address - start);
        segment.extent.contains(page).then_some((segment.region, page))
    }

    /// What stands in `len` bytes from `start`, cut to them, in address order.
    pub(crate) fn within(&self, start: u64, len: u64) -> Vec<(u64, Segment)> {
        let end = start.saturating_add(len);
        // Segments do not overlap each other, so only one can reach in from before.
        let before = self.segments.range(..start).next_back();
        let touched = before.into_iter().chain(self.segments.range(start..end));
        let cut = touched.filter_map(|(at, segment)| {
            let first = segment.extent.first() + self.page.pages_for(start.saturating_sub(*at));
            let past = segment.extent.first() + self.page.page_of(end - at);
            let extent = Extent::between(first, past).intersect(segment.extent)?;
            let address = at + self.page.offset_of(extent.first() - segment.extent.first());
            Some((address, Segment { extent, ..*segment }))
        });
        cut.collect()
    }

    /// Forgets `len` bytes from `start`; returns what was there, in address order.
    pub(crate) fn remove(&mut self, start: u64, len: u64) -> Vec<(u64, Segment)> {
        let cuts = self.within(start, len);
        for (address, cut) in &cuts {
            let Some((at, segment)) = self.segments.range(..=*address).next_back().map(|(at, segment)| (*at, *segment)) else {
                continue;
            };
            self.segments.remove(&at);
            self.places.remove(&(segment.region, segment.extent.first()));
            let before = Extent::between(segment.extent.first(), cut.extent.first());
            let after = Extent::between(cut.extent.end(), segment.extent.end());
            for keep in [before, after].into_iter().filter(|keep| !keep.is_empty()) {
                let address = at + self.page.offset_of(keep.first() - segment.extent.first());
                self.put(address, Segment { extent: keep, ..segment });
            }
        }
        cuts
    }

    /// `mremap(2)` moved `len` bytes.
    pub(crate) fn relocate(&mut self, from: u64, to: u64, len: u64) {
        for (at, segment) in self.remove(from, len) {
            self.insert(to + (at - from), segment);
        }
    }

    /// Where the pages of `extent` of a region are now: pieces with their addresses, in page order. Pages that are mapped nowhere
    /// are left out.
    pub(crate) fn locate(&self, region: RegionId, extent: Extent) -> Vec<(u64, Extent)> {
        let before = self.places.range((region, 0)..=(region, extent.first())).next_back();
        let after = self.places.range((region, extent.first() + 1)..(region, extent.end().max(extent.first() + 1)));
        let pieces = before.into_iter().chain(after).filter_map(|(_, at)| {
            let segment = self.segments.get(at)?;
            let both = segment.extent.intersect(extent)?;
            Some((at + self.page.offset_of(both.first() - segment.extent.first()), both))
        });
        pieces.collect()
    }

    pub(crate) fn remove_region(&mut self, region: RegionId) {
        self.segments.retain(|_, segment| segment.region != region);
        self.places.retain(|(owner, _), _| *owner != region);
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = (u64, Segment)> + '_ {
        self.segments.iter().map(|(at, segment)| (*at, *segment))
    }
}

#[cfg(test)]
mod tests {
    use super::super::model::{AddressOp, try_address_map};
    use proptest::{collection::vec, prelude::*};

    proptest! {
        #[test]
        fn cutting_and_moving_agree_with_a_map_of_single_pages(ops in vec(any::<[u8; 4]>().prop_map(AddressOp::of), 0..12)) {
            let tried = try_address_map(&ops);
            prop_assert!(tried.is_ok(), "{}", tried.unwrap_err());
        }
    }
}
