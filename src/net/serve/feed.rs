//! A stream on which a source sends a region's pages as it sees fit.
//!
//! Role: hop *serve* of a migration's pushes. Neighbours: `migrate` holds one for each region of an attempt and decides what goes when; `bulk` does the sending. Invariants: what
//! is said on it is heard in the order in which it was said, pages and what is lacking alike.

use super::{
    super::{
        lane::priority,
        stream::{FrameReader, FrameWriter, StreamError},
        wire::{Class, Frame, MAX_PULL_EXTENTS, PullExtents},
    },
    Refusal, Session,
    bulk::{Bulk, BulkError},
    failed,
};
use crate::{Extent, PeerId, Run};
use std::{sync::Arc, time::Duration};

/// See the module header.
pub(crate) struct Feed {
    /// Who listens, and what it is to be for.
    pub(crate) peer: PeerId,
    pub(crate) session: u128,
    pub(crate) epoch: u64,
    /// Of the region.
    pub(crate) name: Arc<str>,
    bulk: Bulk,
    writer: FrameWriter,
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed").field("peer", &self.peer).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Feed {
    /// Sends pages as they are when they are read.
    pub(crate) async fn send(&mut self, extents: Vec<Extent>) -> Result<(), StreamError> {
        let sent = self.bulk.send(extents, &mut self.writer).await;
        self.unless_refused(sent).await
    }

    /// Pages as they are now, for [`send_runs`](Feed::send_runs).
    pub(crate) async fn read(&mut self, extents: Vec<Extent>) -> Result<Vec<Run>, StreamError> {
        match self.bulk.read(extents).await {
            Ok(runs) => Ok(runs),
            Err(refusal) => Err(self.refuse(refusal).await),
        }
    }

    /// Sends pages as they were when they were read.
    pub(crate) async fn send_runs(&mut self, runs: Vec<Run>) -> Result<(), StreamError> {
        let sent = self.bulk.send_runs(runs, &mut self.writer).await;
        self.unless_refused(sent).await
    }

    /// Says that what was sent up to here belongs to a point.
    pub(crate) async fn mark(&mut self, number: u64) -> Result<(), StreamError> {
        self.writer.send(&Frame::Mark { number }).await
    }

    async fn unless_refused(&mut self, sent: Result<(), BulkError>) -> Result<(), StreamError> {
        match sent {
            Ok(()) => Ok(()),
            Err(BulkError::Stream(error)) => Err(error),
            Err(BulkError::Refused(refusal)) => Err(self.refuse(refusal).await),
        }
    }

    async fn refuse(&mut self, Refusal(code, message): Refusal) -> StreamError {
        // The reason is for the other end too; that it comes to an end there depends on nothing.
        let _ = self.writer.send(&failed(code, &message)).await;
        StreamError::Ended(message)
    }

    /// Says whose content the other end does not have. What was sent before is older than this, what is sent after it newer.
    pub(crate) async fn lacks(&mut self, extents: &[Extent]) -> Result<(), StreamError> {
        let mut parts = extents.chunks(MAX_PULL_EXTENTS as usize).peekable();
        loop {
            let part = parts.next().unwrap_or_default();
            let more = parts.peek().is_some();
            self.writer.send(&Frame::Lacks { more, extents: PullExtents::new(part.to_vec())? }).await?;
            if !more {
                return Ok(());
            }
        }
    }

    /// Bytes of content that were sent, and those of them that the other end has said to have in place.
    pub(crate) fn sent_and_used_bytes(&self) -> (u64, u64) {
        self.bulk.sent_and_used_bytes()
    }

    /// Bytes of the pages that were sent, without those that weigh nothing on the way.
    pub(crate) fn full_bytes(&self) -> u64 {
        self.bulk.full_bytes()
    }

    /// The page behind those that a fault of the other end was answered with last; `None` if no other was since that was asked.
    pub(crate) fn demanded(&self) -> Option<u64> {
        self.bulk.demanded()
    }

    /// The least that was seen on its connection.
    pub(crate) fn round_trip(&self) -> Duration {
        self.bulk.round_trip()
    }

    /// Says that nothing more comes, and waits until that has arrived.
    pub(crate) async fn end(mut self) -> Result<(), StreamError> {
        self.writer.send(&Frame::End).await?;
        self.writer.finish();
        self.writer.delivered().await;
        Ok(())
    }
}

impl Session {
    pub(super) async fn feed(
        &self,
        (session, epoch): (u128, u64),
        region: u32,
        credit_bytes: u64,
        mut writer: FrameWriter,
        reader: FrameReader,
    ) {
        writer.prioritise(priority(Class::Background));
        let name = self.region(region).map(|open| open.name);
        let begun = name.and_then(|name| Ok((name, self.bulk(region, credit_bytes, reader)?)));
        let refused = match (begun, &self.shared.extension) {
            (Ok((name, bulk)), Some(extension)) => {
                extension.feed(Feed { peer: self.peer, session, epoch, name, bulk, writer });
                return;
            }
            (Ok(_), None) => super::no_program(),
            (Err(Refusal(code, message)), _) => failed(code, &message),
        };
        let _ = writer.send(&refused).await;
        writer.finish();
        writer.delivered().await;
    }
}
