//! The state of a pager and its message loop.
//!
//! Role: hop *fault*: reads messages of the kernel, keeps the address map, lets `core` decide and carries the decision out. Neighbours: `requests`
//! asks stores and brings replies here; `install` puts pages in place; `region` joins and leaves. Invariants: messages are
//! applied, and pages are installed, under one lock, and nothing is installed while a removal is read and not applied, so that no install can fall between a
//! removal being read and being known (S4); whatever panics, no descriptor closes while a page that should hold data is missing (S1).

use super::{
    address_map::{AddressMap, RegionId, Segment},
    children::Children,
    core::{Core, Decision, Origin},
    evict::Evicting,
    freezing::Freezing,
    installer::Installer,
    place::{Again, Owned, Wakes, page_len},
    requests::{Ask, Asks},
    residency::Residency,
    retry::Outage,
    tracking::Tracking,
};
use crate::{
    Extent, LossPolicy, PageSize, PageStore, PagerOptions, RegionEvent, Service, StoreError,
    stats::{Counters, add},
    sys::{Attended, Mapping, Message, Trap, Userfault},
};
use std::{
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, broadcast, oneshot},
};

/// See the module header.
pub(crate) struct Engine {
    pub(super) uffd: Userfault,
    pub(super) service: Service,
    pub(super) page: PageSize,
    pub(super) options: PagerOptions,
    pub(super) me: Weak<Engine>,
    pub(super) asks: Asks,
    state: Mutex<State>,
    /// Something waits in `State::again`.
    pub(super) settle: Arc<Notify>,
    /// Something waits in `State::wakes`.
    pub(super) wake: Arc<Notify>,
    /// Demand requests that are not answered.
    pub(super) demands: AtomicUsize,
    pub(super) installer: Mutex<Option<Arc<Installer>>>,
    /// `None` where the kernel tells of no forks.
    _attended: Option<Attended>,
    /// Makes the next turn of a loop panic.
    #[cfg(test)]
    pub(super) panic_next: AtomicBool,
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Lets these tasks see that the engine is gone.
        self.settle.notify_one();
        self.wake.notify_one();
    }
}

pub(super) struct State {
    pub(super) map: AddressMap,
    pub(super) regions: HashMap<RegionId, Entry>,
    /// Fills that the kernel put off.
    pub(super) again: VecDeque<Again>,
    /// Addresses of pages whose waiting writers the kernel would not let go yet.
    pub(super) write_again: Vec<usize>,
    pub(super) wakes: Wakes,
    /// Addresses and lengths of discards that say themselves when they are done, and of which no message has come.
    pub(super) discarding: Vec<(usize, usize)>,
    /// The same of pages that are evicted: no discards of the program's.
    pub(super) evictions: Vec<(usize, usize)>,
    next_region: u64,
    /// Read and not served yet: [`Engine::lock_caught_up`] leaves them to the service's thread.
    faults: Vec<Message>,
    pub(super) children: Children,
    /// Set after a panic: whatever is missing is poisoned from then on.
    broken: bool,
}

impl State {
    /// Whether a discard says itself when it is done; asked once for each.
    pub(super) fn announced(&mut self, start: usize, len: usize) -> bool {
        was_said(&mut self.discarding, (start, len))
    }
}

/// Whether a range is among those that were announced, which it leaves.
fn was_said(announced: &mut Vec<(usize, usize)>, range: (usize, usize)) -> bool {
    let found = announced.iter().position(|said| *said == range);
    found.map(|at| announced.swap_remove(at)).is_some()
}

/// What the pager knows of a region.
pub(crate) struct Entry {
    pub(super) name: String,
    pub(super) core: Core,
    pub(super) store: Arc<dyn PageStore>,
    pub(super) loss: LossPolicy,
    pub(super) outage: Outage,
    /// The error by which pages were given up, if any were.
    pub(super) cause: Option<StoreError>,
    /// Whether pages may be lost: set before the first one is poisoned.
    pub(crate) any_lost: Arc<AtomicBool>,
    pub(super) counters: Arc<Counters>,
    pub(super) events: broadcast::Sender<RegionEvent>,
    /// Told whenever pages became resident or lost.
    pub(super) changed: Arc<Notify>,
    pub(super) mapping: Weak<Mapping>,
    /// While its writes are followed.
    pub(super) tracking: Option<Tracking>,
    /// While what it held at a moment is kept.
    pub(super) freezing: Option<Freezing>,
    /// If it has a budget.
    pub(super) evicting: Option<Evicting>,
    /// Pages that threads waited for, in order, while that is recorded.
    pub(crate) touched: Option<Vec<u64>>,
}

