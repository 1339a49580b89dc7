//! What the hosts and their parent tell each other: lines of JSON through the pipes of a host's standard streams.
//!
//! Role: orders one way, answers the other. Neighbours: `host` and `process` send and receive. Invariants: no key and nothing of the database passes here; a line that is a bare
//! number is an acknowledged transfer, and stands in the stream behind everything that was said before it; what arrives damaged is refused.

use crate::{Way, proof::Findings};
use clap::ValueEnum;
use pageferry::PeerId;
use serde_json::{Value, json};
use std::{net::SocketAddr, time::Duration};
use thiserror::Error;

/// A line that is none of these.
#[derive(Debug, Error)]
#[error("the other process sent a line that makes no sense: {0}")]
pub struct MessageError(String);

/// What a host is told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Order {
    /// Fill a region with a bank, and run it.
    Found { accounts: u64, region_bytes: u64 },
    /// Offer the program to this peer, and say when it has left.
    Offer { to: PeerId },
    /// Take the program from another host, and run it.
    Take { from: PeerId, address: SocketAddr, way: Way },
    /// End the program and examine its books.
    Prove,
}

/// What a host says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First: the name of its key.
    Hello(PeerId),
    /// The bank is open, in a file of so many bytes.
    Founded { file_bytes: u64 },
    /// Where the program is offered.
    Offered { address: SocketAddr },
    /// The program belongs to this host and runs.
    Taken,
    /// Every page is here.
    Arrived(Arrival),
    /// The program runs elsewhere, and every page has arrived there.
    Departed(Departure),
    /// What the examination found.
    Proved(Findings),
    /// It cannot go on.
    Failed(String),
}

/// How a program came, as its destination saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Arrival {
    /// Pages of the database's file, when all had come.
    pub file_pages: u64,
    /// Pages that came after the handover: because a query touched them, beside such a page, pushed by the source.
    pub touched: u64,
    pub beside: u64,
    pub pushed: u64,
    /// Faults, and how long they waited.
    pub faults: u64,
    pub fault_p50: Duration,
    pub fault_max: Duration,
}

/// How a program left, as its source saw it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Departure {
    /// Rounds of copying while it ran.
    pub rounds: u64,
    pub downtime: Duration,
    pub total: Duration,
}

impl Order {
    pub fn to_line(&self) -> String {
        match self {
            Order::Found { accounts, region_bytes } => json!({ "found": [accounts, region_bytes] }),
            Order::Offer { to } => json!({ "offer": to.to_string() }),
            Order::Take { from, address, way } => {
                let way = way.to_possible_value().map(|value| value.get_name().to_owned());
                json!({ "take": from.to_string(), "address": address.to_string(), "way": way })
            }
            Order::Prove => json!({ "prove": true }),
        }
        .to_string()
    }

    /// # Errors
    /// [`MessageError`].
    pub fn from_line(line: &str) -> Result<Order, MessageError> {
        let (key, value) = parse(line)?;
        let order = match key.as_str() {
            "found" => numbers(&value[&key]).map(|[accounts, region_bytes]| Order::Found { accounts, region_bytes }),
            "offer" => parsed(&value[&key]).map(|to| Order::Offer { to }),
            "take" => {
                let way = value["way"].as_str().and_then(|way| Way::from_str(way, false).ok());
                let (from, address) = (parsed(&value[&key]), parsed(&value["address"]));
                from.zip(address).zip(way).map(|((from, address), way)| Order::Take { from, address, way })
            }
            "prove" => Some(Order::Prove),
            _ => None,
        };
        order.ok_or_else(|| MessageError(line.to_owned()))
    }
}

impl Message {
    pub fn to_line(&self) -> String {
        match self {
            Message::Hello(id) => json!({ "hello": id.to_string() }),
            Message::Founded { file_bytes } => json!({ "founded": [file_bytes] }),
            Message::Offered { address } => json!({ "offered": address.to_string() }),
            Message::Taken => json!({ "taken": true }),
            Message::Arrived(arrival) => {
                let Arrival { file_pages, touched, beside, pushed, faults, fault_p50, fault_max } = arrival;
                json!({ "arrived": [file_pages, touched, beside, pushed, faults, &ns(*fault_p50), &ns(*fault_max)] })
            }
            Message::Departed(Departure { rounds, downtime, total }) => {
                json!({ "departed": [rounds, &ns(*downtime), &ns(*total)] })
            }
            Message::Proved(found) => {
                let Findings { integrity, entries, wrong_entries, accounts, wrong_balances, wrong_profiles, money, first_money } =
                    found;
                let found = [entries, wrong_entries, accounts, wrong_balances, wrong_profiles, money, first_money];
                json!({ "proved": found, "integrity": integrity })
            }
            Message::Failed(why) => json!({ "failed": why }),
        }
        .to_string()
    }

