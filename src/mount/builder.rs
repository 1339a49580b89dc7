//! Describes and opens a mount.
//!
//! Role: the options of one mount and the order of opening it. Neighbours: [`Region::builder`] maps the memory; `push` writes back. Invariants: writes are followed before anybody has the
//! address; the pull is under way before the mount is returned.

use super::{
    Mount, MountError, MountEvent, Pulling,
    evict::Evictor,
    push::{Hooks, Pusher},
};
use crate::{
    Extent, FaultAround, LossPolicy, PageStore, Pager, PagerOptions, PullOrder, Region, RegionError, TrackerKind,
    options::PullPlan, pager::Bell,
};
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
    budget_bytes: Option<u64>,
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
            budget_bytes: None,
            hooks: Hooks::default(),
        }
    }

    /// How much of it may be here, in bytes; it may be a small part of the store. Above that, pages go: clean ones at once, written ones when they are pushed, which then happens
    /// earlier than [said](MountBuilder::push_every), and of a [direct](MountBuilder::direct) mount too. They come again when they are touched. Default: all of it.
    ///
    /// Counted are the pages of this region that hold data; copies on their way to the store (at most 64 MiB), and what following the pages takes (1 byte a page), come on top. Those go
    /// first that came longest ago, except that pages that were written or asked for since are passed over once; reads of what is here cannot be seen. The pull ends when 15 of 16 parts are
    /// full. A thread that touches a page when there is no room waits until there is. If none can be made for a second, or what was written cannot be pushed, then the mount goes over the
    /// budget rather than losing anything, says [`MountEvent::OverBudget`], and goes back as soon as it can.
    ///
    /// The mount gets a pager of its own if none is named; a [named](MountBuilder::pager) one must be opened with [`TrackerKind::WpSync`], unless the mount is read-only. The first write of a page
    /// after it came or was pushed costs a message to the pager (8 to 45 us). No part of the region may be unmapped or moved (munmap, mremap). The budget ends with the mount: a clone
    /// of the region that is kept longer fills as it is touched.
    ///
    /// Opening fails with [`RegionError::Budget`] if it is less than 1 MiB, or the pager's tracker another.
    ///
    /// ```
    /// use pageferry::{MemoryStore, Mount, PageSize};
    /// # if pageferry::Capabilities::probe().write_protect() {
    /// let store = std::sync::Arc::new(MemoryStore::zeroed(64 << 20, PageSize::KIB_4));
    /// let mount = Mount::builder(store).budget(1 << 20).direct().open()?;
    /// for offset in (0..8 << 20).step_by(4096) {
    ///     mount.region().write_at(offset, &offset.to_le_bytes())?;
    /// }
    /// assert!(mount.region().stats().pages_evicted > 0);
    /// # }
    /// # Ok::<(), pageferry::MountError>(())
    /// ```
    #[must_use]
    pub fn budget(mut self, bytes: u64) -> MountBuilder {
        self.budget_bytes = Some(bytes);
        self
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
        let pager = match (self.pager, self.budget_bytes) {
            (pager, Some(budget_bytes)) => budget_pager(pager, budget_bytes, self.read_only)?,
            (pager, None) => pager.map_or_else(Pager::shared, Ok)?,
        };
        let mut region = Region::builder().name(self.name).shared_store(self.store.clone()).pager(&pager).loss(self.loss);
        region = region.read_only(self.read_only);
        if let Some(around) = self.fault_around {
            region = region.fault_around(around);
        }
        let region = region.open()?;
        if self.record {
            region.record_touches();
        }
        let bell = self.budget_bytes.map(|budget_bytes| {
            let bell = Arc::new(Bell::default());
            region.set_budget(budget_bytes / region.page_size().bytes(), bell.clone());
            bell
        });
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
        if let Some(bell) = &bell {
            let (page_bytes, pusher) = (region.page_size().bytes(), pusher.as_ref().map(Arc::downgrade));
            let evictor = Evictor { region: region.downgrade(), page_bytes, pusher, bell: bell.clone(), events: events.clone() };
            let started = std::thread::Builder::new().name("pageferry-evict".into()).spawn(move || evictor.run());
            started.map_err(|error| RegionError::system("starting a thread", error))?;
            // It may be needed already.
            bell.ring();
        }
        Ok(Mount { region, pusher, intervals, pull, events, bell })
    }
}

/// Less, and the marks would lie too close together for pages that come in groups.
const BUDGET_MIN_BYTES: u64 = 1 << 20;

/// A pager that tells of each first write before it happens, so that what is clean is a fact.
fn budget_pager(pager: Option<Pager>, budget_bytes: u64, read_only: bool) -> Result<Pager, RegionError> {
    let refused = |reason: String, remedy: &str| Err(RegionError::Budget { budget_bytes, reason, remedy: remedy.into() });
    if budget_bytes < BUDGET_MIN_BYTES {
        return refused(format!("the least is {BUDGET_MIN_BYTES} bytes"), "ask for more");
    }
    match pager {
        Some(pager) if read_only || pager.options().tracker == Some(TrackerKind::WpSync) => Ok(pager),
        Some(pager) => {
            let tracker = pager.options().tracker.map_or_else(|| "none in particular".to_owned(), |kind| kind.to_string());
            let reason = format!("the pager's tracker is {tracker}, with which a write may slip between a look and the eviction");
            refused(reason, "open it with `PagerOptions::tracker` `TrackerKind::WpSync`, or name no pager")
        }
        None if read_only => Pager::shared(),
        None => Pager::start(&PagerOptions { tracker: Some(TrackerKind::WpSync), ..PagerOptions::default() }),
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
