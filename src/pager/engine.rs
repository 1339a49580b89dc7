//! The state of a pager and its message loop.
//!
//! Role: hop *fault*: reads messages of the kernel, keeps the address map, lets `core` decide and carries the decision out. Neighbours: `requests`
//! asks stores and brings replies here; `install` puts pages in place; `region` joins and leaves. Invariants: messages are read and
//! applied, and pages are installed, under one lock and on the service's thread, so that no install can fall between a
//! removal being read and being known (S4); whatever panics, no descriptor closes while a page that should hold data is missing (S1).

use super::{
    address_map::{AddressMap, RegionId, Segment},
    core::{Core, Decision, Origin},
    gather::Gather,
    install::{Fill, Filled, fill},
    requests::{Ask, Asks},
    residency::Residency,
    retry::Outage,
};
use crate::{
    Content, Extent, LossPolicy, PageSize, PageStore, PagerOptions, RegionEvent, Service, StoreError,
    stats::{Counters, add},
    sys::{EVENTS_A_READ, Features, Mapping, Message, Userfault},
};
use bytes::Bytes;
use std::{
    collections::{HashMap, VecDeque},
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};
use tokio::{
    io::unix::AsyncFd,
    sync::{Notify, broadcast, oneshot},
};
use userfaultfd::EventBuffer;

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
    settle: Arc<Notify>,
    pub(super) gather: Arc<Gather>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Lets these tasks see that the engine is gone.
        self.settle.notify_one();
        self.gather.more.notify_one();
    }
}

pub(super) struct State {
    pub(super) map: AddressMap,
    pub(super) regions: HashMap<RegionId, Entry>,
    /// Fills that the kernel put off.
    again: VecDeque<Again>,
    next_region: u64,
    /// Descriptors of forked children whose missing pages cannot be poisoned on this kernel: closing them would show zeros.
    children: Vec<Userfault>,
    /// Set after a panic: whatever is missing is poisoned from then on.
    broken: bool,
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
    pub(super) counters: Arc<Counters>,
    pub(super) events: broadcast::Sender<RegionEvent>,
    /// Told whenever pages became resident or lost.
    pub(super) changed: Arc<Notify>,
    pub(super) mapping: Weak<Mapping>,
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
        let (outage, changed) = (Outage::default(), Arc::new(Notify::new()));
        Entry { name, core, store, loss, outage, cause: None, counters, events, changed, mapping }
    }

    pub(crate) fn residency(&self) -> &Residency {
        self.core.residency()
    }

    /// The first extent inside `within` that was given up, and why.
    pub(crate) fn first_lost(&self, within: Extent) -> Option<(Extent, StoreError)> {
        let extent = self.residency().lost(within).next()?;
        Some((extent, self.cause.clone().unwrap_or(StoreError::Closed)))
    }
}

struct Again {
    /// None: an address that belongs to no region, to be filled with zeros.
    region: Option<RegionId>,
    address: usize,
    extent: Extent,
    what: Owned,
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

