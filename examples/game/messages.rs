//! What the two processes of one command tell each other, a line of JSON each, through the pipes of the destination's standard streams.
//!
//! Role: brings the ends together before they have a connection, and what the destination sees to the screen that shows both. Neighbours: `process` and `destination` send and receive.
//! Invariants: no key and nothing of the game passes here; what arrives damaged is refused.

use crate::{
    map::Map,
    ticks::{PARTS, Part},
};
use pageferry::PeerId;
use serde_json::{Value, json};
use std::net::SocketAddr;
use thiserror::Error;

/// A line that is none of these messages.
#[derive(Debug, Error)]
#[error("the other process sent a line that makes no sense: {0}")]
pub struct MessageError(String);

/// What the source tells the destination, once: whose game to take, and where it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Order {
    pub source: PeerId,
    pub address: SocketAddr,
}

/// What the destination tells the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// First: the name of its key, which the source lets in.
    Hello(PeerId),
    /// Ten times a second, so that silence means that something is wrong.
    Status(Box<Status>),
    /// Last: what to print, and whether the proof holds.
    Report { text: String, holds: bool },
    /// Last, instead: why it cannot go on.
    Failed(String),
}

/// What the destination does, in this order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stage {
    /// Connected, and waiting until it is time.
    #[default]
    Waiting,
    Taking,
    Arriving,
    After,
    Proving,
}

const STAGES: [Stage; 5] = [Stage::Waiting, Stage::Taking, Stage::Arriving, Stage::After, Stage::Proving];

/// How far the destination is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Status {
    pub stage: Stage,
    pub missing: u64,
    pub faults: u64,
    /// Ticks that it made.
    pub made: u64,
    /// Its region, when it has one.
    pub map: Option<Map>,
    /// The last ticks that it made, in microseconds.
    pub recent: Vec<(Part, u32)>,
}

impl Order {
    pub fn to_line(self) -> String {
        json!({ "source": self.source.to_string(), "address": self.address.to_string() }).to_string()
    }

    /// # Errors
    /// [`MessageError`] names the first field that is missing or malformed.
    pub fn from_line(line: &str) -> Result<Order, MessageError> {
        let value = parse(line)?;
        Ok(Order {
            source: text(&value, "source")?.parse().map_err(|_| malformed("source"))?,
            address: text(&value, "address")?.parse().map_err(|_| malformed("address"))?,
        })
    }
}

impl Message {
    pub fn to_line(&self) -> String {
        let value = match self {
            Message::Hello(id) => json!({ "hello": id.to_string() }),
            Message::Status(status) => json!({ "status": status.to_value() }),
            Message::Report { text, holds } => json!({ "report": text, "holds": holds }),
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
            "status" => Message::Status(Box::new(Status::from_value(&value[key])?)),
            "report" => {
                let holds = value["holds"].as_bool().ok_or_else(|| malformed("holds"))?;
                Message::Report { text: text(&value, key)?, holds }
            }
            "failed" => Message::Failed(text(&value, key)?),
            _ => return Err(MessageError(format!("no known message: {line}"))),
        })
    }
}

impl Status {
    fn to_value(&self) -> Value {
        let Status { stage, missing, faults, made, map, recent } = self;
        let (columns, signs) = map.as_ref().map(|map| (map.columns, map.to_text())).unzip();
        let recent: Vec<_> = recent.iter().map(|(part, took)| [*part as u32, *took]).collect();
        json!({ "at": [*stage as u64, missing, faults, made], "columns": columns, "map": signs, "recent": recent })
    }

    fn from_value(value: &Value) -> Result<Status, MessageError> {
        let [stage, missing, faults, made] = numbers(&value["at"]).ok_or_else(|| malformed("at"))?;
        let stage = usize::try_from(stage).ok().and_then(|stage| STAGES.get(stage)).ok_or_else(|| malformed("at"))?;
        let columns = value["columns"].as_u64().and_then(|columns| usize::try_from(columns).ok());
        let map = match (columns, value["map"].as_str()) {
            (None, None) => None,
            (Some(columns @ 1..), Some(signs)) => Some(Map::from_text(columns, signs).ok_or_else(|| malformed("map"))?),
            _ => return Err(malformed("map")),
        };
        let tick = |value: &Value| {
            let [part, took] = numbers(value)?;
            Some((*PARTS.get(usize::try_from(part).ok()?)?, u32::try_from(took).ok()?))
        };
        let recent = value["recent"].as_array().and_then(|ticks| ticks.iter().map(tick).collect());
        Ok(Status { stage: *stage, missing, faults, made, map, recent: recent.ok_or_else(|| malformed("recent"))? })
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
    fn messages_come_back_and_damaged_ones_do_not() {
        let source = Identity::generate().unwrap().peer_id();
        let order = Order { source, address: "127.0.0.1:4433".parse().unwrap() };
        assert_eq!(Order::from_line(&order.to_line()).unwrap(), order);
        let map = Map::from_text(2, ".#-~").unwrap();
        let recent = vec![(Part::During, u32::MAX), (Part::After, 0)];
        let status = Status { stage: Stage::Arriving, missing: 1, faults: 2, made: u64::MAX, map: Some(map), recent };
        let line = Message::Status(Box::new(status.clone())).to_line();
        for field in ["at", "columns", "map", "recent"] {
            assert!(Message::from_line(&line.replace(&format!("\"{field}\":"), "\"other\":")).is_err(), "{field}");
        }
        let report = Message::Report { text: "two\nlines".to_owned(), holds: true };
        let bare = Message::Status(Box::default());
        for message in [Message::Hello(source), Message::Status(Box::new(status)), bare, report, Message::Failed("why".to_owned())]
        {
            assert!(!message.to_line().contains('\n'));
            assert_eq!(Message::from_line(&message.to_line()).unwrap(), message);
        }
        for line in ["", "{}", "7", "{\"hello\":\"abc\"}", "{\"report\":\"\"}", "{\"status\":{\"at\":[5,0,0,0],\"recent\":[]}}"] {
            assert!(Message::from_line(line).is_err() && Order::from_line(line).is_err(), "{line}");
        }
    }
}
