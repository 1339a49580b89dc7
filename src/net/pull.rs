//! A bulk read over a stream of its own, the client's side.
//!
//! Role: the background pull's *wire* and *reply*. Neighbours: `server` streams the runs without being asked for each; the pager installs them.
//! Invariants: what is on the way stays within the credit given, so a slow client bounds the server's memory; each page comes at most once;
//! nothing waits longer than the answer time-out.

use super::{
    codec::decode_run,
    lane::{Setting, priority},
    stream::{FrameReader, FrameWriter, Incoming, StreamError},
    wire::{Class, DataHead, Frame, PullExtents},
};
use crate::{Extent, PageSize, Pull, Run, StoreError};
use async_trait::async_trait;
use bytes::Bytes;

/// See the module header.
pub(super) struct RemotePull {
    writer: FrameWriter,
    reader: FrameReader,
    asked: Vec<Extent>,
    /// The extent that the last run belonged to, and the page behind that run.
    at: usize,
    next_page: u64,
    page: PageSize,
    setting: Setting,
    /// Received and not given yet: a dropped `next` goes on where it stopped.
    head: Option<DataHead>,
    content: Option<Bytes>,
    window: Window,
    over: bool,
}

/// Credit is renewed in steps of this many bytes: often enough that a server which keeps little more than the path holds never waits for it.
pub(super) const CREDIT_STEP_BYTES: u64 = 128 * 1024;

/// What a client lets be on the way to it.
pub(super) struct Window {
    bytes: u64,
    pub(super) used_bytes: u64,
    credited_bytes: u64,
}

impl Window {
    pub(super) fn new(bytes: u64) -> Window {
        Window { bytes, used_bytes: 0, credited_bytes: bytes }
    }

    /// Gives new credit for what was used, if it is worth a frame.
    pub(super) async fn renew(&mut self, writer: &mut FrameWriter) {
        if self.used_bytes + self.bytes >= self.credited_bytes + CREDIT_STEP_BYTES {
            self.renew_all(writer).await;
        }
    }

    /// Tells all that was used, if anything was since it was told last.
    pub(super) async fn renew_all(&mut self, writer: &mut FrameWriter) {
        if self.credited_bytes == self.used_bytes + self.bytes {
            return;
        }
        self.credited_bytes = self.used_bytes + self.bytes;
        // A server that has sent everything stops listening for credit while its last runs are still on the way; a lost
        // connection shows in the next read.
        let _ = writer.send(&Frame::Credit { total_bytes: self.credited_bytes }).await;
    }
}

impl RemotePull {
    pub(super) async fn start(
        connection: &quinn::Connection,
        region: u32,
        extents: PullExtents,
        window_bytes: u64,
        page: PageSize,
        setting: Setting,
    ) -> Result<RemotePull, StoreError> {
        let (send, receive) = connection.open_bi().await.map_err(|error| setting.away(error.to_string()))?;
        let mut writer = FrameWriter::new(send);
        writer.prioritise(priority(Class::Background));
        let asked = extents.to_vec();
        let pull = Frame::Pull { region, credit_bytes: window_bytes, extents };
        writer.send(&pull).await.map_err(|error| setting.away(error.to_string()))?;
        Ok(RemotePull {
            writer,
            reader: FrameReader::new(receive),
            asked,
            at: 0,
            next_page: 0,
            page,
            setting,
            head: None,
            content: None,
            window: Window::new(window_bytes),
            over: false,
        })
    }

    fn broken(&self, error: StreamError) -> StoreError {
        match error {
            StreamError::Ended(reason) => self.setting.away(reason),
            StreamError::Wire(error) => StoreError::Protocol(error.to_string()),
        }
    }

    /// The head of the next run, `None` at the end. Runs come in the order asked for, so the search goes on where the last one ended, and what
    /// was given already is not accepted again.
    async fn next_head(&mut self) -> Result<Option<DataHead>, StoreError> {
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
        let extent = head.extent();
        let due = |at: usize, asked: &Extent| asked.covers(extent) && (at > self.at || extent.first() >= self.next_page);
        let Some(at) = (self.at..self.asked.len()).find(|at| due(*at, &self.asked[*at])) else {
            return Err(StoreError::Protocol(format!("{extent} came in a bulk read that did not ask for them, or not then")));
        };
        (self.at, self.next_page) = (at, extent.end());
        Ok(Some(head))
    }

    async fn read(&mut self) -> Result<Option<Run>, StoreError> {
        let head = match self.head {
            Some(head) => head,
            None => match self.next_head().await? {
                Some(head) => *self.head.insert(head),
                None => return Ok(None),
            },
        };
        let decoded_len = head.decoded_len(self.page).map_err(|error| self.broken(error.into()))?;
        if self.content.is_none() {
            self.content = Some(self.reader.content(&head).await.map_err(|error| self.broken(error))?);
            self.window.used_bytes += head.len_bytes() as u64;
        }
        self.window.renew(&mut self.writer).await;
        self.head = None;
        let content = self.content.take().unwrap_or_default();
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
        let setting = self.setting.clone();
        let next = setting.within("waiting for the next pages of a bulk read", self.read()).await.and_then(|read| read);
        if !matches!(next, Ok(Some(_))) {
            self.over = true;
            self.writer.finish();
        }
        next
    }
}
