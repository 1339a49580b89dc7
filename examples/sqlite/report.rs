//! What the user sees at the end: figures with their units, and whether every transaction arrived.
//!
//! Role: judges and prints. Neighbours: `run` fills a [`Report`]. Invariants: plain text on standard output; a proof is claimed only where both values are shown.

use crate::{
    Way,
    journal::Phase,
    messages::{Arrival, Departure},
    proof::Findings,
    terminal::time,
};
use clap::ValueEnum;
use indicatif::HumanCount;
use std::{fmt, time::Duration};

/// One move of the program.
#[derive(Clone, Debug)]
pub struct Move {
    pub name: String,
    pub arrival: Arrival,
    pub departure: Departure,
}

/// Everything that is known at the end.
#[derive(Clone, Debug)]
pub struct Report {
    pub way: Way,
    /// Of the hosts.
    pub pids: [u32; 2],
    pub region_bytes: u64,
    /// Of the database when the bank opened.
    pub file_bytes: u64,
    pub filled_in: Duration,
    pub phases: Vec<Phase>,
    pub moves: Vec<Move>,
    /// How many transfers customers were told of, or what is wrong with what they were told.
    pub acknowledged: Result<i64, String>,
    pub found: Findings,
}

const PAGE_BYTES: u64 = 4096;

impl Report {
    /// Whether no committed transaction was lost or repeated, and nothing else changed.
    pub fn is_proved(&self) -> bool {
        let told = *self.acknowledged.as_ref().unwrap_or(&0);
        told > 0 && told == self.found.entries && self.found.are_sound()
    }

    fn bank(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let strategy = self.way.to_possible_value().map_or_else(String::new, |way| way.get_name().to_owned());
        writeln!(f, "\nBANK")?;
        row(f, "database", &format!("{} in {} accounts", mib(self.file_bytes), count(self.found.accounts)))?;
        row(f, "region", &format!("{}, filled in {}", mib(self.region_bytes), time(self.filled_in)))?;
        row(f, "hosts", &format!("A is process {}, B process {}", self.pids[0], self.pids[1]))?;
        row(f, "strategy", &strategy)
    }

    fn transactions(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "\n{:<16}{:>14}{:>14}{:>14}{:>14}", "TRANSACTIONS", "took", "committed", "a second", "longest gap")?;
        for Phase { name, took, commits, longest_gap } in &self.phases {
            let per_second = u128::from(*commits) * 1000 / took.as_millis().max(1);
            let (took, commits, per_second) = (time(*took), count(*commits), count(per_second));
            writeln!(f, "  {name:<14}{took:>14}{commits:>14}{per_second:>14}{:>14}", time(*longest_gap))?;
        }
        Ok(())
    }

    fn moves(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let titles = ["downtime", "in all", "rounds", "came before", "came after", "faults", "p50", "max"];
        write!(f, "\n{:<9}", "MOVES")?;
        titles.iter().try_for_each(|title| write!(f, "{title:>12}"))?;
        writeln!(f)?;
        for Move { name, arrival, departure } in &self.moves {
            let sent_after = arrival.touched + arrival.beside + arrival.pushed;
            let before = arrival.file_pages.saturating_sub(sent_after);
            let downtime = if departure.downtime.is_zero() { "unknown".to_owned() } else { time(departure.downtime) };
            let columns = [
                downtime,
                time(departure.total),
                count(departure.rounds),
                mib(before * PAGE_BYTES),
                mib(sent_after * PAGE_BYTES),
                count(arrival.faults),
                time(arrival.fault_p50),
                time(arrival.fault_max),
            ];
            write!(f, "  {name:<7}")?;
            columns.iter().try_for_each(|column| write!(f, "{column:>12}"))?;
            writeln!(f)?;
        }
        Ok(())
    }

    fn proof(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Findings { integrity, entries, wrong_entries, accounts, wrong_balances, wrong_profiles, money, first_money } =
            &self.found;
        writeln!(f, "\nPROOF")?;
        let told = match &self.acknowledged {
            Ok(told) => format!("{} transfers, without a gap or a repetition", count(*told)),
            Err(disorder) => format!("NOT IN ORDER: {disorder}"),
        };
        row(f, "acknowledged", &told)?;
        row(f, "ledger", &format!("{} entries, {} wrong", count(*entries), count(*wrong_entries)))?;
        row(
            f,
            "accounts",
            &format!("{}: {} balances wrong, {} profiles wrong", count(*accounts), count(*wrong_balances), count(*wrong_profiles)),
        )?;
        row(f, "money", &format!("{} of {}", count(*money), count(*first_money)))?;
        row(f, "integrity_check", integrity)?;
        let verdict = if self.is_proved() {
            "HOLDS: every acknowledged transaction is in the database once, and nothing else changed"
        } else {
            "FAILS: the database is not what its customers were told"
        };
        row(f, "the proof", verdict)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bank(f)?;
        self.transactions(f)?;
        self.moves(f)?;
        self.proof(f)
    }
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, value: &str) -> fmt::Result {
    writeln!(f, "  {name:<16}{value}")
}

fn count(number: impl TryInto<u64>) -> String {
    number.try_into().map_or_else(|_| "less than none".to_owned(), |number| HumanCount(number).to_string())
}

#[allow(clippy::cast_precision_loss, reason = "figures to be read")]
fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let ms = Duration::from_millis;
        let phase = Phase { name: "at A".to_owned(), took: ms(2000), commits: 50_000, longest_gap: ms(3) };
        let arrival = Arrival { file_pages: 2304, touched: 10, beside: 20, pushed: 226, faults: 11, ..Arrival::default() };
        let departure = Departure { rounds: 3, downtime: Duration::from_micros(450), total: ms(1500) };
        let found = Findings {
            integrity: "ok".to_owned(),
            entries: 50_000,
            accounts: 7,
            money: 700,
            first_money: 700,
            ..Findings::default()
        };
        Report {
            way: Way::Hybrid,
            pids: [12, 34],
            region_bytes: 10 << 20,
            file_bytes: 8 << 20,
            filled_in: ms(150),
            phases: vec![phase],
            moves: vec![Move { name: "A to B".to_owned(), arrival, departure }],
            acknowledged: Ok(50_000),
            found,
        }
    }

    #[test]
    fn the_report_shows_each_figure_with_its_unit() {
        let text = report().to_string();
        for expected in [
            "database        8.0 MiB in 7 accounts",
            "strategy        hybrid",
            "at A                  2.00 s        50,000        25,000       3.00 ms",
            "A to B       450 us      1.50 s           3     8.0 MiB     1.0 MiB          11",
            "acknowledged    50,000 transfers, without",
            "ledger          50,000 entries, 0 wrong",
            "the proof       HOLDS: ",
        ] {
            assert!(text.contains(expected), "{expected:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_proof_that_fails_is_said_loudly() {
        let changes: [fn(&mut Report); 5] = [
            |report| report.acknowledged = Ok(50_001),
            |report| report.acknowledged = Err("a host committed 3 after 1".to_owned()),
            |report| report.found.integrity = "row missing".to_owned(),
            |report| report.found.money = 701,
            |report| report.found.wrong_profiles = 1,
        ];
        for change in changes {
            let mut report = report();
            change(&mut report);
            assert!(!report.is_proved() && report.to_string().contains("the proof       FAILS: "), "{report}");
        }
    }
}
