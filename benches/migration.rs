//! A running program moves: how long that takes, how long it stands still, and what it notices.
//!
//! Role: judges every strategy of a move beside what the network and a bulk read allow in the same run, and beside QEMU. Neighbours: benches/README.md says what each key is; the program is
//! a `writer`, at the source in a `mover`; `qemu` moves its twin, `timeline` keeps what happened when. Invariants: no write is lost or repeated, or the bench ends; the downtime is
//! from the last operation at the source to the first at the destination, by the same clock.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, a_gib, in_rounds, loopback_bytes},
    mover::{Mover, REGION, image},
    plain_quinn::{ETHERNET_MTU, Options},
    qemu::{Qemu, QemuMove},
    quic::Ferry,
    raw,
    server::{Content, Server},
    timeline::{self, Wire},
    writer::{PAGES_S, Writer, check, now_ns},
};
use pageferry::{DEFAULT_POLL_BUDGET, Destination, Identity, Pager, PagerOptions, Peer, Region, Strategy, TransportOptions, Trust};
use serde_json::{Map, Value};
use std::{
    cell::{Cell, RefCell},
    process::ExitCode,
    time::{Duration, Instant},
};

const SEED: u64 = 0x3;
/// Odd, so that a median is a round's figure; and those of `--quick`, of which all ways have to fit into 40 s.
const ROUNDS: usize = 5;
const ROUNDS_QUICK: usize = 3;
/// How long the program runs after it was moved.
const AFTER: Duration = Duration::from_millis(300);

