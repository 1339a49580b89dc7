//! Keeps what a region held at a moment while its program goes on: copies a page aside before its first write.
//!
//! Role: between `region`, which freezes and reads, and `moment`, which knows what is where. Neighbours: `engine` brings messages of writes and of changed mappings; `place` installs
//! pages so that their first write is trapped too; `saver` reads where the pager must not. Invariants: under the pager's lock a page is saved before its writer is let go; a page that was read is
//! believed only if no change of the mappings was under way (`Userfault::is_quiet`) and the moment, looked at after the read, says that it is in place still; whoever waits to write
//! goes on, whatever became of the page.
//!
//! Linux 5.7, Documentation/admin-guide/mm/userfaultfd.rst, "Write Protect Notifications". With `WP_ASYNC` the kernel sends no messages of writes, and it is a feature of the whole
//! descriptor: a pager has it or can freeze.

use super::{
    address_map::RegionId,
    engine::{Engine, Entry, State},
    moment::{Gone, Kept, Moment},
    place::page_len,
    saver::Saver,
    tracking::Tracking,
};
use crate::{
    Extent, RegionError,
    sys::{Features, Stop, Trap, read_live_at},
};
use bytes::Bytes;
use nix::errno::Errno;
use std::{
    collections::HashSet,
    io,
    time::{Duration, Instant},
};

/// What an entry has while its region is frozen.
pub(super) struct Freezing {
    pub(super) moment: Moment,
    /// Where a store fills the region.
    apart: Option<Apart>,
}

/// Pages that are read by a thread of their own.
struct Apart {
    saver: Saver,
    reading: HashSet<u64>,
}

impl Freezing {
    /// After a panic: what was to be read apart is asked for anew.
    pub(super) fn forget_readers(&mut self) {
        self.apart.iter_mut().for_each(|apart| apart.reading.clear());
    }
}

/// What a reader finds after it has read a region's pages as they are.
pub(crate) enum Look {
    /// What it read is the moment's content, but for these pages.
    Kept(Kept),
    /// The content of these cannot be had.
    Gone(Extent, Gone),
    /// The program is changing its mappings: read again.
    Again,
    /// It is frozen no more.
    Over,
}

/// What is kept, in numbers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Keeping {
    pub(crate) saved_bytes: u64,
    pub(crate) saved_pages: u64,
}

/// What becomes of a thread that waits to write a page.
enum Writer {
    Goes,
    /// Looked at again when the mappings have changed.
    Later,
    /// Let go by [`Engine::was_read`].
    Waits,
}

/// For how long the kernel may put off protecting pages: it does while the program changes its mappings, or memory is short.
const PROTECT_LIMIT: Duration = Duration::from_secs(5);
/// Read and kept before a discard in one piece.
const SAVE_STEP_BYTES: u64 = 256 * 1024;
const PACE: Duration = Duration::from_micros(50);

impl Engine {
    /// Why regions of this pager cannot be frozen, if so.
    pub(crate) fn can_freeze(&self) -> Result<(), RegionError> {
        let cannot = |reason: &str, remedy: &str| RegionError::CannotFreeze { reason: reason.into(), remedy: remedy.into() };
        let features = self.uffd.features();
        if !features.contains(Features::WRITE_PROTECT) {
            return Err(cannot("the kernel offers no UFFD_FEATURE_PAGEFAULT_FLAG_WP", "use Linux 5.7 or newer"));
        }
        if features.contains(Features::WP_ASYNC) {
            return Err(cannot(
                "its pager has asynchronous write protection, with which the kernel lets writers go unasked",
                "open it with a pager whose `PagerOptions::tracker` is `TrackerKind::WpSync`",
            ));
        }
        Ok(())
    }

    /// What the region holds now is kept from the return on. Nothing may write it before that. `start`: where its memory begins.
    pub(crate) fn freeze(&self, id: RegionId, start: usize, filled_from_a_store: bool) -> Result<(), RegionError> {
        self.can_freeze()?;
        let probe = [0_u8];
        if let Err(errno) = read_live_at(probe.as_ptr().addr(), &mut [1]) {
            return Err(RegionError::CannotFreeze {
                reason: format!("process_vm_readv(2) is refused: {errno}"),
                remedy: "allow it in the seccomp profile".into(),
            });
        }
        let all = self.begin_freezing(id, start, filled_from_a_store)?;
        let armed = self.steps(all).try_for_each(|step| self.protect(id, step, filled_from_a_store));
        if armed.is_err() {
            self.unfreeze(id, true);
        }
        armed
    }

