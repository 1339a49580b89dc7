//! A store mapped as memory: it fills in the background, and what is written goes back.
//!
//! Role: joins a region, a pull and a push. Neighbours: `builder` opens one; `push` writes back; a [`Region`] and its pager do the paging. Invariants: S5: what is written is taken before it is
//! read, and counts as written until the store has said that it is durable; S9: closing, and dropping, push what is left, and an error reaches the caller or the log.

mod builder;
mod evict;
mod push;
mod working_set;

use crate::{Extent, Region, RegionError, StoreError, pager::Bell};
use push::Pusher;
use std::{
    ops::Range,
    sync::Arc,
    time::{Duration, Instant},
};
use thiserror::Error;
use tokio::{
    sync::{broadcast, watch},
    task::AbortHandle,
};

pub use builder::MountBuilder;
pub use working_set::{WorkingSet, WorkingSetError};

/// A store as memory.
///
/// Managed, as it comes: from before [`open`](MountBuilder::open) returns, everything that is missing is pulled in the background, faults overtake that, and what the program writes is
/// pushed to the store every [interval](MountBuilder::push_every). [Direct](MountBuilder::direct): pages come when they are touched, and go when [`flush`](Mount::flush) is called.
///
/// The memory is [`region`](Mount::region)'s. Clones of that may outlive the mount; what is written through them after [`close`](Mount::close) stays here.
///
/// Dropping a mount pushes what is left, which blocks for as long as the store takes and at most as long as it is [kept trying](MountBuilder::keep_trying); an error is only logged then. Call
/// [`close`](Mount::close) to hear of it.
///
/// ```
/// use pageferry::{MemoryStore, Mount, PageSize, PageStore};
/// # if pageferry::Capabilities::probe().write_protect() {
/// # let runtime = tokio::runtime::Builder::new_current_thread().build()?;
/// # runtime.block_on(async {
/// let store = std::sync::Arc::new(MemoryStore::zeroed(1 << 20, PageSize::KIB_4));
/// let mount = Mount::builder(store.clone()).name("scores").open()?;
/// mount.region().write_at(5000, b"seven")?;
/// mount.flush().await?;                     // durable in the store, or an error that says what is not
/// let mut page = vec![0; 4096];
/// store.read_into(pageferry::Extent::page(1), &mut page).await?;
/// assert_eq!(&page[5000 - 4096..][..5], b"seven");
/// mount.close().await?;
/// # Ok::<(), Box<dyn std::error::Error>>(()) }).unwrap();
/// # }
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
pub struct Mount {
    region: Region,
    /// `None` if it is read-only.
    pusher: Option<Arc<Pusher>>,
    /// Dropped when no interval shall begin any more.
    intervals: Option<watch::Sender<()>>,
    pull: Option<Pulling>,
    events: broadcast::Sender<MountEvent>,
    /// If it has a budget.
    bell: Option<Arc<Bell>>,
}

#[derive(Debug)]
struct Pulling {
    task: AbortHandle,
    ended: watch::Receiver<Option<Result<(), RegionError>>>,
    since: Instant,
}

/// What happens in the background of a [`Mount`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum MountEvent {
    /// The pull is over: every page is here, or as many as the [budget](MountBuilder::budget) has room for, or it says why not.
    Pulled(Result<(), RegionError>),
    /// What was written is durable in the store.
    Pushed(Pushed),
    /// It is not: it still counts as written, and is pushed with the next interval or flush.
    PushFailed(MountError),
    /// More must be here than the [budget](MountBuilder::budget) allows: pages were wanted, and none could be evicted, because what was written cannot be pushed, or the region is frozen.
    OverBudget {
        /// What is here now; it may become more.
        resident_bytes: u64,
        /// What should be.
        budget_bytes: u64,
    },
    /// After [`MountEvent::OverBudget`]: what is here is within the budget again.
    WithinBudget,
}

/// What a push brought to the store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Pages written.
    pub pages: u64,
    /// Writes that this took: pages that touch go together.
    pub extents: u64,
    /// From asking what was written until the store said that it is durable.
    pub took: Duration,
}

/// How far the pull of a [`Mount`] is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MountProgress {
    /// All pages.
    pub pages: u64,
    /// Those that hold their data here.
    pub resident_pages: u64,
    /// Until none is missing, at the rate since the mount was opened; `None` while that cannot be told, or when nothing is pulled.
    pub left: Option<Duration>,
}

impl MountProgress {
    /// Of the pages that are here, from 0 to 100.
    #[must_use]
    #[allow(clippy::cast_precision_loss, reason = "a figure to look at")]
    pub fn percent(&self) -> f64 {
        if self.pages == 0 { 100.0 } else { self.resident_pages as f64 * 100.0 / self.pages as f64 }
    }
}

/// A mount could not be opened, or what was written could not be made durable.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum MountError {
    /// The memory.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Pages could not be written to the store. They, and all others that were to be pushed with them, count as written still.
    #[error("{extent} could not be written to the store in {attempts} attempts, nor could {more_pages} other pages: {cause}")]
    Push {
        /// The first of them.
        extent: Extent,
        /// How often it was tried.
        attempts: u32,
        /// Pages beside them that could not be written either.
        more_pages: u64,
        /// What the store answered last.
        cause: StoreError,
    },
    /// The store took the pages and could not make them durable. They count as written still.
    #[error("the store could not make {pages} pages durable: {cause}")]
    Flush {
        /// That were written to it.
        pages: u64,
        /// What it answered.
        cause: StoreError,
    },
    /// The mount's pager has stopped.
    #[error("the mount's pager has stopped")]
    Closed,
}

