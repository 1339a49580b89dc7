//! Decisions: how much may be on the way to or from a store at once.
//!
//! Role: what bulk reads and writes of stores that answer one request at a time are bounded by, instead of a number of workers. Neighbours: bulk reads ask it, and mounts
//! when they push. Invariants: never less than one request, never more than the limit; on a path of steady bandwidth and latency it settles at about twice what the path holds.
//!
//! What a path holds is its bandwidth times its latency. The least latency seen says how long an answer takes without a queue, and what was answered in a while how much goes through. Twice
//! the product keeps the path full; where that is more than goes through, the rate does not grow and neither does the bound (the idea of BBR, Cardwell and others, ACM Queue 14(5), 2016).

use std::time::{Duration, Instant};

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct Flow {
    least_bytes: u64,
    most_bytes: u64,
    least_latency: Option<Duration>,
    since: Instant,
    answered_bytes: u64,
    /// Of the last look; falls slowly.
    bytes_s: u64,
}

/// A shorter look would count bursts.
const LOOK_MIN: Duration = Duration::from_millis(2);

impl Flow {
    /// Begins with `least_bytes`.
    pub(crate) fn new(least_bytes: u64, most_bytes: u64, now: Instant) -> Flow {
        Flow {
            least_bytes,
            most_bytes: most_bytes.max(least_bytes),
            least_latency: None,
            since: now,
            answered_bytes: 0,
            bytes_s: 0,
        }
    }

    /// Whether `bytes` more may be asked for while `on_the_way` have not been answered. A request that is longer than all that is allowed goes alone.
    pub(crate) fn allows(&self, on_the_way: u64, bytes: u64) -> bool {
        on_the_way == 0 || on_the_way.saturating_add(bytes) <= self.bound_bytes()
    }

    /// A request was answered at `now`, that was made `latency` before.
    pub(crate) fn answered(&mut self, bytes: u64, latency: Duration, now: Instant) {
        let least = self.least_latency.map_or(latency, |least| least.min(latency));
        self.least_latency = Some(least);
        self.answered_bytes += bytes;
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= least.max(LOOK_MIN) {
            let now_bytes_s =
                u64::try_from(u128::from(self.answered_bytes) * 1_000_000 / elapsed.as_micros().max(1)).unwrap_or(u64::MAX);
            self.bytes_s = now_bytes_s.max(self.bytes_s / 8 * 7);
            (self.since, self.answered_bytes) = (now, 0);
        }
    }

    /// What may be on the way.
    pub(crate) fn bound_bytes(&self) -> u64 {
        let latency_us = self.least_latency.map_or(0, |latency| latency.as_micros());
        let path = u64::try_from(u128::from(self.bytes_s) * latency_us / 1_000_000).unwrap_or(u64::MAX);
        path.saturating_mul(2).saturating_add(self.least_bytes).min(self.most_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::VecDeque;

    const STEP: u64 = 256 * 1024;

    /// Bytes a second through a path that is a queue in front of a delay, after a start.
    fn through(bytes_s: u64, latency: Duration, steps: u32) -> (u64, u64) {
        let start = Instant::now();
        let mut flow = Flow::new(STEP, 1 << 30, start);
        let (mut now, mut free_at, mut waiting, mut on_the_way) = (start, start, VecDeque::new(), 0);
        let (mut counted_from, mut counted) = (start, 0);
        for step in 0..steps {
            while flow.allows(on_the_way, STEP) {
                let begins = free_at.max(now);
                free_at = begins + Duration::from_nanos(STEP * 1_000_000_000 / bytes_s);
                waiting.push_back((free_at + latency, now));
                on_the_way += STEP;
            }
            let (at, asked) = waiting.pop_front().unwrap();
            now = at;
            on_the_way -= STEP;
            flow.answered(STEP, at - asked, now);
            if step == steps / 2 {
                (counted_from, counted) = (now, 0);
            }
            counted += STEP;
        }
        (u64::try_from(u128::from(counted) * 1_000_000 / (now - counted_from).as_micros()).unwrap(), flow.bound_bytes())
    }

    #[test]
    fn a_far_store_is_as_fast_as_a_near_one() {
        for ms in [0, 1, 5, 25, 50] {
            let latency = Duration::from_millis(ms);
            let (rate, bound) = through(500_000_000, latency, 4000);
            assert!(rate > 450_000_000, "{ms} ms: {rate} bytes a second");
            let path = 500_000_000 / 1000 * ms;
            assert!(bound <= 2 * path + 6 * STEP, "{ms} ms: {bound} bytes on a path that holds {path}");
        }
    }

    #[test]
    fn what_is_longer_than_the_bound_goes_alone() {
        let flow = Flow::new(1000, 2000, Instant::now());
        assert!(flow.allows(0, 1 << 40) && flow.allows(400, 600) && !flow.allows(401, 600) && !flow.allows(1, 1 << 40));
    }

    proptest! {
        #[test]
        fn the_bound_stays_between_its_limits(answers in proptest::collection::vec((0u64..1 << 40, 0u64..1 << 40, 0u64..1 << 40), 0..50)) {
            let start = Instant::now();
            let (mut flow, mut now) = (Flow::new(1 << 20, 1 << 26, start), start);
            for (bytes, latency_us, later_us) in answers {
                now += Duration::from_micros(later_us);
                flow.answered(bytes, Duration::from_micros(latency_us), now);
                prop_assert!((1 << 20..=1 << 26).contains(&flow.bound_bytes()));
            }
        }
    }
}
