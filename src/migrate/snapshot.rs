//! Copies a running program to stores, as it was at one moment.
//!
//! Role: the job around [`Frozen`]: the regions are protected while the program runs, then one pause for what it wrote since and for the small state, then the copies, while it goes on. Neighbours: `gate` pauses the program; `region` keeps what it
//! held. Invariants: the program is paused for its gate, the arming and the state, and goes on whatever fails or is dropped; a copy holds the moment of the pause or is an error; a
//! page of zeros is written, unless the store says that it holds zeros there.

use super::gate::{Gate, PauseError};
use crate::{Content, Extent, Frozen, PageSize, PageStore, Program, Region, RegionError, Run, StoreError, net::codec::is_zero};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use thiserror::Error;

/// A copy of a running program: its regions in stores, and its small state, all of one moment.
///
/// Not while a migration copies pages of a program that runs still: it follows the writes in a way in which none can be held up, and either of the two says so. See
/// [`Region::freeze`] for which regions can be frozen.
///
/// ```
/// use pageferry::{Gate, MemoryStore, Pass, PageSize, Region, Snapshot};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # if pageferry::Capabilities::probe().write_protect() {
/// let region = Region::builder().name("world").size(1 << 20).open()?;
/// let gate = Gate::new();
/// let world = std::thread::spawn({
///     let (region, thread) = (region.clone(), gate.enter());
///     move || {
///         for tick in 0..1000_u64 {
///             if thread.pass() == Pass::Stop { break }
///             region.write_at(tick % 256 * 4096, &tick.to_le_bytes()).unwrap();
///         }
///     }
/// });
/// let copy = MemoryStore::zeroed(1 << 20, PageSize::KIB_4);   // or a file: `FileStore::create`
/// let snapshot = Snapshot::builder().gate(&gate).copy(&region, copy.clone()).state(|| b"registers".to_vec()).take().await?;
/// assert_eq!(snapshot.state, b"registers");
/// println!("paused for {:?}, of which {:?} to begin; {} pages were written meanwhile", snapshot.paused, snapshot.armed_in, snapshot.saved_pages);
/// world.join().unwrap();
/// # }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Snapshot {
    /// What the state closure gave in the pause.
    pub state: Vec<u8>,
    /// From when the program was asked to pause until it was let go: the longest that any of its threads stood still.
    pub paused: Duration,
    /// The part of it in which the regions were protected.
    pub armed_in: Duration,
    /// Pages of all regions.
    pub pages: u64,
    /// Bytes that went to the stores.
    pub written_bytes: u64,
    /// Bytes of zeros that were not written, because the stores held zeros there.
    pub skipped_bytes: u64,
    /// Pages that the program wrote or discarded before their turn, so that they were copied aside first.
    pub saved_pages: u64,
    /// The most bytes that were held aside at a time, as seen after each step.
    pub held_bytes_max: u64,
}

/// How far a snapshot has come.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SnapshotProgress {
    /// The region that is being copied.
    pub region: String,
    /// Pages of all regions that are in their stores, zeros included.
    pub done_pages: u64,
    /// Pages of all regions.
    pub pages: u64,
    /// Bytes held aside now, of the regions that are not copied yet.
    pub held_bytes: u64,
}

/// A program at one moment: see [`SnapshotBuilder::freeze`]. The first write of each page waits, and what was written is held, until this is dropped.
///
/// ```
/// use pageferry::{Grant, Identity, Region, Server, Snapshot};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # if pageferry::Capabilities::probe().write_protect() {
/// # let (host, guests) = (Identity::generate()?, [Identity::generate()?, Identity::generate()?]);
/// let region = Region::builder().name("world").size(1 << 20).open()?;
/// let clone = Snapshot::builder().keep(&region).freeze().await?;       // this program has no threads to pause
/// let server = Server::builder(&host).listen("127.0.0.1:0".parse()?)?;
/// for guest in &guests {
///     server.grant(guest.peer_id(), "world", clone.regions[0].clone(), Grant::Read);
/// }
/// # }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct FrozenProgram {
    /// Its regions, in the order in which they were named.
    pub regions: Vec<Frozen>,
    /// What the state closure gave in the pause.
    pub state: Vec<u8>,
    /// From when the program was asked to pause until it was let go.
    pub paused: Duration,
    /// The part of it in which the regions were protected.
    pub armed_in: Duration,
}

