//! What the two processes tell each other, a line of JSON each, through the pipes of the destination's standard streams.
//!
//! Role: brings the two ends together before they have a connection, and the figures home after it. Neighbours: `process` and
//! `destination` send and receive. Invariants: no key and nothing of the program passes here; what arrives damaged is refused.

use crate::{
    ledger::{Totals, WorkerState},
    load::{Observed, Phase},
    timeline::Timeline,
};
use pageferry::PeerId;
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Duration};
use thiserror::Error;

/// A line that is none of these messages.
#[derive(Debug, Error)]
#[error("the other process sent a line that makes no sense: {0}")]
pub struct MessageError(String);

/// What the source tells the destination, once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// Whose program to take, and where it is offered.
    pub source: PeerId,
    pub address: SocketAddr,
    /// The epoch of the source's [`Clock`](crate::timeline::Clock).
    pub epoch_unix_ns: u64,
    /// For how long the load goes on after the last page.
    pub load: Duration,
    /// The words to look up in the end.
    pub ask: String,
}

/// What the destination tells the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First: the name of its key, which the source lets in.
    Hello(PeerId),
    /// Ten times a second, so that silence means that something is wrong.
    Status(Status),
    /// Last.
    Outcome(Box<Outcome>),
    /// Last, instead: why it cannot go on.
    Failed(String),
}

/// How far the destination is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub stage: Stage,
    pub resident_pages: u64,
    pub pages: u64,
    pub faults: u64,
    pub operations: u64,
}

/// What the destination does, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    #[default]
    Taking,
    Arriving,
    After,
    Proving,
}

const STAGES: [Stage; 4] = [Stage::Taking, Stage::Arriving, Stage::After, Stage::Proving];

/// How the pages came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
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
    /// Pages of zeros, for which no bytes travel.
    pub pages_zero: u64,
    /// Bytes of the pages that are not zero.
    pub moved_bytes: u64,
}

/// What came of it, as the destination found it.
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

impl Order {
    pub fn to_line(&self) -> String {
        let Order { source, address, epoch_unix_ns, load, ask } = self;
        let (source, address) = (source.to_string(), address.to_string());
        json!({ "source": source, "address": address, "epoch": epoch_unix_ns, "load": ns(*load), "ask": ask }).to_string()
    }

    /// # Errors
    /// [`MessageError`] names the first field that is missing or malformed.
    pub fn from_line(line: &str) -> Result<Order, MessageError> {
        let value = parse(line)?;
        Ok(Order {
            source: text(&value, "source")?.parse().map_err(|_| malformed("source"))?,
            address: text(&value, "address")?.parse().map_err(|_| malformed("address"))?,
            epoch_unix_ns: value["epoch"].as_u64().ok_or_else(|| malformed("epoch"))?,
            load: value["load"].as_u64().map(Duration::from_nanos).ok_or_else(|| malformed("load"))?,
            ask: text(&value, "ask")?,
        })
    }
}

impl Message {
    pub fn to_line(&self) -> String {
        let value = match self {
            Message::Hello(id) => json!({ "hello": id.to_string() }),
            Message::Status(Status { stage, resident_pages, pages, faults, operations }) => {
                json!({ "status": [*stage as u64, resident_pages, pages, faults, operations] })
            }
            Message::Outcome(outcome) => json!({ "outcome": outcome.to_value() }),
            Message::Failed(why) => json!({ "failed": why }),
        };
        value.to_string()
    }

    /// # Errors
    /// [`MessageError`] names the first field that is missing or malformed.
    pub fn from_line(line: &str) -> Result<Message, MessageError> {
        let value = parse(line)?;
        let key = value.as_object().and_then(|object| object.keys().next()).map_or("", String::as_str);
        Ok(match key {
            "hello" => Message::Hello(text(&value, key)?.parse().map_err(|_| malformed(key))?),
            "status" => {
                let [stage, resident_pages, pages, faults, operations] = numbers(&value[key]).ok_or_else(|| malformed(key))?;
                let stage = usize::try_from(stage).ok().and_then(|stage| STAGES.get(stage));
                let stage = *stage.ok_or_else(|| malformed(key))?;
                Message::Status(Status { stage, resident_pages, pages, faults, operations })
            }
            "outcome" => Message::Outcome(Box::new(Outcome::from_value(&value[key])?)),
            "failed" => Message::Failed(text(&value, key)?),
            _ => return Err(MessageError(format!("no known message: {line}"))),
        })
    }
}

impl Outcome {
    fn to_value(&self) -> Value {
        let Outcome { observed, arrival, totals, digest, sample } = self;
        let states: Vec<_> = observed.states.iter().map(|state| [state.seed, state.next_operation]).collect();
        let phase = |phase: &Phase| [ns(phase.duration), phase.operations, ns(phase.p50), ns(phase.p99), ns(phase.max)];
        json!({
            "states": states,
            "phases": observed.phases.iter().map(phase).collect::<Vec<_>>(),
            "timeline": observed.timeline.slots,
            "answered": observed.answered.map(|(first, last)| [ns(first), ns(last)]),
            "faults": [ns(arrival.until_last_page), arrival.faults, ns(arrival.fault_p50), ns(arrival.fault_p99), ns(arrival.fault_max)],
            "pages": [arrival.pages_demand, arrival.pages_around, arrival.pages_pull, arrival.pages_zero, arrival.moved_bytes],
            "totals": [totals.operations, totals.lookups],
            "digest": digest,
            "sample": sample,
        })
    }