impl Entry {
    pub(crate) fn new(
        name: String,
        core: Core,
        store: Arc<dyn PageStore>,
        loss: LossPolicy,
        counters: Arc<Counters>,
        events: broadcast::Sender<RegionEvent>,
        mapping: Weak<Mapping>,
    ) -> Entry {
        let (outage, any_lost, changed) = (Outage::default(), Arc::default(), Arc::new(Notify::new()));
        let (cause, tracking, freezing, evicting, touched) = (None, None, None, None, None);
        Entry {
            name,
            core,
            store,
            loss,
            outage,
            cause,
            any_lost,
            counters,
            events,
            changed,
            mapping,
            tracking,
            freezing,
            evicting,
            touched,
        }
    }

    pub(crate) fn residency(&self) -> &Residency {
        self.core.residency()
    }

    /// Bytes of memory that its pages' state takes.
    pub(crate) fn heap_bytes(&self) -> usize {
        let freezing = self.freezing.as_ref().map_or(0, |freezing| freezing.moment.heap_bytes());
        self.core.heap_bytes() + self.tracking.as_ref().map_or(0, Tracking::heap_bytes) + freezing
    }

    /// The first extent inside `within` that was given up, and why.
    pub(crate) fn first_lost(&self, within: Extent) -> Option<(Extent, StoreError)> {
        let extent = self.residency().lost(within).next()?;
        Some((extent, self.cause.clone().unwrap_or(StoreError::Closed)))
    }
}

impl Engine {
    /// Starts the message loop on `service`; it ends when `stop` is dropped.
    pub(super) fn start(
        uffd: Userfault,
        service: Service,
        page: PageSize,
        options: PagerOptions,
        stop: oneshot::Receiver<()>,
    ) -> io::Result<Arc<Engine>> {
        let attended = uffd.attend()?;
        let (readable, told) = {
            let _context = service.handle().enter();
            (uffd.readable()?, attended.as_ref().map(Attended::told).transpose()?)
        };
        let engine = Arc::new_cyclic(|me| Engine {
            uffd,
            service: service.clone(),
            page,
            options,
            me: me.clone(),
            asks: Asks::default(),
            state: Mutex::new(State {
                map: AddressMap::new(page),
                regions: HashMap::new(),
                again: VecDeque::new(),
                write_again: Vec::new(),
                discarding: Vec::new(),
                evictions: Vec::new(),
                wakes: Wakes::default(),
                next_region: 1,
                faults: Vec::new(),
                children: Children::default(),
                broken: false,
            }),
            settle: Arc::new(Notify::new()),
            wake: Arc::new(Notify::new()),
            demands: AtomicUsize::new(0),
            installer: Mutex::default(),
            _attended: attended,
            #[cfg(test)]
            panic_next: false.into(),
        });
        service.spawn(read_messages(engine.me.clone(), readable, stop));
        if let Some(told) = told {
            service.spawn(serve_what_was_read(engine.me.clone(), told));
        }
        service.spawn(settle(engine.me.clone(), engine.settle.clone()));
        service.spawn(wake(engine.me.clone(), engine.wake.clone()));
        Ok(engine)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves state that `rescue` deals with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state with all news applied that was read before: for whoever must find what it did to its mappings itself. Such a call returns when its message is read, which
    /// during a fork may be before the pager has applied it.
    pub(super) fn lock_caught_up(&self) -> MutexGuard<'_, State> {
        let mut guard = self.lock();
        if self.uffd.has_read_news() {
            let (state, mut messages) = (&mut *guard, Vec::new());
            self.uffd.take_read(&mut messages);
            self.apply_news(state, &mut messages);
            // Requests are made on the service's thread only, which was told.
            state.faults.append(&mut messages);
        }
        guard
    }

