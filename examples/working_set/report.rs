//! What the starts came to, for a person.
//!
//! Role: the times drawn beside each other, and the proof. Neighbours: `host` fills it in, `main` prints it and takes the exit code from it. Invariants: bars begin at zero and share one scale;
//! the proof holds only if every start read the same bytes as the host has, and the record is what was touched.

use crate::{
    host::name,
    start::{How, Started},
    terminal::time,
};
use indicatif::HumanCount;
use std::{fmt, time::Duration};

/// A whole run.
pub struct Report {
    pub size_bytes: u64,
    pub touch_pages: u64,
    pub rtt: Duration,
    /// In the order in which they were made.
    pub starts: Vec<(How, Started)>,
    /// What the program computes of the host's own image.
    pub expected: u64,
    /// Of that image.
    pub digest: String,
}

/// Columns of the longest bar.
const BAR: f64 = 48.0;

impl Report {
    /// Whether every byte came in each start, and the record survived.
    pub fn holds(&self) -> bool {
        !self.starts.is_empty() && self.starts.iter().all(|(_, started)| self.is_right(started))
    }

    fn is_right(&self, started: &Started) -> bool {
        started.result == self.expected && started.digest == self.digest && self.has_set(started)
    }

    fn has_set(&self, started: &Started) -> bool {
        started.is_set_right && started.recorded_pages == self.touch_pages
    }

    fn took(&self, how: How) -> Option<Duration> {
        self.starts.iter().find(|(of, _)| *of == how).map(|(_, started)| started.took)
    }
}

/// A bar as long as `share` of the longest, in eighths of a column; never nothing.
fn bar(share: f64) -> String {
    let eighths = (share * BAR * 8.0).round().max(1.0);
    let full = (eighths / 8.0).floor();
    let rest = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "both are small and not negative")]
    let (full, eighths) = (full as usize, (eighths - full * 8.0) as usize);
    let mut bar = "█".repeat(full);
    bar.extend(rest.get(eighths).filter(|_| eighths > 0));
    bar
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: u64| bytes >> 20;
        writeln!(f, "WORKING SET")?;
        writeln!(f, "  image           {} MiB, served by another process, {} away", mib(self.size_bytes), time(self.rtt))?;
        let touched = mib(self.touch_pages * crate::program::PAGE_BYTES);
        writeln!(
            f,
            "  the program     touches {} pages of it, {touched} MiB, scattered, always in the same order",
            HumanCount(self.touch_pages)
        )?;
        writeln!(f, "\nSTARTS, from opening the mount until the program has touched them all")?;
        let longest = self.starts.iter().map(|(_, started)| started.took).max().unwrap_or_default().as_secs_f64();
        for (how, started) in &self.starts {
            let share = started.took.as_secs_f64() / longest.max(f64::MIN_POSITIVE);
            writeln!(f, "  {:<8} {:>8}  {}", name(*how), time(started.took), bar(share))?;
        }
        for (how, started) in &self.starts {
            let what = match how {
                How::Record => "each page when it is touched, and that is recorded",
                How::Plain => "all pages in the background, by their number",
                How::Replay => "first the pages of the record, in its order",
            };
            let here = mib(started.resident_pages * crate::program::PAGE_BYTES);
            let half = started.tenths.get(4).copied().map_or_else(|| "?".to_owned(), time);
            writeln!(
                f,
                "  {:<8} {what}; {} touches waited; half was done after {half}, and by the end {here} MiB were here",
                name(*how),
                HumanCount(started.faults)
            )?;
        }
        if let (Some(record), Some(plain), Some(replay)) = (self.took(How::Record), self.took(How::Plain), self.took(How::Replay)) {
            let times = |slow: Duration| slow.as_secs_f64() / replay.as_secs_f64().max(f64::MIN_POSITIVE);
            writeln!(
                f,
                "  replayed it is {:.1} times as fast as on demand, and {:.1} times as all by number",
                times(record),
                times(plain)
            )?;
        }
        writeln!(f, "\nPROOF")?;
        let word = |is_right: bool| if is_right { "equal" } else { "NOT EQUAL" };
        writeln!(f, "  at the host     computed {:016x}, BLAKE3 {}", self.expected, self.digest)?;
        for (how, started) in &self.starts {
            let (result, digest) = (word(started.result == self.expected), word(started.digest == self.digest));
            let set = if self.has_set(started) { "is what was touched" } else { "IS NOT WHAT WAS TOUCHED" };
            writeln!(
                f,
                "  {:<15} computed {result}, BLAKE3 {digest}; the record of {} pages {set}",
                name(*how),
                HumanCount(started.recorded_pages)
            )?;
        }
        let holds =
            if self.holds() { "HOLDS: every byte came in each start, and the record survived between them" } else { "FAILS" };
        writeln!(f, "  the proof       {holds}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let started = |took_ms| Started {
            took: Duration::from_millis(took_ms),
            tenths: vec![Duration::from_millis(took_ms / 2); 10],
            faults: 3,
            resident_pages: 512,
            recorded_pages: 256,
            is_set_right: true,
            result: 7,
            digest: "d".to_owned(),
        };
        let starts = vec![(How::Record, started(2000)), (How::Plain, started(500)), (How::Replay, started(50))];
        Report {
            size_bytes: 32 << 20,
            touch_pages: 256,
            rtt: Duration::from_millis(10),
            starts,
            expected: 7,
            digest: "d".to_owned(),
        }
    }

    #[test]
    fn one_wrong_thing_in_one_start_fails_the_proof() {
        assert!(report().holds());
        let wrongs: [fn(&mut Started); 4] =
            [|s| s.result = 8, |s| s.digest.push('e'), |s| s.is_set_right = false, |s| s.recorded_pages = 255];
        for wrong in wrongs {
            for at in 0..3 {
                let mut report = report();
                wrong(&mut report.starts[at].1);
                assert!(!report.holds() && report.to_string().contains("the proof       FAILS"));
            }
        }
        assert!(!Report { starts: vec![], ..report() }.holds());
    }

    #[test]
    fn bars_are_as_long_as_their_times() {
        let text = report().to_string();
        let columns = |how: &str| {
            let line = text.lines().find(|line| line.starts_with(&format!("  {how}"))).unwrap();
            line.chars().filter(|c| *c == '█').count()
        };
        assert_eq!(["record", "plain", "replay"].map(columns), [48, 12, 1]);
        assert!(text.contains("replayed it is 40.0 times as fast as on demand, and 10.0 times as all by number"), "{text}");
    }

    #[test]
    fn what_a_start_says_is_what_the_host_reads() {
        let (_, said) = report().starts.remove(0);
        let read = Started::from_json(&said.to_json().to_string()).unwrap();
        assert_eq!(format!("{read:?}"), format!("{said:?}"));
        assert!(Started::from_json("").is_none() && Started::from_json("{}").is_none());
    }
}
