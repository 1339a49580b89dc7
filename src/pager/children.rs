//! What becomes of the copies of regions that forked children get.
//!
//! Role: a child inherits a region only if somebody undid `MADV_DONTFORK`; its missing pages never come, so they are poisoned. Neighbours: `engine` brings the message about
//! a child, `place` lets it be tried again; `install` makes the calls. Invariants: runs under the pager's lock; a child's descriptor closes only when nothing can
//! read as zeros there that should be data (S1); until then its messages are read, so that the child can fork in its turn.

use super::{
    engine::{Engine, State},
    install::{Fill, fill},
    place::{Owned, page_len},
};
use crate::{
    PageSize,
    sys::{Features, Message, Userfault},
};

/// A child of which pages are not poisoned yet.
pub(super) struct Child {
    uffd: Userfault,
    /// Addresses and lengths.
    missing: Vec<(usize, usize)>,
}

#[derive(Default)]
pub(super) struct Children {
    unsettled: Vec<Child>,
    /// Those whose missing pages this kernel cannot poison: closing their descriptors would show zeros.
    kept: Vec<Userfault>,
}

impl Children {
    pub(super) fn all_settled(&self) -> bool {
        self.unsettled.is_empty()
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        // They stay open for as long as the process lives.
        std::mem::forget((std::mem::take(&mut self.unsettled), std::mem::take(&mut self.kept)));
    }
}

impl Engine {
    /// A child got a copy of the memory. What was lost before is poisoned there already: fork(2) copies the marks.
    pub(super) fn forked(&self, state: &mut State, child: Userfault) {
        let missing = self.missing_in_a_child(state);
        state.children.unsettled.push(Child { uffd: child, missing });
        self.settle_children(state);
        if !state.children.all_settled() {
            self.settle.notify_one();
        }
    }

    /// What a child made just now may miss. No page was filled here since: the kernel refuses that until the message about the child is read, and
    /// [`Userfault`] until it is taken.
    fn missing_in_a_child(&self, state: &State) -> Vec<(usize, usize)> {
        let mut missing: Vec<(u64, u64)> = Vec::new();
        for (at, segment) in state.map.segments() {
            match state.regions.get(&segment.region) {
                Some(entry) => {
                    // Pages that are leaving may be gone, and count as here until somebody says so. Poison leaves alone what is present.
                    let leaving = entry.core.budget().map(|budget| budget.leaving(segment.extent));
                    let extents = entry.residency().missing(segment.extent).chain(leaving.into_iter().flatten());
                    missing.extend(extents.map(|extent| {
                        let address = at + self.page.offset_of(extent.first() - segment.extent.first());
                        (address, extent.count())
                    }));
                }
                // The region is leaving, and what it missed is not known any more.
                None => missing.push((at, segment.extent.count())),
            }
        }
        // Lost, but the kernel has put the mark off.
        missing.extend(state.again.iter().filter(|again| matches!(again.what, Owned::Poison)).flat_map(|again| {
            let pieces = again.region.map(|id| state.map.locate(id, again.extent));
            pieces
                .unwrap_or_else(|| vec![(again.address as u64, again.extent)])
                .into_iter()
                .map(|(at, extent)| (at, extent.count()))
        }));
        #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
        missing.into_iter().map(|(address, pages)| (address as usize, page_len(self.page, pages))).collect()
    }

    /// Poisons what can be poisoned now.
    pub(super) fn settle_children(&self, state: &mut State) {
        let poisons = self.uffd.features().contains(Features::POISON);
        let mut to_do = std::mem::take(&mut state.children.unsettled);
        while let Some(mut child) = to_do.pop() {
            let settled = if poisons { child.settle(self.page, &mut to_do) } else { Err(()) };
            match settled {
                Ok(true) => {}
                Ok(false) => state.children.unsettled.push(child),
                Err(()) => {
                    // Its threads then wait for ever, which is bad, but nobody reads a zero that should be data.
                    tracing::error!("pages that a forked child misses cannot be poisoned; its descriptor stays open");
                    state.children.kept.push(child.uffd);
                }
            }
        }
    }
}

impl Child {
    /// Whether all is poisoned, or rather the kernel puts it off; an error if it refuses. Children of the child are added to `children`.
    fn settle(&mut self, page: PageSize, children: &mut Vec<Child>) -> Result<bool, ()> {
        let mut messages = Vec::new();
        if let Err(error) = self.uffd.read_all(&mut messages) {
            tracing::warn!(%error, "reading a forked child's messages failed");
        }
        for message in messages {
            match message {
                // It was made with what is missing now, for nothing can be poisoned between that and the reading of this message.
                Message::Fork { child } => children.push(Child { uffd: self.uffd.of_child(child), missing: self.missing.clone() }),
                Message::Remap { from, to, len } => self.missing = moved(&self.missing, from, to, len),
                // Poison wakes who waits; it does not come where nothing is mapped any more, and on what was discarded it does no harm (S1).
                Message::Fault { .. } | Message::Write { .. } | Message::Remove { .. } | Message::Unmap { .. } => {}
            }
        }
        while let Some((address, len)) = self.missing.pop() {
            let filled = fill(&self.uffd, page, address, Fill::Poison(len));
            tracing::debug!(?filled, address, len, "poisoned what a forked child misses");
            if filled.failed.is_some() {
                return Err(());
            }
            if let Some(from) = filled.again_from {
                self.missing.push((address + from, len - from));
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// The addresses and lengths of what is missing after the child moved a part of its memory.
fn moved(missing: &[(usize, usize)], from: usize, to: usize, len: usize) -> Vec<(usize, usize)> {
    let pieces = missing.iter().flat_map(|&(start, len_missing)| {
        let end = start + len_missing;
        let (inner, inner_end) = (start.clamp(from, from + len), end.clamp(from, from + len));
        [(start, end.min(from)), (inner - from + to, inner_end - from + to), (start.max(from + len), end)]
    });
    pieces.filter(|(start, end)| start < end).map(|(start, end)| (start, end - start)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_child_moves_is_poisoned_where_it_is() {
        let mut missing = moved(&[(0x1000, 0x4000), (0x8000, 0x1000)], 0x2000, 0x10000, 0x2000);
        missing.sort_unstable();
        assert_eq!(missing, [(0x1000, 0x1000), (0x4000, 0x1000), (0x8000, 0x1000), (0x10000, 0x2000)]);
        missing = moved(&missing, 0, 0x20000, 0x9000);
        missing.sort_unstable();
        assert_eq!(missing, [(0x10000, 0x2000), (0x21000, 0x1000), (0x24000, 0x1000), (0x28000, 0x1000)]);
    }
}
