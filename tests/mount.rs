//! A store mapped as memory: what comes, in which order, and that nothing written is lost on its way back.

mod common;

use async_trait::async_trait;
use common::*;
use pageferry::{
    Extent, FaultAround, Grant, Identity, MemoryStore, Mount, MountBuilder, MountError, MountEvent, PULL_EXTENT_BYTES, PageSize,
    PageStore, Pager, PagerOptions, Peer, Pull, PullOrder, ReadAfterRead, RegionError, Run, Server, StoreError, TrackerKind,
    WorkingSet, WorkingSetError, testing::Gated,
};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

const PULL_PAGES: u64 = PULL_EXTENT_BYTES / PAGE as u64;

/// Keeps a book of writes, and fails as it is told.
#[derive(Clone)]
struct Book(Arc<Pages>);

struct Pages {
    store: MemoryStore,
    writes: Mutex<Vec<Extent>>,
    flushes: AtomicUsize,
    write_failures: Mutex<VecDeque<StoreError>>,
    flush_failures: Mutex<VecDeque<StoreError>>,
}

impl Book {
    fn new(pages: u64) -> Book {
        let (write_failures, flush_failures) = Default::default();
        Book(Arc::new(Pages {
            store: memory(pages),
            writes: Mutex::default(),
            flushes: AtomicUsize::new(0),
            write_failures,
            flush_failures,
        }))
    }

    fn writes(&self) -> Vec<Extent> {
        let mut writes = self.0.writes.lock().unwrap().clone();
        writes.sort_by_key(|extent| extent.first());
        writes
    }

    fn fail_writes(&self, errors: impl IntoIterator<Item = StoreError>) {
        self.0.write_failures.lock().unwrap().extend(errors);
    }

    async fn page(&self, page: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        self.0.store.read_into(Extent::page(page), &mut bytes).await.unwrap();
        bytes
    }
}

#[async_trait]
impl PageStore for Book {
    fn size(&self) -> u64 {
        self.0.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.0.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.0.store.read(extent).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.0.writes.lock().unwrap().push(extent);
        // Others go first, as on a network.
        tokio::task::yield_now().await;
        if let Some(error) = self.0.write_failures.lock().unwrap().pop_front() {
            return Err(error);
        }
        self.0.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.0.flushes.fetch_add(1, SeqCst);
        self.0.flush_failures.lock().unwrap().pop_front().map_or(Ok(()), Err)
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        Ok(Box::new(ReadAfterRead::new(self.clone(), extents)))
    }
}

fn away() -> StoreError {
    StoreError::Unreachable { peer: "the store".into(), reason: "a cable was pulled".into() }
}

fn mount_of(store: impl PageStore) -> MountBuilder {
    Mount::builder(Arc::new(store)).pager(&pager()).fault_around(FaultAround::OFF)
}

/// For mounts whose pushes are the test's own.
fn by_hand(store: impl PageStore) -> Mount {
    mount_of(store).direct().open().unwrap()
}

fn offset(page: u64) -> u64 {
    page * PAGE as u64
}

#[test]
fn the_pull_is_under_way_when_a_mount_is_opened_and_brings_everything() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(3 * PULL_PAGES);
    let mount = mount_of(store.clone()).open().unwrap();
    let mut events = mount.events();
    block_on(async {
        store.arrived(1).await;
        assert!(store.waiting().contains(&Extent::between(0, PULL_PAGES)));
        assert_eq!((mount.progress().pages, mount.progress().resident_pages), (3 * PULL_PAGES, 0));
        store.open();
        mount.pulled().await.unwrap();
        let progress = mount.progress();
        assert_eq!((progress.percent(), progress.left), (100.0, None));
        assert!(matches!(events.recv().await.unwrap(), MountEvent::Pulled(Ok(()))));
    });
    (0..3 * PULL_PAGES).for_each(|page| assert_page(mount.region(), page));
}

#[test]
fn a_direct_mount_brings_what_is_touched() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(100);
    store.open();
    let mount = by_hand(store.clone());
    for page in [7, 99, 7] {
        assert_page(mount.region(), page);
    }
    assert_eq!(store.reads(), [Extent::page(7), Extent::page(99)]);
}

