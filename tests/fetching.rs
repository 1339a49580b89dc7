//! Pages that come before a thread waits for them: populate and pull, their ends, and what the counters say of them.

mod common;

use async_trait::async_trait;
use common::*;
use pageferry::{
    Extent, FaultAround, LossPolicy, MemoryStore, OnLoss, PULL_EXTENT_BYTES, PageSize, PageStore, Pager, PagerOptions, Pull,
    Region, RegionError, RegionEvent, Run, StoreError, testing::Gated,
};
use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering::Relaxed},
};

const PAGES: u64 = 4 * PULL_PAGES;
const PULL_PAGES: u64 = PULL_EXTENT_BYTES / PAGE as u64;

fn bytes_of(extent: Extent) -> std::ops::Range<u64> {
    extent.first() * PAGE as u64..extent.end() * PAGE as u64
}

/// While nothing happens to the region.
fn adds_up(region: &Region) {
    let residency = region.residency();
    let in_extents: u64 = region.resident_extents().iter().map(|extent| extent.count()).sum();
    assert_eq!((residency.pages, residency.resident), (PAGES, in_extents), "{residency:?}");
    assert_eq!(residency.resident + residency.discarded + residency.lost + residency.missing(), PAGES, "{residency:?}");
    let stats = region.stats();
    let installed = stats.pages_demand + stats.pages_around + stats.pages_pull + stats.pages_zero;
    assert_eq!(installed, residency.resident, "{stats:?}");
    assert!(stats.installs >= region.resident_extents().len() as u64, "{stats:?}");
}

#[test]
fn populate_waits_on_the_callers_runtime_without_blocking_it() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let region = page_by_page(&store);
    block_on(async {
        let within = Extent::between(10, 50);
        let populate = region.populate(bytes_of(within).start + 7..bytes_of(within).end - 7);
        tokio::pin!(populate);
        // The one thread of this runtime opens the gate that its own task waits for.
        tokio::select! {
            biased;
            early = &mut populate => panic!("done before the store answered: {early:?}"),
            () = store.arrived(1) => {}
        }
        assert_eq!(store.waiting(), [within]);
        store.open();
        populate.await.unwrap();
        assert_eq!(region.resident_extents(), [within]);
        // Here already: no request.
        region.populate(bytes_of(within)).await.unwrap();
        region.populate(0..0).await.unwrap();
        assert_eq!(store.reads(), [within]);
    });
    (10..50).for_each(|page| assert_page(&region, page));
    assert_eq!(region.stats().faults, 0);
    adds_up(&region);
}

#[test]
fn what_a_cancelled_populate_asked_for_still_comes() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let region = page_by_page(&store);
    block_on(async {
        let cancelled = tokio::spawn({
            let region = region.clone();
            async move { region.populate(0..PAGES * PAGE as u64).await }
        });
        store.arrived(1).await;
        cancelled.abort();
        assert!(cancelled.await.unwrap_err().is_cancelled());
    });
    store.open();
    until("the pages are there", || region.residency().missing() == 0);
    assert_eq!(store.reads().iter().map(|read| read.count()).sum::<u64>(), PAGES);
    (0..PAGES).step_by(17).for_each(|page| assert_page(&region, page));
}

#[test]
fn populate_blocks_a_thread_and_keeps_to_the_bound() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let options = PagerOptions { max_in_flight_pages: 48, ..PagerOptions::default() };
    let region = Region::builder().store(store.clone()).pager(&Pager::start(&options).unwrap()).open().unwrap();
    std::thread::scope(|scope| {
        let populating: Vec<_> =
            (0..3).map(|_| scope.spawn(|| region.populate_blocking(0..PAGES * PAGE as u64).unwrap())).collect();
        // A fault gets its turn although populate could use all there is.
        let faulting = scope.spawn(|| assert_page(&region, PAGES - 1));
        until("all are done", || {
            let waiting = store.waiting();
            let in_flight: u64 = waiting.iter().map(|extent| extent.count()).sum();
            assert!(in_flight <= 48, "{waiting:?} are {in_flight} pages in flight");
            waiting.last().map(|last| store.release_extent(*last));
            faulting.is_finished() && populating.iter().all(std::thread::ScopedJoinHandle::is_finished)
        });
    });
    let mut reads = store.reads();
    reads.sort();
    assert!(reads.windows(2).all(|pair| pair[0].end() <= pair[1].first()), "a page was asked for twice: {reads:?}");
    assert_eq!(region.residency().missing(), 0);
    adds_up(&region);
}

