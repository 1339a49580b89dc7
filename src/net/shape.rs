//! What a path between two hosts is made to look like, and how that is written.
//!
//! Role: the words of hop *wire* when it is shaped. Neighbours: `transport` takes a [`LinkShape`] among its options; `shaper` decides by it. Invariants: pure; a shape
//! that was checked has shares between 0 and 1, delays up to a minute and a rate above 0; a text is refused with what it says and what is accepted.

use crate::NetError;
use std::{
    ops::Range,
    str::FromStr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};
use thiserror::Error;

/// What a path does to the datagrams on it: delay, jitter, rate, loss, duplication, reordering and cuts, all by one seed.
///
/// For tests, benches and examples on one machine; [`TransportOptions::shape`](crate::TransportOptions::shape) puts it under one end's QUIC socket. **One end's option
/// shapes both directions**, so the other end has none, or both add up. Peers of one server share its shape, as they would share its uplink. At most 64 MiB are under
/// way in each direction: that much is 10 Gbit/s at a round trip of 100 ms, and what comes on top is dropped.
///
/// ```
/// use pageferry::{LinkShape, TransportOptions};
/// use std::time::Duration;
/// let shape = LinkShape { rtt: Duration::from_millis(25), loss: 0.001, seed: 7, ..LinkShape::default() };
/// let options = TransportOptions { shape: Some(shape), ..TransportOptions::default() };
/// assert!(options.check().is_ok());
///
/// let same: LinkShape = "rtt=25ms, loss=0.1%, seed=7".parse()?;
/// assert_eq!((same.rtt, same.loss), (Duration::from_millis(25), 0.001));
/// # Ok::<(), pageferry::LinkShapeError>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct LinkShape {
    /// The round trip that the path adds, half of it each way. At most a minute.
    pub rtt: Duration,
    /// Each datagram takes up to so much longer, evenly spread; never overtaking the one before it. At most a minute.
    pub jitter: Duration,
    /// The narrowest place of each direction, in bytes of UDP payload a second; none: as wide as the machine is fast.
    pub bytes_s: Option<u64>,
    /// What may wait there, in bytes; what comes on top is dropped, as by a router. Default: what passes in 50 ms, at least 32 KiB. Means nothing without `bytes_s`.
    pub queue_bytes: Option<u64>,
    /// The share of datagrams that are lost, 0 to 1.
    pub loss: f64,
    /// The share of datagrams that come twice, 0 to 1.
    pub duplicate: f64,
    /// The share of datagrams that come late, behind others that were sent up to 1 ms and an eighth of `rtt` after them; 0 to 1.
    pub reorder: f64,
    /// When nothing passes in either direction, counted from when the socket was opened.
    pub cuts: Vec<Range<Duration>>,
    /// Decides about each datagram by its number in its direction: the same seed loses the same ones.
    pub seed: u64,
    /// Cuts and mends the link while it is in use. Clones of a shape share it.
    pub control: LinkControl,
}

const DELAY_MAX: Duration = Duration::from_secs(60);
/// Of the queue in front of the narrowest place, unless it was said: a twentieth of a second of its rate. Common in routers are 50 to 250 ms (RFC 8033, 1).
const QUEUES_A_SECOND: u64 = 20;
/// A few of the largest datagrams, or a slow link drops whatever comes in a burst.
const QUEUE_MIN_BYTES: u64 = 32 << 10;

impl LinkShape {
    /// Whether every value lies in its range.
    ///
    /// # Errors
    /// [`NetError::InvalidOption`] names the option, the value and what is allowed.
    pub fn check(&self) -> Result<(), NetError> {
        let invalid = |option, value, allowed: &str| Err(NetError::InvalidOption { option, value, allowed: allowed.to_owned() });
        for (option, share) in [("shape.loss", self.loss), ("shape.duplicate", self.duplicate), ("shape.reorder", self.reorder)] {
            if !(0.0..=1.0).contains(&share) {
                return invalid(option, share.to_string(), "a share of 0 to 1");
            }
        }
        for (option, delay) in [("shape.rtt", self.rtt), ("shape.jitter", self.jitter)] {
            if delay > DELAY_MAX {
                return invalid(option, format!("{delay:?}"), "at most 60 s");
            }
        }
        if let Some(cut) = self.cuts.iter().find(|cut| cut.is_empty()) {
            return invalid("shape.cuts", format!("{cut:?}"), "an end later than its beginning");
        }
        if self.bytes_s == Some(0) {
            return invalid("shape.bytes_s", "0".to_owned(), "above 0, or none; `cuts` and `control` let nothing pass");
        }
        Ok(())
    }

