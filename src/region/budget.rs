//! Drops pages of a region that has a budget.
//!
//! Role: makes the system calls that `pager::evict` decides on. Neighbours: the mount's own thread calls it. Invariants: the region lives for as long as the call, so no page of another mapping is
//! dropped; never called on the pager's thread, which madvise(2) waits for (S2).

use super::Region;
use crate::{
    Extent,
    pager::{Bell, Fill, Need},
};
use std::sync::Arc;

/// What a step towards a budget came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Enough,
    Dropped,
    Later,
    Stuck,
}

impl Region {
    /// Bounds what is here, before anything is.
    pub(crate) fn set_budget(&self, limit_pages: u64, bell: Arc<Bell>) {
        if let Some(paged) = self.paged() {
            paged.pager.engine().set_budget(paged.id, limit_pages, self.inner.read_only, bell);
        }
    }

    pub(crate) fn end_budget(&self) {
        self.paged().inspect(|paged| paged.pager.engine().end_budget(paged.id));
    }

    pub(crate) fn lift_budget(&self, lifted: bool) {
        self.paged().inspect(|paged| paged.pager.engine().lift_budget(paged.id, lifted));
    }

    pub(crate) fn budget(&self) -> Option<Fill> {
        self.paged().and_then(|paged| paged.pager.engine().budget(paged.id))
    }

    /// Drops some pages, if too many are here.
    pub(crate) fn evict_some(&self) -> Step {
        let (Some(paged), mapping) = (self.paged(), self.mapping()) else { return Step::Enough };
        let engine = paged.pager.engine();
        let chosen = match engine.choose_evictions(paged.id, mapping.address()) {
            Need::Nothing => return Step::Enough,
            Need::Later => return Step::Later,
            Need::Stuck => return Step::Stuck,
            Need::Drop(chosen) => chosen,
        };
        let dropped = |extent: &Extent| {
            let len = usize::try_from(extent.bytes(self.page_size())).unwrap_or(usize::MAX);
            mapping.discard(self.page_size().offset_of(extent.first()), len).inspect_err(|error| {
                tracing::warn!(%error, %extent, region = self.name(), "pages could not be evicted");
            })
        };
        let kept: Vec<Extent> = chosen.iter().filter(|extent| dropped(extent).is_err()).copied().collect();
        engine.evicted(paged.id, mapping.address(), &chosen, &kept);
        if kept.len() == chosen.len() { Step::Stuck } else { Step::Dropped }
    }
}
