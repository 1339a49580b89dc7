//! Proof that the suite can fail: stores that each break one promise, and the check that has to notice.

use super::*;
use crate::{Content, MemoryStore, Pull, ReadAfterRead, Run};
use async_trait::async_trait;
use std::sync::{
    Mutex,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use tokio::task::yield_now;

const PAGE: usize = 4096;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    Sound,
    SizeRoundedUp,
    FirstByteSet,
    EmptyRun,
    OffByOne,
    NoPadding,
    EveryFifthWriteDropped,
    RunsReversed,
    LastRunMissing,
    RunRepeated,
    RunTooShort,
    ReadBehindIsStale,
    WriteClipped,
    ReadClipped,
    WrongNumbers,
    LengthIgnored,
    PullRepeats,
    PullReversed,
    PullEndsEarly,
    PullIsStale,
    PullRestarts,
    FlushFails,
    FlushReverts,
    WriteTorn,
    ReadTorn,
    NeighbourWrittenBack,
}
use Fault::*;

const CAUGHT_BY: [(Fault, &str); 25] = [
    (SizeRoundedUp, "size_is_as_made"),
    (FirstByteSet, "fresh_store_is_zeros"),
    (EmptyRun, "empty_extent_is_nothing"),
    (OffByOne, "reads_give_what_was_written"),
    (NoPadding, "reads_give_what_was_written"),
    (EveryFifthWriteDropped, "reads_give_what_was_written"),
    (RunsReversed, "reads_give_what_was_written"),
    (LastRunMissing, "reads_give_what_was_written"),
    (RunRepeated, "reads_give_what_was_written"),
    (RunTooShort, "reads_give_what_was_written"),
    (ReadBehindIsStale, "reads_give_what_was_written"),
    (WriteClipped, "out_of_range_is_refused"),
    (ReadClipped, "out_of_range_is_refused"),
    (WrongNumbers, "out_of_range_is_refused"),
    (LengthIgnored, "wrong_length_is_refused"),
    (PullRepeats, "pull_gives_each_page_once_in_order"),
    (PullReversed, "pull_gives_each_page_once_in_order"),
    (PullEndsEarly, "pull_gives_each_page_once_in_order"),
    (PullIsStale, "pull_gives_each_page_once_in_order"),
    (PullRestarts, "pull_gives_each_page_once_in_order"),
    (FlushFails, "flush_keeps_what_was_written"),
    (FlushReverts, "flush_keeps_what_was_written"),
    (WriteTorn, "dropped_calls_leave_whole_pages"),
    (ReadTorn, "concurrent_calls_see_whole_pages"),
    (NeighbourWrittenBack, "concurrent_calls_see_whole_pages"),
];

/// A sound store with one fault in front of it.
#[derive(Clone)]
struct Broken {
    store: MemoryStore,
    size_bytes: u64,
    fault: Fault,
    writes: Arc<AtomicU64>,
    undo: Arc<Mutex<Option<Run>>>,
}

impl Broken {
    async fn new(size_bytes: u64, fault: Fault) -> Broken {
        let whole_bytes = PageSize::KIB_4.pages_for(size_bytes) * PAGE as u64;
        let inner_bytes = if fault == NoPadding { whole_bytes } else { size_bytes };
        let store = MemoryStore::zeroed(inner_bytes, PageSize::KIB_4);
        if fault == FirstByteSet {
            let mut page = [0; PAGE];
            page[0] = 1;
            store.write(Extent::page(0), &page).await.unwrap();
        }
        let size_bytes = if fault == SizeRoundedUp { whole_bytes } else { size_bytes };
        Broken { store, size_bytes, fault, writes: Arc::default(), undo: Arc::default() }
    }

    async fn bytes(&self, extent: Extent) -> Vec<u8> {
        let mut bytes = vec![0; extent.count() as usize * PAGE];
        self.store.read_into(extent, &mut bytes).await.unwrap();
        bytes
    }

    fn in_range(&self, extent: Extent) -> bool {
        self.store.extent().covers(extent)
    }
}

#[async_trait]
impl PageStore for Broken {
    fn size(&self) -> u64 {
        self.size_bytes
    }

    fn page_size(&self) -> PageSize {
        PageSize::KIB_4
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        if !self.in_range(extent) {
            match self.fault {
                ReadClipped => return self.store.read(self.store.extent().intersect(extent).unwrap_or_default()).await,
                WrongNumbers => return Err(StoreError::OutOfRange { extent, store_pages: extent.end() }),
                _ => {}
            }
        }
        let mut runs = self.store.read(extent).await?;
        match self.fault {
            EmptyRun if extent.is_empty() => runs.push(Run::zero(extent)),
            OffByOne if extent.first() > 0 && !extent.is_empty() => {
                let shifted = Extent::between(extent.first() - 1, extent.end() - 1);
                runs = vec![Run::bytes(extent, self.bytes(shifted).await.into())];
            }
            RunsReversed => runs.reverse(),
            LastRunMissing if runs.len() > 1 => drop(runs.pop()),
            RunRepeated if runs.len() > 1 => runs.insert(1, runs[0].clone()),
            RunTooShort => {
                for run in &mut runs {
                    if let Content::Bytes(bytes) = &mut run.content {
                        bytes.truncate(bytes.len() - 1);
                    }
                }
            }
            ReadTorn => {
                let mut torn = self.bytes(extent).await;
                yield_now().await;
                let later = self.bytes(extent).await;
                for (page, later) in torn.chunks_mut(PAGE).zip(later.chunks(PAGE)) {
                    page[PAGE / 2..].copy_from_slice(&later[PAGE / 2..]);
                }
                runs = if extent.is_empty() { vec![] } else { vec![Run::bytes(extent, torn.into())] };
            }
            _ => {}
        }
        Ok(runs)
    }

