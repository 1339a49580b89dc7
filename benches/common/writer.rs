//! A program that writes at a steady rate, and can say what its memory must hold.
//!
//! Role: the load of bench `migration`, at either end. Neighbours: `mover` runs it at the source, the bench at the destination. Invariants: each operation writes one page of a
//! hot set and then the count of operations, so that a lost or repeated write shows; an operation that is late is made up for, as by a program with a queue of
//! requests.

use super::{PAGE_BYTES, Result};
use pageferry::{Gate, Pass, Region};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Pages that are written again and again, behind the page of the count.
pub const HOT_PAGES: u64 = (64 << 20) / PAGE_BYTES;
/// Pages written a second: 50 MB/s.
pub const PAGES_S: u64 = 50_000_000 / PAGE_BYTES;

const WORDS: u64 = PAGE_BYTES / 8;
/// How long it sleeps when it is ahead; a program that slept for each operation would measure its sleeping.
const REST: Duration = Duration::from_micros(250);

/// The page that operation `n` writes.
fn page_of(n: u64) -> u64 {
    1 + (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20) % HOT_PAGES
}

/// A running writer.
pub struct Writer {
    quit: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: JoinHandle<Wrote>,
}

/// What it did.
pub struct Wrote {
    pub operations: u64,
    /// When its first operation began, in nanoseconds of the system's clock.
    pub first_ns: u64,
    /// When each operation was done.
    pub done_ns: Vec<u64>,
    /// How long each operation took, in nanoseconds.
    pub took_ns: Vec<u64>,
}

impl Wrote {
    pub fn last_ns(&self) -> u64 {
        self.done_ns.last().copied().unwrap_or(0)
    }
}

pub fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

impl Writer {
    /// Goes on where the region's count stands. At a source it passes `gate` before each operation.
    pub fn start(region: &Region, gate: Option<&Gate>) -> Writer {
        let (quit, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (region, place) = (region.clone(), gate.map(Gate::enter));
        let thread = std::thread::spawn({
            let (quit, done) = (quit.clone(), done.clone());
            move || {
                let runs = || place.as_ref().is_none_or(|place| place.pass() == Pass::Run) && !quit.load(Relaxed);
                write(&region, runs, &done)
            }
        });
        Writer { quit, done, thread }
    }

    /// Operations so far.
    pub fn done(&self) -> u64 {
        self.done.load(Relaxed)
    }

    /// Waits for it, after its gate has stopped it.
    pub fn stopped(self) -> Result<Wrote> {
        self.thread.join().map_err(|_| "the writer panicked".into())
    }

    pub fn stop(self) -> Result<Wrote> {
        self.quit.store(true, Relaxed);
        self.stopped()
    }
}

fn write(region: &Region, runs: impl Fn() -> bool, done: &AtomicU64) -> Wrote {
    let words = region.atomics_u64(0, ((HOT_PAGES + 1) * WORDS) as usize).expect("the region holds the hot set");
    let mut wrote = Wrote { operations: 0, first_ns: 0, done_ns: Vec::new(), took_ns: Vec::new() };
    let (begun, mut n) = (Instant::now(), 0);
    while runs() {
        let due = begun.elapsed().as_nanos() as u64 * PAGES_S / 1_000_000_000;
        if wrote.operations > due {
            std::thread::sleep(REST);
            continue;
        }
        let start = Instant::now();
        if wrote.operations == 0 {
            // Its first instruction: what that touches may have yet to come, which is a stall and no pause.
            wrote.first_ns = now_ns();
            n = words[0].load(Relaxed);
        }
        n += 1;
        words[(page_of(n) * WORDS + n % WORDS) as usize].store(n, Relaxed);
        words[0].store(n, Relaxed);
        wrote.took_ns.push(start.elapsed().as_nanos() as u64);
        wrote.done_ns.push(now_ns());
        wrote.operations += 1;
        done.store(wrote.operations, Relaxed);
    }
    wrote
}

/// Fails unless the region holds exactly the operations 1 to `n`, over what `before` gives for a word that was never written.
pub fn check(region: &Region, n: u64, before: impl Fn(u64, &mut [u8])) -> Result<()> {
    let mut expected = vec![0u8; ((HOT_PAGES + 1) * PAGE_BYTES) as usize];
    expected.chunks_exact_mut(PAGE_BYTES as usize).enumerate().for_each(|(page, into)| before(page as u64, into));
    let mut put = |word: u64, value: u64| {
        expected[(word * 8) as usize..(word * 8 + 8) as usize].copy_from_slice(&value.to_ne_bytes());
    };
    (1..=n).for_each(|n| put(page_of(n) * WORDS + n % WORDS, n));
    put(0, n);
    let mut found = vec![0u8; expected.len()];
    region.read_at(0, &mut found)?;
    match found.chunks(8).zip(expected.chunks(8)).position(|(found, expected)| found != expected) {
        None => Ok(()),
        Some(word) => {
            Err(format!("word {word} of the hot set is not what {n} operations leave: a write was lost or repeated").into())
        }
    }
}