    /// What may wait in front of the narrowest place.
    pub(super) fn queue_of(&self, bytes_s: u64) -> u64 {
        self.queue_bytes.unwrap_or((bytes_s / QUEUES_A_SECOND).max(QUEUE_MIN_BYTES))
    }

    /// Reads a duration as a command line has it: `25ms`, `1.5s`, `200us`.
    ///
    /// ```
    /// # use pageferry::LinkShape;
    /// # use std::time::Duration;
    /// assert_eq!(LinkShape::parse_duration("1.5s"), Ok(Duration::from_millis(1500)));
    /// let error = LinkShape::parse_duration("25").unwrap_err();
    /// assert_eq!(error.to_string(), "\"25\" is not a duration: write a number with its unit, such as 25ms, 1.5s or 200us (ns, us, ms, s)");
    /// ```
    ///
    /// # Errors
    /// Says what was read and what is accepted.
    pub fn parse_duration(text: &str) -> Result<Duration, LinkShapeError> {
        const UNITS: &[(&str, f64)] = &[("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
        let seconds = scaled(text, UNITS).and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        let accepted = "write a number with its unit, such as 25ms, 1.5s or 200us (ns, us, ms, s)";
        seconds.ok_or_else(|| LinkShapeError::new(text, "a duration", accepted))
    }

    /// Reads a share in percent, as a command line has it: `0.1%`. It is what `loss`, `duplicate` and `reorder` take.
    ///
    /// ```
    /// # use pageferry::LinkShape;
    /// assert_eq!(LinkShape::parse_share("0.1%"), Ok(0.001));
    /// assert!(LinkShape::parse_share("0.1").is_err()); // a tenth, or a tenth of a percent?
    /// ```
    ///
    /// # Errors
    /// Says what was read and what is accepted.
    pub fn parse_share(text: &str) -> Result<f64, LinkShapeError> {
        let share = scaled(text, &[("%", 1.0)]).map(|percent| percent / 100.0).filter(|share| *share <= 1.0);
        share.ok_or_else(|| LinkShapeError::new(text, "a share", "write a percentage from 0% to 100%, such as 0.1%"))
    }

    /// Reads a rate as a command line has it, in bytes or in bits: `5MB/s`, `100Mbit/s`. The answer is in bytes a second.
    ///
    /// ```
    /// # use pageferry::LinkShape;
    /// assert_eq!(LinkShape::parse_rate("100Mbit/s"), Ok(12_500_000));
    /// ```
    ///
    /// # Errors
    /// Says what was read and what is accepted.
    pub fn parse_rate(text: &str) -> Result<u64, LinkShapeError> {
        let accepted = "write a number above 0 with its unit, such as 5MB/s or 100Mbit/s (B/s, kB/s, MB/s, GB/s, KiB/s, MiB/s, GiB/s, kbit/s, Mbit/s, Gbit/s)";
        let size = text.trim().strip_suffix("/s").and_then(|size| scaled(size, &[BYTES, BITS].concat())).and_then(whole);
        size.filter(|bytes_s| *bytes_s > 0).ok_or_else(|| LinkShapeError::new(text, "a rate", accepted))
    }

    /// Reads a size as a command line has it: `256KiB`, `1MB`.
    ///
    /// ```
    /// # use pageferry::LinkShape;
    /// assert_eq!(LinkShape::parse_bytes("256KiB"), Ok(262_144));
    /// ```
    ///
    /// # Errors
    /// Says what was read and what is accepted.
    pub fn parse_bytes(text: &str) -> Result<u64, LinkShapeError> {
        let accepted = "write a number with its unit, such as 256KiB or 1MB (B, kB, MB, GB, KiB, MiB, GiB)";
        scaled(text, BYTES).and_then(whole).ok_or_else(|| LinkShapeError::new(text, "a size", accepted))
    }

    fn set(&mut self, name: &str, value: &str) -> Result<(), LinkShapeError> {
        match name {
            "rtt" => self.rtt = LinkShape::parse_duration(value)?,
            "jitter" => self.jitter = LinkShape::parse_duration(value)?,
            "rate" => self.bytes_s = Some(LinkShape::parse_rate(value)?),
            "queue" => self.queue_bytes = Some(LinkShape::parse_bytes(value)?),
            "loss" => self.loss = LinkShape::parse_share(value)?,
            "duplicate" => self.duplicate = LinkShape::parse_share(value)?,
            "reorder" => self.reorder = LinkShape::parse_share(value)?,
            "cut" => self.cuts.push(parse_cut(value)?),
            "seed" => {
                let seed = value.parse();
                self.seed = seed.map_err(|_| LinkShapeError::new(value, "a seed", "write a whole number from 0 to 2^64 - 1"))?;
            }
            _ => {
                let accepted = "rtt, jitter, rate, queue, loss, duplicate, reorder, cut and seed are known";
                return Err(LinkShapeError::new(name, "a property of a link", accepted));
            }
        }
        Ok(())
    }
}

/// A list as in `rtt=25ms, jitter=2ms, rate=100Mbit/s, queue=256KiB, loss=0.1%, duplicate=1%, reorder=1%, cut=2s..3.5s, seed=7`. What is not named is as by default; each
/// `cut` adds one.
impl FromStr for LinkShape {
    type Err = LinkShapeError;

    fn from_str(text: &str) -> Result<LinkShape, LinkShapeError> {
        let mut shape = LinkShape::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let accepted = "write properties as in rtt=25ms,loss=0.1%,rate=100Mbit/s";
            let (name, value) = part.split_once('=').ok_or_else(|| LinkShapeError::new(part, "a property of a link", accepted))?;
            shape.set(name.trim(), value.trim())?;
        }
        Ok(shape)
    }
}

const BYTES: &[(&str, f64)] =
    &[("B", 1.0), ("kB", 1e3), ("MB", 1e6), ("GB", 1e9), ("KiB", 1024.0), ("MiB", 1_048_576.0), ("GiB", 1_073_741_824.0)];
const BITS: &[(&str, f64)] = &[("bit", 0.125), ("kbit", 125.0), ("Mbit", 125e3), ("Gbit", 125e6)];

/// A decimal number with one of these units behind it, or zero with none.
fn scaled(text: &str, units: &[(&str, f64)]) -> Option<f64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let number: f64 = number.parse().ok()?;
    let scale = match unit.trim_start() {
        "" if number == 0.0 => 1.0,
        unit => units.iter().find(|(name, _)| *name == unit)?.1,
    };
    Some(number * scale)
}

