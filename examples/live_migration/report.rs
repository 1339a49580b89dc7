//! What the user sees at the end: a table of figures with their units, and whether the program arrived whole.
//!
//! Role: judges and prints. Neighbours: `source` fills a [`Report`]. Invariants: plain text on standard output; a proof is claimed only
//! where both values are shown.

use crate::{
    index::Header,
    ledger::Totals,
    load::{Observed, Phase},
    messages::Outcome,
    terminal::time,
    timeline::{SLOT, slot_of},
};
use indicatif::HumanCount;
use std::{fmt, net::SocketAddr, time::Duration};

/// Columns of the timeline, so that the report fits a terminal of 100.
const COLUMNS: usize = 90;

/// What the source says that the destination must have.
#[derive(Debug, PartialEq, Eq)]
pub struct Proof {
    /// What the ledger added up to when the program left.
    pub totals_at_handover: Totals,
    /// What it must add up to after the destination's operations.
    pub totals: Totals,
    /// BLAKE3 of the source's copy, frozen at the handover, with the destination's updates made on it, in hexadecimal.
    pub digest: String,
}

/// Everything that is known at the end.
#[derive(Debug)]
pub struct Report {
    pub size_bytes: u64,
    pub index: Header,
    pub built_in: Duration,
    /// Of the source and the destination.
    pub pids: (u32, u32),
    /// Where the source offered the program.
    pub address: SocketAddr,
    /// The source's load up to the handover, one phase.
    pub source: Observed,
    /// As the source measured it; `None` if it did not hear that the program ran.
    pub downtime: Option<Duration>,
    /// The destination's load has the phases [`DESTINATION_PHASES`].
    pub destination: Outcome,
    pub expected: Proof,
}

const SOURCE_PHASE: &str = "before, at the source";
const DESTINATION_PHASES: [&str; 2] = ["while pages arrive", "after the last page"];