/// A snapshot failed. The program runs on, and nothing holds it up.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The program did not pause.
    #[error(transparent)]
    Pause(#[from] PauseError),
    /// The program was told to stop: it runs elsewhere, and what is here is old.
    #[error("the program has moved away; take the snapshot where it runs")]
    Moved,
    /// A region cannot be frozen, or its store does not fit it.
    #[error("region {region:?}: {source}")]
    Region {
        /// Its name.
        region: String,
        /// Why.
        #[source]
        source: RegionError,
    },
    /// What a region held could not be read.
    #[error("reading region {region:?}: {source}")]
    Read {
        /// Its name.
        region: String,
        /// Why.
        #[source]
        source: StoreError,
    },
    /// The store of a region failed; what it holds is no snapshot.
    #[error("the store of region {region:?}: {source}")]
    Store {
        /// The region's name.
        region: String,
        /// What the store answered.
        #[source]
        source: StoreError,
    },
    /// The state closure panicked, or the runtime that the snapshot was taken on is shutting down.
    #[error("the snapshot was cut short: {0}")]
    CutShort(String),
}

/// See [`Snapshot`].
#[must_use = "nothing happens before `take` or `freeze`"]
pub struct SnapshotBuilder {
    gate: Gate,
    pause_limit: Duration,
    regions: Vec<(Region, Option<Arc<dyn PageStore>>)>,
    state: Box<dyn FnOnce() -> Vec<u8> + Send>,
    bandwidth_limit: Option<u64>,
    progress: Box<dyn FnMut(SnapshotProgress) + Send>,
}

/// What is read, and written, at once: where the stores that come with the crate stop to gain; four or five of them are in memory at a time.
const STEP_BYTES: u64 = 1 << 20;
/// Shorter runs of zeros are written with what is around them: a call costs more than their bytes.
const HOLE_PAGES: usize = 16;

impl Snapshot {
    /// Starts to describe a snapshot.
    pub fn builder() -> SnapshotBuilder {
        SnapshotBuilder {
            gate: Gate::new(),
            pause_limit: Duration::from_secs(2),
            regions: Vec::new(),
            state: Box::new(Vec::new),
            bandwidth_limit: None,
            progress: Box::new(|_| {}),
        }
    }
}

impl SnapshotBuilder {
    /// Where the program pauses. Default: it is paused already, by other means, until [`freeze`](SnapshotBuilder::freeze) returns or [`progress`](SnapshotBuilder::progress) is first called.
    /// A [`Source`](super::Source) may use the same gate: the program goes on when neither pauses it.
    pub fn gate(mut self, gate: &Gate) -> Self {
        self.gate = gate.clone();
        self
    }

    /// How long the program's threads have to come to the gate. Default 2 s, as for a [`Source`](super::Source).
    pub fn pause_limit(mut self, limit: Duration) -> Self {
        self.pause_limit = limit;
        self
    }

    /// Copies a region to a store, which has at least its size and the same page size. What the store held before is written over; where the region
    /// holds long runs of zeros the store is read first, and nothing is written if it holds zeros too, so that a sparse file stays sparse.
    pub fn copy(self, region: &Region, store: impl PageStore) -> Self {
        self.copy_to_shared(region, Arc::new(store))
    }

    /// As [`copy`](SnapshotBuilder::copy), to a store that others use too.
    pub fn copy_to_shared(mut self, region: &Region, store: Arc<dyn PageStore>) -> Self {
        self.regions.push((region.clone(), Some(store)));
        self
    }

