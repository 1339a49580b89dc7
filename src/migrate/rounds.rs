//! Decisions: how long a program's pages are copied while it runs, and when it moves.
//!
//! Role: between what was measured and the handover. Neighbours: `copy` measures and carries out; [`Strategy`] gives the limits. Invariants: pure; a program that writes
//! faster than the link carries never keeps hybrid from moving, nor pre-copy from ending at its limits.
//!
//! A round sends what was owed when it began, except what was written again meanwhile; that is the next round's.

use super::{
    owed::Tick,
    strategy::{AtLimit, Strategy},
};
use crate::net::wire::MoveKind;
use std::time::Duration;

/// What is known at one moment. Bytes and times count from the beginning of the copying.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    pub(super) at: Duration,
    /// The next write is told by a later tick than this.
    pub(super) tick: Tick,
    /// Of pages that the destination lacks, and of what is on the way to it.
    pub(super) owed_bytes: u64,
    /// The tick of the page that waits longest.
    pub(super) oldest: Option<Tick>,
    pub(super) dirtied_bytes: u64,
    /// Of pages that are at the destination and weighed something, sent in as long as something was on the way.
    pub(super) arrived_bytes: u64,
    pub(super) busy: Duration,
    pub(super) round_trip: Duration,
    /// The source's owner wants it to move now.
    pub(super) finalize: bool,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    GoOn,
    /// `copy_rest`: what is owed is sent within the pause; else it follows.
    HandOver {
        copy_rest: bool,
    },
    Cancel {
        reason: String,
    },
}

/// Bytes a second, smoothed.
#[derive(Clone, Copy, Debug, Default)]
struct Rate {
    since: Duration,
    bytes: u64,
    bytes_s: Option<f64>,
}

/// Less would measure the steps in which trackers are asked and credit comes.
const RATE_LOOK: Duration = Duration::from_millis(20);

impl Rate {
    /// `mix`: of the rate before and that since then.
    fn look(&mut self, at: Duration, bytes: u64, mix: impl Fn(f64, f64) -> f64) {
        let elapsed = at.saturating_sub(self.since);
        if elapsed < RATE_LOOK {
            return;
        }
        #[allow(clippy::cast_precision_loss, reason = "a rate")]
        let now = bytes.saturating_sub(self.bytes) as f64 / elapsed.as_secs_f64();
        let mixed = self.bytes_s.map_or(now, |before| mix(before, now));
        *self = Rate { since: at, bytes, bytes_s: Some(mixed) };
    }
}

/// See the module header.
#[derive(Debug)]
pub(super) struct Rounds {
    strategy: Strategy,
    round: u32,
    /// The last tick whose pages are this round's.
    began: Tick,
    /// Owed at the end of the round before.
    before_bytes: Option<u64>,
    dirty: Rate,
    bandwidth: Rate,
    predicted: Duration,
    speed: f64,
}

/// A program is not asked to be slower than this: then it had better stand still, for a shorter time.
pub(super) const SPEED_MIN: f64 = 1.0 / 16.0;

impl Rounds {
    /// `tick` is that of the pages which are owed from the beginning.
    pub(super) fn new(strategy: Strategy, tick: Tick) -> Rounds {
        let (dirty, bandwidth) = (Rate::default(), Rate::default());
        Rounds { strategy, round: 1, began: tick, before_bytes: None, dirty, bandwidth, predicted: Duration::MAX, speed: 1.0 }
    }

    /// From 1.
    pub(super) fn round(&self) -> u32 {
        self.round
    }

    pub(super) fn dirty_bytes_s(&self) -> u64 {
        rounded(self.dirty.bytes_s.unwrap_or(0.0))
    }

    pub(super) fn bandwidth_bytes_s(&self) -> u64 {
        rounded(self.bandwidth.bytes_s.unwrap_or(0.0))
    }

    /// How fast the program may write, of what it would: half of what it was after each round that gained nothing, if it has to come to an end by rounds.
    pub(super) fn speed(&self) -> f64 {
        self.speed
    }

    /// How long the program would pause if it moved now.
    pub(super) fn predicted(&self) -> Duration {
        self.predicted
    }

