//! Frames on a QUIC stream.
//!
//! Role: between `wire` (pure) and quinn. Neighbours: `server`, `lane`, `pull` and the handover read and write frames here. Invariants: a header is checked before
//! its payload is read or memory for it taken (S7); a reader that was cancelled goes on where it stopped.

use super::wire::{DATA_FIELDS_BYTES, DataHead, Frame, HEADER_BYTES, Header, Kind, WireError};
use bytes::{Buf, Bytes, BytesMut};
use quinn::{ReadError, RecvStream, SendStream, WriteError};
use std::collections::VecDeque;
use thiserror::Error;

/// A stream can say no more.
#[derive(Clone, Debug, Error)]
pub(crate) enum StreamError {
    /// The connection or the stream ended.
    #[error("{0}")]
    Ended(String),
    /// What came is no frame.
    #[error(transparent)]
    Wire(#[from] WireError),
}

impl From<WriteError> for StreamError {
    fn from(error: WriteError) -> StreamError {
        StreamError::Ended(match error {
            WriteError::ConnectionLost(why) => why.to_string(),
            other => other.to_string(),
        })
    }
}

impl From<ReadError> for StreamError {
    fn from(error: ReadError) -> StreamError {
        StreamError::Ended(match error {
            ReadError::ConnectionLost(why) => why.to_string(),
            other => other.to_string(),
        })
    }
}

/// A frame, or the head of one whose content is read apart.
#[derive(Debug)]
pub(crate) enum Incoming {
    Frame(Frame),
    /// DATA: `FrameReader::content` is to be called next.
    Data(DataHead),
}

/// Pieces from here on are worth keeping their memory for: the allocator would give it back to the kernel and fault it in again.
const LARGE_BYTES: usize = 32 * 1024;
/// Pieces a consumer may hold while the next is read.
const SPARE_MAX: usize = 6;

/// Chunks taken from quinn under one lock of the connection.
const CHUNKS: usize = 32;

/// The receiving half.
pub(crate) struct FrameReader {
    stream: RecvStream,
    /// Received and not yet used: `queue[at..]`.
    queue: [Bytes; CHUNKS],
    at: usize,
    filled: usize,
    /// A piece being put together from several chunks.
    staging: BytesMut,
    /// Memory of earlier pieces, oldest first: used again once they were dropped.
    spare: VecDeque<BytesMut>,
    /// A header read whose payload is not complete.
    header: Option<Header>,
}

impl FrameReader {
    pub(crate) fn new(stream: RecvStream) -> FrameReader {
        let queue = [const { Bytes::new() }; CHUNKS];
        FrameReader { stream, queue, at: 0, filled: 0, staging: BytesMut::new(), spare: VecDeque::new(), header: None }
    }

    /// The next frame, `None` at the orderly end of the stream.
    pub(crate) async fn next(&mut self) -> Result<Option<Frame>, StreamError> {
        match self.incoming().await? {
            None => Ok(None),
            Some(Incoming::Frame(frame)) => Ok(Some(frame)),
            Some(Incoming::Data(head)) => {
                let content = self.content(&head).await?;
                Ok(Some(Frame::Data { serve_us: head.serve_us(), run: head.with_content(content)? }))
            }
        }
    }

    /// As [`next`](FrameReader::next), leaving the content of DATA to [`content`](FrameReader::content).
    pub(crate) async fn incoming(&mut self) -> Result<Option<Incoming>, StreamError> {
        let header = match self.header {
            Some(header) => header,
            None => {
                if !self.have(HEADER_BYTES as usize, true).await? {
                    return Ok(None);
                }
                let mut bytes = [0; HEADER_BYTES as usize];
                bytes.copy_from_slice(&self.take(HEADER_BYTES as usize));
                *self.header.insert(Header::decode(&bytes)?)
            }
        };
        if header.kind() == Kind::Data {
            self.have(DATA_FIELDS_BYTES, false).await?;
            let mut fields = [0; DATA_FIELDS_BYTES];
            fields.copy_from_slice(&self.take(DATA_FIELDS_BYTES));
            self.header = None;
            return Ok(Some(Incoming::Data(DataHead::decode(header, &fields)?)));
        }
        let length = header.length() as usize;
        self.have(length, false).await?;
        let payload = self.take(length);
        self.header = None;
        Ok(Some(Incoming::Frame(Frame::decode(header, payload)?)))
    }

    /// The content of a DATA frame whose head was read. Drop the bytes before a few more are read, and no memory is taken for them.
    pub(crate) async fn content(&mut self, head: &DataHead) -> Result<Bytes, StreamError> {
        self.have(head.len_bytes(), false).await?;
        Ok(self.take(head.len_bytes()))
    }

