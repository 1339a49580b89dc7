//! Decisions: which pages of a region the destination lacks, and in which order they go.
//!
//! Role: the memory of copying. Neighbours: `copy` holds one for each region, adds what trackers tell and takes what is sent next. Invariants: a page is owed until it is
//! taken here, and again when it is written after that; it is given at most once for each time that it was written; four bytes a page.
//!
//! While the program runs, the pages that were written longest ago go first: what is written all the time is sent once, at the end. Once it is paused nothing is
//! written any more, and those that were written last go first: the program is about to touch them. What it does touch is a better guide: near that, pages go by number.

use crate::Extent;
use std::collections::VecDeque;

/// Counts how often trackers were asked; from 1.
pub(super) type Tick = u32;

/// See the module header.
#[derive(Clone, Debug)]
pub(super) struct Owed {
    /// By page: when it was written last, 0 if the destination has it.
    written: Vec<Tick>,
    /// What was written when, oldest first. A page counts where its own tick stands.
    queue: VecDeque<(Tick, VecDeque<Extent>)>,
    pages: u64,
}

impl Owed {
    /// All of a region, as if written at `now`.
    pub(super) fn all(region: Extent, now: Tick) -> Owed {
        #[allow(clippy::cast_possible_truncation, reason = "pages of mapped memory fit usize")]
        let mut owed = Owed { written: vec![0; region.end() as usize], queue: VecDeque::new(), pages: 0 };
        owed.wrote(now, &[region]);
        owed
    }

    /// These pages were written before `now`, which never runs back.
    pub(super) fn wrote(&mut self, now: Tick, extents: &[Extent]) {
        for page in extents.iter().flat_map(|extent| extent.pages()) {
            let written = &mut self.written[index(page)];
            self.pages += u64::from(*written == 0);
            *written = now;
        }
        if !extents.is_empty() {
            self.queue.push_back((now, extents.iter().copied().collect()));
        }
    }

    /// How many pages are owed.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// When the page that waits longest was written.
    pub(super) fn oldest(&mut self) -> Option<Tick> {
        self.trim(true).map(|(tick, _)| tick)
    }

    /// When the page that was written last was.
    pub(super) fn newest(&mut self) -> Option<Tick> {
        self.trim(false).map(|(tick, _)| tick)
    }

    /// Takes up to `limit_pages` of those that were written longest ago, or last.
    pub(super) fn take(&mut self, limit_pages: u64, oldest_first: bool) -> Vec<Extent> {
        let (mut taken, mut left) = (Vec::new(), limit_pages);
        while left > 0
            && let Some((_, extent)) = self.trim(oldest_first)
        {
            let extent = Extent::between(extent.first(), extent.end().min(extent.first().saturating_add(left)));
            left -= extent.count();
            self.pages -= extent.count();
            extent.pages().for_each(|page| self.written[index(page)] = 0);
            taken.push(extent);
        }
        taken
    }

    /// Takes up to `limit_pages` of those from page `first` on, by number; and from which page to go on.
    pub(super) fn take_from(&mut self, first: u64, limit_pages: u64) -> (Vec<Extent>, u64) {
        let (mut taken, mut left, mut at) = (Vec::<Extent>::new(), limit_pages, first);
        while left > 0
            && let Some(written) = self.written.get_mut(index(at))
        {
            if std::mem::take(written) != 0 {
                (self.pages, left) = (self.pages - 1, left - 1);
                match taken.last_mut() {
                    Some(last) if last.end() == at => *last = Extent::between(last.first(), at + 1),
                    _ => taken.push(Extent::page(at)),
                }
            }
            at += 1;
        }
        (taken, at)
    }

    /// Every page that is owed, by number.
    pub(super) fn extents(&self) -> Vec<Extent> {
        let mut extents: Vec<Extent> = Vec::new();
        let owed = (0..).zip(&self.written).filter(|(_, written)| **written != 0);
        for (page, _) in owed {
            match extents.last_mut() {
                Some(last) if last.end() == page => *last = Extent::between(last.first(), page + 1),
                _ => extents.push(Extent::page(page)),
            }
        }
        extents
    }

