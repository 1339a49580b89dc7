//! Asks stores for pages and brings the replies to the engine.
//!
//! Role: hops *request* and *reply*, and the failure path (S3). Neighbours: `engine` decides what to ask for and installs what comes; stores do the
//! rest. Invariants: each request ends in exactly one of: pages installed, found stale, asked for again, lost; so no fault waits for ever.
//! A request whose store panics, or whose task is cancelled, counts as failed.

use super::{
    address_map::RegionId,
    core::Origin,
    engine::Engine,
    place::{Owned, page_len},
    retry::{Next, Outage},
};
use crate::{Content, Extent, Hop, Loss, OnLoss, PageStore, RegionEvent, Run, StoreError, Verdict, stats::add};
use std::{
    collections::VecDeque,
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError, Weak, atomic::Ordering::Relaxed},
    task::{Context, Waker},
    time::{Duration, Instant},
};

/// A request to be made.
pub(super) struct Ask {
    pub(super) region: RegionId,
    pub(super) extent: Extent,
    pub(super) origin: Origin,
    pub(super) store: Arc<dyn PageStore>,
    pub(super) read_at: Instant,
}

/// A store that takes no longer has its pages in memory here: a wake-up alone takes about as long.
const AT_ONCE: Duration = Duration::from_micros(10);

/// Requests in the order in which they are to be made. A store that answers at once lets a waiting fault have its turn while its own
/// request is being made; were that one made there and then, a thousand waiting faults would be as many frames of stack.
#[derive(Default)]
pub(super) struct Asks(Mutex<Queue>);

#[derive(Default)]
struct Queue {
    asks: VecDeque<Ask>,
    /// Somebody further up the stack makes them.
    being_made: bool,
}

impl Asks {
    /// Whether the caller must make requests until there are no more.
    fn push(&self, ask: Ask) -> bool {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.asks.push_back(ask);
        !std::mem::replace(&mut queue.being_made, true)
    }

    fn pop(&self) -> Option<Ask> {
        let mut queue = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        queue.being_made = !queue.asks.is_empty();
        queue.asks.pop_front()
    }
}

/// What comes after a reply.
pub(super) enum After {
    Done,
    Retry { wait: Duration, store: Arc<dyn PageStore>, failing_since: Option<Instant> },
}

/// A read that failed.
pub(super) struct Failure {
    pub(super) error: StoreError,
    pub(super) attempt: u32,
    pub(super) at: Instant,
    /// Since when reads of these pages fail without a break.
    pub(super) since: Instant,
}

