//! Pages that a source sends as it sees fit, the destination's side.
//!
//! Role: hops *wire* and *reply* of a migration's pushes. Neighbours: `serve::feed` is the other end; `migrate` puts the pages in place. Invariants: what is on the way
//! stays within the credit given; what is credited was given before; an extent outside the region breaks the protocol (S7).

use super::{
    RemoteStore, StreamError,
    codec::decode_run,
    lane::priority,
    pull::Window,
    stream::{FrameReader, FrameWriter, Incoming},
    wire::{Class, DataHead, Frame, WireError},
};
use crate::{Extent, NetError, PageSize, PageStore, Run};
use std::{
    future::poll_fn,
    pin::{Pin, pin},
    task::Poll,
    time::Duration,
};

/// See the module header.
pub(crate) struct FeedReader {
    writer: FrameWriter,
    reader: FrameReader,
    within: Extent,
    page: PageSize,
    /// Received and not given yet: a dropped `next` goes on where it stopped.
    head: Option<DataHead>,
    /// Came behind runs that were given.
    behind: Option<Result<Said, StreamError>>,
    window: Window,
}

enum Said {
    Run(Run),
    Else(Fed),
}

/// Runs are given together up to about this many bytes: handing one over to the thread that puts it in place costs as much as putting a few pages in place.
const TOGETHER_BYTES: usize = 64 * 1024;
/// A run of zeros has no bytes, and takes time to put in place.
const TOGETHER_RUNS: usize = 64;

/// Longer than the gaps in a stream that is under way.
const QUIET: Duration = Duration::from_millis(2);

/// What a source says on a feed.
#[derive(Debug)]
pub(crate) enum Fed {
    /// One run, and small ones that were here behind it.
    Pages(Vec<Run>),
    /// Older content of these pages means nothing; `more` of them follow.
    Lacks { extents: Vec<Extent>, more: bool },
    /// What came before belongs to that point.
    Mark(u64),
    /// All has been sent.
    End,
}

impl FeedReader {
    /// Listens for the pages of a region.
    pub(crate) async fn start(store: &RemoteStore, session: u128, epoch: u64) -> Result<FeedReader, NetError> {
        let (within, page) = (store.extent(), store.page_size());
        let (mut writer, reader, region, window_bytes) = store.stream().await?;
        writer.prioritise(priority(Class::Background));
        let feed = Frame::Feed { session, epoch, region, credit_bytes: window_bytes };
        writer.send(&feed).await.map_err(|error| NetError::Protocol(error.to_string()))?;
        Ok(FeedReader { writer, reader, within, page, head: None, behind: None, window: Window::new(window_bytes) })
    }

    /// The next that the source says. What it gave before counts as in place.
    pub(crate) async fn next(&mut self) -> Result<Fed, StreamError> {
        self.window.renew(&mut self.writer).await;
        let said = match self.behind.take() {
            Some(said) => said,
            None => self.said(true).await,
        };
        let first = match said? {
            Said::Else(fed) => return Ok(fed),
            Said::Run(run) => run,
        };
        let mut bytes = self.page.len() + first.content_bytes();
        let mut runs = vec![first];
        while bytes < TOGETHER_BYTES && runs.len() < TOGETHER_RUNS {
            let next = at_once(pin!(self.said(false))).await;
            match next {
                Some(Ok(Said::Run(run))) => {
                    bytes += run.content_bytes();
                    runs.push(run);
                }
                Some(other) => {
                    self.behind = Some(other);
                    break;
                }
                None => break,
            }
        }
        Ok(Fed::Pages(runs))
    }

    async fn said(&mut self, waits: bool) -> Result<Said, StreamError> {
        let head = match self.head {
            Some(head) => head,
            None => match if waits { self.incoming().await? } else { self.reader.incoming().await? } {
                Some(Incoming::Data(head)) => *self.head.insert(self.inside(head.extent()).map(|_| head)?),
                Some(Incoming::Frame(Frame::Lacks { more, extents })) => {
                    let extents = extents.iter().map(|extent| self.inside(*extent)).collect::<Result<_, _>>()?;
                    return Ok(Said::Else(Fed::Lacks { extents, more }));
                }
                Some(Incoming::Frame(Frame::Mark { number })) => return Ok(Said::Else(Fed::Mark(number))),
                Some(Incoming::Frame(Frame::End)) => {
                    self.writer.finish();
                    return Ok(Said::Else(Fed::End));
                }
                Some(Incoming::Frame(Frame::Failed { message, .. })) => return Err(StreamError::Ended(message.to_string())),
                Some(Incoming::Frame(other)) => {
                    return Err(WireError::Unexpected { found: other.kind().name(), expected: "DATA, LACKS, MARK or END" }.into());
                }
                None => return Err(StreamError::Ended("the source left the feed".into())),
            },
        };
        let decoded_len = head.decoded_len(self.page)?;
        let content = self.reader.content(&head).await?;
        self.window.used_bytes += head.len_bytes() as u64;
        self.head = None;
        Ok(Said::Run(Run { extent: head.extent(), content: decode_run(head.encoding(), content, decoded_len)? }))
    }

    /// When nothing comes for a while, the source is told of everything that came: it measures the path by that.
    async fn incoming(&mut self) -> Result<Option<Incoming>, StreamError> {
        if let Ok(incoming) = tokio::time::timeout(QUIET, self.reader.incoming()).await {
            return incoming;
        }
        self.window.renew_all(&mut self.writer).await;
        self.reader.incoming().await
    }

    fn inside(&self, extent: Extent) -> Result<Extent, StreamError> {
        if self.within.covers(extent) {
            Ok(extent)
        } else {
            let (found, max) = (extent.end(), self.within.end());
            Err(WireError::OutOfRange { frame: "DATA or LACKS", field: "end of the extent in pages", found, min: 0, max }.into())
        }
    }
}

/// What a future gives without waiting.
async fn at_once<F: Future>(mut future: Pin<&mut F>) -> Option<F::Output> {
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending => Poll::Ready(None),
    })
    .await
}
