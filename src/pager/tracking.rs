//! Follows which pages of a region the program writes.
//!
//! Role: between `region`, which is asked what was written, and a `tracker`, which learns it from the kernel. Neighbours: `engine` brings messages of writes and discards; `place` installs
//! pages so that they count as unwritten. Invariants: S5: get-and-clear is one step under the pager's lock, and comes before anybody reads the pages; what was taken and not acknowledged
//! comes back; a write that cannot be told from none counts as a write.

use super::{
    address_map::RegionId,
    engine::{Engine, Entry, State},
    place::page_len,
    tracker::{Piece, SoftDirty, Tracker, WpAsync, WpSync, give_back, reserve},
    written::Written,
};
use crate::{
    Extent, PageSize, RegionError, TrackerKind,
    sys::{Features, Mapping, Pagemap, Trap},
};

/// What an entry has while its writes are followed.
pub(super) struct Tracking {
    tracker: Box<dyn Tracker>,
    pub(super) written: Written,
    filled_from_a_store: bool,
    /// All of it was armed.
    armed: bool,
}

/// How much is looked at under one lock, so that a fault waits behind no more than that.
const STEP_BYTES: u64 = 64 << 20;

impl Tracking {
    /// Whether what is installed can be and must be protected.
    pub(super) fn traps_writes(&self) -> bool {
        matches!(self.tracker.trap(self.filled_from_a_store), Some(Trap::Writes | Trap::MissingAndWrites))
    }

    /// Whether every page that is not in `written` is protected, and sends a message before it is written.
    pub(super) fn is_told_of_writes(&self) -> bool {
        self.armed && self.tracker.kind() == TrackerKind::WpSync
    }

    pub(super) fn heap_bytes(&self) -> usize {
        self.written.heap_bytes()
    }
}

