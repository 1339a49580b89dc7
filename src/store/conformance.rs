//! The suite that every [`PageStore`] has to pass: what the trait promises, held against a model too plain to be wrong.
//!
//! Role: a store's own tests call [`run`] with a way to make a fresh store. Neighbours: knows stores by the trait only; its own tests
//! give it broken ones and see each caught. Invariants: no clock and no sleeps; all that is random follows from one printed seed,
//! except how concurrent tasks interleave.

use crate::{Extent, PageSize, PageStore, StoreError};
use std::{
    collections::HashMap,
    fmt,
    future::Future,
    hash::{BuildHasher, Hasher, RandomState},
    sync::{Arc, Weak},
};

macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => { if !$condition { return Err(format!($($text)+)); } };
}

mod model;
#[cfg(test)]
mod tests;

use model::{Model, Rng, joined, stamp_of, stamped};

/// The environment variable that holds the seed of a run to repeat.
const SEED_VARIABLE: &str = "PAGEFERRY_SEED";

const WRITERS: u64 = 3;
const READERS: u64 = 3;
const WRITES_EACH: u64 = 80;

/// What a store did against the contract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// Which check met it.
    pub check: &'static str,
    /// The seed that repeats it.
    pub seed: u64,
    /// What was expected and what came.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed: {} (repeat with {SEED_VARIABLE}={})", self.check, self.what, self.seed)
    }
}

/// Runs every check with the seed in `PAGEFERRY_SEED`, else a random one, which is printed.
///
/// `make` gives a fresh store of so many bytes, all zeros, with pages of always the same size. It is called some 25 times, for up
/// to 3 MiB or 8 pages, whichever is more. Needs a tokio runtime; on a multi-threaded one the tasks of the concurrent check race.
///
/// ```
/// use pageferry::{MemoryStore, PageSize, conformance};
/// # #[tokio::main(flavor = "current_thread")] async fn main() {
/// conformance::run(async |size_bytes| MemoryStore::zeroed(size_bytes, PageSize::KIB_4)).await;
/// # }
/// ```
///
/// # Panics
/// With the text of a [`Failure`], if the store breaks the contract.
pub async fn run<S: PageStore>(make: impl AsyncFn(u64) -> S) {
    let seed = match std::env::var(SEED_VARIABLE) {
        Ok(text) => text.parse().unwrap_or_else(|_| panic!("{SEED_VARIABLE}={text} is not a number below 2^64")),
        Err(_) => RandomState::new().build_hasher().finish(),
    };
    println!("conformance: {SEED_VARIABLE}={seed}");
    if let Err(failure) = check(make, seed).await {
        panic!("{failure}");
    }
}

/// Runs every check, as [`run`], and stops at the first that fails.
///
/// # Errors
/// That failure.
pub async fn check<S: PageStore>(make: impl AsyncFn(u64) -> S, seed: u64) -> Result<(), Failure> {
    let page_size = make(1).await.page_size();
    macro_rules! in_order {
        ($($check:ident),* $(,)?) => { $(
            let mut trial = Trial { make: &make, page_size, rng: Rng(seed) };
            $check(&mut trial).await.map_err(|what| Failure { check: stringify!($check), seed, what })?;
        )* };
    }
    in_order![
        size_is_as_made,
        fresh_store_is_zeros,
        empty_extent_is_nothing,
        reads_give_what_was_written,
        out_of_range_is_refused,
        wrong_length_is_refused,
        pull_gives_each_page_once_in_order,
        flush_keeps_what_was_written,
        dropped_calls_leave_whole_pages,
        concurrent_calls_see_whole_pages,
    ];
    Ok(())
}

async fn size_is_as_made<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    for size_bytes in trial.sizes() {
        let store = (trial.make)(size_bytes).await;
        let (size, extent, page_size) = (store.size(), store.extent(), store.page_size());
        let pages = Extent::between(0, trial.page_size.pages_for(size_bytes));
        ensure!(size == size_bytes, "a store of {size_bytes} bytes says {size}");
        ensure!(extent == pages, "a store of {size_bytes} bytes has {extent}, expected {pages}");
        ensure!(page_size == trial.page_size, "{page_size:?} follows {:?}", trial.page_size);
    }
    Ok(())
}

