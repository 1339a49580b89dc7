//! Words: options with their units, defaults and reasons.
//!
//! Role: what a user may set about paging; transport options are in `net`. Neighbours: imported by `pager` and `region`; imports only words.
//! Invariants: every default says where its number comes from.

use crate::{DEFAULT_POLL_BUDGET, Extent, PageStore, StoreError};
use std::{fmt, sync::Arc, time::Duration};

/// Options of a [`Pager`](crate::Pager), and the paging defaults of its regions.
///
/// ```
/// use pageferry::{Pager, PagerOptions};
/// let mut options = PagerOptions::default();
/// options.max_in_flight_pages = 256;
/// # if pageferry::Capabilities::probe().userfaultfd() {
/// let pager = Pager::start(&options)?;
/// # let _ = pager;
/// # }
/// # Ok::<(), pageferry::RegionError>(())
/// ```
#[derive(Clone, Debug)]
pub struct PagerOptions {
    /// For how long the pager's thread polls for a reply instead of sleeping while a fault is outstanding. Costs at most this much CPU
    /// a fault. Default [`DEFAULT_POLL_BUDGET`]; zero switches it off.
    pub poll_budget: Duration,
    /// Pages a region may have asked for because of faults and populate calls; further faults wait their turn, neighbours are left out.
    /// Bounds memory for replies; an eighth is kept for faults. Default 8192 (32 MiB): a stream that has all of [`FaultAround::ahead_pages`] on the way (16 MiB) leaves
    /// as much to others.
    pub max_in_flight_pages: u64,
    /// What comes with a fault.
    pub fault_around: FaultAround,
    /// How writes to its regions are followed, if they are ([`Region::track`](crate::Region::track)). Default `None`: the best that the kernel offers, in the order of [`TrackerKind`].
    /// Regions that a store fills can be [frozen](crate::Region::freeze) only with [`TrackerKind::WpSync`].
    pub tracker: Option<TrackerKind>,
}

/// Ways to learn which pages a program writes, best first.
///
/// ```
/// use pageferry::{PagerOptions, TrackerKind};
/// let mut options = PagerOptions::default();
/// options.tracker = Some(TrackerKind::WpSync); // as an older kernel would
/// assert_eq!(TrackerKind::WpSync.to_string(), "wp-sync");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrackerKind {
    /// Write protection that the kernel lifts by itself (`UFFD_FEATURE_WP_ASYNC` and `PAGEMAP_SCAN`, Linux 6.7). The first write of a page after a take costs about 1 us (bench `dirty`).
    WpAsync,
    /// Write protection that the pager lifts (Linux 5.7). The first write of a page after a take waits for the pager's thread, about 8 us where that runs and 45 us where a processor must be woken for it (bench `dirty`).
    WpSync,
    /// The kernel's soft-dirty bits (`CONFIG_MEM_SOFT_DIRTY`). Taking needs a paused program and clears the bits of the whole process, which nothing else may use meanwhile; the first
    /// take gives all that was ever written; what a store has filled counts as written.
    SoftDirty,
}

impl fmt::Display for TrackerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            TrackerKind::WpAsync => "wp-async",
            TrackerKind::WpSync => "wp-sync",
            TrackerKind::SoftDirty => "soft-dirty",
        })
    }
}

impl Default for PagerOptions {
    fn default() -> PagerOptions {
        PagerOptions {
            poll_budget: DEFAULT_POLL_BUDGET,
            max_in_flight_pages: 8192,
            fault_around: FaultAround::default(),
            tracker: None,
        }
    }
}

/// Which neighbours of a faulting page are brought behind it.
///
/// ```
/// use pageferry::FaultAround;
/// assert_eq!(FaultAround::OFF.base_pages, 1);
/// assert!(FaultAround::default().max_pages >= FaultAround::default().base_pages);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultAround {
    /// The aligned window around a fault at random. More pages save later faults of programs with locality and cost bandwidth for those
    /// without. Default 16 (64 KiB): there one install costs 6 us more than that of a single page (28 us against 22 us for 32 KiB), while the
    /// extent moves at three times the rate.
    pub base_pages: u64,
    /// The largest window of a stream that faults in order; each such fault doubles its window. Default 1024 (4 MiB), at which bench
    /// `throughput` (`store_seq_mb_s`) stops to gain.
    pub max_pages: u64,
    /// How many pages may be on the way to a thread that reads in order, forward or backward. Whenever it catches up with pages on their way, what comes next is
    /// asked for, without waiting for those; 0 asks for nothing before the thread is at the end of what has come. What was asked for and is not read is wasted: at most
    /// this, and no more than about four times what the thread has read. Default 4096 (16 MiB): 600 MB/s, what a peer at no distance gives, over a path of
    /// 25 ms (15 MB).
    pub ahead_pages: u64,
}

impl FaultAround {
    /// Only the page that faulted.
    pub const OFF: FaultAround = FaultAround { base_pages: 1, max_pages: 1, ahead_pages: 0 };
}