    /// Adds a region whose memory starts at `start`. Nothing may touch the memory before this returns.
    ///
    /// Waits until the kernel's news of earlier mappings are read: the addresses may have been another region's a moment ago, and a message
    /// that says so must not be taken for news of this one.
    ///
    /// `trap`: what the kernel shall tell of its accesses; `None` leaves the memory as it is.
    pub(crate) fn join(&self, start: usize, entry: Entry, trap: Option<Trap>) -> io::Result<RegionId> {
        const PACE: Duration = Duration::from_micros(20);
        let extent = entry.core.residency().extent();
        loop {
            let mut state = self.lock();
            if state.broken {
                return Err(io::Error::other("the pager has stopped after a panic"));
            }
            if self.uffd.is_quiet() {
                let id = RegionId(state.next_region);
                state.next_region += 1;
                trap.map_or(Ok(()), |trap| self.uffd.register(start, page_len(self.page, extent.count()), trap))?;
                state.map.insert(start as u64, Segment { region: id, extent });
                state.regions.insert(id, entry);
                return Ok(id);
            }
            drop(state);
            if self.service.is_current() {
                // Nobody else reads them then: a callback or a store opens a region.
                self.serve(&mut Vec::new())?;
            }
            std::thread::sleep(PACE);
        }
    }

    /// First half of leaving: replies in flight are dropped and faults are left to wait. The caller unmaps `len` bytes from `start` next.
    /// What mremap(2) took out of that range stays mapped, and what is missing of it is poisoned here.
    pub(crate) fn leave(&self, id: RegionId, start: usize, len: usize) {
        let entry = {
            // With every move of its pages and every child that has a copy of them.
            let mut guard = self.lock_caught_up();
            let state = &mut *guard;
            let all = state.regions.get(&id).map(|entry| entry.core.residency().extent()).unwrap_or_default();
            let own = start as u64..(start + len) as u64;
            for (_, moved) in state.map.locate(id, all).into_iter().filter(|(address, _)| !own.contains(address)) {
                let lost = state.regions.get_mut(&id).map(|entry| entry.core.lose(moved)).unwrap_or_default();
                lost.into_iter().for_each(|extent| self.poison(state, id, extent));
            }
            let entry = state.regions.remove(&id);
            self.give_back_soft_dirty(state);
            entry
        };
        if let Some(entry) = &entry {
            entry.changed.notify_waiters();
        }
        // Dropped without the lock: a store's destructor is the user's code.
        drop(entry);
    }

    /// Second half, after the memory was unmapped: threads that still wait touch nothing that is mapped and get SIGSEGV.
    pub(crate) fn left(&self, id: RegionId, start: usize, len: usize) {
        self.lock_caught_up().map.remove_region(id);
        self.uffd.wake(start, len);
    }

    pub(crate) fn with_entry<T>(&self, id: RegionId, look: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.lock_caught_up().regions.get_mut(&id).map(look)
    }

    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    /// Reads and serves all messages there are.
    fn serve(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut asks = Vec::new();
        let read = {
            let mut guard = self.lock();
            let state = &mut *guard;
            messages.clear();
            messages.append(&mut state.faults);
            let read = self.uffd.read_all(messages);
            let read_at = Instant::now();
            // A fault may be read before the removal that caused it: news first.
            self.apply_news(state, messages);
            for message in messages.drain(..) {
                match message {
                    Message::Fault { address } => self.fault(state, address, read_at, &mut asks),
                    Message::Write { address } => self.let_write(state, address),
                    // Applied above.
                    _ => {}
                }
            }
            read
        };
        asks.into_iter().for_each(|ask| self.request(ask));
        read
    }

    /// Applies all messages but faults, in their order: what a child misses is what was missing here when it was made, not what was discarded since.
    fn apply_news(&self, state: &mut State, messages: &mut Vec<Message>) {
        for message in messages.extract_if(.., |message| !matches!(message, Message::Fault { .. } | Message::Write { .. })) {
            match message {
                Message::Fork { child } => self.forked(state, self.uffd.of_child(child)),
                removal => self.moved(state, &removal),
            }
        }
    }

