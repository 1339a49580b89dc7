//! Stores for tests: [`Gated`], whose answers come when the test says so.
//!
//! Role: makes orders of events that are rare in life certain in a test: a slow, stuck or failing store, without sleeps. Neighbours:
//! wraps any [`PageStore`]; used by the tests of the pager, of mounts and of migrations. Invariants: a read is answered once, in the
//! order of [`release`](Gated::release) or by name; what a test observes it can wait for.

use super::pull_by_reading;
use crate::{Extent, PageSize, PageStore, Pull, Run, StoreError};
use async_trait::async_trait;
use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::{Notify, oneshot};

/// A store whose reads wait at a gate, closed at first, until the test lets them through.
///
/// A read fetches its pages from the inner store when it arrives and then waits with them: it is an answer in flight, and a write that
/// happens meanwhile does not change it. `read_behind` and each step of a `pull` ([`PULL_EXTENT_BYTES`](crate::PULL_EXTENT_BYTES)) wait
/// like a `read`; writes and flushes pass. A read that is dropped leaves the gate. A clone is another handle to the same gate.
///
/// ```
/// use pageferry::{Extent, MemoryStore, PageSize, PageStore, testing::Gated};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), pageferry::StoreError> {
/// let store = Gated::new(MemoryStore::zeroed(64 * 1024, PageSize::KIB_4));
/// let reading = tokio::spawn({ let store = store.clone(); async move { store.read(Extent::page(3)).await } });
/// store.arrived(1).await;                 // it waits; the test may do other things now, in a known order
/// assert!(store.release_extent(Extent::page(3)));
/// assert_eq!(reading.await.unwrap()?.len(), 1);
/// assert_eq!(store.reads_of(Extent::page(3)), 1);
/// # Ok(()) }
/// ```
pub struct Gated<S> {
    shared: Arc<Shared<S>>,
}

struct Shared<S> {
    store: S,
    gate: Mutex<Gate>,
    /// Told of each arrival.
    arrival: Notify,
}

#[derive(Default)]
struct Gate {
    open: bool,
    /// Reads that may pass although the gate is closed, once they arrive.
    permits: usize,
    failures: VecDeque<(usize, StoreError)>,
    waiting: Vec<(Extent, oneshot::Sender<Result<(), StoreError>>)>,
    log: Vec<Extent>,
}

impl<S: PageStore> Gated<S> {
    /// Puts a closed gate before `store`.
    #[must_use]
    pub fn new(store: S) -> Gated<S> {
        Gated { shared: Arc::new(Shared { store, gate: Mutex::default(), arrival: Notify::new() }) }
    }

    /// Opens the gate: the reads that wait, in the order of their arrival, and all later ones pass.
    pub fn open(&self) {
        let mut gate = self.gate();
        gate.open = true;
        gate.let_through(usize::MAX);
    }

    /// Closes the gate for reads that have not arrived yet, and takes back permits that are left.
    pub fn close(&self) {
        let mut gate = self.gate();
        (gate.open, gate.permits) = (false, 0);
    }

    /// Lets `reads` reads through: first those that wait, in the order of their arrival, then the next to arrive.
    pub fn release(&self, reads: usize) {
        let mut gate = self.gate();
        let passed = gate.let_through(reads);
        gate.permits = gate.permits.saturating_add(reads - passed);
    }

    /// Lets the oldest waiting read of exactly `extent` through, before others; `false` if there is none.
    pub fn release_extent(&self, extent: Extent) -> bool {
        let mut gate = self.gate();
        while let Some(index) = gate.waiting.iter().position(|(waiting, _)| *waiting == extent) {
            if gate.answer(index) {
                return true;
            }
        }
        false
    }

    /// Makes the next `reads` reads that pass the gate fail with `error`, after those that were told to fail before.
    /// `usize::MAX` is for good, until [`heal`](Gated::heal).
    pub fn fail_next(&self, reads: usize, error: StoreError) {
        self.gate().failures.push_back((reads, error));
    }