impl Default for FaultAround {
    fn default() -> FaultAround {
        FaultAround { base_pages: 16, max_pages: 1024, ahead_pages: 4096 }
    }
}

/// In which order a pull brings what is missing. Faults overtake it in any order.
///
/// ```
/// use pageferry::{Extent, PullOrder};
/// use std::sync::Arc;
/// let heap_first = PullOrder::By(Arc::new(|extent: Extent| i64::from(extent.first() < 1024)));
/// let as_last_time = PullOrder::List(vec![Extent::between(512, 600), Extent::page(7)]);
/// # let _ = (heap_first, as_last_time);
/// ```
#[derive(Clone, Default)]
pub enum PullOrder {
    /// By number.
    #[default]
    Linear,
    /// These first, in this order; then the rest by number.
    List(Vec<Extent>),
    /// By what a function of the program says of extents of at most [`PULL_EXTENT_BYTES`](crate::PULL_EXTENT_BYTES): greater first, equal ones by number. Called
    /// on the pager's thread before each bulk read: it must be quick and touch no region.
    By(Arc<dyn Fn(Extent) -> i64 + Send + Sync>),
}

impl fmt::Debug for PullOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PullOrder::Linear => f.write_str("Linear"),
            PullOrder::List(extents) => write!(f, "List({} extents)", extents.len()),
            PullOrder::By(_) => f.write_str("By(..)"),
        }
    }
}

/// How a pull goes.
#[derive(Clone, Debug, Default)]
pub(crate) struct PullPlan {
    pub(crate) order: PullOrder,
    pub(crate) bytes_s: Option<u64>,
}

/// What happens to threads that wait for pages which the store cannot deliver (S3).
///
/// The default keeps trying for 30 s while the peer is away, then poisons: whoever touches a missing page gets SIGBUS, and the region reports
/// [`RegionEvent::Lost`].
///
/// ```
/// use pageferry::{LossPolicy, MemoryStore, OnLoss, PageSize};
/// use std::{sync::Arc, time::Duration};
/// let spare = Arc::new(MemoryStore::zeroed(1 << 20, PageSize::KIB_4));
/// let policy = LossPolicy { keep_trying: Duration::from_secs(5), then: OnLoss::Fallback(spare) };
/// assert_eq!(LossPolicy::default().keep_trying, Duration::from_secs(30));
/// # let _ = policy;
/// ```
#[derive(Clone, Debug)]
pub struct LossPolicy {
    /// For how long reads of a page are repeated while the store is away ([`StoreError::is_transient`]), from their first failure on. Default
    /// 30 s, as long as QUIC's usual idle time-out. Errors that will not go away are decided at once. A read that is not answered at all
    /// fails after what is left of this time, or after 1 s if that is longer.
    pub keep_trying: Duration,
    /// What then.
    pub then: OnLoss,
}

impl Default for LossPolicy {
    fn default() -> LossPolicy {
        LossPolicy { keep_trying: Duration::from_secs(30), then: OnLoss::Poison }
    }
}

/// The last word of a [`LossPolicy`].
#[derive(Clone)]
pub enum OnLoss {
    /// Missing pages raise SIGBUS when touched (SIGSEGV on kernels before 6.6).
    Poison,
    /// Another store answers from then on.
    Fallback(Arc<dyn PageStore>),
    /// The program decides. Called on the pager's thread: it must not block nor touch a region.
    Ask(Arc<dyn Fn(&Loss) -> Verdict + Send + Sync>),
}

impl fmt::Debug for OnLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OnLoss::Poison => "Poison",
            OnLoss::Fallback(_) => "Fallback(..)",
            OnLoss::Ask(_) => "Ask(..)",
        })
    }
}

/// What a program is told when it is asked about a loss.
#[derive(Clone, Debug)]
pub struct Loss {
    /// The region's name.
    pub region: String,
    /// The pages a thread waits for.
    pub extent: Extent,
    /// What the store answered last.
    pub cause: StoreError,
}

/// A program's answer to a [`Loss`].
#[derive(Clone)]
pub enum Verdict {
    /// As [`OnLoss::Poison`].
    Poison,
    /// As [`OnLoss::Fallback`].
    Fallback(Arc<dyn PageStore>),
    /// These pages hold zeros: the program says that it can live without their content.
    Zero,
    /// Try the same store again for this long.
    KeepTrying(Duration),
}

impl fmt::Debug for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Verdict::Poison => f.write_str("Poison"),
            Verdict::Fallback(_) => f.write_str("Fallback(..)"),
            Verdict::Zero => f.write_str("Zero"),
            Verdict::KeepTrying(time) => write!(f, "KeepTrying({time:?})"),
        }
    }
}

/// Something that a region's owner may want to know.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum RegionEvent {
    /// The store went away; reads are being repeated.
    StoreAway {
        /// What it answered.
        cause: StoreError,
    },
    /// The store answers again.
    StoreBack,
    /// Pages were given up: touching them raises a signal.
    Lost {
        /// Which.
        extent: Extent,
        /// Why.
        cause: StoreError,
    },
    /// The pull is complete: no page is missing any more.
    Resident,
}
