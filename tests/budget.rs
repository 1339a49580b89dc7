//! Mounts that may use less memory than they map: what is evicted comes back as it was last written, and what is here stays within the budget.

mod common;

use async_trait::async_trait;
use common::*;
use pageferry::{
    Extent, FaultAround, MemoryStore, Mount, MountBuilder, MountError, MountEvent, PageSize, PageStore, Pager, PagerOptions, Pull,
    ReadAfterRead, RegionError, Run, StoreError, TrackerKind,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::Duration,
};

const MIB: u64 = 1 << 20;

/// Counts what is asked of it, and refuses writes while it is told to.
#[derive(Clone)]
struct Counted(Arc<Inner>);

struct Inner {
    store: MemoryStore,
    read_pages: AtomicU64,
    written_pages: AtomicU64,
    refuses: AtomicBool,
}

fn counted(store: MemoryStore) -> Counted {
    let (read_pages, written_pages) = Default::default();
    Counted(Arc::new(Inner { store, read_pages, written_pages, refuses: AtomicBool::new(false) }))
}

#[async_trait]
impl PageStore for Counted {
    fn size(&self) -> u64 {
        self.0.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.0.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.0.read_pages.fetch_add(extent.count(), SeqCst);
        self.0.store.read(extent).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        // Others go first, as on a network.
        tokio::task::yield_now().await;
        if self.0.refuses.load(SeqCst) {
            return Err(StoreError::ReadOnly);
        }
        self.0.written_pages.fetch_add(extent.count(), SeqCst);
        self.0.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        Ok(Box::new(ReadAfterRead::new(self.clone(), extents)))
    }
}

fn mount_of(store: impl PageStore, budget: u64) -> MountBuilder {
    Mount::builder(Arc::new(store)).budget(budget).fault_around(FaultAround::OFF)
}

fn offset(page: u64) -> u64 {
    page * PAGE as u64
}

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap())
}

/// What the kernel says is in memory of a mount's region.
fn resident_bytes(mount: &Mount) -> u64 {
    let (start, end) = (address_of(mount.region(), 0), address_of(mount.region(), 0) + mount.region().len());
    let (mut inside, mut bytes) = (false, 0);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap().lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if let Some((from, to)) = first.split_once('-')
            && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
        {
            inside = from >= start && to <= end;
        } else if inside && first == "Rss:" {
            bytes += words.next().unwrap().parse::<u64>().unwrap() * 1024;
        }
    }
    bytes
}

/// Threads that read and write pages of their own at random, and check each value: 0 where nothing was written. Returns what each page of each thread should hold.
fn run_threads(mount: &Mount, threads: u64, steps: u64, writes_of_8: u64, seed: u64) -> Vec<u64> {
    let pages = mount.region().extent().count();
    let expected: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let run = |thread: u64| {
            let own = pages.div_ceil(threads);
            let mut expected = vec![0_u64; own as usize];
            let mut random = Random(seed * 1000 + thread);
            for step in 1..=steps {
                let at = random.below(own);
                let page = at * threads + thread;
                if page >= pages {
                    continue;
                }
                // The page's number, and how often it was written: an older content is as wrong as another page's.
                let word = offset(page) + 8 * (page % 512);
                let mut found = [0; 8];
                mount.region().read_at(word, &mut found).unwrap();
                assert_eq!(u64::from_le_bytes(found), expected[at as usize], "page {page}, step {step}, seed {seed}");
                if random.below(8) < writes_of_8 {
                    let next = (page << 32) | step;
                    mount.region().write_at(word, &next.to_le_bytes()).unwrap();
                    expected[at as usize] = next;
                }
            }
            expected
        };
        let handles: Vec<_> = (0..threads).map(|thread| scope.spawn(move || run(thread))).collect();
        handles.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    (0..pages).map(|page| expected[(page % threads) as usize][(page / threads) as usize]).collect()
}

