//! The stores of this host, held against the conformance suite and real files.

use pageferry::{
    Content, Extent, FileStore, MemoryStore, PULL_EXTENT_BYTES, PageSize, PageStore, Run, StoreError, conformance, testing::Gated,
};
use std::{
    fs::{self, File},
    io::ErrorKind,
    path::PathBuf,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

const PAGE: usize = 4096;
const KIB_4: PageSize = PageSize::KIB_4;

fn mib_2() -> PageSize {
    PageSize::new(2 << 20).unwrap()
}

/// A directory for the many files of one test.
struct Files {
    directory: tempfile::TempDir,
    made: AtomicU64,
}

impl Files {
    fn new() -> Files {
        Files { directory: tempfile::tempdir().unwrap(), made: AtomicU64::new(0) }
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join(self.made.fetch_add(1, Relaxed).to_string())
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_conforms() {
    conformance::run(async |size_bytes| MemoryStore::zeroed(size_bytes, KIB_4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_with_pages_larger_than_a_chunk_conforms() {
    conformance::run(async |size_bytes| MemoryStore::zeroed(size_bytes, mib_2())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_over_the_callers_bytes_conforms() {
    conformance::run(async |size_bytes| MemoryStore::from_bytes(vec![0; size_bytes as usize], KIB_4)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sparse_file_conforms() {
    let files = Files::new();
    conformance::run(async |size_bytes| FileStore::create(files.path(), size_bytes, KIB_4).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_with_pages_larger_than_a_chunk_conforms() {
    let files = Files::new();
    conformance::run(async |size_bytes| FileStore::create(files.path(), size_bytes, mib_2()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_without_holes_conforms() {
    let files = Files::new();
    conformance::run(async |size_bytes| {
        let path = files.path();
        fs::write(&path, vec![0; size_bytes as usize]).unwrap();
        FileStore::open(path, KIB_4).unwrap()
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_behind_an_open_gate_conforms() {
    conformance::run(async |size_bytes| {
        let store = Gated::new(MemoryStore::zeroed(size_bytes, KIB_4));
        store.open();
        store
    })
    .await;
}

#[tokio::test]
async fn an_aligned_mib_of_memory_is_one_run_and_a_hole_is_zeros() {
    let store = MemoryStore::zeroed(8 << 20, KIB_4);
    store.write(Extent::page(300), &[7; PAGE]).await.unwrap();
    let chunk = Extent::between(256, 512);
    let runs = store.read(chunk).await.unwrap();
    assert!(matches!(&runs[..], [Run { extent, content: Content::Bytes(_) }] if *extent == chunk), "{} runs", runs.len());
    let runs = store.read(store.extent()).await.unwrap();
    let shape: Vec<_> = runs.into_iter().map(|run| (run.extent, run.content == Content::Zero)).collect();
    assert_eq!(shape, [(Extent::between(0, 256), true), (chunk, false), (Extent::between(512, 2048), true)]);
}

#[tokio::test]
async fn a_reader_keeps_what_it_read_while_the_page_is_written() {
    let store = MemoryStore::from_bytes(vec![1; 2 * PAGE], KIB_4);
    let before = store.read(store.extent()).await.unwrap();
    store.write(Extent::page(1), &[2; PAGE]).await.unwrap();
    assert_eq!(before[0].content, Content::Bytes(vec![1; 2 * PAGE].into()));
    assert_eq!(store.read(Extent::page(1)).await.unwrap()[0].content, Content::Bytes(vec![2; PAGE].into()));
}

#[tokio::test]
async fn what_is_written_lands_in_the_file_and_nothing_past_its_end() {
    let files = Files::new();
    let path = files.path();
    let store = FileStore::create(&path, 2 * PAGE as u64 + 100, KIB_4).unwrap();
    store.write(Extent::between(1, 3), &[7; 2 * PAGE]).await.unwrap();
    store.flush().await.unwrap();
    let expected = [vec![0; PAGE], vec![7; PAGE + 100]].concat();
    assert_eq!(fs::read(&path).unwrap(), expected);

    let reopened = FileStore::open(&path, KIB_4).unwrap();
    assert_eq!(reopened.size(), expected.len() as u64);
    let mut last = [1; PAGE];
    reopened.read_into(Extent::page(2), &mut last).await.unwrap();
    assert_eq!(last[..], [vec![7; 100], vec![0; PAGE - 100]].concat());
}

#[tokio::test]
async fn a_hole_is_not_read() {
    let files = Files::new();
    let store = FileStore::create(files.path(), 8 << 20, KIB_4).unwrap();
    store.write(Extent::page(700), &[7; PAGE]).await.unwrap();
    let runs = store.read(store.extent()).await.unwrap();
    let holes: Vec<bool> = runs.into_iter().map(|run| run.content == Content::Zero).collect();
    assert_eq!(holes, [true, true, false, true, true, true, true, true]);
}

#[tokio::test]
async fn a_read_only_file_refuses_writes_and_is_not_changed() {
    let files = Files::new();
    let path = files.path();
    fs::write(&path, [5; PAGE]).unwrap();
    let store = FileStore::open_read_only(&path, KIB_4).unwrap();
    let error = store.write(Extent::page(0), &[7; PAGE]).await.unwrap_err();
    assert!(matches!(error, StoreError::ReadOnly), "{error}");
    store.flush().await.unwrap();
    assert_eq!(store.read(Extent::page(0)).await.unwrap()[0].content, Content::Bytes(vec![5; PAGE].into()));
    assert_eq!(fs::read(&path).unwrap(), [5; PAGE]);
}

#[tokio::test]
async fn a_truncated_file_is_an_error_with_numbers_and_not_zeros() {
    let files = Files::new();
    let (dense, sparse) = (files.path(), files.path());
    fs::write(&dense, [5; 4 * PAGE]).unwrap();
    File::create(&sparse).unwrap().set_len(4 * PAGE as u64).unwrap();
    for path in [dense, sparse] {
        let store = FileStore::open(&path, KIB_4).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(PAGE as u64 + 1).unwrap();
        assert!(store.read(Extent::page(0)).await.is_ok());
        for (first, end) in [(1, 2), (0, 4), (3, 4)] {
            let error = store.read(Extent::between(first, end)).await.unwrap_err();
            assert!(matches!(&error, StoreError::Io { source, .. } if source.kind() == ErrorKind::UnexpectedEof), "{error}");
            assert!(error.to_string().contains("had 16384 when opened"), "{error}");
        }
    }
}

#[tokio::test]
async fn what_cannot_be_opened_says_which_path_and_why() {
    let files = Files::new();
    let (absent, present) = (files.path(), files.path());
    fs::write(&present, "precious").unwrap();
    let directory = files.directory.path();
    let too_large = FileStore::create(&absent, u64::MAX, KIB_4);
    assert!(!absent.exists(), "a file that could not be sized was left behind");
    let attempts = [
        (FileStore::open(&absent, KIB_4), absent.as_path(), ErrorKind::NotFound),
        (FileStore::open_read_only(directory, KIB_4), directory, ErrorKind::InvalidInput),
        (FileStore::create(&present, 1, KIB_4), &present, ErrorKind::AlreadyExists),
        (too_large, &absent, ErrorKind::InvalidInput),
    ];
    for (result, path, kind) in attempts {
        let error = result.unwrap_err();
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        assert!(matches!(&error, StoreError::Io { source, .. } if source.kind() == kind), "{error}");
    }
    assert_eq!(fs::read_to_string(&present).unwrap(), "precious");
}

mod gate {
    use super::*;

    fn gated() -> Gated<MemoryStore> {
        Gated::new(MemoryStore::from_bytes(vec![1; 16 * PAGE], KIB_4))
    }

    fn start(store: &Gated<MemoryStore>, page: u64) -> tokio::task::JoinHandle<Result<Vec<Run>, StoreError>> {
        let store = store.clone();
        tokio::spawn(async move { store.read(Extent::page(page)).await })
    }

    #[tokio::test]
    async fn reads_wait_and_pass_in_order_or_by_name() {
        let store = gated();
        let first = start(&store, 1);
        store.arrived(1).await;
        let (second, third) = (start(&store, 2), start(&store, 3));
        store.arrived(3).await;
        assert!(store.release_extent(Extent::page(3)) && !store.release_extent(Extent::page(3)));
        third.await.unwrap().unwrap();
        assert!(!first.is_finished() && !second.is_finished());
        store.release(1);
        first.await.unwrap().unwrap();
        assert_eq!(store.waiting(), [Extent::page(2)]);
        store.open();
        second.await.unwrap().unwrap();
        assert_eq!((store.reads().len(), store.reads_of(Extent::page(2))), (3, 1));
        store.close();
        let fourth = start(&store, 4);
        store.arrived(1).await;
        fourth.abort();
    }

    #[tokio::test]
    async fn permits_that_are_left_serve_the_next_reads() {
        let store = gated();
        store.release(2);
        store.read(Extent::page(0)).await.unwrap();
        store.read_behind(Extent::page(1)).await.unwrap();
        let third = start(&store, 2);
        store.arrived(1).await;
        store.release(1);
        third.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn an_answer_that_waits_is_older_than_a_write_that_passes() {
        let store = gated();
        let read = start(&store, 4);
        store.arrived(1).await;
        store.write(Extent::page(4), &[2; PAGE]).await.unwrap();
        store.release(1);
        assert_eq!(read.await.unwrap().unwrap()[0].content, Content::Bytes(vec![1; PAGE].into()));
    }

    #[tokio::test]
    async fn so_many_reads_fail_as_told_and_the_rest_do_not() {
        let store = gated();
        store.open();
        store.fail_next(2, StoreError::Unreachable { peer: "other".into(), reason: "told so".into() });
        store.fail_next(1, StoreError::Closed);
        for page in 0..2 {
            assert!(store.read(Extent::page(page)).await.unwrap_err().is_transient());
        }
        assert!(matches!(store.read(Extent::page(2)).await, Err(StoreError::Closed)));
        store.read(Extent::page(3)).await.unwrap();
        store.fail_next(usize::MAX, StoreError::Closed);
        assert!(store.read(Extent::page(4)).await.is_err() && store.read(Extent::page(4)).await.is_err());
        store.heal();
        store.read(Extent::page(4)).await.unwrap();
    }

    #[tokio::test]
    async fn a_dropped_read_leaves_the_gate_and_uses_nothing_up() {
        let store = gated();
        let dropped = start(&store, 5);
        store.arrived(1).await;
        dropped.abort();
        assert!(dropped.await.unwrap_err().is_cancelled());
        let kept = start(&store, 6);
        store.arrived(1).await;
        assert_eq!(store.waiting(), [Extent::page(6)]);
        store.release(1);
        kept.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn each_step_of_a_pull_waits() {
        let store = Gated::new(MemoryStore::zeroed(2 * PULL_EXTENT_BYTES, KIB_4));
        let mut pull = store.pull(vec![store.extent()]).await.unwrap();
        let pulling = tokio::spawn(async move {
            let mut pages = 0;
            while let Some(run) = pull.next().await? {
                pages += run.extent.count();
            }
            Ok::<_, StoreError>(pages)
        });
        for step in store.extent().chunks(store.extent().count() / 2) {
            store.arrived(1).await;
            assert_eq!(store.waiting(), [step]);
            store.release(1);
        }
        assert_eq!(pulling.await.unwrap().unwrap(), store.extent().count());
    }
}
