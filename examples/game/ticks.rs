//! How long ticks took, and which came late.
//!
//! Role: what a player of the game would feel, before, during and after the move. Neighbours: `player` records; the source's part travels as the program's state, so the destination's
//! report has all of it. Invariants: memory is bounded: a phase keeps its last minute of times, and counts the rest; what arrives damaged is refused.

use std::{
    collections::VecDeque,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Sixty ticks a second.
pub const PERIOD: Duration = Duration::from_nanos(16_666_667);
/// A minute of them. It travels within the pause: 14 KiB.
const KEPT: usize = 3600;
/// A clock of another host that says the next tick is due further from now than this is another clock.
const CLOCKS_DIFFER: Duration = Duration::from_secs(1);

/// Where the game is in its move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// At the source.
    Before,
    /// At the destination, pages missing.
    During,
    /// At the destination, nothing missing.
    After,
}

pub const PARTS: [Part; 3] = [Part::Before, Part::During, Part::After];

/// The ticks of one part.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ticks {
    pub count: u64,
    /// Of those, done more than 16.7 ms after they were due: a picture that was not shown in its turn.
    pub late: u64,
    pub worst_lag_us: u64,
    /// What they took, in microseconds, the last of them.
    pub took_us: VecDeque<u32>,
}

/// All ticks of a game, wherever it ran.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Log {
    parts: [Ticks; PARTS.len()],
    /// On the wall clock, in nanoseconds: when the last tick was done, and when the next is due.
    last_done_unix_ns: u64,
    next_due_unix_ns: u64,
    /// From the source's last tick to the destination's first.
    gap_ns: Option<u64>,
}

impl Ticks {
    /// The time that a share `q` of the kept ticks took at most.
    pub fn quantile(&self, q: f64) -> Duration {
        let mut sorted: Vec<u32> = self.took_us.iter().copied().collect();
        sorted.sort_unstable();
        #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an index")]
        let at = (sorted.len() as f64 * q).ceil() as usize;
        Duration::from_micros(sorted.get(at.max(1) - 1).copied().unwrap_or(0).into())
    }

    pub fn worst_lag(&self) -> Duration {
        Duration::from_micros(self.worst_lag_us)
    }

    fn push(&mut self, took: Duration, lag: Duration) {
        self.count += 1;
        self.late += u64::from(lag > PERIOD);
        self.worst_lag_us = self.worst_lag_us.max(micros(lag));
        if self.took_us.len() == KEPT {
            self.took_us.pop_front();
        }
        self.took_us.push_back(u32::try_from(micros(took)).unwrap_or(u32::MAX));
    }
}

impl Log {
    /// A tick that was due, begun and done at these times.
    pub fn record(&mut self, part: Part, due: Instant, begun: Instant, done: Instant) {
        let now = unix_ns();
        if part != Part::Before && self.gap_ns.is_none() && self.last_done_unix_ns > 0 {
            self.gap_ns = Some(now.saturating_sub(self.last_done_unix_ns));
        }
        self.parts[part as usize].push(done.duration_since(begun), done.saturating_duration_since(due));
        self.last_done_unix_ns = now;
    }

    /// Says when the next tick is due, for whoever makes it.
    pub fn due_next(&mut self, due: Instant) {
        let ahead = due.saturating_duration_since(Instant::now());
        self.next_due_unix_ns = unix_ns() + u64::try_from(ahead.as_nanos()).unwrap_or(0);
    }

    /// When the next tick is due: here the schedule of the source goes on.
    pub fn next_due(&self) -> Instant {
        let (now, unix_ns) = (Instant::now(), unix_ns());
        let ago = Duration::from_nanos(unix_ns.saturating_sub(self.next_due_unix_ns));
        let ahead = Duration::from_nanos(self.next_due_unix_ns.saturating_sub(unix_ns));
        if ago.max(ahead) > CLOCKS_DIFFER { now } else { now.checked_sub(ago).unwrap_or(now) + ahead }
    }

    pub fn part(&self, part: Part) -> &Ticks {
        &self.parts[part as usize]
    }

    /// From the source's last tick to the destination's first, both done, if both read one clock.
    pub fn gap(&self) -> Option<Duration> {
        self.gap_ns.map(Duration::from_nanos)
    }

