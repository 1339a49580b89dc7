//! Brings what was written to the remote store, again and again until it is there.
//!
//! Role: one push, and the thread that pushes by itself. Neighbours: `cache` starts both; `shared` marks, reads and acknowledges.
//! Invariants: what was pushed is clean only after the remote store's flush, and only if it was not written since it was read (S5);
//! a push that ends in any other way leaves it dirty; the thread ends before the last handle is gone.

use super::{Inner, shared::Shared};
use crate::{
    StoreError,
    store::blocking::{at_path, run_blocking},
};
use std::{
    hash::{BuildHasher, Hasher, RandomState},
    io,
    sync::{Arc, PoisonError},
    thread::JoinHandle,
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
};

const FIRST_WAIT: Duration = Duration::from_millis(200);
const LONGEST_WAIT: Duration = Duration::from_secs(30);

impl Inner {
    pub(super) async fn push(&self) -> Result<(), StoreError> {
        let mut turn = self.pushing.lock().await;
        *turn += 1;
        let outcome = self.push_now(*turn).await;
        *self.push_error.lock().unwrap_or_else(PoisonError::into_inner) = outcome.as_ref().err().cloned();
        outcome
    }

    async fn push_now(&self, push: u64) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        let whole = self.shared.layout.extent();
        run_blocking("flush", whole, move |_| shared.settle()).await?;
        let pieces = self.shared.dirty();
        if pieces.is_empty() {
            return Ok(());
        }
        let taken = Taken(Some((self.shared.clone(), push)));
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
                let parts = run_blocking("read", piece, move |_| shared.take(piece, push)).await?;
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
        // From here on dropping this future must not make dirty what becomes clean.
        run_blocking("flush", whole, move |_| {
            let acknowledged = shared.pushed(push);
            taken.acknowledged();
            acknowledged
        })
        .await
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

/// What was read to be pushed; dirty again when it is dropped.
struct Taken(Option<(Arc<Shared>, u64)>);

impl Taken {
    fn acknowledged(mut self) {
        self.0 = None;
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        if let Some((shared, push)) = &self.0 {
            shared.not_pushed(*push);
        }
    }
}

/// The thread that pushes by itself, if it was asked for.
pub(super) struct Pusher {
    wake: Arc<Notify>,
    end: watch::Sender<()>,
    thread: Option<JoinHandle<()>>,
}

impl Pusher {
    pub(super) fn start(inner: &Arc<Inner>, every: Option<Duration>) -> Result<Pusher, StoreError> {
        let (wake, (end, ended)) = (Arc::new(Notify::new()), watch::channel(()));
        let start = |every: Duration| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (inner, wake) = (inner.clone(), wake.clone());
            let work = move || runtime.block_on(push_until(ended, push_by_itself(&inner, every, &wake)));
            std::thread::Builder::new().name("pageferry-cache".into()).spawn(work)
        };
        let thread = every.map(start).transpose().map_err(|error: io::Error| at_path("open", &inner.path, error))?;
        Ok(Pusher { wake, end, thread })
    }

    /// Something was flushed.
    pub(super) fn wake(&self) {
        self.wake.notify_one();
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

async fn push_by_itself(inner: &Inner, every: Duration, wake: &Notify) {
    let mut failures = 0;
    loop {
        if failures == 0 {
            // A flush begins a push, and so does the time.
            let _ = tokio::time::timeout(every, wake.notified()).await;
        } else {
            // A store that is away is not asked more often because somebody flushes.
            tokio::time::sleep(wait_after(failures, RandomState::new().build_hasher().finish())).await;
        }
        match inner.push().await {
            Ok(()) => failures = 0,
            Err(error) => {
                failures += 1;
                tracing::warn!(cache = %inner.path.display(), failures, %error, "a push failed and is tried again");
            }
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
