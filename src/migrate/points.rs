//! Decisions: when a standby gets a point, and when the program waits for it.
//!
//! Role: between what was measured and the pause points of a program that is followed. Neighbours: `rounds` measures the path; `stand` carries out. Invariants: pure; one point at a time is on the way;
//! with `hold` no program runs on while its standby is further behind than it may be.
//!
//! A point needs all pages that were written since the last one, each once, as it is at the pause. So nothing is sent as long as there is time, then what is owed, once, and
//! what was written again meanwhile is copied aside in the pause: what is written all the time goes twice a point, however fast it is written.

use super::rounds::{Look, SPEED_MIN};
use std::time::Duration;

/// How far a standby may be behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Behind {
    pub(super) time: Duration,
    pub(super) bytes: Option<u64>,
    /// The program waits rather than to be further ahead.
    pub(super) hold: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing, for so long; trackers are asked all the same.
    Wait(Duration),
    /// Send what is owed.
    Send,
    /// Pause the program, and let it run on when what is owed was copied aside.
    Cut,
    /// The same, but it waits before that until the point on the way is kept.
    HoldAndCut,
    /// It was promoted, and has nothing left to send but what was written in the last moment.
    HandOver,
}

/// A moment at which the program stood.
#[derive(Clone, Copy, Debug, Default)]
struct Moment {
    at: Duration,
    dirtied_bytes: u64,
}

/// See the module header.
#[derive(Clone, Copy, Debug)]
pub(super) struct Points {
    behind: Behind,
    /// Of the last point; 0 before the first.
    number: u64,
    kept: u64,
    cut: Moment,
    /// Of the last point that is kept.
    kept_cut: Moment,
    /// The first copy, and those after it that leave less to copy in the pause: each sends what was owed at this tick.
    catches_up: Option<u32>,
    /// What was left by the one before.
    left_bytes: u64,
    /// Sends what was owed at this tick before the next point.
    sends: Option<u32>,
    promoted: bool,
    speed: f64,
}

/// Sending begins so much earlier than it must: trackers are asked at intervals, and the path is shared.
const MARGIN: Duration = Duration::from_millis(20);
const LOOK_MIN: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_millis(50);

impl Points {
    /// `tick` is that of the pages which are owed from the beginning.
    pub(super) fn new(behind: Behind, tick: u32) -> Points {
        let none = Moment::default();
        Points {
            behind,
            number: 0,
            kept: 0,
            cut: none,
            kept_cut: none,
            catches_up: Some(tick),
            left_bytes: u64::MAX,
            sends: None,
            promoted: false,
            speed: 1.0,
        }
    }

    /// The connection is back; times and bytes count from now. A point that was on the way will not be kept.
    pub(super) fn go_on(self, tick: u32) -> Points {
        let none = Moment::default();
        let catches_up = Some(tick);
        Points {
            kept: self.number,
            cut: none,
            kept_cut: none,
            catches_up,
            left_bytes: u64::MAX,
            sends: None,
            promoted: false,
            ..self
        }
    }

    /// Whether one is on the way.
    pub(super) fn outstanding(&self) -> bool {
        self.kept < self.number
    }

    /// The next point was cut; its number.
    pub(super) fn cut(&mut self, look: &Look) -> u64 {
        self.cut = Moment { at: look.at, dirtied_bytes: look.dirtied_bytes };
        self.number += 1;
        self.sends = None;
        self.number
    }

    /// The standby has it, as was heard at `at`: how far it was behind then. What it says of others means nothing.
    pub(super) fn kept(&mut self, number: u64, at: Duration) -> Option<Duration> {
        let news = number == self.number && self.outstanding();
        news.then(|| {
            (self.kept, self.kept_cut) = (number, self.cut);
            let took = at.saturating_sub(self.cut.at);
            let keeps_up = took <= self.behind.time / 2;
            self.speed = if keeps_up { (self.speed * 2.0).min(1.0) } else { (self.speed / 2.0).max(SPEED_MIN) };
            took
        })
    }

