//! A cache in front of a store that goes away and comes back: what was read stays, what was written is kept and pushed once.

mod common;

use async_trait::async_trait;
use pageferry::{
    CacheDurability, CacheStore, Content, Extent, FaultAround, MemoryStore, Mount, PageSize, PageStore, Pull, ReadAfterRead, Run,
    StoreError, conformance, testing::Gated,
};
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};
use tokio::sync::Semaphore;

const PAGE: usize = 4096;
const PAGES: u64 = 600; // more than two chunks
const KIB_4: PageSize = PageSize::KIB_4;

/// A store that can be away; counts what is written and flushed.
#[derive(Clone)]
struct Link {
    store: MemoryStore,
    away: Arc<AtomicBool>,
    writes: Arc<AtomicU64>,
    flush_fails: Arc<AtomicBool>,
    /// The first write waits for it, and lands whatever becomes of who asked for it.
    first_write: Arc<Semaphore>,
}

impl Link {
    fn new() -> Link {
        let bytes: Vec<u8> = (0..PAGES).flat_map(|page| [page as u8 | 1; PAGE]).collect();
        let store = MemoryStore::from_bytes(bytes, KIB_4);
        let first_write = Arc::new(Semaphore::new(1));
        Link { store, away: Arc::default(), writes: Arc::default(), flush_fails: Arc::default(), first_write }
    }

    fn check_link(&self) -> Result<(), StoreError> {
        let error = StoreError::Unreachable { peer: "other".into(), reason: "the test says so".into() };
        if self.away.load(SeqCst) { Err(error) } else { Ok(()) }
    }
}

#[async_trait]
impl PageStore for Link {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn page_size(&self) -> PageSize {
        KIB_4
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.check_link()?;
        self.store.read(extent).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_link()?;
        if self.writes.fetch_add(1, SeqCst) == 0 {
            let (link, bytes) = (self.clone(), bytes.to_vec());
            let lands = tokio::spawn(async move {
                let _first = link.first_write.acquire().await.unwrap();
                link.store.write(extent, &bytes).await
            });
            return lands.await.unwrap();
        }
        tokio::task::yield_now().await; // others go first, as on a network
        self.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.check_link()?;
        if self.flush_fails.load(SeqCst) { Err(StoreError::Closed) } else { Ok(()) }
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        Ok(Box::new(ReadAfterRead::new(self.clone(), extents)))
    }
}

fn directory() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("world.cache");
    (directory, path)
}

/// Pushes only when told to. Fetches of handles that are gone may have the file open for a moment longer.
async fn open(remote: impl PageStore, path: &Path) -> CacheStore {
    let (remote, until) = (Arc::new(remote), Instant::now() + Duration::from_secs(20));
    loop {
        match CacheStore::builder(remote.clone(), path).identity("world").push_every(None).open() {
            Err(error) if error.to_string().contains("has this cache open") => {
                assert!(Instant::now() < until, "{error}");
                tokio::task::yield_now().await;
            }
            result => return result.unwrap(),
        }
    }
}