async fn assert_stored(store: &Counted, expected: &[u64]) {
    let mut bytes = vec![0; PAGE];
    for (page, expected) in (0..).zip(expected) {
        store.0.store.read_into(Extent::page(page), &mut bytes).await.unwrap();
        let at = 8 * (page as usize % 512);
        assert_eq!(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()), *expected, "page {page} in the store");
    }
}

#[test]
fn random_reads_and_writes_hold_their_values_and_memory_stays_within_the_budget() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let (size, budget) = (number("BUDGET_SIZE_MIB", 256) * MIB, number("BUDGET_MIB", 32) * MIB);
    let steps = number("BUDGET_STEPS", 8_000);
    let store = counted(MemoryStore::zeroed(size, KIB_4));
    let mount = mount_of(store.clone(), budget).direct().push_every(Duration::from_millis(100)).open().unwrap();
    let (done, most) = (AtomicBool::new(false), AtomicU64::new(0));
    let expected = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(SeqCst) {
                most.fetch_max(resident_bytes(&mount), SeqCst);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let expected = run_threads(&mount, 4, steps, 3, 1);
        done.store(true, SeqCst);
        expected
    });
    let (most, stats) = (most.load(SeqCst), mount.region().stats());
    eprintln!("most resident {} KiB of {} KiB; {stats:?}", most >> 10, budget >> 10);
    assert!(stats.pages_evicted > 1000, "{stats:?}");
    assert!(most <= budget + budget / 20, "{most} bytes were resident, the budget is {budget}");
    assert!(most > budget / 2, "{most} bytes: what is measured is not the region");
    block_on(mount.close()).unwrap();
    block_on(assert_stored(&store, &expected));
}

#[test]
fn no_write_is_lost_under_a_tiny_budget() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    for seed in 0..number("BUDGET_RUNS", 2) {
        let store = counted(MemoryStore::zeroed(4 * MIB, KIB_4));
        let mount = Mount::builder(Arc::new(store.clone())).budget(MIB).push_every(Duration::from_millis(1)).open().unwrap();
        let expected = run_threads(&mount, 8, 1500, 4, seed);
        assert!(mount.region().stats().pages_evicted > 0);
        block_on(mount.close()).unwrap();
        block_on(assert_stored(&store, &expected));
    }
}

#[test]
fn a_program_that_writes_everything_is_held_up_by_pushes_and_loses_nothing() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = counted(memory(4096));
    let mount = mount_of(store.clone(), MIB).direct().open().unwrap();
    for page in 0..4096 {
        mount.region().write_at(offset(page), &page.to_le_bytes()).unwrap();
    }
    // Nobody flushed: the budget did.
    assert!(store.0.written_pages.load(SeqCst) >= 4096 - 256 - 32);
    assert!(resident_bytes(&mount) <= MIB + MIB / 20);
    for page in 0..4096 {
        let mut expected = page_bytes(page);
        expected[..8].copy_from_slice(&page.to_le_bytes());
        assert_same(page, &read_page(mount.region(), page), &expected);
    }
}

#[test]
fn a_store_that_refuses_writes_costs_memory_and_no_data() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = counted(memory(2048));
    let mount = mount_of(store.clone(), MIB).direct().open().unwrap();
    let mut events = mount.events();
    store.0.refuses.store(true, SeqCst);
    for page in 0..1024 {
        mount.region().write_at(offset(page), &page.to_le_bytes()).unwrap();
    }
    let over = block_on(async {
        loop {
            if let MountEvent::OverBudget { resident_bytes, budget_bytes } = events.recv().await.unwrap() {
                break (resident_bytes, budget_bytes);
            }
        }
    });
    assert!(over.1 == MIB && over.0 > MIB / 2, "{over:?}");
    assert!(resident_bytes(&mount) >= 4 * MIB - MIB / 2);
    for page in 0..1024 {
        let mut found = [0; 8];
        mount.region().read_at(offset(page), &mut found).unwrap();
        assert_eq!(u64::from_le_bytes(found), page);
    }
    assert!(matches!(block_on(mount.flush()), Err(MountError::Push { .. })));
    store.0.refuses.store(false, SeqCst);
    block_on(async { while !matches!(events.recv().await.unwrap(), MountEvent::WithinBudget) {} });
    assert!(resident_bytes(&mount) <= MIB + MIB / 20);
    for page in 0..2048 {
        let mut expected = page_bytes(page);
        if page < 1024 {
            expected[..8].copy_from_slice(&page.to_le_bytes());
        }
        assert_same(page, &read_page(mount.region(), page), &expected);
    }
}

