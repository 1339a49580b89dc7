//! A bulk read over a stream of its own, the client's side.
//!
//! Role: the background pull's *wire* and *reply*. Neighbours: `server` streams the runs without being asked for each; the pager installs them.
//! Invariants: what is on the way stays within the credit given, so a slow client bounds the server's memory; each page comes at most once.

use super::{
    codec::decode_run,
    lane::priority,
    stream::{FrameReader, FrameWriter, Incoming, StreamError},
    wire::{Class, Frame, PullExtents},
};
use crate::{Extent, PageSize, Pull, Run, StoreError};
use async_trait::async_trait;

/// See the module header.
pub(super) struct RemotePull {
    writer: FrameWriter,
    reader: FrameReader,
    asked: Vec<Extent>,
    /// The extent that the last run belonged to.
    at: usize,
    page: PageSize,
    peer: String,
    window_bytes: u64,
    used_bytes: u64,
    credited_bytes: u64,
    over: bool,
}

/// Credit is renewed in steps of this many bytes: often enough that a server which keeps little more than the path holds never waits for it.
const CREDIT_STEP_BYTES: u64 = 256 * 1024;

impl RemotePull {
    pub(super) async fn start(
        send: quinn::SendStream,
        receive: quinn::RecvStream,
        region: u32,
        extents: PullExtents,
        window_bytes: u64,
        page: PageSize,
        peer: &str,
    ) -> Result<RemotePull, StoreError> {
        let mut writer = FrameWriter::new(send);
        writer.prioritise(priority(Class::Background));
        let asked = extents.to_vec();
        let lost = |error: StreamError| StoreError::Unreachable { peer: peer.to_owned(), reason: error.to_string() };
        writer.send(&Frame::Pull { region, credit_bytes: window_bytes, extents }).await.map_err(lost)?;
        let (peer, reader) = (peer.to_owned(), FrameReader::new(receive));
        Ok(RemotePull {
            writer,
            reader,
            asked,
            at: 0,
            page,
            peer,
            window_bytes,
            used_bytes: 0,
            credited_bytes: window_bytes,
            over: false,
        })
    }

    fn broken(&self, error: StreamError) -> StoreError {
        match error {
            StreamError::Ended(reason) => StoreError::Unreachable { peer: self.peer.clone(), reason },
            StreamError::Wire(error) => StoreError::Protocol(error.to_string()),
        }
    }

    async fn read(&mut self) -> Result<Option<Run>, StoreError> {
        let incoming = self.reader.incoming().await.map_err(|error| self.broken(error))?;
        let head = match incoming {
            Some(Incoming::Data(head)) => head,
            Some(Incoming::Frame(Frame::End)) => return Ok(None),
            Some(Incoming::Frame(Frame::Failed { code, message })) => return Err(super::refusal(code, &message)),
            Some(Incoming::Frame(other)) => {
                return Err(StoreError::Protocol(format!("{} came in a bulk read", other.kind().name())));
            }
            None => return Err(self.broken(StreamError::Ended("the peer ended the bulk read too early".into()))),
        };
        // Runs come in the order asked for, so the search goes on where the last one ended.
        let (before, after) = self.asked.split_at(self.at);
        let Some(steps) = after.iter().chain(before).position(|asked| asked.covers(head.extent())) else {
            return Err(StoreError::Protocol(format!("{} came in a bulk read that did not ask for them", head.extent())));
        };
        self.at = (self.at + steps) % self.asked.len();
        let decoded_len = head.decoded_len(self.page).map_err(|error| self.broken(error.into()))?;
        let content = self.reader.content(&head).await.map_err(|error| self.broken(error))?;
        self.used_bytes += head.len_bytes() as u64;
        if self.used_bytes + self.window_bytes >= self.credited_bytes + CREDIT_STEP_BYTES {
            self.credited_bytes = self.used_bytes + self.window_bytes;
            // A server that has sent everything stops listening for credit while its last runs are still on the way; a lost
            // connection shows in the next read.
            let _ = self.writer.send(&Frame::Credit { total_bytes: self.credited_bytes }).await;
        }
        let content = decode_run(head.encoding(), content, decoded_len).map_err(|error| self.broken(error.into()))?;
        Ok(Some(Run { extent: head.extent(), content }))
    }
}

#[async_trait]
impl Pull for RemotePull {
    async fn next(&mut self) -> Result<Option<Run>, StoreError> {
        if self.over {
            return Ok(None);
        }
        let next = self.read().await;
        if !matches!(next, Ok(Some(_))) {
            self.over = true;
            self.writer.finish();
        }
        next
    }
}
