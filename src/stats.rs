//! Words: counters and latency by hop of a page's journey, cheap enough to be always on.
//!
//! Role: every hop records into one [`Hops`] per region; [`Stats`] is a snapshot. Neighbours: written by the pager's thread, read by
//! anyone. Invariants: recording is a relaxed atomic add; nothing here allocates after creation or takes a lock.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// A hop of a page's journey, or a stretch of several, as far as this process can measure it. A region fills `Decide`, `Store`, `Install` and
/// `Total`; a peer fills `Request`, `Wire`, `Serve` and `Reply`, which together are the region's `Store`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hop {
    /// From the fault message being read to the request being made.
    Decide,
    /// From the request to the pages at hand: all that happens in the store.
    Store,
    /// From the request to its bytes being handed to QUIC.
    Request,
    /// From there to the first byte of the reply, without `Serve`: encryption, both networks' stacks, both ways.
    Wire,
    /// At the peer, as told by it: from the request being decoded to the pages being read.
    Serve,
    /// From the first byte of the reply to the pages at hand.
    Reply,
    /// The install call, which also wakes the waiters.
    Install,
    /// From the fault message being read to the waiters being woken.
    Total,
}

/// All of them, in the order of the journey.
pub const HOPS: [Hop; 8] = [Hop::Decide, Hop::Store, Hop::Request, Hop::Wire, Hop::Serve, Hop::Reply, Hop::Install, Hop::Total];

/// Four buckets a power of two from 256 ns to about 1.2 hours: an error of at most 19 % of the value.
const BUCKETS: usize = 4 * 34;
const SMALLEST_NS_LOG2: u32 = 8;

/// A latency histogram with logarithmic buckets.
///
/// ```
/// use pageferry::Latency;
/// use std::time::Duration;
/// let latency = Latency::default();
/// for us in 1..=100 { latency.record(Duration::from_micros(us)); }
/// let p50 = latency.quantile(0.5).as_micros();
/// assert!((50..=60).contains(&p50), "{p50}");
/// ```
pub struct Latency {
    buckets: [AtomicU64; BUCKETS],
    max_ns: AtomicU64,
    sum_ns: AtomicU64,
}

impl Default for Latency {
    fn default() -> Latency {
        Latency { buckets: [const { AtomicU64::new(0) }; BUCKETS], max_ns: AtomicU64::new(0), sum_ns: AtomicU64::new(0) }
    }
}

impl Latency {
    /// Counts one event that took `time`.
    pub fn record(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket_of(ns)].fetch_add(1, Relaxed);
        self.max_ns.fetch_max(ns, Relaxed);
        self.sum_ns.fetch_add(ns, Relaxed);
    }

    /// How many events were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Relaxed)).sum()
    }

    /// The longest.
    #[must_use]
    pub fn max(&self) -> Duration {
        Duration::from_nanos(self.max_ns.load(Relaxed))
    }

    /// The mean, zero when nothing was counted.
    #[must_use]
    pub fn mean(&self) -> Duration {
        Duration::from_nanos(self.sum_ns.load(Relaxed).checked_div(self.count()).unwrap_or(0))
    }

    /// The time that a share `q` (0 to 1) of the events stayed within: the upper edge of its bucket, never above the maximum.
    #[must_use]
    pub fn quantile(&self, q: f64) -> Duration {
        let counts: Vec<u64> = self.buckets.iter().map(|bucket| bucket.load(Relaxed)).collect();
        let total: u64 = counts.iter().sum();
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let wanted = ((total as f64) * q.clamp(0.0, 1.0)).ceil().max(1.0) as u64;
        let mut seen = 0;
        for (index, count) in counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return Duration::from_nanos(upper_edge_ns(index)).min(self.max());
            }
        }
        self.max()
    }
}

impl std::fmt::Debug for Latency {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} events, p50 {:?}, p99 {:?}, max {:?}", self.count(), self.quantile(0.5), self.quantile(0.99), self.max())
    }
}

fn bucket_of(ns: u64) -> usize {
    let ns = ns.max(1 << SMALLEST_NS_LOG2);
    let log2 = ns.ilog2();
    let quarter = (ns >> (log2 - 2)) & 3;
    (((log2 - SMALLEST_NS_LOG2) * 4) as usize + usize::try_from(quarter).unwrap_or(0)).min(BUCKETS - 1)
}

fn upper_edge_ns(index: usize) -> u64 {
    let log2 = SMALLEST_NS_LOG2 + u32::try_from(index / 4).unwrap_or(0);
    (5 + index as u64 % 4) << (log2 - 2)
}

/// Latency by hop.
#[derive(Debug, Default)]
pub struct Hops([Latency; HOPS.len()]);

impl Hops {
    /// The histogram of one hop.
    #[must_use]
    pub fn hop(&self, hop: Hop) -> &Latency {
        &self.0[hop as usize]
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// Running counts of one region, see [`Stats`] for the meaning of each.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* pub(crate) hops: Hops }

        /// A snapshot of what happened to a region so far.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            pub(crate) fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.load(Relaxed),)* }
            }
        }
    };
}

counters! {
    /// Fault messages read from the kernel.
    faults,
    /// Faults on a page that was already resident: another fault or the pull brought it.
    faults_already_resident,
    /// Faults on a page that was already on its way: no second request was made.
    faults_joined,
    /// Requests sent because of a fault.
    demand_requests,
    /// Requests sent for the neighbours of a fault.
    around_requests,
    /// Those of them that went out while a reader waited for pages asked for earlier ([`FaultAround::ahead_pages`](crate::FaultAround::ahead_pages)).
    ahead_requests,
    /// Pages installed because a fault asked for them.
    pages_demand,
    /// Pages installed because a neighbour faulted.
    pages_around,
    /// Pages installed by the background pull.
    pages_pull,
    /// Pages installed as zeros without a transfer.
    pages_zero,
    /// Pages that arrived but were not wanted any more: discarded by the program or installed from elsewhere.
    pages_stale,
    /// Pages given up by the loss policy.
    pages_poisoned,
    /// Pages the program discarded (`MADV_DONTNEED` and the like).
    pages_discarded,
    /// Pages dropped because of a [budget](crate::MountBuilder::budget); each is asked for again when it is touched.
    pages_evicted,
    /// Install ioctls.
    installs,
    /// Installs the kernel put off (`EAGAIN`, short copy), tried again later.
    installs_again,
    /// Requests repeated because the store was away.
    retries,
}

/// Adds `n` to a counter.
pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_holds_its_value_within_a_quarter() {
        for ns in (256u64..100_000).step_by(37).chain([1 << 20, (1 << 30) + 12345, 1 << 41]) {
            let edge = upper_edge_ns(bucket_of(ns));
            assert!(edge > ns && edge <= ns + ns / 4 + 1, "{ns} is in the bucket that ends at {edge}");
        }
    }

    #[test]
    fn extremes_land_in_the_outer_buckets() {
        assert_eq!(bucket_of(0), 0);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        let empty = Latency::default();
        assert_eq!((empty.quantile(0.5), empty.mean()), (Duration::ZERO, Duration::ZERO));
    }
}