    /// How fast the program may write, of what it would: half of what it was after each point that took longer than there is between two.
    pub(super) fn speed(&self) -> f64 {
        self.speed
    }

    /// The standby is to have the program.
    pub(super) fn promote(&mut self, tick: u32) {
        if !self.promoted {
            (self.promoted, self.catches_up, self.left_bytes) = (true, Some(tick), u64::MAX);
        }
    }

    /// `to_send`: how long what is owed takes.
    pub(super) fn look(&mut self, look: &Look, to_send: Duration) -> Next {
        let owes = |tick: u32| look.oldest.is_some_and(|oldest| oldest <= tick);
        if let Some(tick) = self.catches_up {
            if owes(tick) {
                return Next::Send;
            }
            if look.owed_bytes > 0 && look.owed_bytes <= self.left_bytes / 4 * 3 {
                (self.catches_up, self.left_bytes) = (Some(look.tick), look.owed_bytes);
                return Next::Send;
            }
            if self.outstanding() {
                return Next::Wait(LOOK_MIN);
            }
            if self.promoted {
                return Next::HandOver;
            }
            self.catches_up = None;
            return Next::Cut;
        }
        let every = self.behind.time / 2;
        let gone = look.at.saturating_sub(self.cut.at);
        let written = look.dirtied_bytes.saturating_sub(self.cut.dirtied_bytes);
        let near = |part: u64| self.behind.bytes.is_some_and(|bytes| written >= bytes / part);
        if gone < every && !near(2) {
            let left = every - gone;
            if near(4) || to_send.saturating_mul(2).saturating_add(MARGIN) >= left {
                self.sends.get_or_insert(look.tick);
            }
            return match self.sends {
                Some(tick) if owes(tick) => Next::Send,
                Some(_) => Next::Wait(LOOK_MIN.min(left)),
                None => Next::Wait((left / 4).clamp(LOOK_MIN, LOOK_MAX)),
            };
        }
        if !self.outstanding() {
            return Next::Cut;
        }
        let since = look.at.saturating_sub(self.kept_cut.at);
        let ahead = look.dirtied_bytes.saturating_sub(self.kept_cut.dirtied_bytes);
        if self.behind.hold && (since >= self.behind.time || self.behind.bytes.is_some_and(|bytes| ahead >= bytes)) {
            return Next::HoldAndCut;
        }
        if owes(*self.sends.get_or_insert(look.tick)) { Next::Send } else { Next::Wait(LOOK_MIN) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A program that dirties `dirty_s` bytes a second of a hot set, a path of `bandwidth`; what a simulated minute shows.
    struct Shown {
        points: u64,
        furthest_behind: Duration,
        furthest_ahead_bytes: u64,
        sent_bytes: u64,
        held: Duration,
        speed: f64,
        largest_cut_bytes: u64,
    }

    fn simulate(behind: Behind, bandwidth: u64, dirty_s: u64, hot_bytes: u64) -> Shown {
        let mut points = Points::new(behind, 1);
        let mut shown = Shown {
            points: 0,
            furthest_behind: Duration::ZERO,
            furthest_ahead_bytes: 0,
            sent_bytes: 0,
            held: Duration::ZERO,
            speed: 1.0,
            largest_cut_bytes: 0,
        };
        let (mut at, mut tick, mut dirtied) = (Duration::ZERO, 1u32, 0u64);
        // Of the hot set is owed what was written before a tick, and what was after it.
        let (mut cold, mut old, mut new, mut old_since, mut new_since) = (200 * MIB, 0u64, 0u64, 0, 1);
        // Of a point that is on the way: its number, bytes still to go, when the program stood there, and what it had written.
        let mut on_the_way: Option<(u64, u64, Duration, u64)> = None;
        let mut kept: Option<(Duration, u64)> = None;
        let mut holds = false;
        while at < Duration::from_secs(60) {
            let step = Duration::from_millis(5);
            at += step;
            let mut room = bandwidth / 200;
            if let Some((number, left, when, wrote)) = &mut on_the_way {
                let goes = room.min(*left);
                (*left, room) = (*left - goes, room - goes);
                shown.sent_bytes += goes;
                if *left == 0 {
                    assert!(points.kept(*number, at).is_some());
                    kept = Some((*when, *wrote));
                    on_the_way = None;
                }
            }
            if holds && points.outstanding() {
                shown.held += step;
            } else {
                tick += 1;
                let wrote = dirty_s / 200;
                dirtied += wrote;
                // All over the hot set.
                let share = |part: u64| wrote.min(hot_bytes) * part / hot_bytes.max(1);
                let (again, clean) = (share(old), share(hot_bytes - old - new));
                (old, new) = (old - again, new + again + clean);
                if old == 0 {
                    (old, new, old_since, new_since) = (new, 0, new_since, tick + 1);
                }
            }
            if let Some((when, wrote)) = kept {
                shown.furthest_behind = shown.furthest_behind.max(at - when);
                shown.furthest_ahead_bytes = shown.furthest_ahead_bytes.max(dirtied - wrote);
            }
            let look = Look {
                at,
                tick,
                owed_bytes: cold + old + new,
                oldest: if cold > 0 { Some(1) } else { (old > 0).then_some(old_since) },
                dirtied_bytes: dirtied,
                arrived_bytes: 0,
                busy: at,
                round_trip: Duration::ZERO,
                finalize: false,
            };
            let to_send = Duration::from_secs_f64((cold + old + new) as f64 / bandwidth as f64);
            let next = if holds && !points.outstanding() {
                holds = false;
                Next::Cut
            } else if holds {
                continue;
            } else {
                points.look(&look, to_send)
            };
            match next {
                Next::Wait(_) => {}
                Next::Send => {
                    let from_cold = room.min(cold);
                    let from_old = (room - from_cold).min(old);
                    (cold, old) = (cold - from_cold, old - from_old);
                    shown.sent_bytes += from_cold + from_old;
                    if old == 0 {
                        (old, new, old_since, new_since) = (new, 0, new_since, tick + 1);
                    }
                }
                Next::Cut => {
                    assert!(on_the_way.is_none(), "two points at a time");
                    shown.points += 1;
                    on_the_way = Some((points.cut(&look), (old + new).max(1), at, dirtied));
                    shown.largest_cut_bytes = shown.largest_cut_bytes.max(old + new);
                    (old, new) = (0, 0);
                }
                Next::HoldAndCut => holds = true,
                Next::HandOver => panic!("nobody promoted it"),
            }
        }
        Shown { speed: points.speed(), ..shown }
    }

    const SECOND: Behind = Behind { time: Duration::from_secs(1), bytes: None, hold: false };

    #[test]
    fn a_path_that_carries_the_writes_keeps_the_standby_as_near_as_was_asked() {
        for (dirty_s, hot) in [(0, 0), (5 * MIB, 64 * MIB), (50 * MIB, 64 * MIB), (100 * MIB, 16 * MIB)] {
            let shown = simulate(SECOND, 500 * MIB, dirty_s, hot);
            assert!(shown.furthest_behind <= SECOND.time, "{dirty_s}: {:?} behind", shown.furthest_behind);
            assert!((100..=150).contains(&shown.points), "{dirty_s}: {} points in a minute", shown.points);
            assert_eq!((shown.held, shown.speed), (Duration::ZERO, 1.0));
            // What it writes in a tenth of a second or so.
            assert!(shown.largest_cut_bytes <= dirty_s / 8, "{dirty_s}: {} bytes copied in a pause", shown.largest_cut_bytes);
        }
    }

    #[test]
    fn what_is_written_all_the_time_goes_once_or_twice_a_point() {
        // A hot set that is written over many times a second.
        let shown = simulate(SECOND, 500 * MIB, 400 * MIB, 8 * MIB);
        let least = 200 * MIB + shown.points * 8 * MIB;
        assert!(shown.sent_bytes <= least * 3, "{} MiB for {} points", shown.sent_bytes / MIB, shown.points);
    }

    #[test]
    fn a_limit_in_bytes_brings_points_sooner() {
        let behind = Behind { bytes: Some(8 * MIB), ..SECOND };
        let shown = simulate(behind, 500 * MIB, 100 * MIB, 64 * MIB);
        assert!(shown.furthest_ahead_bytes <= 8 * MIB, "{} bytes ahead", shown.furthest_ahead_bytes);
        assert!(shown.points > 1_000, "{} points", shown.points);
    }

    #[test]
    fn a_program_that_outruns_the_path_is_held_only_if_that_is_wanted() {
        let shown = simulate(SECOND, 20 * MIB, 200 * MIB, 64 * MIB);
        assert!(shown.held.is_zero() && shown.furthest_behind > SECOND.time, "{:?} behind", shown.furthest_behind);
        assert!(shown.points > 5, "{} points: it starves", shown.points);
        assert!(shown.speed <= SPEED_MIN, "it was not asked to slow down");
        let held = simulate(Behind { hold: true, ..SECOND }, 20 * MIB, 200 * MIB, 64 * MIB);
        assert!(held.held > Duration::from_secs(10), "held for {:?}", held.held);
        let bytes = simulate(Behind { hold: true, bytes: Some(4 * MIB), ..SECOND }, 2 * MIB, 200 * MIB, 64 * MIB);
        assert!(bytes.furthest_ahead_bytes <= 5 * MIB, "{} bytes ahead", bytes.furthest_ahead_bytes);
    }

    #[test]
    fn a_promotion_sends_what_is_owed_and_waits_for_the_point_on_the_way() {
        let mut points = Points::new(SECOND, 1);
        let look = |tick, oldest, owed_bytes| Look {
            at: Duration::from_millis(u64::from(tick)),
            tick,
            owed_bytes,
            oldest,
            dirtied_bytes: 0,
            arrived_bytes: 0,
            busy: Duration::ZERO,
            round_trip: Duration::ZERO,
            finalize: false,
        };
        assert_eq!(points.look(&look(2, Some(1), MIB), Duration::MAX), Next::Send);
        assert_eq!(points.look(&look(3, Some(3), MIB), Duration::ZERO), Next::Send);
        assert_eq!(points.look(&look(4, Some(4), MIB), Duration::ZERO), Next::Cut, "it would copy no less");
        let first = points.cut(&look(3, Some(3), MIB));
        assert!(matches!(points.look(&look(4, Some(4), MIB), Duration::ZERO), Next::Wait(_)));
        points.promote(4);
        assert_eq!(points.look(&look(5, Some(4), MIB), Duration::ZERO), Next::Send);
        assert_eq!(points.look(&look(6, Some(6), MIB), Duration::ZERO), Next::Send);
        assert!(matches!(points.look(&look(7, Some(7), MIB), Duration::ZERO), Next::Wait(_)));
        let kept = [first + 1, first, first].map(|number| points.kept(number, Duration::from_millis(8)));
        assert_eq!(kept, [None, Some(Duration::from_millis(5)), None]);
        assert_eq!(points.look(&look(7, Some(7), MIB), Duration::ZERO), Next::HandOver);
    }

    #[test]
    fn a_connection_that_comes_back_makes_a_point_of_its_own() {
        let mut points = Points::new(SECOND, 1);
        let look = Look {
            at: Duration::from_secs(3),
            tick: 9,
            owed_bytes: 0,
            oldest: None,
            dirtied_bytes: 0,
            arrived_bytes: 0,
            busy: Duration::ZERO,
            round_trip: Duration::ZERO,
            finalize: false,
        };
        assert_eq!((points.look(&look, Duration::ZERO), points.cut(&look)), (Next::Cut, 1));
        let mut points = points.go_on(12);
        assert!(!points.outstanding() && points.kept(1, Duration::ZERO).is_none());
        assert_eq!(points.look(&Look { oldest: Some(11), ..look }, Duration::ZERO), Next::Send);
        assert_eq!((points.look(&look, Duration::ZERO), points.cut(&look)), (Next::Cut, 2));
        // Nothing is known of the path yet.
        assert_eq!(points.look(&Look { oldest: Some(1), owed_bytes: 1, ..look }, Duration::MAX), Next::Send);
    }
}