    async fn read_behind(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        let runs = self.read(extent).await?;
        Ok(if self.fault == ReadBehindIsStale && !extent.is_empty() { vec![Run::zero(extent)] } else { runs })
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        let number = self.writes.fetch_add(1, Relaxed) + 1;
        let right = bytes.len() == extent.count() as usize * PAGE;
        let undo = if self.in_range(extent) { Some(Run::bytes(extent, self.bytes(extent).await.into())) } else { None };
        match self.fault {
            EveryFifthWriteDropped if number.is_multiple_of(5) => return Ok(()),
            WriteClipped => {
                if let Some(part) = self.store.extent().intersect(extent) {
                    self.store.write(part, &bytes[..part.count() as usize * PAGE]).await?;
                }
            }
            LengthIgnored if self.in_range(extent) && !right => {
                let mut padded = bytes.to_vec();
                padded.resize(extent.count() as usize * PAGE, 0);
                return self.store.write(extent, &padded).await;
            }
            WriteTorn if self.in_range(extent) && right => {
                let mut half = self.bytes(extent).await;
                for (page, new) in half.chunks_mut(PAGE).zip(bytes.chunks(PAGE)) {
                    page[..PAGE / 2].copy_from_slice(&new[..PAGE / 2]);
                }
                self.store.write(extent, &half).await?;
                yield_now().await;
            }
            // As with a cache line larger than a page, read, changed and written back without a lock.
            NeighbourWrittenBack if extent.first() > 0 && self.in_range(extent) && right => {
                let neighbour = Extent::page(extent.first() - 1);
                let stale = self.bytes(neighbour).await;
                yield_now().await;
                self.store.write(neighbour, &stale).await?;
            }
            _ => {}
        }
        self.store.write(extent, bytes).await?;
        *self.undo.lock().unwrap() = undo;
        Ok(())
    }

    async fn flush(&self) -> Result<(), StoreError> {
        let undo = self.undo.lock().unwrap().take();
        match (self.fault, undo) {
            (FlushFails, _) => Err(StoreError::Closed),
            (FlushReverts, Some(Run { extent, content: Content::Bytes(bytes) })) => self.store.write(extent, &bytes).await,
            _ => self.store.flush().await,
        }
    }

    async fn pull(&self, mut extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        match self.fault {
            PullRepeats => extents.extend(extents.first().copied()),
            PullReversed => extents.reverse(),
            PullEndsEarly if extents.len() > 1 => drop(extents.pop()),
            _ => {}
        }
        Ok(Box::new(BrokenPull { pull: ReadAfterRead::new(self.clone(), extents.clone()), store: self.clone(), extents }))
    }
}

struct BrokenPull {
    pull: ReadAfterRead<Broken>,
    store: Broken,
    extents: Vec<Extent>,
}

#[async_trait]
impl Pull for BrokenPull {
    async fn next(&mut self) -> Result<Option<Run>, StoreError> {
        let run = self.pull.next().await?;
        match (self.store.fault, &run) {
            (PullIsStale, Some(run)) => return Ok(Some(Run::zero(run.extent))),
            (PullRestarts, None) => self.pull = ReadAfterRead::new(self.store.clone(), self.extents.clone()),
            _ => {}
        }
        Ok(run)
    }
}

#[tokio::test]
async fn every_broken_store_is_caught_by_the_check_meant_for_it() {
    for (fault, expected) in CAUGHT_BY {
        for seed in 1..=2 {
            match check(async |size_bytes| Broken::new(size_bytes, fault).await, seed).await {
                Ok(()) => panic!("{fault:?} was not caught with seed {seed}"),
                Err(failure) => assert_eq!(failure.check, expected, "{fault:?}: {failure}"),
            }
        }
    }
}

#[tokio::test]
async fn without_its_fault_the_same_store_passes() {
    check(async |size_bytes| Broken::new(size_bytes, Sound).await, 1).await.unwrap();
}

#[tokio::test]
async fn a_torn_write_is_seen_by_a_concurrent_reader() {
    let mut trial =
        Trial { make: &async |size_bytes| Broken::new(size_bytes, WriteTorn).await, page_size: PageSize::KIB_4, rng: Rng(1) };
    let what = concurrent_calls_see_whole_pages(&mut trial).await.unwrap_err();
    assert!(what.contains("in the middle of a write"), "{what}");
}

#[tokio::test]
async fn the_same_seed_gives_the_same_failure() {
    let failure =
        async |seed| check(async |size_bytes| Broken::new(size_bytes, EveryFifthWriteDropped).await, seed).await.unwrap_err();
    assert_eq!(failure(7).await, failure(7).await);
    assert_ne!(failure(7).await.what, failure(8).await.what);
}