    fn begin_freezing(&self, id: RegionId, start: usize, filled_from_a_store: bool) -> Result<Extent, RegionError> {
        let mut guard = self.lock_caught_up();
        let state = &mut *guard;
        let Some(entry) = state.regions.get_mut(&id) else { return Err(RegionError::PagerStopped) };
        let all = entry.core.residency().extent();
        if entry.freezing.is_some() {
            return Err(RegionError::AlreadyFrozen { region: entry.name.clone() });
        }
        let located = state.map.locate(id, all);
        let trap = if filled_from_a_store { Trap::MissingAndWrites } else { Trap::Writes };
        for (address, extent) in &located {
            #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
            let registered = self.uffd.register(*address as usize, page_len(self.page, extent.count()), trap);
            registered.map_err(|error| RegionError::system("registering writes with userfaultfd", error))?;
        }
        let mut moment = Moment::new(all.count());
        // What is not at its place now is nowhere to be read.
        let at_home = located.iter().filter(|(address, extent)| *address == start as u64 + self.page.offset_of(extent.first()));
        let mut next = 0;
        for (_, extent) in at_home {
            moment.lose(Extent::between(next, extent.first()));
            next = extent.end();
        }
        moment.lose(Extent::between(next, all.end()));
        if filled_from_a_store {
            // They hold nothing, and a mark that traps their writes would keep the kernel from filling them with zeros.
            entry.core.residency().discarded(all).for_each(|extent| moment.zeros(extent));
        }
        let started = || Saver::start(self.me.clone(), id).map(|saver| Apart { saver, reading: HashSet::new() });
        let apart = filled_from_a_store.then(started).transpose();
        let apart = apart.map_err(|error| RegionError::system("starting a thread", error))?;
        entry.freezing = Some(Freezing { moment, apart });
        Ok(all)
    }

