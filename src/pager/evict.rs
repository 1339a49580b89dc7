//! Makes room in a region with a budget: lets clean pages go, to be asked for again when they are touched.
//!
//! Role: between `region`, which drops the pages, and `budget`, which chooses them. Neighbours: `engine` and `freezing` ask whether a page is leaving; `tracking` knows what is clean. Invariants:
//! S5: only a page whose writes are trapped, that was not written since the store said that it has it, is dropped, and from being chosen until it is dropped nobody writes it: whoever tries waits,
//! and then asks for it; S4: it is missing again, never discarded.
//!
//! The kernel tells the pager before it drops pages (`UFFD_EVENT_REMOVE`) and keeps madvise(2) waiting until the message is read, so the call is made on a thread that serves nobody.

use super::{
    address_map::RegionId,
    budget::Budget,
    engine::{Engine, Entry, State},
    place::page_len,
};
use crate::{Extent, stats::add};
use std::{
    sync::{Arc, Condvar, Mutex, PoisonError},
    time::Duration,
};

/// Wakes whoever makes room.
#[derive(Debug, Default)]
pub(crate) struct Bell {
    rung: Mutex<(bool, bool)>,
    told: Condvar,
}

impl Bell {
    pub(crate) fn ring(&self) {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner).0 = true;
        self.told.notify_one();
    }

    /// Ends every wait, now and later.
    pub(crate) fn end(&self) {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.told.notify_one();
    }

    /// Returns when it rings, or after `limit`; whether to go on.
    pub(crate) fn wait(&self, limit: Duration) -> bool {
        let rung = self.rung.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.told.wait_timeout_while(rung, limit, |(rung, ended)| !*rung && !*ended);
        let (mut rung, _) = waited.unwrap_or_else(PoisonError::into_inner);
        rung.0 = false;
        !rung.1
    }
}

/// What an entry has beside `core`'s budget.
pub(super) struct Evicting {
    bell: Arc<Bell>,
    /// No page of it is ever written.
    read_only: bool,
    ended: bool,
}

/// What there is to do for a region's budget.
#[derive(Debug)]
pub(crate) enum Need {
    /// As much is here as may be.
    Nothing,
    /// These were chosen: drop them and say [`Engine::evicted`].
    Drop(Vec<Extent>),
    /// Nothing can be dropped before the kernel has taken what it put off.
    Later,
    /// Nothing can be dropped: all of it was written or touched just now, or is kept by a freeze.
    Stuck,
}

/// How much of it is here.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fill {
    pub(crate) held_pages: u64,
    pub(crate) limit_pages: u64,
    /// Written and not known to be in the store.
    pub(crate) dirty_pages: u64,
    pub(crate) lifted: bool,
}

impl Fill {
    /// Where a pull ends.
    pub(crate) fn pull_pages(&self) -> u64 {
        Budget::low_of(self.limit_pages)
    }
}

/// Dropped together: about a millisecond, of which the pager's lock is held for a few microseconds.
const BATCH_PAGES: u64 = 64;
/// Looked at under one lock: 0.1 ms.
const LOOK_PAGES: u64 = 32 * 1024;

impl Entry {
    /// Has room made if much is here or on its way.
    pub(super) fn ring(&self) {
        if let Some(evicting) = &self.evicting
            && self.core.wants_eviction()
        {
            evicting.bell.ring();
        }
    }
}

impl Engine {
    /// Gives a region a budget, before anything of it is asked for.
    pub(crate) fn set_budget(&self, id: RegionId, limit_pages: u64, read_only: bool, bell: Arc<Bell>) {
        self.with_entry(id, |entry| {
            let pages = entry.core.residency().extent().count();
            entry.core.set_budget(Budget::new(pages, limit_pages));
            entry.evicting = Some(Evicting { bell, read_only, ended: false });
        });
    }

    /// Nothing waits for room any more, and nothing more goes.
    pub(crate) fn end_budget(&self, id: RegionId) {
        self.with_entry(id, |entry| entry.evicting.iter_mut().for_each(|evicting| evicting.ended = true));
        self.lift_budget(id, true);
    }

