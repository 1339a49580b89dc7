//! Brings what was written to the remote store, again and again until it is there.
//!
//! Role: the thread on which a cache pushes, by itself and when asked. Neighbours: `cache` starts and asks it; `shared` marks, reads and acknowledges.
//! Invariants: what was pushed is clean only after the remote store's flush, and only if it was not written since it was read (S5);
//! a push that ends in any other way leaves it dirty; one push at a time, which ends whatever becomes of who asked for it, so that no write of
//! one lands after a younger write of the next; the thread ends before the last handle is gone.

use super::{Inner, shared::Shared};
use crate::{
    StoreError,
    store::blocking::{at_path, run_blocking},
};
use std::{
    future::pending,
    hash::{BuildHasher, Hasher, RandomState},
    io,
    sync::{Arc, PoisonError},
    thread::JoinHandle,
    time::Duration,
};
use tokio::{
    sync::{Notify, mpsc, oneshot, watch},
    task::JoinSet,
};

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

impl Inner {
    async fn push(&self) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        let whole = self.shared.layout.extent();
        run_blocking("flush", whole, move |_| shared.settle()).await?;
        let pieces = self.shared.dirty();
        if pieces.is_empty() {
            return Ok(());
        }
        let taken = Taken(Some(self.shared.clone()));
        let (mut writes, mut on_way_bytes) = (JoinSet::new(), 0);
        let mut outcome = Ok(());
        for piece in pieces {
            let piece_bytes = piece.bytes(self.shared.layout.page_size);
            while on_way_bytes > 0 && on_way_bytes + piece_bytes > self.push_bytes {
                match landed(&mut writes).await {
                    Ok(bytes) => on_way_bytes -= bytes.unwrap_or(on_way_bytes),
                    Err(error) => (outcome, on_way_bytes) = (Err(error), 0),
                }
            }
            if outcome.is_err() {
                break;
            }
            on_way_bytes += piece_bytes;
            let (shared, remote) = (self.shared.clone(), self.remote.clone());
            writes.spawn(async move {
                let parts = run_blocking("read", piece, move |_| shared.take(piece)).await?;
                for (extent, bytes) in parts {
                    remote.write(extent, &bytes).await?;
                }
                Ok(piece_bytes)
            });
        }
        // After a failure too: a write that still runs must not land after one of the next push.
        loop {
            match landed(&mut writes).await {
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome?;
        self.remote.flush().await?;
        let shared = self.shared.clone();
        run_blocking("flush", whole, move |_| shared.pushed()).await?;
        taken.acknowledged();
        Ok(())
    }
}

/// How many bytes the next write that ends has brought; `None` if none is under way.
async fn landed(writes: &mut JoinSet<Result<u64, StoreError>>) -> Result<Option<u64>, StoreError> {
    match writes.join_next().await {
        None => Ok(None),
        Some(Ok(outcome)) => outcome.map(Some),
        Some(Err(_)) => Err(StoreError::Protocol("the remote store panicked in a write".into())),
    }
}

/// What was read to be pushed; what of it is not clean is dirty again when this is dropped.
struct Taken(Option<Arc<Shared>>);

impl Taken {
    fn acknowledged(mut self) {
        self.0 = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some(shared) = &self.0 {
            shared.not_pushed();
        }
    }
}

/// Who is to be told what came of a push that begins from now on.
type Asked = oneshot::Sender<Result<(), StoreError>>;

/// The thread that pushes.
pub(super) struct Pusher {
    asks: mpsc::UnboundedSender<Asked>,
    wake: Arc<Notify>,
    end: watch::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Pusher {
    /// `every`: how often it pushes without being asked, if it does.
    pub(super) fn start(inner: &Arc<Inner>, every: Option<Duration>) -> Result<Pusher, StoreError> {
        let (wake, (end, ended), (asks, asked)) = (Arc::new(Notify::new()), watch::channel(()), mpsc::unbounded_channel());
        let start = || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (inner, wake) = (inner.clone(), wake.clone());
            let work = move || runtime.block_on(push_until(ended, push_on(&inner, every, &wake, asked)));
            std::thread::Builder::new().name("pageferry-cache".into()).spawn(work)
        };
        let thread = start().map_err(|error: io::Error| at_path("open", &inner.path, error))?;
        Ok(Pusher { asks, wake, end, thread: Some(thread) })
    }

