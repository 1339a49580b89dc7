//! Memory of a peer in a quarter of the memory that it takes: what keeping to a budget costs, and whether it is kept.
//!
//! Role: judges eviction, beside the same accesses without a budget in the same run. Neighbours: `common`; benches/README.md says what each key is. Invariants: every case has a connection and a mount
//! of its own; all make the same accesses, of which a quarter are writes; each word is checked as it is read, and each page whole at the peer after the mount was closed. How much is resident is the kernel's
//! word (`Rss` of /proc/self/smaps, proc(5)).

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, in_rounds, mb_s},
    pages::{Image, Random},
    plain_quinn::{ETHERNET_MTU, Options},
    quic::Ferry,
    raw,
    server::{Content, Server},
};
use pageferry::{DEFAULT_POLL_BUDGET, FaultAround, Mount, Region};
use std::{
    cell::RefCell,
    process::ExitCode,
    sync::atomic::{
        AtomicBool, AtomicU64,
        Ordering::{Relaxed, SeqCst},
    },
    time::{Duration, Instant},
};

const SEED: u64 = 0xb0d;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 3;
/// Threads that the accesses are shared among.
const THREADS: u64 = 2;
/// A part of the whole image.
const BUDGET_SHARE: u64 = 4;
/// Of the skewed accesses, 15 of 16 go to a 16th of the pages, which fits: as in a cache that is used well.
const HOT_SHARE: u64 = 16;
/// One access in so many writes.
const WRITES: u64 = 4;
/// Between looks at what is resident.
const LOOK: Duration = Duration::from_millis(20);

fn main() -> ExitCode {
    common::run("budget", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = if args.quick { 32 * MIB } else { 128 * MIB };
    let accesses = bytes / PAGE_BYTES * 2;
    let server = RefCell::new(Server::start(Content::Incompressible, bytes, SEED)?);
    let server = &server;
    let case = |keys: [&'static str; 3], budget: Option<u64>, is_skewed: bool| {
        let keys: Vec<&'static str> = keys.into_iter().filter(|key| !key.is_empty()).collect();
        let count = keys.len();
        Case::new(keys, move |_| {
            let figures = run(&mut server.borrow_mut(), budget, accesses, is_skewed)?;
            Ok(figures[..count].to_vec())
        })
    };
    let budget = Some(bytes / BUDGET_SHARE);
    let cases = vec![
        case(["budget_random_mb_s", "budget_random_hit_percent", "budget_random_resident_ratio"], budget, false),
        case(["whole_random_mb_s", "whole_random_hit_percent", ""], None, false),
        case(["budget_skewed_mb_s", "budget_skewed_hit_percent", "budget_skewed_resident_ratio"], budget, true),
        case(["whole_skewed_mb_s", "whole_skewed_hit_percent", ""], None, true),
    ];
    let cases = cases.into_iter().map(|case| case.after(|| raw::have_memory(bytes))).collect();
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    measured.notes.push(format!(
        "{accesses} accesses of {THREADS} threads to {} MiB of a peer, one in {WRITES} a write, with a budget of {} MiB and without; loopback, MTU {ETHERNET_MTU}.",
        bytes / MIB,
        bytes / BUDGET_SHARE / MIB
    ));
    Ok(measured)
}

/// The rate of pages accessed, the accesses in a hundred that found their page here, and the most that was resident as a part of the budget.
fn run(server: &mut Server, budget: Option<u64>, accesses: u64, is_skewed: bool) -> Result<Vec<f64>> {
    let ferry = Ferry::connect(server, Options::Tuned { mtu: ETHERNET_MTU }, DEFAULT_POLL_BUDGET)?;
    ferry.warm_up(server)?;
    let image = Image::incompressible(server.image().pages() * PAGE_BYTES, SEED);
    let mut mount = Mount::builder(ferry.store()).direct().fault_around(FaultAround::OFF);
    if let Some(bytes) = budget {
        mount = mount.budget(bytes);
    }
    let mount = mount.open()?;
    let (region, over, most) = (mount.region(), AtomicBool::new(false), AtomicU64::new(0));
    let rate = std::thread::scope(|scope| -> Result<f64> {
        let looks = scope.spawn(|| -> std::result::Result<(), String> {
            while !over.load(SeqCst) {
                most.fetch_max(resident_bytes(region).map_err(|error| error.to_string())?, SeqCst);
                std::thread::sleep(LOOK);
            }
            Ok(())
        });
        let start = Instant::now();
        let threads: Vec<_> = (0..THREADS)
            .map(|thread| {
                let image = &image;
                scope.spawn(move || access(region, image, accesses / THREADS, is_skewed, thread).map_err(|error| error.to_string()))
            })
            .collect();
        let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
        let rate = mb_s(accesses * PAGE_BYTES, start);
        over.store(true, SeqCst);
        for ended in ended.into_iter().chain([looks.join()]) {
            ended.map_err(|_| "a thread panicked")??;
        }
        Ok(rate)
    })?;
    let hits = 100.0 * (1.0 - region.stats().faults as f64 / accesses as f64);
    let ratio = most.load(SeqCst) as f64 / budget.unwrap_or(region.size_bytes()) as f64;
    ferry.wait(mount.close())?;
    // What was written is what was there: the peer's pages are as they were.
    let region = ferry.region().open()?;
    ferry.pull(&region)?;
    image.check(0..image.pages(), |page, into| Ok(region.read_at(page * PAGE_BYTES, into)?))?;
    Ok(vec![rate, hits, ratio])
}

fn access(region: &Region, image: &Image, accesses: u64, is_skewed: bool, thread: u64) -> Result<()> {
    let mut random = Random::new(SEED, thread);
    for _ in 0..accesses {
        let hot = is_skewed && random.below(16) > 0;
        // Scattered over the region, as hot pages are.
        let page = if hot { random.below(image.pages() / HOT_SHARE) * HOT_SHARE } else { random.below(image.pages()) };
        let (at, expected) = image.probe(page);
        let word = &region.atomics_u64(page * PAGE_BYTES + 8 * at as u64, 1)?[0];
        if word.load(Relaxed) != expected {
            return Err(format!("page {page} is wrong").into());
        }
        if random.below(WRITES) == 0 {
            word.store(expected, Relaxed);
        }
    }
    Ok(())
}

fn resident_bytes(region: &Region) -> Result<u64> {
    let start = region.as_ptr() as usize;
    let end = start + region.len();
    let (mut inside, mut bytes) = (false, 0);
    for line in std::fs::read_to_string("/proc/self/smaps")?.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
        {
            inside = from >= start && to <= end;
        } else if inside && first == "Rss:" {
            bytes += words.next().unwrap_or_default().parse::<u64>()? * 1024;
        }
    }
    Ok(bytes)
}