    pub(super) fn look(&mut self, look: &Look) -> Verdict {
        self.dirty.look(look.at, look.dirtied_bytes, |before, now| (before + now) / 2.0);
        // Falls slowly: little to send says nothing about the path.
        self.bandwidth.look(look.busy, look.arrived_bytes, |before, now| now.max(before * 0.75));
        // PREPARE, READY and COMMIT.
        let handover = look.round_trip * 3 / 2;
        let copying = self.time_to_send(look.owed_bytes).saturating_add(handover);
        self.predicted = if self.strategy.kind == MoveKind::PreCopy { copying } else { handover };
        if look.finalize && self.strategy.kind != MoveKind::Standby {
            return Verdict::HandOver { copy_rest: copying <= self.strategy.downtime_limit };
        }
        let pre_copy = match self.strategy.kind {
            MoveKind::PostCopy => return Verdict::HandOver { copy_rest: false },
            MoveKind::PreCopy => true,
            MoveKind::Hybrid => false,
            // When it gets a point is decided elsewhere.
            MoveKind::Standby => return Verdict::GoOn,
        };
        if let Some(limit) = self.strategy.time_limit
            && look.at >= limit
        {
            return self.at_limit(&format!("the time limit of {limit:?} is over"), look.owed_bytes, copying);
        }
        if look.oldest.is_some_and(|oldest| oldest <= self.began) {
            return Verdict::GoOn;
        }
        // A round is over.
        let shrinks = self.before_bytes.is_none_or(|before| look.owed_bytes <= before / 4 * 3);
        if self.round >= self.strategy.round_limit.into() {
            return self.at_limit(&format!("{} rounds are over", self.round), look.owed_bytes, copying);
        }
        // The limit is what the pause may be, not what it shall be: as long as rounds make it shorter, it is worth another.
        if (!shrinks || look.owed_bytes == 0) && (!pre_copy || copying <= self.strategy.downtime_limit) {
            return Verdict::HandOver { copy_rest: pre_copy };
        }
        if !shrinks {
            self.speed = (self.speed / 2.0).max(SPEED_MIN);
        }
        // With nothing to do there is no next round, until something is written.
        if look.owed_bytes > 0 {
            (self.round, self.began, self.before_bytes) = (self.round + 1, look.tick, Some(look.owed_bytes));
        }
        Verdict::GoOn
    }

    fn at_limit(&self, what: &str, owed_bytes: u64, copying: Duration) -> Verdict {
        match (self.strategy.kind, self.strategy.at_limit) {
            (MoveKind::PreCopy, _) if copying <= self.strategy.downtime_limit => Verdict::HandOver { copy_rest: true },
            (MoveKind::PreCopy, AtLimit::Cancel) => Verdict::Cancel {
                reason: format!(
                    "{what}, {owed_bytes} bytes are still to copy, which takes {:?} of the {:?} that the program may pause: it writes {} bytes a second, and {} a second are carried; \
                     give it a longer pause, more bandwidth or AtLimit::Force, or slow it down",
                    self.predicted,
                    self.strategy.downtime_limit,
                    self.dirty_bytes_s(),
                    self.bandwidth_bytes_s()
                ),
            },
            _ => Verdict::HandOver { copy_rest: false },
        }
    }

