//! Keeps a mount within its memory budget.
//!
//! Role: the thread `pageferry-evict` of a mount with a budget. Neighbours: the pager rings when much is here; [`Region::evict_some`](crate::Region) drops clean pages; the pusher makes written ones
//! clean. Invariants: S5: nothing is dropped that the store does not have; nothing waits for room for longer than [`OVER_AFTER`] in which none can be made: then the budget is exceeded, and told.

use super::{MountEvent, push::Pusher};
use crate::{
    pager::{Bell, Fill},
    region::{Step, WeakRegion},
};
use std::{
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::sync::broadcast;

/// See the module header. A store that pauses for less is no reason to take more memory than was allowed.
const OVER_AFTER: Duration = Duration::from_secs(1);
/// Between looks while nothing can be dropped, and between pushes that fail.
const PACE: Duration = Duration::from_millis(50);
const FAILED_PACE: Duration = Duration::from_millis(500);
/// As the pager tries again what the kernel put off.
const SOON: Duration = Duration::from_micros(200);
/// While nothing is to be done.
const IDLE: Duration = Duration::from_secs(3600);

/// See the module header.
pub(super) struct Evictor {
    pub(super) region: WeakRegion,
    pub(super) page_bytes: u64,
    /// `None` if it is read-only.
    pub(super) pusher: Option<Weak<Pusher>>,
    pub(super) bell: Arc<Bell>,
    pub(super) events: broadcast::Sender<MountEvent>,
}

/// A push that the budget asked for.
#[derive(Default)]
struct Push {
    runs: AtomicBool,
    failed: AtomicBool,
}

impl Evictor {
    /// Runs until the bell ends or the region is gone.
    pub(super) fn run(self) {
        let push = Arc::new(Push::default());
        let (mut wait, mut stuck_since, mut pushed_at) = (IDLE, None, None);
        while self.bell.wait(wait) {
            wait = loop {
                let Some(region) = self.region.upgrade() else { return };
                let Some(fill) = region.budget() else { return };
                // Before nothing is clean any more: what is pushed meanwhile can go then.
                if fill.dirty_pages > fill.limit_pages / 2 {
                    self.push(&push, &mut pushed_at);
                }
                match region.evict_some() {
                    Step::Dropped => stuck_since = None,
                    Step::Enough => {
                        stuck_since = None;
                        if fill.lifted && fill.held_pages <= fill.limit_pages {
                            region.lift_budget(false);
                            let _ = self.events.send(MountEvent::WithinBudget);
                        }
                        break IDLE;
                    }
                    Step::Later => break SOON,
                    Step::Stuck => {
                        self.push(&push, &mut pushed_at);
                        let since = *stuck_since.get_or_insert_with(Instant::now);
                        if !fill.lifted && (since.elapsed() > OVER_AFTER || push.failed.load(SeqCst)) {
                            region.lift_budget(true);
                            self.tell(fill);
                        }
                        break PACE;
                    }
                }
            };
        }
    }

    /// Has what was written pushed now, unless that is under way or has just failed.
    fn push(&self, push: &Arc<Push>, pushed_at: &mut Option<Instant>) {
        let Some(pusher) = self.pusher.as_ref().and_then(Weak::upgrade) else { return };
        let too_soon = push.failed.load(SeqCst) && pushed_at.is_some_and(|at: Instant| at.elapsed() < FAILED_PACE);
        if too_soon || push.runs.swap(true, SeqCst) {
            return;
        }
        *pushed_at = Some(Instant::now());
        let (push, bell, service) = (push.clone(), self.bell.clone(), pusher.service().clone());
        drop(service.spawn(async move {
            push.failed.store(pusher.push().await.is_err(), SeqCst);
            push.runs.store(false, SeqCst);
            bell.ring();
            // The last handle of the region, perhaps: it unmaps on a thread that serves nobody.
            let _ = tokio::task::spawn_blocking(move || drop(pusher)).await;
        }));
    }

    fn tell(&self, fill: Fill) {
        let (resident_bytes, budget_bytes) = (fill.held_pages * self.page_bytes, fill.limit_pages * self.page_bytes);
        tracing::warn!(resident_bytes, budget_bytes, "nothing can be evicted: the mount goes over its budget");
        let _ = self.events.send(MountEvent::OverBudget { resident_bytes, budget_bytes });
    }
}
