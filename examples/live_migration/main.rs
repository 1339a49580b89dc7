//! A search index moves to another process while it answers queries.
//!
//! Role: the options, and the exit code. Neighbours: `source` is what a user starts, `destination` the process that it starts. Invariants:
//! exits with 0 only if the proof holds; leaves no process behind, however it ends; keeps no file.

mod build;
mod corpus;
mod destination;
mod index;
mod ledger;
#[path = "../common/link.rs"]
mod link;
mod load;
mod messages;
mod process;
mod progress;
mod proof;
mod report;
mod search;
mod source;
#[path = "../common/terminal.rs"]
mod terminal;
mod timeline;
mod word;

use clap::{Parser, Subcommand};
use index::MAX_WORKERS;
use link::Link;
use std::{io, process::ExitCode, time::Duration};
use terminal::interrupted;
use tokio::runtime::Runtime;
use tracing_subscriber::EnvFilter;

/// Builds a word index over this machine's files in one region, queries it at full speed, and moves it while it is queried.
///
/// One process builds the index and answers queries from it; a second one takes over memory and work, and answers on while the pages
/// follow. In the end both compare what they hold.
///
/// Exit codes: 0, the proof holds; 1, it fails or the run did; 2, wrong options; 130 and 143, ended by Ctrl-C or SIGTERM.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// A region of 64 MiB and one second of load at each end, without progress bars: for tests
    #[arg(long)]
    quick: bool,
    /// Size of the region in MiB [default: 512, with --quick 64]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    size: Option<u64>,
    /// Seconds of load at each end, beside the migration [default: 5, with --quick 1]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: Option<u64>,
    /// Threads that query
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=MAX_WORKERS as u64))]
    workers: u64,
    /// One or two words to look up at the destination in the end
    #[arg(long, value_name = "WORDS", default_value = "shared memory")]
    ask: String,
    #[command(flatten)]
    link: Link,
}

impl Args {
    fn size_bytes(&self) -> u64 {
        self.size.unwrap_or(if self.quick { 64 } else { 512 }) << 20
    }

    fn load_time(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 1 } else { 5 }))
    }
}

#[derive(Clone, Copy, Debug, Subcommand)]
enum Role {
    /// What the source starts: speaks JSON on its standard streams
    #[command(name = process::DESTINATION, hide = true)]
    Destination,
}

fn main() -> ExitCode {
    let args = Args::parse();
    // RUST_LOG=pageferry=debug shows what the library does.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).with_writer(io::stderr).init();
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("live_migration: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        match args.role {
            Some(Role::Destination) => destination::run(&args.link).await,
            None => tokio::select! {
                code = run_source(&args) => code,
                code = interrupted("live_migration", "the destination") => code,
            },
        }
    });
    // Threads that read files or answer queries end with the process.
    runtime.shutdown_background();
    code
}

async fn run_source(args: &Args) -> ExitCode {
    match source::run(args).await {
        Ok(report) => {
            print!("{report}");
            if report.is_proved() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("live_migration: {error}");
            ExitCode::FAILURE
        }
    }
}