impl Mount {
    /// Starts to describe a mount of a store.
    #[must_use]
    pub fn builder(store: Arc<dyn crate::PageStore>) -> MountBuilder {
        MountBuilder::new(store)
    }

    /// The memory.
    #[must_use]
    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Returns when all that was written before this call is durable in the store. Of a read-only mount: at once.
    ///
    /// While the store is [away](StoreError::is_transient), it is tried again for as long as [the mount keeps trying](MountBuilder::keep_trying).
    ///
    /// Cancellation: the push goes on.
    ///
    /// # Errors
    /// [`MountError::Push`], [`MountError::Flush`]: what was to be pushed counts as written still, and the next push or flush begins with it.
    pub async fn flush(&self) -> Result<Pushed, MountError> {
        let Some(pusher) = self.pusher.clone() else { return Ok(Pushed::default()) };
        let service = pusher.service().clone();
        service.spawn(async move { pusher.push().await }).await.map_err(|_| MountError::Closed)?
    }

    /// Ends the mount: nothing is pulled any more, and all that was written is made durable.
    ///
    /// Cancellation: the push goes on, and its error is only logged.
    ///
    /// # Errors
    /// As for [`flush`](Mount::flush). The memory is there still if a clone of [`region`](Mount::region) was kept.
    pub async fn close(mut self) -> Result<Pushed, MountError> {
        self.end_background();
        let flushed = self.flush().await;
        self.pusher = None;
        flushed
    }

    /// Brings a range of bytes in before what the pull would bring next. Returns at once; [`Region::populate`] waits for it.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`].
    pub fn prioritise(&self, range: Range<u64>) -> Result<(), RegionError> {
        self.region.bring(range)
    }

    /// Returns when the pull is over. Of a mount without one: at once.
    ///
    /// # Errors
    /// [`RegionError::Lost`] when pages were given up, [`RegionError::PagerStopped`] when the pull was [cancelled](Mount::cancel_pull).
    pub async fn pulled(&self) -> Result<(), RegionError> {
        let Some(pull) = &self.pull else { return Ok(()) };
        let mut ended = pull.ended.clone();
        let ended = ended.wait_for(Option::is_some).await.map_err(|_| RegionError::PagerStopped)?;
        ended.clone().unwrap_or(Err(RegionError::PagerStopped))
    }

    /// Ends the pull. What is missing comes when it is touched.
    pub fn cancel_pull(&self) {
        if let Some(pull) = &self.pull {
            pull.task.abort();
        }
    }

    /// How far the pull is, now.
    #[must_use]
    pub fn progress(&self) -> MountProgress {
        let residency = self.region.residency();
        let to_come = match self.region.budget() {
            Some(budget) => residency.missing().min(budget.pull_pages().saturating_sub(residency.resident)),
            None => residency.missing(),
        };
        let left = self.pull.as_ref().and_then(|pull| {
            let running = pull.ended.borrow().is_none();
            if running { left(residency.resident, to_come, pull.since.elapsed()) } else { None }
        });
        MountProgress { pages: residency.pages, resident_pages: residency.resident, left }
    }

    /// The pages that were touched so far, in order, if [that is recorded](MountBuilder::record_touches); else none.
    #[must_use]
    pub fn working_set(&self) -> WorkingSet {
        WorkingSet::of_touches(self.region.page_size(), self.region.extent().count(), &self.region.touched())
    }

    /// News of this mount from now on. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MountEvent> {
        self.events.subscribe()
    }

    fn end_background(&mut self) {
        self.cancel_pull();
        self.intervals = None;
        if let Some(bell) = self.bell.take() {
            bell.end();
            self.region.end_budget();
        }
    }
}

/// Until `missing` pages have come too.
fn left(came: u64, missing: u64, elapsed: Duration) -> Option<Duration> {
    if missing == 0 {
        return Some(Duration::ZERO);
    }
    let left_us = elapsed.as_micros().checked_mul(u128::from(missing))?.checked_div(u128::from(came))?;
    u64::try_from(left_us).ok().map(Duration::from_micros)
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.end_background();
        let Some(pusher) = self.pusher.take() else { return };
        let service = pusher.service().clone();
        let push = async move {
            if let Err(error) = pusher.push().await {
                tracing::error!(%error, region = pusher.region().name(), "a mount was dropped, and not all that was written to it is durable");
            }
            // The last handle of the region, perhaps: it unmaps on a thread that serves nobody.
            let _ = tokio::task::spawn_blocking(move || drop(pusher)).await;
        };
        if service.is_current() {
            // It must not wait for itself (S2).
            drop(service.spawn(push));
        } else {
            service.run(push);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_told_by_what_came() {
        let second = Duration::from_secs(1);
        assert_eq!(left(100, 300, second), Some(3 * second));
        assert_eq!(left(0, 300, second), None);
        assert_eq!(left(0, 0, second), Some(Duration::ZERO));
        let progress = MountProgress { pages: 400, resident_pages: 100, left: None };
        assert!((progress.percent() - 25.0).abs() < 1e-9);
    }
}
