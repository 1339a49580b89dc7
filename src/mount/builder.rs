//! Describes and opens a mount.
//!
//! Role: the options of one mount and the order of opening it. Neighbours: [`Region::builder`] maps the memory; `push` writes back. Invariants: writes are followed before anybody has the
//! address; the pull is under way before the mount is returned.

use super::{
    Mount, MountError, MountEvent, Pulling,
    push::{Hooks, Pusher},
};
use crate::{Extent, FaultAround, LossPolicy, PageStore, Pager, PullOrder, Region, RegionError, TrackerKind, options::PullPlan};
use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::{broadcast, watch};

/// Receivers of mount events that fall this far behind miss the oldest.
const EVENTS_KEPT: usize = 64;

/// See [`Mount::builder`].
///
/// ```
/// use pageferry::{MemoryStore, Mount, PageSize, PullOrder};
/// use std::{sync::Arc, time::Duration};
/// # if pageferry::Capabilities::probe().write_protect() {
/// let store = Arc::new(MemoryStore::zeroed(1 << 20, PageSize::KIB_4));
/// let mount = Mount::builder(store)
///     .name("index")
///     .pull_order(PullOrder::By(Arc::new(|extent| -(extent.first() as i64)))) // default: by number
///     .pull_limit(100_000_000)                                               // bytes a second; default: none
///     .push_every(Duration::from_millis(200))                                // default: 1 s
///     .open()?;
/// assert_eq!(mount.progress().pages, 256);
/// # }
/// # Ok::<(), pageferry::MountError>(())
/// ```
pub struct MountBuilder {
    store: Arc<dyn PageStore>,
    name: String,
    read_only: bool,
    record: bool,
    pager: Option<Pager>,
    fault_around: Option<FaultAround>,
    loss: LossPolicy,
    pull: Option<PullPlan>,
    push_every: Option<Duration>,
    push_bytes_s: Option<u64>,
    keep_trying: Duration,
    hooks: Hooks,
}

impl MountBuilder {
    pub(super) fn new(store: Arc<dyn PageStore>) -> MountBuilder {
        MountBuilder {
            store,
            name: String::new(),
            read_only: false,
            record: false,
            pager: None,
            fault_around: None,
            loss: LossPolicy::default(),
            pull: Some(PullPlan::default()),
            push_every: Some(PUSH_EVERY),
            push_bytes_s: None,
            keep_trying: LossPolicy::default().keep_trying,
            hooks: Hooks::default(),
        }
    }

