//! What the examples of moves have in common towards the person who runs them.
//!
//! Role: times as people read them, and the end that a person asks for. Neighbours: each example includes it as a module. Invariants: none of them knows what an example does.

#![allow(dead_code, reason = "each example uses its own part")]

use std::{process::ExitCode, time::Duration};
use tokio::signal::unix::{SignalKind, signal};

/// Three digits and the unit that fits.
pub fn time(time: Duration) -> String {
    let us = time.as_secs_f64() * 1e6;
    let (value, unit) = match us {
        us if us < 1e3 => (us, "us"),
        us if us < 1e6 => (us / 1e3, "ms"),
        us => (us / 1e6, "s"),
    };
    let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
    format!("{value:.digits$} {unit}")
}

/// Waits for Ctrl-C or SIGTERM, and says on standard error what that ends: its name, and the exit code as shells count it.
pub async fn interrupted(example: &str, with_it: &str) -> ExitCode {
    let wait = |kind: SignalKind| async move {
        match signal(kind) {
            Ok(mut signal) => signal.recv().await,
            // Without a handler the signal ends the process by itself.
            Err(_) => std::future::pending().await,
        }
    };
    let (name, code) = tokio::select! {
        _ = wait(SignalKind::interrupt()) => ("Ctrl-C", 130),
        _ = wait(SignalKind::terminate()) => ("SIGTERM", 143),
    };
    eprintln!("{example}: ended by {name}, and {with_it} with it");
    ExitCode::from(code)
}
