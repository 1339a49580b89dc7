//! A thread that installs what pulls bring.
//!
//! Role: hop *install* of the background pull. Neighbours: `fetch` hands it runs as they come; it installs them under the engine's lock. Invariants: as in `engine`: one
//! lock around every install, held for no more than [`STEP_BYTES`] at a time so that a fault is not kept waiting; like the service's thread, it
//! touches no region except through the kernel (S2).
//!
//! Why a thread: receiving and decrypting fills a core well before the network is full, while the sender's core has time to spare; copying pages in costs a third
//! as much again (bench `throughput`, `pull_jumbo_mb_s`: 0.6 of plain QUIC with both on one thread).

use super::{address_map::RegionId, engine::Engine};
use crate::{Extent, RegionError, Run, page_store::PULL_EXTENT_BYTES};
use std::sync::{
    Arc, Weak,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use tokio::sync::{mpsc, oneshot};

/// Installed under one lock: about 25 us.
const STEP_BYTES: u64 = 64 * 1024;

/// Runs that wait to be installed: enough to keep the thread busy, few enough to stay in its cache.
const RUNS_WAITING: usize = 3;

const _: () = assert!(PULL_EXTENT_BYTES.is_multiple_of(STEP_BYTES));

/// See the module header.
pub(super) struct Installer {
    jobs: mpsc::Sender<Job>,
}

enum Job {
    /// The pages of it that were wanted are added up.
    Install(RegionId, Vec<Run>, Arc<AtomicU64>),
    /// Answered once all that came before is installed.
    Settled(oneshot::Sender<()>),
}

impl Installer {
    pub(super) fn start(engine: Weak<Engine>) -> std::io::Result<Installer> {
        let (jobs, mut to_do) = mpsc::channel(RUNS_WAITING);
        std::thread::Builder::new().name("pageferry-install".into()).spawn(move || {
            while let Some(job) = to_do.blocking_recv() {
                match job {
                    Job::Install(id, runs, wanted_pages) => {
                        let Some(engine) = engine.upgrade() else { return };
                        let step = (STEP_BYTES / engine.page.bytes()).max(1);
                        for (run, extent) in runs.iter().flat_map(|run| run.extent.chunks(step).map(move |extent| (run, extent))) {
                            let installed = engine.turn(|| engine.install_pulled(id, &part(run, extent)));
                            wanted_pages.fetch_add(installed.unwrap_or(0), Relaxed);
                        }
                    }
                    Job::Settled(answer) => {
                        let _ = answer.send(());
                    }
                }
            }
        })?;
        Ok(Installer { jobs })
    }

    /// Waits for room, not for the install.
    pub(super) async fn install(&self, id: RegionId, runs: Vec<Run>, wanted_pages: Arc<AtomicU64>) -> Result<(), RegionError> {
        self.jobs.send(Job::Install(id, runs, wanted_pages)).await.map_err(|_| RegionError::PagerStopped)
    }

    /// Waits until everything handed over is installed.
    pub(super) async fn settled(&self) -> Result<(), RegionError> {
        let (answer, answered) = oneshot::channel();
        self.jobs.send(Job::Settled(answer)).await.map_err(|_| RegionError::PagerStopped)?;
        answered.await.map_err(|_| RegionError::PagerStopped)
    }
}

/// A part of a run, sharing its bytes.
fn part(run: &Run, extent: Extent) -> Run {
    match &run.content {
        crate::Content::Zero => Run::zero(extent),
        crate::Content::Bytes(bytes) => {
            let page_len = bytes.len() / usize::try_from(run.extent.count()).unwrap_or(usize::MAX).max(1);
            #[allow(clippy::cast_possible_truncation, reason = "inside `bytes`, whose length was checked against the run")]
            let (from, pages) = ((extent.first() - run.extent.first()) as usize, extent.count() as usize);
            Run::bytes(extent, bytes.slice(from * page_len..(from + pages) * page_len))
        }
    }
}