    /// Whether what is wanted comes although there is no room.
    pub(crate) fn lift_budget(&self, id: RegionId, lifted: bool) {
        let mut state = self.lock_caught_up();
        if let Some(entry) = state.regions.get_mut(&id) {
            entry.core.lift_budget(lifted);
        }
        self.admit(&mut state, id);
    }

    /// Asks for what has waited for room.
    fn admit(&self, state: &mut State, id: RegionId) {
        let Some(entry) = state.regions.get_mut(&id) else { return };
        let (next, store) = (entry.core.admit(), entry.store.clone());
        entry.changed.notify_waiters();
        if next.is_empty() {
            return;
        }
        let me = self.me.clone();
        // Requests are made on the service's thread.
        drop(self.service.spawn(async move {
            if let Some(engine) = me.upgrade() {
                engine.request_faults(id, &store, next);
            }
        }));
    }

    pub(crate) fn budget(&self, id: RegionId) -> Option<Fill> {
        self.with_entry(id, |entry| {
            let dirty_pages = entry.tracking.as_ref().map_or(0, |tracking| tracking.written.dirty_pages());
            let budget = entry.core.budget()?;
            let (held_pages, limit_pages, lifted) = (budget.held_pages(), budget.limit_pages(), budget.is_lifted());
            Some(Fill { held_pages, limit_pages, dirty_pages, lifted })
        })
        .flatten()
    }

    /// Chooses which pages of a region go next. `home`: where its memory begins.
    pub(crate) fn choose_evictions(&self, id: RegionId, home: usize) -> Need {
        let mut passed = 0;
        loop {
            let mut guard = self.lock_caught_up();
            let state = &mut *guard;
            let State { regions, map, evictions, again, .. } = state;
            // What the kernel put off may be older than what was written since.
            let put_off = again.iter().any(|again| again.region == Some(id));
            let Some(Entry { core, tracking, freezing, evicting: Some(evicting), .. }) = regions.get_mut(&id) else {
                return Need::Nothing;
            };
            let excess = core.excess_pages();
            if evicting.ended || excess == 0 {
                return Need::Nothing;
            }
            if put_off {
                return Need::Later;
            }
            // Twice around: the first pass takes from pages that they were touched.
            if freezing.is_some() || passed > 2 * core.residency().extent().count() {
                return Need::Stuck;
            }
            let followed = tracking.as_ref().filter(|tracking| tracking.is_told_of_writes());
            let clean = |page: u64| {
                let is_clean = evicting.read_only || followed.is_some_and(|tracking| tracking.written.is_clean(page));
                is_clean && map.find(home as u64 + self.page.offset_of(page)) == Some((id, page))
            };
            let chosen = core.choose(clean, (BATCH_PAGES.min(excess), LOOK_PAGES));
            if !chosen.extents.is_empty() {
                let range = |extent: &Extent| (home + page_len(self.page, extent.first()), page_len(self.page, extent.count()));
                evictions.extend(chosen.extents.iter().map(range));
                return Need::Drop(chosen.extents);
            }
            passed += chosen.passed.max(1);
        }
    }

    /// The pages that were chosen are dropped; those of `kept` could not be.
    pub(crate) fn evicted(&self, id: RegionId, home: usize, extents: &[Extent], kept: &[Extent]) {
        let mut guard = self.lock_caught_up();
        let state = &mut *guard;
        for extent in extents {
            let (start, len) = (home + page_len(self.page, extent.first()), page_len(self.page, extent.count()));
            let Some(entry) = state.regions.get_mut(&id) else { break };
            if kept.contains(extent) {
                entry.core.stays(*extent);
            } else {
                let pages = entry.core.evicted(*extent);
                add(&entry.counters.pages_evicted, pages);
            }
            // Nothing of it was told if the call failed.
            state.evictions.retain(|range| *range != (start, len));
            // Whoever touched it meanwhile touches it again, and asks for it.
            self.uffd.wake(start, len);
        }
        self.admit(state, id);
    }

    /// Whether a page is about to be dropped: whoever touches or writes it waits until it is.
    pub(super) fn is_leaving(entry: &Entry, page: u64) -> bool {
        entry.core.budget().is_some_and(|budget| budget.is_leaving(page))
    }
}