async fn fresh_store_is_zeros<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    for size_bytes in trial.sizes() {
        let (store, model) = trial.fresh(size_bytes).await;
        model.compare(model.extent, store.read(model.extent).await)?;
    }
    Ok(())
}

async fn empty_extent_is_nothing<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    let (store, model) = trial.fresh(trial.page_size.bytes() * 2).await;
    for page in 0..=2 {
        let empty = Extent::between(page, page);
        let (read, behind) = (store.read(empty).await, store.read_behind(empty).await);
        ensure!(matches!(&read, Ok(runs) if runs.is_empty()), "reading no page at {page} gave {read:?}");
        ensure!(matches!(&behind, Ok(runs) if runs.is_empty()), "reading no page at {page} behind gave {behind:?}");
        store.write(empty, &[]).await.map_err(|error| format!("writing no page at {page}: {error}"))?;
    }
    model.compare(model.extent, store.read(model.extent).await)
}

async fn reads_give_what_was_written<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    for size_bytes in trial.sizes() {
        let (store, mut model) = trial.fresh(size_bytes).await;
        for _ in 0..24 {
            trial.write_somewhere(&store, &mut model).await?;
            let extent = trial.rng.extent_in(model.extent);
            model.compare(extent, store.read(extent).await)?;
            model.compare(extent, store.read_behind(extent).await)?;
        }
        model.compare(model.extent, store.read(model.extent).await)?;
        let mut bytes = vec![0xee; model.bytes.len()];
        store.read_into(model.extent, &mut bytes).await.map_err(|error| format!("read_into {}: {error}", model.extent))?;
        model.compare_bytes(model.extent, &bytes)?;
    }
    Ok(())
}

async fn out_of_range_is_refused<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    let (store, mut model) = trial.fresh(trial.page_size.bytes() * 4 - 1).await;
    trial.write_somewhere(&store, &mut model).await?;
    for (first, end) in [(4, 5), (3, 5), (0, 5), (9, 12), (u64::MAX - 1, u64::MAX)] {
        let extent = Extent::between(first, end);
        let bytes = trial.rng.bytes(extent.bytes(trial.page_size) as usize);
        let pull = match store.pull(vec![extent]).await {
            Ok(mut pull) => pull.next().await.map(drop),
            Err(error) => Err(error),
        };
        let (read, behind) = (store.read(extent).await.map(drop), store.read_behind(extent).await.map(drop));
        for (call, result) in
            [("read", read), ("read_behind", behind), ("pull", pull), ("write", store.write(extent, &bytes).await)]
        {
            let Err(StoreError::OutOfRange { extent: named, store_pages }) = result else {
                return Err(format!("{call} of {extent} in a store of 4 pages gave {result:?}"));
            };
            ensure!(named == extent && store_pages == 4, "{call} of {extent} was refused as {named} of {store_pages} pages");
        }
        model.compare(model.extent, store.read(model.extent).await)?;
    }
    Ok(())
}

async fn wrong_length_is_refused<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    let (store, mut model) = trial.fresh(trial.page_size.bytes() * 4).await;
    trial.write_somewhere(&store, &mut model).await?;
    let (extent, right) = (Extent::between(1, 3), trial.page_size.len() * 2);
    for wrong in [0, 1, right - 1, right + 1, right / 2, right * 2] {
        let mut bytes = trial.rng.bytes(wrong);
        let write = store.write(extent, &bytes).await;
        for (call, result) in [("write", write), ("read_into", store.read_into(extent, &mut bytes).await)] {
            let Err(StoreError::WrongLength { expected_bytes, got_bytes }) = result else {
                return Err(format!("{call} of {wrong} bytes as {extent} gave {result:?}"));
            };
            let named = (expected_bytes, got_bytes);
            ensure!(named == (right as u64, wrong as u64), "{call} of {wrong} bytes as {extent} was refused with {named:?}");
        }
        model.compare(model.extent, store.read(model.extent).await)?;
    }
    Ok(())
}

