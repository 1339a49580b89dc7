//! How a program's memory moves, as a caller says it.
//!
//! Role: the options of a move. Neighbours: the destination sends them with its TAKE; `rounds` decides by them at the source. Invariants: every limit has a unit and a default.

use super::points::Behind;
use crate::net::wire::{self, MoveKind, Plan};
use std::time::Duration;

/// How the memory moves, and within which limits.
///
/// ```
/// use pageferry::{AtLimit, Strategy};
/// use std::time::Duration;
/// let strategy = Strategy::pre_copy().downtime_limit(Duration::from_millis(50)).round_limit(10).at_limit(AtLimit::Force);
/// assert_ne!(strategy, Strategy::pre_copy());
/// assert_eq!(Strategy::default(), Strategy::hybrid());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strategy {
    pub(super) kind: MoveKind,
    pub(super) downtime_limit: Duration,
    pub(super) round_limit: u16,
    pub(super) time_limit: Option<Duration>,
    pub(super) at_limit: AtLimit,
    /// Of a standby.
    pub(super) behind_bytes: Option<u64>,
}

/// What happens when copying has reached a limit and the program has not moved yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AtLimit {
    /// The move is called off; the program runs on at the source.
    Cancel,
    /// The program moves, and the pages that the destination lacks follow, as with [`Strategy::hybrid`].
    Force,
}

/// Default: [`Strategy::hybrid`].
impl Default for Strategy {
    fn default() -> Strategy {
        Strategy::hybrid()
    }
}

impl Strategy {
    /// The program moves first and its pages follow: the source pushes them, and faults overtake. The least is sent, every page once; afterwards the program is slower until its
    /// working set has come, and both hosts must live until the last page has.
    #[must_use]
    pub fn post_copy() -> Strategy {
        Strategy { kind: MoveKind::PostCopy, round_limit: 0, ..Strategy::hybrid() }
    }

    /// The pages are copied while the program runs, those written meanwhile again, for as long as each round leaves less to do than the one before, and until the rest can be sent within the downtime limit. At the destination nothing is missing, and a
    /// connection lost on the way costs nothing. A program that writes faster than the link carries never gets there: see [`at_limit`](Strategy::at_limit).
    #[must_use]
    pub fn pre_copy() -> Strategy {
        Strategy { kind: MoveKind::PreCopy, round_limit: 30, ..Strategy::hybrid() }
    }

    /// The pages are copied while the program runs, for as long as each round leaves less to do than the one before; then the program moves, and what it had written since
    /// follows. A short pause, and few pages to wait for after it, however fast the program writes.
    #[must_use]
    pub fn hybrid() -> Strategy {
        Strategy {
            kind: MoveKind::Hybrid,
            // What QEMU takes.
            downtime_limit: Duration::from_millis(300),
            round_limit: 10,
            time_limit: None,
            at_limit: AtLimit::Cancel,
            behind_bytes: None,
        }
    }

    /// The longest pause that pre-copy may plan, up to 71 minutes: it goes on copying while the pause is predicted to be longer, and also while each round makes it shorter. Default 300 ms. Zero is never reached: copying goes on until a
    /// limit, or [`Source::finalize`](crate::Source::finalize).
    #[must_use]
    pub fn downtime_limit(mut self, limit: Duration) -> Strategy {
        self.downtime_limit = limit;
        self
    }

    /// Rounds of copying, each of which sends what was owed when it began. Pre-copy is at its limit after as many; hybrid then moves the program. Default 30 and 10.
    #[must_use]
    pub fn round_limit(mut self, rounds: u16) -> Strategy {
        self.round_limit = rounds;
        self
    }

    /// How long copying may take, to the millisecond. Pre-copy is at its limit after that; hybrid then moves the program. Default none.
    #[must_use]
    pub fn time_limit(mut self, limit: Duration) -> Strategy {
        self.time_limit = Some(limit);
        self
    }

    /// What pre-copy does at a limit. Default [`AtLimit::Cancel`].
    #[must_use]
    pub fn at_limit(mut self, what: AtLimit) -> Strategy {
        self.at_limit = what;
        self
    }
}

impl Strategy {
    /// Whether pages are sent before the program moves.
    pub(super) fn copies_first(self) -> bool {
        self.kind != MoveKind::PostCopy
    }

