//! Asks stores for pages and brings the replies to the engine.
//!
//! Role: hops *request* and *reply*, and the failure path (S3). Neighbours: `engine` decides what to ask for and installs what comes; stores do the
//! rest. Invariants: each request ends in exactly one of: pages installed, found stale, asked for again, lost; so no fault waits for ever.
//! A request whose store panics, or whose task is cancelled, counts as failed.

use super::{
    address_map::RegionId,
    core::Origin,
    engine::{Engine, Entry, Owned},
    retry::Next,
};
use crate::{Content, Extent, Hop, Loss, OnLoss, PageStore, RegionError, RegionEvent, Run, StoreError, Verdict, stats::add};
use std::{
    future::Future,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Weak},
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

/// What comes after a reply.
enum After {
    Done,
    Retry { wait: Duration, store: Arc<dyn PageStore> },
}

impl Engine {
    /// Makes a request. On the service's thread only.
    ///
    /// The store is asked before anything else runs, and a store that has the pages at hand answers here and now: a task would only
    /// add a turn of the scheduler to the fault.
    pub(super) fn request(&self, ask: Ask) {
        if ask.origin == Origin::Demand {
            self.service.polling().expect();
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

    fn request_faults(&self, region: RegionId, store: &Arc<dyn PageStore>, pages: Vec<u64>) {
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
    fn reply(&self, ask: &Ask, attempt: u32, asked_at: Instant, read: Result<Vec<Run>, StoreError>) -> After {
        let runs = match read.and_then(|runs| checked(ask.extent, runs, self.page)) {
            Ok(runs) => runs,
            Err(error) => return self.failed(ask, attempt, error),
        };
        let replied_at = Instant::now();
        let mut guard = self.lock();
        let state = &mut *guard;
        for run in runs {
            let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
            let wanted = entry.core.arrived(run.extent, ask.origin);
            let wanted_pages: u64 = wanted.iter().map(|extent| extent.count()).sum();
            add(&entry.counters.pages_stale, run.extent.count() - wanted_pages);
            self.install_parts(state, ask.region, &run, wanted, ask.origin);
        }
        let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
        if ask.origin == Origin::Demand {
            // A store that answers at once will see the next fault of the same thread soon: keep polling. Where a peer was asked, the core
            // is better left to the thread that was woken.
            if replied_at - asked_at < AT_ONCE {
                self.service.polling().expect();
            } else {
                self.service.polling().relax();
            }
            let hops = &entry.counters.hops;
            hops.hop(Hop::Decide).record(asked_at.saturating_duration_since(ask.read_at));
            hops.hop(Hop::Store).record(replied_at - asked_at);
            hops.hop(Hop::Total).record(ask.read_at.elapsed());
        }
        entry.answered_by_store();
        let next = entry.core.answered(ask.extent);
        let store = entry.store.clone();
        entry.changed.notify_waiters();
        drop(guard);
        self.request_faults(ask.region, &store, next);
        After::Done
    }

    fn install_parts(&self, state: &mut super::engine::State, id: RegionId, run: &Run, wanted: Vec<Extent>, origin: Origin) {
        let page = self.page;
        for extent in wanted {
            let what = match &run.content {
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
    fn failed(&self, ask: &Ask, attempt: u32, error: StoreError) -> After {
        let mut guard = self.lock();
        let Some(entry) = guard.regions.get_mut(&ask.region) else { return After::Done };
        if entry.core.arrived(ask.extent, ask.origin).is_empty() && ask.origin != Origin::Pull {
            // Nobody wants these pages any more.
            let (next, store) = (entry.core.answered(ask.extent), entry.store.clone());
            drop(guard);
            self.request_faults(ask.region, &store, next);
            return After::Done;
        }
        let replaced = !Arc::ptr_eq(&entry.store, &ask.store);
        if replaced {
            return After::Retry { wait: Duration::ZERO, store: entry.store.clone() };
        }
        if error.is_transient() {
            if entry.outage.starts() {
                tracing::warn!(region = entry.name, %error, "the store is away; reads are repeated");
                let _ = entry.events.send(RegionEvent::StoreAway { cause: error.clone() });
            }
            let next = entry.outage.failed(Instant::now(), entry.loss.keep_trying, attempt, ask.extent.first());
            if let Next::RetryAfter(wait) = next {
                add(&entry.counters.retries, 1);
                return After::Retry { wait, store: entry.store.clone() };
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
        self.carry_out(ask, error, verdict)
    }

    fn carry_out(&self, ask: &Ask, error: StoreError, verdict: Verdict) -> After {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.regions.get_mut(&ask.region) else { return After::Done };
        match verdict {
            Verdict::Fallback(store) => {
                tracing::warn!(region = entry.name, %error, "the store is lost; another one answers from now on");
                entry.store = store.clone();
                entry.outage.over();
                // The spare has no spare.
                entry.loss.then = OnLoss::Poison;
                return After::Retry { wait: Duration::ZERO, store };
            }
            Verdict::KeepTrying(time) => {
                entry.loss.keep_trying = time;
                entry.outage.over();
                let wait = Duration::from_millis(20).min(time.max(Duration::from_millis(1)));
                return After::Retry { wait, store: entry.store.clone() };
            }
            Verdict::Zero => {
                let wanted = entry.core.arrived(ask.extent, ask.origin);
                for extent in wanted {
                    self.install(state, ask.region, extent, &Owned::Zeros, ask.origin);
                }
            }
            Verdict::Poison => {
                // A store that is away is away for all pages; another error concerns these alone.
                let whole = entry.core.residency().extent();
                let lost = entry.core.lose(if error.is_transient() { whole } else { ask.extent });
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
        let (next, store) = (entry.core.answered(ask.extent), entry.store.clone());
        entry.changed.notify_waiters();
        drop(guard);
        self.request_faults(ask.region, &store, next);
        After::Done
    }

    /// Brings `within` in and returns when all of it is resident (or reads as zeros because the program discarded it).
    pub(crate) async fn populate(self: Arc<Self>, id: RegionId, within: Extent) -> Result<(), RegionError> {
        const STEP_BYTES: u64 = 1 << 20;
        loop {
            let Some(changed) = self.with_entry(id, |entry| entry.changed.clone()) else { return Err(RegionError::PagerStopped) };
            let mut changed = std::pin::pin!(changed.notified());
            changed.as_mut().enable();
            let look = self.with_entry(id, |entry| {
                let residency = entry.core.residency();
                if let Some(extent) = residency.lost(within).next() {
                    return Err(RegionError::Lost { extent, cause: entry.cause.clone().unwrap_or(StoreError::Closed) });
                }
                if residency.missing(within).next().is_none() {
                    return Ok(None);
                }
                Ok(Some((entry.core.want(within), entry.store.clone())))
            });
            match look.ok_or(RegionError::PagerStopped)?? {
                None => return Ok(()),
                Some((claimed, store)) => {
                    let step = STEP_BYTES / self.page.bytes();
                    for extent in claimed.into_iter().flat_map(|extent| extent.chunks(step)) {
                        let (store, read_at) = (store.clone(), Instant::now());
                        self.request(Ask { region: id, extent, origin: Origin::Demand, store, read_at });
                    }
                }
            }
            changed.await;
        }
    }

    /// Streams all that is missing in the background and returns when nothing is.
    pub(crate) async fn pull(engine: Weak<Engine>, id: RegionId) -> Result<(), RegionError> {
        let mut attempt = 0;
        loop {
            let Some(strong) = engine.upgrade() else { return Err(RegionError::PagerStopped) };
            let changed = strong.with_entry(id, |entry| entry.changed.clone()).ok_or(RegionError::PagerStopped)?;
            let mut changed = std::pin::pin!(changed.notified());
            changed.as_mut().enable();
            let look = strong.with_entry(id, |entry| {
                let residency = entry.core.residency();
                let all = residency.extent();
                if residency.missing(all).next().is_none() {
                    let lost = residency.lost(all).next();
                    let cause = entry.cause.clone().unwrap_or(StoreError::Closed);
                    let _ = entry.events.send(RegionEvent::Resident);
                    return Err(lost.map_or(Ok(()), |extent| Err(RegionError::Lost { extent, cause })));
                }
                Ok((residency.unasked(all).collect::<Vec<_>>(), entry.store.clone()))
            });
            drop(strong);
            let (missing, store) = match look.ok_or(RegionError::PagerStopped)? {
                Ok(work) => work,
                Err(over) => return over,
            };
            let Some(first) = missing.first().copied() else {
                // What is left is on its way because of faults.
                changed.await;
                continue;
            };
            let error = match pull_once(&engine, id, &store, missing.clone()).await? {
                Ok(0) => {
                    // Pages demanded meanwhile are left out of it, and may still be on their way. What was neither sent nor demanded is missing.
                    let strong = engine.upgrade().ok_or(RegionError::PagerStopped)?;
                    let all_unasked = |entry: &mut Entry| {
                        let residency = entry.core.residency();
                        residency.unasked(residency.extent()).eq(missing)
                    };
                    if !strong.with_entry(id, all_unasked).ok_or(RegionError::PagerStopped)? {
                        continue;
                    }
                    StoreError::Protocol(format!("the bulk read ended without {first}"))
                }
                Ok(_) => {
                    attempt = 0;
                    continue;
                }
                Err(error) => error,
            };
            let strong = engine.upgrade().ok_or(RegionError::PagerStopped)?;
            let ask = Ask { region: id, extent: first, origin: Origin::Pull, store, read_at: Instant::now() };
            let after = strong.failed(&ask, attempt, error);
            drop(strong);
            attempt += 1;
            if let After::Retry { wait, .. } = after {
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// One bulk read to its end: how many pages it brought, or the store's error.
async fn pull_once(
    engine: &Weak<Engine>,
    id: RegionId,
    store: &Arc<dyn PageStore>,
    missing: Vec<Extent>,
) -> Result<Result<u64, StoreError>, RegionError> {
    let mut pages = 0;
    let mut pull = match store.pull(missing).await {
        Ok(pull) => pull,
        Err(error) => return Ok(Err(error)),
    };
    loop {
        let run = match pull.next().await {
            Ok(Some(run)) => run,
            Ok(None) => return Ok(Ok(pages)),
            Err(error) => return Ok(Err(error)),
        };
        let engine = engine.upgrade().ok_or(RegionError::PagerStopped)?;
        pages += run.extent.count();
        if let Err(error) = engine.pulled(id, run)? {
            return Ok(Err(error));
        }
        // A fault that came meanwhile goes first.
        tokio::task::yield_now().await;
    }
}

impl Engine {
    fn pulled(&self, id: RegionId, run: Run) -> Result<Result<(), StoreError>, RegionError> {
        let mut guard = self.lock();
        let state = &mut *guard;
        let entry = state.regions.get_mut(&id).ok_or(RegionError::PagerStopped)?;
        if let Err(error) = check_run(&run, entry.core.residency().extent(), self.page) {
            return Ok(Err(error));
        }
        entry.answered_by_store();
        let wanted = entry.core.arrived(run.extent, Origin::Pull);
        let wanted_pages: u64 = wanted.iter().map(|extent| extent.count()).sum();
        add(&entry.counters.pages_stale, run.extent.count() - wanted_pages);
        let changed = entry.changed.clone();
        self.install_parts(state, id, &run, wanted, Origin::Pull);
        changed.notify_waiters();
        Ok(Ok(()))
    }
}

impl super::engine::Entry {
    fn answered_by_store(&mut self) {
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

fn check_run(run: &Run, within: Extent, page: crate::PageSize) -> Result<(), StoreError> {
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
        let mut attempt = 0;
        loop {
            let asked_at = Instant::now();
            let (store, extent) = (self.ask.store.clone(), self.ask.extent);
            let read = match self.ask.origin {
                Origin::Demand => store.read(extent).await,
                Origin::Around | Origin::Pull => store.read_behind(extent).await,
            };
            let after = match self.engine.upgrade() {
                Some(engine) => engine.reply(&self.ask, attempt, asked_at, read),
                None => After::Done,
            };
            match after {
                After::Done => {
                    self.over = true;
                    return;
                }
                After::Retry { wait, store } => {
                    attempt += 1;
                    self.ask.store = store;
                    tokio::time::sleep(wait).await;
                }
            }
        }
    }
}

impl Drop for Outstanding {
    fn drop(&mut self) {
        if self.over {
            return;
        }
        let Some(engine) = self.engine.upgrade() else { return };
        let error = StoreError::Protocol("the store panicked while it read".into());
        // `KeepTrying` and `Fallback` would need a new task, and this may be the end of the runtime: only poison is sure.
        let _ = engine.carry_out(&self.ask, error, Verdict::Poison);
    }
}
