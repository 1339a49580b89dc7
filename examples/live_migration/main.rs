//! A search index moves to another owner while it answers queries.
//!
//! Role: the options, and the order of events. Neighbours: `source` and `destination` do the work of the two ends. Invariants:
//! exits with 0 only if the counters add up and both ends' digests are equal.

mod build;
mod corpus;
mod destination;
mod index;
mod ledger;
mod load;
mod proof;
mod report;
mod search;
mod source;
mod timeline;
mod word;

use clap::Parser;
use destination::{Arrival, Outcome};
use index::{Index, MAX_WORKERS};
use load::{Load, encode};
use pageferry::{Region, RegionStore};
use report::{Progress, Report};
use std::{
    error::Error,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use timeline::Clock;

/// Every run asks for the same words in the same order.
const SEED: u64 = 0x7061_6765_6665_7272;
/// How often the progress of the pages is looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Builds a word index over this machine's files in one region, queries it at full speed, and moves it while it is queried.
#[derive(Clone, Debug, Parser)]
#[command(version)]
struct Args {
    /// A region of 64 MiB and one second of load, without progress bars: for tests
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
}

impl Args {
    fn size_bytes(&self) -> u64 {
        self.size.unwrap_or(if self.quick { 64 } else { 512 }) << 20
    }

    fn load_time(&self) -> Duration {
        Duration::from_secs(self.seconds.unwrap_or(if self.quick { 1 } else { 5 }))
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    match run_source(&Args::parse()).await {
        Ok(report) => {
            println!("{report}");
            if report.is_proved() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("live_migration: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What goes to the destination, beside the pages.
struct Handover {
    pages: RegionStore,
    state: Vec<u8>,
    epoch_unix_us: u64,
    stopped_at: Instant,
}

/// Process A: builds, runs the load, hands it over, and proves what the destination reports.
async fn run_source(args: &Args) -> Result<Report, Box<dyn Error + Send + Sync>> {
    let progress = Progress::new(args.quick);
    let built = source::build(args.size_bytes(), &progress)?;
    let (clock, running) = (Clock::starting_now(), Arc::new(AtomicBool::new(true)));
    let states = load::new_states(usize::try_from(args.workers)?, SEED);
    let load = Load::start(&built.region, &states, clock, |_| gate(&running))?;
    tokio::time::sleep(args.load_time()).await;

    running.store(false, Relaxed);
    let observed = load.join()?;
    let (state, stopped_at) = (encode(&observed.states), Instant::now());
    let handover = Handover { pages: RegionStore::new(&built.region), state, epoch_unix_us: clock.epoch_unix_us(), stopped_at };
    let line = run_destination(args, &progress, handover).await?;

    let destination = Outcome::from_line(&line)?;
    let source_totals = ledger::verify(&Index::attach(&built.region)?, &observed.states)?;
    let expected = proof::expected_digest(&built.region, &observed.states, &destination.observed.states)?;
    Ok(Report {
        size_bytes: args.size_bytes(),
        index: built.header,
        built_in: built.took,
        source: observed,
        source_totals,
        destination,
        expected_digest: expected.to_hex().to_string(),
    })
}

/// Process B: goes on at once, lets the pages come behind it, and tells what came of it.
async fn run_destination(args: &Args, progress: &Progress, handover: Handover) -> Result<String, Box<dyn Error + Send + Sync>> {
    let region = Region::builder().name(source::REGION).store(handover.pages).open()?;
    let running = Arc::new(AtomicBool::new(true));
    let clock = Clock::since(handover.epoch_unix_us);
    let load = destination::resume(&region, &handover.state, clock, |_| gate(&running))?;
    let started_at = Instant::now();
    let pulled = follow(&region, &load, progress).await;
    let until_last_page = started_at.elapsed();
    load.mark();
    if pulled.is_ok() {
        tokio::time::sleep(args.load_time()).await;
    }
    running.store(false, Relaxed);
    let arrival = Arrival::of(&region, started_at - handover.stopped_at, until_last_page);
    let outcome = destination::conclude(load, &region, arrival, &args.ask);
    pulled?;
    Ok(outcome?.to_line())
}

/// Pulls all pages and shows how many are here.
async fn follow(region: &Region, load: &Load, progress: &Progress) -> Result<(), pageferry::RegionError> {
    let step = progress.begin("pages arrive", region.len() as u64);
    let mut look = tokio::time::interval(LOOK);
    let pull = region.pull();
    tokio::pin!(pull);
    let pulled = loop {
        tokio::select! {
            pulled = &mut pull => break pulled,
            _ = look.tick() => step.arrived(region, load.operations()),
        }
    };
    step.arrived(region, load.operations());
    step.done();
    pulled
}

/// Open until `running` is false.
fn gate(running: &Arc<AtomicBool>) -> impl FnMut() -> bool + Send + use<> {
    let running = Arc::clone(running);
    move || running.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_running_index_moves_without_losing_an_update() {
        if !pageferry::Capabilities::probe().userfaultfd() {
            eprintln!("skipped: this kernel or user has no userfaultfd");
            return;
        }
        let args = Args::parse_from(["live_migration", "--quick", "--size", "8", "--seconds", "1", "--workers", "3"]);
        let report = run_source(&args).await.unwrap();
        assert!(report.is_proved(), "{report}");
        let during = &report.destination.observed.phases[0];
        assert!(report.destination.arrival.faults > 0 && during.operations > 0, "it ran while pages arrived:\n{report}");
    }
}