fn main() -> ExitCode {
    common::run("migration", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = args.bulk_bytes();
    let image = image(bytes, SEED);
    let full_bytes = image.full_pages() * PAGE_BYTES;
    let server = RefCell::new(Server::start(Content::Incompressible, full_bytes, SEED)?);
    let wants_qemu = args.wants(&QEMU_POST) || args.wants(&QEMU_PRE);
    let qemu = if wants_qemu { Qemu::find(&image) } else { Err("not asked for".into()) };
    // Of the round before, or of this one: every second round runs backwards.
    let pull_s = Cell::new(f64::NAN);
    let before = Duration::from_millis(if args.quick { 600 } else { 1500 });
    let stage = Stage { bytes, before, pull_s: &pull_s, moves: RefCell::default() };
    let mut cases = vec![
        Case::new(["move_pull_mb_s", "bound_total_s"], |_| {
            let rate = pull(&mut server.borrow_mut())?;
            pull_s.set(full_bytes as f64 / 1e6 / rate);
            Ok(vec![rate, pull_s.get()])
        }),
        Case::new(["live_pull_s"], |_| Ok(vec![live_pull_s(bytes)?])),
        Case::new(POST, |_| stage.run("post", Strategy::post_copy(), Some(2.0))),
        Case::new(PRE, |_| stage.run("pre", Strategy::pre_copy(), None)),
        Case::new(HYBRID, |_| stage.run("hybrid", Strategy::hybrid(), Some(3.0))),
    ];
    if let Ok(qemu) = &qemu {
        cases.push(Case::new(QEMU_POST, |_| {
            let QemuMove { total_s, downtime_ms, sent_mb, writer_ratio, cpu_s_gib, blocked_ms, blocktime_ms, faults } =
                qemu.run(&image, true, before)?;
            Ok(vec![total_s, downtime_ms, sent_mb, writer_ratio, cpu_s_gib, blocked_ms, blocktime_ms, faults])
        }));
        cases.push(Case::new(QEMU_PRE, |_| {
            let QemuMove { total_s, downtime_ms, sent_mb, writer_ratio, cpu_s_gib, .. } = qemu.run(&image, false, before)?;
            Ok(vec![total_s, downtime_ms, sent_mb, writer_ratio, cpu_s_gib])
        }));
    }
    cases = cases.into_iter().map(|case| case.after(|| raw::have_memory(bytes))).collect();
    let mut measured = in_rounds(args, if args.quick { ROUNDS_QUICK } else { ROUNDS }, cases)?;
    measured.notes.push(format!(
        "{} MiB, 60 % incompressible and 40 % zero; the writer dirties {PAGES_S} pages a second of a hot set of 64 MiB; loopback, MTU {ETHERNET_MTU}.",
        bytes / MIB
    ));
    match &qemu {
        Ok(qemu) => {
            measured.words.push(("qemu", qemu.about.clone()));
            measured.notes.push(format!(
                "Beside it {}: a guest with the same content and load, over plain TCP; pageferry encrypts.",
                qemu.about
            ));
        }
        Err(why) => measured.notes.push(format!("QEMU was not measured: {why}.")),
    }
    if let Some(file) = args.json_file()? {
        let file = timeline::file_beside(file);
        std::fs::write(&file, serde_json::to_string(&stage.moves.take())? + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
    }
    Ok(measured)
}

const POST: [&str; 9] = [
    "post_total_s",
    "post_downtime_ms",
    "post_sent_mb",
    "post_faults",
    "post_blocked_ms",
    "post_stall_us_p99",
    "post_writer_ratio",
    "post_cpu_s_gib",
    "bound_post_downtime_ms",
];
const PRE: [&str; 8] = [
    "pre_total_s",
    "pre_downtime_ms",
    "pre_sent_mb",
    "pre_faults",
    "pre_blocked_ms",
    "pre_stall_us_p99",
    "pre_writer_ratio",
    "pre_cpu_s_gib",
];
const HYBRID: [&str; 9] = [
    "hybrid_total_s",
    "hybrid_downtime_ms",
    "hybrid_sent_mb",
    "hybrid_faults",
    "hybrid_blocked_ms",
    "hybrid_stall_us_p99",
    "hybrid_writer_ratio",
    "hybrid_cpu_s_gib",
    "bound_hybrid_downtime_ms",
];
const QEMU_POST: [&str; 8] = [
    "qemu_post_total_s",
    "qemu_post_downtime_ms",
    "qemu_post_sent_mb",
    "qemu_post_writer_ratio",
    "qemu_post_cpu_s_gib",
    "qemu_post_blocked_ms",
    "qemu_post_blocktime_ms",
    "qemu_post_faults",
];
const QEMU_PRE: [&str; 5] =
    ["qemu_pre_total_s", "qemu_pre_downtime_ms", "qemu_pre_sent_mb", "qemu_pre_writer_ratio", "qemu_pre_cpu_s_gib"];

/// A bulk read of as many bytes that are not zero.
fn pull(server: &mut Server) -> Result<f64> {
    let ferry = Ferry::connect(server, Options::Tuned { mtu: ETHERNET_MTU }, DEFAULT_POLL_BUDGET)?;
    ferry.warm_up(server)?;
    let region = ferry.region().open()?;
    let start = Instant::now();
    ferry.pull(&region)?;
    Ok(common::measure::mb_s(region.size_bytes(), start))
}

/// A bulk read of the program's own memory while it writes: what a move of it cannot be faster than, as its pages go the same way by the same code and its program does not stop.
fn live_pull_s(bytes: u64) -> Result<f64> {
    let identity = Identity::generate()?;
    let mover = Mover::stay(bytes, SEED, identity.peer_id(), ETHERNET_MTU)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let transport = TransportOptions { mtu_max_bytes: ETHERNET_MTU, ..TransportOptions::default() };
    let pager = Pager::start(&PagerOptions::default())?;
    let peer = Peer::builder(mover.address, Trust::ids([mover.id]), &identity).transport(transport).service(pager.service());
    let peer = runtime.block_on(peer.connect())?;
    let start = Instant::now();
    let region = Region::builder().pager(&pager).store(runtime.block_on(peer.open(REGION))?).open()?;
    runtime.block_on(region.pull())?;
    let took_s = start.elapsed().as_secs_f64();
    let image = image(bytes, SEED);
    image.check(1 + common::writer::HOT_PAGES..image.pages(), |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))?;
    Ok(took_s)
}

struct Stage<'a> {
    bytes: u64,
    /// How long the program runs before it is moved.
    before: Duration,
    pull_s: &'a Cell<f64>,
    /// The time line of the last move of each name.
    moves: RefCell<Map<String, Value>>,
}