type Rows = Vec<(&'static str, String)>;

impl Report {
    /// Whether nothing was lost: the destination has every operation once and every byte that the source says it must have.
    pub fn is_proved(&self) -> bool {
        let Proof { totals, digest, .. } = &self.expected;
        *totals == self.destination.totals && *digest == self.destination.digest
    }

    /// From the last answer of the source to the first of the destination.
    fn silence(&self) -> Option<(Duration, Duration)> {
        Some((self.source.answered?.1, self.destination.observed.answered?.0))
    }

    fn index(&self) -> Rows {
        let index = &self.index;
        let used_bytes = index.used_bytes();
        let other_bytes = used_bytes.saturating_sub(index.text_bytes);
        vec![
            ("region", format!("{}, {} used ({})", mib(self.size_bytes), mib(used_bytes), percent(used_bytes, self.size_bytes))),
            ("content", format!("{} text, {} table, words and postings", mib(index.text_bytes), mib(other_bytes))),
            ("", format!("{} documents, {} words, {} postings", count(index.documents), count(index.words), count(index.postings))),
            ("built in", format!("{:.1} s", self.built_in.as_secs_f64())),
        ]
    }

    fn migration(&self) -> Rows {
        let arrival = &self.destination.arrival;
        let downtime = match self.downtime {
            None => "not measured: the destination's word that it runs was lost".to_owned(),
            Some(downtime) => format!("{}, from the last thread's pause to the destination's word that it runs", time(downtime)),
        };
        let gap = match self.silence() {
            None => "none: one end gave no answer".to_owned(),
            Some((last, first)) => {
                format!("{}, the destination's first query and its page faults included", time(first.saturating_sub(last)))
            }
        };
        let pages = |pages, how| format!("{:>9} {how}", count(pages));
        let mut rows = vec![
            ("ends", format!("process {} to process {}, QUIC at {}", self.pids.0, self.pids.1, self.address)),
            ("downtime", downtime),
            ("last answer to first", gap),
            ("until the last page", format!("{} after the handover", time(arrival.until_last_page))),
            ("moved", format!("{} of pages at {}", mib(arrival.moved_bytes), rate(arrival.moved_bytes, arrival.until_last_page))),
            ("pages by cause", pages(arrival.pages_demand, "touched by a query, which waited for it")),
            ("", pages(arrival.pages_around, "beside a touched one")),
            ("", pages(arrival.pages_pull, "pulled in the background")),
            ("", pages(arrival.pages_zero, "all zeros, nothing to send")),
            (
                "page faults",
                format!(
                    "{}, each waited p50 {}, p99 {}, max {}",
                    count(arrival.faults),
                    time(arrival.fault_p50),
                    time(arrival.fault_p99),
                    time(arrival.fault_max)
                ),
            ),
        ];
        let sample = self.destination.sample.lines().map(str::to_owned);
        rows.extend(["a query there now", ""].into_iter().zip(sample));
        rows
    }

    fn proof(&self) -> Rows {
        let (expected, found) = (&self.expected, &self.destination);
        let totals = |totals: Totals| format!("{} queries of {} words", count(totals.operations), count(totals.lookups));
        let verdict = if self.is_proved() {
            "HOLDS: every query is counted once, and all bytes of the region are equal"
        } else {
            "FAILS: the destination does not hold what the source says it must"
        };
        vec![
            ("counted at handover", totals(expected.totals_at_handover)),
            ("counters expected", totals(expected.totals)),
            ("counters found", format!("{}, {}", totals(found.totals), equal(expected.totals == found.totals))),
            ("BLAKE3 expected", expected.digest.clone()),
            ("BLAKE3 found", format!("{}, {}", found.digest, equal(expected.digest == found.digest))),
            ("the proof", verdict.to_owned()),
        ]
    }

    fn queries(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<24}{:>12}{:>14}{:>12}{:>12}{:>12}", "QUERIES", "answered", "a second", "p50", "p99", "max")?;
        let source = std::iter::once(SOURCE_PHASE).zip(&self.source.phases);
        for (name, phase) in source.chain(DESTINATION_PHASES.into_iter().zip(&self.destination.observed.phases)) {
            let Phase { operations, p50, p99, max, .. } = *phase;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate to be read")]
            let per_second = phase.per_second() as u64;
            let (operations, per_second) = (count(operations), count(per_second));
            writeln!(f, "  {name:<22}{operations:>12}{per_second:>14}{:>12}{:>12}{:>12}", time(p50), time(p99), time(max))?;
        }
        Ok(())
    }

    fn timeline(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut timeline = self.source.timeline.clone();
        timeline.merge(&self.destination.observed.timeline);
        let handover = self.silence().map_or(Duration::ZERO, |(last, _)| last);
        let last_page = handover + self.downtime.unwrap_or_default() + self.destination.arrival.until_last_page;
        #[allow(clippy::cast_precision_loss, reason = "figures to be read")]
        let seconds = |slots: usize| slots as f64 * SLOT.as_secs_f64();
        let (line, full) = timeline.sparkline(COLUMNS);
        writeln!(f, "\nTIMELINE of {:.1} s; a full bar is {} queries a second", seconds(timeline.slots.len()), count(full))?;
        writeln!(f, "  {line}")?;
        for (what, when) in [("the handover", handover), ("the last page", last_page)] {
            writeln!(f, "  {:1$}^ {what}, at {2:.1} s", "", timeline.column_of(when, COLUMNS), seconds(slot_of(when)))?;
        }
        Ok(())
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let section = |f: &mut fmt::Formatter<'_>, title: &str, rows: Rows| {
            writeln!(f, "\n{title}")?;
            rows.iter().try_for_each(|(name, value)| writeln!(f, "  {name:<22}{value}"))
        };
        section(f, "INDEX", self.index())?;
        section(f, "MIGRATION", self.migration())?;
        self.queries(f)?;
        self.timeline(f)?;
        section(f, "PROOF", self.proof())
    }
}