impl Engine {
    /// Makes a request. On the service's thread only.
    ///
    /// The store is asked before anything else runs, and a store that has the pages at hand answers here and now: a task would only
    /// add a turn of the scheduler to the fault.
    pub(super) fn request(&self, ask: Ask) {
        if !self.asks.push(ask) {
            return;
        }
        while let Some(ask) = self.asks.pop() {
            if ask.origin == Origin::Demand {
                self.service.polling().expect();
                self.demands.fetch_add(1, Relaxed);
            }
            let mut future: Pin<Box<dyn Future<Output = ()> + Send>> =
                Box::pin(Outstanding { engine: self.me.clone(), ask, over: false }.run());
            let mut context = Context::from_waker(Waker::noop());
            // A task polls it again at once, with its own waker.
            let first = catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut context)));
            if matches!(first, Ok(std::task::Poll::Pending)) {
                self.service.spawn(future);
            }
        }
    }

    pub(super) fn request_faults(&self, region: RegionId, store: &Arc<dyn PageStore>, pages: Vec<u64>) {
        for page in pages {
            self.request(Ask {
                region,
                extent: Extent::page(page),
                origin: Origin::Demand,
                store: store.clone(),
                read_at: Instant::now(),
            });
        }
    }

    /// Pages came, or an error did.
    fn reply(&self, ask: &Ask, asked_at: Instant, read: Result<Vec<Run>, Failure>) -> After {
        let runs = match read {
            Ok(runs) => runs,
            Err(failure) => return self.failed(ask, failure),
        };
        let replied_at = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
        let mut installs = Vec::with_capacity(runs.len());
        for run in runs {
            let wanted = entry.core.arrived(run.extent, ask.origin);
            let wanted_pages: u64 = wanted.iter().map(|extent| extent.count()).sum();
            add(&entry.counters.pages_stale, run.extent.count() - wanted_pages);
            installs.push((run, wanted));
        }
        // Before the installs: pages that the kernel puts off count as asked for until it takes them, though their request is over.
        let next = entry.core.answered(ask.extent);
        entry.answered_by_store();
        let (store, changed) = (entry.store.clone(), entry.changed.clone());
        // With others on their way, what comes next may be here already.
        state.wakes.later = ask.origin == Origin::Demand && self.demands.load(Relaxed) > 1;
        for (run, wanted) in installs {
            self.install_parts(state, ask.region, &run, wanted, ask.origin);
        }
        state.wakes.later = false;
        if ask.origin == Origin::Demand
            && let Some(entry) = state.regions.get(&ask.region)
        {
            // A store that answers at once will see the next fault of the same thread soon, and others wait for their answers: keep polling. Where
            // a peer was asked and nobody waits, the core is better left to the thread that was woken.
            if replied_at - asked_at < AT_ONCE || self.demands.load(Relaxed) > 1 {
                self.service.polling().expect();
            } else {
                self.service.polling().relax();
            }
            let hops = &entry.counters.hops;
            hops.hop(Hop::Decide).record(asked_at.saturating_duration_since(ask.read_at));
            hops.hop(Hop::Store).record(replied_at - asked_at);
            hops.hop(Hop::Total).record(ask.read_at.elapsed());
        }
        drop(guard);
        changed.notify_waiters();
        self.request_faults(ask.region, &store, next);
        After::Done
    }

    pub(super) fn install_parts(
        &self,
        state: &mut super::engine::State,
        id: RegionId,
        run: &Run,
        wanted: Vec<Extent>,
        origin: Origin,
    ) {
        let page = self.page;
        // A page of zeros cannot come protected, and would have to be written to the store before it may go. Bytes can.
        let evicting = state.regions.get(&id).is_some_and(|entry| entry.evicting.is_some() && entry.tracking.is_some());
        for extent in wanted {
            let what = match &run.content {
                Content::Zero if evicting => Owned::Bytes(vec![0; page_len(page, extent.count())].into()),
                Content::Zero => Owned::Zeros,
                Content::Bytes(bytes) => {
                    let from = page.offset_of(extent.first() - run.extent.first());
                    let to = from + extent.bytes(page);
                    #[allow(clippy::cast_possible_truncation, reason = "inside `bytes`, whose length was checked against the run")]
                    Owned::Bytes(bytes.slice(from as usize..to as usize))
                }
            };
            self.install(state, id, extent, &what, origin);
        }
    }

    /// A read failed: again, or the loss policy's last word.
    pub(super) fn failed(&self, ask: &Ask, failure: Failure) -> After {
        let Failure { error, attempt, at, since } = failure;
        let mut guard = self.lock();
        let Some(entry) = guard.regions.get_mut(&ask.region) else { return After::Done };
        let unwanted = ask.origin != Origin::Pull && entry.core.arrived(ask.extent, ask.origin).is_empty();
        if unwanted || ask.origin == Origin::Around {
            drop(guard);
            return self.forget(ask);
        }
        let replaced = !Arc::ptr_eq(&entry.store, &ask.store);
        if replaced {
            return After::Retry { wait: Duration::ZERO, store: entry.store.clone(), failing_since: None };
        }
        // A store that is away is away for all pages; another error concerns these alone.
        let mut given_up = ask.extent;
        if error.is_transient() {
            if entry.outage.starts() {
                tracing::warn!(region = entry.name, %error, "the store is away; reads are repeated");
                let _ = entry.events.send(RegionEvent::StoreAway { cause: error.clone() });
            }
            match entry.outage.failed(at, since, entry.loss.keep_trying, attempt, ask.extent.first()) {
                Next::RetryAfter(wait) => {
                    add(&entry.counters.retries, 1);
                    return After::Retry { wait, store: entry.store.clone(), failing_since: Some(since) };
                }
                Next::GiveUpAll => given_up = entry.core.residency().extent(),
                Next::GiveUpThis => {}
            }
        }
        let (then, name) = (entry.loss.then.clone(), entry.name.clone());
        drop(guard);
        let verdict = match then {
            OnLoss::Poison => Verdict::Poison,
            OnLoss::Fallback(store) => Verdict::Fallback(store),
            OnLoss::Ask(decide) => {
                let loss = Loss { region: name, extent: ask.extent, cause: error.clone() };
                catch_unwind(AssertUnwindSafe(|| decide(&loss))).unwrap_or(Verdict::Poison)
            }
        };
        self.carry_out(ask, error, given_up, verdict)
    }

    /// Ends a request without pages that nobody is known to need. Neighbours that could not be read ahead are no loss: whoever waits for one
    /// touches it again, and then it is asked for by name.
    fn forget(&self, ask: &Ask) -> After {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
        let (next, store) = (entry.core.answered(ask.extent), entry.store.clone());
        for (address, piece) in state.map.locate(ask.region, ask.extent) {
            #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
            self.uffd.wake(address as usize, piece.bytes(self.page) as usize);
        }
        drop(guard);
        self.request_faults(ask.region, &store, next);
        After::Done
    }

    /// Does with the pages of `ask` what the program or its policy decided, and poisons `given_up` if that is it.
    fn carry_out(&self, ask: &Ask, error: StoreError, given_up: Extent, verdict: Verdict) -> After {
        // Declared before the lock, so dropped after it: a callback may hold the last handle of a region.
        let _replaced;
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
        let next;
        match verdict {
            Verdict::Fallback(store) => {
                tracing::warn!(region = entry.name, %error, "the store is lost; another one answers from now on");
                entry.store = store.clone();
                entry.outage.over();
                // The spare has no spare.
                _replaced = std::mem::replace(&mut entry.loss.then, OnLoss::Poison);
                return After::Retry { wait: Duration::ZERO, store, failing_since: None };
            }
            Verdict::KeepTrying(time) => {
                entry.loss.keep_trying = time;
                entry.outage.over();
                let wait = Duration::from_millis(20).min(time.max(Duration::from_millis(1)));
                return After::Retry { wait, store: entry.store.clone(), failing_since: None };
            }
            Verdict::Zero => {
                let wanted = entry.core.arrived(ask.extent, ask.origin);
                next = entry.ended(ask);
                for extent in wanted {
                    self.install(state, ask.region, extent, &Owned::Zeros, ask.origin);
                }
            }
            Verdict::Poison => {
                let lost = entry.core.lose(given_up);
                next = entry.ended(ask);
                entry.cause = Some(error.clone());
                for extent in lost {
                    tracing::error!(region = state.regions.get(&ask.region).map(|entry| entry.name.as_str()), %extent, %error, "pages are lost");
                    self.poison(state, ask.region, extent);
                    if let Some(entry) = state.regions.get(&ask.region) {
                        let _ = entry.events.send(RegionEvent::Lost { extent, cause: error.clone() });
                    }
                }
            }
        }
        let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
        let store = entry.store.clone();
        entry.changed.notify_waiters();
        drop(guard);
        self.request_faults(ask.region, &store, next);
        After::Done
    }
}

