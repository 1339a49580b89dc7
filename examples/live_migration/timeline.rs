//! When operations were done, on a clock that both processes share.
//!
//! Role: shows a stall that an average would hide. Neighbours: `load` counts; `report` draws. Invariants: slots count from one
//! epoch at both ends; the wall clock is read once at each end, so that setting it does not bend a run. Two hosts must agree on the
//! time to about a slot.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Length of a slot.
pub const SLOT: Duration = Duration::from_millis(100);

/// Time since an epoch: the start of the load at the source.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch_unix_us: u64,
    read_at: Instant,
    since_epoch: Duration,
}

impl Clock {
    /// A clock whose epoch is now.
    pub fn starting_now() -> Clock {
        Clock { epoch_unix_us: unix_us(), read_at: Instant::now(), since_epoch: Duration::ZERO }
    }

    /// The clock of another process.
    pub fn since(epoch_unix_us: u64) -> Clock {
        let since_epoch = Duration::from_micros(unix_us().saturating_sub(epoch_unix_us));
        Clock { epoch_unix_us, read_at: Instant::now(), since_epoch }
    }

    /// What the other process needs for [`since`](Clock::since).
    pub fn epoch_unix_us(&self) -> u64 {
        self.epoch_unix_us
    }

    pub fn at(&self, instant: Instant) -> Duration {
        self.since_epoch + instant.saturating_duration_since(self.read_at)
    }

    pub fn now(&self) -> Duration {
        self.at(Instant::now())
    }
}

fn unix_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The slot of a time since the epoch.
pub fn slot_of(time: Duration) -> usize {
    usize::try_from(time.as_millis() / SLOT.as_millis()).unwrap_or(usize::MAX)
}

/// Operations in each [`SLOT`] since the epoch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timeline {
    pub slots: Vec<u64>,
}

impl Timeline {
    /// A day of slots: what a clock that was set wrong may cost.
    const MAX_SLOTS: usize = 864_000;

    pub fn count(&mut self, time: Duration) {
        let slot = slot_of(time).min(Timeline::MAX_SLOTS);
        if slot >= self.slots.len() {
            self.slots.resize(slot + 1, 0);
        }
        self.slots[slot] += 1;
    }

    pub fn merge(&mut self, other: &Timeline) {
        self.slots.resize(self.slots.len().max(other.slots.len()), 0);
        for (slot, count) in self.slots.iter_mut().zip(&other.slots) {
            *slot += count;
        }
    }

    /// A line of bars of at most `columns`, each as high as its rate, and the column of the slot that holds `mark`. A column is one
    /// slot or several.
    pub fn sparkline(&self, columns: usize, mark: Duration) -> (String, usize) {
        const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let per_column = self.slots.len().div_ceil(columns.max(1)).max(1);
        let means: Vec<u64> = self.slots.chunks(per_column).map(|slots| slots.iter().sum::<u64>() / slots.len() as u64).collect();
        let most = means.iter().copied().max().unwrap_or(0).max(1);
        let bar =
            |mean: u64| if mean == 0 { ' ' } else { BARS[usize::try_from((mean * 8).div_ceil(most) - 1).unwrap_or(7).min(7)] };
        (means.into_iter().map(bar).collect(), slot_of(mark) / per_column)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(slots: &[u64]) -> Timeline {
        Timeline { slots: slots.to_vec() }
    }

    #[test]
    fn counts_land_in_their_slot_and_merge() {
        let mut counted = Timeline::default();
        [0, 99, 100, 350].into_iter().for_each(|ms| counted.count(Duration::from_millis(ms)));
        assert_eq!(counted, timeline(&[2, 1, 0, 1]));
        counted.merge(&timeline(&[1, 1, 1, 1, 5]));
        assert_eq!(counted, timeline(&[3, 2, 1, 2, 5]));
    }

    #[test]
    fn a_stall_is_a_gap_and_the_mark_is_under_it() {
        let (line, mark) = timeline(&[80, 80, 0, 10, 79]).sparkline(80, Duration::from_millis(299));
        assert_eq!((line.as_str(), mark), ("██ ▁█", 2));
        let (line, mark) = timeline(&[8, 8, 4, 4, 1]).sparkline(3, Duration::from_millis(400));
        assert_eq!((line.as_str(), mark), ("█▄▁", 2));
        assert_eq!(timeline(&[]).sparkline(0, Duration::ZERO), (String::new(), 0));
    }

    #[test]
    fn two_processes_agree_on_the_time() {
        let source = Clock::starting_now();
        let destination = Clock::since(source.epoch_unix_us());
        let (a, b) = (source.now(), destination.now());
        assert!(a.abs_diff(b) < SLOT, "{a:?} {b:?}");
    }
}