    fn chunk(&mut self) -> &mut Bytes {
        &mut self.queue[self.at]
    }

    /// Waits until `len` bytes can be [taken](FrameReader::take). `false` if the stream ended before the first of them and
    /// `may_end`. Cancel safe: bytes read stay in `staging` or the queue.
    async fn have(&mut self, len: usize, may_end: bool) -> Result<bool, StreamError> {
        // The common case: one chunk holds it all, and nothing is copied.
        while self.staging.is_empty() && self.at < self.filled && self.queue[self.at].is_empty() {
            self.at += 1;
        }
        if self.staging.is_empty() && self.at < self.filled && self.queue[self.at].len() >= len {
            return Ok(true);
        }
        if self.staging.is_empty() {
            if len >= LARGE_BYTES && self.spare.len() >= SPARE_MAX {
                self.staging = self.spare.pop_front().unwrap_or_default();
            }
            self.staging.reserve(len);
        }
        while self.staging.len() < len {
            if self.at >= self.filled {
                (self.at, self.filled) = (0, 0);
                let Some(filled) = self.stream.read_chunks(&mut self.queue).await? else {
                    if self.staging.is_empty() && may_end {
                        return Ok(false);
                    }
                    let got = self.staging.len();
                    return Err(StreamError::Ended(format!("the stream ended {got} bytes into a piece of {len}")));
                };
                self.filled = filled;
                // A whole piece in the first chunk of a fresh read needs no copy either.
                if self.staging.is_empty() && self.queue[0].len() >= len {
                    return Ok(true);
                }
            }
            let wanted = len - self.staging.len();
            let chunk = self.chunk();
            let piece = chunk.split_to(wanted.min(chunk.len()));
            if chunk.is_empty() {
                self.at += 1;
            }
            self.staging.extend_from_slice(&piece);
        }
        Ok(true)
    }

    /// Takes bytes that [`have`](FrameReader::have) has waited for.
    fn take(&mut self, len: usize) -> Bytes {
        if len == 0 {
            return Bytes::new();
        }
        if self.staging.is_empty() {
            return self.chunk().split_to(len);
        }
        let piece = self.staging.split_to(len).freeze();
        if len >= LARGE_BYTES {
            self.spare.push_back(std::mem::take(&mut self.staging));
        }
        piece
    }
}

/// The sending half.
pub(crate) struct FrameWriter {
    stream: SendStream,
    buffer: BytesMut,
}

impl FrameWriter {
    pub(crate) fn new(stream: SendStream) -> FrameWriter {
        FrameWriter { stream, buffer: BytesMut::new() }
    }

    /// Sends a frame. Cancelled in the middle, the rest of it goes before the next frame.
    pub(crate) async fn send(&mut self, frame: &Frame) -> Result<(), StreamError> {
        self.queue(frame);
        self.flush().await
    }

    /// Puts a frame behind others that go with the next [`flush`](FrameWriter::flush).
    pub(crate) fn queue(&mut self, frame: &Frame) {
        frame.encode(&mut self.buffer);
    }

    /// Bytes that wait for [`flush`](FrameWriter::flush).
    pub(crate) fn queued_len(&self) -> usize {
        self.buffer.len()
    }

    /// Sends what was queued.
    pub(crate) async fn flush(&mut self) -> Result<(), StreamError> {
        while !self.buffer.is_empty() {
            let written = self.stream.write(&self.buffer).await?;
            self.buffer.advance(written);
        }
        Ok(())
    }

    /// Sends DATA frames without copying their content. Cancelled in the middle, the stream is of no more use.
    pub(crate) async fn send_data(&mut self, frames: impl IntoIterator<Item = (DataHead, Bytes)>) -> Result<(), StreamError> {
        let mut chunks = Vec::new();
        for (head, content) in frames {
            chunks.push(Bytes::copy_from_slice(&super::wire::encode_data_head(head)));
            if !content.is_empty() {
                chunks.push(content);
            }
        }
        Ok(self.stream.write_all_chunks(&mut chunks).await?)
    }

    /// Says that nothing more comes.
    pub(crate) fn finish(&mut self) {
        // Fails only if the stream is closed already.
        let _ = self.stream.finish();
    }

    /// Waits until the peer has everything, or the connection is lost.
    pub(crate) async fn delivered(&mut self) {
        let _ = self.stream.stopped().await;
    }

    pub(crate) fn prioritise(&self, priority: i32) {
        let _ = self.stream.set_priority(priority);
    }
}