async fn page(store: &impl PageStore, page: u64) -> u8 {
    let mut bytes = [0; PAGE];
    store.read_into(Extent::page(page), &mut bytes).await.unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
    bytes[0]
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_conforms() {
    let (directory, made) = (tempfile::tempdir().unwrap(), AtomicU64::new(0));
    conformance::run(async |size_bytes| {
        let path = directory.path().join(made.fetch_add(1, SeqCst).to_string());
        let remote = Arc::new(MemoryStore::zeroed(size_bytes, KIB_4));
        CacheStore::builder(remote, path).push_every(Some(Duration::from_millis(1))).open().unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cache_that_flushes_to_the_remote_conforms() {
    let (directory, made) = (tempfile::tempdir().unwrap(), AtomicU64::new(0));
    conformance::run(async |size_bytes| {
        let path = directory.path().join(made.fetch_add(1, SeqCst).to_string());
        let remote = Arc::new(MemoryStore::zeroed(size_bytes, PageSize::new(2 << 20).unwrap()));
        CacheStore::builder(remote, path).durable(CacheDurability::Remote).push_every(None).open().unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_read_is_read_again_after_a_restart_and_without_the_remote() {
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    cache.read(Extent::between(200, 300)).await.unwrap();
    until("100 pages are kept", || cache.status().cached_pages == 100).await;
    cache.flush().await.unwrap();
    link.away.store(true, SeqCst);
    for at in 200..300 {
        assert_eq!(page(&cache, at).await, at as u8 | 1);
    }
    let error = cache.read(Extent::between(299, 301)).await.unwrap_err();
    assert!(error.is_transient(), "{error}");
    drop(cache);
    let cache = open(link.clone(), &path).await;
    assert_eq!(cache.status().cached_pages, 100);
    for at in 200..300 {
        assert_eq!(page(&cache, at).await, at as u8 | 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_in_an_outage_survives_a_restart_and_is_pushed_once() {
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    assert_eq!(page(&cache, 7).await, 7); // clean here, then written over
    link.away.store(true, SeqCst);
    cache.write(Extent::between(5, 9), &[200; 4 * PAGE]).await.unwrap();
    cache.flush().await.unwrap();
    assert!(cache.push().await.unwrap_err().is_transient());
    assert!(cache.status().push_error.is_some());
    assert_eq!(cache.status().dirty_bytes, 4 * PAGE as u64);
    drop(cache);

    let cache = open(link.clone(), &path).await;
    assert_eq!((cache.status().dirty_pages, page(&cache, 5).await), (4, 200));
    link.away.store(false, SeqCst);
    cache.push().await.unwrap();
    assert_eq!((page(&link.store, 8).await, page(&link.store, 9).await), (200, 9));
    assert_eq!((cache.status().dirty_pages, link.writes.load(SeqCst)), (0, 1));
    cache.push().await.unwrap();
    assert_eq!(link.writes.load(SeqCst), 1, "clean pages were pushed");
    drop(cache);
    let cache = open(link.clone(), &path).await;
    assert_eq!((cache.status().dirty_pages, cache.status().cached_pages), (0, 4));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_remote_could_not_flush_stays_dirty() {
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    cache.write(Extent::page(3), &[9; PAGE]).await.unwrap();
    link.flush_fails.store(true, SeqCst);
    assert!(cache.push().await.is_err());
    assert_eq!(cache.status().dirty_pages, 1);
    link.flush_fails.store(false, SeqCst);
    cache.push().await.unwrap();
    assert_eq!((cache.status().dirty_pages, link.writes.load(SeqCst)), (0, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_background_push_tries_again_until_the_remote_is_back() {
    let ((_directory, path), link) = (directory(), Link::new());
    link.away.store(true, SeqCst);
    let cache = CacheStore::open(Arc::new(link.clone()), &path).unwrap();
    cache.write(Extent::page(3), &[9; PAGE]).await.unwrap();
    cache.flush().await.unwrap();
    until("a push fails", || cache.status().push_error.is_some()).await;
    link.away.store(false, SeqCst);
    until("a push succeeds", || cache.status().push_error.is_none()).await;
    assert_eq!(cache.status().dirty_pages, 0);
    assert_eq!(page(&link.store, 3).await, 9);
    drop(cache);
    CacheStore::open(Arc::new(link), &path).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_one_extent_fetch_it_once() {
    let ((_directory, path), gate) = (directory(), Gated::new(Link::new()));
    let cache = open(gate.clone(), &path).await;
    let extent = Extent::between(10, 20);
    let readers: Vec<_> = (0..16)
        .map(|_| {
            tokio::spawn({
                let cache = cache.clone();
                async move { cache.read(extent).await }
            })
        })
        .collect();
    gate.arrived(1).await;
    gate.open();
    for reader in readers {
        assert_eq!(reader.await.unwrap().unwrap().iter().map(|run| run.extent.count()).sum::<u64>(), 10);
    }
    assert_eq!(gate.reads(), [extent]);
    // And what overlaps asks for the rest alone.
    assert_eq!(page(&cache, 15).await, 15);
    cache.read(Extent::between(15, 25)).await.unwrap();
    assert_eq!(gate.reads()[1..], [Extent::between(20, 25)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_a_write_overtook_is_not_kept() {
    let ((_directory, path), gate) = (directory(), Gated::new(Link::new()));
    let cache = open(gate.clone(), &path).await;
    let reader = tokio::spawn({
        let cache = cache.clone();
        async move { cache.read(Extent::between(10, 12)).await }
    });
    gate.arrived(1).await;
    cache.write(Extent::page(10), &[99; PAGE]).await.unwrap();
    cache.push().await.unwrap();
    gate.open();
    reader.await.unwrap().unwrap();
    assert_eq!((page(&cache, 10).await, page(&cache, 11).await), (99, 11));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_goes_away_takes_no_fetch_with_it() {
    let ((_directory, path), gate) = (directory(), Gated::new(Link::new()));
    let cache = open(gate.clone(), &path).await;
    let [first, second] = [(); 2].map(|()| {
        tokio::spawn({
            let cache = cache.clone();
            async move { cache.read(Extent::page(1)).await }
        })
    });
    gate.arrived(1).await;
    first.abort();
    gate.open();
    assert_eq!(second.await.unwrap().unwrap()[0].content, Content::Bytes(vec![1; PAGE].into()));
    assert_eq!(gate.reads().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_remote_and_a_second_opener_are_refused() {
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    let refused = |remote: Arc<dyn PageStore>, identity: &str| {
        CacheStore::builder(remote, &path).identity(identity).push_every(None).open().unwrap_err().to_string()
    };
    let text = refused(Arc::new(link.clone()), "world");
    assert!(text.contains("has this cache open") && text.contains("world.cache"), "{text}");
    drop(cache);
    let text = refused(Arc::new(link.clone()), "other");
    assert!(text.contains("of store \"world\", not of \"other\""), "{text}");
    let text = refused(Arc::new(MemoryStore::zeroed(PAGE as u64, KIB_4)), "world");
    assert!(text.contains("of 2457600 bytes") && text.contains("has 4096"), "{text}");
    std::fs::remove_file(path.with_extension("cache.journal")).unwrap();
    let text = refused(Arc::new(link), "world");
    assert!(text.contains("no journal"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_write_is_lost_to_a_push_that_reads_it_meanwhile() {
    const WRITERS: u64 = 6;
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    let writing = Arc::new(AtomicU64::new(WRITERS));
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let (cache, writing) = (cache.clone(), writing.clone());
            tokio::spawn(async move {
                for round in 0..60u64 {
                    for slot in 0..3 {
                        cache.write(Extent::page(250 + slot * WRITERS + writer), &[(round + 1) as u8; PAGE]).await.unwrap();
                    }
                }
                writing.fetch_sub(1, SeqCst);
            })
        })
        .collect();
    while writing.load(SeqCst) > 0 {
        cache.push().await.unwrap();
        // Dropped at any point: it may be reading still.
        let _ = tokio::time::timeout(Duration::from_micros(300), cache.push()).await;
    }
    for writer in writers {
        writer.await.unwrap();
    }
    cache.push().await.unwrap();
    assert_eq!(cache.status().dirty_pages, 0);
    for at in 250..250 + 3 * WRITERS {
        assert_eq!((page(&link.store, at).await, page(&cache, at).await), (60, 60), "page {at}");
    }
    drop(cache);
    let cache = open(link.clone(), &path).await;
    for at in 250..250 + 3 * WRITERS {
        assert_eq!(page(&cache, at).await, 60, "page {at} after a restart");
    }
}

/// A write of a push that was dropped would land after the younger one of the next, whose page then counts as clean.
#[tokio::test(flavor = "multi_thread")]
async fn a_push_whose_caller_has_gone_ends_before_the_next_begins() {
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    let held = link.first_write.acquire().await.unwrap();
    let push = |cache: &CacheStore| {
        let cache = cache.clone();
        tokio::spawn(async move { cache.push().await })
    };
    cache.write(Extent::page(3), &[1; PAGE]).await.unwrap();
    let gone = push(&cache);
    until("the first push writes", || link.writes.load(SeqCst) == 1).await;
    gone.abort();
    cache.write(Extent::page(3), &[2; PAGE]).await.unwrap();
    let mut next = push(&cache);
    assert!(tokio::time::timeout(Duration::from_millis(100), &mut next).await.is_err(), "it overtook an older write");
    drop(held);
    next.await.unwrap().unwrap();
    assert_eq!((page(&link.store, 3).await, cache.status().dirty_pages), (2, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_remote_store_that_panics_in_a_push_is_an_error() {
    struct Panics(MemoryStore);
    #[async_trait]
    impl PageStore for Panics {
        fn size(&self) -> u64 {
            self.0.size()
        }
        fn page_size(&self) -> PageSize {
            KIB_4
        }
        async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
            self.0.read(extent).await
        }
        async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
            self.0.write(extent, bytes).await
        }
        async fn flush(&self) -> Result<(), StoreError> {
            panic!("the test says so")
        }
        async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
            self.0.pull(extents).await
        }
    }
    let (_directory, path) = directory();
    let cache = open(Panics(MemoryStore::zeroed(8 * PAGE as u64, KIB_4)), &path).await;
    cache.write(Extent::page(3), &[1; PAGE]).await.unwrap();
    for _ in 0..2 {
        assert!(matches!(cache.push().await, Err(StoreError::Protocol(_))));
        assert_eq!(cache.status().dirty_pages, 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_of_many_changes_stays_short() {
    let ((_directory, path), link) = (directory(), Link::new());
    let cache = open(link.clone(), &path).await;
    // Two records of one extent each round, 48 bytes a record.
    for round in 0..1000 {
        cache.write(Extent::page(round % PAGES), &[round as u8; PAGE]).await.unwrap();
        cache.push().await.unwrap();
    }
    let journal = std::fs::metadata(path.with_extension("cache.journal")).unwrap().len();
    assert!(journal < 90_000, "{journal} bytes");
    cache.write(Extent::page(1), &[77; PAGE]).await.unwrap();
    cache.flush().await.unwrap();
    drop(cache);
    let cache = open(link, &path).await;
    let expected = |at: u64| if at == 1 { 77 } else { (if at < 400 { at + 600 } else { at }) as u8 };
    assert_eq!(cache.status().dirty_pages, 1);
    for at in [0, 1, 2, 399, 400, 599] {
        assert_eq!(page(&cache, at).await, expected(at), "page {at}");
    }
}

#[test]
fn a_mount_goes_on_while_the_remote_is_away() {
    if !common::uffd() {
        return;
    }
    let _watchdog = common::watchdog();
    let ((_directory, path), link) = (directory(), Link::new());
    let remote = Arc::new(link.clone());
    let cache = CacheStore::builder(remote, &path).push_every(Some(Duration::from_millis(20))).open().unwrap();
    // Kept by a mount before, of which nothing is in memory any more.
    common::block_on(async {
        cache.read(Extent::between(0, 20)).await.unwrap();
        until("20 pages are kept", || cache.status().cached_pages == 20).await;
    });
    link.away.store(true, SeqCst);
    let mount = Mount::builder(Arc::new(cache.clone())).pager(&common::pager()).fault_around(FaultAround::OFF).direct();
    let mount = mount.open().unwrap();
    for at in 0..20 {
        assert_eq!(common::read_page(mount.region(), at), [at as u8 | 1; PAGE], "page {at}");
    }
    mount.region().write_at(3 * PAGE as u64, &[200; PAGE]).unwrap();
    common::block_on(mount.flush()).unwrap();
    assert_eq!(cache.status().dirty_pages, 1);
    common::until("a push fails", || cache.status().push_error.is_some());
    link.away.store(false, SeqCst);
    common::until("a push succeeds", || cache.status().push_error.is_none());
    assert_eq!(common::block_on(page(&link.store, 3)), 200);
    assert_eq!(common::read_page(mount.region(), 500), [500u64 as u8 | 1; PAGE]);
    common::block_on(mount.close()).unwrap();
}
