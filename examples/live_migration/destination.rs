//! The end that takes the program over: process B.
//!
//! Role: goes on where the source stopped, and tells what came of it. Neighbours: `main` binds it to a migration; `report` prints
//! what the [`Outcome`] says. Invariants: it knows the region and the moved state, nothing else of the source.

use crate::{
    index::{Index, IndexError},
    ledger::{LedgerError, Totals, WorkerState, verify},
    load::{Load, LoadError, Observed, Phase, decode},
    proof::digest,
    search::tell,
    timeline::{Clock, Timeline},
};
use pageferry::{Hop, Region};
use serde_json::{Value, json};
use std::time::Duration;
use thiserror::Error;

/// The program arrived damaged, or could not go on.
#[derive(Debug, Error)]
pub enum ArrivalError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Ledger(#[from] LedgerError),
    #[error(transparent)]
    Index(#[from] IndexError),
    #[error("the destination's report cannot be read: {0}")]
    Report(String),
}

/// Goes on with the load of which `state` is the moved state.
///
/// # Errors
/// [`LoadError`].
pub fn resume<G>(region: &Region, state: &[u8], clock: Clock, gate_of: impl FnMut(usize) -> G) -> Result<Load, LoadError>
where
    G: FnMut() -> bool + Send + 'static,
{
    Load::start(region, &decode(state)?, clock, gate_of)
}

/// How the pages came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// From the source's last instruction to the destination's first.
    pub downtime: Duration,
    /// From the destination's first instruction until every page was here.
    pub until_last_page: Duration,
    /// Page faults that had to wait for a page, and how long they waited.
    pub faults: u64,
    pub fault_p50: Duration,
    pub fault_p99: Duration,
    pub fault_max: Duration,
    /// Pages by what brought them.
    pub pages_demand: u64,
    pub pages_around: u64,
    pub pages_pull: u64,
    pub pages_zero: u64,
    /// Bytes of the pages that are not zero.
    pub moved_bytes: u64,
}

impl Arrival {
    /// What a region's statistics say, when all its pages have come.
    pub fn of(region: &Region, downtime: Duration, until_last_page: Duration) -> Arrival {
        let stats = region.stats();
        let waits = region.hops().map(|hops| hops.hop(Hop::Total));
        let quantile = |q| waits.map(|waits| waits.quantile(q)).unwrap_or_default();
        let pages = stats.pages_demand + stats.pages_around + stats.pages_pull;
        Arrival {
            downtime,
            until_last_page,
            faults: stats.faults,
            fault_p50: quantile(0.5),
            fault_p99: quantile(0.99),
            fault_max: waits.map(|waits| waits.max()).unwrap_or_default(),
            pages_demand: stats.pages_demand,
            pages_around: stats.pages_around,
            pages_pull: stats.pages_pull,
            pages_zero: stats.pages_zero,
            moved_bytes: pages * region.page_size().bytes(),
        }
    }
}

/// What the destination tells the source at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub observed: Observed,
    pub arrival: Arrival,
    /// What the ledger adds up to, verified.
    pub totals: Totals,
    /// BLAKE3 of the region, in hexadecimal.
    pub digest: String,
    /// What the index answers to a person, here, now.
    pub sample: String,
}

/// Waits for the load, which its gates must end, verifies the ledger, digests the region and asks it for the words `ask`.
///
/// # Errors
/// [`ArrivalError`].
pub fn conclude(load: Load, region: &Region, arrival: Arrival, ask: &str) -> Result<Outcome, ArrivalError> {
    let observed = load.join()?;
    let index = Index::attach(region)?;
    let totals = verify(&index, &observed.states)?;
    let sample = tell(&index, ask)?;
    let digest = digest(region).map_err(IndexError::from)?.to_hex().to_string();
    Ok(Outcome { observed, arrival, totals, digest, sample })
}