    /// How far behind the program its standby may be, if the destination is one.
    pub(super) fn behind(self) -> Option<Behind> {
        let time = self.time_limit.unwrap_or(StandbyOptions::default().behind);
        let hold = self.at_limit == AtLimit::Force;
        (self.kind == MoveKind::Standby).then_some(Behind { time, bytes: self.behind_bytes, hold })
    }
}

/// How a standby follows its source.
///
/// ```
/// use pageferry::StandbyOptions;
/// use std::time::Duration;
/// let options = StandbyOptions { behind: Duration::from_millis(200), ..StandbyOptions::default() };
/// assert!(!options.hold && options.behind_bytes.is_none());
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StandbyOptions {
    /// How far behind the source it may be, to the millisecond and at least one. A point is made twice in this time, for which the program pauses as long as it takes to copy what it wrote since the
    /// last look. Default 1 s.
    pub behind: Duration,
    /// How many bytes, in whole pages written, it may be behind. Default no limit.
    pub behind_bytes: Option<u64>,
    /// What happens when the path does not carry what the program writes: it waits at its gate until the standby is near enough, or, which is the default, runs on while the standby
    /// falls behind, as [`MoveEvent::Kept`](super::MoveEvent::Kept) says. A standby that does not answer holds it no longer than the source's pause limit: then the standby is given up.
    pub hold: bool,
}

impl Default for StandbyOptions {
    fn default() -> StandbyOptions {
        StandbyOptions { behind: Duration::from_secs(1), behind_bytes: None, hold: false }
    }
}

impl From<StandbyOptions> for Strategy {
    fn from(options: StandbyOptions) -> Strategy {
        Strategy {
            kind: MoveKind::Standby,
            time_limit: Some(options.behind),
            at_limit: if options.hold { AtLimit::Force } else { AtLimit::Cancel },
            behind_bytes: options.behind_bytes.map(|bytes| bytes.max(1)),
            ..Strategy::pre_copy()
        }
    }
}

impl From<Strategy> for Plan {
    fn from(strategy: Strategy) -> Plan {
        let ms = |limit: Duration| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX).max(1);
        Plan {
            kind: strategy.kind,
            at_limit: match strategy.at_limit {
                AtLimit::Cancel => wire::AtLimit::Cancel,
                AtLimit::Force => wire::AtLimit::Force,
            },
            round_limit: strategy.round_limit,
            downtime_limit_us: u32::try_from(strategy.downtime_limit.as_micros()).unwrap_or(u32::MAX),
            time_limit_ms: strategy.time_limit.map_or(0, ms),
            behind_bytes: strategy.behind_bytes.unwrap_or(0),
        }
    }
}

impl From<Plan> for Strategy {
    fn from(plan: Plan) -> Strategy {
        Strategy {
            kind: plan.kind,
            downtime_limit: Duration::from_micros(plan.downtime_limit_us.into()),
            round_limit: plan.round_limit,
            time_limit: (plan.time_limit_ms > 0).then(|| Duration::from_millis(plan.time_limit_ms)),
            at_limit: match plan.at_limit {
                wire::AtLimit::Cancel => AtLimit::Cancel,
                wire::AtLimit::Force => AtLimit::Force,
            },
            behind_bytes: (plan.behind_bytes > 0).then_some(plan.behind_bytes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_travels_is_what_was_said() {
        let long = Strategy::pre_copy().time_limit(Duration::from_secs(90)).downtime_limit(Duration::ZERO);
        for strategy in [Strategy::post_copy(), long, Strategy::hybrid().round_limit(3).at_limit(AtLimit::Force)] {
            assert_eq!(Strategy::from(Plan::from(strategy)), strategy);
        }
        let standby = Strategy::from(StandbyOptions { behind_bytes: Some(0), hold: true, ..StandbyOptions::default() });
        assert_eq!(Strategy::from(Plan::from(standby)), standby);
        assert_eq!(standby.behind(), Some(Behind { time: Duration::from_secs(1), bytes: Some(1), hold: true }));
        assert_eq!(Strategy::hybrid().behind(), None);
        // No limit is no limit of zero.
        let none = Strategy::hybrid().time_limit(Duration::ZERO);
        assert_eq!(Strategy::from(Plan::from(none)).time_limit, Some(Duration::from_millis(1)));
    }
}
