//! When a failed read is tried again, and when the loss policy takes over (S3).
//!
//! Role: part of hop *decide* on the failure path. Neighbours: `requests` asks it after each failed read. Invariants: pure; the wait grows to a
//! limit and never reaches past the moment at which the policy takes over; what bounds a read is its own first failure, whatever
//! becomes of others meanwhile, so a blocked thread gets an answer within the bound.

use std::time::{Duration, Instant};

const FIRST_WAIT: Duration = Duration::from_millis(20);
const LONGEST_WAIT: Duration = Duration::from_secs(1);
/// A read that was not answered for so long has failed, however short the policy's patience is: a busy disk or a congested link needs
/// some time for a right answer too.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Since when the store of a region is away.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outage {
    since: Option<Instant>,
}

/// What to do about a failed read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    RetryAfter(Duration),
    /// Nobody was answered since this read began to fail: nothing comes any more, for anyone.
    GiveUpAll,
    /// Others were answered meanwhile: only this read's pages do not come.
    GiveUpThis,
}

impl Outage {
    /// A read that fails since `failing_since` failed at `now` because the store is away. `attempt` counts from zero; `spread` (any
    /// number, such as the page) keeps many waiters from asking at the same instant.
    pub(crate) fn failed(
        &mut self,
        now: Instant,
        failing_since: Instant,
        keep_trying: Duration,
        attempt: u32,
        spread: u64,
    ) -> Next {
        let away_since = *self.since.get_or_insert(now);
        let left = keep_trying.saturating_sub(now.saturating_duration_since(failing_since));
        if left.is_zero() {
            return if away_since <= failing_since { Next::GiveUpAll } else { Next::GiveUpThis };
        }
        let wait = FIRST_WAIT.saturating_mul(1 << attempt.min(10)).min(LONGEST_WAIT);
        let percent = 75 + u32::try_from(spread % 50).unwrap_or(0);
        Next::RetryAfter((wait * percent / 100).min(left))
    }

    /// For how long to wait for the answer to a read that is made at `now`.
    pub(crate) fn answer_within(now: Instant, failing_since: Option<Instant>, keep_trying: Duration) -> Duration {
        let failing = failing_since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        keep_trying.saturating_sub(failing).max(ANSWER_WITHIN)
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
                while let Next::RetryAfter(wait) = outage.failed(now, start, keep_trying, attempt, spread) {
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
    fn a_read_that_fails_while_others_succeed_is_given_up_alone_and_in_time() {
        let (start, second, patience) = (Instant::now(), Duration::from_secs(1), Duration::from_secs(5));
        let mut outage = Outage::default();
        for attempt in 0..5 {
            let now = start + second * attempt;
            assert!(matches!(outage.failed(now, start, patience, attempt, 0), Next::RetryAfter(_)), "after {attempt} s");
            assert!(outage.over(), "another read succeeded");
        }
        assert_eq!(outage.failed(start + patience, start, patience, 5, 0), Next::GiveUpThis);
    }

    #[test]
    fn an_old_outage_does_not_shorten_the_patience_with_a_new_read() {
        let (start, patience) = (Instant::now(), Duration::from_secs(5));
        let mut outage = Outage::default();
        // Its pages were discarded, so it was not repeated, and nothing was read since.
        assert!(matches!(outage.failed(start, start, patience, 0, 0), Next::RetryAfter(_)));
        let later = start + patience * 100;
        assert!(matches!(outage.failed(later, later, patience, 0, 0), Next::RetryAfter(_)));
        assert_eq!(outage.failed(later + patience, later, patience, 9, 0), Next::GiveUpAll);
    }

    #[test]
    fn an_answer_is_awaited_for_what_is_left_of_the_patience_or_a_moment() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        assert_eq!(Outage::answer_within(start, None, second * 30), second * 30);
        assert_eq!(Outage::answer_within(start + second * 10, Some(start), second * 30), second * 20);
        assert_eq!(Outage::answer_within(start + second * 30, Some(start), second * 30), ANSWER_WITHIN);
        assert_eq!(Outage::answer_within(start, None, Duration::ZERO), ANSWER_WITHIN);
    }
}
