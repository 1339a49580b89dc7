//! Which pages are in which state, as few intervals.
//!
//! Role: what a cache knows of its pages, and what its journal says of them, are [`Spans`] of different states. Neighbours: `journal`
//! replays records into one, `cache::shared` keeps another. Invariants: pure; spans are not empty, do not overlap, and neighbours of
//! one state are one span; a page in no span has no state.

use crate::Extent;
use std::collections::BTreeMap;

/// Intervals of pages, each with a state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spans<T> {
    /// By first page: one past the last, and the state.
    spans: BTreeMap<u64, (u64, T)>,
}

impl<T> Default for Spans<T> {
    fn default() -> Spans<T> {
        Spans { spans: BTreeMap::new() }
    }
}

impl<T: Copy + Eq> Spans<T> {
    /// Gives every page of `extent` a state, or none.
    pub(super) fn set(&mut self, extent: Extent, state: Option<T>) {
        if extent.is_empty() {
            return;
        }
        let (mut first, mut end) = (extent.first(), extent.end());
        // One that begins before and reaches in is cut; all that begin inside are cut or go.
        if let Some((&before, &(before_end, was))) = self.spans.range(..first).next_back()
            && before_end > first
        {
            self.spans.insert(before, (first, was));
            if before_end > end {
                self.spans.insert(end, (before_end, was));
            }
        }
        let inside: Vec<u64> = self.spans.range(first..end).map(|(start, _)| *start).collect();
        for start in inside {
            if let Some((inner_end, was)) = self.spans.remove(&start)
                && inner_end > end
            {
                self.spans.insert(end, (inner_end, was));
            }
        }
        let Some(state) = state else { return };
        if let Some((&before, &(before_end, was))) = self.spans.range(..first).next_back()
            && before_end == first
            && was == state
        {
            self.spans.remove(&before);
            first = before;
        }
        if let Some(&(after_end, was)) = self.spans.get(&end)
            && was == state
        {
            self.spans.remove(&end);
            end = after_end;
        }
        self.spans.insert(first, (end, state));
    }

    /// Pieces of `extent` in order and without gaps, each with its state.
    pub(super) fn within(&self, extent: Extent) -> Vec<(Extent, Option<T>)> {
        let mut pieces = Vec::new();
        let mut at = extent.first();
        let begin = self.spans.range(..=at).next_back().map_or(at, |(start, _)| *start);
        for (&start, &(end, state)) in self.spans.range(begin..extent.end()) {
            let Some(piece) = Extent::between(start, end).intersect(extent) else { continue };
            if at < piece.first() {
                pieces.push((Extent::between(at, piece.first()), None));
            }
            pieces.push((piece, Some(state)));
            at = piece.end();
        }
        if at < extent.end() {
            pieces.push((Extent::between(at, extent.end()), None));
        }
        pieces
    }

    /// Gives each page of `extent` the state that `next` makes of its own, and returns the pieces that were changed, with what they were.
    pub(super) fn change(&mut self, extent: Extent, next: impl Fn(Option<T>) -> Option<T>) -> Vec<(Extent, Option<T>)> {
        let mut changed = self.within(extent);
        changed.retain(|(_, was)| next(*was) != *was);
        for (piece, was) in &changed {
            self.set(*piece, next(*was));
        }
        changed
    }

    /// All spans, in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = (Extent, T)> {
        self.spans.iter().map(|(first, (end, state))| (Extent::between(*first, *end), *state))
    }

    /// How many pages are in a state that `counts`.
    pub(super) fn pages(&self, counts: impl Fn(T) -> bool) -> u64 {
        self.iter().filter(|(_, state)| counts(*state)).map(|(extent, _)| extent.count()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 40;

    proptest! {
        #[test]
        fn they_agree_with_an_array_and_stay_few(
            steps in prop::collection::vec((0..PAGES, 0..PAGES, prop::option::of(0u8..3), any::<bool>()), 0..40),
        ) {
            let (mut spans, mut model) = (Spans::default(), [None; PAGES as usize]);
            for (first, end, state, change) in steps {
                let extent = Extent::between(first, end);
                // A change of those that are in one state only, or a plain set.
                let next = |was: Option<u8>| if change && was != Some(1) { was } else { state };
                if change { spans.change(extent, next); } else { spans.set(extent, state); }
                for page in extent.pages() { model[page as usize] = next(model[page as usize]); }
                let pieces = spans.within(Extent::between(0, PAGES));
                let ours: Vec<Option<u8>> = pieces.iter().flat_map(|(piece, state)| piece.pages().map(|_| *state)).collect();
                prop_assert_eq!(&ours[..], &model[..]);
                prop_assert!(pieces.windows(2).all(|pair| pair[0].1 != pair[1].1), "neighbours of one state: {:?}", pieces);
                let clipped = spans.within(extent);
                let clipped: Vec<Option<u8>> = clipped.iter().flat_map(|(piece, state)| piece.pages().map(|_| *state)).collect();
                prop_assert_eq!(&clipped[..], &model[extent.first() as usize..extent.end().max(extent.first()) as usize]);
                let held = model.iter().filter(|state| state.is_some()).count() as u64;
                prop_assert_eq!(spans.pages(|_| true), held);
            }
        }
    }
}
