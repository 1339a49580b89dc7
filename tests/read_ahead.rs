//! What is asked for ahead of threads that read in order: by counts of requests and of stops, never by the clock.

mod common;

use async_trait::async_trait;
use common::*;
use pageferry::{Extent, MemoryStore, PageSize, PageStore, Pull, ReadAfterRead, Region, Run, StoreError, testing::Gated};
use std::{
    sync::{
        Arc, Barrier,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

/// A store at the other end of a link: each answer takes its time, any number of them at once.
#[derive(Clone)]
struct Far(Arc<Link>);

struct Link {
    store: MemoryStore,
    now: AtomicUsize,
    most: AtomicUsize,
    largest: AtomicUsize,
    pages: AtomicUsize,
}

impl Far {
    fn new(pages: u64) -> Far {
        let [now, most, largest, read] = [const { AtomicUsize::new(0) }; 4];
        Far(Arc::new(Link { store: memory(pages), now, most, largest, pages: read }))
    }
}

#[async_trait]
impl PageStore for Far {
    fn size(&self) -> u64 {
        self.0.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.0.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        let pages = extent.count() as usize;
        self.0.most.fetch_max(self.0.now.fetch_add(1, Relaxed) + 1, Relaxed);
        self.0.largest.fetch_max(pages, Relaxed);
        self.0.pages.fetch_add(pages, Relaxed);
        tokio::time::sleep(Duration::from_millis(10)).await;
        let runs = self.0.store.read(extent).await;
        self.0.now.fetch_sub(1, Relaxed);
        runs
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        Ok(Box::new(ReadAfterRead::new(self.clone(), extents)))
    }

    async fn write(&self, _: Extent, _: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }

    async fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Each thread reads its pages; then each page was asked for once. The region's stops for pages that nobody had asked for.
fn read_over_a_link(pages: u64, orders: Vec<Vec<u64>>) -> (u64, Far) {
    let far = Far::new(pages);
    let region = Region::builder().store(far.clone()).pager(&pager()).open().unwrap();
    let start = Barrier::new(orders.len());
    std::thread::scope(|scope| {
        for order in &orders {
            let (region, start) = (&region, &start);
            scope.spawn(move || {
                start.wait();
                order.iter().for_each(|page| assert_page(region, *page));
            });
        }
    });
    assert_eq!(far.0.pages.load(Relaxed) as u64, pages, "pages were asked for twice, or not at all");
    (region.stats().demand_requests, far)
}

#[test]
fn a_reader_in_order_stops_a_few_times_whichever_way_it_reads() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 16_384;
    for order in [(0..PAGES).collect::<Vec<u64>>(), (0..PAGES).rev().collect()] {
        let (stops, far) = read_over_a_link(PAGES, vec![order]);
        // 16, 32, 128, 512 and 2048 pages, then 4096 each time.
        assert!(stops <= 12, "{stops} stops for 64 MiB");
        let (most, largest) = (far.0.most.load(Relaxed), far.0.largest.load(Relaxed));
        assert!(most >= 8 && largest <= 256, "{most} requests at once, the largest of {largest} pages");
    }
}

#[test]
fn two_readers_do_not_disturb_one_another() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    const HALF: u64 = 4096;
    let (stops, _) = read_over_a_link(2 * HALF, vec![(0..HALF).collect(), (HALF..2 * HALF).rev().collect()]);
    assert!(stops <= 16, "{stops} stops for 16 MiB each");
}

fn open(store: &Gated<MemoryStore>) -> Region {
    Region::builder().store(store.clone()).pager(&pager()).open().unwrap()
}

/// A reader that has continued twice, and waits for page 49 of 48 to 176, counted from where it began.
fn waits_in_its_third_window(store: &Gated<MemoryStore>) {
    let asked = |reads: usize| until("a window is asked for", || store.reads().len() == reads);
    for window in 1..=2 {
        asked(2 * window);
        store.release(2);
    }
    asked(6);
    store.release(1);
}

#[test]
fn a_region_that_is_dropped_while_pages_are_on_their_way_is_gone() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(1024);
    let region = open(&store);
    let reader = {
        let region = region.clone();
        std::thread::spawn(move || (0..50).for_each(|page| assert_page(&region, page)))
    };
    waits_in_its_third_window(&store);
    until("more is asked for", || region.stats().ahead_requests == 2);
    store.release(1);
    reader.join().unwrap();
    drop(region);
    store.open();
}

#[test]
fn touches_at_random_bring_their_windows_and_nothing_more() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    const WINDOWS: u64 = 256;
    let store = gated(WINDOWS * 64);
    store.open();
    let region = open(&store);
    for window in shuffled(WINDOWS, 7) {
        // Two of each: the second may be on its way.
        assert_page(&region, window * 64 + 5);
        assert_page(&region, window * 64 + 9);
    }
    let (asked, stats): (u64, _) = (store.reads().iter().map(|read| read.count()).sum(), region.stats());
    assert_eq!((asked, stats.demand_requests, stats.ahead_requests), (WINDOWS * 16, WINDOWS, 0), "{stats:?}");
}

#[test]
fn what_is_asked_for_when_a_reader_stops_is_bounded_by_what_it_has_read() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(8192);
    store.open();
    let region = open(&store);
    (0..700).for_each(|page| assert_page(&region, page));
    let asked: u64 = store.reads().iter().map(|read| read.count()).sum();
    assert!((700..=5 * 700).contains(&asked), "{asked} pages for 700");
    assert_eq!(store.waiting(), []);
}
