//! What following writes costs: to begin, to the first write of a page, and to ask what was written.
//!
//! Role: each tracker beside the same kernel calls made by the shortest program. Neighbours: `common`; benches/README.md says what each key is. Invariants: each way
//! starts every round with new, populated memory and writes the same pages in the same random order; what is told is compared with what was written.

mod common;

use common::{
    MIB, PAGE_BYTES, Result,
    args::Args,
    measure::{Case, Measured, Times, in_rounds},
    pages::random_order,
    raw::stop_pipe,
    raw_writes::{RawMemory, RawSoftDirty, RawTracker, RawWpAsync, RawWpSync},
};
use pageferry::{Content, Extent, Frozen, PageStore, Pager, PagerOptions, Program, Region, RegionError, TrackerKind};
use std::{
    cell::Cell,
    ops::Range,
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

const SEED: u64 = 0x3;
/// Odd, so that a median is a round's figure.
const ROUNDS: usize = 5;
/// How many of a hundred pages are written before a take, and how often in a round. The first comes right after arming. Of several takes the least counts: one that
/// another program interrupts lasts ten times as long.
const SHARES: [(u64, u64); 3] = [(10, 3), (1, 3), (50, 1)];
/// How often each way is begun in a round, on new memory each time. The least counts, as above.
const ARMS: usize = 3;
const WORDS: usize = PAGE_BYTES as usize / 8;

/// In the order of [`SHARES`].
macro_rules! keys {
    ($way:literal) => {
        [
            concat!($way, "_arm_ms"),
            concat!($way, "_first_write_us"),
            concat!($way, "_take_ms"),
            concat!($way, "_first_write_us_1pct"),
            concat!($way, "_take_ms_1pct"),
            concat!($way, "_first_write_us_50pct"),
            concat!($way, "_take_ms_50pct"),
        ]
    };
}

fn main() -> ExitCode {
    common::run("dirty", bench)
}

fn bench(args: &Args) -> Result<Measured> {
    let bytes = args.bulk_bytes();
    let extra = Cell::new(0);
    let (mut cases, mut lacking) = (Vec::new(), Vec::new());
    for (kind, raw_keys, keys) in [
        (TrackerKind::WpAsync, keys!("raw_wp_async"), keys!("wp_async")),
        (TrackerKind::WpSync, keys!("raw_wp_sync"), keys!("wp_sync")),
        (TrackerKind::SoftDirty, keys!("raw_soft_dirty"), keys!("soft_dirty")),
    ] {
        match Region::builder().size(PAGE_BYTES).pager(&pager(kind)?).open()?.track() {
            Ok(_) => {}
            Err(RegionError::NoTracker { reason, .. }) => {
                lacking.push(format!("Not measured, for this kernel lacks it: {kind} ({reason})."));
                continue;
            }
            Err(error) => return Err(error.into()),
        }
        let extra = &extra;
        let check = move |round| Check { kind, round, shares: &SHARES, extra };
        cases.push(Case::new(raw_keys, move |round| repeat(check(round), |check| follow_raw(kind, bytes, check))));
        cases.push(Case::new(keys, move |round| repeat(check(round), |check| follow_region(kind, bytes, check))));
    }
    cases.push(Case::new(["raw_frozen_arm_ms", "raw_frozen_first_write_us"], move |round| freeze_raw(bytes, round)));
    cases.push(Case::new(["frozen_arm_ms", "frozen_first_write_us"], move |round| freeze_region(bytes, round)));
    cases.push(Case::new(["frozen_followed_arm_ms"], move |round| freeze_followed(bytes, round)));
    let mut measured = in_rounds(args, ROUNDS, cases)?;
    measured.notes = lacking;
    let shares = SHARES.map(|(share, takes)| format!("{share} % x {takes}")).join(", then ");
    measured.notes.push(format!(
        "{} MiB, populated, of which {shares} were written in random order; first_write is the median, take the least, arm the least of {ARMS}. Each take told every page that was \
         written, and {}.",
        bytes / MIB,
        match extra.get() {
            0 => "no other".into(),
            extra => format!("{extra} others in all, by soft-dirty"),
        }
    ));
    Ok(measured)
}

fn pager(kind: TrackerKind) -> Result<Pager> {
    Ok(Pager::start(&PagerOptions { tracker: Some(kind), ..PagerOptions::default() })?)
}

/// Once with all shares, then only to begin.
fn repeat(check: Check<'_>, follow: impl Fn(&Check<'_>) -> Result<Vec<f64>>) -> Result<Vec<f64>> {
    let mut figures = follow(&check)?;
    let only_begin = Check { shares: &[], ..check };
    for _ in 1..ARMS {
        figures[0] = figures[0].min(follow(&only_begin)?[0]);
    }
    Ok(figures)
}