async fn pull_gives_each_page_once_in_order<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    let (store, mut model) = trial.fresh(trial.large()).await;
    for _ in 0..6 {
        trial.write_somewhere(&store, &mut model).await?;
    }
    let (all, middle) = (model.extent, model.extent.end() / 2);
    let asks = [
        vec![all],
        vec![],
        vec![Extent::between(middle, all.end()), Extent::between(middle, middle), Extent::between(1, middle - 1), Extent::page(0)],
        all.pages().step_by(2).take(40).map(Extent::page).collect(),
    ];
    for asked in asks {
        // A pull that is dropped half way leaves nothing behind for the next.
        let mut dropped = store.pull(asked.clone()).await.map_err(|error| format!("pull of {asked:?}: {error}"))?;
        dropped.next().await.map_err(|error| format!("the first run of a pull of {asked:?}: {error}"))?;
        drop(dropped);

        let mut pull = store.pull(asked.clone()).await.map_err(|error| format!("pull of {asked:?}: {error}"))?;
        let mut wanted = asked.iter().copied().flat_map(Extent::pages);
        while let Some(run) = pull.next().await.map_err(|error| format!("pull of {asked:?}: {error}"))? {
            let extent = run.extent;
            for page in extent.pages() {
                let next = wanted.next();
                ensure!(next == Some(page), "a pull of {asked:?} gave page {page} in {extent} where {next:?} was due");
            }
            model.compare(extent, Ok(vec![run]))?;
        }
        let left = wanted.next();
        ensure!(left.is_none(), "a pull of {asked:?} ended before page {left:?}");
        let after = pull.next().await;
        ensure!(matches!(after, Ok(None)), "a pull of {asked:?} that had ended gave {after:?}");
    }
    Ok(())
}

async fn flush_keeps_what_was_written<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    let (store, mut model) = trial.fresh(trial.large()).await;
    for step in 0..4 {
        store.flush().await.map_err(|error| format!("flush number {step}: {error}"))?;
        model.compare(model.extent, store.read(model.extent).await)?;
        trial.write_somewhere(&store, &mut model).await?;
    }
    Ok(())
}

async fn dropped_calls_leave_whole_pages<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    for polls in 1..5 {
        let (store, model) = trial.fresh(trial.page_size.bytes() * 8).await;
        drop_after(polls, store.read(model.extent)).await;
        drop_after(polls, store.write(model.extent, &stamped(7, model.bytes.len()))).await;
        for (page, stamp) in stamps(&store, model.extent).await? {
            ensure!(stamp == 0 || stamp == 7, "after a write of 7 was dropped at poll {polls}, page {page} is {stamp}");
        }
    }
    Ok(())
}