impl super::engine::Entry {
    /// A request is over: the faults that may be asked for now. A pull is no request of `core`'s.
    fn ended(&mut self, ask: &Ask) -> Vec<u64> {
        if ask.origin == Origin::Pull { Vec::new() } else { self.core.answered(ask.extent) }
    }

    pub(super) fn answered_by_store(&mut self) {
        if self.outage.over() {
            tracing::info!(region = self.name, "the store is back");
            let _ = self.events.send(RegionEvent::StoreBack);
        }
    }
}

/// Refuses an answer that is not exactly what was asked for: installing it would leave a fault waiting or a page wrong.
fn checked(asked: Extent, runs: Vec<Run>, page: crate::PageSize) -> Result<Vec<Run>, StoreError> {
    let mut next = asked.first();
    for run in &runs {
        if run.extent.first() != next {
            return Err(StoreError::Protocol(format!(
                "asked for {asked}, the answer skips from page {next} to {}",
                run.extent.first()
            )));
        }
        check_run(run, asked, page)?;
        next = run.extent.end();
    }
    if next == asked.end() {
        Ok(runs)
    } else {
        Err(StoreError::Protocol(format!("asked for {asked}, the answer ends at page {next}")))
    }
}

pub(super) fn check_run(run: &Run, within: Extent, page: crate::PageSize) -> Result<(), StoreError> {
    let expected_bytes = run.extent.bytes(page);
    match &run.content {
        _ if run.extent.is_empty() || !within.covers(run.extent) => {
            Err(StoreError::Protocol(format!("asked for {within}, got {}", run.extent)))
        }
        Content::Bytes(bytes) if bytes.len() as u64 != expected_bytes => {
            Err(StoreError::WrongLength { expected_bytes, got_bytes: bytes.len() as u64 })
        }
        _ => Ok(()),
    }
}