    /// Something was flushed.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Begins a push when the one under way is over, and waits for it. Dropped, it leaves the push going on.
    pub(super) async fn push(&self) -> Result<(), StoreError> {
        let (told, outcome) = oneshot::channel();
        // A thread that has ended drops it, and so says so.
        let _ = self.asks.send(told);
        outcome.await.unwrap_or(Err(StoreError::Closed))
    }
}

impl Drop for Pusher {
    fn drop(&mut self) {
        self.end.send_replace(());
        let Some(thread) = self.thread.take() else { return };
        if thread.thread().id() != std::thread::current().id() && thread.join().is_err() {
            tracing::error!("the thread that pushes what a cache holds has panicked");
        }
    }
}

async fn push_until(mut ended: watch::Receiver<()>, pushing: impl Future<Output = ()>) {
    tokio::select! {
        () = pushing => {}
        _ = ended.changed() => {}
    }
}

async fn push_on(inner: &Arc<Inner>, every: Option<Duration>, wake: &Notify, mut asked: mpsc::UnboundedReceiver<Asked>) {
    let mut failures = 0;
    loop {
        let by_itself = async {
            match every {
                None => pending().await,
                // A flush begins a push, and so does the time.
                Some(every) if failures == 0 => drop(tokio::time::timeout(every, wake.notified()).await),
                // A store that is away is not asked more often because somebody flushes.
                Some(_) => tokio::time::sleep(wait_after(failures, RandomState::new().build_hasher().finish())).await,
            }
        };
        let mut waiting = tokio::select! {
            first = asked.recv() => match first {
                Some(first) => vec![first],
                None => return,
            },
            () = by_itself => Vec::new(),
        };
        waiting.extend(std::iter::from_fn(|| asked.try_recv().ok()));
        // A task of its own: the remote store is somebody else's code, and may panic.
        let pushing = inner.clone();
        let outcome = tokio::spawn(async move { pushing.push().await }).await;
        let outcome = outcome.unwrap_or_else(|_| Err(StoreError::Protocol("the remote store panicked in a push".into())));
        failures = outcome.as_ref().map_or(failures + 1, |()| 0);
        if let Err(error) = &outcome {
            tracing::warn!(cache = %inner.path.display(), failures, %error, "a push failed; what was written is kept");
        }
        *inner.push_error.lock().unwrap_or_else(PoisonError::into_inner) = outcome.as_ref().err().cloned();
        for told in waiting {
            let _ = told.send(outcome.clone());
        }
    }
}

/// Longer after each failure, and by a quarter more or less, by `spread`, so that many caches do not ask at the same instant.
fn wait_after(failures: u32, spread: u64) -> Duration {
    let wait = FIRST_WAIT.saturating_mul(1 << failures.saturating_sub(1).min(20)).min(LONGEST_WAIT);
    wait * (75 + (spread % 51) as u32) / 100
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_are_spread_by_a_quarter() {
        for failures in 1..100 {
            let plain = FIRST_WAIT.saturating_mul(1 << (failures - 1).min(20)).min(LONGEST_WAIT);
            for spread in 0..51 {
                let wait = wait_after(failures, spread);
                assert!(wait >= plain * 3 / 4 && wait <= plain * 5 / 4, "{failures} failures: {wait:?}");
            }
        }
        assert_eq!(wait_after(u32::MAX, 25), LONGEST_WAIT);
        assert_ne!(wait_after(3, 0), wait_after(3, 50));
    }
}