    /// Freezes a region without copying it, for [`freeze`](SnapshotBuilder::freeze).
    pub fn keep(mut self, region: &Region) -> Self {
        self.regions.push((region.clone(), None));
        self
    }

    /// The program's small state, asked for while it is paused; it counts into the pause. Runs on a thread that may block, so it may touch regions, but it must not write those
    /// that are frozen. Default: none.
    pub fn state(mut self, state: impl FnOnce() -> Vec<u8> + Send + 'static) -> Self {
        self.state = Box::new(state);
        self
    }

    /// The most bytes a second that go to stores. Slower copying holds more pages aside. Default: as many as they take.
    pub fn bandwidth_limit(mut self, bytes_s: u64) -> Self {
        self.bandwidth_limit = Some(bytes_s.max(1));
        self
    }

    /// Called when the program goes on, and after each step, by the task that takes the snapshot.
    pub fn progress(mut self, progress: impl FnMut(SnapshotProgress) + Send + 'static) -> Self {
        self.progress = Box::new(progress);
        self
    }

    /// Pauses the program, keeps what its regions hold and takes its state, and lets it go on; copies nothing. For clones: grant each of [`FrozenProgram::regions`] to as many peers as
    /// there shall be.
    ///
    /// Cancellation: the program goes on, and nothing stays frozen. Needs a tokio runtime with time.
    ///
    /// # Errors
    /// [`SnapshotError`], but [`Read`](SnapshotError::Read) and [`Store`](SnapshotError::Store). The program runs on.
    pub async fn freeze(self) -> Result<FrozenProgram, SnapshotError> {
        let regions: Vec<Region> = self.regions.into_iter().map(|(region, _)| region).collect();
        freeze(self.gate, self.pause_limit, regions, self.state).await
    }

    /// Takes the snapshot: [`freeze`](SnapshotBuilder::freeze), then copies each region to its store, in order, and flushes that. Returns when all of them are as durable as they can be.
    ///
    /// Cancellation: the program runs on and nothing stays frozen; the stores hold parts.
    ///
    /// # Errors
    /// [`SnapshotError`]. The program runs on, nothing stays frozen, and the stores hold parts.
    pub async fn take(mut self) -> Result<Snapshot, SnapshotError> {
        for (region, store) in &self.regions {
            let Some(store) = store else { continue };
            fits(region, store.as_ref()).map_err(|source| SnapshotError::Region { region: region.name().to_owned(), source })?;
        }
        let regions: Vec<Region> = self.regions.iter().map(|(region, _)| region.clone()).collect();
        let pages = regions.iter().map(|region| region.extent().count()).sum();
        let frozen = freeze(self.gate, self.pause_limit, regions, self.state).await?;
        let FrozenProgram { regions, state, paused, armed_in } = frozen;
        let mut waiting = regions.into_iter().zip(self.regions).collect::<std::collections::VecDeque<_>>();
        let mut copying = Copying {
            snapshot: Snapshot { state, paused, armed_in, pages, ..Snapshot::default() },
            done_pages: 0,
            pace: self.bandwidth_limit.map(|bytes_s| (Instant::now(), bytes_s)),
        };
        (self.progress)(copying.progress("", waiting.iter().map(|(frozen, _)| frozen.saved_bytes()).sum()));
        // Each is let go as soon as it is copied.
        while let Some((frozen, (_, store))) = waiting.pop_front() {
            let Some(store) = store else { continue };
            let later: Vec<Frozen> = waiting.iter().map(|(frozen, _)| frozen.clone()).collect();
            copying.region(&frozen, store.as_ref(), &later, &mut self.progress).await?;
            copying.snapshot.saved_pages += frozen.saved_pages();
        }
        Ok(copying.snapshot)
    }
}

impl std::fmt::Debug for SnapshotBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let regions: Vec<&Region> = self.regions.iter().map(|(region, _)| region).collect();
        f.debug_struct("SnapshotBuilder").field("regions", &regions).field("gate", &self.gate).finish_non_exhaustive()
    }
}