/// Durations travel as nanoseconds.
fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Outcome {
    /// One line of JSON, for a pipe between the processes.
    pub fn to_line(&self) -> String {
        let Outcome { observed, arrival, totals, digest, sample } = self;
        let states: Vec<_> = observed.states.iter().map(|state| [state.seed, state.next_operation]).collect();
        let phase = |phase: &Phase| [ns(phase.duration), phase.operations, ns(phase.p50), ns(phase.p99), ns(phase.max)];
        let value = json!({
            "states": states,
            "phases": observed.phases.iter().map(phase).collect::<Vec<_>>(),
            "timeline": observed.timeline.slots,
            "answered": observed.answered.map(|(first, last)| [ns(first), ns(last)]),
            "waits": [ns(arrival.downtime), ns(arrival.until_last_page)],
            "faults": [arrival.faults, ns(arrival.fault_p50), ns(arrival.fault_p99), ns(arrival.fault_max)],
            "pages": [arrival.pages_demand, arrival.pages_around, arrival.pages_pull, arrival.pages_zero, arrival.moved_bytes],
            "totals": [totals.operations, totals.lookups],
            "digest": digest,
            "sample": sample,
        });
        value.to_string()
    }

    /// The reverse of [`to_line`](Outcome::to_line).
    ///
    /// # Errors
    /// [`ArrivalError::Report`].
    pub fn from_line(line: &str) -> Result<Outcome, ArrivalError> {
        let value: Value = serde_json::from_str(line).map_err(|error| ArrivalError::Report(error.to_string()))?;
        let missing = |what: &str| ArrivalError::Report(format!("{what} is missing or malformed"));
        let list = |what: &str| value[what].as_array().ok_or_else(|| missing(what));
        let [downtime, until_last_page] = numbers(&value["waits"]).ok_or_else(|| missing("waits"))?.map(Duration::from_nanos);
        let [faults, p50, p99, max] = numbers(&value["faults"]).ok_or_else(|| missing("faults"))?;
        let [pages_demand, pages_around, pages_pull, pages_zero, moved_bytes] =
            numbers(&value["pages"]).ok_or_else(|| missing("pages"))?;
        let [operations, lookups] = numbers(&value["totals"]).ok_or_else(|| missing("totals"))?;
        let state = |value: &Value| numbers(value).map(|[seed, next_operation]| WorkerState { seed, next_operation });
        let phase = |value: &Value| {
            let [duration, operations, p50, p99, max] = numbers(value)?;
            let [duration, p50, p99, max] = [duration, p50, p99, max].map(Duration::from_nanos);
            Some(Phase { duration, operations, p50, p99, max })
        };
        let slots: Option<_> = list("timeline")?.iter().map(Value::as_u64).collect();
        let answered = numbers(&value["answered"]).map(|[first, last]| (Duration::from_nanos(first), Duration::from_nanos(last)));
        let observed = Observed {
            states: list("states")?.iter().map(state).collect::<Option<_>>().ok_or_else(|| missing("states"))?,
            phases: list("phases")?.iter().map(phase).collect::<Option<_>>().ok_or_else(|| missing("phases"))?,
            timeline: Timeline { slots: slots.ok_or_else(|| missing("timeline"))? },
            answered,
        };
        let [fault_p50, fault_p99, fault_max] = [p50, p99, max].map(Duration::from_nanos);
        let arrival = Arrival {
            downtime,
            until_last_page,
            faults,
            fault_p50,
            fault_p99,
            fault_max,
            pages_demand,
            pages_around,
            pages_pull,
            pages_zero,
            moved_bytes,
        };
        let text = |what: &str| value[what].as_str().map(str::to_owned).ok_or_else(|| missing(what));
        Ok(Outcome { observed, arrival, totals: Totals { operations, lookups }, digest: text("digest")?, sample: text("sample")? })
    }
}

/// An array of exactly `N` numbers.
fn numbers<const N: usize>(value: &Value) -> Option<[u64; N]> {
    let numbers: Option<Vec<u64>> = value.as_array()?.iter().map(Value::as_u64).collect();
    numbers?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outcome_comes_back_and_a_damaged_one_does_not() {
        let of = Duration::from_nanos;
        let phase = Phase { duration: of(1), operations: u64::MAX, p50: of(3), p99: of(4), max: of(5) };
        let mut outcome = Outcome {
            observed: Observed {
                states: vec![WorkerState { seed: u64::MAX, next_operation: 6 }, WorkerState { seed: 7, next_operation: 8 }],
                phases: vec![phase, Phase::default()],
                timeline: Timeline { slots: vec![9, 0, 10] },
                answered: Some((of(11), of(12))),
            },
            arrival: Arrival {
                downtime: of(13),
                faults: 14,
                fault_max: of(15),
                pages_pull: 16,
                moved_bytes: 17,
                ..Arrival::default()
            },
            totals: Totals { operations: 18, lookups: 19 },
            digest: "20".to_owned(),
            sample: "21".to_owned(),
        };
        let line = outcome.to_line();
        assert_eq!(Outcome::from_line(&line).unwrap(), outcome);
        for field in ["states", "phases", "timeline", "waits", "faults", "pages", "totals", "digest", "sample"] {
            let damaged = line.replace(&format!("\"{field}\":"), "\"other\":");
            assert!(Outcome::from_line(&damaged).is_err_and(|error| error.to_string().contains(field)), "{field}");
        }
        assert!(Outcome::from_line("").is_err());
        outcome.observed.answered = None;
        assert_eq!(Outcome::from_line(&outcome.to_line()).unwrap(), outcome);
    }
}
