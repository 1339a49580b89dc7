//! Trackers: one suite for all, against the real kernel. What is told must be what was written; under racing writers no write may be missed.

mod common;

use common::{PAGE, PATIENCE, Random, Watchdog, memory, page_bytes, uffd, watchdog};
use nix::sys::mman::{MRemapFlags, MmapAdvise, madvise, mremap};
use pageferry::{
    Capabilities, Extent, FaultAround, MemoryStore, PageSize, PageStore, Pager, PagerOptions, Program, Region, RegionError,
    TrackerKind, Tracking, testing::Gated,
};
use std::{
    collections::BTreeSet,
    ffi::c_void,
    ptr::NonNull,
    sync::{
        PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
};

const ALL: [TrackerKind; 3] = [TrackerKind::WpAsync, TrackerKind::WpSync, TrackerKind::SoftDirty];
/// Those that tell only what was written.
const EXACT: [TrackerKind; 2] = [TrackerKind::WpAsync, TrackerKind::WpSync];

/// Soft-dirty bits are one set for the whole process, and a new mapping that the kernel merges with an old one makes all of it dirty: nothing else runs beside.
#[expect(dead_code, reason = "held")]
enum Turn {
    Beside(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

impl Turn {
    fn wait(kind: TrackerKind) -> Turn {
        static TURNS: RwLock<()> = RwLock::new(());
        match kind {
            TrackerKind::SoftDirty => Turn::Alone(TURNS.write().unwrap_or_else(PoisonError::into_inner)),
            _ => Turn::Beside(TURNS.read().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// What a test has to do with one kind of tracker.
struct Suite {
    kind: TrackerKind,
    pager: Pager,
    _turn: Turn,
    _watchdog: Watchdog,
}

impl Suite {
    /// One for each of these kinds that there is here.
    fn each(kinds: &[TrackerKind]) -> impl Iterator<Item = Suite> {
        kinds.iter().filter_map(|kind| Suite::begin(*kind))
    }

    fn begin(kind: TrackerKind) -> Option<Suite> {
        if !uffd() {
            return None;
        }
        let turn = Turn::wait(kind);
        let pager = pager_of(kind);
        let probe = Region::builder().size(1).pager(&pager).open().unwrap();
        match (kind, probe.track()) {
            (_, Ok(tracking)) => assert_eq!(tracking.kind(), kind),
            // `make test-guest` runs these where the kernel has the bits.
            (TrackerKind::SoftDirty, Err(RegionError::NoTracker { reason, remedy })) => {
                assert!(reason.contains("soft-dirty") && remedy.contains("kernel"), "{reason}; {remedy}");
                assert_ne!(std::env::var("REQUIRE_SOFT_DIRTY").as_deref(), Ok("1"), "REQUIRE_SOFT_DIRTY=1, but: {reason}");
                eprintln!("\n*** NOT TESTED HERE, see `make test-guest`: {reason}\n");
                return None;
            }
            (_, Err(error)) => {
                let offered = Capabilities::probe();
                assert!(!offered.write_protect() || !offered.write_protect_async(), "{error}");
                assert_ne!(std::env::var("REQUIRE_UFFD").as_deref(), Ok("1"), "REQUIRE_UFFD=1, but: {error}");
                eprintln!("\n*** SKIPPED, NOTHING WAS TESTED: {error}\n");
                return None;
            }
        }
        Some(Suite { kind, pager, _turn: turn, _watchdog: watchdog() })
    }

    fn plain(&self, pages: u64) -> Region {
        Region::builder().name("followed").size(pages * PAGE as u64).pager(&self.pager).open().unwrap()
    }

    fn filled(&self, store: impl PageStore) -> Region {
        Region::builder().name("filled").store(store).fault_around(FaultAround::OFF).pager(&self.pager).open().unwrap()
    }

    /// Both kinds of regions: with nothing behind them and content already, and filled from a store on touch.
    fn regions(&self, pages: u64) -> [Region; 2] {
        let plain = self.plain(pages);
        for page in 0..pages / 2 {
            plain.write_at(page * PAGE as u64, &page_bytes(page)).unwrap();
        }
        let filled = self.filled(memory(pages));
        for page in 0..pages / 2 {
            common::assert_page(&filled, page);
        }
        [plain, filled]
    }

    /// Follows from now on.
    fn track(&self, region: &Region) -> Tracking {
        let tracking = region.track().unwrap();
        if self.kind == TrackerKind::SoftDirty {
            // Its first take gives all that was ever written.
            tracking.take(Program::Paused).unwrap().acknowledge();
        }
        tracking
    }

    /// Nothing in these tests writes while it is asked, but for those about racing writers.
    fn program(&self) -> Program {
        if self.kind == TrackerKind::SoftDirty { Program::Paused } else { Program::Running }
    }

    #[track_caller]
    fn assert_told(&self, tracking: &Tracking, expected: &[u64]) {
        let written = tracking.take(self.program()).unwrap();
        let told: Vec<u64> = written.extents().iter().flat_map(|extent| extent.pages()).collect();
        assert_eq!(told, expected, "{} of {:?}", self.kind, tracking.region());
        let joined = written.extents().windows(2).all(|two| two[0].end() < two[1].first());
        assert!(joined, "extents touch: {:?}", written.extents());
        written.acknowledge();
    }
}

fn pager_of(kind: TrackerKind) -> Pager {
    Pager::start(&PagerOptions { tracker: Some(kind), ..PagerOptions::default() }).unwrap()
}

fn write(region: &Region, page: u64) {
    region.write_at(page * PAGE as u64 + 8, &[0xAB; 3]).unwrap();
}

fn madvise_away(region: &Region, page: u64) {
    let start = NonNull::new(common::address_of(region, page) as *mut c_void).unwrap();
    // SAFETY: a page of the region; only atomics look at it.
    unsafe { madvise(start, PAGE, MmapAdvise::MADV_DONTNEED) }.unwrap();
}

#[test]
fn each_write_is_told_once() {
    for suite in Suite::each(&ALL) {
        for region in suite.regions(40) {
            let tracking = suite.track(&region);
            suite.assert_told(&tracking, &[]);
            // Present and not, first and last, side by side and twice.
            for page in [0, 3, 4, 5, 4, 19, 20, 30, 39] {
                write(&region, page);
            }
            suite.assert_told(&tracking, &[0, 3, 4, 5, 19, 20, 30, 39]);
            suite.assert_told(&tracking, &[]);
            write(&region, 4);
            suite.assert_told(&tracking, &[4]);
            suite.assert_told(&tracking, &[]);
        }
    }
}

#[test]
fn reads_are_not_told() {
    for suite in Suite::each(&ALL) {
        let [plain, filled] = suite.regions(40);
        let told = suite.track(&plain);
        for page in 0..20 {
            common::assert_page(&plain, page);
        }
        suite.assert_told(&told, &[]);
        if suite.kind != TrackerKind::SoftDirty {
            let told = suite.track(&filled);
            for page in 0..40 {
                common::assert_page(&filled, page);
            }
            suite.assert_told(&told, &[]);
        }
    }
}

#[test]
fn writes_from_inside_system_calls_are_told() {
    for suite in Suite::each(&ALL) {
        if !common::uffd_in_system_calls() {
            return;
        }
        for region in suite.regions(40) {
            let tracking = suite.track(&region);
            let bytes = vec![7; 2 * PAGE];
            let local = [std::io::IoSlice::new(&bytes)];
            let remote = [nix::sys::uio::RemoteIoVec { base: common::address_of(&region, 10), len: 2 * PAGE }];
            let done = nix::sys::uio::process_vm_writev(nix::unistd::Pid::this(), &local, &remote).unwrap();
            assert_eq!(done, 2 * PAGE);
            suite.assert_told(&tracking, &[10, 11]);
        }
    }
}

#[test]
fn what_is_not_acknowledged_comes_back() {
    for suite in Suite::each(&ALL) {
        for region in suite.regions(40) {
            let tracking = suite.track(&region);
            write(&region, 7);
            let taken = tracking.take(suite.program()).unwrap();
            assert_eq!((taken.pages(), taken.extents()), (1, &[Extent::page(7)][..]));
            write(&region, 8);
            drop(taken);
            suite.assert_told(&tracking, &[7, 8]);
            suite.assert_told(&tracking, &[]);
        }
    }
}

#[test]
fn what_the_store_brings_is_no_write() {
    for suite in Suite::each(&EXACT) {
        const PAGES: u64 = 3000;
        let region = suite.filled(memory(PAGES));
        let tracking = suite.track(&region);
        common::block_on(region.pull()).unwrap();
        suite.assert_told(&tracking, &[]);
        write(&region, 2999);
        suite.assert_told(&tracking, &[2999]);
    }
}

#[test]
fn discards_are_told() {
    for suite in Suite::each(&ALL) {
        for region in suite.regions(40) {
            let tracking = suite.track(&region);
            region.discard(3 * PAGE as u64..5 * PAGE as u64).unwrap();
            suite.assert_told(&tracking, &[3, 4]);
            suite.assert_told(&tracking, &[]);
            write(&region, 4);
            let told: BTreeSet<u64> =
                tracking.take(suite.program()).unwrap().extents().iter().flat_map(|extent| extent.pages()).collect();
            assert_eq!(told, BTreeSet::from([4]));
        }
    }
}

#[test]
fn discards_by_madvise_are_told() {
    for suite in Suite::each(&ALL) {
        for region in suite.regions(40) {
            let tracking = suite.track(&region);
            madvise_away(&region, 3);
            suite.assert_told(&tracking, &[3]);
            // Whether the kernel has dropped it by now is not known, until the program pauses.
            suite.assert_told(&tracking, if suite.kind == TrackerKind::SoftDirty { &[] } else { &[3] });
            tracking.take(Program::Paused).unwrap().acknowledge();
            suite.assert_told(&tracking, &[]);
            write(&region, 3);
            suite.assert_told(&tracking, &[3]);
        }
    }
}

/// Whoever follows may have read it meanwhile, and must learn that it is empty again.
#[test]
fn a_page_that_was_empty_when_taken_then_written_and_discarded_is_told() {
    for suite in Suite::each(&ALL) {
        for region in suite.regions(40) {
            // One that was empty when following began, and one that is empty when taken.
            let tracking = suite.track(&region);
            madvise_away(&region, 3);
            tracking.take(Program::Paused).unwrap().acknowledge();
            for page in [3, 30] {
                write(&region, page);
                madvise_away(&region, page);
            }
            suite.assert_told(&tracking, &[3, 30]);
        }
    }
}

#[test]
fn a_region_is_followed_once_at_a_time() {
    for suite in Suite::each(&ALL) {
        let region = suite.plain(4);
        let tracking = suite.track(&region);
        let error = region.track().unwrap_err();
        assert!(matches!(&error, RegionError::AlreadyTracked { region } if region == "followed"), "{error}");
        drop(tracking);
        let tracking = suite.track(&region);
        write(&region, 2);
        suite.assert_told(&tracking, &[2]);
    }
}

#[test]
fn threads_write_freely_when_nobody_follows() {
    for suite in Suite::each(&ALL) {
        for region in suite.regions(40) {
            drop(suite.track(&region));
            (0..40).for_each(|page| write(&region, page));
            // And what was written meanwhile is not told by the next to follow, but all after it.
            let tracking = suite.track(&region);
            suite.assert_told(&tracking, &[]);
            write(&region, 0);
            suite.assert_told(&tracking, &[0]);
        }
    }
}

#[test]
fn moved_memory_is_followed() {
    for suite in Suite::each(&EXACT) {
        for region in suite.regions(40) {
            let tracking = suite.track(&region);
            let from = NonNull::new(common::address_of(&region, 8) as *mut c_void).unwrap();
            let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_DONTUNMAP;
            // SAFETY: four pages of the region, which only atomics look at; their old addresses stay taken.
            let moved = unsafe { mremap(from, 4 * PAGE, 4 * PAGE, flags, None) }.unwrap();
            // SAFETY: the second page of those, aligned; they stay mapped for as long as the process lives.
            let word = unsafe { AtomicU64::from_ptr(moved.as_ptr().cast::<u64>().add(512)) };
            for _ in 0..2 {
                word.fetch_add(1, Relaxed);
                suite.assert_told(&tracking, &[9]);
                suite.assert_told(&tracking, &[]);
            }
        }
    }
}

/// Writers that count in words of their own, and a copy that is kept up by what is told: at the end it must be the region.
struct Race<'a> {
    suite: &'a Suite,
    region: &'a Region,
    copy: Vec<u8>,
    discards: bool,
}

const WRITERS: u64 = 8;

impl Race<'_> {
    fn run(mut self, seed: u64, takes: u64) {
        let (region, pages) = (self.region, self.region.extent().count());
        let tracking = self.suite.track(region);
        // The copy is of the moment at which following began, or older: what was written since is told.
        let (stop, gate, writes) = (AtomicBool::new(false), RwLock::new(()), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (stop, gate, writes) = (&stop, &gate, &writes);
                let discards = self.discards && writer == 0;
                scope.spawn(move || {
                    let words = region.atomics_u64(0, region.len() / 8).unwrap();
                    let mut random = Random(seed ^ writer << 32);
                    while !stop.load(Relaxed) {
                        let _pass = gate.read().unwrap();
                        let page = random.below(pages);
                        if discards && random.below(4) == 0 {
                            match random.below(2) {
                                0 => madvise_away(region, page),
                                _ => region.discard(page * PAGE as u64..(page + 1) * PAGE as u64).unwrap(),
                            }
                        } else {
                            words[(page * 512 + writer + 8 * random.below(64)) as usize].fetch_add(1, Relaxed);
                        }
                        writes.fetch_add(1, Relaxed);
                    }
                });
            }
            for take in 0..takes {
                let start = Instant::now();
                let before = writes.load(Relaxed);
                self.take(&tracking, &gate, take % 7 == 3);
                // Each take has writes to race with.
                while writes.load(Relaxed) < before + 50 {
                    assert!(start.elapsed() < PATIENCE, "writers hang at take {take}");
                    std::thread::yield_now();
                }
            }
            stop.store(true, Relaxed);
        });
        self.catch_up(tracking.take(Program::Paused).unwrap().extents());
        for page in 0..pages {
            let at = page as usize * PAGE;
            let mut bytes = vec![0; PAGE];
            region.read_at(at as u64, &mut bytes).unwrap();
            assert!(bytes == self.copy[at..at + PAGE], "{}: a write to page {page} was missed (seed {seed})", self.suite.kind);
        }
    }

    fn take(&mut self, tracking: &Tracking, gate: &RwLock<()>, forget: bool) {
        let written = if self.suite.kind == TrackerKind::SoftDirty {
            let _paused = gate.write().unwrap();
            tracking.take(Program::Paused).unwrap()
        } else {
            tracking.take(Program::Running).unwrap()
        };
        if forget {
            // Never sent: it must come back.
            return;
        }
        self.catch_up(written.extents());
        written.acknowledge();
    }

    fn catch_up(&mut self, extents: &[Extent]) {
        for extent in extents {
            let (from, to) = (extent.first() as usize * PAGE, extent.end() as usize * PAGE);
            self.region.read_at(from as u64, &mut self.copy[from..to]).unwrap();
        }
    }
}

fn takes(suite: &Suite) -> u64 {
    // Under emulation a take takes long.
    if suite.kind == TrackerKind::SoftDirty { 40 } else { 80 }
}

#[test]
fn no_write_is_missed_under_racing_writers() {
    for suite in Suite::each(&ALL) {
        let region = suite.plain(256);
        Race { suite: &suite, copy: vec![0; region.len()], region: &region, discards: false }.run(0x1, takes(&suite));
    }
}

#[test]
fn no_write_is_missed_while_the_region_fills() {
    for suite in Suite::each(&ALL) {
        let store = Gated::new(memory(512));
        let region = suite.filled(store.clone());
        store.open();
        let pulled = region.clone();
        let pull = std::thread::spawn(move || common::block_on(pulled.pull()));
        let copy = (0..512).flat_map(page_bytes).collect();
        Race { suite: &suite, region: &region, copy, discards: false }.run(0x2, takes(&suite));
        pull.join().unwrap().unwrap();
    }
}

#[test]
fn no_write_is_missed_among_discards() {
    for suite in Suite::each(&ALL) {
        let region = suite.plain(64);
        Race { suite: &suite, copy: vec![0; region.len()], region: &region, discards: true }.run(0x3, takes(&suite));
        let region = suite.filled(memory(64));
        let copy = (0..64).flat_map(page_bytes).collect();
        Race { suite: &suite, region: &region, copy, discards: true }.run(0x4, takes(&suite));
    }
}

#[test]
fn two_regions_do_not_clear_each_others_bits() {
    for suite in Suite::each(&[TrackerKind::SoftDirty]) {
        let (one, two) = (suite.plain(8), suite.plain(8));
        let (of_one, of_two) = (suite.track(&one), suite.track(&two));
        write(&one, 1);
        write(&two, 2);
        suite.assert_told(&of_one, &[1]);
        suite.assert_told(&of_two, &[2]);
    }
}

#[test]
fn a_running_program_is_refused() {
    for suite in Suite::each(&[TrackerKind::SoftDirty]) {
        let region = suite.plain(8);
        let tracking = suite.track(&region);
        let error = tracking.take(Program::Running).unwrap_err();
        assert!(
            matches!(error, RegionError::MustPause { tracker: TrackerKind::SoftDirty }) && error.to_string().contains("pause"),
            "{error}"
        );
    }
}

#[test]
fn a_second_pager_is_refused() {
    for suite in Suite::each(&[TrackerKind::SoftDirty]) {
        let region = suite.plain(8);
        let tracking = suite.track(&region);
        let other = Region::builder().size(1).pager(&pager_of(TrackerKind::SoftDirty)).open().unwrap();
        let error = other.track().unwrap_err();
        assert!(matches!(error, RegionError::NoTracker { .. }) && error.to_string().contains("the same pager"), "{error}");
        drop(tracking);
        let tracking = other.track().unwrap();
        drop(tracking);
    }
}

#[test]
fn the_best_tracker_is_chosen() {
    if !uffd() {
        return;
    }
    let _turn = Turn::wait(TrackerKind::WpAsync);
    let offered = Capabilities::probe();
    let region = Region::builder().size(1).pager(&common::pager()).open().unwrap();
    let expected = match (offered.write_protect(), offered.write_protect_async()) {
        (true, true) => TrackerKind::WpAsync,
        (true, false) => TrackerKind::WpSync,
        _ => TrackerKind::SoftDirty,
    };
    match region.track() {
        Ok(tracking) => assert_eq!(tracking.kind(), expected),
        Err(error) => assert!(matches!(error, RegionError::NoTracker { .. }) && !offered.write_protect(), "{error}"),
    }
}

#[test]
fn pages_of_zeros_from_the_store_may_be_told_and_writes_to_them_are() {
    for suite in Suite::each(&EXACT) {
        let region = suite.filled(MemoryStore::zeroed(8 * PAGE as u64, PageSize::KIB_4));
        let tracking = suite.track(&region);
        common::block_on(region.pull()).unwrap();
        tracking.take(Program::Running).unwrap().acknowledge();
        suite.assert_told(&tracking, &[]);
        write(&region, 3);
        suite.assert_told(&tracking, &[3]);
    }
}

#[test]
fn lost_pages_of_a_followed_region_raise_an_error_and_are_not_told() {
    for suite in Suite::each(&EXACT) {
        let store = Gated::new(memory(8));
        let loss = pageferry::LossPolicy { keep_trying: std::time::Duration::ZERO, then: pageferry::OnLoss::Poison };
        let builder = Region::builder().store(store.clone()).fault_around(FaultAround::OFF).pager(&suite.pager).loss(loss);
        let region = builder.open().unwrap();
        let tracking = suite.track(&region);
        store.fail_next(usize::MAX, pageferry::StoreError::Closed);
        store.open();
        assert!(region.populate_blocking(0..PAGE as u64).is_err());
        assert!(matches!(region.read_at(0, &mut [0]), Err(RegionError::Lost { .. })));
        suite.assert_told(&tracking, &[]);
    }
}