    fn from_value(value: &Value) -> Result<Outcome, MessageError> {
        let list = |what: &str| value[what].as_array().ok_or_else(|| malformed(what));
        let [until_last_page, faults, p50, p99, max] = numbers(&value["faults"]).ok_or_else(|| malformed("faults"))?;
        let [pages_demand, pages_around, pages_pull, pages_zero, moved_bytes] =
            numbers(&value["pages"]).ok_or_else(|| malformed("pages"))?;
        let [operations, lookups] = numbers(&value["totals"]).ok_or_else(|| malformed("totals"))?;
        let state = |value: &Value| numbers(value).map(|[seed, next_operation]| WorkerState { seed, next_operation });
        let phase = |value: &Value| {
            let [duration, operations, p50, p99, max] = numbers(value)?;
            let [duration, p50, p99, max] = [duration, p50, p99, max].map(Duration::from_nanos);
            Some(Phase { duration, operations, p50, p99, max })
        };
        let slots: Option<_> = list("timeline")?.iter().map(Value::as_u64).collect();
        let answered = numbers(&value["answered"]).map(|[first, last]| (Duration::from_nanos(first), Duration::from_nanos(last)));
        let observed = Observed {
            states: list("states")?.iter().map(state).collect::<Option<_>>().ok_or_else(|| malformed("states"))?,
            phases: list("phases")?.iter().map(phase).collect::<Option<_>>().ok_or_else(|| malformed("phases"))?,
            timeline: Timeline { slots: slots.ok_or_else(|| malformed("timeline"))? },
            answered,
        };
        let [until_last_page, fault_p50, fault_p99, fault_max] = [until_last_page, p50, p99, max].map(Duration::from_nanos);
        let arrival = Arrival {
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
        Ok(Outcome {
            observed,
            arrival,
            totals: Totals { operations, lookups },
            digest: text(value, "digest")?,
            sample: text(value, "sample")?,
        })
    }
}

fn parse(line: &str) -> Result<Value, MessageError> {
    serde_json::from_str(line).map_err(|error| MessageError(error.to_string()))
}

fn malformed(what: &str) -> MessageError {
    MessageError(format!("{what} is missing or malformed"))
}

fn text(value: &Value, what: &str) -> Result<String, MessageError> {
    value[what].as_str().map(str::to_owned).ok_or_else(|| malformed(what))
}

/// Durations travel as nanoseconds.
fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// An array of exactly `N` numbers.
fn numbers<const N: usize>(value: &Value) -> Option<[u64; N]> {
    let numbers: Option<Vec<u64>> = value.as_array()?.iter().map(Value::as_u64).collect();
    numbers?.try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::Identity;

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
                until_last_page: of(13),
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
        let line_of = |outcome: &Outcome| Message::Outcome(Box::new(outcome.clone())).to_line();
        let line = line_of(&outcome);
        assert_eq!(Message::from_line(&line).unwrap(), Message::Outcome(Box::new(outcome.clone())));
        for field in ["states", "phases", "timeline", "faults", "pages", "totals", "digest", "sample"] {
            let damaged = line.replace(&format!("\"{field}\":"), "\"other\":");
            assert!(Message::from_line(&damaged).is_err_and(|error| error.to_string().contains(field)), "{field}");
        }
        outcome.observed.answered = None;
        assert_eq!(Message::from_line(&line_of(&outcome)).unwrap(), Message::Outcome(Box::new(outcome)));
    }

    #[test]
    fn orders_and_messages_come_back_and_other_lines_do_not() {
        let source = Identity::generate().unwrap().peer_id();
        let address = "127.0.0.1:4433".parse().unwrap();
        let load = Duration::from_millis(1500);
        let order = Order { source, address, epoch_unix_ns: u64::MAX, load, ask: "two \"words\"\n".to_owned() };
        assert!(!order.to_line().contains('\n'));
        assert_eq!(Order::from_line(&order.to_line()).unwrap(), order);
        for field in ["source", "address", "epoch", "load", "ask"] {
            let damaged = order.to_line().replace(&format!("\"{field}\":"), "\"other\":");
            assert!(Order::from_line(&damaged).is_err_and(|error| error.to_string().contains(field)), "{field}");
        }
        let status = |stage| Message::Status(Status { stage, resident_pages: 1, pages: 2, faults: 3, operations: u64::MAX });
        for message in [Message::Hello(source), Message::Failed("why".to_owned())].into_iter().chain(STAGES.map(status)) {
            assert_eq!(Message::from_line(&message.to_line()).unwrap(), message);
        }
        for line in ["", "{}", "7", "{\"hello\":\"abc\"}", "{\"status\":[4,0,0,0,0]}", "{\"status\":[0,0,0,0]}", "{\"failed\":1}"] {
            assert!(Message::from_line(line).is_err() && Order::from_line(line).is_err(), "{line}");
        }
    }
}
