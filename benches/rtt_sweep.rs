//! Memory of a peer that is 0 to 50 ms away: the first page, pages on demand, all of it with a background pull, and all of it written back.
//!
//! Role: the thesis's main experiment ("Efficient Synchronization of Linux Memory Regions over a Network"), with the same bytes for every method and every round trip. Neighbours: `common`; the
//! link is pageferry's own shaper under the client's socket; benches/README.md says what each key is. Invariants: every case has a connection of its own, warm as in `throughput`, and a mount of its own, whose opening counts; what
//! was read is checked after the clock has stopped, what was written at the peer.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, in_rounds, mb_s},
    pages::Image,
    plain_quinn::ETHERNET_MTU,
    quic::Ferry,
    raw,
    server::{Content, Server},
};
use pageferry::{FaultAround, Mount, Region};
use std::{
    cell::RefCell,
    process::ExitCode,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

const SEED: u64 = 0x5;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 3;
const RTTS_MS: [u64; 6] = [0, 1, 5, 10, 25, 50];
/// Those that targets compare.
const RTTS_QUICK_MS: [u64; 2] = [0, 25];
/// Demand alone would take minutes over a far link: it is measured for this long, on as many pages as that gives.
const DEMAND: Duration = Duration::from_millis(800);

fn main() -> ExitCode {
    common::run("rtt_sweep", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = if args.quick { 128 * MIB } else { 256 * MIB };
    let rtts = if args.quick { &RTTS_QUICK_MS[..] } else { &RTTS_MS[..] };
    let server = RefCell::new(Server::start(Content::Incompressible, bytes, SEED)?);
    let server = &server;
    let mut cases = Vec::new();
    for rtt_ms in rtts.iter().copied() {
        let key = move |name: &str| -> &'static str { format!("{name}_rtt{rtt_ms}").leak() };
        let rtt = Duration::from_millis(rtt_ms);
        let with = move |run: fn(&Far) -> Result<Vec<f64>>| {
            move |_| {
                let far = Far::new(&mut server.borrow_mut(), rtt)?;
                run(&far)
            }
        };
        cases.push(Case::new([key("first_page_ms"), key("bound_first_page_ms")], with(first_page)));
        cases.push(Case::new([key("demand_random_mb_s")], with(demand_random)));
        cases.push(Case::new([key("demand_seq_mb_s")], with(demand_seq)));
        cases.push(Case::new([key("single_random_mb_s"), key("single_seq_mb_s")], with(single)));
        cases.push(Case::new([key("managed_mb_s"), key("prepulled_mb")], with(managed)));
        cases.push(Case::new([key("write_mb_s")], with(write)));
    }
    let cases = cases.into_iter().map(|case| case.after(|| raw::have_memory(bytes))).collect();
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    for rtt_ms in rtts {
        for (derived, way, beside) in
            [("ahead_gain", "demand_seq", "single_seq"), ("random_ahead_ratio", "demand_random", "single_random")]
        {
            let of = |way: &str| measured.median(&format!("{way}_mb_s_rtt{rtt_ms}"));
            if let (Some(ahead), Some(single)) = (of(way), of(beside)) {
                measured.derived.push((format!("{derived}_rtt{rtt_ms}").leak(), ahead / single));
            }
        }
    }
    measured.notes.push(format!(
        "{} MiB for every method and round trip, datagrams of {ETHERNET_MTU} bytes, delayed by the shaper under the client's socket, which is there at 0 ms too.",
        bytes / MIB
    ));
    measured.notes.push(
        "The thesis, on its own machine: first page at 0 ms: disk 4.0 us, userfaultfd 58, direct 115, managed 160; at 0 ms memory 20 GB/s, direct 2.8, managed 2.4, userfaultfd 0.45; managed 0.5 GB/s at 25 ms; \
         writes: managed 0.23 GB/s, direct below 1 MB/s at 4 ms."
            .into(),
    );
    Ok(measured)
}

/// A peer's memory at the other end of a link.
struct Far {
    ferry: Ferry,
    rtt: Duration,
    image: Image,
}

impl Far {
    fn new(server: &mut Server, rtt: Duration) -> Result<Far> {
        let ferry = Ferry::over_a_link(server, ETHERNET_MTU, rtt)?;
        ferry.warm_up(server)?;
        Ok(Far { ferry, rtt, image: Image::incompressible(server.image().pages() * PAGE_BYTES, SEED) })
    }

    fn direct(&self) -> Result<Mount> {
        Ok(Mount::builder(self.ferry.store()).pager(&self.ferry.pager).direct().open()?)
    }

    /// Fails unless the first word of a page is right.
    fn touch(&self, region: &Region, page: u64) -> Result<()> {
        let (at, expected) = self.image.probe(page);
        let word = &region.atomics_u64(page * PAGE_BYTES + 8 * at as u64, 1)?[0];
        if word.load(Relaxed) == expected { Ok(()) } else { Err(format!("page {page} is wrong").into()) }
    }
}

fn first_page(far: &Far) -> Result<Vec<f64>> {
    let start = Instant::now();
    let mount = far.direct()?;
    far.touch(mount.region(), 4711)?;
    let took_ms = start.elapsed().as_secs_f64() * 1e3;
    Ok(vec![took_ms, 1.1 * far.rtt.as_secs_f64() * 1e3 + 2.0])
}

fn demand_random(far: &Far) -> Result<Vec<f64>> {
    let mount = far.direct()?;
    demand(far, &mount, random_order(far))
}

/// A step that shares no factor with a power of two visits every page once.
fn random_order(far: &Far) -> impl Iterator<Item = u64> {
    let pages = far.image.pages();
    (0..pages).map(move |at| at.wrapping_mul(0x9E37_79B1) % pages)
}

/// What there was before read-ahead: a page for each fault and no other.
fn single(far: &Far) -> Result<Vec<f64>> {
    let mount = || {
        let mount = Mount::builder(far.ferry.store()).pager(&far.ferry.pager).direct();
        mount.fault_around(FaultAround::OFF).open()
    };
    let random = demand(far, &mount()?, random_order(far))?;
    let seq = demand(far, &mount()?, 0..far.image.pages())?;
    Ok([random, seq].concat())
}

fn demand_seq(far: &Far) -> Result<Vec<f64>> {
    let mount = far.direct()?;
    demand(far, &mount, 0..far.image.pages())
}

fn demand(far: &Far, mount: &Mount, order: impl Iterator<Item = u64>) -> Result<Vec<f64>> {
    let (start, mut touched) = (Instant::now(), 0);
    for page in order {
        far.touch(mount.region(), page)?;
        touched += 1;
        if start.elapsed() > DEMAND {
            break;
        }
    }
    Ok(vec![mb_s(touched * PAGE_BYTES, start)])
}

fn managed(far: &Far) -> Result<Vec<f64>> {
    let start = Instant::now();
    let mount = Mount::builder(far.ferry.store()).pager(&far.ferry.pager).open()?;
    let prepulled_mb = (mount.region().residency().resident * PAGE_BYTES) as f64 / 1e6;
    for page in 0..far.image.pages() {
        far.touch(mount.region(), page)?;
    }
    far.ferry.wait(mount.pulled())?;
    let rate = mb_s(mount.region().size_bytes(), start);
    far.image.check(0..far.image.pages(), |page, into| Ok(mount.region().read_at(page * PAGE_BYTES, into)?))?;
    Ok(vec![rate, prepulled_mb])
}

fn write(far: &Far) -> Result<Vec<f64>> {
    let mount = Mount::builder(far.ferry.store()).pager(&far.ferry.pager).push_every(Duration::from_secs(3600)).open()?;
    far.ferry.wait(mount.pulled())?;
    let region = mount.region();
    // What was there, so that the next case finds it: a write is a write, whatever it changes.
    for page in 0..far.image.pages() {
        let (at, value) = far.image.probe(page);
        region.atomics_u64(page * PAGE_BYTES + 8 * at as u64, 1)?[0].store(value, Relaxed);
    }
    let start = Instant::now();
    let pushed = far.ferry.wait(mount.flush())?;
    let rate = mb_s(pushed.pages * PAGE_BYTES, start);
    if pushed.pages != far.image.pages() {
        return Err(format!("{} of {} pages were pushed", pushed.pages, far.image.pages()).into());
    }
    Ok(vec![rate])
}