    /// Forgets all failures that are still due.
    pub fn heal(&self) {
        self.gate().failures.clear();
    }

    /// Returns when at least `reads` reads are waiting at the gate.
    pub async fn arrived(&self, reads: usize) {
        loop {
            let mut arrival = std::pin::pin!(self.shared.arrival.notified());
            // Registered before looking, or an arrival in between would go unheard.
            arrival.as_mut().enable();
            if self.waiting().len() >= reads {
                return;
            }
            arrival.await;
        }
    }

    /// The reads that wait at the gate, in the order of their arrival.
    #[must_use]
    pub fn waiting(&self) -> Vec<Extent> {
        let mut gate = self.gate();
        gate.waiting.retain(|(_, answer)| !answer.is_closed());
        gate.waiting.iter().map(|(extent, _)| *extent).collect()
    }

    /// Every read that ever arrived, in order, whatever became of it.
    #[must_use]
    pub fn reads(&self) -> Vec<Extent> {
        self.gate().log.clone()
    }

    /// How many reads of exactly `extent` arrived.
    #[must_use]
    pub fn reads_of(&self, extent: Extent) -> usize {
        self.gate().log.iter().filter(|read| **read == extent).count()
    }

    /// The store behind the gate, to read or change past it.
    #[must_use]
    pub fn inner(&self) -> &S {
        &self.shared.store
    }

    async fn pass(&self, extent: Extent, answer: Result<Vec<Run>, StoreError>) -> Result<Vec<Run>, StoreError> {
        let (pass, passed) = oneshot::channel();
        {
            let mut gate = self.gate();
            gate.log.push(extent);
            gate.waiting.push((extent, pass));
            if gate.open || gate.permits > 0 {
                gate.permits = if gate.open { gate.permits } else { gate.permits - 1 };
                let newest = gate.waiting.len() - 1;
                gate.answer(newest);
            }
        }
        self.shared.arrival.notify_waiters();
        // The gate lives as long as `self`, so nobody drops the other end unanswered.
        passed.await.unwrap_or(Err(StoreError::Closed)).and(answer)
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Gate {
    /// Lets up to `reads` waiting reads through and says how many there were.
    fn let_through(&mut self, reads: usize) -> usize {
        let mut passed = 0;
        while passed < reads && !self.waiting.is_empty() {
            passed += usize::from(self.answer(0));
        }
        passed
    }

    /// Ends the wait of one read; `false` if it was dropped meanwhile, which uses up neither a permit nor a failure.
    fn answer(&mut self, index: usize) -> bool {
        let (_, answer) = self.waiting.remove(index);
        if answer.is_closed() {
            return false;
        }
        self.failures.retain(|(left, _)| *left > 0);
        let result = match self.failures.front_mut() {
            Some((left, error)) => {
                *left -= usize::from(*left != usize::MAX);
                Err(error.clone())
            }
            None => Ok(()),
        };
        answer.send(result).is_ok()
    }
}

#[async_trait]
impl<S: PageStore> PageStore for Gated<S> {
    fn size(&self) -> u64 {
        self.shared.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.shared.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        let answer = self.shared.store.read(extent).await;
        self.pass(extent, answer).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.shared.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.shared.store.flush().await
    }

    async fn read_behind(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        let answer = self.shared.store.read_behind(extent).await;
        self.pass(extent, answer).await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        pull_by_reading(self, extents)
    }
}

impl<S> Clone for Gated<S> {
    fn clone(&self) -> Gated<S> {
        Gated { shared: self.shared.clone() }
    }
}

impl<S> fmt::Debug for Gated<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gate = self.shared.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let state = if gate.open { "open" } else { "closed" };
        write!(f, "Gated({state}, {} waiting, {} reads so far)", gate.waiting.len(), gate.log.len())
    }
}