    /// # Errors
    /// [`MessageError`].
    pub fn from_line(line: &str) -> Result<Message, MessageError> {
        let (key, value) = parse(line)?;
        let content = &value[&key];
        let message = match key.as_str() {
            "hello" => parsed(content).map(Message::Hello),
            "founded" => numbers(content).map(|[file_bytes]| Message::Founded { file_bytes }),
            "offered" => parsed(content).map(|address| Message::Offered { address }),
            "taken" => Some(Message::Taken),
            "arrived" => numbers(content).map(|[file_pages, touched, beside, pushed, faults, p50, max]| {
                let (fault_p50, fault_max) = (Duration::from_nanos(p50), Duration::from_nanos(max));
                Message::Arrived(Arrival { file_pages, touched, beside, pushed, faults, fault_p50, fault_max })
            }),
            "departed" => numbers(content).map(|[rounds, downtime, total]| {
                let [downtime, total] = [downtime, total].map(Duration::from_nanos);
                Message::Departed(Departure { rounds, downtime, total })
            }),
            "proved" => findings(&value).map(Message::Proved),
            "failed" => content.as_str().map(|why| Message::Failed(why.to_owned())),
            _ => None,
        };
        message.ok_or_else(|| MessageError(line.to_owned()))
    }
}

fn findings(value: &Value) -> Option<Findings> {
    let numbers: Option<Vec<i64>> = value["proved"].as_array()?.iter().map(Value::as_i64).collect();
    let [entries, wrong_entries, accounts, wrong_balances, wrong_profiles, money, first_money] = numbers?.try_into().ok()?;
    let integrity = value["integrity"].as_str()?.to_owned();
    Some(Findings { integrity, entries, wrong_entries, accounts, wrong_balances, wrong_profiles, money, first_money })
}

/// A line and its first key, which says what it is.
fn parse(line: &str) -> Result<(String, Value), MessageError> {
    let value: Value = serde_json::from_str(line).map_err(|error| MessageError(format!("{line} ({error})")))?;
    let key = value.as_object().and_then(|object| object.keys().next()).cloned();
    Ok((key.ok_or_else(|| MessageError(line.to_owned()))?, value))
}

fn parsed<T: std::str::FromStr>(value: &Value) -> Option<T> {
    value.as_str()?.parse().ok()
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
    fn what_was_said_comes_back_and_other_lines_do_not() {
        let id = Identity::generate().unwrap().peer_id();
        let address = "127.0.0.1:4433".parse().unwrap();
        let of = Duration::from_nanos;
        let arrival =
            Arrival { file_pages: 1, touched: 2, beside: 3, pushed: 4, faults: 6, fault_p50: of(7), fault_max: of(u64::MAX) };
        let found = Findings {
            integrity: "a \"complaint\"\n".to_owned(),
            entries: 1,
            wrong_entries: 2,
            accounts: 3,
            wrong_balances: 4,
            wrong_profiles: 5,
            money: -6,
            first_money: i64::MAX,
        };
        for message in [
            Message::Hello(id),
            Message::Founded { file_bytes: 1 },
            Message::Offered { address },
            Message::Taken,
            Message::Arrived(arrival),
            Message::Departed(Departure { rounds: 1, downtime: of(2), total: of(3) }),
            Message::Proved(found),
            Message::Failed("why".to_owned()),
        ] {
            assert!(!message.to_line().contains('\n'));
            assert_eq!(Message::from_line(&message.to_line()).unwrap(), message);
        }
        let take = Way::value_variants().iter().map(|way| Order::Take { from: id, address, way: *way });
        for order in [Order::Found { accounts: 1, region_bytes: 2 }, Order::Offer { to: id }, Order::Prove].into_iter().chain(take)
        {
            assert_eq!(Order::from_line(&order.to_line()).unwrap(), order);
        }
        for line in ["", "{}", "7", "{\"hello\":\"abc\"}", "{\"arrived\":[1]}", "{\"proved\":[1,2,3,4,5,6,7]}", "{\"failed\":1}"] {
            assert!(Message::from_line(line).is_err() && Order::from_line(line).is_err(), "{line}");
        }
    }
}