    /// Protects what the region holds of a step. Where a store fills it, what is missing comes protected.
    fn protect(&self, id: RegionId, step: Extent, filled_from_a_store: bool) -> Result<(), RegionError> {
        if !filled_from_a_store && !self.uffd.features().contains(Features::WP_UNPOPULATED) {
            // This kernel protects only pages that hold something.
            let mapping = self.with_entry(id, |entry| entry.mapping.upgrade()).flatten();
            mapping.inspect(|mapping| self.touch_pages(mapping, &[step]));
        }
        let give_up = Instant::now() + PROTECT_LIMIT;
        'again: loop {
            {
                let mut guard = self.lock_caught_up();
                let state = &mut *guard;
                let located = state.map.locate(id, step);
                let Some(entry) = state.regions.get_mut(&id) else { return Err(RegionError::PagerStopped) };
                for (address, extent) in located {
                    // Where writes are followed by their messages, all but what was told or is to be told is protected already.
                    let followed = entry.tracking.as_ref().filter(|tracking| tracking.is_told_of_writes());
                    let open = followed.map_or_else(|| vec![extent], |tracking| tracking.written.known(extent));
                    let residency = entry.core.residency();
                    let held: Vec<Extent> = match filled_from_a_store {
                        true => open.into_iter().flat_map(|open| residency.resident(open)).collect(),
                        false => open,
                    };
                    for part in held {
                        #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                        let address = address as usize + page_len(self.page, part.first() - extent.first());
                        // Unmapped just now: the message is on its way.
                        match self.set_protected(address, part, true, |page| entry.lose(page)) {
                            None => {}
                            Some(Stop::Again) if Instant::now() < give_up => {
                                drop(guard);
                                std::thread::sleep(PACE);
                                continue 'again;
                            }
                            Some(stop) => {
                                let error = io::Error::other(format!("{stop:?} at {part}"));
                                return Err(RegionError::system("UFFDIO_WRITEPROTECT", error));
                            }
                        }
                    }
                }
            }
            return Ok(());
        }
    }

    /// Protects pages that lie in one piece, or lets them be written; why the kernel stopped, if it did. Calls `gone` with pages that are not registered any more.
    fn set_protected(&self, address: usize, extent: Extent, protect: bool, mut gone: impl FnMut(Extent)) -> Option<Stop> {
        match self.uffd.write_protect(address, page_len(self.page, extent.count()), protect) {
            // It may span mappings, which kernels before 6.4 refuse as a whole.
            Some(Stop::Gone) if extent.count() > 1 => extent.chunks(1).find_map(|page| {
                let address = address + page_len(self.page, page.first() - extent.first());
                self.set_protected(address, page, protect, &mut gone as &mut dyn FnMut(Extent))
            }),
            Some(Stop::Gone) => {
                gone(extent);
                None
            }
            other => other,
        }
    }

    /// Keeps nothing any more; nobody waits to write when this returns, and nobody will. `disarm`: unless the caller takes the region from this pager.
    pub(crate) fn unfreeze(&self, id: RegionId, disarm: bool) {
        let Some((freezing, all, followed)) = self.with_entry(id, |entry| {
            let all = entry.core.residency().extent();
            (entry.freezing.take(), all, entry.tracking.as_ref().is_some_and(Tracking::traps_writes))
        }) else {
            return;
        };
        // Without the lock: it may be much memory.
        drop(freezing);
        // Where writes are followed, what is protected stays so: its writers are let go by their messages.
        if !disarm || followed {
            return;
        }
        for step in self.steps(all) {
            let state = self.lock_caught_up();
            for (address, extent) in state.map.locate(id, step) {
                #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                // What the kernel puts off stays protected, and so costs its writer a message.
                let _ = self.set_protected(address as usize, extent, false, |_| {});
            }
        }
    }

    /// Lets a plain region go that lives on; nobody waits to write it when this returns. No page of it is missing, so that none can read as zeros (S1).
    pub(crate) fn part(&self, id: RegionId, start: usize, len: usize) {
        let entry = {
            let mut guard = self.lock_caught_up();
            let state = &mut *guard;
            let all = state.regions.get(&id).map(|entry| entry.core.residency().extent()).unwrap_or_default();
            let own = start as u64..(start + len) as u64;
            // With what mremap(2) left behind; in pieces where the program has put another kind of mapping there.
            let whole = self.uffd.unregister(start, len).is_ok();
            // Unregistering wakes those that wait for missing pages, and nobody else (fs/userfaultfd.c, userfaultfd_unregister).
            self.uffd.wake(start, len);
            for (address, extent) in state.map.locate(id, all) {
                if !(whole && own.contains(&address)) {
                    #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                    let (address, len) = (address as usize, page_len(self.page, extent.count()));
                    if let Err(error) = self.uffd.unregister(address, len) {
                        tracing::warn!(%error, %extent, "UFFDIO_UNREGISTER failed; these pages stay with their pager");
                    }
                    self.uffd.wake(address, len);
                }
            }
            state.map.remove_region(id);
            let entry = state.regions.remove(&id);
            self.give_back_soft_dirty(state);
            entry
        };
        drop(entry);
    }

    /// A thread waits to write a protected page: has it told as written and kept, then lets the thread go.
    pub(super) fn let_write(&self, state: &mut State, address: usize) {
        let address = address & !(self.page.len() - 1);
        if let Some((id, page)) = state.map.find(address as u64)
            && let Some(entry) = state.regions.get_mut(&id)
        {
            if Engine::is_leaving(entry, page) {
                // It is as the store has it, and is being dropped: woken when that is done, the writer asks for it.
                return;
            }
            entry.core.touched(page);
            if let Some(tracking) = &mut entry.tracking {
                tracking.written.wrote(Extent::page(page));
            }
            match self.keep(entry, page, address) {
                Writer::Goes => {}
                Writer::Waits => return,
                Writer::Later => return self.let_write_later(state, address),
            }
        }
        match self.uffd.write_protect(address, self.page.len(), false) {
            None => {}
            Some(Stop::Again) => self.let_write_later(state, address),
            // Unmapped or moved meanwhile: the writer looks again what is there.
            Some(_) => self.uffd.wake(address, self.page.len()),
        }
    }

    fn let_write_later(&self, state: &mut State, address: usize) {
        state.write_again.push(address);
        self.settle.notify_one();
    }

    /// Saves a page before its first write.
    fn keep(&self, entry: &mut Entry, page: u64, address: usize) -> Writer {
        let Some(freezing) = &mut entry.freezing else { return Writer::Goes };
        if freezing.moment.is_decided(page) {
            return Writer::Goes;
        }
        if let Some(apart) = &mut freezing.apart {
            if !apart.reading.insert(page) || apart.saver.read(page, address) {
                return Writer::Waits;
            }
            freezing.moment.lose(Extent::page(page));
            return Writer::Goes;
        }
        let mut bytes = vec![0; self.page.len()];
        let read = read_live_at(address, &mut bytes).map(|()| bytes.into());
        if self.believe(entry, page, read) { Writer::Goes } else { Writer::Later }
    }

    /// The saver has read a page.
    pub(super) fn was_read(&self, id: RegionId, page: u64, address: usize, read: Result<Bytes, Errno>) {
        let mut guard = self.lock_caught_up();
        let state = &mut *guard;
        if let Some(entry) = state.regions.get_mut(&id) {
            if let Some(apart) = entry.freezing.as_mut().and_then(|freezing| freezing.apart.as_mut()) {
                apart.reading.remove(&page);
            }
            if !self.believe(entry, page, read) {
                return self.let_write_later(state, address);
            }
        }
        self.let_write(state, address);
    }

    /// Keeps what was read of a page; `false` if the mappings were changing meanwhile, so that it may be of another page, or of none.
    fn believe(&self, entry: &mut Entry, page: u64, read: Result<Bytes, Errno>) -> bool {
        let Some(freezing) = &mut entry.freezing else { return true };
        if freezing.moment.is_decided(page) {
            return true;
        }
        if !self.uffd.is_quiet() {
            return false;
        }
        match read {
            Ok(bytes) => freezing.moment.save(page, bytes),
            Err(_) => freezing.moment.lose(Extent::page(page)),
        }
        true
    }

    /// Keeps what is about to be discarded. Not on the pager's thread: it may wait for pages.
    pub(crate) fn save(&self, id: RegionId, start: usize, extent: Extent) {
        for step in extent.chunks((SAVE_STEP_BYTES / self.page.bytes()).max(1)) {
            loop {
                let look = |entry: &mut Entry| entry.freezing.as_ref().map(|freezing| freezing.moment.undecided(step));
                let Some(undecided) = self.with_entry(id, look).flatten() else { return };
                let read_page = |page| {
                    let mut bytes = vec![0; self.page.len()];
                    let read = read_live_at(start + page_len(self.page, page), &mut bytes).map(|()| Bytes::from(bytes));
                    (page, read)
                };
                let read: Vec<_> = undecided.into_iter().flat_map(Extent::pages).map(read_page).collect();
                let kept = self.with_entry(id, |entry| read.into_iter().all(|(page, read)| self.believe(entry, page, read)));
                if kept != Some(false) {
                    break;
                }
                std::thread::sleep(PACE);
            }
        }
    }

    /// What of an extent is not in place any more; after a read of what is.
    pub(crate) fn look(&self, id: RegionId, extent: Extent) -> Look {
        let mut state = self.lock_caught_up();
        let quiet = self.uffd.is_quiet();
        let Some(freezing) = state.regions.get_mut(&id).and_then(|entry| entry.freezing.as_ref()) else { return Look::Over };
        match freezing.moment.look(extent) {
            Err((extent, gone)) => Look::Gone(extent, gone),
            Ok(kept) if quiet || kept.len() as u64 == extent.count() => Look::Kept(kept),
            Ok(_) => Look::Again,
        }
    }

    /// Nobody will ask for these pages again.
    pub(crate) fn release(&self, id: RegionId, extent: Extent) {
        self.with_entry(id, |entry| {
            if let Some(freezing) = &mut entry.freezing {
                freezing.moment.release(extent);
            }
        });
    }

    pub(crate) fn keeping(&self, id: RegionId) -> Keeping {
        let look = |entry: &mut Entry| {
            let moment = &entry.freezing.as_ref()?.moment;
            Some(Keeping { saved_bytes: moment.saved_bytes(), saved_pages: moment.saved_pages() })
        };
        self.with_entry(id, look).flatten().unwrap_or_default()
    }
}

impl Entry {
    /// The program took these pages away, or moves them: what they held at the moment cannot be read any more.
    pub(super) fn lose(&mut self, extent: Extent) {
        if let Some(freezing) = &mut self.freezing {
            freezing.moment.lose(extent);
        }
    }

    /// These pages come as zeros, whose first write cannot be trapped.
    pub(super) fn come_as_zeros(&mut self, extent: Extent) {
        if let Some(freezing) = &mut self.freezing {
            freezing.moment.zeros(extent);
        }
    }
}
