//! What the bank's customers were told: the numbers of the transfers that a host said it had committed, and when.
//!
//! Role: the record outside the database that the database is compared with in the end. Neighbours: `process` writes it down as the hosts say it; `report` compares. Invariants: a
//! number is written once a host said it, in the order in which that host did; two hosts' words may pass each other on their ways, so only each tenure is in order.

use std::time::{Duration, Instant};

/// A host had the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tenure {
    first: i64,
    last: i64,
}

/// A part of the run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Phase {
    pub name: String,
    pub took: Duration,
    pub commits: u64,
    /// Between two commits one after the other, the second of which is in this phase.
    pub longest_gap: Duration,
}

/// See the module header.
#[derive(Debug, Default)]
pub struct Journal {
    tenures: Vec<Tenure>,
    /// Of each host, its tenure that goes on.
    current: [Option<usize>; 2],
    disorder: Option<String>,
    previous: Option<Instant>,
    phases: Vec<Phase>,
    phase_begun: Option<Instant>,
}

impl Journal {
    /// A host says that it committed this transfer.
    pub fn committed(&mut self, host: usize, number: i64, now: Instant) {
        match self.current[host] {
            None => {
                self.current[host] = Some(self.tenures.len());
                self.tenures.push(Tenure { first: number, last: number });
            }
            Some(tenure) => {
                let last = &mut self.tenures[tenure].last;
                if number != *last + 1 {
                    self.disorder.get_or_insert_with(|| format!("a host committed {number} after {last}"));
                }
                *last = number;
            }
        }
        let gap = self.previous.map_or(Duration::ZERO, |previous| now.saturating_duration_since(previous));
        self.previous = Some(now);
        if let Some(phase) = self.phases.last_mut() {
            phase.commits += 1;
            phase.longest_gap = phase.longest_gap.max(gap);
        }
    }

    /// The program has left this host: what it commits next begins anew.
    pub fn left(&mut self, host: usize) {
        self.current[host] = None;
    }

    /// Ends the phase that goes on, and begins another.
    pub fn begin(&mut self, name: String, now: Instant) {
        self.end(now);
        self.phase_begun = Some(now);
        self.phases.push(Phase { name, took: Duration::ZERO, commits: 0, longest_gap: Duration::ZERO });
    }

    /// Ends the phase that goes on.
    pub fn end(&mut self, now: Instant) {
        if let (Some(begun), Some(phase)) = (self.phase_begun.take(), self.phases.last_mut()) {
            phase.took = now.saturating_duration_since(begun);
        }
    }

    pub fn phases(&self) -> &[Phase] {
        &self.phases
    }

    /// How many transfers customers were told of.
    ///
    /// # Errors
    /// What is wrong with the numbers: they must be 1, 2, 3 and so on, over all tenures.
    pub fn acknowledged(&self) -> Result<i64, String> {
        if let Some(disorder) = &self.disorder {
            return Err(disorder.clone());
        }
        self.tenures.iter().try_fold(0, |last, tenure| match tenure.first - 1 {
            before if before == last => Ok(tenure.last),
            before if before < last => Err(format!("{} was committed again by the next host, after {last}", tenure.first)),
            _ => Err(format!("the next host went on with {}, after {last}", tenure.first)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal(tenures: &[&[i64]]) -> Journal {
        let mut journal = Journal::default();
        for (at, numbers) in tenures.iter().enumerate() {
            numbers.iter().for_each(|number| journal.committed(at % 2, *number, Instant::now()));
            journal.left(at % 2);
        }
        journal
    }

    #[test]
    fn numbers_without_a_gap_over_all_tenures_are_in_order_and_others_are_not() {
        assert_eq!(journal(&[]).acknowledged(), Ok(0));
        assert_eq!(journal(&[&[1, 2], &[3], &[4, 5]]).acknowledged(), Ok(5));
        for wrong in [&[&[2, 3][..]][..], &[&[1, 3]], &[&[1, 1]], &[&[1, 2], &[2, 3]], &[&[1, 2], &[4]], &[&[1], &[2], &[1]]] {
            assert!(journal(wrong).acknowledged().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn words_of_two_hosts_may_pass_each_other() {
        let mut journal = Journal::default();
        for (host, number) in [(0, 1), (0, 2), (1, 4), (0, 3), (1, 5)] {
            journal.committed(host, number, Instant::now());
        }
        assert_eq!(journal.acknowledged(), Ok(5));
    }

    #[test]
    fn a_gap_counts_in_the_phase_in_which_it_ends() {
        let (mut journal, begun) = (Journal::default(), Instant::now());
        let at = |ms| begun + Duration::from_millis(ms);
        journal.begin("before".to_owned(), at(0));
        [(1, 10), (2, 15)].into_iter().for_each(|(number, ms)| journal.committed(0, number, at(ms)));
        journal.begin("moving".to_owned(), at(20));
        [(3, 65), (4, 66)].into_iter().for_each(|(number, ms)| journal.committed(1, number, at(ms)));
        journal.end(at(120));
        journal.committed(1, 5, at(130));
        let ms = Duration::from_millis;
        let expected = [("before", ms(20), 2, ms(5)), ("moving", ms(100), 3, ms(64))];
        let found: Vec<_> =
            journal.phases().iter().map(|phase| (phase.name.as_str(), phase.took, phase.commits, phase.longest_gap)).collect();
        assert_eq!(found, expected);
    }
}