#[test]
fn a_read_only_mount_drops_and_asks_again() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = counted(memory(2048));
    let mount = mount_of(store.clone(), MIB).direct().read_only().open().unwrap();
    for _ in 0..3 {
        (0..2048).for_each(|page| assert_page(mount.region(), page));
    }
    assert!(resident_bytes(&mount) <= MIB + MIB / 20);
    assert!(store.0.read_pages.load(SeqCst) > 3 * 1500);
    assert_eq!(store.0.written_pages.load(SeqCst), 0);
}

#[test]
fn what_is_discarded_reads_as_zeros_whether_it_was_evicted_or_not() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = counted(memory(1024));
    let mount = mount_of(store.clone(), MIB).direct().open().unwrap();
    (0..1024).for_each(|page| assert_page(mount.region(), page));
    for page in (0..1024).step_by(3) {
        mount.region().discard(offset(page)..offset(page + 1)).unwrap();
    }
    for _ in 0..2 {
        for page in 0..1024 {
            let expected = if page % 3 == 0 { vec![0; PAGE] } else { page_bytes(page) };
            assert_same(page, &read_page(mount.region(), page), &expected);
        }
    }
    // A page that was discarded and written is what was written, after it went and came too.
    mount.region().write_at(offset(3), b"three").unwrap();
    block_on(mount.flush()).unwrap();
    (100..1024).for_each(|page| drop(read_page(mount.region(), page)));
    assert_eq!(&read_page(mount.region(), 3)[..5], b"three");
}

#[test]
fn the_pull_ends_when_the_budget_is_full_and_evicts_nothing() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let mount = mount_of(counted(memory(2048)), MIB).open().unwrap();
    block_on(mount.pulled()).unwrap();
    let progress = mount.progress();
    assert_eq!((progress.resident_pages, progress.left, mount.region().stats().pages_evicted), (240, None, 0));
    (0..2048).for_each(|page| assert_page(mount.region(), page));
}

#[test]
fn threads_that_wait_for_room_go_on_when_the_mount_ends() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = counted(memory(1024));
    store.0.refuses.store(true, SeqCst);
    let mount = mount_of(store.clone(), MIB).direct().open().unwrap();
    let region = mount.region().clone();
    let writer = std::thread::spawn(move || {
        for page in 0..1024 {
            region.write_at(offset(page), b"more").unwrap();
        }
        region
    });
    let _ = block_on(mount.close());
    let region = writer.join().unwrap();
    (0..1024).for_each(|page| assert_eq!(&read_page(&region, page)[..4], b"more"));
}

#[test]
fn a_budget_that_cannot_be_kept_is_refused_with_numbers() {
    if !uffd() {
        return;
    }
    let store = || counted(memory(16));
    let small = mount_of(store(), MIB - 1).open().unwrap_err().to_string();
    assert!(small.contains("1048575") && small.contains("1048576"), "{small}");
    let other = mount_of(store(), MIB).pager(&pager()).open();
    assert!(matches!(other, Err(MountError::Region(RegionError::Budget { budget_bytes: MIB, .. }))), "{other:?}");
    let options = PagerOptions { tracker: Some(TrackerKind::WpSync), ..PagerOptions::default() };
    mount_of(store(), MIB).pager(&Pager::start(&options).unwrap()).open().unwrap();
    let mount = mount_of(counted(memory(1024)), MIB).direct().open().unwrap();
    let all = block_on(mount.region().populate(0..4 * MIB));
    assert!(matches!(all, Err(RegionError::Budget { .. })), "{all:?}");
    block_on(mount.region().populate(0..MIB / 2)).unwrap();
}
