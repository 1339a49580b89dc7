//! Threads fault on a region: from one to many, from any runtime, from inside system calls; each gets its bytes (S1, S2, S3).

mod common;

use async_trait::async_trait;
use common::*;
use pageferry::{
    Extent, FaultAround, MemoryStore, PageSize, PageStore, Pager, PagerOptions, Pull, Region, Run, StoreError, testing::Gated,
};
use std::{
    io::{Read, Write},
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

const PAGES: u64 = 256;

/// `threads` threads read all pages, each in an order of its own, and compare every byte.
fn read_everything(region: &Region, threads: u64) {
    let start = Barrier::new(threads as usize);
    std::thread::scope(|scope| {
        for seed in 0..threads {
            let start = &start;
            scope.spawn(move || {
                start.wait();
                for page in shuffled(region.extent().count(), seed) {
                    assert_page(region, page);
                }
            });
        }
    });
}

fn every_page_is_read_once(store: &Gated<MemoryStore>, pages: u64) {
    let mut reads = store.reads();
    reads.sort();
    assert!(reads.windows(2).all(|pair| pair[0].end() <= pair[1].first()), "a page was asked for twice: {reads:?}");
    assert_eq!(reads.iter().map(|read| read.count()).sum::<u64>(), pages);
}

fn any_number_of_threads(threads: u64, pages: u64) {
    let _watchdog = watchdog();
    for around in [FaultAround::default(), FaultAround::OFF] {
        let store = gated(pages);
        store.open();
        let region = Region::builder().store(store.clone()).pager(&pager()).fault_around(around).open().unwrap();
        read_everything(&region, threads);
        every_page_is_read_once(&store, pages);
        // A thread runs on as soon as its page is there, and the pager counts after that.
        until("the last page is counted", || region.stats().pages_demand + region.stats().pages_around == pages);
        let stats = region.stats();
        assert_eq!(stats.demand_requests + stats.around_requests, store.reads().len() as u64, "{stats:?}");
        assert_eq!(stats.faults, stats.demand_requests + stats.faults_joined + stats.faults_already_resident, "{stats:?}");
        assert_eq!((stats.pages_stale, stats.pages_poisoned, stats.retries), (0, 0, 0), "{stats:?}");
        if around == FaultAround::OFF {
            assert_eq!((stats.demand_requests, stats.around_requests), (pages, 0));
        }
        assert_eq!((region.residency().resident, region.residency().missing()), (pages, 0));
    }
}

#[test]
fn one_thread_gets_every_byte() {
    if uffd() {
        any_number_of_threads(1, PAGES);
    }
}

#[test]
fn eight_threads_get_every_byte() {
    if uffd() {
        any_number_of_threads(8, PAGES);
    }
}

#[test]
fn sixty_four_threads_get_every_byte() {
    if uffd() {
        any_number_of_threads(64, 64);
    }
}

/// Pages that come while others are on their way are put in place first and their waiters woken after.
#[test]
fn threads_whose_pages_come_together_all_wake() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let region = page_by_page(&store);
    std::thread::scope(|scope| {
        for page in 0..8 {
            let region = &region;
            scope.spawn(move || assert_page(region, page));
        }
        until("all of them are asked for", || store.waiting().len() == 8);
        store.open();
    });
    assert_eq!(region.residency().resident, 8);
}

#[test]
fn threads_that_fault_on_one_page_share_its_request() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(4);
    let region = page_by_page(&store);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_page(&region, 2));
        }
        // Faults are counted when they are read, and asked for behind that.
        until("all threads fault and one asks", || region.stats().faults == 8 && !store.waiting().is_empty());
        assert_eq!((store.waiting(), region.stats().faults_joined), (vec![Extent::page(2)], 7));
        store.release(1);
    });
    assert_eq!(store.reads(), [Extent::page(2)]);
}

/// Answers only after tasks and timers of the runtime that reads it had their turns.
struct NeedsItsRuntime(MemoryStore);

