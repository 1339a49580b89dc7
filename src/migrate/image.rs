//! The memory of a standby: as it was at the last point, and beside that what has come since.
//!
//! Role: takes in what a source sends to a standby. Neighbours: `taking` says when a point is whole, `standby` shows it. Invariants: what is shown existed at a pause of the program, all regions and the state of the
//! same one; what has come since is put over it in one step that nobody sees the middle of, and never before all of it is here; what came and was acknowledged is not forgotten
//! when the connection breaks.

use super::MoveError;
use crate::{
    Content, Extent, PageSize, Region, RegionError, Run,
    net::{Fed, FeedReader, StreamError},
};
use bytes::Bytes;
use std::{
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, mpsc as blocking},
    time::{Duration, Instant},
};
use tokio::{sync::mpsc, task::JoinHandle};

/// What a standby shows.
pub(super) struct Shown {
    pub(super) number: u64,
    pub(super) state: Bytes,
    /// When the program stood there, by this end's clock.
    pub(super) stood: Instant,
    pub(super) regions: Vec<Region>,
}

/// See the module header.
pub(super) struct Image {
    parts: Vec<Arc<Part>>,
    listeners: Vec<Listener>,
    shown: Arc<RwLock<Option<Shown>>>,
}

/// A region of it.
struct Part {
    region: Region,
    /// Of the same size; what has come since the last point, where `came` says so.
    since: Region,
    came: Mutex<Came>,
}

struct Came {
    /// Before the first point nothing is shown, and what comes goes where it belongs.
    shown: bool,
    /// By page.
    pages: Vec<Kind>,
    any: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Nothing,
    Bytes,
    Zero,
}

/// Takes in what one feed brings.
struct Listener {
    task: JoinHandle<()>,
    /// Puts pages in place: copying memory is nothing for a thread that serves faults.
    putting: JoinHandle<bool>,
    marked: mpsc::UnboundedReceiver<Result<u64, MoveError>>,
    /// Lets it go on behind a mark.
    go_on: blocking::Sender<()>,
}

enum Item {
    Runs(Vec<Run>),
    Mark(u64),
    Broken(MoveError),
}

/// The mark of what a promotion sends last.
pub(super) const LAST: u64 = u64::MAX;
/// Items that wait to be put in place.
const ITEMS_WAITING: usize = 3;
/// Copied at once: what fits a core's cache.
const COPY_BYTES: u64 = 256 << 10;

impl Image {
    pub(super) fn new() -> Image {
        Image { parts: Vec::new(), listeners: Vec::new(), shown: Arc::default() }
    }

    pub(super) fn shown(&self) -> Arc<RwLock<Option<Shown>>> {
        self.shown.clone()
    }

    /// Whether there is a point from which the program could go on.
    pub(super) fn has_point(&self) -> bool {
        read(&self.shown).is_some()
    }

    pub(super) fn map(&mut self, region: Region) -> Result<(), RegionError> {
        let since = Region::builder().size(region.size_bytes()).open()?;
        let pages = usize::try_from(region.extent().count()).unwrap_or(usize::MAX);
        let came = Mutex::new(Came { shown: false, pages: vec![Kind::Nothing; pages], any: false });
        self.parts.push(Arc::new(Part { region, since, came }));
        Ok(())
    }

    /// Takes in what comes on the feed of the region that was mapped as number `at`.
    pub(super) fn listen(&mut self, at: usize, feed: FeedReader) {
        let part = self.parts[at].clone();
        let (items, to_put) = mpsc::channel(ITEMS_WAITING);
        let (tell, marked) = mpsc::unbounded_channel();
        let (go_on, may_go_on) = blocking::channel();
        let within = part.region.extent();
        let putting = tokio::task::spawn_blocking(move || put_all(&part, to_put, &tell, &may_go_on));
        let task = tokio::spawn(take_in(feed, within, items));
        self.listeners.push(Listener { task, putting, marked, go_on });
    }

    /// Ends the listening; what has come is in place when this returns. Whether all of it is.
    pub(super) async fn cancel(&mut self) -> bool {
        let mut intact = true;
        for listener in self.listeners.drain(..) {
            listener.task.abort();
            let _ = listener.task.await;
            // Who waits behind a mark puts the rest in place: it is part of the next point.
            drop(listener.go_on);
            intact &= listener.putting.await.unwrap_or(false);
        }
        intact
    }