fn follow_region(kind: TrackerKind, bytes: u64, check: &Check<'_>) -> Result<Vec<f64>> {
    let pager = pager(kind)?;
    let region = Region::builder().size(bytes).pager(&pager).open()?;
    let words = region.atomics_u64(0, region.len() / 8)?;
    let program = if check.exact() { Program::Running } else { Program::Paused };
    follow(
        words,
        check,
        || Ok(region.track()?),
        |tracking| {
            let start = Instant::now();
            let written = tracking.take(program)?;
            let took = start.elapsed();
            let told = written.extents().iter().map(|extent| extent.first()..extent.end()).collect();
            let start = Instant::now();
            written.acknowledge();
            Ok((took + start.elapsed(), told))
        },
    )
}

fn follow_raw(kind: TrackerKind, bytes: u64, check: &Check<'_>) -> Result<Vec<f64>> {
    let memory = RawMemory::new(usize::try_from(bytes)?)?;
    match kind {
        TrackerKind::WpAsync => follow_by(&RawWpAsync::new(&memory)?, &memory, check),
        TrackerKind::SoftDirty => follow_by(&RawSoftDirty::new(&memory)?, &memory, check),
        TrackerKind::WpSync => {
            let tracker = RawWpSync::new(&memory)?;
            let (stopped, stop) = stop_pipe()?;
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    if let Err(error) = tracker.serve(&stopped) {
                        // The writer waits to be let go, which nobody will do.
                        eprintln!("the bare loop: {error}");
                        std::process::exit(1);
                    }
                });
                let figures = follow_by(&tracker, &memory, check);
                drop(stop);
                figures
            })
        }
    }
}

fn follow_by(tracker: &impl RawTracker, memory: &RawMemory, check: &Check<'_>) -> Result<Vec<f64>> {
    follow(
        memory.words(),
        check,
        || tracker.arm(),
        |()| {
            let start = Instant::now();
            let told = tracker.take()?;
            Ok((start.elapsed(), told))
        },
    )
}

/// Of a region that nobody follows: all of it is protected in the pause.
fn freeze_region(bytes: u64, round: u64) -> Result<Vec<f64>> {
    let region = Region::builder().size(bytes).open()?;
    let words = region.atomics_u64(0, region.len() / 8)?;
    let held = |frozen: &Frozen, page: u64| {
        let mut read = frozen.read(Extent::page(page));
        // Plain memory is read on the spot.
        match read.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(runs) => match &runs?[0].content {
                Content::Bytes(bytes) => Ok(u64::from_ne_bytes(std::array::from_fn(|at| bytes[at]))),
                Content::Zero => Ok(0),
            },
            Poll::Pending => Err("a frozen page was not at hand".into()),
        }
    };
    keep(words, round, || Ok(region.freeze(Program::Paused)?), held)
}

fn freeze_raw(bytes: u64, round: u64) -> Result<Vec<f64>> {
    let memory = RawMemory::new(usize::try_from(bytes)?)?;
    let keeper = RawWpSync::keeping(&memory)?;
    let (stopped, stop) = stop_pipe()?;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            if let Err(error) = keeper.serve(&stopped) {
                eprintln!("the bare loop: {error}");
                std::process::exit(1);
            }
        });
        let figures = keep(memory.words(), round, || keeper.arm(), |(), page| keeper.kept(page));
        drop(stop);
        figures
    })
}

/// Populates, freezes, and writes 10 % of the pages in random order; what they held is compared.
fn keep<T>(
    words: &[AtomicU64],
    round: u64,
    freeze: impl FnOnce() -> Result<T>,
    held: impl Fn(&T, u64) -> Result<u64>,
) -> Result<Vec<f64>> {
    words.iter().step_by(WORDS).zip(1..).for_each(|(word, value)| word.store(value, Relaxed));
    let start = Instant::now();
    let frozen = freeze()?;
    let armed_ms = ms(start.elapsed());
    let pages = (words.len() / WORDS) as u64;
    let order = random_order(pages, (pages / 10) as usize, SEED + round);
    let mut times = Times::with_capacity(order.len());
    for page in &order {
        let word = &words[*page as usize * WORDS];
        let start = Instant::now();
        word.store(u64::MAX, Relaxed);
        times.since(start);
    }
    for page in order {
        if held(&frozen, page)? != page + 1 {
            return Err(format!("page {page} was not kept").into());
        }
    }
    Ok(vec![armed_ms, times.p50_p99_us()[0]])
}

