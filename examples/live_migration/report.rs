//! What the user sees: progress while it runs, and a table of figures with their units at the end.
//!
//! Role: the only module that prints. Neighbours: `main` fills a [`Report`]. Invariants: progress goes to standard error and is
//! drawn only on a terminal, else each step is a line; the report is plain text and claims a proof only where both values are
//! shown.

use crate::{destination::Outcome, index::Header, ledger::Totals, load::Observed, load::Phase, timeline::slot_of};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};
use pageferry::Region;
use std::{
    fmt,
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

/// Columns of the timeline, so that the report fits a terminal of 100.
const COLUMNS: usize = 90;

/// Shows the steps of the program.
pub struct Progress {
    drawn: bool,
}

/// One step, see [`Progress::begin`].
pub struct Step {
    name: &'static str,
    begun: Instant,
    bar: ProgressBar,
    drawn: bool,
}

impl Progress {
    /// Bars on a terminal, unless `quiet`.
    pub fn new(quiet: bool) -> Progress {
        Progress { drawn: !quiet && stderr().is_terminal() }
    }

    /// Begins a step that has `bytes` to do.
    pub fn begin(&self, name: &'static str, bytes: u64) -> Step {
        let target = if self.drawn { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(bytes), target).with_prefix(name);
        let template = "{prefix:24} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec} {msg}";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        Step { name, begun: Instant::now(), bar, drawn: self.drawn }
    }
}

impl Step {
    /// Bytes done so far.
    pub fn reached(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// How far a region has filled, and what its program has done meanwhile.
    pub fn arrived(&self, region: &Region, operations: u64) {
        let (residency, stats) = (region.residency(), region.stats());
        self.bar.set_message(format!(
            "({} of {} pages, {} faults, {operations} queries)",
            residency.resident, residency.pages, stats.faults
        ));
        self.bar.set_position((residency.pages - residency.missing()) * region.page_size().bytes());
    }

    pub fn done(self) {
        self.bar.finish_and_clear();
        if !self.drawn {
            eprintln!("{}: {} in {:.1} s", self.name, HumanBytes(self.bar.position()), self.begun.elapsed().as_secs_f64());
        }
    }
}

/// Everything that is known at the end.
#[derive(Debug)]
pub struct Report {
    pub size_bytes: u64,
    pub index: Header,
    pub built_in: Duration,
    /// The source's load up to the handover. Its phases are named [`SOURCE_PHASES`].
    pub source: Observed,
    /// What the source's ledger added up to when it was verified.
    pub source_totals: Totals,
    /// The destination's phases are named [`DESTINATION_PHASES`].
    pub destination: Outcome,
    /// BLAKE3 of the source's frozen copy with the destination's updates replayed, in hexadecimal.
    pub expected_digest: String,
}

/// With one phase at the source, the first name alone applies.
pub const SOURCE_PHASES: [&str; 2] = ["before", "source, migrating"];
pub const DESTINATION_PHASES: [&str; 2] = ["during, pages arrive", "after"];

impl Report {
    /// Whether nothing was lost: the region at the destination is what the source says it must be, and the states continue the
    /// source's.
    pub fn is_proved(&self) -> bool {
        self.expected_digest == self.destination.digest && self.destination.totals.operations >= self.source_totals.operations
    }

    /// From the last answer of the source to the first of the destination.
    fn silence(&self) -> Option<(Duration, Duration)> {
        Some((self.source.answered?.1, self.destination.observed.answered?.0))
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let (index, arrival, to) = (&self.index, &self.destination.arrival, &self.destination);
        let used_bytes = index.used_bytes();
        let other_bytes = used_bytes.saturating_sub(index.text_bytes);
        let gap = self
            .silence()
            .map_or_else(|| "none: one end gave no answer".to_owned(), |(last, first)| time(first.saturating_sub(last)));
        let equal = if self.is_proved() { "equal" } else { "NOT EQUAL" };
        vec![
            ("INDEX", String::new()),
            ("region", format!("{}, {} used ({})", mib(self.size_bytes), mib(used_bytes), percent(used_bytes, self.size_bytes))),
            ("content", format!("{} text, {} table, words and postings", mib(index.text_bytes), mib(other_bytes))),
            ("", format!("{} documents, {} words, {} postings", count(index.documents), count(index.words), count(index.postings))),
            ("built in", format!("{:.1} s", self.built_in.as_secs_f64())),
            ("MIGRATION", String::new()),
            ("downtime", time(arrival.downtime)),
            ("last answer to first", gap),
            ("until the last page", time(arrival.until_last_page)),
            ("moved", format!("{} at {}", mib(arrival.moved_bytes), rate(arrival.moved_bytes, arrival.until_last_page))),
            (
                "faults",
                format!(
                    "{}, waited p50 {}, p99 {}, max {}",
                    count(arrival.faults),
                    time(arrival.fault_p50),
                    time(arrival.fault_p99),
                    time(arrival.fault_max)
                ),
            ),
            (
                "pages",
                format!(
                    "{} by faults, {} beside them, {} pulled; {} of these zero",
                    count(arrival.pages_demand),
                    count(arrival.pages_around),
                    count(arrival.pages_pull),
                    count(arrival.pages_zero)
                ),
            ),
            ("sample answer", to.sample.clone()),
            ("PROOF", String::new()),
            (
                "operations",
                format!("{} at the source, {} in the end", count(self.source_totals.operations), count(to.totals.operations)),
            ),
            (
                "lookups",
                format!(
                    "{} at the source, {} in the end: all counters verified",
                    count(self.source_totals.lookups),
                    count(to.totals.lookups)
                ),
            ),
            ("BLAKE3 expected", self.expected_digest.clone()),
            ("BLAKE3 found", format!("{} {equal}", to.digest)),
        ]
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.rows() {
            if value.is_empty() { writeln!(f, "\n{name}")? } else { writeln!(f, "  {name:<22}{value}")? }
        }
        writeln!(f, "\n{:<24}{:>12}{:>14}{:>12}{:>12}{:>12}", "QUERIES", "queries", "queries/s", "p50", "p99", "max")?;
        let source = SOURCE_PHASES.iter().zip(&self.source.phases);
        for (name, phase) in source.chain(DESTINATION_PHASES.iter().zip(&self.destination.observed.phases)) {
            let Phase { operations, p50, p99, max, .. } = *phase;
            #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate to be read")]
            let per_second = phase.per_second() as u64;
            let (operations, per_second) = (count(operations), count(per_second));
            writeln!(f, "  {name:<22}{operations:>12}{per_second:>14}{:>12}{:>12}{:>12}", time(p50), time(p99), time(max))?;
        }
        let mut timeline = self.source.timeline.clone();
        timeline.merge(&self.destination.observed.timeline);
        let handover = self.silence().map_or(Duration::ZERO, |(last, _)| last);
        let (line, mark) = timeline.sparkline(COLUMNS, handover);
        let most = timeline.slots.iter().max().copied().unwrap_or(0) * 10;
        writeln!(f, "\nTIMELINE of {:.1} s, at most {} queries/s", timeline.slots.len() as f64 / 10.0, count(most))?;
        writeln!(f, "  {line}\n  {:mark$}^ handover, at {:.1} s", "", slot_of(handover) as f64 / 10.0)
    }
}

fn count(number: u64) -> String {
    indicatif::HumanCount(number).to_string()
}

#[allow(clippy::cast_precision_loss, reason = "figures to be read")]
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[allow(clippy::cast_precision_loss, reason = "figures to be read")]
fn percent(part: u64, whole: u64) -> String {
    format!("{:.1} %", part as f64 * 100.0 / whole.max(1) as f64)
}

#[allow(clippy::cast_precision_loss, reason = "figures to be read")]
fn rate(bytes: u64, time: Duration) -> String {
    if time.is_zero() { "no rate".to_owned() } else { format!("{:.0} MB/s", bytes as f64 / 1e6 / time.as_secs_f64()) }
}

/// Three digits and the unit that fits.
fn time(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    let (value, unit) = if us < 1e3 {
        (us, "us")
    } else if us < 1e6 {
        (us / 1e3, "ms")
    } else {
        (us / 1e6, "s")
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{destination::Arrival, timeline::Timeline};

    fn report() -> Report {
        let ms = Duration::from_millis;
        let phase = Phase { duration: ms(200), operations: 2000, p50: Duration::from_nanos(1500), p99: ms(2), max: ms(30) };
        let observed = |slots: &[u64], from, to| Observed {
            states: Vec::new(),
            phases: vec![phase; 2],
            timeline: Timeline { slots: slots.to_vec() },
            answered: Some((ms(from), ms(to))),
        };
        Report {
            size_bytes: 64 << 20,
            index: Header { heap_end: 8 << 20, text_bytes: 40 << 20, documents: 1234, ..Header::default() },
            built_in: ms(1500),
            source: observed(&[100, 100, 50], 1, 250),
            source_totals: Totals { operations: 250, lookups: 375 },
            destination: Outcome {
                observed: observed(&[0, 0, 0, 25, 100], 310, 500),
                arrival: Arrival {
                    downtime: Duration::from_micros(4321),
                    moved_bytes: 50_000_000,
                    until_last_page: ms(100),
                    ..Arrival::default()
                },
                totals: Totals { operations: 375, lookups: 500 },
                digest: "abc".to_owned(),
                sample: "an answer".to_owned(),
            },
            expected_digest: "abc".to_owned(),
        }
    }

    #[test]
    fn the_report_shows_each_figure_with_its_unit_and_marks_the_handover() {
        let text = report().to_string();
        for expected in [
            "region                64.0 MiB, 64.0 MiB used (100.0 %)",
            "1,234 documents",
            "an answer",
            "downtime              4.32 ms",
            "last answer to first  60.0 ms",
            "50.0 MiB",
            "BLAKE3 found          abc equal",
            "before                       2,000        10,000     1.50 us     2.00 ms     30.0 ms",
            "TIMELINE of 0.5 s, at most 1,000 queries/s\n  ██▄▂█\n    ^ handover, at 0.2 s",
        ] {
            let expected = expected.replace("50.0 MiB", "47.7 MiB at 500 MB/s");
            assert!(text.contains(&expected), "{expected:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_proof_that_fails_is_said_loudly() {
        let mut report = report();
        report.expected_digest = "abd".to_owned();
        assert!(!report.is_proved());
        assert!(report.to_string().contains("abc NOT EQUAL"));
        report.destination.observed.answered = None;
        assert!(report.to_string().contains("one end gave no answer"));
    }
}
