//! The measuring loop.
//!
//! Role: cases take turns, round after round, and each key's figure is the median of its rounds. Neighbours: benches give cases, `results` prints.
//! Invariants: a baseline and what is compared with it are measured in every round, so what drifts on the machine drifts in both.

use super::{Result, args::Args};
use std::time::Instant;

/// Something to measure. `run` is told the round and gives one figure for each key.
pub struct Case<'a> {
    pub keys: Vec<&'static str>,
    pub run: Box<dyn FnMut(u64) -> Result<Vec<f64>> + 'a>,
}

impl<'a> Case<'a> {
    pub fn new(keys: impl Into<Vec<&'static str>>, run: impl FnMut(u64) -> Result<Vec<f64>> + 'a) -> Case<'a> {
        Case { keys: keys.into(), run: Box::new(run) }
    }

    /// Does something before each run that is not part of it.
    pub fn after(self, mut prepare: impl FnMut() + 'a) -> Case<'a> {
        let Case { keys, mut run } = self;
        let run = Box::new(move |round| {
            prepare();
            run(round)
        });
        Case { keys, run }
    }
}

/// A key's figures, one a round.
pub struct Series {
    pub key: &'static str,
    sorted: Vec<f64>,
}

impl Series {
    pub fn median(&self) -> f64 {
        let middle = self.sorted.len() / 2;
        if self.sorted.len().is_multiple_of(2) {
            f64::midpoint(self.sorted[middle - 1], self.sorted[middle])
        } else {
            self.sorted[middle]
        }
    }

    /// The least and the greatest round.
    pub fn range(&self) -> (f64, f64) {
        (self.sorted[0], self.sorted[self.sorted.len() - 1])
    }
}

/// All that a bench found out.
pub struct Measured {
    pub series: Vec<Series>,
    pub rounds: usize,
    /// Keys that follow from the medians.
    pub derived: Vec<(&'static str, f64)>,
    /// What a program may want to know beside the figures.
    pub words: Vec<(&'static str, String)>,
    /// What a reader has to know about this run.
    pub notes: Vec<String>,
}

impl Measured {
    /// A key's median, if it was measured.
    pub fn median(&self, key: &str) -> Option<f64> {
        self.series.iter().find(|series| series.key == key).map(Series::median)
    }
}

/// Runs the cases in turns, every second round in the opposite order, and checks that each key got its figure.
pub fn in_rounds(args: &Args, rounds: usize, cases: Vec<Case<'_>>) -> Result<Measured> {
    let mut cases: Vec<Case<'_>> = cases.into_iter().filter(|case| args.wants(&case.keys)).collect();
    if cases.is_empty() {
        return Err("no key contains the filter; benches/README.md lists them".into());
    }
    let mut series: Vec<Vec<Series>> =
        cases.iter().map(|case| case.keys.iter().map(|key| Series { key, sorted: Vec::new() }).collect()).collect();
    for round in 0..rounds {
        let mut turns: Vec<_> = cases.iter_mut().zip(&mut series).collect();
        if round % 2 == 1 {
            turns.reverse();
        }
        for (case, series) in turns {
            let start = Instant::now();
            let figures = (case.run)(round as u64).map_err(|error| format!("{}: {error}", case.keys[0]))?;
            eprintln!(
                "round {} of {rounds}: {} = {:.1} ({:.1} s)",
                round + 1,
                case.keys[0],
                figures[0],
                start.elapsed().as_secs_f64()
            );
            if figures.len() != series.len() || figures.iter().any(|figure| !figure.is_finite()) {
                return Err(format!("{:?} got {figures:?}", case.keys).into());
            }
            series.iter_mut().zip(figures).for_each(|(series, figure)| series.sorted.push(figure));
        }
    }
    let mut series: Vec<Series> = series.into_iter().flatten().collect();
    series.iter_mut().for_each(|series| series.sorted.sort_by(f64::total_cmp));
    Ok(Measured { series, rounds, derived: Vec::new(), words: Vec::new(), notes: Vec::new() })
}

/// Times of single events.
#[derive(Default)]
pub struct Times {
    us: Vec<f64>,
}

impl Times {
    pub fn with_capacity(events: usize) -> Times {
        Times { us: Vec::with_capacity(events) }
    }

    /// Counts the time since `start`.
    pub fn since(&mut self, start: Instant) {
        self.push_us(start.elapsed().as_nanos() as f64 / 1e3);
    }

    pub fn push_us(&mut self, us: f64) {
        self.us.push(us);
    }

    pub fn mean_us(&self) -> f64 {
        self.us.iter().sum::<f64>() / self.us.len() as f64
    }

    /// Median and 99th percentile: the time that this share of the events stayed within.
    pub fn p50_p99_us(&mut self) -> [f64; 2] {
        self.us.sort_by(f64::total_cmp);
        [0.50, 0.99].map(|share| {
            let rank = (self.us.len() as f64 * share).ceil() as usize;
            self.us.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
        })
    }
}

/// What was used for `bytes`, for each GiB.
pub fn a_gib(used: f64, bytes: u64) -> f64 {
    used / (bytes as f64 / f64::from(1 << 30))
}

/// Megabytes (1e6 bytes) a second since `start`.
pub fn mb_s(bytes: u64, start: Instant) -> f64 {
    bytes as f64 / 1e6 / start.elapsed().as_secs_f64()
}

/// Bytes that the loopback device has carried.
pub fn loopback_bytes() -> Result<u64> {
    Ok(std::fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes")?.trim().parse()?)
}