    fn fill(&self, page: PageSize, pages: u64) -> Fill<'_> {
        match self {
            Owned::Bytes(bytes) => Fill::Bytes(bytes),
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
fn page_len(page: PageSize, pages: u64) -> usize {
    page.offset_of(pages) as usize
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
                next_region: 1,
                children: Vec::new(),
                broken: false,
            }),
            settle: Arc::new(Notify::new()),
            gather: Arc::default(),
        });
        let readable = {
            let _context = service.handle().enter();
            engine.uffd.readable()?
        };
        service.spawn(read_messages(engine.me.clone(), readable, stop));
        service.spawn(settle(engine.me.clone(), engine.settle.clone()));
        service.spawn(super::gather::run(engine.me.clone(), engine.gather.clone()));
        Ok(engine)
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves state that `rescue` deals with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a region whose memory starts at `start`. Nothing may touch the memory before this returns.
    ///
    /// Waits until the kernel's news of earlier mappings are read: the addresses may have been another region's a moment ago, and a message
    /// that says so must not be taken for news of this one.
    pub(crate) fn join(&self, start: usize, entry: Entry) -> io::Result<RegionId> {
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
                self.uffd.register(start, page_len(self.page, extent.count()))?;
                state.map.insert(start as u64, Segment { region: id, extent });
                state.regions.insert(id, entry);
                return Ok(id);
            }
            drop(state);
            if self.service.is_current() {
                // Nobody else reads them then: a callback or a store opens a region.
                self.serve(&mut EventBuffer::new(EVENTS_A_READ), &mut Vec::new())?;
            }
            std::thread::sleep(PACE);
        }
    }

    /// First half of leaving: replies in flight are dropped and faults are left to wait. The caller unmaps the memory next.
    pub(crate) fn leave(&self, id: RegionId) {
        let entry = self.lock().regions.remove(&id);
        if let Some(entry) = &entry {
            entry.changed.notify_waiters();
        }
        // Dropped without the lock: a store's destructor is the user's code.
        drop(entry);
    }

    /// Second half, after the memory was unmapped: threads that still wait touch nothing that is mapped and get SIGSEGV.
    pub(crate) fn left(&self, id: RegionId, start: usize, len: usize) {
        self.lock().map.remove_region(id);
        self.uffd.wake(start, len);
    }

    pub(crate) fn with_entry<T>(&self, id: RegionId, look: impl FnOnce(&mut Entry) -> T) -> Option<T> {
        self.lock().regions.get_mut(&id).map(look)
    }

    pub(crate) fn service(&self) -> &Service {
        &self.service
    }

    /// Reads and serves all messages there are.
    fn serve(&self, buffer: &mut EventBuffer, messages: &mut Vec<Message>) -> io::Result<()> {
        let mut asks = Vec::new();
        {
            let mut guard = self.lock();
            let state = &mut *guard;
            messages.clear();
            self.uffd.read_all(buffer, messages)?;
            let read_at = Instant::now();
            // A fault may be read before the removal that caused it: removals first.
            for message in messages.iter().filter(|message| !matches!(message, Message::Fault { .. })) {
                self.moved(state, message);
            }
            for message in messages.drain(..) {
                match message {
                    Message::Fault { address } => self.fault(state, address, read_at, &mut asks),
                    Message::Fork { child } => self.forked(state, child),
                    Message::Remove { .. } | Message::Unmap { .. } | Message::Remap { .. } => {}
                }
            }
        }
        self.request_or_gather(asks);
        Ok(())
    }

    fn fault(&self, state: &mut State, address: usize, read_at: Instant, asks: &mut Vec<Ask>) {
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
        let decision = entry.core.fault(page);
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
            Decision::Joined => add(&entry.counters.faults_joined, 1),
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
            Message::Remove { start, len } => {
                for (_, segment) in state.map.within(start as u64, len as u64) {
                    self.discarded(state, segment.region, segment.extent);
                }
                (start, len)
            }
            Message::Unmap { start, len } => {
                for (_, segment) in state.map.remove(start as u64, len as u64) {
                    self.discarded(state, segment.region, segment.extent);
                }
                (start, len)
            }
            Message::Remap { from, to, len } => {
                state.map.relocate(from as u64, to as u64, len as u64);
                (from, len)
            }
            Message::Fault { .. } | Message::Fork { .. } => return,
        };
        // Their replies are stale now: whoever waits must touch again to be told what holds there now.
        self.uffd.wake(start, len);
    }

    fn discarded(&self, state: &mut State, id: RegionId, extent: Extent) {
        if let Some(entry) = state.regions.get_mut(&id) {
            entry.core.discarded(extent);
            add(&entry.counters.pages_discarded, extent.count());
            entry.changed.notify_waiters();
        }
    }

    /// A child got a copy of the memory (somebody undid `MADV_DONTFORK`). Its pages never come: poison what is missing before its descriptor
    /// closes.
    fn forked(&self, state: &mut State, child: Userfault) {
        if !self.uffd.features().contains(Features::POISON) {
            state.children.push(child);
            return;
        }
        for (at, segment) in state.map.segments() {
            let Some(entry) = state.regions.get(&segment.region) else { continue };
            for missing in entry.core.residency().missing(segment.extent) {
                let address = at + self.page.offset_of(missing.first() - segment.extent.first());
                #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                let filled = fill(&child, self.page, address as usize, Fill::Poison(page_len(self.page, missing.count())));
                tracing::debug!(?filled, %missing, "poisoned what a forked child misses");
            }
        }
    }

    /// Puts content in place at `address`, where the pages of `extent` are.
    fn put(&self, state: &mut State, region: Option<RegionId>, address: usize, extent: Extent, what: Owned, origin: Origin) {
        let start = Instant::now();
        let filled = fill(&self.uffd, self.page, address, what.fill(self.page, extent.count()));
        let Filled { again_from, already_here, gone, failed, calls } = filled;
        let stopped = again_from.or(failed.map(|(from, _)| from));
        let done = stopped.map_or(extent.count(), |from| self.page.page_of(from as u64));
        let (now, rest) =
            (Extent::between(extent.first(), extent.first() + done), Extent::between(extent.first() + done, extent.end()));
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
                counters.hops.hop(crate::Hop::Install).record(start.elapsed());
            }
            if again_from.is_some() {
                add(&counters.installs_again, 1);
                entry.core.postponed(rest);
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
        if self.uffd.features().contains(Features::POISON) {
            return self.install(state, id, extent, &Owned::Poison, Origin::Demand);
        }
        let Some(mapping) = state.regions.get(&id).and_then(|entry| entry.mapping.upgrade()) else { return };
        for (address, piece) in state.map.locate(id, extent) {
            let offset = address.saturating_sub(mapping.address() as u64);
            let len = page_len(self.page, piece.count());
            match mapping.forbid(offset, len) {
                Ok(()) => self.uffd.wake(mapping.address() + page_len(self.page, self.page.page_of(offset)), len),
                // Left missing and registered: its waiters block, which is bad, but nobody reads a zero that should be data.
                Err(error) => tracing::error!(%error, %piece, "lost pages can be neither poisoned nor forbidden"),
            }
        }
    }

    /// Tries again what the kernel put off. Whether anything is left.
    fn settle_once(&self) -> bool {
        let mut guard = self.lock();
        let state = &mut *guard;
        let mut asks = Vec::new();
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
            let Some(entry) = state.regions.get_mut(&id) else { continue };
            let wanted: Vec<Extent> = match what {
                Owned::Poison => entry.core.residency().lost(extent).collect(),
                _ => entry.core.arrived(extent, Origin::Demand),
            };
            let changed = entry.changed.clone();
            for piece in wanted {
                let part = what.part(self.page, piece.first() - extent.first(), piece.count());
                self.install(state, id, piece, &part, origin);
            }
            changed.notify_waiters();
        }
        let left = !state.again.is_empty();
        drop(guard);
        asks.into_iter().for_each(|ask| self.request(ask));
        left
    }

    /// After a panic in the loop: no missing page may ever read as zeros, and no thread may wait for ever.
    fn rescue(&self) {
        let mut guard = self.lock();
        let state = &mut *guard;
        state.broken = true;
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
            if let Some(entry) = state.regions.get(&id) {
                entry.changed.notify_waiters();
            }
        }
    }
}

/// The message loop. Holds the engine only while it serves, so that dropping the last region and pager ends it.
async fn read_messages(engine: Weak<Engine>, readable: AsyncFd<std::os::fd::OwnedFd>, mut stop: oneshot::Receiver<()>) {
    let mut buffer = EventBuffer::new(EVENTS_A_READ);
    let mut messages = Vec::with_capacity(EVENTS_A_READ);
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
        match catch_unwind(AssertUnwindSafe(|| engine.serve(&mut buffer, &mut messages))) {
            // Messages that come after the read make the descriptor ready anew: its readiness is edge-triggered.
            Ok(Ok(())) => ready.clear_ready(),
            Ok(Err(error)) => {
                tracing::error!(%error, "reading page faults failed");
                ready.clear_ready();
            }
            Err(_) => {
                tracing::error!("the pager panicked; all missing pages are poisoned");
                messages.clear();
                if catch_unwind(AssertUnwindSafe(|| engine.rescue())).is_err() {
                    // Better no process than a silent zero page (S1).
                    std::process::abort();
                }
            }
        }
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
            let Some(left) = engine.upgrade().map(|engine| engine.settle_once()) else { return };
            if !left {
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