    /// Lets go of everything; nothing is shown any more.
    pub(super) async fn leave(&mut self) {
        self.cancel().await;
        let (parts, shown) = (std::mem::take(&mut self.parts), self.shown.clone());
        let leave = move || {
            *shown.write().unwrap_or_else(PoisonError::into_inner) = None;
            drop(parts);
        };
        let _ = tokio::task::spawn_blocking(leave).await;
    }

    /// Waits until every feed has brought everything of that point. Cancellation: waits anew.
    pub(super) async fn reached(&mut self, number: u64) -> Result<(), MoveError> {
        for listener in &mut self.listeners {
            let mark = listener.marked.recv().await.ok_or(MoveError::Closed)??;
            if mark != number {
                return Err(MoveError::Protocol(format!("MARK {mark} came where point {number} is expected")));
            }
        }
        Ok(())
    }

    /// Shows it; as which number. The feeds go on after that.
    pub(super) async fn show(&mut self, state: Bytes, age: Duration) -> Result<u64, MoveError> {
        let (parts, shown) = (self.parts.clone(), self.shown.clone());
        let stood = Instant::now().checked_sub(age).unwrap_or_else(Instant::now);
        let apply = move || {
            let mut shown = shown.write().unwrap_or_else(PoisonError::into_inner);
            parts.iter().try_for_each(|part| part.apply())?;
            let regions = parts.iter().map(|part| part.region.clone()).collect();
            // A source that lost its account counts anew.
            let number = shown.as_ref().map_or(0, |shown| shown.number) + 1;
            *shown = Some(Shown { number, state, stood, regions });
            Ok::<u64, RegionError>(number)
        };
        let number = tokio::task::spawn_blocking(apply).await.map_err(|_| MoveError::Closed)??;
        for listener in &self.listeners {
            let _ = listener.go_on.send(());
        }
        Ok(number)
    }
}

pub(super) fn read(shown: &RwLock<Option<Shown>>) -> RwLockReadGuard<'_, Option<Shown>> {
    shown.read().unwrap_or_else(PoisonError::into_inner)
}

async fn take_in(mut feed: FeedReader, within: Extent, items: mpsc::Sender<Item>) {
    loop {
        let item = match feed.next().await {
            Ok(Fed::Pages(runs)) => Item::Runs(runs),
            Ok(Fed::Mark(number)) if number < LAST => Item::Mark(number),
            Ok(Fed::Lacks { extents, more: false }) if extents.is_empty() => Item::Mark(LAST),
            Ok(Fed::Mark(_) | Fed::Lacks { .. }) => {
                Item::Broken(MoveError::Protocol(format!("a standby is to lack nothing of {within}")))
            }
            Ok(Fed::End) => return,
            Err(StreamError::Ended(reason)) => Item::Broken(MoveError::Lost { reason }),
            Err(StreamError::Wire(error)) => Item::Broken(MoveError::Protocol(error.to_string())),
        };
        let ends = matches!(item, Item::Broken(_));
        if items.send(item).await.is_err() || ends {
            return;
        }
    }
}

fn put_all(
    part: &Part,
    mut to_put: mpsc::Receiver<Item>,
    tell: &mpsc::UnboundedSender<Result<u64, MoveError>>,
    may_go_on: &blocking::Receiver<()>,
) -> bool {
    let mut intact = true;
    while let Some(item) = to_put.blocking_recv() {
        match item {
            // Goes on taking, or the feed would wait for ever.
            Item::Runs(runs) if intact => {
                if let Err(error) = runs.iter().try_for_each(|run| part.put(run)) {
                    intact = false;
                    let _ = tell.send(Err(error.into()));
                }
            }
            Item::Runs(_) => {}
            Item::Mark(number) => {
                // What comes next is not of this point.
                if intact && tell.send(Ok(number)).is_ok() {
                    let _ = may_go_on.recv();
                }
            }
            Item::Broken(error) => drop(tell.send(Err(error))),
        }
    }
    intact
}

