//! Carries out what `core` decided about pages: bytes, zeros or poison go to wherever the pages are mapped now.
//!
//! Role: hops *install* and *wake* of a page's journey. Neighbours: `engine` and `requests` say which pages; `install` makes the calls.
//! Invariants: runs under the pager's lock; what the kernel puts off is tried again until it is done or nobody wants it; pages that cannot be
//! filled are poisoned, never left to read as zeros (S1).

use super::{
    address_map::RegionId,
    core::Origin,
    engine::{Engine, State},
    install::{Fill, Filled, fill},
    tracking::Tracking,
};
use crate::{Content, Extent, PageSize, stats::add, sys::Features};
use bytes::Bytes;
use std::{sync::atomic::Ordering, time::Instant};

/// A fill that the kernel put off.
pub(super) struct Again {
    /// None: an address that belongs to no region, to be filled with zeros.
    pub(super) region: Option<RegionId>,
    pub(super) address: usize,
    pub(super) extent: Extent,
    pub(super) what: Owned,
    origin: Origin,
}

/// A fill that owns its bytes.
#[derive(Clone)]
pub(super) enum Owned {
    Bytes(Bytes),
    Zeros,
    Poison,
}

impl Owned {
    fn part(&self, page: PageSize, from_pages: u64, pages: u64) -> Owned {
        match self {
            Owned::Bytes(bytes) => {
                let from = page_len(page, from_pages);
                Owned::Bytes(bytes.slice(from..from + page_len(page, pages)))
            }
            other => other.clone(),
        }
    }

    fn fill(&self, page: PageSize, pages: u64, wake: bool, protect: bool) -> Fill<'_> {
        match self {
            Owned::Bytes(bytes) => Fill::Bytes { bytes, wake, protect },
            Owned::Zeros => Fill::Zeros(page_len(page, pages)),
            Owned::Poison => Fill::Poison(page_len(page, pages)),
        }
    }
}

impl From<Content> for Owned {
    fn from(content: Content) -> Owned {
        match content {
            Content::Zero => Owned::Zeros,
            Content::Bytes(bytes) => Owned::Bytes(bytes),
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "lengths of mapped memory fit usize")]
pub(super) fn page_len(page: PageSize, pages: u64) -> usize {
    page.offset_of(pages) as usize
}

/// Threads that shall be woken together.
///
/// Waking a thread on another processor costs an interrupt, 5 to 10 us on a virtual machine, unless that processor is on its way to the scheduler already. Pages
/// that come together are therefore put in place first and their waiters woken after, one right behind the other: the first takes the interrupt, the others ride along.
#[derive(Default)]
pub(super) struct Wakes {
    /// Installs leave the waking to [`Engine::wake_due`].
    pub(super) later: bool,
    /// Addresses and lengths of what was put in place since.
    due: Vec<(usize, usize)>,
}

impl Engine {
    /// Wakes whoever waits for pages that are in place.
    pub(super) fn wake_due(&self, state: &mut State) {
        // Not in one call for all of them: that was slower, for then all of the threads fault again as one, and both ends take turns instead of working at once.
        state.wakes.due.drain(..).for_each(|(address, len)| self.uffd.wake(address, len));
    }

    /// Puts content in place at `address`, where the pages of `extent` are.
    pub(super) fn put(
        &self,
        state: &mut State,
        region: Option<RegionId>,
        address: usize,
        extent: Extent,
        what: Owned,
        origin: Origin,
    ) {
        let frozen = region.and_then(|id| state.regions.get(&id)).is_some_and(|entry| entry.freezing.is_some());
        if frozen && extent.count() > 1 && matches!(what, Owned::Zeros) {
            // What is noted as zeros must be known page by page.
            for (page, at) in extent.pages().zip((address..).step_by(self.page.len())) {
                self.put(state, region, at, Extent::page(page), Owned::Zeros, origin);
            }
            return;
        }
        let start = Instant::now();
        let asleep = state.wakes.later && matches!(what, Owned::Bytes(_));
        let tracking = region.and_then(|id| state.regions.get(&id)).and_then(|entry| entry.tracking.as_ref());
        // What was brought is no write: it comes protected, so that the first write to it is seen.
        let protect = frozen || tracking.is_some_and(Tracking::traps_writes);
        let mut filled = fill(&self.uffd, self.page, address, what.fill(self.page, extent.count(), !asleep, protect));
        let mut untrapped = matches!(what, Owned::Zeros);
        if protect && filled.already_here > 0 && extent.count() == 1 && matches!(what, Owned::Zeros) {
            // It may be a mark that is there: the page was dropped after it had come, and protected in between. A copy takes the place of a mark, and of no page.
            let bytes = &vec![0; self.page.len()];
            filled = fill(&self.uffd, self.page, address, Fill::Bytes { bytes, wake: true, protect });
            untrapped = false;
        }
        let Filled { again_from, already_here, gone, failed, calls } = filled;
        let stopped = again_from.or(failed.map(|(from, _)| from));
        let done = stopped.map_or(extent.count(), |from| self.page.page_of(from as u64));
        let (now, rest) =
            (Extent::between(extent.first(), extent.first() + done), Extent::between(extent.first() + done, extent.end()));
        if asleep {
            state.wakes.due.push((address, page_len(self.page, now.count())));
            self.wake.notify_one();
        }
        if let Some(id) = region
            && let Some(entry) = state.regions.get_mut(&id)
        {
            let counters = &entry.counters;
            add(&counters.installs, calls);
            add(&counters.pages_stale, already_here + gone);
            let installed = now.count().saturating_sub(already_here + gone);
            match (&what, origin) {
                (Owned::Poison, _) => add(&counters.pages_poisoned, installed),
                (Owned::Zeros, _) => add(&counters.pages_zero, installed),
                (Owned::Bytes(_), Origin::Demand) => add(&counters.pages_demand, installed),
                (Owned::Bytes(_), Origin::Around) => add(&counters.pages_around, installed),
                (Owned::Bytes(_), Origin::Pull) => add(&counters.pages_pull, installed),
            }
            if !matches!(what, Owned::Poison) {
                entry.core.installed(now);
                entry.ring();
                counters.hops.hop(crate::Hop::Install).record(start.elapsed());
            }
            if again_from.is_some() {
                add(&counters.installs_again, 1);
                entry.core.postponed(rest);
            }
            // The kernel installs no protected page of zeros, so a write to it may go unseen.
            if untrapped {
                entry.come_as_zeros(now);
            }
            if let Owned::Zeros = what
                && let Some(tracking) = &mut entry.tracking
            {
                tracking.written.wrote(now);
            }
        }
        if again_from.is_some() {
            let address = address + page_len(self.page, done);
            let what = what.part(self.page, done, rest.count());
            state.again.push_back(Again { region, address, extent: rest, what, origin });
            self.settle.notify_one();
        } else if let Some((_, errno)) = failed {
            tracing::error!(%errno, ?region, %rest, "the kernel refused an install; the pages are lost");
            if let Some(id) = region
                && !matches!(what, Owned::Poison)
            {
                let lost = state.regions.get_mut(&id).map(|entry| entry.core.lose(rest)).unwrap_or_default();
                lost.into_iter().for_each(|extent| self.poison(state, id, extent));
            }
        }
    }

