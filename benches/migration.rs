//! A running program moves: how long that takes, how long it stands still, and what it notices.
//!
//! Role: judges every strategy of a move beside what the network and a bulk read allow in the same run. Neighbours: benches/README.md says what each key is; the program is a `writer`, at
//! the source in a `mover`. Invariants: no write is lost or repeated, or the bench ends; the downtime is from the last operation at the source to the first at the
//! destination, by the same clock.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, a_gib, in_rounds},
    mover::{Mover, REGION, image},
    plain_quinn::{ETHERNET_MTU, Options},
    quic::Ferry,
    raw,
    server::{Content, Server},
    writer::{PAGES_S, Writer, check},
};
use pageferry::{DEFAULT_POLL_BUDGET, Destination, Identity, Pager, PagerOptions, Strategy, TransportOptions, Trust};
use std::{
    cell::{Cell, RefCell},
    process::ExitCode,
    time::{Duration, Instant},
};

const SEED: u64 = 0x3;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 5;
/// How long the program runs before it is moved, and after.
const BEFORE: Duration = Duration::from_millis(1500);
const AFTER: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    common::run("migration", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = args.bulk_bytes();
    let full_bytes = image(bytes, SEED).full_pages() * PAGE_BYTES;
    let server = RefCell::new(Server::start(Content::Incompressible, full_bytes, SEED)?);
    // Of the round before, or of this one: every second round runs backwards.
    let pull_s = Cell::new(f64::NAN);
    let stage = Stage { bytes, pull_s: &pull_s };
    let mut cases = vec![
        Case::new(["move_pull_mb_s", "bound_total_s"], |_| {
            let rate = pull(&mut server.borrow_mut())?;
            pull_s.set(full_bytes as f64 / 1e6 / rate);
            Ok(vec![rate, pull_s.get()])
        }),
        Case::new(POST, |_| stage.run(Strategy::post_copy(), Some(2.0))),
        Case::new(PRE, |_| stage.run(Strategy::pre_copy(), None)),
        Case::new(HYBRID, |_| stage.run(Strategy::hybrid(), Some(3.0))),
    ];
    cases = cases.into_iter().map(|case| case.after(|| raw::have_memory(bytes))).collect();
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    measured.notes.push(format!(
        "{} MiB, 60 % incompressible and 40 % zero; the writer dirties {PAGES_S} pages a second of a hot set of 64 MiB; loopback, MTU {ETHERNET_MTU}.",
        bytes / MIB
    ));
    Ok(measured)
}

const POST: [&str; 8] = [
    "post_total_s",
    "post_downtime_ms",
    "post_sent_mb",
    "post_faults",
    "post_stall_us_p99",
    "post_writer_ratio",
    "post_cpu_s_gib",
    "bound_post_downtime_ms",
];
const PRE: [&str; 7] =
    ["pre_total_s", "pre_downtime_ms", "pre_sent_mb", "pre_faults", "pre_stall_us_p99", "pre_writer_ratio", "pre_cpu_s_gib"];
const HYBRID: [&str; 8] = [
    "hybrid_total_s",
    "hybrid_downtime_ms",
    "hybrid_sent_mb",
    "hybrid_faults",
    "hybrid_stall_us_p99",
    "hybrid_writer_ratio",
    "hybrid_cpu_s_gib",
    "bound_hybrid_downtime_ms",
];

/// A bulk read of as many bytes that are not zero.
fn pull(server: &mut Server) -> Result<f64> {
    let ferry = Ferry::connect(server, Options::Tuned { mtu: ETHERNET_MTU }, DEFAULT_POLL_BUDGET)?;
    ferry.warm_up(server)?;
    let region = ferry.region().open()?;
    let start = Instant::now();
    ferry.pull(&region)?;
    Ok(common::measure::mb_s(region.size_bytes(), start))
}

struct Stage<'a> {
    bytes: u64,
    pull_s: &'a Cell<f64>,
}

impl Stage<'_> {
    /// One move: the figures in the order of the keys above. `slack_ms` is what the downtime may exceed two round trips by, if there is a limit.
    fn run(&self, strategy: Strategy, slack_ms: Option<f64>) -> Result<Vec<f64>> {
        let identity = Identity::generate()?;
        let mut mover = Mover::start(self.bytes, SEED, identity.peer_id(), ETHERNET_MTU)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let transport = TransportOptions { mtu_max_bytes: ETHERNET_MTU, ..TransportOptions::default() };
        let pager = Pager::start(&PagerOptions::default())?;
        let destination = Destination::builder(mover.address, Trust::ids([mover.id]), &identity).pager(&pager).transport(transport);
        let destination = runtime.block_on(destination.connect())?;
        let rate_before = {
            let (start, before) = (Instant::now(), mover.done()?);
            std::thread::sleep(BEFORE);
            (mover.done()? - before) as f64 / start.elapsed().as_secs_f64()
        };
        let round_trip_ms = destination.peer().rtt().ok_or("the connection is gone")?.as_secs_f64() * 1e3;
        let (cpu_before_s, sent_before) = (mover.cpu_of_both_s()?, loopback_bytes()?);
        let (start, done_before) = (Instant::now(), mover.done()?);

        let moved = runtime.block_on(destination.take(strategy))?;
        let region = moved.region(REGION).ok_or("the region did not come")?;
        let writer = Writer::start(&region, None);
        runtime.block_on(moved.complete())?;
        let total_s = start.elapsed().as_secs_f64();
        let done_there = writer.done();
        let (sent, faults) = (loopback_bytes()? - sent_before, region.stats().faults);
        let cpu_s = mover.cpu_of_both_s()? - cpu_before_s;
        std::thread::sleep(AFTER);
        let there = writer.stop()?;
        let here = mover.left()?;

        let image = image(self.bytes, SEED);
        check(&region, here.operations + there.operations, |page, into| {
            if page > 0 {
                image.fill(page, into);
            }
        })?;
        image.check(1 + common::writer::HOT_PAGES..image.pages(), |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))?;

        let downtime_ms = there.first_ns.saturating_sub(here.last_ns) as f64 / 1e6;
        let mut stalls: Vec<u64> = there.took_ns[..done_there as usize].to_vec();
        stalls.sort_unstable();
        let p99 = stalls.get(stalls.len().saturating_sub(1) * 99 / 100).copied().unwrap_or(0) as f64 / 1e3;
        let done = (here.operations - done_before + done_there) as f64;
        let ratio = done / total_s / rate_before;
        eprintln!(
            "  {strategy:?}: {total_s:.2} s beside {:.2} s; the source measured a pause of {:.2} ms; round trip {round_trip_ms:.2} ms",
            self.pull_s.get(),
            here.downtime_ms
        );
        let figures = [total_s, downtime_ms, sent as f64 / 1e6, faults as f64, p99, ratio, a_gib(cpu_s, self.bytes)];
        Ok(figures.into_iter().chain(slack_ms.map(|slack_ms| 2.0 * round_trip_ms + slack_ms)).collect())
    }
}

/// Bytes that the loopback device has carried.
fn loopback_bytes() -> Result<u64> {
    Ok(std::fs::read_to_string("/sys/class/net/lo/statistics/tx_bytes")?.trim().parse()?)
}