impl Part {
    fn came(&self) -> std::sync::MutexGuard<'_, Came> {
        self.came.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn put(&self, run: &Run) -> Result<(), RegionError> {
        let mut came = self.came();
        if !came.shown {
            return put_into(&self.region, run);
        }
        put_into(&self.since, run)?;
        let kind = if matches!(run.content, Content::Zero) { Kind::Zero } else { Kind::Bytes };
        came.pages[index(run.extent.first())..index(run.extent.end())].fill(kind);
        came.any = true;
        Ok(())
    }

    /// What has come since is shown from now on.
    fn apply(&self) -> Result<(), RegionError> {
        let mut came = self.came();
        came.shown = true;
        if !came.any {
            return Ok(());
        }
        let page = self.region.page_size();
        let mut buffer = vec![0; usize::try_from(COPY_BYTES.max(page.bytes())).unwrap_or(usize::MAX)];
        let mut first = 0;
        for alike in came.pages.chunk_by(|page, next| page == next) {
            let extent = Extent::between(first as u64, (first + alike.len()) as u64);
            first += alike.len();
            match alike[0] {
                Kind::Nothing => {}
                Kind::Zero => self.region.discard(range(extent, page))?,
                Kind::Bytes => {
                    for step in extent.chunks((COPY_BYTES / page.bytes()).max(1)) {
                        let bytes = &mut buffer[..index(step.bytes(page))];
                        self.since.read_at(page.offset_of(step.first()), bytes)?;
                        self.region.write_at(page.offset_of(step.first()), bytes)?;
                    }
                }
            }
        }
        self.since.discard(0..self.since.len() as u64)?;
        came.pages.fill(Kind::Nothing);
        came.any = false;
        Ok(())
    }
}

fn put_into(region: &Region, run: &Run) -> Result<(), RegionError> {
    match &run.content {
        Content::Bytes(bytes) => region.write_at(region.page_size().offset_of(run.extent.first()), bytes),
        Content::Zero => region.discard(range(run.extent, region.page_size())),
    }
}

fn range(extent: Extent, page: PageSize) -> std::ops::Range<u64> {
    page.offset_of(extent.first())..page.offset_of(extent.end())
}

#[allow(clippy::cast_possible_truncation, reason = "pages and bytes of mapped memory fit usize")]
fn index(number: u64) -> usize {
    number as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn part(pages: u64) -> Part {
        let open = || Region::builder().size(pages * PAGE as u64).open().unwrap();
        let came = Came { shown: false, pages: vec![Kind::Nothing; pages as usize], any: false };
        Part { region: open(), since: open(), came: Mutex::new(came) }
    }

    fn run(page: u64, count: u64, byte: u8) -> Run {
        Run::bytes(Extent::new(page, count).unwrap(), vec![byte; count as usize * PAGE].into())
    }

    fn first_bytes(part: &Part) -> Vec<u8> {
        (0..part.region.extent().count())
            .map(|page| {
                let mut byte = [0];
                part.region.read_at(page * PAGE as u64, &mut byte).unwrap();
                byte[0]
            })
            .collect()
    }

    #[test]
    fn what_comes_is_shown_at_the_next_point_and_not_before() {
        let part = part(6);
        part.put(&run(0, 3, 1)).unwrap();
        assert_eq!(first_bytes(&part), [1, 1, 1, 0, 0, 0]);
        part.apply().unwrap();
        part.put(&run(1, 3, 2)).unwrap();
        part.put(&Run::zero(Extent::page(0))).unwrap();
        assert_eq!(first_bytes(&part), [1, 1, 1, 0, 0, 0]);
        // Again, as something else: what came last counts.
        part.put(&Run::zero(Extent::page(2))).unwrap();
        part.put(&run(0, 1, 3)).unwrap();
        part.apply().unwrap();
        assert_eq!(first_bytes(&part), [3, 2, 0, 2, 0, 0]);
        part.put(&run(5, 1, 4)).unwrap();
        part.apply().unwrap();
        assert_eq!(first_bytes(&part), [3, 2, 0, 2, 0, 4]);
        part.apply().unwrap();
        assert_eq!(first_bytes(&part), [3, 2, 0, 2, 0, 4]);
    }
}
