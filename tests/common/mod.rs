//! What the tests of regions share: stores with known bytes, a watchdog instead of hangs, and scenes played in a child process.

#![allow(dead_code, reason = "each test file uses its own part")]

use nix::{
    errno::Errno,
    sys::uio::{RemoteIoVec, process_vm_readv},
};
use pageferry::{Capabilities, FaultAround, MemoryStore, PageSize, Pager, PagerOptions, Region, testing::Gated};
use std::{
    future::Future,
    io::IoSliceMut,
    os::unix::process::ExitStatusExt,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    time::{Duration, Instant},
};

pub const PAGE: usize = 4096;
pub const KIB_4: PageSize = PageSize::KIB_4;

/// Far longer than anything here takes, on a busy machine too.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Whether regions can have a store here. Where they cannot, the test says so and must return; with `REQUIRE_UFFD=1` it fails instead.
#[must_use]
pub fn uffd() -> bool {
    let found = Capabilities::probe();
    permitted(found.userfaultfd() && PAGE as u64 == region_page_bytes(), &found.to_string())
}

/// The same for tests that look at missing pages from inside system calls.
#[must_use]
pub fn uffd_in_system_calls() -> bool {
    let found = Capabilities::probe();
    uffd() && permitted(found.faults_in_system_calls(), &found.to_string())
}

/// The same for tests of `UFFDIO_POISON`.
#[must_use]
pub fn uffd_with_poison() -> bool {
    let found = Capabilities::probe();
    uffd_in_system_calls() && permitted(found.poison(), &found.to_string())
}

/// The same for tests of what forked children see: the kernel tells only some of forks (UFFDIO_API(2const), UFFD_FEATURE_EVENT_FORK).
#[must_use]
pub fn uffd_with_forks() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let cap_sys_ptrace = u64::from_str_radix(effective.trim(), 16).unwrap() >> 19 & 1 == 1;
    uffd_with_poison() && permitted(cap_sys_ptrace, "fork events need CAP_SYS_PTRACE")
}

fn permitted(yes: bool, found: &str) -> bool {
    assert!(yes || std::env::var_os("REQUIRE_UFFD").is_none_or(|value| value != "1"), "REQUIRE_UFFD=1, but: {found}");
    if !yes {
        eprintln!("\n*** SKIPPED, NOTHING WAS TESTED: this kernel or user lacks what the test needs.\n*** {found}\n");
    }
    yes
}

fn region_page_bytes() -> u64 {
    Region::builder().size(1).open().unwrap().page_size().bytes()
}

/// Ends the process with a message if it is not dropped in time: a thread that hangs in a fault cannot be ended otherwise.
pub struct Watchdog {
    _alive: mpsc::Sender<()>,
}

#[must_use]
pub fn watchdog() -> Watchdog {
    let (alive, ended) = mpsc::channel();
    let name = std::thread::current().name().unwrap_or("a test").to_owned();
    std::thread::spawn(move || {
        // Later than the test's own patience ends: its message says more.
        if ended.recv_timeout(PATIENCE * 2) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("*** {name} hangs");
            std::process::abort();
        }
    });
    Watchdog { _alive: alive }
}

/// Returns once `holds`; panics if that takes too long.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Runs a future on a runtime of this thread.
#[track_caller]
pub fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(PATIENCE, future).await }).expect("no end in time")
}

/// What a page of the stores here holds: no byte is zero, so that a page of zeros is always seen.
#[must_use]
pub fn page_bytes(page: u64) -> Vec<u8> {
    let words = page * 512..(page + 1) * 512;
    words.flat_map(|word| (word.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 0x0101_0101_0101_0101).to_le_bytes()).collect()
}

/// A store of so many pages that hold [`page_bytes`].
#[must_use]
pub fn memory(pages: u64) -> MemoryStore {
    MemoryStore::from_bytes((0..pages).flat_map(page_bytes).collect::<Vec<u8>>(), KIB_4)
}

/// The same behind a gate that is closed.
#[must_use]
pub fn gated(pages: u64) -> Gated<MemoryStore> {
    Gated::new(memory(pages))
}

#[must_use]
pub fn pager() -> Pager {
    Pager::start(&PagerOptions::default()).unwrap()
}

/// A region of `store` on a pager of its own, one page a fault.
#[must_use]
pub fn page_by_page(store: &Gated<MemoryStore>) -> Region {
    Region::builder().store(store.clone()).pager(&pager()).fault_around(FaultAround::OFF).open().unwrap()
}

/// Reads a page as a program would: blocks until it is there.
#[must_use]
pub fn read_page(region: &Region, page: u64) -> Vec<u8> {
    let mut bytes = vec![0xEE; PAGE];
    region.read_at(page * PAGE as u64, &mut bytes).unwrap();
    bytes
}

#[track_caller]
pub fn assert_page(region: &Region, page: u64) {
    assert_same(page, &read_page(region, page), &page_bytes(page));
}