/// A request on its way. Dropped before its end (its store panicked, its runtime ended) it counts as failed.
struct Outstanding {
    engine: Weak<Engine>,
    ask: Ask,
    over: bool,
}

impl Outstanding {
    async fn run(mut self) {
        let (mut attempt, mut failing_since) = (0, None);
        loop {
            let asked_at = Instant::now();
            let (store, extent) = (self.ask.store.clone(), self.ask.extent);
            let patience =
                self.engine.upgrade().and_then(|engine| engine.with_entry(self.ask.region, |entry| entry.loss.keep_trying));
            let Some(patience) = patience else { break };
            let read = async {
                match self.ask.origin {
                    Origin::Demand => store.read(extent).await,
                    Origin::Around | Origin::Pull => store.read_behind(extent).await,
                }
            };
            let within = Outage::answer_within(asked_at, failing_since, patience);
            let read = tokio::time::timeout(within, read).await;
            let Some(engine) = self.engine.upgrade() else { break };
            let read = match read {
                Ok(read) => read.and_then(|runs| checked(extent, runs, engine.page)).map_err(|error| (error, None)),
                Err(_) => Err((no_answer(within), Some(asked_at))),
            };
            let read = read.map_err(|(error, began)| {
                let at = Instant::now();
                Failure { error, attempt, at, since: *failing_since.get_or_insert(began.unwrap_or(at)) }
            });
            match engine.reply(&self.ask, asked_at, read) {
                After::Done => break,
                After::Retry { wait, store, failing_since: since } => {
                    drop(engine);
                    attempt += 1;
                    (self.ask.store, failing_since) = (store, since);
                    tokio::time::sleep(wait).await;
                }
            }
        }
        self.end();
    }

    fn end(&mut self) {
        self.over = true;
        if self.ask.origin == Origin::Demand
            && let Some(engine) = self.engine.upgrade()
        {
            engine.demands.fetch_sub(1, Relaxed);
        }
    }
}

fn no_answer(within: Duration) -> StoreError {
    StoreError::Unreachable { peer: "store".into(), reason: format!("it did not answer a read within {within:?}") }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        self.end();
        let Some(engine) = self.engine.upgrade() else { return };
        let error = StoreError::Protocol("the store panicked while it read".into());
        // `KeepTrying` and `Fallback` would need a new task, and this may be the end of the runtime: only poison is sure.
        let _ = match self.ask.origin {
            Origin::Around => engine.forget(&self.ask),
            Origin::Demand | Origin::Pull => engine.carry_out(&self.ask, error, self.ask.extent, Verdict::Poison),
        };
    }
}
