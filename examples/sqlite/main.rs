//! A SQLite database moves between two processes while transactions run in it.
//!
//! Role: the options, and the exit code. Neighbours: `run` is what a user starts, `host` each of the two processes that it starts. Invariants: exits with 0 only if the proof holds;
//! leaves no process behind, however it ends; keeps no file.

mod bank;
mod disk;
mod host;
mod journal;
#[path = "../common/link.rs"]
mod link;
mod messages;
mod process;
mod proof;
mod report;
mod run;
#[path = "../common/terminal.rs"]
mod terminal;
mod vfs;

use clap::{Parser, Subcommand, ValueEnum};
use link::Link;
use pageferry::{AtLimit, Capabilities, Strategy};
use std::{io, process::ExitCode, time::Duration};
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

/// Keeps a SQLite database in a region, makes transactions in it without a break, and moves it between two processes meanwhile.
///
/// A bank is founded at host A; a clerk transfers money between its accounts. The program moves to host B, back to A and so on. In the end the database is examined and compared
/// with what the clerk acknowledged.
///
/// Exit codes: 0, the proof holds; 1, it fails or the run did; 2, wrong options.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// A database of 16 MiB and one second of load at each stay: for tests
    #[arg(long)]
    quick: bool,
    /// Size of the database in MiB [default: 256, with --quick 16]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    size: Option<u64>,
    /// Seconds of load before, between and after the moves [default: 3, with --quick 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=120))]
    seconds: Option<u64>,
    /// How often the program moves
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..=20))]
    moves: u32,
    /// How its memory moves
    #[arg(long, value_enum, default_value_t = Way::Hybrid)]
    strategy: Way,
    #[command(flatten)]
    link: Link,
}

impl Args {
    fn size_bytes(&self) -> u64 {
        self.size.unwrap_or(if self.quick { 16 } else { 256 }) << 20
    }

    fn load_time(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 1 } else { 3 }))
    }
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Role {
    /// What a run starts twice: speaks JSON on its standard streams
    #[command(name = process::HOST, hide = true)]
    Host,
}

/// [`Strategy`], by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    /// The program moves first, its pages follow
    PostCopy,
    /// The pages are copied first, the program moves when few are left
    PreCopy,
    /// The pages are copied first for as long as that helps; then the program moves, and the rest follows
    Hybrid,
}

impl Way {
    fn strategy(self) -> Strategy {
        match self {
            Way::PostCopy => Strategy::post_copy(),
            // A machine that transfers money faster than pages shall see a move all the same.
            Way::PreCopy => Strategy::pre_copy().at_limit(AtLimit::Force),
            Way::Hybrid => Strategy::hybrid(),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    // RUST_LOG=pageferry=debug shows what the library does.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(io::stderr).init();
    match args.role {
        Some(Role::Host) => host(&args.link),
        None => parent(&args),
    }
}

fn host(link: &Link) -> ExitCode {
    match Runtime::new() {
        Ok(runtime) => {
            let code = runtime.block_on(host::run(link));
            // Threads that read orders or make transfers end with the process.
            runtime.shutdown_background();
            code
        }
        Err(error) => {
            eprintln!("sqlite, host: no runtime: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parent(args: &Args) -> ExitCode {
    if let Err(error) = Capabilities::probe().require_userfaultfd() {
        eprintln!("sqlite: {error}");
        return ExitCode::FAILURE;
    }
    match run::run(args) {
        Ok(report) => {
            print!("{report}");
            if report.is_proved() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("sqlite: {error}");
            ExitCode::FAILURE
        }
    }
}