    /// The region's name. Default empty.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> MountBuilder {
        self.name = name.into();
        self
    }

    /// Neither pulls nor pushes by itself: pages come when they are touched, and go with [`Mount::flush`].
    #[must_use]
    pub fn direct(mut self) -> MountBuilder {
        (self.pull, self.push_every) = (None, None);
        self
    }

    /// Nobody may write it: [`Region::write_at`] and [`Region::discard`] answer [`RegionError::ReadOnly`], and a store through a pointer raises SIGSEGV, as in a file that is mapped to be
    /// read. Needs no tracker. Default: it may be written.
    #[must_use]
    pub fn read_only(mut self) -> MountBuilder {
        self.read_only = true;
        self
    }

    /// Records which pages are touched first, for [`Mount::working_set`]. What is here before it is touched cannot be seen: nothing is pulled, and only the page that is touched comes, unless
    /// an order, a limit or a [`fault_around`](MountBuilder::fault_around) is asked for after this. 8 bytes a touched page.
    #[must_use]
    pub fn record_touches(mut self) -> MountBuilder {
        (self.record, self.pull, self.fault_around) = (true, None, Some(FaultAround::OFF));
        self
    }

    /// Which pager fills it and follows its writes. Default: [`Pager::shared`].
    #[must_use]
    pub fn pager(mut self, pager: &Pager) -> MountBuilder {
        self.pager = Some(pager.clone());
        self
    }

    /// What comes with a fault. Default: the pager's.
    #[must_use]
    pub fn fault_around(mut self, around: FaultAround) -> MountBuilder {
        self.fault_around = Some(around);
        self
    }

    /// What happens to threads that wait for pages when the store is lost. Default: [`LossPolicy::default`].
    #[must_use]
    pub fn loss(mut self, policy: LossPolicy) -> MountBuilder {
        self.loss = policy;
        self
    }

    /// In which order the background pull brings pages. Default [`PullOrder::Linear`]. A [direct](MountBuilder::direct) mount pulls too after this.
    #[must_use]
    pub fn pull_order(mut self, order: PullOrder) -> MountBuilder {
        self.pull.get_or_insert_default().order = order;
        self
    }

    /// What the background pull may take, in bytes a second; faults are not held back. Default: what the path carries. A [direct](MountBuilder::direct) mount pulls too after this.
    #[must_use]
    pub fn pull_limit(mut self, bytes_s: u64) -> MountBuilder {
        self.pull.get_or_insert_default().bytes_s = Some(bytes_s);
        self
    }

    /// How often what was written is pushed, counted from the end of a push. Default 1 s: a program that dies loses at most about that, and what is written all the time is sent once a
    /// second.
    #[must_use]
    pub fn push_every(mut self, interval: Duration) -> MountBuilder {
        self.push_every = Some(interval);
        self
    }

    /// What pushes in the background may take, in bytes a second; a flush is not held back. Default: what the path carries.
    #[must_use]
    pub fn push_limit(mut self, bytes_s: u64) -> MountBuilder {
        self.push_bytes_s = Some(bytes_s);
        self
    }

    /// For how long a page is tried to be written while the store is [away](crate::StoreError::is_transient), before a push or flush fails. Default 30 s, as [`LossPolicy::keep_trying`].
    #[must_use]
    pub fn keep_trying(mut self, time: Duration) -> MountBuilder {
        self.keep_trying = time;
        self
    }

    /// Called before each push asks what was written, on a thread that may block: what it writes is pushed too.
    #[must_use]
    pub fn before_push(mut self, hook: impl Fn() + Send + Sync + 'static) -> MountBuilder {
        self.hooks.before = Some(Arc::new(hook));
        self
    }

    /// Called after each push with what came of it, on a thread that may block.
    #[must_use]
    pub fn after_push(mut self, hook: impl Fn(&Result<super::Pushed, MountError>) + Send + Sync + 'static) -> MountBuilder {
        self.hooks.after = Some(Arc::new(hook));
        self
    }

    /// Maps the store and starts to pull.
    ///
    /// # Errors
    /// As for [`RegionBuilder::open`](crate::RegionBuilder::open), and, unless it is read-only, as for [`Region::track`]; [`RegionError::NoTracker`] too where only soft-dirty bits are to be had,
    /// which cannot be asked while the program runs.
    pub fn open(self) -> Result<Mount, MountError> {
        let pager = self.pager.map_or_else(Pager::shared, Ok)?;
        let mut region = Region::builder().name(self.name).shared_store(self.store.clone()).pager(&pager).loss(self.loss);
        region = region.read_only(self.read_only);
        if let Some(around) = self.fault_around {
            region = region.fault_around(around);
        }
        let region = region.open()?;
        if self.record {
            region.record_touches();
        }
        let events = broadcast::Sender::new(EVENTS_KEPT);
        let pull = self.pull.and_then(|plan| region.begin_pull(plan)).map(|pull| {
            let (told, ended) = watch::channel(None);
            let (task, events) = (pull.abort_handle(), events.clone());
            drop(pager.service().spawn(async move {
                let outcome = pull.await.unwrap_or(Err(RegionError::PagerStopped));
                let _ = events.send(MountEvent::Pulled(outcome.clone()));
                told.send_replace(Some(outcome));
            }));
            Pulling { task, ended, since: Instant::now() }
        });
        let (mut pusher, mut intervals) = (None, None);
        if !self.read_only {
            let tracking = region.track()?;
            if tracking.kind() == TrackerKind::SoftDirty {
                let reason = "soft-dirty bits cannot be asked while the program runs".into();
                return Err(
                    RegionError::NoTracker { reason, remedy: "mount it read-only, or use a kernel from 5.7 on".into() }.into()
                );
            }
            let made = Arc::new(Pusher::new(
                tracking,
                self.store,
                pager,
                (self.keep_trying, self.push_bytes_s),
                self.hooks,
                events.clone(),
            ));
            if let Some(interval) = self.push_every {
                let (stop, stopped) = watch::channel(());
                drop(made.service().clone().spawn(made.clone().every(interval, stopped)));
                intervals = Some(stop);
            }
            pusher = Some(made);
        }
        Ok(Mount { region, pusher, intervals, pull, events })
    }
}

/// See [`MountBuilder::push_every`].
const PUSH_EVERY: Duration = Duration::from_secs(1);

impl fmt::Debug for MountBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pages = self.store.extent().count();
        f.debug_struct("MountBuilder").field("name", &self.name).field("pages", &Extent::between(0, pages)).finish_non_exhaustive()
    }
}
