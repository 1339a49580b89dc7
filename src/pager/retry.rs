//! When a failed read is tried again, and when the loss policy takes over (S3).
//!
//! Role: part of hop *decide* on the failure path. Neighbours: `engine` asks it after each failed read. Invariants: pure; the wait grows to a
//! limit and never reaches past the moment at which the policy takes over, so a blocked thread gets an answer within the bound.

use std::time::{Duration, Instant};

const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);

/// Since when the store of a region is away.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outage {
    since: Option<Instant>,
}

/// What to do about a failed read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    RetryAfter(Duration),
    GiveUp,
}

impl Outage {
    /// A read failed at `now` because the store is away. `attempt` counts from zero; `spread` (any number, such as the
    /// page) keeps many waiters from asking at the same instant.
    pub(crate) fn failed(&mut self, now: Instant, keep_trying: Duration, attempt: u32, spread: u64) -> Next {
        let since = *self.since.get_or_insert(now);
        let left = keep_trying.saturating_sub(now.saturating_duration_since(since));
        if left.is_zero() {
            return Next::GiveUp;
        }
        let wait = FIRST_WAIT.saturating_mul(1 << attempt.min(10)).min(LONGEST_WAIT);
        let percent = 75 + u32::try_from(spread % 50).unwrap_or(0);
        Next::RetryAfter((wait * percent / 100).min(left))
    }

    /// Whether a failure now would be the first.
    pub(crate) fn starts(&self) -> bool {
        self.since.is_none()
    }

    /// A read succeeded: the store is back. Whether it had been away.
    pub(crate) fn over(&mut self) -> bool {
        self.since.take().is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_add_up_to_the_bound_and_not_past_it() {
        let start = Instant::now();
        for keep_trying in [Duration::ZERO, Duration::from_millis(1), Duration::from_secs(30)] {
            for spread in [0, 7, 49, 1 << 40] {
                let (mut outage, mut now, mut attempt) = (Outage::default(), start, 0);
                while let Next::RetryAfter(wait) = outage.failed(now, keep_trying, attempt, spread) {
                    assert!(!wait.is_zero() && wait <= LONGEST_WAIT * 5 / 4);
                    now += wait;
                    attempt += 1;
                    assert!(attempt < 1000, "never gives up");
                }
                assert_eq!(now - start, keep_trying);
            }
        }
    }

    #[test]
    fn a_success_starts_the_count_anew() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut outage = Outage::default();
        assert_ne!(outage.failed(start, second, 0, 0), Next::GiveUp);
        outage.over();
        assert_ne!(outage.failed(start + second * 9, second, 1, 0), Next::GiveUp);
        assert_eq!(outage.failed(start + second * 10, second, 2, 0), Next::GiveUp);
    }
}