#[track_caller]
pub fn assert_same(page: u64, got: &[u8], expected: &[u8]) {
    let differs = got.iter().zip(expected).position(|(a, b)| a != b);
    let show = |at: usize| format!("byte {at} is {:#x}, expected {:#x}", got[at], expected[at]);
    assert!(differs.is_none() && got.len() == expected.len(), "page {page}: {}", differs.map(show).unwrap_or_default());
}

/// Reads a page from inside a system call: blocks like [`read_page`], and where that would get a signal it gets an errno.
pub fn peek(address: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0xEE; PAGE];
    let remote = [RemoteIoVec { base: address, len: PAGE }];
    let got = process_vm_readv(nix::unistd::Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &remote)?;
    assert_eq!(got, PAGE);
    Ok(bytes)
}

/// Address of a page of a region.
#[must_use]
pub fn address_of(region: &Region, page: u64) -> usize {
    region.as_ptr() as usize + page as usize * PAGE
}

/// All numbers below `n` in an order that `seed` decides.
#[must_use]
pub fn shuffled(n: u64, seed: u64) -> Vec<u64> {
    let mut random = Random(seed);
    let mut all: Vec<u64> = (0..n).collect();
    for i in (1..all.len()).rev() {
        all.swap(i, random.below(i as u64 + 1) as usize);
    }
    all
}

/// SplitMix64: small, and the same on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A scene that was played in a child process; `None` where this process is the child and another scene's turn it is.
#[must_use]
pub struct Scene(Option<(ExitStatus, String)>);

impl Scene {
    /// The child came to its end.
    #[track_caller]
    pub fn ends_well(self) {
        let Some((status, output)) = self.0 else { return };
        assert!(status.success(), "{status}: {output}");
    }

    /// The child was ended by this signal, after it had printed `last_words`.
    #[track_caller]
    pub fn ends_by(self, signal: i32, last_words: &str) {
        let Some((status, output)) = self.0 else { return };
        assert!(status.signal() == Some(signal) && output.contains(last_words), "{status}: {output}");
    }
}

/// Plays `scene` in a process of its own: this binary runs again with only the test that calls, called `test`, and the scene's name in
/// a variable.
pub fn in_child(test: &str, name: &str, scene: impl FnOnce()) -> Scene {
    const PLAYING: &str = "PAGEFERRY_SCENE";
    match std::env::var(PLAYING) {
        Ok(playing) if playing == name => {
            scene();
            std::process::exit(0);
        }
        Ok(_) => return Scene(None),
        Err(_) => {}
    }
    let output = Command::new("timeout")
        .arg((PATIENCE * 3).as_secs().to_string())
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(PLAYING, name)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let printed = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(!printed.contains("running 0 tests"), "there is no test called {test}: {printed}");
    Scene(Some((output.status, printed)))
}

/// Lets children of fork(2) inherit a region, against what it was opened with.
pub fn inherit(region: &Region) {
    let start = std::ptr::NonNull::new(region.as_ptr().cast()).unwrap();
    // SAFETY: changes neither content nor address of the region's own range.
    unsafe { nix::sys::mman::madvise(start, region.len(), nix::sys::mman::MmapAdvise::MADV_DOFORK) }.unwrap();
}

/// How a child is made: by the bare system call, or by the C library's fork(3), which keeps the allocator's locks until the kernel's message about the
/// child was read.
pub const FORKS: [fn() -> libc::pid_t; 2] = [clone, fork];

fn clone() -> libc::pid_t {
    // SAFETY: no flag but the signal at the child's end: a copy of the process, whose one thread only does what `ended` lets it.
    let child = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
    libc::pid_t::try_from(child).unwrap()
}

pub fn fork() -> libc::pid_t {
    // SAFETY: as above.
    unsafe { libc::fork() }
}

/// How a forked child ends whose last act is `act`, which must make no call that is forbidden there (signal-safety(7)): its code, or the signal.
pub fn ended(fork: fn() -> libc::pid_t, act: impl FnOnce() -> i32) -> Result<i32, i32> {
    let child = fork();
    assert!(child >= 0, "no child: {}", std::io::Error::last_os_error());
    if child == 0 {
        let code = act();
        // SAFETY: ends the child and runs nothing else.
        unsafe { libc::_exit(code) };
    }
    let mut status = 0;
    // SAFETY: `status` is valid for the call.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    if libc::WIFEXITED(status) { Ok(libc::WEXITSTATUS(status)) } else { Err(libc::WTERMSIG(status)) }
}

/// What a forked child finds in the first byte at an address: the byte, or the signal that the touch raised.
pub fn seen_by_a_child(fork: fn() -> libc::pid_t, address: usize) -> Result<i32, i32> {
    // SAFETY: a signal is one of the answers, for what is missing and for what is not mapped.
    ended(fork, || unsafe { (address as *const u8).read_volatile() }.into())
}
