//! What the user sees at the end: figures with their units, and whether the game arrived whole.
//!
//! Role: judges and prints. Neighbours: `source` prints a [`Left`], `destination` an [`Arrived`]. Invariants: plain text; a proof is claimed only where both values are shown.

use crate::{
    proof::Proof,
    terminal::time,
    ticks::{Log, PARTS, PERIOD, bar},
};
use indicatif::HumanCount;
use pageferry::Departed;
use std::{fmt, time::Duration};

/// Ticks in the strip before the handover and after it, so that the report fits a terminal of 100.
const STRIP: (usize, usize) = (20, 70);

/// How the game left, as the source saw it.
pub struct Left {
    pub departed: Departed,
    /// Rounds of copying before the handover.
    pub rounds: u32,
}

/// Page faults that waited for a page, and how long.
#[derive(Debug, Default)]
pub struct Faults {
    pub count: u64,
    pub p50: Duration,
    pub p99: Duration,
    pub max: Duration,
}

/// How the game arrived, and what has become of it.
pub struct Arrived {
    pub strategy: &'static str,
    pub pages: u64,
    pub missing_at_handover: u64,
    pub until_last_page: Duration,
    pub faults: Faults,
    pub log: Log,
    pub proof: Proof,
}

type Rows = Vec<(&'static str, String)>;

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Departed { downtime, total, .. } = &self.departed;
        let downtime = match *downtime {
            Duration::ZERO => "not measured: the destination's word that it runs was lost".to_owned(),
            downtime => format!("{}, from the game's pause to the destination's word that it runs", time(downtime)),
        };
        let rounds = match self.rounds {
            0 => "no page before the handover".to_owned(),
            rounds => format!("{rounds} {} before the handover", if rounds == 1 { "round" } else { "rounds" }),
        };
        let total = format!("{}, from the destination's asking to its having every page", time(*total));
        section(f, "SOURCE", vec![("downtime", downtime), ("copied", rounds), ("in all", total)])
    }
}

impl Arrived {
    fn arrival(&self) -> Rows {
        let gap = match self.log.gap() {
            None => "not measured: the destination made no tick".to_owned(),
            Some(gap) => format!("{}, both done, by the clock of one machine; as a rule {}", time(gap), time(PERIOD)),
        };
        let Faults { count, p50, p99, max } = self.faults;
        let waits = format!("each waited p50 {}, p99 {}, max {}", time(p50), time(p99), time(max));
        vec![
            ("strategy", self.strategy.to_owned()),
            ("last tick to first", gap),
            ("missing at handover", format!("{} of {} pages", HumanCount(self.missing_at_handover), HumanCount(self.pages))),
            ("until the last page", format!("{} after the handover", time(self.until_last_page))),
            ("page faults", if count == 0 { "none".to_owned() } else { format!("{}, {waits}", HumanCount(count)) }),
        ]
    }

    fn ticks(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<24}{:>9}{:>12}{:>12}{:>12}{:>10}{:>14}", "TICKS", "made", "p50", "p99", "max", "late", "latest by")?;
        let names = ["before, at the source", "while pages arrive", "after the last page"];
        for (name, part) in names.into_iter().zip(PARTS) {
            let ticks = self.log.part(part);
            let [p50, p99, max] = [0.5, 0.99, 1.0].map(|q| time(ticks.quantile(q)));
            let [count, late] = [ticks.count, ticks.late].map(|ticks| HumanCount(ticks).to_string());
            let lag = time(ticks.worst_lag());
            writeln!(f, "  {name:<22}{count:>9}{p50:>12}{p99:>12}{max:>12}{late:>10}{lag:>14}")?;
        }
        writeln!(f, "  late: done more than 16.7 ms after it was due; a full bar took as long, ! longer")?;
        let (before, after) = self.log.around(STRIP.0, STRIP.1);
        let bars =
            |took: Vec<u32>| took.into_iter().map(|took| if u128::from(took) > PERIOD.as_micros() { '!' } else { bar(took) });
        let (before, after): (String, String) = (bars(before).collect(), bars(after).collect());
        writeln!(f, "  {before}|{after}")?;
        writeln!(f, "  {:1$}^ the handover", "", before.chars().count())
    }

    fn proof(&self) -> Rows {
        let Proof { ticks, checksums, digests } = &self.proof;
        let verdict = if self.proof.holds() {
            "HOLDS: every tick was made once, and all bytes of the region are equal"
        } else {
            "FAILS: the game at the destination is not the one that a replay gives"
        };
        let equal = |equal| if equal { "equal" } else { "NOT EQUAL" };
        vec![
            ("ticks in the region", format!("{}, played again from the seed on plain memory", HumanCount(*ticks))),
            ("checksum expected", format!("{:016x}", checksums[0])),
            ("checksum found", format!("{:016x}, {}", checksums[1], equal(checksums[0] == checksums[1]))),
            ("BLAKE3 expected", digests[0].clone()),
            ("BLAKE3 found", format!("{}, {}", digests[1], equal(digests[0] == digests[1]))),
            ("the proof", verdict.to_owned()),
        ]
    }
}

impl fmt::Display for Arrived {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        section(f, "DESTINATION", self.arrival())?;
        self.ticks(f)?;
        section(f, "PROOF", self.proof())
    }
}

fn section(f: &mut fmt::Formatter<'_>, title: &str, rows: Rows) -> fmt::Result {
    writeln!(f, "\n{title}")?;
    rows.iter().try_for_each(|(name, value)| writeln!(f, "  {name:<22}{value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ticks::Part;
    use std::time::Instant;

    #[test]
    fn a_report_shows_what_was_met_and_claims_no_proof_that_fails() {
        let mut log = Log::default();
        let (due, ms) = (Instant::now(), Duration::from_millis);
        (0..30).for_each(|_| log.record(Part::Before, due, due, due + ms(1)));
        log.record(Part::During, due, due, due + ms(40));
        (0..100).for_each(|_| log.record(Part::After, due, due, due + ms(3)));
        let proof = Proof { ticks: 131, checksums: [1, 1], digests: ["a".to_owned(), "a".to_owned()] };
        let until_last_page = ms(120);
        let faults = Faults::default();
        let mut arrived = Arrived { strategy: "hybrid", pages: 4160, missing_at_handover: 7, until_last_page, faults, log, proof };
        let text = arrived.to_string();
        for shown in ["7 of 4,160 pages", "the proof             HOLDS: ", "▁▁▁|!▂▂", "page faults           none"] {
            assert!(text.contains(shown), "{shown:?} is missing: {text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
        arrived.proof.digests[1] = "b".to_owned();
        let text = arrived.to_string();
        assert!(text.contains("the proof             FAILS: ") && text.contains("b, NOT EQUAL"), "{text}");
    }

    #[test]
    fn times_have_three_digits() {
        let ns = |ns| time(Duration::from_nanos(ns));
        assert_eq!([ns(1234), ns(56_789_000), ns(7_000_000_000)], ["1.23 us", "56.8 ms", "7.00 s"]);
    }
}