/// The nearest whole number, if it is one that fits.
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked before")]
fn whole(number: f64) -> Option<u64> {
    (0.0..1e18).contains(&number).then(|| number.round() as u64)
}

fn parse_cut(text: &str) -> Result<Range<Duration>, LinkShapeError> {
    let no_cut = || LinkShapeError::new(text, "a cut", "write when it begins and when it ends, as in 2s..3.5s");
    let (start, end) = text.split_once("..").ok_or_else(no_cut)?;
    let cut = LinkShape::parse_duration(start)?..LinkShape::parse_duration(end)?;
    if cut.is_empty() { Err(no_cut()) } else { Ok(cut) }
}

/// A text does not describe a link, or a property of one.
///
/// ```
/// use pageferry::LinkShape;
/// let error = "rtt=25ms,los=1%".parse::<LinkShape>().unwrap_err();
/// assert_eq!(
///     error.to_string(),
///     "\"los\" is not a property of a link: rtt, jitter, rate, queue, loss, duplicate, reorder, cut and seed are known"
/// );
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text:?} is not {what}: {accepted}")]
#[non_exhaustive]
pub struct LinkShapeError {
    /// What was read.
    pub text: String,
    /// What it should have been.
    pub what: &'static str,
    /// What is accepted.
    pub accepted: &'static str,
}

impl LinkShapeError {
    fn new(text: &str, what: &'static str, accepted: &'static str) -> LinkShapeError {
        LinkShapeError { text: text.to_owned(), what, accepted }
    }
}

/// Cuts and mends a shaped link while it is in use, from any thread, and counts what passes. Clones are the same switch.
///
/// It is that of every socket that was opened with the [`LinkShape`] it came from.
///
/// ```
/// use pageferry::{LinkControl, LinkShape, TransportOptions};
/// let link = LinkControl::default();
/// let shape = LinkShape { control: link.clone(), ..LinkShape::default() };
/// let options = TransportOptions { shape: Some(shape), ..TransportOptions::default() };
/// // ... `Peer::builder(...).transport(options).connect()` ...
/// link.cut(); // nothing arrives from now on
/// assert!(link.is_cut());
/// link.mend();
/// # let _ = options;
/// ```
#[derive(Clone, Debug, Default)]
pub struct LinkControl {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    cut: AtomicBool,
    passed: AtomicU64,
    dropped: AtomicU64,
}

impl LinkControl {
    /// From now on no datagram arrives in either direction. What is sent meanwhile is lost, and what was under way and should have arrived meanwhile.
    pub fn cut(&self) {
        self.shared.cut.store(true, Relaxed);
    }

    /// Datagrams that are sent from now on arrive again.
    pub fn mend(&self) {
        self.shared.cut.store(false, Relaxed);
    }

