//! Brings pages that no thread waits for yet: a range that the program wants, and everything, in the background.
//!
//! Role: hops *request* to *install* for populate calls and pulls. Neighbours: `requests` makes the reads of a populate and deals with
//! failures; `region` starts both. Invariants: a pull leaves the thread to faults between any two runs; what it installs is missing at
//! that moment (S4); it keeps neither the region nor the pager alive.

use super::{
    address_map::RegionId,
    core::Origin,
    engine::Engine,
    installer::Installer,
    order::{Rate, ordered},
    requests::{After, Ask, Failure, check_run},
};
use crate::{Extent, PULL_EXTENT_BYTES, PageStore, RegionError, RegionEvent, Run, StoreError, options::PullPlan, stats::add};
use std::{
    sync::{
        Arc, PoisonError, Weak,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

impl Engine {
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
                if let Some(budget) = entry.core.budget()
                    && !budget.is_lifted()
                    && within.count() > budget.low_pages()
                {
                    // All of it is never here at once.
                    return Err(RegionError::Budget {
                        budget_bytes: self.page.offset_of(budget.limit_pages()),
                        reason: format!("{} bytes were to be here together", within.bytes(self.page)),
                        remedy: "ask for less at a time, or give it more".into(),
                    });
                }
                let claimed = entry.core.want(within);
                entry.ring();
                Ok(Some((claimed, entry.store.clone())))
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

    /// Installs what was sent unasked, as far as it is missing. Waits for room, not for the install.
    pub(crate) async fn push_in(engine: Weak<Engine>, id: RegionId, runs: Vec<Run>) -> Result<(), RegionError> {
        let installer = {
            let engine = engine.upgrade().ok_or(RegionError::PagerStopped)?;
            let within = engine.with_entry(id, |entry| entry.residency().extent()).ok_or(RegionError::PagerStopped)?;
            runs.iter().try_for_each(|run| check_run(run, within, engine.page))?;
            engine.installer()?
        };
        installer.install(id, runs, Arc::default()).await
    }

    /// Returns when everything that was pushed in is installed.
    pub(crate) async fn settled(engine: Weak<Engine>) -> Result<(), RegionError> {
        let installer = engine.upgrade().ok_or(RegionError::PagerStopped)?.installer()?;
        installer.settled().await
    }

    /// Streams all that is missing in the background and returns when nothing is.
    pub(crate) async fn pull(engine: Weak<Engine>, id: RegionId, plan: PullPlan) -> Result<(), RegionError> {
        let mut rate = Rate::new(plan.bytes_s, Instant::now());
        let (mut attempt, mut failing_since) = (0, None);
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
                    return Err(match lost {
                        Some(extent) => Err(RegionError::Lost { extent, cause }),
                        None => {
                            let _ = entry.events.send(RegionEvent::Resident);
                            Ok(())
                        }
                    });
                }
                let room = entry.core.room_for_pull();
                if room == 0 {
                    return Err(Ok(()));
                }
                Ok((residency.unasked(all).collect::<Vec<_>>(), room, entry.store.clone()))
            });
            let page = strong.page;
            drop(strong);
            let (missing, room, store) = match look.ok_or(RegionError::PagerStopped)? {
                Ok(work) => work,
                Err(over) => return over,
            };
            if missing.is_empty() {
                // What is left is on its way because of faults.
                changed.await;
                continue;
            }
            // Of a budget, the first in order is what there is room for.
            let missing = first_pages(ordered(missing, &plan.order, page).into_iter(), room);
            let (pages, end) = pull_once(&engine, id, &store, missing.clone(), &mut rate).await?;
            if pages > 0 {
                (attempt, failing_since) = (0, None);
            }
            let strong = engine.upgrade().ok_or(RegionError::PagerStopped)?;
            // A bulk read may leave out what was sent in answer to a fault meanwhile; and its error may concern any of its pages, of which those
            // that come first and did not come are given up, if it comes to that: a few at first.
            let step = (PULL_EXTENT_BYTES / strong.page.bytes()) << attempt.min(20);
            let left = strong.with_entry(id, |entry| {
                let left = missing.iter().flat_map(|extent| entry.core.residency().unasked(*extent)).next();
                left.and_then(|extent| extent.chunks(step).next())
            });
            let Some(extent) = left.ok_or(RegionError::PagerStopped)? else { continue };
            if strong.with_entry(id, |entry| entry.core.room_for_pull()) == Some(0) {
                continue;
            }
            let error = match end {
                Ok(()) if pages > 0 => continue,
                // What was sent on demand may have been for another region over the same store: the next bulk read starts its own account.
                Ok(()) if attempt < LEFT_OUT_MAX => {
                    attempt += 1;
                    continue;
                }
                Ok(()) => StoreError::Protocol(format!("the bulk read ended without {extent}")),
                Err(error) => error,
            };
            let ask = Ask { region: id, extent, origin: Origin::Pull, store, read_at: Instant::now() };
            let at = Instant::now();
            let since = *failing_since.get_or_insert(at);
            let after = strong.failed(&ask, Failure { error, attempt, at, since });
            drop(strong);
            attempt += 1;
            if let After::Retry { wait, failing_since: since, .. } = after {
                failing_since = since;
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// As much of the extents as has room.
fn first_pages(extents: impl Iterator<Item = Extent>, room_pages: u64) -> Vec<Extent> {
    let mut left = room_pages;
    let part = |extent: Extent| {
        let part = Extent::between(extent.first(), extent.end().min(extent.first().saturating_add(left)));
        left -= part.count();
        (!part.is_empty()).then_some(part)
    };
    extents.map_while(part).collect()
}

/// Bulk reads in a row that may end without a page that is still missing.
const LEFT_OUT_MAX: u32 = 3;

/// One bulk read to its end: how many pages it brought that were wanted, and how it ended.
async fn pull_once(
    engine: &Weak<Engine>,
    id: RegionId,
    store: &Arc<dyn PageStore>,
    missing: Vec<Extent>,
    rate: &mut Rate,
) -> Result<(u64, Result<(), StoreError>), RegionError> {
    let installer = engine.upgrade().ok_or(RegionError::PagerStopped)?.installer()?;
    let wanted_pages = Arc::new(AtomicU64::new(0));
    let end = stream_in(engine, id, store, missing, (&installer, &wanted_pages), rate).await;
    // What came is here before anybody asks what is still missing.
    installer.settled().await?;
    Ok((wanted_pages.load(Relaxed), end?))
}

async fn stream_in(
    engine: &Weak<Engine>,
    id: RegionId,
    store: &Arc<dyn PageStore>,
    missing: Vec<Extent>,
    (installer, wanted_pages): (&Installer, &Arc<AtomicU64>),
    rate: &mut Rate,
) -> Result<Result<(), StoreError>, RegionError> {
    let mut pull = match store.pull(missing).await {
        Ok(pull) => pull,
        Err(error) => return Ok(Err(error)),
    };
    loop {
        let run = match pull.next().await {
            Ok(Some(run)) => run,
            Ok(None) => return Ok(Ok(())),
            Err(error) => return Ok(Err(error)),
        };
        let (within, page) = {
            let engine = engine.upgrade().ok_or(RegionError::PagerStopped)?;
            let within = engine.with_entry(id, |entry| entry.residency().extent()).ok_or(RegionError::PagerStopped)?;
            (within, engine.page)
        };
        if let Err(error) = check_run(&run, within, page) {
            return Ok(Err(error));
        }
        let bytes = run.content_bytes() as u64;
        installer.install(id, vec![run], wanted_pages.clone()).await?;
        let wait = rate.after(bytes, Instant::now());
        if !wait.is_zero() {
            tokio::time::sleep(wait).await;
        }
        // A fault that came meanwhile goes first.
        tokio::task::yield_now().await;
    }
}

impl Engine {
    /// The thread that installs what pulls bring, started with the first.
    fn installer(&self) -> Result<Arc<Installer>, RegionError> {
        let mut slot = self.installer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(installer) = &*slot {
            return Ok(installer.clone());
        }
        let installer = Installer::start(self.me.clone()).map_err(|error| RegionError::system("starting a thread", error))?;
        Ok(slot.insert(Arc::new(installer)).clone())
    }

    /// Installs what a bulk read brought; how many pages of it were wanted.
    pub(super) fn install_pulled(&self, id: RegionId, run: &Run) -> u64 {
        let mut guard = self.lock();
        let state = &mut *guard;
        let Some(entry) = state.regions.get_mut(&id) else { return 0 };
        entry.answered_by_store();
        let mut wanted = entry.core.arrived(run.extent, Origin::Pull);
        wanted = first_pages(wanted.into_iter(), entry.core.room_for_pull());
        let wanted_pages: u64 = wanted.iter().map(|extent| extent.count()).sum();
        add(&entry.counters.pages_stale, run.extent.count() - wanted_pages);
        let changed = entry.changed.clone();
        self.install_parts(state, id, run, wanted, Origin::Pull);
        drop(guard);
        changed.notify_waiters();
        wanted_pages
    }
}
