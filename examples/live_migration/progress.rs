//! What the user sees while it runs.
//!
//! Role: shows the steps of the program. Neighbours: `source` begins and ends them. Invariants: everything goes to standard error, so
//! that standard output is the report alone; bars are drawn only on a terminal, and every step leaves a line there and anywhere else.

use crate::messages::Status;
use indicatif::{HumanBytes, HumanCount, ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::{
    cell::Cell,
    io::{IsTerminal, stderr},
    time::{Duration, Instant},
};

/// Begins steps.
#[derive(Clone)]
pub struct Progress {
    drawn: bool,
}

/// How much there is to do in a step.
#[derive(Clone, Copy)]
pub enum Total {
    Bytes(u64),
    Time(Duration),
    Unknown,
}

/// One step. Dropped before it is done it vanishes.
pub struct Step {
    name: &'static str,
    total: Total,
    begun: Instant,
    bar: ProgressBar,
    /// How many operations there were when the first were told.
    first: Cell<Option<u64>>,
}

impl Progress {
    /// Bars on a terminal, unless `quiet`.
    pub fn new(quiet: bool) -> Progress {
        Progress { drawn: !quiet && stderr().is_terminal() }
    }

    /// A line between steps.
    pub fn say(&self, line: &str) {
        eprintln!("{line}");
    }

    pub fn begin(&self, name: &'static str, total: Total) -> Step {
        let target = if self.drawn { ProgressDrawTarget::stderr_with_hz(10) } else { ProgressDrawTarget::hidden() };
        let (length, template) = match total {
            Total::Bytes(bytes) => (Some(bytes), "{prefix:24} {bar:20} {bytes} of {total_bytes} {msg}"),
            Total::Time(time) => (u64::try_from(time.as_millis()).ok(), "{prefix:24} {bar:20} {elapsed} {msg}"),
            Total::Unknown => (None, "{prefix:24} {spinner} {elapsed}"),
        };
        let bar = ProgressBar::with_draw_target(length, target).with_prefix(name);
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        if self.drawn {
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        Step { name, total, begun: Instant::now(), bar, first: Cell::new(None) }
    }
}

impl Step {
    /// Bytes done so far.
    pub fn reached(&self, bytes: u64) {
        self.bar.set_position(bytes);
    }

    /// The time since its beginning is how far it is; meanwhile the load has made `operations` in all.
    pub fn passed(&self, operations: u64) {
        self.bar.set_position(u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX));
        self.bar.set_message(self.rate(operations));
    }

    /// How far the destination's region has filled, and what its program has done meanwhile.
    pub fn arrived(&self, status: &Status, size_bytes: u64) {
        self.bar.set_position(status.resident_pages * (size_bytes / status.pages.max(1)));
        let rate = self.rate(status.operations);
        self.bar.set_message(format!("{} faults, {rate}", HumanCount(status.faults)));
    }

    pub fn done(self) {
        let (took, message) = (self.begun.elapsed().as_secs_f64(), self.bar.message());
        self.bar.finish_and_clear();
        let bytes = match self.total {
            Total::Bytes(_) => format!("{} ", HumanBytes(self.bar.position())),
            _ => String::new(),
        };
        let message = if message.is_empty() { message } else { format!(", {message}") };
        eprintln!("{:24} {bytes}in {took:.1} s{message}", self.name);
    }

    /// Operations a second since the step began.
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate to be read")]
    fn rate(&self, operations: u64) -> String {
        let first = self.first.get().unwrap_or(operations);
        self.first.set(Some(first));
        let per_second = (operations - first) as f64 / self.begun.elapsed().as_secs_f64().max(1e-3);
        format!("{} queries/s", HumanCount(per_second as u64))
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