    /// At the bandwidth that was measured.
    pub(super) fn time_to_send(&self, bytes: u64) -> Duration {
        // Whoever has sent a round and nothing that weighed anything has zeros alone.
        if bytes == 0 || self.bandwidth.bytes_s.is_none() && self.round > 1 {
            return Duration::ZERO;
        }
        #[allow(clippy::cast_precision_loss, reason = "a rate")]
        let seconds = self.bandwidth.bytes_s.map_or(f64::INFINITY, |bytes_s| bytes as f64 / bytes_s);
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate, not negative; beyond u64 it is cut")]
fn rounded(bytes_s: f64) -> u64 {
    bytes_s as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{prop_assert, proptest};

    /// A link of `bandwidth` and a program that dirties `hot_bytes` again and again at `dirty_s`.
    fn simulate(strategy: Strategy, total_bytes: u64, bandwidth: u64, dirty_s: u64, hot_bytes: u64) -> (Verdict, u32, Duration) {
        let mut rounds = Rounds::new(strategy, 1);
        let (mut at, mut tick, mut sent, mut dirtied) = (Duration::ZERO, 1, 0, 0);
        // Of the first copy, and of what was written since: the hot set at most.
        let (mut cold, mut hot) = (total_bytes, 0u64);
        // Pages of a round that are still to go, and those written in it.
        let (mut old_hot, mut new_hot) = (0u64, 0u64);
        for _ in 0..100_000 {
            let step = Duration::from_millis(50);
            at += step;
            tick += 1;
            let mut room = bandwidth / 20;
            let from_cold = room.min(cold);
            (cold, room) = (cold - from_cold, room - from_cold);
            let from_old = room.min(old_hot);
            old_hot -= from_old;
            sent += from_cold + from_old;
            dirtied += (dirty_s / 20).min(hot_bytes);
            new_hot = (new_hot + dirty_s / 20).min(hot_bytes);
            // What is written again is no longer this round's.
            old_hot = old_hot.min(hot_bytes - new_hot);
            hot = old_hot + new_hot;
            let this_round = cold + old_hot;
            let look = Look {
                at,
                tick,
                owed_bytes: cold + hot,
                oldest: if this_round > 0 {
                    Some(0)
                } else if hot > 0 {
                    Some(tick)
                } else {
                    None
                },
                dirtied_bytes: dirtied,
                arrived_bytes: sent,
                busy: at,
                round_trip: Duration::from_millis(1),
                finalize: false,
            };
            let verdict = rounds.look(&look);
            if verdict != Verdict::GoOn {
                return (verdict, rounds.round(), at);
            }
            if this_round == 0 {
                (old_hot, new_hot) = (new_hot, 0);
            }
        }
        panic!("never ends: {hot} owed");
    }

    const GIB: u64 = 1 << 30;
    const MIB: u64 = 1 << 20;

    #[test]
    fn a_quiet_program_moves_after_one_copy() {
        let (verdict, rounds, _) = simulate(Strategy::hybrid(), GIB, 500 * MIB, 0, MIB);
        assert_eq!((verdict, rounds), (Verdict::HandOver { copy_rest: false }, 1));
        let (verdict, ..) = simulate(Strategy::pre_copy(), GIB, 500 * MIB, 0, MIB);
        assert_eq!(verdict, Verdict::HandOver { copy_rest: true });
    }

    #[test]
    fn pre_copy_goes_on_until_the_rest_fits_the_downtime_limit() {
        let strategy = Strategy::pre_copy().downtime_limit(Duration::from_millis(20));
        let (verdict, rounds, _) = simulate(strategy, GIB, 500 * MIB, 50 * MIB, 64 * MIB);
        assert_eq!(verdict, Verdict::HandOver { copy_rest: true });
        assert!((2..10).contains(&rounds), "{rounds} rounds");
    }

    #[test]
    fn a_program_that_outruns_the_link_ends_at_a_limit_as_it_was_told() {
        let fast = |strategy| simulate(strategy, GIB, 100 * MIB, 400 * MIB, GIB / 2).0;
        assert!(matches!(fast(Strategy::pre_copy()), Verdict::Cancel { reason } if reason.contains("30 rounds")));
        assert_eq!(fast(Strategy::pre_copy().at_limit(AtLimit::Force)), Verdict::HandOver { copy_rest: false });
        assert_eq!(fast(Strategy::hybrid()), Verdict::HandOver { copy_rest: false });
        let timed = Strategy::pre_copy().time_limit(Duration::from_secs(3));
        let (verdict, _, at) = simulate(timed, GIB, 100 * MIB, 400 * MIB, GIB / 2);
        assert!(matches!(verdict, Verdict::Cancel { reason } if reason.contains("3s")));
        assert!(at <= Duration::from_millis(3100), "{at:?}");
    }

    #[test]
    fn a_program_that_outruns_the_link_is_asked_to_slow_down_by_pre_copy_alone() {
        let mut slowest = Vec::new();
        for strategy in [Strategy::pre_copy(), Strategy::hybrid()] {
            let mut rounds = Rounds::new(strategy, 1);
            for (tick, at) in (2..).zip((0..20).map(|at| Duration::from_millis(at * 50))) {
                let (owed_bytes, oldest, round_trip) = (GIB, Some(tick), Duration::from_millis(1));
                let (dirtied_bytes, arrived_bytes, finalize) = (tick as u64 * GIB, tick as u64 * MIB, false);
                rounds.look(&Look { at, tick, owed_bytes, oldest, dirtied_bytes, arrived_bytes, busy: at, round_trip, finalize });
            }
            slowest.push(rounds.speed());
        }
        assert_eq!(slowest, [SPEED_MIN, 1.0]);
    }

    #[test]
    fn hybrid_stops_when_a_round_leaves_as_much_as_the_one_before() {
        let (_, rounds, _) = simulate(Strategy::hybrid(), GIB, 500 * MIB, 50 * MIB, 64 * MIB);
        assert!((2..=4).contains(&rounds), "{rounds} rounds");
    }

    #[test]
    fn post_copy_copies_nothing_first() {
        let (verdict, rounds, at) = simulate(Strategy::post_copy(), GIB, 500 * MIB, 50 * MIB, 64 * MIB);
        assert_eq!((verdict, rounds, at), (Verdict::HandOver { copy_rest: false }, 1, Duration::from_millis(50)));
    }

    #[test]
    fn finalize_moves_it_at_once_and_sends_the_rest_first_if_that_is_quick() {
        let mut rounds = Rounds::new(Strategy::pre_copy(), 1);
        let look = |owed_bytes, finalize| Look {
            at: Duration::from_secs(1),
            tick: 2,
            owed_bytes,
            oldest: Some(1),
            dirtied_bytes: 0,
            arrived_bytes: 100 * MIB,
            busy: Duration::from_secs(1),
            round_trip: Duration::from_millis(1),
            finalize,
        };
        assert_eq!(rounds.look(&look(GIB, false)), Verdict::GoOn);
        assert_eq!(rounds.look(&look(GIB, true)), Verdict::HandOver { copy_rest: false });
        assert_eq!(rounds.look(&look(MIB, true)), Verdict::HandOver { copy_rest: true });
    }

    proptest! {
        #[test]
        fn every_program_over_every_link_comes_to_an_end(
            kind in 0usize..3, total in 1..4 * GIB, bandwidth in MIB..4 * GIB, dirty in 0..4 * GIB, hot in 1..GIB
        ) {
            let strategy = [Strategy::post_copy(), Strategy::pre_copy(), Strategy::hybrid()][kind];
            let (verdict, rounds, _) = simulate(strategy, total, bandwidth, dirty, hot.min(total));
            prop_assert!(rounds <= 30);
            let moved = verdict == Verdict::HandOver { copy_rest: false };
            prop_assert!(kind == 1 || moved, "{:?}", verdict);
        }
    }
}