#[test]
fn populate_says_what_cannot_be_had() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let region = page_by_page(&store);
    store.open();
    store.fail_next(1, StoreError::Closed);
    let error = block_on(region.populate(bytes_of(Extent::between(4, 8)))).unwrap_err();
    assert!(matches!(error, RegionError::Lost { extent, cause: StoreError::Closed } if extent == Extent::between(4, 8)), "{error}");
    assert!(matches!(region.populate_blocking(1..u64::MAX), Err(RegionError::OutOfRange { .. })));
    // On the pager's own thread it would wait for itself.
    let pager = pager();
    let on_its_thread = Region::builder().store(store.clone()).pager(&pager).open().unwrap();
    let answer = pager.service().run(async move { on_its_thread.populate_blocking(0..1) });
    assert!(matches!(answer, Some(Err(RegionError::PagerStopped))), "{answer:?}");
}

#[test]
fn populate_and_pull_end_with_their_region() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let gate = gated(PAGES);
    let store: Arc<dyn PageStore> = Arc::new(gate.clone());
    let in_use = Arc::downgrade(&store);
    let pager = pager();
    let region = Region::builder().shared_store(store).pager(&pager).open().unwrap();
    block_on(async {
        tokio::select! {
            biased;
            _ = region.populate(0..1) => panic!("the gate is closed"),
            _ = region.pull() => panic!("the gate is closed"),
            () = gate.arrived(2) => {}
        }
    });
    // Both go on, and neither keeps the region; that is gone with its last handle, and then they have nothing to do.
    drop(region);
    assert_eq!(gate.waiting().len(), 2);
    gate.open();
    until("both have ended", || in_use.upgrade().is_none());
    assert_eq!(gate.reads().len(), 2);
    drop(pager);
}

#[test]
fn a_pull_brings_everything_once_while_threads_fault() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(PAGES);
    let region = page_by_page(&store);
    let mut events = region.events();
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| block_on(region.pull()).unwrap());
        block_on(store.arrived(1));
        // Faults overtake the pull's first step, which waits.
        for page in [3, PULL_PAGES, PAGES - 1] {
            let region = &region;
            let faults = scope.spawn(move || assert_page(region, page));
            until("the fault's own read arrives", || store.release_extent(Extent::page(page)));
            faults.join().unwrap();
        }
        assert_eq!(store.waiting(), [Extent::between(0, PULL_PAGES)]);
        store.open();
        pull.join().unwrap();
    });
    (0..PAGES).for_each(|page| assert_page(&region, page));
    let stats = region.stats();
    assert_eq!((stats.pages_demand, stats.pages_pull), (3, PAGES - 3), "{stats:?}");
    assert_eq!((stats.pages_stale, stats.faults, stats.pages_zero), (3, 3, 0), "{stats:?}");
    assert!(matches!(events.try_recv(), Ok(RegionEvent::Resident)));
    adds_up(&region);
    block_on(region.pull()).unwrap();
    assert_eq!(store.reads().len() as u64, PAGES / PULL_PAGES + 3);
}

type Step = Result<Option<Run>, StoreError>;

/// Makes a step of a pull from the numbers of the pull and the step and from the gate before reads; `None`: not yet.
type Steps = dyn Fn(usize, usize, &Gated<MemoryStore>) -> Option<Step> + Send + Sync;

/// A store whose reads wait at a gate and whose pulls bring what the test says.
#[derive(Clone)]
struct Pulls {
    store: Gated<MemoryStore>,
    pulls: Arc<AtomicUsize>,
    steps: Arc<Steps>,
}

struct OnePull {
    store: Pulls,
    pull: usize,
    step: usize,
}

#[async_trait]
impl Pull for OnePull {
    async fn next(&mut self) -> Step {
        loop {
            tokio::task::yield_now().await;
            if let Some(step) = (self.store.steps)(self.pull, self.step, &self.store.store) {
                self.step += 1;
                return step;
            }
        }
    }
}

#[async_trait]
impl PageStore for Pulls {
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
        self.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.store.flush().await
    }

    async fn pull(&self, _extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        Ok(Box::new(OnePull { store: self.clone(), pull: self.pulls.fetch_add(1, Relaxed), step: 0 }))
    }
}

