//! Decisions: which datagrams of a shaped link arrive, and when.
//!
//! Role: between a datagram that was sent and its copies that arrive, in one direction. Neighbours: `shape` says what is asked for; `shaped` carries out, and keeps a
//! [`Line`] of what is under way. Invariants: pure; a datagram's luck depends on the seed and on its number alone, not on the time or on the other properties; no sooner
//! than half the round trip after it was sent; never faster than the rate, but for those that come late; in order, but for those; a line keeps no more bytes than it may.
//!
//! The link is a delay with jitter, then the narrowest place with its queue, then what holds back the late ones.

use super::shape::LinkShape;
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, binary_heap::PeekMut},
    time::Duration,
};

/// Which way datagrams go; each has luck of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Outgoing,
    Incoming,
}

/// One direction of a link. All times are counted from when the link began, and never go back.
#[derive(Clone, Debug)]
pub(super) struct Shaper {
    shape: LinkShape,
    random: u64,
    /// When the last datagram reached the narrowest place.
    reached: Duration,
    /// When that has nothing left to pass on.
    free: Duration,
}

/// By how much a late one is held back, beside an eighth of the round trip, by which RFC 9002 (6.1.2) declares a packet lost: a millisecond is many packets of a bulk
/// transfer.
const LATE_MIN: Duration = Duration::from_millis(1);

impl Shaper {
    /// The shape was checked.
    pub(super) fn new(shape: &LinkShape, direction: Direction) -> Shaper {
        let random = shape.seed ^ if direction == Direction::Outgoing { 0 } else { 0x5851_F42D_4C95_7F2D };
        Shaper { shape: shape.clone(), random, reached: Duration::ZERO, free: Duration::ZERO }
    }

    /// When the copies of a datagram arrive that is sent `now`. `cut`: the link is, whatever the shape says.
    pub(super) fn send(&mut self, len_bytes: usize, now: Duration, cut: bool) -> [Option<Duration>; 2] {
        let [lost, twice, jitter, late] = std::array::from_fn(|_| self.draw());
        if cut || self.is_cut(now) || lost < self.shape.loss {
            return [None; 2];
        }
        // The larger half, so that two are a whole round trip.
        let half = self.shape.rtt - self.shape.rtt / 2;
        let at = now + half + self.shape.jitter.mul_f64(jitter);
        self.reached = self.reached.max(at);
        let late = if late < self.shape.reorder { LATE_MIN + self.shape.rtt / 8 } else { Duration::ZERO };
        let first = self.squeeze(len_bytes).map(|at| at + late);
        let second = if twice < self.shape.duplicate { self.squeeze(len_bytes) } else { None };
        [first, second]
    }

    /// Whether the shape lets nothing pass at this time.
    pub(super) fn is_cut(&self, now: Duration) -> bool {
        self.shape.cuts.iter().any(|cut| cut.contains(&now))
    }

    /// When a datagram that has reached the narrowest place is through, unless too much waits there. An empty queue takes any datagram.
    fn squeeze(&mut self, len_bytes: usize) -> Option<Duration> {
        let Some(bytes_s) = self.shape.bytes_s else { return Some(self.reached) };
        let wait = self.free.saturating_sub(self.reached);
        let waiting_bytes = wait.as_nanos() * u128::from(bytes_s) / NANOS_S;
        if !wait.is_zero() && waiting_bytes + len_bytes as u128 > self.shape.queue_of(bytes_s).into() {
            return None;
        }
        let takes_ns = (len_bytes as u128 * NANOS_S).div_ceil(bytes_s.into());
        self.free = self.free.max(self.reached) + Duration::from_nanos(u64::try_from(takes_ns).unwrap_or(u64::MAX));
        Some(self.free)
    }