#[test]
fn pages_come_in_the_order_asked_for_and_what_is_prioritised_overtakes() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let pages = 4 * PULL_PAGES;
    let list = vec![Extent::between(200, 210), Extent::page(5)];
    let by = PullOrder::By(Arc::new(|extent: Extent| i64::try_from(extent.first()).unwrap()));
    for (order, first) in [(PullOrder::List(list), Extent::between(200, 210)), (by, Extent::between(3 * PULL_PAGES, pages))] {
        let store = gated(pages);
        let mount = mount_of(store.clone()).pull_order(order).open().unwrap();
        block_on(async {
            store.arrived(1).await;
            assert_eq!(store.reads()[0], first);
            let before = store.waiting().len();
            mount.prioritise(offset(100)..offset(101)).unwrap();
            store.arrived(before + 1).await;
            assert!(store.waiting().contains(&Extent::page(100)), "{:?}", store.waiting());
            assert!(store.release_extent(Extent::page(100)));
            mount.region().populate(offset(100)..offset(101)).await.unwrap();
            store.open();
            mount.pulled().await.unwrap();
        });
        (0..pages).for_each(|page| assert_page(mount.region(), page));
        let past = mount.prioritise(offset(pages)..offset(pages + 1));
        assert!(matches!(past, Err(RegionError::OutOfRange { .. })), "{past:?}");
    }
}

#[test]
fn a_pull_keeps_to_its_limit_and_can_be_cancelled() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let start = Instant::now();
    let mount = mount_of(memory(8 * PULL_PAGES)).pull_limit(8 * PULL_EXTENT_BYTES).open().unwrap();
    block_on(mount.pulled()).unwrap();
    // Seven steps of an eighth of a second lie between eight.
    assert!(start.elapsed() > Duration::from_millis(700), "{:?}", start.elapsed());

    let store = gated(100);
    let mount = mount_of(store.clone()).open().unwrap();
    block_on(store.arrived(1));
    mount.cancel_pull();
    let ended = block_on(mount.pulled());
    assert!(matches!(ended, Err(RegionError::PagerStopped)), "{ended:?}");
    store.open();
    assert_page(mount.region(), 42);
}

#[test]
fn a_flush_returns_when_the_store_has_what_was_written() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let book = Book::new(4 * PULL_PAGES);
    let mount = by_hand(book.clone());
    block_on(async {
        assert_eq!((mount.flush().await.unwrap().pages, book.writes()), (0, vec![]));
        mount.region().write_at(offset(5) + 9, b"nine").unwrap();
        for page in 100..200 {
            mount.region().write_at(offset(page), b"many").unwrap();
        }
        let pushed = mount.flush().await.unwrap();
        // Steps of a bulk begin where what was written does.
        assert_eq!((pushed.pages, pushed.extents), (101, 3));
        assert_eq!(book.writes(), [Extent::page(5), Extent::between(100, 164), Extent::between(164, 200)]);
        assert_eq!(book.0.flushes.load(SeqCst), 1);
        let mut expected = page_bytes(5);
        expected[9..13].copy_from_slice(b"nine");
        assert_same(5, &book.page(5).await, &expected);
        assert_eq!(&book.page(150).await[..4], b"many");
        assert_eq!(mount.flush().await.unwrap().pages, 0);
    });
}

#[test]
fn what_could_not_be_pushed_is_an_error_and_is_pushed_later() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let book = Book::new(100);
    let mount = by_hand(book.clone());
    block_on(async {
        mount.region().write_at(offset(7), b"seven").unwrap();
        mount.region().write_at(offset(70), b"seventy").unwrap();
        book.fail_writes([StoreError::ReadOnly, StoreError::ReadOnly]);
        let error = mount.flush().await.unwrap_err();
        let MountError::Push { extent, attempts: 1, more_pages: 1, cause: StoreError::ReadOnly } = &error else {
            panic!("{error:?}")
        };
        assert_eq!(*extent, Extent::page(7));
        assert_eq!(book.0.flushes.load(SeqCst), 0);
        assert_eq!(mount.flush().await.unwrap().pages, 2);
        assert_eq!(&book.page(70).await[..7], b"seventy");

        // The store took it, and may forget it.
        mount.region().write_at(offset(8), b"eight").unwrap();
        book.0.flush_failures.lock().unwrap().push_back(StoreError::ReadOnly);
        let error = mount.flush().await.unwrap_err();
        assert!(matches!(error, MountError::Flush { pages: 1, .. }), "{error:?}");
        let writes = book.writes().len();
        assert_eq!(mount.flush().await.unwrap().pages, 1);
        assert_eq!(book.writes().len(), writes + 1);
    });
}

#[test]
fn a_store_that_is_away_is_tried_again_as_long_as_was_said() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let book = Book::new(10);
    let mount = by_hand(book.clone());
    mount.region().write_at(0, b"zero").unwrap();
    book.fail_writes((0..4).map(|_| away()));
    block_on(mount.flush()).unwrap();
    assert_eq!((book.writes().len(), block_on(book.page(0))[..4].to_vec()), (5, b"zero".to_vec()));

    let mount = mount_of(book.clone()).direct().keep_trying(Duration::from_millis(100)).open().unwrap();
    mount.region().write_at(0, b"none").unwrap();
    book.fail_writes((0..1000).map(|_| away()));
    let error = block_on(mount.flush()).unwrap_err();
    assert!(matches!(error, MountError::Push { attempts: 2.., cause: StoreError::Unreachable { .. }, .. }), "{error:?}");
    // S9: whoever closes hears of it; the page is not forgotten, and what is dropped is pushed once more.
    book.0.write_failures.lock().unwrap().clear();
    drop(mount);
    assert_eq!(&block_on(book.page(0))[..4], b"none");
}

