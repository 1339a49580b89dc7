//! What the benches share.
//!
//! Role: arguments, processes, page content, the measuring loop and its report. Neighbours: each bench names its cases, `goals` what they
//! are compared with. Invariants: every figure has a baseline in the same run; what was moved is checked; two ends are two processes.

#![allow(dead_code, reason = "each bench uses a part")]

pub mod args;
pub mod bounds;
pub mod far_end;
pub mod goals;
pub mod guest;
pub mod measure;
pub mod mover;
pub mod pages;
pub mod plain_quinn;
pub mod qemu;
pub mod quic;
pub mod raw;
pub mod raw_writes;
pub mod results;
pub mod server;
pub mod text;
pub mod timeline;
pub mod udp;
pub mod writer;

/// An error ends a bench with its text; what was moved wrongly is one.
pub type Result<T> = std::result::Result<T, AnyError>;

/// What it can end with.
pub type AnyError = Box<dyn std::error::Error + Send + Sync>;

/// Bytes in a page of every image.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes in a binary megabyte; figures called `mb_s` count 1e6 bytes.
pub const MIB: u64 = 1 << 20;

/// Runs a far end if this process was started as one, else the bench.
pub fn run(name: &'static str, bench: impl FnOnce(&args::Args) -> Result<measure::Measured>) -> std::process::ExitCode {
    let args = args::Args::read();
    let ran = match args.role() {
        Some(udp::ROLE) => udp::far_end().map(|()| true),
        Some(server::ROLE) => server::far_end().map(|()| true),
        Some(mover::ROLE) => mover::far_end().map(|()| true),
        Some(other) => Err(format!("there is no role '{other}'").into()),
        // `cargo test --benches` comes by without optimisation: its figures would mislead whoever reads them.
        None if cfg!(debug_assertions) => {
            println!("{name}: not measured in a debug build; use cargo bench --bench {name}");
            Ok(true)
        }
        None => bench(&args).and_then(|measured| results::report(name, &args, &measured)),
    };
    match ran {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => std::process::ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{name}: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