    /// 0 to 1, without 1. SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
    #[allow(clippy::cast_precision_loss, reason = "53 bits")]
    fn draw(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

const NANOS_S: u128 = 1_000_000_000;

/// What is under way, in the order in which it arrives.
#[derive(Debug)]
pub(super) struct Line<T> {
    held: BinaryHeap<Reverse<Held<T>>>,
    held_bytes: usize,
    max_bytes: usize,
    /// How many there were: those that arrive at one time do so in the order in which they were sent.
    number: u64,
}

#[derive(Debug)]
struct Held<T> {
    at: Duration,
    number: u64,
    len_bytes: usize,
    item: T,
}

impl<T> Line<T> {
    pub(super) fn new(max_bytes: usize) -> Line<T> {
        Line { held: BinaryHeap::new(), held_bytes: 0, max_bytes, number: 0 }
    }

    /// Keeps `item` until `at`; whether there was room.
    pub(super) fn push(&mut self, at: Duration, len_bytes: usize, item: T) -> bool {
        // What keeping it takes counts as well, or small ones are free.
        let len_bytes = len_bytes + size_of::<Held<T>>();
        if self.held_bytes + len_bytes > self.max_bytes {
            return false;
        }
        self.held_bytes += len_bytes;
        self.number += 1;
        self.held.push(Reverse(Held { at, number: self.number, len_bytes, item }));
        true
    }

    /// When the next arrives.
    pub(super) fn next_at(&self) -> Option<Duration> {
        self.held.peek().map(|Reverse(held)| held.at)
    }

    /// The next that has arrived, if `fits` says that it is wanted.
    pub(super) fn pop_if(&mut self, now: Duration, fits: impl FnOnce(&T) -> bool) -> Option<T> {
        let next = self.held.peek_mut()?;
        if next.0.at > now || !fits(&next.0.item) {
            return None;
        }
        let Reverse(held) = PeekMut::pop(next);
        self.held_bytes -= held.len_bytes;
        Some(held.item)
    }
}

impl<T> Held<T> {
    fn turn(&self) -> (Duration, u64) {
        (self.at, self.number)
    }
}

impl<T> PartialEq for Held<T> {
    fn eq(&self, other: &Held<T>) -> bool {
        self.turn() == other.turn()
    }
}

impl<T> Eq for Held<T> {}

impl<T> PartialOrd for Held<T> {
    fn partial_cmp(&self, other: &Held<T>) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl<T> Ord for Held<T> {
    fn cmp(&self, other: &Held<T>) -> std::cmp::Ordering {
        self.turn().cmp(&other.turn())
    }
}

#[cfg(test)]
mod tests {
    use super::{Direction::*, *};
    use proptest::{collection::vec, option, prelude::*};

    prop_compose! {
        fn shapes()(
            rtt_us in 0u64..100_000, jitter_us in 0u64..50_000, bytes_s in option::of(1_000u64..1_000_000_000), queue_bytes in option::of(0u64..100_000),
            [loss, duplicate, reorder] in [0.0..=1.0, 0.0..=1.0, 0.0..=1.0], seed: u64,
        ) -> LinkShape {
            let (rtt, jitter) = (Duration::from_micros(rtt_us), Duration::from_micros(jitter_us));
            LinkShape { rtt, jitter, bytes_s, queue_bytes, loss, duplicate, reorder, seed, ..LinkShape::default() }
        }
    }

    /// Lengths, and how long after the one before each is sent.
    fn datagrams() -> impl Strategy<Value = Vec<(usize, u64)>> {
        vec((1usize..9000, prop_oneof![Just(0), 0u64..5000]), 0..100)
    }

    /// What was sent, and each copy's arrival.
    fn run(shape: &LinkShape, direction: Direction, datagrams: &[(usize, u64)]) -> Vec<(usize, Duration, [Option<Duration>; 2])> {
        let (mut shaper, mut now) = (Shaper::new(shape, direction), Duration::ZERO);
        let mut send = |&(len_bytes, after_us)| {
            now += Duration::from_micros(after_us);
            (len_bytes, now, shaper.send(len_bytes, now, false))
        };
        datagrams.iter().map(&mut send).collect()
    }

    proptest! {
        #[test]
        fn the_same_seed_decides_the_same(shape in shapes(), datagrams in datagrams()) {
            for direction in [Outgoing, Incoming] {
                prop_assert_eq!(run(&shape, direction, &datagrams), run(&shape, direction, &datagrams));
            }
        }

        #[test]
        fn nothing_arrives_sooner_than_half_a_round_trip_after_it_was_sent(shape in shapes(), datagrams in datagrams()) {
            for (_, sent, arrivals) in run(&shape, Outgoing, &datagrams) {
                prop_assert!(arrivals.into_iter().flatten().all(|at| (at - sent) * 2 >= shape.rtt));
            }
        }

        #[test]
        fn nothing_is_overtaken_unless_that_was_asked_for(shape in shapes(), datagrams in datagrams()) {
            let shape = LinkShape { reorder: 0.0, ..shape };
            let arrivals: Vec<Duration> = run(&shape, Outgoing, &datagrams).into_iter().flat_map(|(_, _, at)| at).flatten().collect();
            prop_assert!(arrivals.is_sorted());
        }

        /// Between any two arrivals no more passes than the rate lets through, the later one included.
        #[test]
        fn no_window_has_more_than_the_rate(shape in shapes(), datagrams in datagrams(), bytes_s in 1_000u64..1_000_000_000) {
            let shape = LinkShape { reorder: 0.0, bytes_s: Some(bytes_s), ..shape };
            let sent = run(&shape, Incoming, &datagrams);
            let arrivals: Vec<(usize, Duration)> = sent.iter().flat_map(|(len, _, at)| at.iter().flatten().map(|at| (*len, *at))).collect();
            for (first, (_, from)) in arrivals.iter().enumerate() {
                let mut bytes = 0;
                for (len, until) in &arrivals[first + 1..] {
                    bytes += *len as u128;
                    prop_assert!(bytes * NANOS_S <= (*until - *from).as_nanos() * u128::from(bytes_s));
                }
            }
        }

        /// What waits is at most the queue: whatever arrives has waited no longer than the queue takes to pass, and for itself.
        #[test]
        fn nothing_waits_behind_more_than_the_queue(shape in shapes(), datagrams in datagrams(), bytes_s in 1_000u64..1_000_000_000) {
            let shape = LinkShape { reorder: 0.0, bytes_s: Some(bytes_s), ..shape };
            let takes = |bytes: u64| Duration::from_secs_f64(bytes as f64 / bytes_s as f64);
            let longest = shape.rtt / 2 + shape.jitter + takes(shape.queue_of(bytes_s).max(9000)) + Duration::from_micros(1);
            for (_, sent, arrivals) in run(&shape, Outgoing, &datagrams) {
                prop_assert!(arrivals.into_iter().flatten().all(|at| at - sent <= longest));
            }
        }

        #[test]
        fn a_cut_lets_nothing_pass_and_changes_nobody_elses_luck(shape in shapes(), datagrams in datagrams(), cut in [0u64..200, 0u64..200]) {
            let [from, until] = cut.map(Duration::from_millis);
            let whole = LinkShape { bytes_s: None, jitter: Duration::ZERO, ..shape };
            let with_cut = LinkShape { cuts: vec![from..until], ..whole.clone() };
            let both = run(&whole, Outgoing, &datagrams).into_iter().zip(run(&with_cut, Outgoing, &datagrams));
            for ((_, sent, without), (_, _, with)) in both {
                prop_assert_eq!(with, if (from..until).contains(&sent) { [None; 2] } else { without });
            }
        }

        /// Against a sorted list.
        #[test]
        fn a_line_hands_out_in_the_order_of_arrival(pushes in vec((0u64..50, 0usize..100), 0..60), max_bytes in 0usize..10_000) {
            let (mut line, mut kept, mut bytes) = (Line::new(max_bytes), Vec::new(), 0);
            for (number, (at, len)) in pushes.into_iter().enumerate() {
                if line.push(Duration::from_millis(at), len, number) {
                    kept.push((Duration::from_millis(at), number));
                    bytes += len;
                }
                prop_assert!(bytes <= max_bytes && line.held_bytes <= max_bytes);
            }
            kept.sort_unstable();
            for (at, number) in kept {
                prop_assert_eq!(line.next_at(), Some(at));
                prop_assert_eq!(line.pop_if(at.saturating_sub(Duration::from_nanos(1)), |_| true), at.is_zero().then_some(number));
                if !at.is_zero() {
                    prop_assert_eq!(line.pop_if(at, |_| false), None);
                    prop_assert_eq!(line.pop_if(at, |_| true), Some(number));
                }
            }
            prop_assert!(line.next_at().is_none() && line.held_bytes == 0);
        }
    }

    const MANY: usize = 40_000;

    /// Of many datagrams, all of one length and a microsecond apart: how many never came, came twice, and came after one that was sent later.
    fn luck(shape: &LinkShape) -> [f64; 3] {
        let sent = run(shape, Outgoing, &vec![(1000, 1); MANY]);
        let count =
            |of: &dyn Fn(&[Option<Duration>; 2]) -> bool| sent.iter().filter(|(_, _, at)| of(at)).count() as f64 / MANY as f64;
        let overtaken = sent.windows(2).filter(|pair| pair[0].2[0].zip(pair[1].2[0]).is_some_and(|(one, next)| one > next)).count();
        [count(&|at| at[0].is_none()), count(&|at| at[1].is_some()), overtaken as f64 / MANY as f64]
    }

    #[test]
    fn shares_are_near_what_was_asked_for() {
        for seed in 0..2 {
            for share in [0.0, 0.001, 0.01, 0.3, 1.0] {
                // Six standard deviations.
                let near = |got: f64, of: f64| (got - of).abs() <= 6.0 * (of * (1.0 - of) / MANY as f64).sqrt() + 1e-9;
                let none = LinkShape { rtt: Duration::from_millis(8), seed, ..LinkShape::default() };
                let [lost, ..] = luck(&LinkShape { loss: share, ..none.clone() });
                let [_, twice, _] = luck(&LinkShape { duplicate: share, ..none.clone() });
                let [.., overtaken] = luck(&LinkShape { reorder: share, ..none });
                assert!(near(lost, share) && near(twice, share), "seed {seed}, {share}: {lost} lost, {twice} twice");
                // The late one's next must not be late itself.
                assert!(near(overtaken, share * (1.0 - share)), "seed {seed}, {share}: {overtaken} overtaken");
            }
        }
    }

    #[test]
    fn directions_and_seeds_have_luck_of_their_own() {
        let shape = |seed| LinkShape { loss: 0.5, seed, ..LinkShape::default() };
        let datagrams = [(1000, 1); 64];
        assert_ne!(run(&shape(1), Outgoing, &datagrams), run(&shape(1), Incoming, &datagrams));
        assert_ne!(run(&shape(1), Outgoing, &datagrams), run(&shape(2), Outgoing, &datagrams));
    }

    #[test]
    fn the_switch_lets_nothing_pass() {
        let mut shaper = Shaper::new(&LinkShape::default(), Outgoing);
        let passes = [false, true, false].map(|cut| shaper.send(1000, Duration::ZERO, cut)[0].is_some());
        assert_eq!(passes, [true, false, true]);
    }

    /// As many as the queue takes pass of a burst, however slow the link is, and the rest never comes.
    #[test]
    fn what_finds_the_queue_full_is_dropped() {
        let shape = LinkShape { bytes_s: Some(1_000_000), queue_bytes: Some(10_000), ..LinkShape::default() };
        let sent = run(&shape, Outgoing, &[(1000, 0); 50]);
        assert_eq!(sent.iter().filter(|(_, _, at)| at[0].is_some()).count(), 10);
        assert_eq!(sent[9].2[0], Some(Duration::from_millis(10)));
    }
}