    pub(super) fn fault(&self, state: &mut State, address: usize, read_at: Instant, asks: &mut Vec<Ask>) {
        let address = address & !(self.page.len() - 1);
        let Some((id, page)) = state.map.find(address as u64) else {
            // Registered and no region's: what mremap(MREMAP_DONTUNMAP) leaves behind, which reads as zeros.
            self.put(state, None, address, Extent::page(0), Owned::Zeros, Origin::Demand);
            return;
        };
        let broken = state.broken;
        // No entry: the region is leaving; its memory is about to be unmapped, and the waiters woken then.
        let Some(entry) = state.regions.get_mut(&id) else { return };
        add(&entry.counters.faults, 1);
        if Engine::is_leaving(entry, page) {
            // It is being dropped: woken when that is done, the thread touches it again.
            return add(&entry.counters.faults_joined, 1);
        }
        let decision = entry.core.fault(page);
        if let (Some(touched), Decision::Ask { .. } | Decision::Joined) = (&mut entry.touched, &decision) {
            touched.push(page);
        }
        if matches!(decision, Decision::Ask { .. } | Decision::Joined) {
            entry.core.touched(page);
            entry.ring();
        }
        if broken && matches!(decision, Decision::Ask { .. } | Decision::Joined) {
            for lost in entry.core.lose(Extent::page(page)) {
                self.poison(state, id, lost);
            }
            return;
        }
        match decision {
            Decision::Wake => {
                add(&entry.counters.faults_already_resident, 1);
                self.uffd.wake(address, self.page.len());
            }
            Decision::Zero => self.put(state, Some(id), address, Extent::page(page), Owned::Zeros, Origin::Demand),
            Decision::Joined => {
                add(&entry.counters.faults_joined, 1);
                let ahead = entry.core.ahead(page);
                add(&entry.counters.ahead_requests, ahead.len() as u64);
                add(&entry.counters.around_requests, ahead.len() as u64);
                let store = &entry.store;
                let ask = |extent| Ask { region: id, extent, origin: Origin::Around, store: store.clone(), read_at };
                asks.extend(ahead.into_iter().map(ask));
            }
            Decision::Ask { around } => {
                add(&entry.counters.demand_requests, 1);
                add(&entry.counters.around_requests, around.len() as u64);
                let neighbours = around.into_iter().map(|extent| (extent, Origin::Around));
                for (extent, origin) in std::iter::once((Extent::page(page), Origin::Demand)).chain(neighbours) {
                    asks.push(Ask { region: id, extent, origin, store: entry.store.clone(), read_at });
                }
            }
        }
    }

    /// The program changed its mappings.
    fn moved(&self, state: &mut State, message: &Message) {
        let (start, len) = match *message {
            // Made by `evict`: what becomes of the pages is decided when they are dropped.
            Message::Remove { start, len } if was_said(&mut state.evictions, (start, len)) => return,
            Message::Remove { start, len } => {
                let announced = state.announced(start, len);
                for (_, segment) in state.map.within(start as u64, len as u64) {
                    self.discarded(state, segment.region, segment.extent, !announced);
                }
                (start, len)
            }
            Message::Unmap { start, len } => {
                for (_, segment) in state.map.remove(start as u64, len as u64) {
                    // They are gone: this message comes after the deed.
                    self.discarded(state, segment.region, segment.extent, false);
                }
                (start, len)
            }
            Message::Remap { from, to, len } => {
                for (_, segment) in state.map.within(from as u64, len as u64) {
                    state.regions.get_mut(&segment.region).into_iter().for_each(|entry| entry.lose(segment.extent));
                }
                state.map.relocate(from as u64, to as u64, len as u64);
                (from, len)
            }
            Message::Fault { .. } | Message::Write { .. } | Message::Fork { .. } => return,
        };
        // Their replies are stale now: whoever waits must touch again to be told what holds there now.
        self.uffd.wake(start, len);
    }

    /// `in_doubt`: the kernel drops the pages at some time after this.
    fn discarded(&self, state: &mut State, id: RegionId, extent: Extent, in_doubt: bool) {
        if let Some(entry) = state.regions.get_mut(&id) {
            entry.core.discarded(extent);
            entry.lose(extent);
            if let Some(tracking) = &mut entry.tracking {
                tracking.written.wrote(extent);
                if in_doubt {
                    tracking.written.doubt(extent);
                }
            }
            add(&entry.counters.pages_discarded, extent.count());
            entry.changed.notify_waiters();
        }
    }