#[test]
fn closing_pushes_or_says_what_is_lost() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let book = Book::new(10);
    let mount = by_hand(book.clone());
    mount.region().write_at(offset(3), b"three").unwrap();
    assert_eq!(block_on(mount.close()).unwrap().pages, 1);
    assert_eq!(&block_on(book.page(3))[..5], b"three");

    let mount = by_hand(book.clone());
    mount.region().write_at(offset(3), b"lost").unwrap();
    book.fail_writes([StoreError::ReadOnly]);
    let error = block_on(mount.close()).unwrap_err();
    assert!(matches!(error, MountError::Push { .. }), "{error:?}");
}

#[test]
fn what_is_written_is_pushed_in_the_background_and_hooks_are_called() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let book = Book::new(10);
    let (turns, told) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let mount = mount_of(book.clone()).push_every(Duration::from_millis(1));
    let mount = mount.after_push({
        let told = told.clone();
        move |pushed| {
            told.fetch_add(pushed.as_ref().unwrap().pages, SeqCst);
        }
    });
    let slot = Arc::new(Mutex::new(None::<pageferry::Region>));
    let mount = mount.before_push({
        let (slot, turns) = (slot.clone(), turns.clone());
        move || {
            let turn = turns.fetch_add(1, SeqCst);
            if let (0, Some(region)) = (turn % 2, &*slot.lock().unwrap()) {
                region.write_at(offset(9), &turn.to_le_bytes()).unwrap();
            }
        }
    });
    let mount = mount.open().unwrap();
    let mut events = mount.events();
    *slot.lock().unwrap() = Some(mount.region().clone());
    mount.region().write_at(offset(4), b"four").unwrap();
    until("both are there", || {
        block_on(async { &book.page(4).await[..4] == b"four" && book.page(9).await[..8] != page_bytes(9)[..8] })
    });
    until("the hook was told", || told.load(SeqCst) >= 2);
    block_on(async {
        loop {
            if let MountEvent::Pushed(pushed) = events.recv().await.unwrap() {
                assert!(pushed.pages > 0);
                return;
            }
        }
    });
    *slot.lock().unwrap() = None;
}

/// S5: counters in all pages, added to by threads while they are pushed, by a store that fails now and then; at the end the store holds the last of each.
#[test]
fn no_write_is_lost_under_racing_writers_and_failing_writes() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 200;
    for tracker in [TrackerKind::WpAsync, TrackerKind::WpSync] {
        let options = PagerOptions { tracker: Some(tracker), ..PagerOptions::default() };
        let Ok(pager) = Pager::start(&options) else { continue };
        let book = Book::new(PAGES);
        let mount = Mount::builder(Arc::new(book.clone())).pager(&pager).push_every(Duration::from_millis(1));
        let mount = match mount.open() {
            Err(MountError::Region(RegionError::NoTracker { .. })) if tracker == TrackerKind::WpAsync => continue,
            mount => mount.unwrap(),
        };
        let (stop, flushed) = (AtomicBool::new(false), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (mount, stop) = (&mount, &stop);
                scope.spawn(move || {
                    let mut random = Random(thread + 1);
                    while !stop.load(SeqCst) {
                        let word = mount.region().atomics_u64(offset(random.below(PAGES)) + 8 * thread, 1).unwrap();
                        word[0].fetch_add(1, SeqCst);
                    }
                });
            }
            for round in 0..40 {
                book.fail_writes((0..round % 5).map(|at| if at % 2 == 0 { away() } else { StoreError::ReadOnly }));
                let before: Vec<u64> =
                    (0..PAGES).map(|page| mount.region().atomics_u64(offset(page), 1).unwrap()[0].load(SeqCst)).collect();
                if block_on(mount.flush()).is_ok() {
                    flushed.fetch_add(1, SeqCst);
                    for (page, before) in (0..).zip(before) {
                        let stored = u64::from_le_bytes(block_on(book.page(page))[..8].try_into().unwrap());
                        // They begin with the page's content and only grow.
                        assert!(
                            stored.wrapping_sub(before) < 1 << 60,
                            "page {page}: {stored} is stored, {before} was there before the flush"
                        );
                    }
                }
            }
            stop.store(true, SeqCst);
        });
        assert!(flushed.load(SeqCst) > 0);
        book.0.write_failures.lock().unwrap().clear();
        block_on(mount.flush()).unwrap();
        for page in 0..PAGES {
            assert_same(page, &block_on(book.page(page)), &read_page(mount.region(), page));
        }
    }
}

