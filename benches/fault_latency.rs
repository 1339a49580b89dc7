//! One page, from touch to return: the bare kernel, UDP, a memory store, a peer over QUIC.
//!
//! Role: what a fault costs and where its time goes. Neighbours: `common`; benches/README.md says what each key is. Invariants: each way starts
//! every round with an empty region and touches the same pages in the same random order; the word touched is checked at once, the pages after.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, Times, in_rounds},
    pages::{Image, random_order},
    raw::{RawRegion, Stamps, stop_pipe},
    udp::PingPong,
};
use pageferry::{FaultAround, Hop, MemoryStore, PageSize, Pager, PagerOptions, Region};
use std::{process::ExitCode, sync::atomic::Ordering::Relaxed, time::Instant};

const REGION_BYTES: u64 = 256 * MIB;
const SEED: u64 = 0x1;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 7;
/// One in so many touches of the bare loop is repeated with stamps, which would make the baseline slower by 0.3 %.
const STAMPED: usize = 8;

const RAW: [&str; 6] = [
    "raw_us_p50",
    "raw_us_p99",
    "raw_hop_fault_us_mean",
    "raw_hop_install_us_mean",
    "raw_hop_wake_us_mean",
    "raw_hop_touch_us_mean",
];
const UDP: [&str; 2] = ["udp_us_p50", "udp_us_p99"];
const STORE: [&str; 8] = [
    "store_us_p50",
    "store_us_p99",
    "store_hop_fault_wake_us_mean",
    "store_hop_decide_us_mean",
    "store_hop_store_us_mean",
    "store_hop_install_us_mean",
    "store_hop_rest_us_mean",
    "store_hop_touch_us_mean",
];

fn main() -> ExitCode {
    common::run("fault_latency", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let touches = if args.quick { 8192 } else { (REGION_BYTES / PAGE_BYTES) as usize };
    let image = Image::incompressible(REGION_BYTES, SEED);
    let source = image.bytes();
    let store = MemoryStore::from_bytes(source.clone(), PageSize::KIB_4);
    let ping_pong = PingPong::start(REGION_BYTES, SEED)?;
    let order = |round: u64| random_order(image.pages(), touches, SEED + round);
    let quic = quic::Quic::start(REGION_BYTES, SEED)?;
    let mut cases = vec![
        Case::new(RAW, |round| raw(&image, &source, &order(round))),
        Case::new(UDP, |round| Ok(ping_pong.fetch(&image, &order(round))?.p50_p99_us().to_vec())),
        Case::new(STORE, |round| {
            let pager = Pager::start(&PagerOptions::default())?;
            let region = Region::builder().store(store.clone()).fault_around(FaultAround::OFF).pager(&pager).open()?;
            let mut times = touch_region(&image, &region, &order(round))?;
            Ok([&times.p50_p99_us()[..], &region_hops(&region, &times)?].concat())
        }),
    ];
    cases.extend(quic.cases(&order));
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    measured.notes.push(format!(
        "{touches} touches a round in a region of {} MiB; default options, no prefetch, loopback.",
        REGION_BYTES / MIB
    ));
    Ok(measured)
}

/// Touches one word of each page, times it and checks it.
fn touch(image: &Image, order: &[u64], word: impl Fn(usize) -> u64, mut touched: impl FnMut(Instant)) -> Result<Times> {
    let mut times = Times::with_capacity(order.len());
    for page in order {
        let (at, wanted) = image.probe(*page);
        let offset = (page * PAGE_BYTES) as usize + at * 8;
        let start = Instant::now();
        let got = word(offset);
        times.since(start);
        touched(start);
        if got != wanted {
            return Err(format!("page {page} gave {got:#x} for {wanted:#x} when touched").into());
        }
    }
    Ok(times)
}

fn raw(image: &Image, source: &[u8], order: &[u64]) -> Result<Vec<f64>> {
    let mut times = touch_raw(image, source, order, None, |_| {})?;
    let (stamps, mut fault, mut installed) = (Stamps::new(), Times::default(), Times::default());
    let stamped = touch_raw(image, source, &order[..order.len() / STAMPED], Some(&stamps), |start| {
        fault.push_us(stamps.read.take_us_after(start));
        installed.push_us(stamps.installed.take_us_after(start));
    })?;
    let (fault, installed, touch) = (fault.mean_us(), installed.mean_us(), stamped.mean_us());
    Ok([&times.p50_p99_us()[..], &[fault, installed - fault, touch - installed, touch]].concat())
}

fn touch_raw(image: &Image, source: &[u8], order: &[u64], stamps: Option<&Stamps>, touched: impl FnMut(Instant)) -> Result<Times> {
    let region = RawRegion::new(source.len())?;
    let (stopped, stop) = stop_pipe()?;
    let times = std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Err(error) = region.serve(source, &stopped, stamps) {
                // The toucher waits for a page that will never come.
                eprintln!("the bare loop: {error}");
                std::process::exit(1);
            }
        });
        let times = touch(image, order, |offset| region.word(offset), touched);
        drop(stop);
        times
    })?;
    image.check(order.iter().copied(), |page, into| {
        region.read((page * PAGE_BYTES) as usize, into);
        Ok(())
    })?;
    Ok(times)
}