impl Stage<'_> {
    /// One move: the figures in the order of the keys above. `slack_ms` is what the downtime may exceed two round trips by, if there is a limit.
    fn run(&self, name: &str, strategy: Strategy, slack_ms: Option<f64>) -> Result<Vec<f64>> {
        let identity = Identity::generate()?;
        let mut mover = Mover::start(self.bytes, SEED, identity.peer_id(), ETHERNET_MTU)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let transport = TransportOptions { mtu_max_bytes: ETHERNET_MTU, ..TransportOptions::default() };
        let pager = Pager::start(&PagerOptions::default())?;
        let destination = Destination::builder(mover.address, Trust::ids([mover.id]), &identity).pager(&pager).transport(transport);
        let destination = runtime.block_on(destination.connect())?;
        let wire = Wire::watch();
        let rate_before = {
            let (start, before) = (Instant::now(), mover.done()?);
            std::thread::sleep(self.before);
            (mover.done()? - before) as f64 / start.elapsed().as_secs_f64()
        };
        let round_trip_ms = destination.peer().rtt().ok_or("the connection is gone")?.as_secs_f64() * 1e3;
        let (cpu_before_s, sent_before) = (mover.cpu_of_both_s()?, loopback_bytes()?);
        let (start, asked_ns, done_before) = (Instant::now(), now_ns(), mover.done()?);

        let moved = runtime.block_on(destination.take(strategy))?;
        let region = moved.region(REGION).ok_or("the region did not come")?;
        let writer = Writer::start(&region, None);
        runtime.block_on(moved.complete())?;
        let (total_s, complete_ns) = (start.elapsed().as_secs_f64(), now_ns());
        let done_there = writer.done();
        let (sent, faults) = (loopback_bytes()? - sent_before, region.stats().faults);
        let cpu_s = mover.cpu_of_both_s()? - cpu_before_s;
        std::thread::sleep(AFTER);
        let there = writer.stop()?;
        let here = mover.left()?;
        let line = timeline::of_move(asked_ns, complete_ns, &here, &there, &wire.seen()?);
        self.moves.borrow_mut().insert(name.into(), line);

        let image = image(self.bytes, SEED);
        check(&region, here.operations + there.operations, |page, into| {
            if page > 0 {
                image.fill(page, into);
            }
        })?;
        image.check(1 + common::writer::HOT_PAGES..image.pages(), |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))?;

        let downtime_ms = there.first_ns.saturating_sub(here.last_ns) as f64 / 1e6;
        let mut stalls: Vec<u64> = there.took_ns[..done_there as usize].to_vec();
        let blocked_ms = stalls.iter().sum::<u64>() as f64 / 1e6;
        stalls.sort_unstable();
        let p99 = stalls.get(stalls.len().saturating_sub(1) * 99 / 100).copied().unwrap_or(0) as f64 / 1e3;
        let done = (here.operations - done_before + done_there) as f64;
        let ratio = done / total_s / rate_before;
        eprintln!(
            "  {name}: {total_s:.2} s beside {:.2} s; the source measured a pause of {:.2} ms; round trip {round_trip_ms:.2} ms",
            self.pull_s.get(),
            here.downtime_ms
        );
        let figures = [total_s, downtime_ms, sent as f64 / 1e6, faults as f64, blocked_ms, p99, ratio, a_gib(cpu_s, self.bytes)];
        Ok(figures.into_iter().chain(slack_ms.map(|slack_ms| 2.0 * round_trip_ms + slack_ms)).collect())
    }
}