/// Polls a future `polls` times, as long as it is not ready, and drops it.
async fn drop_after<T>(polls: u64, future: impl Future<Output = T>) {
    let others = async {
        for _ in 1..polls {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! { biased; _ = future => {}, () = others => {} }
}

/// Writers fill pages with one stamp each, which names the writer and the write. Nobody may find a page with two stamps, or one older
/// than what its reader wrote; in the end each page must hold the last stamp of one of its writers, or a write was lost.
async fn concurrent_calls_see_whole_pages<S: PageStore>(trial: &mut Trial<'_, impl AsyncFn(u64) -> S>) -> Result<(), String> {
    let (store, model) = trial.fresh((2 << 20).max(4 * trial.page_size.bytes())).await;
    let store = Arc::new(store);
    // Few enough pages to collide, around the middle, where a store may have a border between two of its parts.
    let middle = model.extent.end() / 2;
    let half = ((1 << 20) / trial.page_size.bytes()).clamp(1, 8);
    let hot = Extent::between(middle - half, middle + half);
    let writing = Arc::new(());
    let readers: Vec<_> =
        (0..READERS).map(|_| tokio::spawn(reader(store.clone(), hot, trial.rng.fork(), Arc::downgrade(&writing)))).collect();
    let writers: Vec<_> =
        (1..=WRITERS).map(|id| tokio::spawn(writer(store.clone(), hot, trial.rng.fork(), id, writing.clone()))).collect();
    drop(writing);

    let mut last_stamps: HashMap<u64, Vec<u64>> = HashMap::new();
    for writer in writers {
        for (page, stamp) in writer.await.map_err(|error| error.to_string())?? {
            last_stamps.entry(page).or_default().push(stamp);
        }
    }
    for reader in readers {
        reader.await.map_err(|error| error.to_string())??;
    }
    for (page, stamp) in stamps(&*store, hot).await? {
        let allowed = last_stamps.remove(&page).unwrap_or(vec![0]);
        ensure!(allowed.contains(&stamp), "page {page} ends as {stamp:#x}, its writers wrote {allowed:x?} last");
    }
    Ok(())
}

async fn writer<S: PageStore>(
    store: Arc<S>,
    hot: Extent,
    mut rng: Rng,
    id: u64,
    _writing: Arc<()>,
) -> Result<HashMap<u64, u64>, String> {
    let mut last = HashMap::new();
    for number in 0..WRITES_EACH {
        let (extent, ours) = (rng.extent_in(hot), id << 32 | number);
        let bytes = stamped(ours, extent.bytes(store.page_size()) as usize);
        store.write(extent, &bytes).await.map_err(|error| format!("write of {extent}: {error}"))?;
        last.extend(extent.pages().map(|page| (page, ours)));
        rng.pause().await;
        for (page, stamp) in stamps(&*store, extent).await? {
            let later = stamp == ours || (stamp != 0 && stamp >> 32 != id);
            ensure!(later, "page {page} went back to {stamp:#x} after {ours:#x} was written");
        }
    }
    Ok(last)
}

async fn reader<S: PageStore>(store: Arc<S>, hot: Extent, mut rng: Rng, writing: Weak<()>) -> Result<(), String> {
    while writing.strong_count() > 0 {
        stamps(&*store, rng.extent_in(hot)).await?;
        rng.pause().await;
    }
    Ok(())
}

/// Reads pages that are only ever filled with one stamp each.
async fn stamps<S: PageStore>(store: &S, extent: Extent) -> Result<Vec<(u64, u64)>, String> {
    let bytes = joined(store.page_size(), extent, store.read(extent).await)?;
    let pages = extent.pages().zip(bytes.chunks(store.page_size().len()));
    let torn = |page| format!("page {page} was seen in the middle of a write");
    pages.map(|(page, bytes)| Ok((page, stamp_of(bytes).ok_or_else(|| torn(page))?))).collect()
}

/// What one check has to work with.
struct Trial<'a, F> {
    make: &'a F,
    page_size: PageSize,
    rng: Rng,
}

impl<S: PageStore, F: AsyncFn(u64) -> S> Trial<'_, F> {
    fn sizes(&self) -> [u64; 5] {
        let page = self.page_size.bytes();
        [1, page - 1, page, page + 1, self.large()]
    }

    /// Several MiB, several pages, and a bit: 3 MiB + 5 for small pages.
    fn large(&self) -> u64 {
        (3 << 20).max(5 * self.page_size.bytes()) + 5
    }

    async fn fresh(&self, size_bytes: u64) -> (S, Model) {
        ((self.make)(size_bytes).await, Model::zeros(size_bytes, self.page_size))
    }

    /// Writes random bytes to a random extent of a store and its model, also past the end of a partial last page.
    async fn write_somewhere(&mut self, store: &S, model: &mut Model) -> Result<(), String> {
        let extent = self.rng.extent_in(model.extent);
        let bytes = self.rng.bytes(extent.bytes(self.page_size) as usize);
        store.write(extent, &bytes).await.map_err(|error| format!("write of {extent}: {error}"))?;
        model.write(extent, &bytes);
        Ok(())
    }
}
