//! Counts every operation in the region, so that one lost or repeated shows.
//!
//! Role: what an operation writes, and the proof that nothing is missing. Neighbours: `load` records; `source` and `destination`
//! verify. Invariants: an operation is a pure function of its worker's seed and its number, so any host can compute what the
//! counters must say; they say it whenever all workers are between two operations.
//!
//! A slot: seed, operations, lookups (words asked for), checksum. Each lookup adds to its slot's checksum a mix of the operation's
//! number and the word's record, and 1 to the word's query counter.

use crate::{
    index::{Index, IndexError, MAX_WORKERS, Record},
    word::mix,
};
use std::{
    ops::Range,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};
use thiserror::Error;

/// All that a worker is, beside the region: what moves as the program's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WorkerState {
    /// Decides which words it asks for.
    pub seed: u64,
    /// The operation it makes next; all before are done.
    pub next_operation: u64,
}

/// The words that one operation asks for, as ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operation {
    pub first: u32,
    pub second: Option<u32>,
}

impl Operation {
    /// Operation `number` of the worker with this seed, on an index with `ranked` words (at least 1).
    ///
    /// Every octave of ranks (1, 2-3, 4-7, ...) is as likely as every other: Zipf's law with exponent 1 in steps, and in integers,
    /// so that two hosts never differ in a rounding. Every second operation asks for two words.
    pub fn of(seed: u64, number: u64, ranked: u32) -> Operation {
        let dice = mix(seed ^ mix(number));
        let rank = |dice: u64| {
            let octaves = u64::from(ranked.max(1).ilog2()) + 1;
            let start = 1 << (dice % octaves);
            let len = start.min(u64::from(ranked) + 1 - start);
            u32::try_from(start - 1 + (dice >> 8) % len).unwrap_or(0)
        };
        Operation { first: rank(dice & 0xffff_ffff), second: (dice >> 63 == 1).then(|| rank(mix(dice))) }
    }

    pub fn ranks(self) -> impl Iterator<Item = u32> {
        std::iter::once(self.first).chain(self.second)
    }
}

/// The counters contradict each other, or the workers' states.
#[derive(Debug, Error)]
pub enum LedgerError {
    #[error(
        "worker {worker}: the region says seed {seed} and {operations} operations, but its state, of another instant, {state:?}"
    )]
    State { worker: usize, state: WorkerState, seed: u64, operations: u64 },
    #[error("worker {worker}: {field} is {found}, its {operations} operations make {expected}")]
    Worker { worker: usize, field: &'static str, operations: u64, expected: u64, found: u64 },
    #[error("\"{word}\" was asked for {expected} times and counted {found}: {}", if found < expected { "lost" } else { "repeated" })]
    Word { word: String, expected: u64, found: u64 },
    #[error(transparent)]
    Index(#[from] IndexError),
}

/// What a correct ledger adds up to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    pub operations: u64,
    pub lookups: u64,
}

/// One worker's counters in the region.
#[derive(Clone, Copy)]
pub struct Slot<'r> {
    seed: &'r AtomicU64,
    operations: &'r AtomicU64,
    lookups: &'r AtomicU64,
    checksum: &'r AtomicU64,
}

