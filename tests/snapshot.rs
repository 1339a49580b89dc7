//! Snapshots of running programs: the copy is the program as it was in the pause, whatever it does meanwhile, and whatever fails leaves it running.
//!
//! Method: a bank whose accounts lie in two regions. Its threads move money between accounts, also of different regions, and pass their gate between two transfers; in the
//! pause the state closure copies the regions byte by byte, and the snapshot must be just that. A store that writes no further before so many more transfers were made has
//! each copy race with writers.

mod common;
#[path = "common/net.rs"]
#[allow(clippy::duplicate_mod, reason = "helpers of two kinds of tests")]
mod net;

use async_trait::async_trait;
use common::{KIB_4, PAGE, PATIENCE, Random, uffd, watchdog};
use pageferry::{
    Capabilities, Content, Extent, FileStore, Gate, Grant, MemoryStore, PageSize, PageStore, Pager, PagerOptions, Pass, Program,
    Pull, Region, RegionError, Run, Server, Snapshot, SnapshotBuilder, SnapshotError, StoreError, TrackerKind,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// Pages of each region: 1 MiB and a bit, so that there are several steps.
const PAGES: u64 = 300;
const WORDS: usize = PAGE / 8;
/// Each page is an account: its balance, how often it changed, and that again in the last word of the page.
const BALANCE: usize = 0;
const CHANGES: usize = 1;
const CHANGES_AGAIN: usize = WORDS - 1;
const OPENING: u64 = 1_000_000;
const THREADS: u64 = 3;

fn freezes() -> bool {
    uffd() && Capabilities::probe().write_protect()
}

/// See the file's header.
struct Bank {
    regions: [Region; 2],
    gate: Gate,
    transfers: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Bank {
    /// With a plain region, and one on a pager that can freeze by itself.
    fn open() -> Bank {
        let wp_sync = Pager::start(&PagerOptions { tracker: Some(TrackerKind::WpSync), ..PagerOptions::default() }).unwrap();
        let one = Region::builder().name("one").size(PAGES * PAGE as u64).open().unwrap();
        let two = Region::builder().name("two").size(PAGES * PAGE as u64).pager(&wp_sync).open().unwrap();
        for region in [&one, &two] {
            let words = region.atomics_u64(0, region.len() / 8).unwrap();
            // Every third page holds nothing.
            (0..PAGES as usize).filter(|page| page % 3 != 0).for_each(|page| words[page * WORDS].store(OPENING, Relaxed));
        }
        let mut bank =
            Bank { regions: [one, two], gate: Gate::new(), transfers: Arc::default(), stop: Arc::default(), threads: Vec::new() };
        for thread in 0..THREADS {
            let (regions, gate) = (bank.regions.clone(), bank.gate.enter());
            let (transfers, stop) = (bank.transfers.clone(), bank.stop.clone());
            bank.threads.push(std::thread::spawn(move || {
                let words: Vec<_> = regions.iter().map(|region| region.atomics_u64(0, region.len() / 8).unwrap()).collect();
                let mut random = Random(thread);
                // A thread's accounts are its own, so that one store each is enough.
                let mut account = || {
                    let page = random.below(PAGES / THREADS) * THREADS + thread;
                    let words = words[random.below(2) as usize];
                    &words[page as usize * WORDS..][..WORDS]
                };
                while !stop.load(Relaxed) && gate.pass() == Pass::Run {
                    let (from, to) = (account(), account());
                    let money = from[BALANCE].load(Relaxed) / 3;
                    for (account, change) in [(from, 0_u64.wrapping_sub(money)), (to, money)] {
                        let changes = account[CHANGES].load(Relaxed) + 1;
                        account[CHANGES].store(changes, Relaxed);
                        account[BALANCE].store(account[BALANCE].load(Relaxed).wrapping_add(change), Relaxed);
                        account[CHANGES_AGAIN].store(changes, Relaxed);
                    }
                    // Now and then, or they take the processors from the pager, and from who copies.
                    if transfers.fetch_add(1, Relaxed).is_multiple_of(64) {
                        std::thread::yield_now();
                    }
                }
            }));
        }
        bank
    }

    /// Patient, on a busy machine.
    fn snapshot(&self) -> SnapshotBuilder {
        Snapshot::builder().gate(&self.gate).pause_limit(PATIENCE)
    }

    /// Returns when so many more transfers were made.
    fn go_on(&self, more: u64) {
        after(&self.transfers, more);
    }

    fn stop(self) {
        self.stop.store(true, Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    /// What the state closure does: everything, byte by byte.
    fn copy(&self) -> impl FnOnce() -> Vec<u8> + Send + 'static {
        let regions = self.regions.clone();
        move || {
            let read = |region: &Region| {
                let mut bytes = vec![0; region.len()];
                region.read_at(0, &mut bytes).unwrap();
                bytes
            };
            regions.iter().flat_map(read).collect()
        }
    }

    fn racing<S: PageStore>(&self, store: &Arc<S>, transfers: u64) -> Racing<S> {
        Racing { store: store.clone(), transfers: self.transfers.clone(), more: transfers, fail_at: None }
    }
}

fn after(transfers: &AtomicU64, more: u64) {
    let (start, until) = (Instant::now(), transfers.load(Relaxed) + more);
    while transfers.load(Relaxed) < until {
        assert!(start.elapsed() < PATIENCE, "the bank hangs");
        std::thread::yield_now();
    }
}

/// The sum is what it was at the opening, and no account is half changed.
#[track_caller]
fn assert_sound(bytes: &[u8]) {
    let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().unwrap());
    let accounts = bytes.len() / PAGE;
    let sum = (0..accounts).fold(0_u64, |sum, page| sum.wrapping_add(word(page * WORDS + BALANCE)));
    assert_eq!(sum, OPENING * (0..PAGES).filter(|page| page % 3 != 0).count() as u64 * 2);
    for page in 0..accounts {
        assert_eq!(word(page * WORDS + CHANGES), word(page * WORDS + CHANGES_AGAIN), "account {page} is half changed");
    }
}

async fn content(store: &dyn PageStore) -> Vec<u8> {
    let mut bytes = vec![0; store.size() as usize];
    store.read_into(store.extent(), &mut bytes).await.unwrap();
    bytes
}

/// A store that waits for transfers before each write, and may fail.
struct Racing<S> {
    store: Arc<S>,
    transfers: Arc<AtomicU64>,
    more: u64,
    fail_at: Option<u64>,
}

#[async_trait]
impl<S: PageStore> PageStore for Racing<S> {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.store.read(extent).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        let (transfers, more) = (self.transfers.clone(), self.more);
        tokio::task::spawn_blocking(move || after(&transfers, more)).await.unwrap();
        if self.fail_at.is_some_and(|page| extent.contains(page)) {
            return Err(StoreError::Closed);
        }
        self.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.store.flush().await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        self.store.pull(extents).await
    }
}

fn memory_store() -> Arc<MemoryStore> {
    Arc::new(MemoryStore::zeroed(PAGES * PAGE as u64, KIB_4))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_copy_is_the_moment_of_the_pause() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let directory = tempfile::tempdir().unwrap();
    let bank = Bank::open();
    for round in 0..3 {
        bank.go_on(100);
        // One copy in memory, one in a file; what the memory held before is written over.
        let memory = memory_store();
        memory.write(Extent::between(0, PAGES), &vec![0xEE; PAGES as usize * PAGE]).await.unwrap();
        let file = Arc::new(FileStore::create(directory.path().join(round.to_string()), PAGES * PAGE as u64, KIB_4).unwrap());
        let told = Arc::new(AtomicU64::new(0));
        let builder = bank.snapshot().state(bank.copy());
        let builder = builder.copy(&bank.regions[0], bank.racing(&memory, 200)).copy(&bank.regions[1], bank.racing(&file, 200));
        let snapshot = builder.progress({
            let told = told.clone();
            move |progress| {
                assert!(progress.done_pages >= told.swap(progress.done_pages, Relaxed) && progress.pages == 2 * PAGES);
            }
        });
        let snapshot = snapshot.take().await.unwrap();
        let copy = [content(&*memory).await, content(&*file).await].concat();
        assert_sound(&snapshot.state);
        assert!(copy == snapshot.state, "the copy is of another moment");
        assert!(snapshot.saved_pages > 0 && snapshot.paused >= snapshot.armed_in && snapshot.held_bytes_max > 0, "{snapshot:?}");
        assert_eq!(told.load(Relaxed), 2 * PAGES);
        assert_eq!(snapshot.written_bytes + snapshot.skipped_bytes, 2 * PAGES * PAGE as u64);
        assert_eq!(memory.extent(), bank.regions[0].extent());
    }
    // Nothing is frozen any more.
    bank.regions.iter().for_each(|region| drop(region.freeze(Program::Paused).unwrap()));
    bank.stop();
}

#[tokio::test]
async fn long_runs_of_zeros_are_holes_where_the_store_has_holes_and_written_elsewhere() {
    if !freezes() {
        return;
    }
    let region = Region::builder().name("sparse").size(PAGES * PAGE as u64 - 100).open().unwrap();
    region.write_at(0, &[1; PAGE]).unwrap();
    region.write_at((PAGES - 1) * PAGE as u64, &[2; PAGE - 100]).unwrap();
    for (old, written_pages) in [(0, 2), (7, PAGES)] {
        let store = MemoryStore::zeroed(PAGES * PAGE as u64 - 100, KIB_4);
        if old != 0 {
            store.write(store.extent(), &vec![old; PAGES as usize * PAGE]).await.unwrap();
        }
        let snapshot = Snapshot::builder().copy(&region, store.clone()).take().await.unwrap();
        let runs = store.read(store.extent()).await.unwrap();
        let bytes: Vec<u8> = runs
            .iter()
            .flat_map(|run| match &run.content {
                Content::Zero => vec![0; run.extent.count() as usize * PAGE],
                Content::Bytes(bytes) => bytes.to_vec(),
            })
            .collect();
        let mut expected = vec![0; PAGES as usize * PAGE];
        region.read_at(0, &mut expected).unwrap();
        assert!(bytes == expected, "over {old}");
        assert_eq!(snapshot.written_bytes, written_pages * PAGE as u64, "over {old}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_fails_is_an_error_and_the_program_runs_on() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let bank = Bank::open();
    for fail_at in [0, PAGES - 1] {
        let fails = Racing { fail_at: Some(fail_at), ..bank.racing(&memory_store(), 50) };
        let builder = Snapshot::builder()
            .gate(&bank.gate)
            .copy(&bank.regions[0], fails)
            .copy(&bank.regions[1], memory_store().as_ref().clone());
        let error = builder.take().await.unwrap_err();
        assert!(matches!(&error, SnapshotError::Store { region, source: StoreError::Closed } if region == "one"), "{error}");
        bank.go_on(1000);
        bank.regions.iter().for_each(|region| drop(region.freeze(Program::Paused).unwrap()));
    }
    bank.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_begun_is_an_error_and_the_program_runs_on() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let bank = Bank::open();
    let [one, two] = &bank.regions;
    let snapshot = || bank.snapshot().pause_limit(Duration::from_millis(50));
    // A store that is too small, and one with other pages.
    let small = snapshot().copy(one, MemoryStore::zeroed(PAGE as u64, KIB_4)).take().await.unwrap_err();
    assert!(matches!(small, SnapshotError::Region { source: RegionError::StoreTooSmall { .. }, .. }), "{small}");
    let other = MemoryStore::zeroed(PAGES * PAGE as u64, PageSize::new(8192).unwrap());
    let other = snapshot().copy(one, other).take().await.unwrap_err();
    assert!(matches!(other, SnapshotError::Region { source: RegionError::PageSizeDiffers { .. }, .. }), "{other}");
    // A thread that does not pass.
    let never_passes = bank.gate.enter();
    let late = snapshot().copy(one, memory_store().as_ref().clone()).take().await.unwrap_err();
    assert!(matches!(late, SnapshotError::Pause(error) if error.running >= 1), "{late}");
    drop(never_passes);
    bank.go_on(100);
    // The second of two is frozen by somebody else.
    let snapshot = || bank.snapshot();
    let frozen = two.freeze(Program::Paused).unwrap();
    let taken = snapshot().keep(one).keep(two).freeze().await.unwrap_err();
    assert!(
        matches!(&taken, SnapshotError::Region { region, source: RegionError::AlreadyFrozen { .. } } if region == "two"),
        "{taken}"
    );
    drop(frozen);
    bank.go_on(100);
    let panics = snapshot().keep(one).state(|| panic!("no state today")).freeze().await.unwrap_err();
    assert!(matches!(&panics, SnapshotError::CutShort(text) if text.contains("no state today")), "{panics}");
    bank.go_on(100);
    drop(snapshot().keep(one).keep(two).freeze().await.unwrap());
    bank.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_that_is_dropped_at_any_moment_leaves_the_program_running() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let bank = Bank::open();
    for polls in 0..40_u64 {
        let builder = bank.snapshot().state(bank.copy()).copy(&bank.regions[0], bank.racing(&memory_store(), 5));
        let mut taking = Box::pin(builder.copy(&bank.regions[1], bank.racing(&memory_store(), 5)).take());
        // So many turns, then dropped; early ones are in the pause.
        for _ in 0..polls {
            let turn = std::future::poll_fn(|context| std::task::Poll::Ready(taking.as_mut().poll(context).is_ready()));
            if turn.await {
                break;
            }
            tokio::task::yield_now().await;
            if polls > 20 {
                bank.go_on(2);
            }
        }
        drop(taking);
        bank.go_on(200);
    }
    // The task of a pause that was dropped may be about to end still.
    let (start, regions) = (Instant::now(), &bank.regions);
    while let Err(error) = regions.iter().try_for_each(|region| region.freeze(Program::Paused).map(drop)) {
        assert!(matches!(error, RegionError::AlreadyFrozen { .. }) && start.elapsed() < PATIENCE, "{error}");
        tokio::task::yield_now().await;
    }
    bank.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clones_of_a_running_program_are_all_of_one_moment() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let bank = Bank::open();
    bank.go_on(500);
    let frozen = bank.snapshot().state(bank.copy()).keep(&bank.regions[0]).keep(&bank.regions[1]);
    let frozen = frozen.freeze().await.unwrap();
    let keys = net::Keys::new();
    let mut server = Server::builder(&keys.server);
    for frozen in &frozen.regions {
        server = server.grant(keys.client_id(), frozen.region().name(), frozen.clone(), Grant::Read);
    }
    let server = server.listen(net::LOOPBACK).unwrap();
    let mut clones = tokio::task::JoinSet::new();
    for clone in 0..3 {
        let (peer, names) = (keys.connect(server.local_addr()).await, ["one", "two"]);
        clones.spawn(async move {
            let mut content = Vec::new();
            for name in names {
                let region = Region::builder().name(name).store(peer.open(name).await.unwrap()).open().unwrap();
                // One by faults, one by a bulk read, one by both.
                let pulled = region.clone();
                let pull = tokio::spawn(async move {
                    if clone > 0 {
                        pulled.pull().await.unwrap();
                    }
                });
                if clone > 1 {
                    pull.await.unwrap();
                }
                let read = move || {
                    let mut bytes = vec![0; region.len()];
                    region.read_at(0, &mut bytes).unwrap();
                    bytes
                };
                content.extend(tokio::task::spawn_blocking(read).await.unwrap());
            }
            content
        });
    }
    assert_sound(&frozen.state);
    while let Some(content) = clones.join_next().await {
        assert!(content.unwrap() == frozen.state, "a clone is of another moment");
        bank.go_on(100);
    }
    assert!(frozen.regions.iter().map(pageferry::Frozen::saved_pages).sum::<u64>() > 0);
    drop(server);
    drop(frozen);
    bank.go_on(1000);
    bank.stop();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_limited_snapshot_takes_its_time() {
    if !freezes() {
        return;
    }
    let bank = Bank::open();
    let (start, limit) = (Instant::now(), 4 << 20);
    let builder = bank.snapshot().state(bank.copy()).bandwidth_limit(limit);
    let store = memory_store();
    let snapshot = builder.copy(&bank.regions[0], store.as_ref().clone()).take().await.unwrap();
    assert!(start.elapsed().as_secs_f64() >= snapshot.written_bytes as f64 / limit as f64, "{snapshot:?}");
    assert!(content(&*store).await == snapshot.state[..PAGES as usize * PAGE]);
    bank.stop();
}
