//! Takes in a region's pages, before and after its program runs here.
//!
//! Role: the other end of the source's `copy`, a task for each region. Neighbours: a [`FeedReader`] brings what the source says, in its order; the region puts it in place.
//! Invariants: content that came before the source said what is lacking is whole and in place before the region counts as attached; what comes after is put only where
//! pages are missing; what never comes is for the region's pull.

use super::MoveError;
use crate::{
    Extent, Region, RegionError, Run,
    net::{Fed, FeedReader, StreamError},
    region::{Landing, Upstream, WeakRegion},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinHandle,
};

/// See the module header.
pub(super) struct Arrival {
    attached: Option<oneshot::Receiver<Result<(), MoveError>>>,
    task: JoinHandle<()>,
    /// Puts pages in place until the program runs here: copying memory is nothing for a thread that serves faults.
    putting: JoinHandle<bool>,
}

/// Runs that wait to be put in place: enough to keep a thread busy, few enough to stay in its cache.
const RUNS_WAITING: usize = 3;

impl Arrival {
    /// Takes in what the feed brings, from now on.
    pub(super) fn start(region: Region, feed: FeedReader, upstream: Upstream) -> Arrival {
        let (said, attached) = oneshot::channel();
        let (runs, mut to_put) = mpsc::channel::<Vec<Run>>(RUNS_WAITING);
        let (put, all_put) = oneshot::channel();
        let into = region.clone();
        let putting = tokio::task::spawn_blocking(move || {
            // Not before something comes: to end it takes time, which is a part of the pause where nothing comes before that.
            let (mut landing, mut outcome) = (None, Ok(()));
            while let Some(runs) = to_put.blocking_recv() {
                let put = |landing: &Landing| runs.iter().try_for_each(|run| landing.put(run));
                // Goes on taking, or the feed would wait for ever.
                outcome = outcome.and_then(|()| match &landing {
                    Some(landing) => put(landing),
                    None => put(landing.insert(into.landing()?)),
                });
            }
            // What has not come is no longer waited for.
            drop(landing);
            drop(into);
            let intact = outcome.is_ok();
            let _ = put.send(outcome);
            intact
        });
        let task = tokio::spawn(async move {
            let mut feed = feed;
            let attach = attach(region, &mut feed, runs, all_put, upstream).await;
            match attach {
                Err(error) => drop(said.send(Err(error))),
                Ok(region) => {
                    let _ = said.send(Ok(()));
                    if let Err(reason) = rest(&mut feed, &region).await {
                        // The pull asks for what did not come.
                        tracing::debug!(reason, "a feed ended early");
                    }
                }
            }
        });
        Arrival { attached: Some(attached), task, putting }
    }

    /// Returns when the source has said what is lacking, and all else is in place. Once.
    pub(super) async fn attached(&mut self) -> Result<(), MoveError> {
        match &mut self.attached {
            Some(attached) => {
                let outcome = attached.await.unwrap_or(Err(MoveError::Closed));
                self.attached = None;
                outcome
            }
            None => Ok(()),
        }
    }

    /// Returns when the source sends no more.
    pub(super) async fn ended(&mut self) {
        let _ = (&mut self.task).await;
    }

    /// Ends it; nothing of it holds the region when this returns. Whether all that came is in place.
    pub(super) async fn cancel(self) -> bool {
        self.task.abort();
        let _ = self.task.await;
        self.putting.await.unwrap_or(false)
    }
}

async fn attach(
    region: Region,
    feed: &mut FeedReader,
    runs: mpsc::Sender<Vec<Run>>,
    all_put: oneshot::Receiver<Result<(), RegionError>>,
    upstream: Upstream,
) -> Result<WeakRegion, MoveError> {
    let mut lacking: Vec<Extent> = Vec::new();
    loop {
        let said = feed.next().await.map_err(|error| match error {
            StreamError::Ended(reason) => MoveError::Lost { reason },
            StreamError::Wire(error) => MoveError::Protocol(error.to_string()),
        });
        match said? {
            Fed::Pages(came) if lacking.is_empty() => runs.send(came).await.map_err(|_| MoveError::Closed)?,
            Fed::Lacks { extents, more } => {
                lacking.extend(extents);
                if lacking.len() as u64 > region.extent().count() {
                    return Err(MoveError::Protocol(format!("LACKS names more extents than the {} has pages", region.extent())));
                }
                if !more {
                    break;
                }
            }
            Fed::Pages(_) => return Err(MoveError::Protocol("DATA came in the middle of LACKS".into())),
            Fed::Mark(_) => return Err(MoveError::Protocol("MARK came, and nobody stands by".into())),
            Fed::End => return Err(MoveError::Protocol("END came before LACKS".into())),
        }
    }
    drop(runs);
    all_put.await.map_err(|_| MoveError::Closed)??;
    region.attach(upstream, &lacking)?;
    Ok(region.downgrade())
}

/// The program runs here.
async fn rest(feed: &mut FeedReader, region: &WeakRegion) -> Result<(), String> {
    loop {
        match feed.next().await.map_err(|error| error.to_string())? {
            Fed::Pages(runs) => {
                if !region.push_in(runs).await.map_err(|error| error.to_string())? {
                    return Ok(());
                }
                // A fault that came meanwhile goes first.
                tokio::task::yield_now().await;
            }
            Fed::End => return region.settled().await.map_err(|error| error.to_string()),
            Fed::Lacks { .. } => return Err("LACKS came twice".into()),
            Fed::Mark(_) => return Err("MARK came after LACKS".into()),
        }
    }
}