fn touch_region(image: &Image, region: &Region, order: &[u64]) -> Result<Times> {
    let words = region.atomics_u64(0, region.len() / 8)?;
    let times = touch(image, order, |offset| words[offset / 8].load(Relaxed), |_| {})?;
    // Not `pages_demand`: the last page is counted after its toucher was woken.
    let stats = region.stats();
    let demanded = (stats.demand_requests, stats.around_requests, stats.faults_already_resident);
    if demanded != (order.len() as u64, 0, 0) {
        return Err(format!("{} touches were not as many faults of one page each: {stats:?}", order.len()).into());
    }
    image.check(order.iter().copied(), |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))?;
    Ok(times)
}

/// Mean microseconds by hop, as the keys of [`STORE`] name them. Means add up, medians do not; fault and wake are what the touch took
/// beyond the pager's total.
fn region_hops(region: &Region, times: &Times) -> Result<[f64; 6]> {
    let hops = region.hops().ok_or("a region with a store has hops")?;
    let [decide, store, install, total] =
        [Hop::Decide, Hop::Store, Hop::Install, Hop::Total].map(|hop| hops.hop(hop).mean().as_nanos() as f64 / 1e3);
    let touch = times.mean_us();
    Ok([touch - total, decide, store, install, total - decide - store - install, touch])
}

/// The same over QUIC, from one thread and from eight, by ends that poll and by ends that sleep.
mod quic {
    use super::{Case, FaultAround, Image, Region, Result, region_hops, touch, touch_region};
    use crate::common::{
        plain_quinn::{JUMBO_MTU, Options},
        quic::{Ferry, check, peer_hop_means_us},
        server::{Content, Server},
    };
    use pageferry::DEFAULT_POLL_BUDGET;
    use std::{
        cell::RefCell,
        sync::atomic::Ordering::Relaxed,
        time::{Duration, Instant},
    };

    const KEYS: [&str; 12] = [
        "quic_us_p50",
        "quic_us_p99",
        "quic_hop_fault_wake_us_mean",
        "quic_hop_decide_us_mean",
        "quic_hop_store_us_mean",
        "quic_hop_install_us_mean",
        "quic_hop_rest_us_mean",
        "quic_hop_touch_us_mean",
        "quic_hop_request_us_mean",
        "quic_hop_wire_us_mean",
        "quic_hop_serve_us_mean",
        "quic_hop_reply_us_mean",
    ];
    const THREADS: usize = 8;

    pub(crate) struct Quic {
        server: RefCell<Server>,
    }

    impl Quic {
        pub(crate) fn start(bytes: u64, seed: u64) -> Result<Quic> {
            Ok(Quic { server: RefCell::new(Server::start(Content::Incompressible, bytes, seed)?) })
        }

        pub(crate) fn cases<'a>(&'a self, order: &'a impl Fn(u64) -> Vec<u64>) -> [Case<'a>; 4] {
            const SLEEPING: Duration = Duration::ZERO;
            [
                Case::new(KEYS, |round| self.one(&order(round), DEFAULT_POLL_BUDGET)),
                Case::new(["quic8_pages_s"], |round| Ok(vec![self.eight(&order(round), DEFAULT_POLL_BUDGET)?])),
                Case::new(["quic_sleeping_us_p50", "quic_sleeping_us_p99"], |round| {
                    Ok(self.one(&order(round), SLEEPING)?[..2].to_vec())
                }),
                Case::new(["quic8_sleeping_pages_s"], |round| Ok(vec![self.eight(&order(round), SLEEPING)?])),
            ]
        }

        /// Figures in the order of [`KEYS`].
        fn one(&self, order: &[u64], poll_budget: Duration) -> Result<Vec<f64>> {
            let (ferry, region) = self.region(poll_budget)?;
            let mut times = touch_region(self.server.borrow().image(), &region, order)?;
            let hops = region_hops(&region, &times)?;
            Ok([&times.p50_p99_us()[..], &hops, &peer_hop_means_us(&ferry.peer)].concat())
        }

        fn eight(&self, order: &[u64], poll_budget: Duration) -> Result<f64> {
            let (_ferry, region) = self.region(poll_budget)?;
            let server = self.server.borrow();
            let image: &Image = server.image();
            let words = region.atomics_u64(0, region.len() / 8)?;
            let start = Instant::now();
            std::thread::scope(|scope| {
                let parts = order.chunks(order.len().div_ceil(THREADS));
                let threads: Vec<_> = parts
                    .map(|part| scope.spawn(move || touch(image, part, |offset| words[offset / 8].load(Relaxed), |_| {}).map(drop)))
                    .collect();
                threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| "a toucher panicked")?)
            })?;
            let rate = order.len() as f64 / start.elapsed().as_secs_f64();
            check(&server, &region, order.iter().copied())?;
            Ok(rate)
        }

        fn region(&self, poll_budget: Duration) -> Result<(Ferry, Region)> {
            let ferry = Ferry::connect(&mut self.server.borrow_mut(), Options::Tuned { mtu: JUMBO_MTU }, poll_budget)?;
            let region = ferry.region().fault_around(FaultAround::OFF).open()?;
            Ok((ferry, region))
        }
    }
}