fn pulls(steps: impl Fn(usize, usize, &Gated<MemoryStore>) -> Option<Step> + Send + Sync + 'static) -> (Region, Pulls) {
    let pulls = Pulls { store: gated(PAGES), pulls: Arc::default(), steps: Arc::new(steps) };
    let loss = LossPolicy { keep_trying: PATIENCE, then: OnLoss::Poison };
    let region = Region::builder().store(pulls.clone()).pager(&pager()).fault_around(FaultAround::OFF).loss(loss).open().unwrap();
    (region, pulls)
}

fn run(first: u64, end: u64) -> Option<Step> {
    let bytes: Vec<u8> = (first..end).flat_map(page_bytes).collect();
    Some(Ok(Some(Run::bytes(Extent::between(first, end), bytes.into()))))
}

const END: Option<Step> = Some(Ok(None));

#[test]
fn a_pull_may_leave_out_what_faults_asked_for_meanwhile() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let (ending, ends) = std::sync::mpsc::channel();
    let (region, store) = pulls(move |pull, step, gate| match (pull, step) {
        (0, 0) => run(0, 5),
        (0, 1) => run(6, PAGES),
        (0, _) => END,
        // This one is asked for page 5 alone, and ends without it once a fault has asked for it.
        _ if gate.waiting().is_empty() => None,
        _ => {
            ending.send(()).unwrap();
            END
        }
    });
    std::thread::scope(|scope| {
        let pull = scope.spawn(|| block_on(region.pull()));
        until("a second pull has begun, for page 5", || store.pulls.load(Relaxed) == 2);
        let faults = scope.spawn(|| assert_page(&region, 5));
        // What it makes of the end comes before the reply, on the same thread.
        ends.recv_timeout(PATIENCE).unwrap();
        store.store.release(1);
        faults.join().unwrap();
        pull.join().unwrap().unwrap();
    });
    assert_eq!((region.residency().resident, region.residency().lost), (PAGES, 0));
}

#[test]
fn a_pull_that_fails_goes_on_where_it_was() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let unreachable = || StoreError::Unreachable { peer: "other".into(), reason: "the test says so".into() };
    let (region, _store) = pulls(move |pull, step, _| match (pull, step) {
        (0, 0) => run(0, 100),
        (1 | 2, 0) | (0, 1) => Some(Err(unreachable())),
        (3, 0) => run(100, PAGES),
        _ => END,
    });
    block_on(region.pull()).unwrap();
    (0..PAGES).for_each(|page| assert_page(&region, page));
    assert_eq!((region.stats().retries, region.residency().lost), (3, 0));
}

#[test]
fn a_pull_that_cannot_read_a_part_loses_no_more_than_a_step() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    // Pages 0..10 come, the next cannot be read, and the pull after that brings the rest.
    let (region, _store) = pulls(move |pull, step, _| match (pull, step) {
        (0, 0) => run(0, 10),
        (0, 1) => Some(Err(StoreError::Closed)),
        (1, 0) => run(10 + PULL_PAGES, PAGES),
        _ => END,
    });
    let error = block_on(region.pull()).unwrap_err();
    assert!(matches!(error, RegionError::Lost { cause: StoreError::Closed, .. }), "{error}");
    (0..10).chain(10 + PULL_PAGES..PAGES).for_each(|page| assert_page(&region, page));
    assert_eq!(region.residency().lost, PULL_PAGES);
    assert!(peek(address_of(&region, 10)).is_err());
}

#[test]
fn a_pull_that_brings_nothing_new_ends() {
    if !uffd_with_poison() {
        return;
    }
    let _watchdog = watchdog();
    for again_and_again in [END, run(0, 1)] {
        let (region, _store) = pulls(move |_, step, _| if step < 3 { again_and_again.clone() } else { END });
        let error = block_on(region.pull()).unwrap_err();
        assert!(matches!(error, RegionError::Lost { cause: StoreError::Protocol(_), .. }), "{error}");
        assert_eq!(region.residency().missing(), 0);
    }
}

#[test]
fn a_pull_that_panics_leaves_the_pages_to_faults() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let (region, store) = pulls(|_, step, _| if step == 0 { run(0, 10) } else { panic!("the pull panics, as the test wants") });
    assert!(block_on(region.pull()).is_err());
    store.store.open();
    (0..PAGES).for_each(|page| assert_page(&region, page));
}