impl<'r> Slot<'r> {
    /// The slot of a worker below [`MAX_WORKERS`].
    ///
    /// # Errors
    /// [`IndexError::Damaged`] for more.
    pub fn of(index: &Index<'r>, worker: usize) -> Result<Slot<'r>, IndexError> {
        match index.slot(worker)? {
            [seed, operations, lookups, checksum, ..] => Ok(Slot { seed, operations, lookups, checksum }),
            _ => Err(IndexError::Damaged { what: "a slot of the ledger", at: worker as u64 }),
        }
    }

    /// Says whose slot it is. Changes nothing where the seed is there already: at the destination.
    pub fn claim(&self, state: WorkerState) {
        self.seed.store(state.seed, Relaxed);
    }

    /// Writes what operation `number` writes. One worker has one slot, the words' counters are everybody's.
    ///
    /// # Errors
    /// [`IndexError::Damaged`]; the operation may then be half written.
    pub fn record(&self, index: &Index, number: u64, operation: Operation) -> Result<(), IndexError> {
        for rank in operation.ranks() {
            let record = index.at_rank(rank)?;
            index.queries(record)?.fetch_add(1, Relaxed);
            self.lookups.fetch_add(1, Relaxed);
            self.checksum.fetch_add(entry(number, record), Relaxed);
        }
        self.operations.fetch_add(1, Relaxed);
        Ok(())
    }
}

fn entry(number: u64, record: Record) -> u64 {
    mix(number << 32 ^ u64::from(record.0))
}

/// Makes the updates of a worker's operations without the queries: brings a frozen copy to where a running one is.
///
/// # Errors
/// As for [`Slot::record`].
pub fn replay(index: &Index, worker: usize, seed: u64, numbers: Range<u64>) -> Result<(), IndexError> {
    let slot = Slot::of(index, worker)?;
    for number in numbers {
        slot.record(index, number, Operation::of(seed, number, index.ranked()))?;
    }
    Ok(())
}

/// Recomputes every counter from the seeds and compares; then the words' counters also add up to the workers' lookups. The
/// workers must be between operations.
///
/// # Errors
/// The first contradiction.
pub fn verify(index: &Index, states: &[WorkerState]) -> Result<Totals, LedgerError> {
    let mut asked = vec![0u64; index.ranked() as usize];
    let mut totals = Totals::default();
    let idle = WorkerState { seed: 0, next_operation: 0 };
    for (worker, state) in states.iter().copied().chain(std::iter::repeat(idle)).take(MAX_WORKERS.max(states.len())).enumerate() {
        let slot = Slot::of(index, worker)?;
        let (seed, operations) = (slot.seed.load(Relaxed), slot.operations.load(Relaxed));
        if (seed, operations) != (state.seed, state.next_operation) {
            return Err(LedgerError::State { worker, state, seed, operations });
        }
        let (mut lookups, mut checksum) = (0, 0u64);
        for number in 0..operations {
            for rank in Operation::of(seed, number, index.ranked()).ranks() {
                asked[rank as usize] += 1;
                lookups += 1;
                checksum = checksum.wrapping_add(entry(number, index.at_rank(rank)?));
            }
        }
        let fields = [("lookups", lookups, slot.lookups.load(Relaxed)), ("checksum", checksum, slot.checksum.load(Relaxed))];
        for (field, expected, found) in fields {
            if expected != found {
                return Err(LedgerError::Worker { worker, field, operations, expected, found });
            }
        }
        totals.operations += operations;
        totals.lookups += lookups;
    }
    for (rank, expected) in (0..).zip(asked) {
        let record = index.at_rank(rank)?;
        let found = index.queries(record)?.load(Relaxed);
        if found != expected {
            return Err(LedgerError::Word { word: index.facts(record)?.word.to_string(), expected, found });
        }
    }
    Ok(totals)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;
    use pageferry::Region;

    const STATES: [WorkerState; 2] = [WorkerState { seed: 7, next_operation: 500 }, WorkerState { seed: 8, next_operation: 321 }];

    /// An index of a hundred words after the operations of [`STATES`].
    fn worked() -> Region {
        let region = Region::builder().size(1 << 20).open().unwrap();
        let mut builder = Builder::new(&region).unwrap();
        builder.add("p", 0, (0..100).map(|n| format!("word{n} ")).collect::<String>().as_bytes()).unwrap();
        let index = builder.finish().unwrap();
        for (worker, state) in STATES.iter().enumerate() {
            Slot::of(&index, worker).unwrap().claim(*state);
            replay(&index, worker, state.seed, 0..state.next_operation).unwrap();
        }
        region
    }

    #[test]
    fn a_ledger_without_a_fault_adds_up() {
        let region = worked();
        let totals = verify(&Index::attach(&region).unwrap(), &STATES).unwrap();
        assert_eq!(totals.operations, 821);
        assert!(totals.lookups > 821 && totals.lookups < 2 * 821);
    }

    #[test]
    fn one_lost_and_one_repeated_update_of_a_word_show() {
        let region = worked();
        let index = Index::attach(&region).unwrap();
        let counter = index.queries(index.at_rank(3).unwrap()).unwrap();
        counter.fetch_sub(1, Relaxed);
        assert!(verify(&index, &STATES).unwrap_err().to_string().ends_with("lost"));
        counter.fetch_add(2, Relaxed);
        assert!(verify(&index, &STATES).unwrap_err().to_string().ends_with("repeated"));
        // One of each, so that the sums agree.
        index.queries(index.at_rank(4).unwrap()).unwrap().fetch_sub(1, Relaxed);
        assert!(matches!(verify(&index, &STATES), Err(LedgerError::Word { .. })));
    }

    #[test]
    fn one_lost_and_one_repeated_operation_show() {
        for (numbers, next_operation) in [(500..500, 501), (499..500, 501), (499..500, 500)] {
            let region = worked();
            let index = Index::attach(&region).unwrap();
            replay(&index, 0, 7, numbers.clone()).unwrap();
            let states = [WorkerState { next_operation, ..STATES[0] }, STATES[1]];
            assert!(verify(&index, &states).is_err(), "{numbers:?} and a state of {next_operation}");
        }
        let region = worked();
        let index = Index::attach(&region).unwrap();
        replay(&index, 0, 7, 500..501).unwrap();
        verify(&index, &[WorkerState { next_operation: 501, ..STATES[0] }, STATES[1]]).unwrap();
        assert!(matches!(verify(&index, &STATES), Err(LedgerError::State { worker: 0, .. })));
    }

    #[test]
    fn a_worker_that_nobody_knows_shows() {
        let region = worked();
        let index = Index::attach(&region).unwrap();
        replay(&index, 9, 0, 0..1).unwrap();
        assert!(matches!(verify(&index, &STATES), Err(LedgerError::State { worker: 9, .. })));
    }

    #[test]
    fn every_rank_is_asked_for_and_low_ranks_most() {
        for ranked in [1, 2, 3, 100] {
            let mut asked = vec![0u32; ranked as usize];
            (0..20_000).flat_map(|number| Operation::of(1, number, ranked).ranks()).for_each(|rank| asked[rank as usize] += 1);
            assert!(asked.iter().all(|times| *times > 0), "{asked:?}");
            let (head, tail) = asked.split_at(ranked as usize / 2);
            assert!(ranked < 4 || head.iter().sum::<u32>() > tail.iter().sum());
        }
    }
}