/// Of a region whose writes are followed by messages, as a snapshot has it before the pause: 1 % was written since.
fn freeze_followed(bytes: u64, round: u64) -> Result<Vec<f64>> {
    let pager = pager(TrackerKind::WpSync)?;
    let region = Region::builder().size(bytes).pager(&pager).open()?;
    let words = region.atomics_u64(0, region.len() / 8)?;
    words.iter().step_by(WORDS).for_each(|word| word.store(1, Relaxed));
    let _tracking = region.track()?;
    let pages = (words.len() / WORDS) as u64;
    for page in random_order(pages, (pages / 100) as usize, SEED + round) {
        words[page as usize * WORDS].store(2, Relaxed);
    }
    let start = Instant::now();
    let frozen = region.freeze(Program::Paused)?;
    let armed_ms = ms(start.elapsed());
    drop(frozen);
    Ok(vec![armed_ms])
}

/// Populates, arms, and for each share writes and takes. Figures in the order of the keys.
fn follow<T>(
    words: &[AtomicU64],
    check: &Check<'_>,
    arm: impl FnOnce() -> Result<T>,
    mut take: impl FnMut(&T) -> Result<(Duration, Vec<Range<u64>>)>,
) -> Result<Vec<f64>> {
    let mut content: Vec<u64> = (0..(words.len() / WORDS) as u64).collect();
    words.iter().step_by(WORDS).zip(&content).for_each(|(word, value)| word.store(*value, Relaxed));
    let start = Instant::now();
    let armed = arm()?;
    let mut figures = vec![ms(start.elapsed())];
    if !check.exact() {
        // What was written before is told once.
        take(&armed)?;
    }
    let pages = content.len() as u64;
    for &(share, takes) in check.shares {
        let written = (pages * share / 100) as usize;
        let (mut times, mut least) = (Times::with_capacity(written * takes as usize), Duration::MAX);
        for again in 0..takes {
            let order = random_order(pages, written, SEED + check.round * 1000 + share * 10 + again);
            for page in &order {
                let (word, value) = (&words[*page as usize * WORDS], page | (share * 10 + again) << 32);
                let start = Instant::now();
                word.store(value, Relaxed);
                times.since(start);
                content[*page as usize] = value;
            }
            let (took, told) = take(&armed)?;
            least = least.min(took);
            check.told(&order, &told, pages)?;
        }
        figures.extend([times.p50_p99_us()[0], ms(least)]);
    }
    let (_, told) = take(&armed)?;
    check.told(&[], &told, pages)?;
    let wrong = words.iter().step_by(WORDS).zip(&content).position(|(word, value)| word.load(Relaxed) != *value);
    wrong.map_or(Ok(figures), |page| Err(format!("page {page} lost what was written to it").into()))
}

/// Compares what was told with what was written.
struct Check<'a> {
    kind: TrackerKind,
    round: u64,
    shares: &'a [(u64, u64)],
    /// Pages told that nobody wrote.
    extra: &'a Cell<u64>,
}

impl Check<'_> {
    /// Whether this tracker tells only what was written.
    fn exact(&self) -> bool {
        self.kind != TrackerKind::SoftDirty
    }

    fn told(&self, order: &[u64], told: &[Range<u64>], pages: u64) -> Result<()> {
        let mut written = vec![false; pages as usize];
        order.iter().for_each(|page| written[*page as usize] = true);
        let (mut extra, mut end) = (0, 0);
        for range in told {
            if range.start < end || range.is_empty() || range.end > pages {
                return Err(format!("{range:?} was told of {pages} pages after page {end}, out of order").into());
            }
            end = range.end;
            for page in range.clone() {
                extra += u64::from(!std::mem::take(&mut written[page as usize]));
            }
        }
        let missed = written.iter().filter(|written| **written).count();
        if missed > 0 || (extra > 0 && self.exact()) {
            return Err(format!("of {} pages written {missed} were not told, and {extra} others were", order.len()).into());
        }
        self.extra.set(self.extra.get() + extra);
        Ok(())
    }
}

fn ms(time: Duration) -> f64 {
    time.as_nanos() as f64 / 1e6
}