fn equal(equal: bool) -> &'static str {
    if equal { "equal" } else { "NOT EQUAL" }
}

fn count(number: u64) -> String {
    HumanCount(number).to_string()
}

#[allow(clippy::cast_precision_loss, reason = "figures to be read")]
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[allow(clippy::cast_precision_loss, reason = "figures to be read")]
fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64)
}

#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "figures to be read")]
fn rate(bytes: u64, time: Duration) -> String {
    if time.is_zero() { "no rate".to_owned() } else { format!("{}/s", mib((bytes as f64 / time.as_secs_f64()) as u64)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{messages::Arrival, timeline::Timeline};

    fn report() -> Report {
        let ms = Duration::from_millis;
        let phase = Phase { duration: ms(200), operations: 2000, p50: Duration::from_nanos(1500), p99: ms(2), max: ms(30) };
        let observed = |slots: &[u64], from, to| Observed {
            states: Vec::new(),
            phases: vec![phase; 2],
            timeline: Timeline { slots: slots.to_vec() },
            answered: Some((ms(from), ms(to))),
        };
        let totals = Totals { operations: 375, lookups: 500 };
        Report {
            size_bytes: 64 << 20,
            index: Header { heap_end: 8 << 20, text_bytes: 40 << 20, documents: 1234, ..Header::default() },
            built_in: ms(1500),
            pids: (12, 34),
            address: "127.0.0.1:4433".parse().unwrap(),
            source: observed(&[100, 100, 50], 1, 250),
            downtime: Some(Duration::from_micros(4321)),
            destination: Outcome {
                observed: observed(&[0, 0, 0, 25, 100], 310, 500),
                arrival: Arrival { moved_bytes: 50_000_000, until_last_page: ms(100), pages_pull: 12_207, ..Arrival::default() },
                totals,
                digest: "abc".to_owned(),
                sample: "an answer\nand its text".to_owned(),
            },
            expected: Proof { totals_at_handover: Totals { operations: 250, lookups: 375 }, totals, digest: "abc".to_owned() },
        }
    }

    #[test]
    fn the_report_shows_each_figure_with_its_unit_and_marks_the_handover() {
        let text = report().to_string();
        for expected in [
            "region                64.0 MiB, 64.0 MiB used (100.0 %)",
            "1,234 documents",
            "process 12 to process 34, QUIC at 127.0.0.1:4433",
            "an answer\n                        and its text\n",
            "downtime              4.32 ms, from the last thread's pause",
            "last answer to first  60.0 ms, the destination",
            "moved                 47.7 MiB of pages at 476.8 MiB/s",
            "   12,207 pulled in the background",
            "counters found        375 queries of 500 words, equal",
            "BLAKE3 found          abc, equal",
            "the proof             HOLDS: ",
            "before, at the source        2,000        10,000     1.50 us     2.00 ms     30.0 ms",
            "TIMELINE of 0.5 s; a full bar is 1,000 queries a second\n  ██▄▂█\n",
            "\n    ^ the handover, at 0.2 s\n     ^ the last page, at 0.3 s\n",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_proof_that_fails_is_said_loudly() {
        let (mut bytes_differ, mut counters_differ) = (report(), report());
        bytes_differ.expected.digest = "abd".to_owned();
        counters_differ.destination.totals.lookups += 1;
        for (report, shown) in [(bytes_differ, "abc, NOT EQUAL"), (counters_differ, "of 501 words, NOT EQUAL")] {
            let text = report.to_string();
            assert!(!report.is_proved() && text.contains(shown) && text.contains("the proof             FAILS: "), "{text}");
        }
    }

    #[test]
    fn what_was_not_measured_is_not_shown_as_zero() {
        let mut report = report();
        (report.downtime, report.destination.observed.answered) = (None, None);
        let text = report.to_string();
        assert!(text.contains("downtime              not measured") && text.contains("one end gave no answer"), "{text}");
    }
}
