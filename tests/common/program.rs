//! What the tests of migrations share: a program that counts its operations and notices a lost, repeated or foreign one; its ends; and this
//! test binary once more as another process, to be killed.

#![allow(dead_code, reason = "each test binary uses its own part")]

use crate::net::{HANG, soon};
use pageferry::{
    Destination, DestinationBuilder, Gate, Identity, LossPolicy, MemoryStore, MoveEvent, OnLoss, PageSize, Pass, Point, Region,
    Source, SourceBuilder, TransportOptions, Trust, testing::Gated,
};
use std::{
    io::{BufRead, BufReader, Write},
    net::SocketAddr,
    path::Path,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{
            AtomicBool, AtomicU64,
            Ordering::{Relaxed, SeqCst},
        },
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};
use tokio::sync::broadcast;

/// Waits until `holds`, for what nobody tells of.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < HANG, "not within {HANG:?}: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// A lost end is noticed within three seconds: soon, and yet later than a busy machine may leave a thread waiting.
pub fn short_idle() -> TransportOptions {
    TransportOptions { idle_timeout: Duration::from_secs(3), keep_alive: Duration::from_millis(500), ..TransportOptions::default() }
}

/// Pages that are lost for good after a second.
pub fn poison_soon() -> LossPolicy {
    LossPolicy { keep_trying: Duration::from_secs(1), then: OnLoss::Poison }
}

/// The keys of the two ends.
pub struct Keys {
    pub here: Identity,
    pub there: Identity,
}

impl Keys {
    pub fn new() -> Keys {
        Keys { here: Identity::generate().unwrap(), there: Identity::generate().unwrap() }
    }

    /// A source of these regions, whose program passes `gate`.
    pub fn source(&self, regions: &[Region], gate: &Gate) -> SourceBuilder<'_> {
        Source::builder(&self.here).grant(self.there.peer_id(), regions).gate(gate).transport(short_idle())
    }

    /// A destination that is patient with its source; tests that lose it say for how long.
    pub fn destination(&self, address: SocketAddr) -> DestinationBuilder<'_> {
        let trust = Trust::ids([self.here.peer_id()]);
        let limit = Duration::from_secs(5);
        Destination::builder(address, trust, &self.there).transport(short_idle()).decision_limit(limit)
    }
}

/// Threads of a program; they share the regions, and each has its own words in every page.
pub const THREADS: usize = 3;
const PAGE_WORDS: usize = 512;
/// The last word of a page says which page it is, so that a page of zeros, or another page, is never taken for it.
const STAMP_WORD: usize = PAGE_WORDS - 1;

fn stamp(page: usize) -> u64 {
    0xFE44_7000_0000_0000 | page as u64
}

/// Stamped regions.
pub fn world(names: &[&str], pages: usize) -> Vec<Region> {
    let regions = names.iter().map(|name| Region::builder().name(*name).size((pages * 4096) as u64).open().unwrap());
    regions.inspect(stamp_all).collect()
}

pub fn stamp_all(region: &Region) {
    let words = region.atomics_u64(0, region.len() / 8).unwrap();
    words.chunks(PAGE_WORDS).enumerate().for_each(|(page, words)| words[STAMP_WORD].store(stamp(page), Relaxed));
}

