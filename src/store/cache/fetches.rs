//! What is on its way from the remote store, asked for once for all who want it.
//!
//! Role: joins readers of the same missing pages, and keeps in the file what comes. Neighbours: `cache` asks for its readers and
//! retires what a write makes stale; `shared` keeps pages. Invariants: at most one fetch of a page is in the table; a fetch ends
//! whatever becomes of its readers; an answer that a write overtook is kept nowhere and joined by no later reader.

use super::shared::Shared;
use crate::{Content, Extent, PageSize, PageStore, Run, StoreError};
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicBool, Ordering},
};
use tokio::sync::watch;

type Answer = Option<Result<Vec<Run>, StoreError>>;

#[derive(Default)]
pub(super) struct Fetches {
    table: Mutex<Vec<Arc<Fetch>>>,
    keep_error: Mutex<Option<StoreError>>,
}

struct Fetch {
    extent: Extent,
    stale: AtomicBool,
    answer: watch::Receiver<Answer>,
}

/// A piece of a read.
pub(super) enum Part {
    Here(Run),
    /// This much of the answer of a fetch.
    Coming(Extent, watch::Receiver<Answer>),
    /// It has come since it was missing.
    Again(Extent),
}

impl Fetches {
    /// Who brings the pages of `missing`, in order: fetches under way, or new ones, which run on the runtime that polls.
    pub(super) fn ask(
        self: &Arc<Fetches>,
        shared: &Arc<Shared>,
        remote: &Arc<dyn PageStore>,
        missing: Extent,
        behind: bool,
    ) -> Vec<Part> {
        let mut table = self.table();
        let (mut parts, mut at) = (Vec::new(), missing.first());
        while at < missing.end() {
            let rest = Extent::between(at, missing.end());
            let nearest = table.iter().filter_map(|fetch| Some((fetch.extent.intersect(rest)?, fetch.answer.clone())));
            let nearest = nearest.min_by_key(|(both, _)| both.first());
            let gap = Extent::between(at, nearest.as_ref().map_or(rest.end(), |(both, _)| both.first()));
            if !gap.is_empty() {
                // A fetch leaves the table after its pages were kept: under the table's lock, what is not here is on no way.
                if shared.pages().within(gap).iter().any(|(_, state)| state.is_some()) {
                    parts.push(Part::Again(rest));
                    return parts;
                }
                let (sender, answer) = watch::channel(None);
                let fetch = Arc::new(Fetch { extent: gap, stale: AtomicBool::new(false), answer: answer.clone() });
                table.push(fetch.clone());
                let listed = Listed { fetches: self.clone(), fetch };
                let (shared, remote) = (shared.clone(), remote.clone());
                tokio::spawn(async move { listed.run(&shared, &*remote, behind, sender).await });
                parts.push(Part::Coming(gap, answer));
            }
            if let Some((both, answer)) = nearest {
                parts.push(Part::Coming(both, answer));
                at = both.end();
            } else {
                at = rest.end();
            }
        }
        parts
    }

    /// A write to `extent` begins: what is on its way there is older.
    pub(super) fn retire(&self, extent: Extent) {
        self.table().retain(|fetch| {
            let hit = fetch.extent.intersect(extent).is_some();
            if hit {
                fetch.stale.store(true, Ordering::Release);
            }
            !hit
        });
    }

    pub(super) fn keep_error(&self) -> Option<StoreError> {
        self.keep_error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn table(&self) -> MutexGuard<'_, Vec<Arc<Fetch>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A fetch in the table, until it is dropped.
struct Listed {
    fetches: Arc<Fetches>,
    fetch: Arc<Fetch>,
}

impl Listed {
    async fn run(self, shared: &Arc<Shared>, remote: &dyn PageStore, behind: bool, sender: watch::Sender<Answer>) {
        let extent = self.fetch.extent;
        let answer = if behind { remote.read_behind(extent).await } else { remote.read(extent).await };
        let answer = answer.and_then(|runs| checked(runs, extent, remote.page_size()));
        // Readers first: they need not wait for the file.
        sender.send_replace(Some(answer.clone()));
        let Ok(runs) = answer else { return };
        let shared = shared.clone();
        // On a blocking thread and with the entry in hand, so that it stays in the table until it is done.
        let kept = tokio::task::spawn_blocking(move || {
            let kept = shared.keep(&runs, || self.fetch.stale.load(Ordering::Acquire));
            if let Err(error) = kept {
                tracing::debug!(%error, "what was read is not kept");
                *self.fetches.keep_error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
        });
        // One that panics or is cancelled keeps nothing, and its readers have their answer.
        let _ = kept.await;
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.fetches.table().retain(|fetch| !Arc::ptr_eq(fetch, &self.fetch));
    }
}

/// Runs that cover `extent` exactly; what else a store may answer is not kept as its pages.
fn checked(runs: Vec<Run>, extent: Extent, page_size: PageSize) -> Result<Vec<Run>, StoreError> {
    let mut at = extent.first();
    for run in &runs {
        let expected_bytes = run.extent.bytes(page_size);
        match &run.content {
            Content::Bytes(bytes) if bytes.len() as u64 != expected_bytes => {
                return Err(StoreError::WrongLength { expected_bytes, got_bytes: bytes.len() as u64 });
            }
            _ if run.extent.first() != at => {
                return Err(StoreError::Protocol(format!("asked for {extent}, the remote store answered {}", run.extent)));
            }
            _ => at = run.extent.end(),
        }
    }
    let (expected_bytes, got_bytes) = (extent.bytes(page_size), Extent::between(extent.first(), at).bytes(page_size));
    if at == extent.end() { Ok(runs) } else { Err(StoreError::WrongLength { expected_bytes, got_bytes }) }
}

/// What `runs` say of `extent`.
pub(super) fn cut(runs: &[Run], extent: Extent, page_size: PageSize) -> Vec<Run> {
    let piece = |run: &Run| {
        let both = run.extent.intersect(extent)?;
        let start = Extent::between(run.extent.first(), both.first()).bytes(page_size) as usize;
        let content = match &run.content {
            Content::Zero => Content::Zero,
            Content::Bytes(bytes) => Content::Bytes(bytes.slice(start..start + both.bytes(page_size) as usize)),
        };
        Some(Run { extent: both, content })
    };
    runs.iter().filter_map(piece).collect()
}