#[async_trait]
impl PageStore for NeedsItsRuntime {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn page_size(&self) -> PageSize {
        self.0.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        let store = self.0.clone();
        let reading = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(100)).await;
            tokio::task::spawn_blocking(|| ()).await.unwrap();
            store.read(extent).await
        });
        reading.await.unwrap()
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.0.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.0.flush().await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        self.0.pull(extents).await
    }
}

/// All workers of the runtime block in faults at the same time, so whatever needed one of them would never come.
fn all_workers_fault(runtime: &tokio::runtime::Runtime, workers: u64) {
    let _watchdog = watchdog();
    let region = Region::builder().store(NeedsItsRuntime(memory(PAGES))).pager(&pager()).open().unwrap();
    let all_at_once = Arc::new(Barrier::new(workers as usize));
    let tasks: Vec<_> = (0..workers)
        .map(|seed| {
            let (region, all_at_once) = (region.clone(), all_at_once.clone());
            runtime.spawn(async move {
                all_at_once.wait();
                for page in shuffled(PAGES, seed) {
                    assert_page(&region, page);
                }
            })
        })
        .collect();
    runtime.block_on(async {
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn all_workers_of_a_runtime_may_fault_at_once() {
    if uffd() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        all_workers_fault(&runtime, 2);
    }
}

#[test]
fn the_one_thread_of_a_runtime_may_fault() {
    if uffd() {
        all_workers_fault(&tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(), 1);
    }
}

#[test]
fn a_thread_may_fault_while_it_holds_a_lock_that_others_fault_under() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    store.open();
    let region = page_by_page(&store);
    let lock = std::sync::Mutex::new(shuffled(PAGES, 1));
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let mut left = lock.lock().unwrap();
                    let Some(page) = left.pop() else { return };
                    assert_page(&region, page);
                }
            });
        }
    });
}

#[test]
fn system_calls_may_touch_missing_pages() {
    if !uffd_in_system_calls() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(8);
    let region = page_by_page(&store);
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    store.open();
    // SAFETY: pages 0 and 1 are mapped while `region` lives, and nobody else touches them here.
    let missing = unsafe { std::slice::from_raw_parts(region.as_ptr(), 2 * PAGE) };
    assert_eq!(writer.write(missing).unwrap(), 2 * PAGE); // write(2) reads the pages
    let mut got = vec![0; 2 * PAGE];
    reader.read_exact(&mut got).unwrap();
    assert_same(0, &got[..PAGE], &page_bytes(0));
    assert_same(1, &got[PAGE..], &page_bytes(1));

    // Half a page: the other half must come from the store although the kernel writes the page.
    writer.write_all(&[0xAB; PAGE / 2]).unwrap();
    // SAFETY: as above, for page 5; initialised bytes by the region's contract.
    let target = unsafe { std::slice::from_raw_parts_mut(region.as_ptr().add(5 * PAGE), PAGE / 2) };
    assert_eq!(reader.read(target).unwrap(), PAGE / 2); // read(2) writes the page
    let expected = [vec![0xAB; PAGE / 2], page_bytes(5)[PAGE / 2..].to_vec()].concat();
    assert_same(5, &read_page(&region, 5), &expected);
    assert_eq!(store.reads(), [Extent::page(0), Extent::page(1), Extent::page(5)]);

    assert_same(7, &peek(address_of(&region, 7)).unwrap(), &page_bytes(7)); // and get_user_pages
}

