//! Frozen regions under threads that write, discard and move at once: what is read is what the region held when it was frozen, or an error that says that it is gone.

mod common;
#[path = "common/frozen.rs"]
mod frozen;

use common::{KIB_4, PAGE, PATIENCE, Random, block_on, page_bytes, watchdog};
use frozen::*;
use nix::sys::mman::{MRemapFlags, mremap};
use pageferry::{Extent, MemoryStore, PageStore, Region, StoreError, testing::Gated};
use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread::JoinHandle,
    time::Instant,
};

/// Threads that write all the time, each its own words, and discard the region's way.
struct Writers {
    stop: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
}

impl Writers {
    fn start(region: &Region, count: u64) -> Writers {
        let (stop, writes) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let threads = (0..count).map(|writer| {
            let (region, stop, writes) = (region.clone(), stop.clone(), writes.clone());
            std::thread::spawn(move || {
                let words = region.atomics_u64(0, region.len() / 8).unwrap();
                let pages = region.extent().count();
                let mut random = Random(writer);
                while !stop.load(Relaxed) {
                    words[(random.below(pages) * 512 + writer) as usize].fetch_add(1, Relaxed);
                    writes.fetch_add(1, Relaxed);
                    // Or they take the processors from the pager, and from who reads.
                    std::thread::yield_now();
                }
            })
        });
        let threads = threads.collect();
        Writers { stop, writes, threads }
    }

    /// Returns when so many more writes were made.
    fn go_on(&self, writes: u64) {
        let (start, until) = (Instant::now(), self.writes.load(Relaxed) + writes);
        while self.writes.load(Relaxed) < until {
            assert!(start.elapsed() < PATIENCE, "writers hang");
            std::thread::yield_now();
        }
    }

    fn stop(self) {
        self.stop.store(true, Relaxed);
        self.threads.into_iter().for_each(|thread| thread.join().unwrap());
    }
}

#[test]
fn threads_that_wait_to_write_go_on_when_it_is_dropped() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const WRITERS: usize = 4;
    for region in regions(64) {
        for round in 0..30 {
            let frozen = freeze(&region);
            let begin = Arc::new(Barrier::new(WRITERS + 1));
            std::thread::scope(|scope| {
                for _ in 0..WRITERS {
                    let (region, begin) = (&region, begin.clone());
                    scope.spawn(move || {
                        begin.wait();
                        (0..64).for_each(|page| write(region, page));
                    });
                }
                begin.wait();
                // At any moment among their first writes.
                (0..round * 10).for_each(|_| std::hint::spin_loop());
                drop(frozen);
            });
        }
    }
}

/// A running program is frozen while its threads stand still for just that, and then again.
#[test]
fn no_torn_or_later_page_is_read_while_threads_write() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 128;
    for region in regions(PAGES) {
        for round in 0..4 {
            // Nobody writes now.
            let held: Vec<u8> = (0..PAGES).flat_map(|page| common::read_page(&region, page)).collect();
            let frozen = freeze(&region);
            let writers = Writers::start(&region, 4);
            for pass in 0..6_u64 {
                writers.go_on(20);
                for extent in Extent::between(0, PAGES).chunks(1 << ((pass + round) % 6)) {
                    let bytes = read(&frozen, extent).unwrap();
                    let from = extent.first() as usize * PAGE;
                    assert!(bytes == held[from..from + bytes.len()], "{extent} of {region:?} are of another moment");
                }
            }
            assert!(frozen.saved_pages() > 0);
            if round % 2 == 0 {
                writers.stop();
            } else {
                drop(frozen);
                writers.go_on(1000);
                writers.stop();
            }
        }
    }
}

