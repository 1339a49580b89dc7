//! How soon a program has what it begins with: a scattered working set of a peer's memory, page after page on demand, or pulled in the order in which an earlier start touched it.
//!
//! Role: what replaying a recorded working set gains over a link of 0 to 25 ms. Neighbours: `common`; the link is pageferry's own shaper under the client's socket; benches/README.md says what each
//! key is. Invariants: every case has a connection of its own, warm as in `throughput`, and a mount of its own, whose opening counts; all touch the same pages in the same order; each word is
//! checked as it is read, and each page of the set whole after the clock has stopped.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, in_rounds},
    pages::{Image, random_order},
    plain_quinn::ETHERNET_MTU,
    quic::Ferry,
    raw,
    server::{Content, Server},
};
use pageferry::{FaultAround, Mount, MountBuilder, Region, WorkingSet};
use std::{
    cell::RefCell,
    process::ExitCode,
    sync::atomic::Ordering::Relaxed,
    time::{Duration, Instant},
};

const SEED: u64 = 0x5e7;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 3;
const RTTS_MS: [u64; 4] = [0, 1, 10, 25];
/// One that targets speak of, and one to read it beside.
const RTTS_QUICK_MS: [u64; 2] = [0, 10];
/// 8 MiB of 256: a program that starts touches a few percent of what it might (see `WorkingSet`).
const SHARE: u64 = 32;

fn main() -> ExitCode {
    common::run("working_set", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = if args.quick { 64 * MIB } else { 256 * MIB };
    let rtts = if args.quick { &RTTS_QUICK_MS[..] } else { &RTTS_MS[..] };
    let mut server = Server::start(Content::Incompressible, bytes, SEED)?;
    let pages = bytes / PAGE_BYTES;
    let touched = random_order(pages, usize::try_from(pages / SHARE)?, SEED);
    let recorded = record(&Far::new(&mut server, Duration::ZERO)?, &touched)?;
    let (server, touched, recorded) = (&RefCell::new(server), &touched, &recorded);
    let mut cases = Vec::new();
    for rtt_ms in rtts.iter().copied() {
        let case = |way: &str, describe: fn(MountBuilder, &WorkingSet) -> MountBuilder| {
            let key: &'static str = format!("{way}_ms_rtt{rtt_ms}").leak();
            Case::new([key], move |_| {
                let far = Far::new(&mut server.borrow_mut(), Duration::from_millis(rtt_ms))?;
                Ok(vec![start_ms(&far, touched, |mount| describe(mount, recorded))?])
            })
        };
        cases.push(case("ondemand", |mount, _| mount.direct()));
        cases.push(case("linear", |mount, _| mount));
        cases.push(case("warm", |mount, set| mount.pull_order(set.order())));
        // Whoever outruns the pull asks for a page that is on its way already, and for its neighbours, which the set does not hold: what those cost.
        cases.push(case("warm_narrow", |mount, set| mount.pull_order(set.order()).fault_around(FaultAround::OFF)));
    }
    let cases = cases.into_iter().map(|case| case.after(|| raw::have_memory(bytes))).collect();
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    for rtt_ms in rtts {
        let of = |way: &str| measured.median(&format!("{way}_ms_rtt{rtt_ms}"));
        if let (Some(demand), Some(linear), Some(warm)) = (of("ondemand"), of("linear"), of("warm")) {
            measured.derived.push((format!("warm_gain_rtt{rtt_ms}").leak(), demand / warm));
            measured.derived.push((format!("warm_gain_over_linear_rtt{rtt_ms}").leak(), linear / warm));
        }
    }
    measured.notes.push(format!(
        "{} pages, {} MiB of {}, in random order; datagrams of {ETHERNET_MTU} bytes, delayed by the shaper under the client's socket.",
        touched.len(),
        touched.len() as u64 * PAGE_BYTES / MIB,
        bytes / MIB
    ));
    Ok(measured)
}

/// A peer's memory at the other end of a link.
struct Far {
    ferry: Ferry,
    image: Image,
}

impl Far {
    fn new(server: &mut Server, rtt: Duration) -> Result<Far> {
        let ferry = Ferry::over_a_link(server, ETHERNET_MTU, rtt)?;
        ferry.warm_up(server)?;
        Ok(Far { ferry, image: Image::incompressible(server.image().pages() * PAGE_BYTES, SEED) })
    }

    fn mount(&self) -> MountBuilder {
        Mount::builder(self.ferry.store()).pager(&self.ferry.pager)
    }

    /// Fails unless the first word of each is right.
    fn touch(&self, region: &Region, pages: &[u64]) -> Result<()> {
        for page in pages {
            let (at, expected) = self.image.probe(*page);
            let word = &region.atomics_u64(page * PAGE_BYTES + 8 * at as u64, 1)?[0];
            if word.load(Relaxed) != expected {
                return Err(format!("page {page} is wrong").into());
            }
        }
        Ok(())
    }
}

/// An earlier start of the program. Its record goes by way of a file, as between two processes.
fn record(far: &Far, touched: &[u64]) -> Result<WorkingSet> {
    let mount = far.mount().record_touches().open()?;
    far.touch(mount.region(), touched)?;
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("start.pages");
    mount.working_set().save(&file)?;
    let set = WorkingSet::load(&file)?;
    let found: Vec<u64> = set.extents().iter().flat_map(|extent| extent.pages()).collect();
    if found != touched {
        return Err(format!("{} pages were touched, and {} recorded, or in another order", touched.len(), found.len()).into());
    }
    Ok(set)
}

/// From before the mount is opened until the whole working set was touched.
fn start_ms(far: &Far, touched: &[u64], describe: impl FnOnce(MountBuilder) -> MountBuilder) -> Result<f64> {
    let start = Instant::now();
    let mount = describe(far.mount()).open()?;
    far.touch(mount.region(), touched)?;
    let took_ms = start.elapsed().as_secs_f64() * 1e3;
    far.image.check(touched.iter().copied(), |page, into| Ok(mount.region().read_at(page * PAGE_BYTES, into)?))?;
    Ok(took_ms)
}