/// Calls `look` for each piece of `within` as it is mapped now; what is mapped nowhere is passed over.
fn pieces<T>(
    state: &mut State,
    id: RegionId,
    within: Extent,
    page: PageSize,
    mut look: impl FnMut(&mut Tracking, Piece<'_>) -> T,
) -> Vec<T> {
    let located = state.map.locate(id, within);
    let Some(entry) = state.regions.get_mut(&id) else { return Vec::new() };
    let Entry { core, tracking: Some(tracking), .. } = entry else { return Vec::new() };
    let mut looked = Vec::with_capacity(located.len());
    for (address, extent) in located {
        let residency = tracking.filled_from_a_store.then(|| core.residency());
        #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
        looked.push(look(tracking, Piece { address: address as usize, extent, residency, page }));
    }
    looked
}

/// What the kernel says of pages that were given up means nothing: their marks look like writes.
fn without_lost(found: Vec<Extent>, piece: &Piece<'_>) -> Vec<Extent> {
    let Some(residency) = piece.residency.filter(|residency| residency.any_lost()) else { return found };
    found.into_iter().flat_map(|extent| residency.not_lost(extent)).collect()
}

impl Engine {
    /// The kind of tracker that regions of this pager get.
    pub(crate) fn tracker_kind(&self) -> Result<TrackerKind, RegionError> {
        let none = |reason: &str, remedy: &str| RegionError::NoTracker { reason: reason.into(), remedy: remedy.into() };
        let has = |feature| self.uffd.features().contains(feature);
        match self.options.tracker {
            None if has(Features::WRITE_PROTECT.and(Features::WP_ASYNC)) => Ok(TrackerKind::WpAsync),
            None if has(Features::WRITE_PROTECT) => Ok(TrackerKind::WpSync),
            None | Some(TrackerKind::SoftDirty) => match Pagemap::has_soft_dirty() {
                Ok(true) => Ok(TrackerKind::SoftDirty),
                Ok(false) => Err(none(
                    "userfaultfd here has no write protection (Linux 5.7), or another tracker was asked for, and the kernel keeps no soft-dirty bits (CONFIG_MEM_SOFT_DIRTY)",
                    "use a kernel that has one of the two",
                )),
                Err(error) => {
                    Err(none(&format!("soft-dirty bits cannot be used: {error}"), "mount /proc, and let the process read its own"))
                }
            },
            Some(TrackerKind::WpAsync) if has(Features::WRITE_PROTECT.and(Features::WP_ASYNC)) => Ok(TrackerKind::WpAsync),
            Some(TrackerKind::WpAsync) => {
                Err(none("the kernel offers no UFFD_FEATURE_WP_ASYNC", "use Linux 6.7 or newer, or another tracker"))
            }
            Some(TrackerKind::WpSync) if has(Features::WRITE_PROTECT) => Ok(TrackerKind::WpSync),
            Some(TrackerKind::WpSync) => {
                Err(none("the kernel offers no UFFD_FEATURE_PAGEFAULT_FLAG_WP", "use Linux 5.7 or newer, or another tracker"))
            }
        }
    }

    /// What a region that no store fills must have trapped to be followed.
    pub(crate) fn trap_of_plain_memory(&self) -> Result<Option<Trap>, RegionError> {
        Ok(self.new_tracker(false)?.trap(false))
    }

    fn new_tracker(&self, filled_from_a_store: bool) -> Result<Box<dyn Tracker>, RegionError> {
        let failed = |error| RegionError::system("opening /proc/self/pagemap", error);
        Ok(match self.tracker_kind()? {
            TrackerKind::WpAsync => Box::new(WpAsync::new().map_err(failed)?),
            TrackerKind::WpSync => Box::new(WpSync::new(filled_from_a_store, self.uffd.features())),
            TrackerKind::SoftDirty => Box::new(SoftDirty::new(filled_from_a_store).map_err(failed)?),
        })
    }

    /// Begins to follow a region: every write from the return on is told.
    pub(crate) fn track(&self, id: RegionId, filled_from_a_store: bool) -> Result<TrackerKind, RegionError> {
        let kind;
        let all = {
            let mut guard = self.lock_caught_up();
            let state = &mut *guard;
            let Some(entry) = state.regions.get_mut(&id) else { return Err(RegionError::PagerStopped) };
            let all = entry.core.residency().extent();
            if entry.tracking.is_some() {
                return Err(RegionError::AlreadyTracked { region: entry.name.clone() });
            }
            let tracker = self.new_tracker(filled_from_a_store)?;
            kind = tracker.kind();
            if tracker.needs_pause() && !reserve(std::ptr::from_ref(self).addr()) {
                return Err(RegionError::NoTracker {
                    reason: "another pager of this process uses its soft-dirty bits".into(),
                    remedy: "give all regions that are followed the same pager".into(),
                });
            }
            if let Some(trap) = tracker.trap(filled_from_a_store) {
                for (address, extent) in state.map.locate(id, all) {
                    #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                    let registered = self.uffd.register(address as usize, page_len(self.page, extent.count()), trap);
                    registered.map_err(|error| RegionError::system("registering writes with userfaultfd", error))?;
                }
            }
            if let Some(entry) = state.regions.get_mut(&id) {
                let mut written = Written::new(all.count());
                if entry.evicting.is_some() {
                    written.keep_taken();
                }
                entry.tracking = Some(Tracking { tracker, written, filled_from_a_store, armed: false });
            }
            all
        };
        for step in self.steps(all) {
            self.touch(id, step, false);
            let mut state = self.lock_caught_up();
            pieces(&mut state, id, step, self.page, |tracking, piece| {
                tracking.tracker.arm(&self.uffd, piece, &mut tracking.written)
            });
        }
        self.with_entry(id, |entry| entry.tracking.iter_mut().for_each(|tracking| tracking.armed = true));
        Ok(kind)
    }

    /// Stops to follow a region; nobody waits for it when this returns.
    pub(crate) fn untrack(&self, id: RegionId) {
        let Some(all) = self.with_entry(id, |entry| entry.core.residency().extent()) else { return };
        for step in self.steps(all) {
            let mut state = self.lock_caught_up();
            if state.regions.get(&id).is_some_and(|entry| entry.freezing.is_some() || entry.evicting.is_some()) {
                // What is protected stays so: its writers are let go by their messages.
                break;
            }
            pieces(&mut state, id, step, self.page, |tracking, piece| tracking.tracker.disarm(&self.uffd, piece));
        }
        let mut state = self.lock();
        if let Some(entry) = state.regions.get_mut(&id) {
            entry.tracking = None;
        }
        self.give_back_soft_dirty(&state);
    }

    /// Of the last region that was followed by them.
    pub(super) fn give_back_soft_dirty(&self, state: &State) {
        let uses = |entry: &Entry| entry.tracking.as_ref().is_some_and(|tracking| tracking.tracker.needs_pause());
        if !state.regions.values().any(uses) {
            give_back(std::ptr::from_ref(self).addr());
        }
    }

    /// Takes which pages were written since they were taken last; from the return on, later writes are told by the next call. `paused`: nothing writes any region of this
    /// process from before the call until it returns.
    pub(crate) fn take_written(&self, id: RegionId, paused: bool) -> Result<Vec<Extent>, RegionError> {
        let look = |entry: &mut Entry| {
            let needs_pause = entry.tracking.as_ref().map(|tracking| tracking.tracker.needs_pause());
            needs_pause.map(|needs_pause| (entry.core.residency().extent(), needs_pause))
        };
        let (all, needs_pause) = self.with_entry(id, look).flatten().ok_or(RegionError::PagerStopped)?;
        if needs_pause {
            return if paused { self.take_of_all(id) } else { Err(RegionError::MustPause { tracker: self.tracker_kind()? }) };
        }
        let mut taken: Vec<Extent> = Vec::new();
        for step in self.steps(all) {
            self.touch(id, step, true);
            let mut state = self.lock_caught_up();
            pieces(&mut state, id, step, self.page, |tracking, piece| {
                let found = tracking.tracker.take(&self.uffd, piece, &mut tracking.written);
                for extent in without_lost(found, &piece) {
                    match taken.last_mut() {
                        Some(last) if last.end() == extent.first() => *last = Extent::between(last.first(), extent.end()),
                        _ => taken.push(extent),
                    }
                }
                if paused {
                    // Whoever discarded them has returned from it.
                    tracking.written.no_doubt(piece.extent);
                }
            });
        }
        Ok(taken)
    }

    /// The same where reading and clearing are two steps, and the second is for all regions.
    fn take_of_all(&self, wanted: RegionId) -> Result<Vec<Extent>, RegionError> {
        let mut guard = self.lock_caught_up();
        let state = &mut *guard;
        let uses = |entry: &Entry| entry.tracking.as_ref().is_some_and(|tracking| tracking.tracker.needs_pause());
        let ids: Vec<RegionId> = state.regions.iter().filter(|(_, entry)| uses(entry)).map(|(id, _)| *id).collect();
        let mut taken = Vec::new();
        for id in ids {
            let Some(all) = state.regions.get(&id).map(|entry| entry.core.residency().extent()) else { continue };
            let found = pieces(state, id, all, self.page, |tracking, piece| {
                let found = tracking.tracker.take(&self.uffd, piece, &mut tracking.written);
                tracking.written.no_doubt(piece.extent);
                without_lost(found, &piece)
            });
            let found: Vec<Extent> = found.into_iter().flatten().collect();
            if let Some(entry) = state.regions.get(&id)
                && entry.tracking.as_ref().is_some_and(|tracking| tracking.tracker.needs_touch())
                && let Some(mapping) = entry.mapping.upgrade()
            {
                self.touch_pages(&mapping, &found);
            }
            let found = found.into_iter();
            match state.regions.get_mut(&id).and_then(|entry| entry.tracking.as_mut()) {
                Some(tracking) if id != wanted => found.for_each(|extent| tracking.written.wrote(extent)),
                _ => taken.extend(found),
            }
        }
        let finish = |tracking: &mut Tracking| tracking.tracker.finish();
        let finished = state.regions.get_mut(&wanted).and_then(|entry| entry.tracking.as_mut()).map_or(Ok(()), finish);
        if let Err(error) = finished {
            if let Some(tracking) = state.regions.get_mut(&wanted).and_then(|entry| entry.tracking.as_mut()) {
                taken.iter().for_each(|extent| tracking.written.wrote(*extent));
            }
            return Err(RegionError::system("writing /proc/self/clear_refs", error));
        }
        Ok(taken)
    }

    /// What was taken is where it was to go.
    pub(crate) fn acknowledged(&self, id: RegionId, extents: &[Extent]) {
        self.with_entry(id, |entry| {
            if let Some(tracking) = &mut entry.tracking {
                extents.iter().for_each(|extent| tracking.written.settled(*extent));
            }
            entry.ring();
        });
    }

    /// Puts back what was taken and not acknowledged.
    pub(crate) fn give_back_written(&self, id: RegionId, extents: &[Extent]) {
        self.with_entry(id, |entry| {
            if let Some(tracking) = &mut entry.tracking {
                for extent in extents {
                    tracking.written.wrote(*extent);
                    tracking.written.settled(*extent);
                }
            }
        });
    }

    /// The program is about to discard memory through the region's own call, which says when that is done: the message about it casts no doubt.
    pub(crate) fn discarding(&self, id: RegionId, start: usize, len: usize) {
        let mut state = self.lock();
        if state.regions.get(&id).is_some_and(|entry| entry.tracking.is_some()) {
            state.discarding.push((start, len));
        }
    }

    /// It has returned.
    pub(crate) fn was_discarded(&self, id: RegionId, extent: Extent, start: usize, len: usize) {
        let mut guard = self.lock_caught_up();
        let state = &mut *guard;
        // Nothing of it was told if it failed.
        let _ = state.announced(start, len);
        if let Some(tracking) = state.regions.get_mut(&id).and_then(|entry| entry.tracking.as_mut()) {
            tracking.written.wrote(extent);
        }
    }

    /// Makes pages of plain memory hold something, where the tracker needs that. Memory that a store fills is not touched (S2).
    fn touch(&self, id: RegionId, within: Extent, only_written: bool) {
        let look = |entry: &mut Entry| {
            let tracking = entry.tracking.as_ref().filter(|tracking| tracking.tracker.needs_touch())?;
            let extents = if only_written { tracking.written.known(within) } else { vec![within] };
            Some((entry.mapping.upgrade()?, extents))
        };
        let Some((mapping, extents)) = self.with_entry(id, look).flatten() else { return };
        self.touch_pages(&mapping, &extents);
    }

    pub(super) fn touch_pages(&self, mapping: &Mapping, extents: &[Extent]) {
        for page in extents.iter().flat_map(|extent| extent.pages()) {
            let _ = mapping.read_at(self.page.offset_of(page), &mut [0]);
        }
    }

    pub(super) fn steps(&self, all: Extent) -> impl Iterator<Item = Extent> + use<> {
        all.chunks((STEP_BYTES / self.page.bytes()).max(1))
    }
}