#[test]
fn discards_among_writes_and_reads_are_held_too() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 64;
    for region in regions(PAGES) {
        for round in 0..4 {
            let held: Vec<u8> = (0..PAGES).flat_map(|page| common::read_page(&region, page)).collect();
            let frozen = freeze(&region);
            let writers = Writers::start(&region, 3);
            let discards = std::thread::spawn({
                let region = region.clone();
                move || {
                    let mut random = Random(round);
                    for _ in 0..60 {
                        let (from, count) = (random.below(PAGES - 4), 1 + random.below(4));
                        region.discard(from * PAGE as u64..(from + count) * PAGE as u64).unwrap();
                    }
                }
            });
            for pass in 0..4 {
                for extent in Extent::between(0, PAGES).chunks(1 << pass) {
                    let bytes = read(&frozen, extent).unwrap();
                    let from = extent.first() as usize * PAGE;
                    assert!(bytes == held[from..from + bytes.len()], "{extent} of {region:?} are of another moment");
                }
            }
            discards.join().unwrap();
            writers.stop();
        }
    }
}

/// What the kernel does between the message of a change and the change itself, or before it, must not be taken for content.
#[test]
fn what_is_taken_away_among_writes_and_reads_is_right_or_an_error() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 8;
    let gone = AtomicU64::new(0);
    for round in 0..24 {
        for region in regions(PAGES) {
            let frozen = freeze(&region);
            let begin = Barrier::new(3);
            std::thread::scope(|scope| {
                scope.spawn(|| {
                    begin.wait();
                    (0..PAGES).for_each(|page| write(&region, page));
                });
                scope.spawn(|| {
                    begin.wait();
                    for page in 0..PAGES {
                        if (page + round) % 2 == 0 {
                            madvise_away(&region, page);
                        } else {
                            let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_DONTUNMAP;
                            // SAFETY: a page of the region, which only atomics look at; its old address stays taken.
                            unsafe { mremap(start_of(&region, page), PAGE, PAGE, flags, None) }.unwrap();
                        }
                    }
                });
                begin.wait();
                for page in (0..PAGES).chain(0..PAGES) {
                    match read(&frozen, Extent::page(page)) {
                        Ok(bytes) => common::assert_same(page, &bytes, &page_bytes(page)),
                        Err(StoreError::Gone { .. }) => {
                            gone.fetch_add(1, Relaxed);
                        }
                        Err(error) => panic!("page {page}: {error}"),
                    }
                }
            });
        }
    }
    assert!(gone.into_inner() > 0);
}

#[test]
fn a_region_that_still_fills_is_held() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 256;
    for seed in 0..4 {
        // Every fifth page of the store holds zeros.
        let content = |page: u64| if page.is_multiple_of(5) { vec![0; PAGE] } else { page_bytes(page) };
        let memory = MemoryStore::zeroed(PAGES * PAGE as u64, KIB_4);
        for page in (0..PAGES).filter(|page| !page.is_multiple_of(5)) {
            block_on(memory.write(Extent::page(page), &content(page))).unwrap();
        }
        let store = Gated::new(memory);
        let region = filled(store.clone());
        let mut held: Vec<Vec<u8>> = (0..PAGES).map(content).collect();
        store.release(40);
        for page in common::shuffled(PAGES, seed).into_iter().take(40) {
            region.write_at(page * PAGE as u64, &[9; PAGE]).unwrap();
            held[page as usize] = vec![9; PAGE];
        }
        // Some discarded: here, and missing.
        for page in [1, 2, 100, 101, 200] {
            region.discard(page * PAGE as u64..(page + 1) * PAGE as u64).unwrap();
            held[page as usize] = vec![0; PAGE];
        }
        let frozen = freeze(&region);
        store.open();
        let pull = std::thread::spawn({
            let region = region.clone();
            move || block_on(region.pull())
        });
        let writers = Writers::start(&region, 4);
        for extent in Extent::between(0, PAGES).chunks(7) {
            writers.go_on(10);
            let bytes = read(&frozen, extent).unwrap();
            for (page, bytes) in extent.pages().zip(bytes.chunks(PAGE)) {
                assert!(bytes == held[page as usize], "page {page} is of another moment (seed {seed})");
            }
        }
        pull.join().unwrap().unwrap();
        writers.go_on(100);
        for (page, held) in (0..PAGES).zip(&held) {
            assert!(read(&frozen, Extent::page(page)).unwrap() == *held, "page {page} is of another moment (seed {seed})");
        }
        writers.stop();
    }
}