/// Numbers that compress no better than they must: the same for every place.
fn noise(word: usize) -> u64 {
    let mixed = (word as u64 ^ 0x5DEE_CE66_D5DE_ECE6).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (mixed ^ (mixed >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9)
}

/// Fills what neither threads nor stamps use with what does not compress: what travels is what the pages weigh.
pub fn fill_with_noise(region: &Region) {
    let words = region.atomics_u64(0, region.len() / 8).unwrap().iter().enumerate();
    words
        .filter(|(at, _)| (THREADS..STAMP_WORD).contains(&(at % PAGE_WORDS)))
        .for_each(|(at, word)| word.store(noise(at), Relaxed));
}

/// Fails unless that is what is there.
#[track_caller]
pub fn check_noise(region: &Region) {
    for (at, word) in region.atomics_u64(0, region.len() / 8).unwrap().iter().enumerate() {
        if (THREADS..STAMP_WORD).contains(&(at % PAGE_WORDS)) {
            assert_eq!(word.load(Relaxed), noise(at), "{}: page {}", region.name(), at / PAGE_WORDS);
        }
    }
}

/// A stamped region whose pages come from a store behind a gate, closed at first: what is read of it waits there until the test says so.
pub fn gated(name: &str, pages: usize) -> (Region, Gated<MemoryStore>) {
    let store = Gated::new(MemoryStore::from_bytes(stamped_bytes(pages), PageSize::KIB_4));
    (Region::builder().name(name).store(store.clone()).open().unwrap(), store)
}

/// What a stamped region of so many pages holds.
pub fn stamped_bytes(pages: usize) -> Vec<u8> {
    (0..pages).flat_map(|page| [vec![0; STAMP_WORD * 8], stamp(page).to_le_bytes().to_vec()].concat()).collect()
}

/// How many operations each thread has done, at whichever end. Outside the regions: what a region says is compared with it.
pub struct Ledger {
    map: memmap2::MmapRaw,
}

impl Ledger {
    pub fn new() -> Arc<Ledger> {
        Arc::new(Ledger { map: memmap2::MmapMut::map_anon(THREADS * 8).unwrap().into() })
    }

    /// One that several processes share: a file of at least [`Ledger::BYTES`].
    pub fn shared(path: &Path) -> Arc<Ledger> {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        Arc::new(Ledger { map: memmap2::MmapRaw::map_raw(&file).unwrap() })
    }

    pub const BYTES: u64 = THREADS as u64 * 8;

    fn words(&self) -> &[AtomicU64; THREADS] {
        // SAFETY: the map has as many bytes, begins at a page, lives as long as this, and is written by atomics alone, in every process.
        unsafe { &*self.map.as_ptr().cast() }
    }

    pub fn done(&self) -> [u64; THREADS] {
        std::array::from_fn(|thread| self.words()[thread].load(SeqCst))
    }

    /// Of a program that begins.
    pub fn reset(&self) {
        self.set([0; THREADS]);
    }

    /// Of a program that goes on from an earlier moment.
    pub fn set(&self, done: [u64; THREADS]) {
        self.words().iter().zip(done).for_each(|(word, done)| word.store(done, SeqCst));
    }

    /// Waits until every thread has done more: the program runs, somewhere.
    pub async fn advances(&self) {
        let before = self.done();
        let all = || self.done().iter().zip(before).all(|(now, before)| *now >= before + 3);
        until("the program runs", all).await;
    }
}

/// Where thread `thread` writes its operation `n` in a region of so many words.
fn slot(thread: usize, n: u64, words: usize) -> usize {
    let slots = (words / PAGE_WORDS - 1) * STAMP_WORD;
    let at = (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 24) as usize % (slots / THREADS) * THREADS + thread;
    PAGE_WORDS + at / STAMP_WORD * PAGE_WORDS + at % STAMP_WORD
}

/// A running program: each thread numbers its operations, writes the number to a word that it derives from it, and counts in its word of the
/// first page.
pub struct Program {
    pub gate: Gate,
    quit: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Program {
    /// Goes on where the ledger stands.
    pub fn start(regions: &[Region], ledger: &Arc<Ledger>) -> Program {
        // Leaves the processors to the ends.
        Program::start_resting(regions, ledger, Duration::from_micros(50))
    }

    /// Each thread rests for so long after every eighth operation.
    pub fn start_resting(regions: &[Region], ledger: &Arc<Ledger>, rest: Duration) -> Program {
        let (gate, quit) = (Gate::new(), Arc::new(AtomicBool::new(false)));
        let threads = (0..THREADS).map(|thread| {
            let (place, quit, ledger) = (gate.enter(), quit.clone(), ledger.clone());
            let region = regions[thread % regions.len()].clone();
            std::thread::spawn(move || {
                while place.pass() == Pass::Run && !quit.load(Relaxed) {
                    operate(&region, thread, &ledger, rest);
                }
            })
        });
        let threads = threads.collect();
        Program { gate, quit, threads }
    }

    /// Joins the threads of a program that was told to stop because it runs elsewhere.
    pub fn has_left(self) {
        assert!(self.gate.stopped());
        self.join();
    }

    pub fn quit(self) {
        self.quit.store(true, Relaxed);
        self.join();
    }

    fn join(self) {
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

fn operate(region: &Region, thread: usize, ledger: &Ledger, rest: Duration) {
    let words = region.atomics_u64(0, region.len() / 8).unwrap();
    let n = ledger.words()[thread].load(SeqCst);
    assert_eq!(words[thread].load(Relaxed), n, "thread {thread}: the region lost or repeats operations");
    words[slot(thread, n + 1, words.len())].store(n + 1, Relaxed);
    words[thread].store(n + 1, Relaxed);
    let counted = ledger.words()[thread].compare_exchange(n, n + 1, SeqCst, SeqCst);
    assert_eq!(counted, Ok(n), "thread {thread} runs at two ends");
    if n.is_multiple_of(8) {
        std::thread::sleep(rest);
    }
}

/// Fails unless the regions hold exactly the operations of the ledger, and every page is the one it should be.
#[track_caller]
pub fn check(regions: &[Region], ledger: &Ledger) {
    for (at, region) in regions.iter().enumerate() {
        assert_words(region, &words_after(ledger.done(), at, regions.len(), region.len()));
    }
}

/// What region `at` of `count` holds when the threads have done so many operations.
pub fn words_after(done: [u64; THREADS], at: usize, count: usize, bytes: usize) -> Vec<u64> {
    let mut expected = vec![0u64; bytes / 8];
    expected.chunks_mut(PAGE_WORDS).enumerate().for_each(|(page, words)| words[STAMP_WORD] = stamp(page));
    for (thread, done) in done.into_iter().enumerate().filter(|(thread, _)| thread % count == at) {
        expected[thread] = done;
        (1..=done).for_each(|n| expected[slot(thread, n, bytes / 8)] = n);
    }
    expected
}

/// A program's state: its ledger.
pub fn state_of(ledger: &Ledger) -> Vec<u8> {
    ledger.done().into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The ledger that a state is of.
pub fn done_of(state: &[u8]) -> [u64; THREADS] {
    let mut words = state.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    std::array::from_fn(|_| words.next().expect("a state of a ledger"))
}

/// Fails unless a point of a standby is one moment of the program, whose regions have these names and so many bytes each.
#[track_caller]
pub fn check_point(point: &Point<'_>, names: &[&str], bytes: usize) {
    let done = done_of(point.state());
    let mut found = vec![0; bytes];
    for (at, name) in names.iter().enumerate() {
        point.read_at(name, 0, &mut found).unwrap();
        assert_bytes(&format!("{name} of point {}", point.number()), &found, &words_after(done, at, names.len(), bytes));
    }
}

/// Fails unless every page of a region that no program wrote is the one it should be.
#[track_caller]
pub fn check_stamps(region: &Region) {
    let mut expected = vec![0u64; region.len() / 8];
    expected.chunks_mut(PAGE_WORDS).enumerate().for_each(|(page, words)| words[STAMP_WORD] = stamp(page));
    assert_words(region, &expected);
}

#[track_caller]
fn assert_words(region: &Region, expected: &[u64]) {
    let mut bytes = vec![0; region.len()];
    region.read_at(0, &mut bytes).unwrap();
    assert_bytes(region.name(), &bytes, expected);
}

/// Fails unless `bytes` are these words.
#[track_caller]
pub fn assert_bytes(name: &str, bytes: &[u8], expected: &[u64]) {
    for (at, (got, expected)) in bytes.chunks(8).zip(expected).enumerate() {
        let got = u64::from_le_bytes(got.try_into().unwrap());
        assert_eq!(got, *expected, "{name}: page {}, word {}", at / PAGE_WORDS, at % PAGE_WORDS);
    }
}

/// Waits for an event, and returns those before it.
pub async fn wait_for(events: &mut broadcast::Receiver<MoveEvent>, what: &str, is: impl Fn(&MoveEvent) -> bool) -> Vec<MoveEvent> {
    let mut seen = Vec::new();
    loop {
        let event = soon(what, events.recv()).await.unwrap();
        let found = is(&event);
        seen.push(event);
        if found {
            return seen;
        }
    }
}

/// The attempt is over, and the program runs on at the source.
pub fn is_aborted(event: &MoveEvent) -> bool {
    matches!(event, MoveEvent::Aborted { .. } | MoveEvent::Interrupted { .. })
}

/// This test binary once more, as a process of its own; killed (SIGKILL) when dropped.
pub struct Child {
    process: std::process::Child,
    lines: mpsc::Receiver<String>,
}

impl Child {
    /// Runs the test called `role` there, with the variables given; it finds them by [`told`].
    pub fn play(role: &str, variables: &[(&str, &str)]) -> Child {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args([role, "--exact", "--nocapture", "--test-threads=1"]).env("PAGEFERRY_ROLE", role);
        command.envs(variables.iter().map(|(name, value)| (format!("PAGEFERRY_{name}"), value)));
        // Its end tells a child that outlives this process to end too.
        let mut process = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let (line, lines) = mpsc::channel();
        let output = BufReader::new(process.stdout.take().unwrap());
        std::thread::spawn(move || {
            for said in output.lines().map_while(Result::ok) {
                if let Some(said) = said.strip_prefix("@ ") {
                    let _ = line.send(said.to_owned());
                }
            }
        });
        Child { process, lines }
    }

    /// The next thing that the child [says](say).
    #[track_caller]
    pub fn says(&self) -> String {
        self.lines.recv_timeout(HANG).expect("the child says nothing more")
    }

    /// The next thing that it says within `limit`, if anything; an error if it can say no more.
    pub fn hear(&self, limit: Duration) -> Result<Option<String>, ()> {
        match self.lines.recv_timeout(limit) {
            Ok(said) => Ok(Some(said)),
            Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(()),
        }
    }

    /// Says something to it, as a line of its standard input.
    pub fn tell(&mut self, what: &str) {
        // It may be dead, which shows in what it does not say.
        let _ = writeln!(self.process.stdin.as_mut().unwrap(), "{what}");
    }

    /// SIGSTOP: it still has its port, and does nothing.
    pub fn stop(&self) {
        assert!(Command::new("kill").args(["-STOP", &self.process.id().to_string()]).status().unwrap().success());
    }

    /// SIGKILL, and waits for its end.
    pub fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// In a child: a variable it was given; `None` where the test is not played as a child's role.
pub fn told(role: &str, name: &str) -> Option<String> {
    (std::env::var("PAGEFERRY_ROLE").ok()? == role).then(|| std::env::var(format!("PAGEFERRY_{name}")).unwrap())
}

/// In a child: tells the parent.
pub fn say(what: &str) {
    // On a line of its own: the test harness leaves the name of the test before it.
    println!("\n@ {what}");
}

/// In a child: ends the process with its parent's.
pub fn live_with_parent() {
    std::thread::spawn(|| {
        let _ = std::io::stdin().lines().count();
        std::process::exit(1);
    });
}