    /// Whether it was [`cut`](LinkControl::cut); one of [`LinkShape::cuts`] does not count.
    #[must_use]
    pub fn is_cut(&self) -> bool {
        self.shared.cut.load(Relaxed)
    }

    /// Datagrams that have arrived, in both directions; each copy of a repeated one counts.
    #[must_use]
    pub fn passed(&self) -> u64 {
        self.shared.passed.load(Relaxed)
    }

    /// Datagrams that were dropped, in both directions: lost, in front of a full queue, or when the link was cut.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    pub(super) fn count_passed(&self) {
        self.shared.passed.fetch_add(1, Relaxed);
    }

    pub(super) fn count_dropped(&self) {
        self.shared.dropped.fetch_add(1, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_whole_link_is_read_from_a_text() {
        let text =
            "rtt=25ms, jitter=200us,rate=5MB/s,queue=64KiB, loss=0.1%, duplicate=2%,reorder=100%,cut=2s..3.5s,cut=9s..10s,seed=7,";
        let shape: LinkShape = text.parse().unwrap();
        assert_eq!((shape.rtt, shape.jitter), (Duration::from_millis(25), Duration::from_micros(200)));
        assert_eq!((shape.bytes_s, shape.queue_bytes), (Some(5_000_000), Some(65536)));
        assert_eq!((shape.loss, shape.duplicate, shape.reorder, shape.seed), (0.001, 0.02, 1.0, 7));
        let seconds = |s| Duration::from_millis(s);
        assert_eq!(shape.cuts, [seconds(2000)..seconds(3500), seconds(9000)..seconds(10_000)]);
        assert!(shape.check().is_ok());
    }

    #[test]
    fn durations_shares_rates_and_sizes_are_read_with_their_units() {
        for (text, nanos) in
            [("25ms", 25_000_000), ("1.5s", 1_500_000_000), ("200us", 200_000), ("7 ns", 7), ("0", 0), (" .5µs ", 500)]
        {
            assert_eq!(LinkShape::parse_duration(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        for (text, share) in [("0.1%", 0.001), ("0", 0.0), ("100 %", 1.0)] {
            assert_eq!(LinkShape::parse_share(text), Ok(share), "{text}");
        }
        for (text, bytes_s) in [("5MB/s", 5_000_000), ("8bit/s", 1), ("1Gbit/s", 125_000_000), ("1.5KiB/s", 1536)] {
            assert_eq!(LinkShape::parse_rate(text), Ok(bytes_s), "{text}");
        }
        assert_eq!(LinkShape::parse_bytes("1MiB"), Ok(1 << 20));
    }

    #[test]
    fn what_is_not_understood_is_shown_with_what_is_accepted() {
        let long = "9".repeat(400) + "s";
        for text in ["", "25", "ms", "-1ms", "1e3s", "1.2.3s", "25 min", "nans", "infs", &long] {
            let error = LinkShape::parse_duration(text).unwrap_err();
            assert!(error.text == text && error.to_string().contains("25ms, 1.5s or 200us"), "{error}");
        }
        for text in ["0.1", "101%", "-1%", "%", "1%%"] {
            assert!(LinkShape::parse_share(text).unwrap_err().to_string().contains("such as 0.1%"), "{text}");
        }
        for text in ["5MB", "5mb/s", "0", "0B/s", "0.1bit/s", "1TB/s", "/s"] {
            assert!(LinkShape::parse_rate(text).unwrap_err().to_string().contains("such as 5MB/s"), "{text}");
        }
        for (text, part) in
            [("rtt", "rtt"), ("los=1%", "los"), ("loss=1", "1"), ("cut=2s", "2s"), ("cut=3s..2s", "3s..2s"), ("seed=-1", "-1")]
        {
            assert_eq!(text.parse::<LinkShape>().unwrap_err().text, part);
        }
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        type Change = fn(&mut LinkShape);
        let changes: [(&str, Change); 7] = [
            ("shape.loss", |s| s.loss = 1.1),
            ("shape.duplicate", |s| s.duplicate = -0.1),
            ("shape.reorder", |s| s.reorder = f64::NAN),
            ("shape.rtt", |s| s.rtt = Duration::MAX),
            ("shape.jitter", |s| s.jitter = Duration::from_secs(61)),
            ("shape.cuts", |s| s.cuts.push(Duration::ZERO..Duration::ZERO)),
            ("shape.bytes_s", |s| s.bytes_s = Some(0)),
        ];
        for (name, change) in changes {
            let mut shape = LinkShape::default();
            change(&mut shape);
            let error = shape.check().unwrap_err();
            assert!(matches!(error, NetError::InvalidOption { option, .. } if option == name), "{error}");
        }
    }
}