#[test]
fn a_reader_beside_a_writer_sees_whole_words() {
    let _watchdog = watchdog();
    let region = Region::builder().size(2 * PAGE as u64).open().unwrap();
    let over = std::sync::atomic::AtomicBool::new(false);
    let (words, offset) = (64, PAGE as u64 - 256);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for fill in [0xFF, 0].into_iter().cycle() {
                region.write_at(offset, &[fill; 64 * 8]).unwrap();
                if over.load(Relaxed) {
                    return;
                }
            }
        });
        let mut seen = [false; 2];
        until("both fills are seen", || {
            let mut bytes = vec![1; words * 8];
            region.read_at(offset, &mut bytes).unwrap();
            for word in bytes.chunks_exact(8) {
                assert!(word == [0; 8] || word == [0xFF; 8], "half a word of each write: {word:x?}");
                seen[usize::from(word[0] == 0)] = true;
            }
            seen == [true; 2]
        });
        for _ in 0..2000 {
            let words = region.atomics_u64(offset, words).unwrap();
            assert!(words.iter().all(|word| [0, u64::MAX].contains(&word.load(Relaxed))));
        }
        over.store(true, Relaxed);
    });
}

fn bounded(max_in_flight_pages: u64) -> Pager {
    Pager::start(&PagerOptions { max_in_flight_pages, ..PagerOptions::default() }).unwrap()
}

#[test]
fn no_more_pages_are_in_flight_than_allowed() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    for around in [FaultAround::default(), FaultAround::OFF] {
        let (store, done) = (gated(PAGES), AtomicUsize::new(0));
        let region = Region::builder().store(store.clone()).pager(&bounded(5)).fault_around(around).open().unwrap();
        std::thread::scope(|scope| {
            for seed in 0..24 {
                let (region, done) = (&region, &done);
                scope.spawn(move || {
                    shuffled(PAGES, seed).into_iter().take(8).for_each(|page| assert_page(region, page));
                    done.fetch_add(1, Relaxed);
                });
            }
            until("faults beyond the bound wait", || region.stats().faults == 24);
            let mut at_the_bound = false;
            until("all threads are done", || {
                let pages: u64 = store.waiting().iter().map(|extent| extent.count()).sum();
                assert!(pages <= 5, "{pages} pages are in flight: {:?}", store.waiting());
                at_the_bound |= pages == 5;
                if pages > 0 {
                    // One at a time, oldest first: the next to arrive finds the others still there.
                    store.waiting().first().map(|first| store.release_extent(*first));
                }
                done.load(Relaxed) == 24
            });
            assert!(at_the_bound, "the bound was never reached, so nothing was tested");
        });
    }
}

/// The first read waits at a gate; all others are answered at once and on the pager's stack.
struct FirstWaits {
    reads: AtomicUsize,
    gate: Gated<MemoryStore>,
}

#[async_trait]
impl PageStore for FirstWaits {
    fn size(&self) -> u64 {
        self.gate.size()
    }

    fn page_size(&self) -> PageSize {
        self.gate.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        match self.reads.fetch_add(1, Relaxed) {
            0 => self.gate.read(extent).await,
            _ => self.gate.inner().read(extent).await,
        }
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.gate.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.gate.flush().await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        self.gate.pull(extents).await
    }
}

#[test]
fn a_thousand_faults_that_wait_their_turn_are_answered_one_after_the_other() {
    if !uffd() {
        return;
    }
    const THREADS: u64 = 1000;
    let _watchdog = watchdog();
    let store = Arc::new(FirstWaits { reads: AtomicUsize::new(0), gate: gated(THREADS) });
    let region = Region::builder().shared_store(store.clone()).pager(&bounded(1)).fault_around(FaultAround::OFF).open().unwrap();
    std::thread::scope(|scope| {
        for page in 0..THREADS {
            let region = &region;
            let touch = move || {
                let mut first = [0];
                region.read_at(page * PAGE as u64, &mut first).unwrap();
                assert_eq!(first, page_bytes(page)[..1]);
            };
            std::thread::Builder::new().stack_size(64 << 10).spawn_scoped(scope, touch).unwrap();
        }
        until("all threads fault", || region.stats().faults == THREADS);
        store.gate.open();
    });
    assert_eq!(store.reads.load(Relaxed) as u64, THREADS);
}