#[test]
fn a_mount_that_may_only_be_read_refuses_writes() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let mount = mount_of(memory(20)).read_only().open().unwrap();
    (0..20).for_each(|page| assert_page(mount.region(), page));
    let refused = [mount.region().write_at(0, b"no"), mount.region().discard(0..offset(1))];
    assert!(refused.iter().all(|refused| matches!(refused, Err(RegionError::ReadOnly { .. }))), "{refused:?}");
    assert_page(mount.region(), 0);
    assert_eq!(block_on(mount.close()).unwrap().pages, 0);

    in_child("a_mount_that_may_only_be_read_refuses_writes", "write", || {
        let mount = mount_of(memory(20)).read_only().open().unwrap();
        assert_page(mount.region(), 3);
        println!("it can be read");
        mount.region().atomics_u64(offset(3), 1).unwrap()[0].store(1, SeqCst);
        println!("and written");
    })
    .ends_by(libc::SIGSEGV, "it can be read");
}

#[test]
fn what_was_touched_first_is_pulled_first_the_next_time() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(1000);
    store.open();
    let mount = mount_of(store.clone()).record_touches().open().unwrap();
    for page in [700, 701, 3, 700, 500, 2] {
        assert_page(mount.region(), page);
    }
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("start.pages");
    mount.working_set().save(&file).unwrap();
    let working_set = WorkingSet::load(&file).unwrap();
    assert_eq!(working_set, mount.working_set());
    let expected = [Extent::between(700, 702), Extent::page(3), Extent::page(500), Extent::page(2)];
    assert_eq!((working_set.extents(), working_set.pages()), (&expected[..], 5));
    drop(mount);

    let before = store.reads().len();
    let mount = mount_of(store.clone()).pull_order(working_set.order()).open().unwrap();
    block_on(mount.pulled()).unwrap();
    assert_eq!(store.reads()[before..][..4], expected);
    (0..1000).for_each(|page| assert_page(mount.region(), page));
    let error = WorkingSet::load(folder.path().join("none")).unwrap_err();
    assert!(matches!(error, WorkingSetError::File { .. }), "{error}");
}

#[test]
fn a_peers_memory_is_mounted_written_and_pushed_back() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let (ours, theirs) = (Identity::generate().unwrap(), Identity::generate().unwrap());
    let (book, pages) = (Book::new(4 * PULL_PAGES), 4 * PULL_PAGES);
    let server = Server::builder(&ours).grant(theirs.peer_id(), "book", book.clone(), Grant::ReadWrite);
    let server = server.listen("127.0.0.1:0".parse().unwrap()).unwrap();
    block_on(async {
        let peer = Peer::connect(server.local_addr(), ours.peer_id(), &theirs).await.unwrap();
        let mount = Mount::builder(Arc::new(peer.open("book").await.unwrap())).pager(&pager()).open().unwrap();
        for page in (0..pages).step_by(3) {
            mount.region().write_at(offset(page) + 8, b"far").unwrap();
        }
        mount.pulled().await.unwrap();
        mount.close().await.unwrap();
    });
    for page in 0..pages {
        let mut expected = page_bytes(page);
        if page % 3 == 0 {
            expected[8..11].copy_from_slice(b"far");
        }
        assert_same(page, &block_on(book.page(page)), &expected);
    }
    assert!(book.0.flushes.load(SeqCst) > 0);
}

#[test]
fn a_mount_dropped_on_its_pagers_own_thread_pushes_too() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let book = Book::new(10);
    let store = Gated::new(memory(10));
    let pager = pager();
    let mount = Mount::builder(Arc::new(book.clone())).pager(&pager).direct().open().unwrap();
    mount.region().write_at(0, b"zero").unwrap();
    // A store of another region of this pager holds the last handle.
    struct Holds(Gated<MemoryStore>, Mutex<Option<Mount>>);
    #[async_trait]
    impl PageStore for Holds {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn page_size(&self) -> PageSize {
            self.0.page_size()
        }
        async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
            drop(self.1.lock().unwrap().take());
            self.0.read(extent).await
        }
        async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
            self.0.write(extent, bytes).await
        }
        async fn flush(&self) -> Result<(), StoreError> {
            Ok(())
        }
        async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
            self.0.pull(extents).await
        }
    }
    store.open();
    let other = pageferry::Region::builder().store(Holds(store, Mutex::new(Some(mount)))).pager(&pager).open().unwrap();
    assert_page(&other, 2);
    until("it is pushed", || &block_on(book.page(0))[..4] == b"zero");
}
