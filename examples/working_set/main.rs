//! A program that starts over a long link, and what it touches first is there: recorded in one start, pulled first in the next.
//!
//! Role: the options, and the exit code. Neighbours: `host` is what a user starts and what serves the memory, `start` each process that it starts. Invariants: exits with 0 only if every byte
//! came and the working set survived; leaves no process behind, however it ends; keeps no file.

mod host;
#[path = "../common/link.rs"]
mod link;
mod program;
mod report;
mod start;
#[path = "../common/terminal.rs"]
mod terminal;

use clap::{Parser, Subcommand};
use link::Link;
use pageferry::PeerId;
use start::How;
use std::{net::SocketAddr, path::PathBuf, process::ExitCode, time::Duration};

/// Starts a program three times whose memory another process serves over a link of 10 ms: it computes over pages scattered through a large image, always the same ones in the same order.
///
/// The first start brings each page when it is touched, and records that. The second knows nothing and brings everything, by number. The third brings first what the first one touched.
///
/// Exit codes: 0, every byte came and the record survived; 1, not so, or the run failed; 2, wrong options; 130 and 143, ended by Ctrl-C or SIGTERM.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    role: Option<Role>,
    /// An image of 32 MiB and a working set of 1: for tests
    #[arg(long)]
    quick: bool,
    /// Size of the image in MiB [default: 256, with --quick 32]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=4096))]
    size: Option<u64>,
    /// What the program touches of it, in MiB [default: 8, with --quick 1]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1024))]
    touches: Option<u64>,
    #[command(flatten)]
    link: Link,
}

#[derive(Clone, Debug, Subcommand)]
enum Role {
    /// What the host starts: prints what came of its start as JSON
    #[command(hide = true)]
    Start {
        #[arg(long)]
        how: How,
        #[arg(long)]
        address: SocketAddr,
        #[arg(long)]
        peer: PeerId,
        #[arg(long)]
        key: PathBuf,
        #[arg(long)]
        set: PathBuf,
        #[arg(long)]
        touch_pages: u64,
    },
}

/// Unless another was asked for.
const RTT: Duration = Duration::from_millis(10);

impl Args {
    fn size_bytes(&self) -> u64 {
        self.size.unwrap_or(if self.quick { 32 } else { 256 }) << 20
    }

    /// No more than there is.
    fn touched_bytes(&self) -> u64 {
        (self.touches.unwrap_or(if self.quick { 1 } else { 8 }) << 20).min(self.size_bytes())
    }
}

fn main() -> ExitCode {
    let mut args = Args::parse();
    args.link = args.link.or_rtt(RTT);
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("working_set: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let code = runtime.block_on(async {
        match &args.role {
            Some(Role::Start { how, address, peer, key, set, touch_pages }) => {
                start::run(*how, (*address, *peer, key), set, *touch_pages, &args.link).await
            }
            None => tokio::select! {
                code = run_host(&args) => code,
                code = terminal::interrupted("working_set", "the program's process") => code,
            },
        }
    });
    // A thread that reads standard input, or waits for a page, ends with the process.
    runtime.shutdown_background();
    code
}

async fn run_host(args: &Args) -> ExitCode {
    match host::run(args).await {
        Ok(report) => {
            print!("{report}");
            if report.holds() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("working_set: {error}");
            ExitCode::FAILURE
        }
    }
}