    /// A turn of a loop of the pager; `None` if it panicked.
    pub(super) fn turn<T>(&self, turn: impl FnOnce() -> T) -> Option<T> {
        let done = catch_unwind(AssertUnwindSafe(|| {
            #[cfg(test)]
            assert!(!self.panic_next.swap(false, std::sync::atomic::Ordering::Relaxed), "the test wants a panic here");
            turn()
        }))
        .ok();
        if done.is_none() {
            tracing::error!("the pager panicked; all missing pages are poisoned");
            if catch_unwind(AssertUnwindSafe(|| self.rescue())).is_err() {
                // Better no process than a silent zero page (S1).
                std::process::abort();
            }
        }
        done
    }

    /// After a panic in a loop: no missing page may ever read as zeros, and no thread may wait for ever.
    fn rescue(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.broken = true;
        state.wakes.later = false;
        self.wake_due(state);
        let ids: Vec<RegionId> = state.regions.keys().copied().collect();
        for id in ids {
            let Some(entry) = state.regions.get_mut(&id) else { continue };
            let all = entry.core.residency().extent();
            let lost = entry.core.lose(all);
            entry.cause.get_or_insert(StoreError::Closed);
            for extent in lost {
                let event = RegionEvent::Lost { extent, cause: StoreError::Closed };
                let _ = state.regions.get(&id).map(|entry| entry.events.send(event));
                self.poison(state, id, extent);
            }
            if let Some(entry) = state.regions.get_mut(&id) {
                entry.changed.notify_waiters();
                entry.freezing.iter_mut().for_each(Freezing::forget_readers);
            }
            // Of those who wait to write, the messages may be lost: they fault again, and send new ones.
            for (address, extent) in state.map.locate(id, all) {
                #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                self.uffd.wake(address as usize, page_len(self.page, extent.count()));
            }
        }
    }
}

/// The message loop. Holds the engine only while it serves, so that dropping the last region and pager ends it.
async fn read_messages(engine: Weak<Engine>, readable: AsyncFd<std::os::fd::OwnedFd>, mut stop: oneshot::Receiver<()>) {
    let mut messages = Vec::new();
    loop {
        let mut ready = tokio::select! {
            biased;
            ready = readable.readable() => match ready {
                Ok(ready) => ready,
                Err(error) => return tracing::error!(%error, "the runtime cannot wait for page faults"),
            },
            _ = &mut stop => return,
        };
        let Some(engine) = engine.upgrade() else { return };
        match engine.turn(|| engine.serve(&mut messages)) {
            // Messages that come after the read make the descriptor ready anew: its readiness is edge-triggered.
            Some(Ok(())) => ready.clear_ready(),
            Some(Err(error)) => {
                tracing::error!(%error, "reading page faults failed");
                ready.clear_ready();
            }
            None => {}
        }
    }
}

/// Serves what was read in the pager's place while the program forked.
async fn serve_what_was_read(engine: Weak<Engine>, told: AsyncFd<std::os::fd::OwnedFd>) {
    let mut messages = Vec::new();
    loop {
        let Ok(mut ready) = told.readable().await else { return };
        let Some(engine) = engine.upgrade() else { return };
        // Before it serves: what is read later is told anew.
        ready.clear_ready();
        if let Some(Err(error)) = engine.turn(|| engine.serve(&mut messages)) {
            tracing::error!(%error, "reading page faults failed");
        }
    }
}

/// Wakes threads whose pages came together. Its turn comes after those of the replies that were there when the first of them asked for it.
async fn wake(engine: Weak<Engine>, due: Arc<Notify>) {
    loop {
        due.notified().await;
        let Some(engine) = engine.upgrade() else { return };
        let _ = engine.turn(|| engine.wake_due(&mut engine.lock()));
    }
}

/// Repeats what the kernel put off: at once a few times (the thread that changes its mappings needs one turn), then paced.
async fn settle(engine: Weak<Engine>, more: Arc<Notify>) {
    const AT_ONCE: u32 = 16;
    const PACE: Duration = Duration::from_micros(200);
    loop {
        more.notified().await;
        let mut attempts = 0;
        loop {
            let Some(left) = engine.upgrade().map(|engine| engine.turn(|| engine.settle_once())) else { return };
            if left == Some(false) {
                break;
            }
            attempts += 1;
            if attempts < AT_ONCE {
                tokio::task::yield_now().await;
            } else {
                tokio::time::sleep(PACE).await;
            }
        }
    }
}