    /// The last `count` ticks, in order.
    pub fn recent(&self, count: usize) -> Vec<(Part, u32)> {
        let all = PARTS.into_iter().rev().flat_map(|part| self.part(part).took_us.iter().rev().map(move |took| (part, *took)));
        let mut recent: Vec<_> = all.take(count).collect();
        recent.reverse();
        recent
    }

    /// What the last ticks before the handover and the first ones after it took.
    pub fn around(&self, before: usize, after: usize) -> (Vec<u32>, Vec<u32>) {
        let [first, rest @ ..] = &self.parts;
        let skipped = first.took_us.len().saturating_sub(before);
        let after = rest.iter().flat_map(|part| &part.took_us).take(after);
        (first.took_us.iter().skip(skipped).copied().collect(), after.copied().collect())
    }

    /// The source's part, as the program's state.
    pub fn to_state(&self) -> Vec<u8> {
        let before = self.part(Part::Before);
        let fixed = [self.last_done_unix_ns, self.next_due_unix_ns, before.count, before.late, before.worst_lag_us];
        let times = before.took_us.iter().flat_map(|took| took.to_le_bytes());
        fixed.into_iter().flat_map(u64::to_le_bytes).chain(times).collect()
    }

    /// A log that goes on where that of the source stopped. `None` if the bytes are no such state.
    pub fn from_state(state: &[u8]) -> Option<Log> {
        let (fixed, times) = state.split_at_checked(40)?;
        let (times, []) = times.as_chunks() else { return None };
        let (fixed, _) = fixed.as_chunks();
        let [last_done_unix_ns, next_due_unix_ns, count, late, worst_lag_us] =
            <[_; 5]>::try_from(fixed).ok()?.map(u64::from_le_bytes);
        let took_us: VecDeque<_> = times.iter().copied().map(u32::from_le_bytes).collect();
        let before = Ticks { count, late, worst_lag_us, took_us };
        let parts = [before, Ticks::default(), Ticks::default()];
        Some(Log { parts, last_done_unix_ns, next_due_unix_ns, gap_ns: None })
    }
}

/// A tick as a bar of a strip: full is 16.7 ms, the time that there is.
pub fn bar(took_us: u32) -> char {
    const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let eighths = u128::from(took_us) * 8 / PERIOD.as_micros();
    BARS[usize::try_from(eighths).unwrap_or(7).min(7)]
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn unix_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn quantiles_and_late_ticks_are_those_of_the_ticks() {
        let mut ticks = Ticks::default();
        (1..=100).for_each(|ms| ticks.push(MS * ms, MS * ms));
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|q| ticks.quantile(q)), [MS, MS * 50, MS * 99, MS * 100]);
        assert_eq!((ticks.count, ticks.late, ticks.worst_lag()), (100, 84, MS * 100));
        (0..5000).for_each(|_| ticks.push(MS, MS));
        assert_eq!((ticks.took_us.len(), ticks.count, ticks.quantile(1.0)), (KEPT, 5100, MS));
        assert_eq!(Ticks::default().quantile(0.5), Duration::ZERO);
    }

    #[test]
    fn the_log_goes_on_where_it_stopped_and_damage_is_refused() {
        let mut log = Log::default();
        let due = Instant::now();
        log.record(Part::Before, due, due + MS, due + MS * 3);
        log.due_next(due + PERIOD);
        let state = log.to_state();
        let mut moved = Log::from_state(&state).unwrap();
        assert_eq!(moved, log);
        let next = moved.next_due();
        assert!(next.max(due + PERIOD) - next.min(due + PERIOD) < MS * 5, "the clocks are read apart");
        assert_eq!(moved.gap(), None);
        moved.record(Part::During, next, next, next + MS * 20);
        assert_eq!((moved.part(Part::During).late, moved.recent(9)), (1, vec![(Part::Before, 2000), (Part::During, 20_000)]));
        assert!(moved.gap().is_some());
        assert!(Log::from_state(&state[..39]).is_none() && Log::from_state(&state[..43]).is_none());
    }

    #[test]
    fn a_full_bar_is_a_whole_period() {
        assert_eq!([0, 2_000, 9_000, 16_000, 999_999].map(bar), ['▁', '▁', '▅', '█', '█']);
    }
}