fn fits(region: &Region, store: &dyn PageStore) -> Result<(), RegionError> {
    if store.page_size() != region.page_size() {
        let (store_bytes, region_bytes) = (store.page_size().bytes(), region.page_size().bytes());
        return Err(RegionError::PageSizeDiffers { store_bytes, region_bytes });
    }
    if store.size() < region.size_bytes() {
        return Err(RegionError::StoreTooSmall { store_bytes: store.size(), size_bytes: region.size_bytes() });
    }
    Ok(())
}

type StateOf = Box<dyn FnOnce() -> Vec<u8> + Send>;

async fn freeze(gate: Gate, pause_limit: Duration, regions: Vec<Region>, state: StateOf) -> Result<FrozenProgram, SnapshotError> {
    // A task of its own, so that the program is resumed by its hook too when the caller loses interest in the pause.
    let in_pause = async move {
        let name = |region: &Region| region.name().to_owned();
        let (regions, prepared) = tokio::task::spawn_blocking(move || {
            let prepare = |region: &Region| {
                region.prepare_to_freeze().map_err(|source| SnapshotError::Region { region: name(region), source })
            };
            let prepared = regions.iter().map(prepare).collect::<Result<Vec<_>, SnapshotError>>();
            prepared.map(|prepared| (regions, prepared))
        })
        .await
        .map_err(cut_short)??;
        let asked = Instant::now();
        let hold = gate.hold(pause_limit).await?;
        if gate.stopped() {
            return Err(SnapshotError::Moved);
        }
        let frozen = tokio::task::spawn_blocking(move || {
            let arming = Instant::now();
            let freeze = |region: &Region| {
                region.freeze(Program::Paused).map_err(|source| SnapshotError::Region { region: name(region), source })
            };
            let regions = regions.iter().map(freeze).collect::<Result<Vec<Frozen>, SnapshotError>>()?;
            let armed_in = arming.elapsed();
            Ok::<_, SnapshotError>((regions, armed_in, state()))
        });
        let frozen = frozen.await;
        hold.let_go().await;
        let paused = asked.elapsed();
        // What it protects stays so, where it is frozen.
        drop(prepared);
        let (regions, armed_in, state) = frozen.map_err(cut_short)??;
        Ok(FrozenProgram { regions, state, paused, armed_in })
    };
    tokio::spawn(in_pause).await.map_err(cut_short)?
}

fn cut_short(error: tokio::task::JoinError) -> SnapshotError {
    SnapshotError::CutShort(match error.try_into_panic() {
        Ok(panic) => {
            let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
            format!("panic: {}", text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default())
        }
        Err(error) => error.to_string(),
    })
}

struct Copying {
    snapshot: Snapshot,
    done_pages: u64,
    /// Since when, and how many bytes a second.
    pace: Option<(Instant, u64)>,
}

impl Copying {
    async fn region(
        &mut self,
        frozen: &Frozen,
        store: &dyn PageStore,
        later: &[Frozen],
        progress: &mut (dyn FnMut(SnapshotProgress) + Send),
    ) -> Result<(), SnapshotError> {
        let name = frozen.region().name();
        let of_store = |source| SnapshotError::Store { region: name.to_owned(), source };
        let page = frozen.page_size();
        let read = |extent: Option<Extent>| async move {
            let runs = match extent {
                Some(extent) => frozen.read(extent).await,
                None => Ok(Vec::new()),
            };
            runs.map_err(|source| SnapshotError::Read { region: name.to_owned(), source })
        };
        let mut steps = frozen.extent().chunks((STEP_BYTES / page.bytes()).max(1));
        let mut step = steps.next();
        let mut runs = read(step).await?;
        while let Some(extent) = step {
            // The next is read while this one is written.
            step = steps.next();
            let write = async { self.write(store, &runs, page).await.map_err(of_store) };
            let (written, next) = tokio::join!(write, read(step));
            written?;
            runs = next?;
            let held_bytes = frozen.saved_bytes() + later.iter().map(Frozen::saved_bytes).sum::<u64>();
            self.snapshot.held_bytes_max = self.snapshot.held_bytes_max.max(held_bytes);
            frozen.release(extent);
            self.done_pages += extent.count();
            progress(self.progress(name, held_bytes));
            if let Some((start, bytes_s)) = self.pace {
                let due = Duration::from_secs_f64(self.snapshot.written_bytes as f64 / bytes_s as f64);
                tokio::time::sleep(due.saturating_sub(start.elapsed())).await;
            }
        }
        store.flush().await.map_err(of_store)
    }