    /// Installs pages of a region wherever they are mapped now.
    pub(super) fn install(&self, state: &mut State, id: RegionId, extent: Extent, what: &Owned, origin: Origin) {
        for (address, piece) in state.map.locate(id, extent) {
            let part = what.part(self.page, piece.first() - extent.first(), piece.count());
            #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
            self.put(state, Some(id), address as usize, piece, part, origin);
        }
    }

    /// Makes pages that `core` has given up raise a signal, and wakes whoever waits for them.
    pub(super) fn poison(&self, state: &mut State, id: RegionId, extent: Extent) {
        if let Some(entry) = state.regions.get(&id) {
            // First: whoever is woken by the poison may ask at once whether anything is lost.
            entry.any_lost.store(true, Ordering::Release);
        }
        if self.uffd.features().contains(Features::POISON) {
            return self.install(state, id, extent, &Owned::Poison, Origin::Demand);
        }
        let Some(mapping) = state.regions.get(&id).and_then(|entry| entry.mapping.upgrade()) else { return };
        for (address, piece) in state.map.locate(id, extent) {
            let offset = address.saturating_sub(mapping.address() as u64);
            let len = page_len(self.page, piece.count());
            match mapping.forbid(offset, len) {
                Ok(()) => {
                    self.uffd.wake(mapping.address() + page_len(self.page, self.page.page_of(offset)), len);
                    if let Some(entry) = state.regions.get(&id) {
                        add(&entry.counters.pages_poisoned, piece.count());
                    }
                }
                // Left missing and registered: its waiters block, which is bad, but nobody reads a zero that should be data.
                Err(error) => tracing::error!(%error, %piece, "lost pages can be neither poisoned nor forbidden"),
            }
        }
    }

    /// Tries again what the kernel put off. Whether anything is left.
    pub(super) fn settle_once(&self) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut asks = Vec::new();
        self.settle_children(state);
        for address in std::mem::take(&mut state.write_again) {
            self.let_write(state, address);
        }
        for _ in 0..state.again.len() {
            let Some(Again { region, address, extent, what, origin }) = state.again.pop_front() else { break };
            let Some(id) = region else {
                // The change that the kernel waited for may have put a region's pages there: then this is a fault like any other.
                match state.map.find(address as u64) {
                    Some(_) => self.fault(state, address, Instant::now(), &mut asks),
                    None => self.put(state, None, address, extent, what, origin),
                }
                continue;
            };
            let Some(entry) = state.regions.get_mut(&id) else {
                if matches!(what, Owned::Poison) {
                    // The region has left pages that were moved out of it, see `leave`.
                    self.put(state, None, address, extent, what, origin);
                }
                continue;
            };
            let wanted: Vec<Extent> = match what {
                Owned::Poison => entry.core.residency().lost(extent).collect(),
                Owned::Zeros => entry.core.zeros_wanted(extent),
                Owned::Bytes(_) => entry.core.arrived(extent, Origin::Demand),
            };
            let changed = entry.changed.clone();
            for piece in wanted {
                let part = what.part(self.page, piece.first() - extent.first(), piece.count());
                self.install(state, id, piece, &part, origin);
            }
            changed.notify_waiters();
        }
        let left = !state.again.is_empty() || !state.write_again.is_empty() || !state.children.all_settled();
        drop(guard);
        asks.into_iter().for_each(|ask| self.request(ask));
        left
    }
}
