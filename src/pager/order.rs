//! Decisions: in which order a bulk read asks for what is missing, and how fast it may be.
//!
//! Role: part of hop *request* of the background pull. Neighbours: `fetch` asks it before each bulk read and after each run. Invariants: every missing page is asked for once
//! in each order; a bulk read lists no more extents than a peer takes at once, and the rest is for the next.

use crate::{Extent, PageSize, PullOrder, page_store::PULL_EXTENT_BYTES};
use std::time::{Duration, Instant};

/// A peer's frame takes 65536.
const LISTED_MAX: usize = 50_000;

/// What is missing, in the order in which it shall come; `missing` is in order, and no two of its extents touch.
pub(crate) fn ordered(missing: Vec<Extent>, order: &PullOrder, page: PageSize) -> Vec<Extent> {
    let mut listed = match order {
        PullOrder::Linear => missing,
        PullOrder::List(first) => {
            let mut left = missing;
            let mut listed: Vec<Extent> = Vec::new();
            for wanted in first {
                take_out(&mut left, *wanted, &mut listed);
            }
            listed.extend(left);
            listed
        }
        PullOrder::By(priority) => {
            let step = (PULL_EXTENT_BYTES / page.bytes()).max(1);
            let mut steps: Vec<Extent> = missing.into_iter().flat_map(|extent| extent.chunks(step)).collect();
            // Of equal priority, by number: the sort is stable.
            steps.sort_by_cached_key(|extent| std::cmp::Reverse(priority(*extent)));
            steps
        }
    };
    listed.truncate(LISTED_MAX);
    listed
}

/// Moves what `wanted` has of `left` to `taken`.
fn take_out(left: &mut Vec<Extent>, wanted: Extent, taken: &mut Vec<Extent>) {
    let from = left.partition_point(|extent| extent.end() <= wanted.first());
    let to = from + left[from..].partition_point(|extent| extent.first() < wanted.end());
    let mut rest = Vec::with_capacity(2);
    for extent in &left[from..to] {
        let (first, end) = (extent.first().max(wanted.first()), extent.end().min(wanted.end()));
        if first >= end {
            rest.push(*extent);
            continue;
        }
        taken.push(Extent::between(first, end));
        rest.push(Extent::between(extent.first(), first));
        rest.push(Extent::between(end, extent.end()));
    }
    rest.retain(|extent| !extent.is_empty());
    left.splice(from..to, rest);
}

/// Holds a bulk read to a rate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rate {
    bytes_s: Option<u64>,
    next: Instant,
}

/// A reader that was late by more than this does not make up for it.
const BURST: Duration = Duration::from_millis(50);

impl Rate {
    pub(crate) fn new(bytes_s: Option<u64>, now: Instant) -> Rate {
        Rate { bytes_s, next: now }
    }

    /// How long to wait, after so many bytes came, until more may be asked for.
    pub(crate) fn after(&mut self, bytes: u64, now: Instant) -> Duration {
        let Some(bytes_s) = self.bytes_s else { return Duration::ZERO };
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let takes = u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(bytes_s.max(1))).unwrap_or(u64::MAX);
        self.next = self.next.max(earliest) + Duration::from_nanos(takes);
        self.next.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};
    use std::{collections::BTreeSet, sync::Arc};

    fn runs(pages: &BTreeSet<u64>) -> Vec<Extent> {
        let mut runs: Vec<Extent> = Vec::new();
        for page in pages {
            match runs.last_mut() {
                Some(last) if last.end() == *page => *last = Extent::between(last.first(), page + 1),
                _ => runs.push(Extent::page(*page)),
            }
        }
        runs
    }

    fn pages(extents: &[Extent]) -> Vec<u64> {
        extents.iter().flat_map(|extent| extent.pages()).collect()
    }

    #[test]
    fn what_matters_most_comes_first() {
        let missing = vec![Extent::between(0, 200), Extent::between(300, 310)];
        let order =
            PullOrder::By(Arc::new(|extent: Extent| i64::from(extent.first() >= 128) * 2 + i64::from(extent.first() >= 300)));
        let listed = ordered(missing, &order, PageSize::KIB_4);
        assert_eq!(
            listed,
            [(300, 310), (128, 192), (192, 200), (0, 64), (64, 128)].map(|(first, end)| Extent::between(first, end))
        );
    }

    #[test]
    fn a_rate_is_held_and_a_pause_is_not_made_up_for() {
        let start = Instant::now();
        let mut rate = Rate::new(Some(1_000_000), start);
        let mut now = start;
        for _ in 0..100 {
            now += rate.after(10_000, now);
        }
        assert_eq!(now - start, Duration::from_secs(1));
        now += Duration::from_secs(60);
        let wait = rate.after(1_000_000, now);
        assert_eq!(wait, Duration::from_secs(1) - BURST);
        assert_eq!(Rate::new(None, start).after(u64::MAX, start), Duration::ZERO);
    }

    proptest! {
        /// Beside sets of pages.
        #[test]
        fn every_missing_page_is_asked_for_once_and_listed_pages_first(
            missing in proptest::collection::btree_set(0u64..200, 0..150),
            list in vec((0u64..200, 0u64..40), 0..12),
        ) {
            let list: Vec<Extent> = list.into_iter().map(|(first, count)| Extent::between(first, first + count)).collect();
            let listed = pages(&ordered(runs(&missing), &PullOrder::List(list.clone()), PageSize::KIB_4));
            let mut expected: Vec<u64> = Vec::new();
            let mut left = missing.clone();
            for page in pages(&list).into_iter().chain(0..200) {
                if left.remove(&page) {
                    expected.push(page);
                }
            }
            prop_assert_eq!(listed, expected);
            let linear = ordered(runs(&missing), &PullOrder::Linear, PageSize::KIB_4);
            prop_assert_eq!(linear, runs(&missing));
        }
    }
}