    async fn write(&mut self, store: &dyn PageStore, runs: &[Run], page: PageSize) -> Result<(), StoreError> {
        for run in runs {
            for (extent, content) in parts(run, page) {
                match content {
                    Some(bytes) => {
                        store.write(extent, bytes).await?;
                        self.snapshot.written_bytes += bytes.len() as u64;
                    }
                    None => self.write_zeros(store, extent, page).await?,
                }
            }
        }
        Ok(())
    }

    /// Leaves a hole where the store has one.
    async fn write_zeros(&mut self, store: &dyn PageStore, extent: Extent, page: PageSize) -> Result<(), StoreError> {
        for run in store.read(extent).await? {
            let len = run.extent.bytes(page);
            let holds_zeros = match &run.content {
                Content::Zero => true,
                Content::Bytes(bytes) => is_zero(bytes),
            };
            if holds_zeros {
                self.snapshot.skipped_bytes += len;
            } else {
                store.write(run.extent, &vec![0; usize::try_from(len).unwrap_or(usize::MAX)]).await?;
                self.snapshot.written_bytes += len;
            }
        }
        Ok(())
    }

    fn progress(&self, region: &str, held_bytes: u64) -> SnapshotProgress {
        SnapshotProgress { region: region.to_owned(), done_pages: self.done_pages, pages: self.snapshot.pages, held_bytes }
    }
}

/// A run as stretches of bytes, and of zeros that are long enough to be left out.
fn parts(run: &Run, page: PageSize) -> Vec<(Extent, Option<&[u8]>)> {
    let Content::Bytes(bytes) = &run.content else { return vec![(run.extent, None)] };
    let zeros: Vec<bool> = bytes.chunks(page.len()).map(is_zero).collect();
    let first = run.extent.first();
    let (mut parts, mut at, mut from) = (Vec::new(), 0, 0);
    let part = |from: usize, to: usize| Extent::between(first + from as u64, first + to as u64);
    for same in zeros.chunk_by(|one, next| one == next) {
        let end = at + same.len();
        if same[0] && same.len() >= HOLE_PAGES {
            if from < at {
                parts.push((part(from, at), Some(&bytes[from * page.len()..at * page.len()])));
            }
            parts.push((part(at, end), None));
            from = end;
        }
        at = end;
    }
    if from < at {
        parts.push((part(from, at), Some(&bytes[from * page.len()..at * page.len()])));
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_runs_of_zeros_are_left_out_and_short_ones_are_not() {
        let page = PageSize::KIB_4;
        let pages: Vec<u8> = [(3, 1), (15, 0), (2, 1), (16, 0), (1, 1), (20, 0)]
            .into_iter()
            .flat_map(|(pages, byte)| vec![byte; pages * page.len()])
            .collect();
        let run = Run::bytes(Extent::between(100, 157), pages.clone().into());
        let found = parts(&run, page);
        let expected = [(100, 120, true), (120, 136, false), (136, 137, true), (137, 157, false)];
        assert_eq!(
            found.iter().map(|(extent, bytes)| (extent.first(), extent.end(), bytes.is_some())).collect::<Vec<_>>(),
            expected
        );
        for (extent, bytes) in found {
            let from = (extent.first() - 100) as usize * page.len();
            assert!(bytes.is_none_or(|bytes| *bytes == pages[from..from + bytes.len()]));
        }
    }
}
