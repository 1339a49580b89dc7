//! When operations were done, on a clock that both processes share.
//!
//! Role: shows a stall that an average would hide. Neighbours: `load` counts; `report` draws. Invariants: slots count from one
//! epoch at both ends; the wall clock (`CLOCK_REALTIME`) is read once at each end, so that setting it does not bend a run. On one host
//! the ends agree to about a microsecond.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Length of a slot.
pub const SLOT: Duration = Duration::from_millis(100);
const SLOTS_A_SECOND: u64 = 10;

/// Readings of both clocks, of which the least interrupted counts: a thread that loses the CPU between two readings is late by a time slice.
const READINGS: usize = 16;

/// Time since an epoch: the start of the load at the source.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    epoch_unix_ns: u64,
    read_at: Instant,
    since_epoch: Duration,
}

impl Clock {
    /// A clock whose epoch is now.
    pub fn starting_now() -> Clock {
        let (epoch_unix_ns, read_at) = read_both();
        Clock { epoch_unix_ns, read_at, since_epoch: Duration::ZERO }
    }

    /// The clock of another process.
    pub fn since(epoch_unix_ns: u64) -> Clock {
        let (unix_ns, read_at) = read_both();
        Clock { epoch_unix_ns, read_at, since_epoch: Duration::from_nanos(unix_ns.saturating_sub(epoch_unix_ns)) }
    }

    /// What the other process needs for [`since`](Clock::since).
    pub fn epoch_unix_ns(&self) -> u64 {
        self.epoch_unix_ns
    }

    pub fn at(&self, instant: Instant) -> Duration {
        self.since_epoch + instant.saturating_duration_since(self.read_at)
    }

    pub fn now(&self) -> Duration {
        self.at(Instant::now())
    }
}

/// The wall clock, in nanoseconds since 1970, and the steady clock at the same time.
fn read_both() -> (u64, Instant) {
    let read = || {
        let before = Instant::now();
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let unix_ns = u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX);
        (before.elapsed(), unix_ns, before)
    };
    let (_, unix_ns, at) = (1..READINGS).map(|_| read()).fold(read(), |best, next| if next.0 < best.0 { next } else { best });
    (unix_ns, at)
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

    /// A line of bars of at most `columns`, each as high as its rate, and the operations a second of a full bar.
    pub fn sparkline(&self, columns: usize) -> (String, u64) {
        const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
        let slots = self.slots.chunks(self.slots_per_column(columns));
        let means: Vec<u64> = slots.map(|slots| slots.iter().sum::<u64>() / slots.len() as u64).collect();
        let most = means.iter().copied().max().unwrap_or(0);
        let bar = |mean: u64| match mean * 8 {
            0 => ' ',
            eighths => BARS[usize::try_from(eighths.div_ceil(most) - 1).unwrap_or(7).min(7)],
        };
        (means.iter().copied().map(bar).collect(), most * SLOTS_A_SECOND)
    }

    /// Where a time is in such a line.
    pub fn column_of(&self, time: Duration, columns: usize) -> usize {
        slot_of(time) / self.slots_per_column(columns)
    }

    fn slots_per_column(&self, columns: usize) -> usize {
        self.slots.len().div_ceil(columns.max(1)).max(1)
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
    fn a_stall_is_a_gap_and_its_time_is_under_it() {
        let ms = Duration::from_millis;
        let stall = timeline(&[80, 80, 0, 10, 79]);
        assert_eq!(stall.sparkline(80), ("██ ▁█".to_owned(), 800));
        assert_eq!(stall.column_of(ms(299), 80), 2);
        let wide = timeline(&[8, 8, 4, 4, 1]);
        assert_eq!(wide.sparkline(3), ("█▄▁".to_owned(), 80));
        assert_eq!(wide.column_of(ms(400), 3), 2);
        assert_eq!((timeline(&[]).sparkline(0), timeline(&[0]).sparkline(1).1), ((String::new(), 0), 0));
    }

    #[test]
    fn two_processes_agree_on_the_time() {
        let source = Clock::starting_now();
        let destination = Clock::since(source.epoch_unix_ns());
        let now = Instant::now();
        let (a, b) = (source.at(now), destination.at(now));
        assert!(a.abs_diff(b) < Duration::from_millis(1), "{a:?} {b:?}");
    }
}