    /// The next to go, with what does not count any more dropped in front of it.
    fn trim(&mut self, oldest_first: bool) -> Option<(Tick, Extent)> {
        loop {
            let end = if oldest_first { self.queue.front_mut() } else { self.queue.back_mut() };
            let (tick, extents) = end?;
            let Some(extent) = extents.front_mut() else {
                if oldest_first {
                    self.queue.pop_front()
                } else {
                    self.queue.pop_back()
                };
                continue;
            };
            let counts = |page: &u64| self.written[index(*page)] == *tick;
            let Some(first) = extent.pages().find(counts) else {
                extents.pop_front();
                continue;
            };
            *extent = Extent::between(first, extent.end());
            let end = (first..extent.end()).find(|page| !counts(page)).unwrap_or(extent.end());
            return Some((*tick, Extent::between(first, end)));
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "pages of mapped memory fit usize")]
fn index(page: u64) -> usize {
    page as usize
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::collections::BTreeMap;

    const PAGES: u64 = 60;

    #[test]
    fn what_is_written_all_the_time_goes_last_and_once() {
        let mut owed = Owed::all(Extent::between(0, 6), 1);
        owed.wrote(2, &[Extent::page(1), Extent::page(4)]);
        assert_eq!(owed.take(2, true), [Extent::page(0), Extent::page(2)]);
        owed.wrote(3, &[Extent::page(1)]);
        assert_eq!(owed.oldest(), Some(1));
        assert_eq!(owed.take(10, true), [Extent::page(3), Extent::page(5), Extent::page(4), Extent::page(1)]);
        assert_eq!((owed.pages(), owed.oldest()), (0, None));
    }

    #[test]
    fn once_nothing_is_written_any_more_the_hottest_go_first() {
        let mut owed = Owed::all(Extent::between(0, 6), 1);
        owed.wrote(2, &[Extent::between(2, 4)]);
        assert_eq!(owed.newest(), Some(2));
        assert_eq!(owed.take(3, false), [Extent::between(2, 4), Extent::page(0)]);
        assert_eq!(owed.extents(), [Extent::page(1), Extent::between(4, 6)]);
    }

    proptest! {
        /// Beside a map from page to tick.
        #[test]
        fn a_page_is_owed_until_it_is_taken_and_goes_in_the_order_of_its_last_write(
            ops in vec((0u8..4, 0..PAGES, 1u64..30), 1..60)
        ) {
            let mut owed = Owed::all(Extent::between(0, PAGES), 1);
            let mut model: BTreeMap<u64, Tick> = (0..PAGES).map(|page| (page, 1)).collect();
            let mut now = 1;
            for (op, first, count) in ops {
                if op == 0 {
                    now += 1;
                    let extent = Extent::between(first, (first + count).min(PAGES));
                    owed.wrote(now, &[extent]);
                    model.extend(extent.pages().map(|page| (page, now)));
                } else if op == 3 {
                    let (taken, next) = owed.take_from(first, count);
                    let taken: Vec<u64> = taken.into_iter().flat_map(Extent::pages).collect();
                    let expected: Vec<u64> = model.range(first..).map(|(page, _)| *page).take(index(count)).collect();
                    prop_assert!(taken.len() < index(count) || taken.last() == Some(&(next - 1)));
                    prop_assert_eq!(&taken, &expected);
                    model.retain(|page, _| !taken.contains(page));
                } else {
                    let taken: Vec<u64> = owed.take(count, op == 1).into_iter().flat_map(Extent::pages).collect();
                    prop_assert_eq!(taken.len() as u64, count.min(model.len() as u64));
                    let ticks: Vec<Tick> = taken.iter().map(|page| model.remove(page).expect("it was owed, once")).collect();
                    let (least, most) = (model.values().min().copied(), model.values().max().copied());
                    if op == 1 {
                        prop_assert!(ticks.is_sorted() && ticks.last().zip(least.as_ref()).is_none_or(|(last, least)| last <= least));
                    } else {
                        prop_assert!(ticks.iter().rev().is_sorted());
                        prop_assert!(ticks.last().zip(most.as_ref()).is_none_or(|(last, most)| last >= most));
                    }
                }
                prop_assert_eq!(owed.pages(), model.len() as u64);
                prop_assert_eq!(owed.oldest(), model.values().min().copied());
                prop_assert_eq!(owed.newest(), model.values().max().copied());
                let extents: Vec<u64> = owed.extents().into_iter().flat_map(Extent::pages).collect();
                prop_assert_eq!(extents, model.keys().copied().collect::<Vec<_>>());
            }
        }
    }
}
