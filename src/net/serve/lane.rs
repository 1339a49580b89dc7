//! Answers the requests of a lane.
//!
//! Role: hop *serve*: bounds, grant, read, reply. Neighbours: `serve` hands it the stream; stores give the pages. Invariants: answers have the order of the
//! requests; reads that wait for their turn to be answered are together no more than one READ may ask for, beside the last one.

use super::{
    super::{
        codec::{decode_run, encode_run},
        lane::priority,
        stream::{FrameReader, FrameWriter, StreamError},
        wire::{Access, Class, DataHead, EncodedRun, ErrorCode, Frame, MAX_READ_BYTES, WireError},
    },
    Open, Refusal, Session, failed, split, unexpected,
};
use crate::{Content, Extent, PageSize, Run, Service};
use bytes::Bytes;
use std::{
    collections::VecDeque,
    future::poll_fn,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// What a request comes to.
type Reply = Result<Answer, Refusal>;

enum Answer {
    Pages { runs: Vec<Run>, page: PageSize, took: Duration },
    Done,
}

impl Session {
    /// Serves a lane to its end. A read that the store has at hand is answered at once; those that take their time run side by side.
    pub(super) async fn lane(
        self: &Arc<Self>,
        class: Class,
        writer: &mut FrameWriter,
        reader: &mut FrameReader,
    ) -> Result<(), StreamError> {
        writer.prioritise(priority(class));
        let mut reads = Reads::default();
        loop {
            let frame = tokio::select! {
                biased;
                reply = reads.next(), if !reads.is_empty() => {
                    if !self.reply(class, reply, writer).await? {
                        return Ok(());
                    }
                    continue;
                }
                frame = reader.next(), if reads.have_room() => frame?,
            };
            let reply = match frame {
                Some(Frame::Read { region, extent }) => match self.begin(region, *extent, &mut reads).await {
                    Some(reply) => reply,
                    None => continue,
                },
                other => {
                    while !reads.is_empty() {
                        let reply = reads.next().await;
                        if !self.reply(class, reply, writer).await? {
                            return Ok(());
                        }
                    }
                    match other {
                        None => return Ok(()),
                        Some(Frame::Write { region, run }) => self.write(region, run).await,
                        Some(Frame::Flush { region }) => self.flush(region).await,
                        Some(frame) => return Err(unexpected(&frame, "a request")),
                    }
                }
            };
            if !self.reply(class, reply, writer).await? {
                return Ok(());
            }
        }
    }

    /// Begins a read; gives its reply if it is there and its turn has come.
    async fn begin(&self, region: u32, extent: Extent, reads: &mut Reads) -> Option<Reply> {
        let open = match self.region(region) {
            Ok(open) => open,
            Err(refusal) => return reads.begin(0, std::future::ready(Err(refusal)), &self.shared.service).await,
        };
        let bytes = extent.bytes(open.granted.store.page_size());
        reads.begin(bytes, read(open, extent), &self.shared.service).await
    }

    /// Sends a reply. Whether the lane goes on: not behind a request that a client of this protocol does not make.
    async fn reply(&self, class: Class, reply: Reply, writer: &mut FrameWriter) -> Result<bool, StreamError> {
        let mut goes_on = true;
        match reply {
            Ok(Answer::Done) => writer.send(&Frame::Done).await?,
            Ok(Answer::Pages { runs, page, took }) => {
                let mut serve_us = u32::try_from(took.as_micros()).unwrap_or(u32::MAX);
                for Run { extent, content } in runs.into_iter().flat_map(|run| split(run, page)) {
                    // Compressing one page costs more time than it saves on any link a fault is bearable on.
                    let (encoding, bytes) = encode_run(content, false);
                    writer.send_data([(DataHead::new(encoding, extent, serve_us, bytes.len())?, bytes)]).await?;
                    serve_us = 0;
                }
            }
            Err(Refusal(code, message)) => {
                writer.send(&failed(code, &message)).await?;
                goes_on = code != ErrorCode::BadFrame;
            }
        }
        if class == Class::Demand {
            self.demanded.note();
            // The next fault of the same thread follows an install and a few instructions.
            self.shared.service.polling().expect();
        }
        Ok(goes_on)
    }

    async fn write(&self, region: u32, run: EncodedRun) -> Reply {
        let open = self.region(region)?;
        if open.granted.access == Access::Read {
            return Err(Refusal(ErrorCode::ReadOnly, format!("region {:?} is granted for reading only", open.name)));
        }
        let store = &open.granted.store;
        store.check(run.extent())?;
        let bad = |error: WireError| Refusal(ErrorCode::BadFrame, error.to_string());
        let decoded_len = run.decoded_len(store.page_size()).map_err(bad)?;
        let bytes = match decode_run(run.encoding(), run.bytes().clone(), decoded_len).map_err(bad)? {
            Content::Zero => Bytes::from(vec![0; decoded_len]),
            Content::Bytes(bytes) => bytes,
        };
        store.write(run.extent(), &bytes).await?;
        Ok(Answer::Done)
    }

    async fn flush(&self, region: u32) -> Reply {
        let open = self.region(region)?;
        open.granted.store.flush().await?;
        Ok(Answer::Done)
    }
}

async fn read(open: Open, extent: Extent) -> Reply {
    let start = Instant::now();
    let store = &open.granted.store;
    store.check(extent)?;
    let page = store.page_size();
    if extent.bytes(page) > MAX_READ_BYTES.into() {
        let message = format!("{extent} are more than the {MAX_READ_BYTES} bytes that one READ may ask for");
        return Err(Refusal(ErrorCode::BadFrame, message));
    }
    let runs = store.read(extent).await?;
    if let Some(sent) = &open.sent {
        sent.add(extent);
    }
    Ok(Answer::Pages { runs, page, took: start.elapsed() })
}

/// What a request counts for at least, so that those that come to nothing are bounded in number too.
const COUNTED_MIN_BYTES: u64 = 4096;

/// Reads that are not answered, in the order of their requests.
#[derive(Default)]
struct Reads {
    waiting: VecDeque<(u64, Waiting)>,
    /// Of all of them.
    bytes: u64,
}

enum Waiting {
    Running(JoinHandle<Reply>),
    /// Read before others that were asked for earlier.
    Read(Reply),
}

impl Reads {
    fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether another may begin.
    fn have_room(&self) -> bool {
        self.bytes < MAX_READ_BYTES.into()
    }

    /// Begins a read of so many bytes; gives its reply if it is there and no other waits.
    async fn begin(&mut self, bytes: u64, read: impl Future<Output = Reply> + Send + 'static, service: &Service) -> Option<Reply> {
        let mut read = Box::pin(read);
        let waiting = match poll_fn(|context| Poll::Ready(read.as_mut().poll(context))).await {
            Poll::Ready(reply) if self.is_empty() => return Some(reply),
            Poll::Ready(reply) => Waiting::Read(reply),
            Poll::Pending => Waiting::Running(service.spawn(read)),
        };
        // Refused if larger.
        let bytes = bytes.clamp(COUNTED_MIN_BYTES, MAX_READ_BYTES.into());
        self.waiting.push_back((bytes, waiting));
        self.bytes += bytes;
        None
    }

    /// Waits for the reply to the first. Cancel safe.
    async fn next(&mut self) -> Reply {
        if let Some((_, Waiting::Running(read))) = self.waiting.front_mut() {
            let reply = read.await.unwrap_or_else(|_| Err(Refusal(ErrorCode::StoreFailed, "the store panicked".into())));
            let bytes = self.waiting.pop_front().map_or(0, |(bytes, _)| bytes);
            self.bytes -= bytes;
            return reply;
        }
        match self.waiting.pop_front() {
            Some((bytes, Waiting::Read(reply))) => {
                self.bytes -= bytes;
                reply
            }
            _ => std::future::pending().await,
        }
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        for (_, waiting) in &self.waiting {
            if let Waiting::Running(read) = waiting {
                read.abort();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A client that asks for what it may not have, behind a read that does not end, fills no memory; nor does the size that it names overflow anything.
    #[tokio::test]
    async fn requests_that_come_to_nothing_are_bounded_behind_a_read_that_takes_its_time() {
        let service = Service::start("test", Duration::ZERO).unwrap();
        let mut reads = Reads::default();
        assert!(reads.begin(4096, std::future::pending(), &service).await.is_none());
        let mut begun = 1;
        while reads.have_room() {
            let refused = std::future::ready(Err(Refusal(ErrorCode::NotGranted, String::new())));
            assert!(reads.begin(0, refused, &service).await.is_none());
            begun += 1;
        }
        assert_eq!(begun, u64::from(MAX_READ_BYTES) / COUNTED_MIN_BYTES);
        let refused = std::future::ready(Err(Refusal(ErrorCode::OutOfRange, String::new())));
        assert!(reads.begin(u64::MAX, refused, &service).await.is_none());
        assert!(!reads.have_room());
    }

    #[tokio::test]
    async fn replies_keep_the_order_of_their_requests() {
        let service = Service::start("test", Duration::ZERO).unwrap();
        let mut reads = Reads::default();
        let (answer, answered) = tokio::sync::oneshot::channel::<()>();
        let slow = async move {
            let _ = answered.await;
            Ok(Answer::Done)
        };
        assert!(reads.begin(0, slow, &service).await.is_none());
        let refused = std::future::ready(Err(Refusal(ErrorCode::NotGranted, String::new())));
        assert!(reads.begin(0, refused, &service).await.is_none());
        answer.send(()).unwrap();
        assert!(matches!(reads.next().await, Ok(Answer::Done)));
        assert!(reads.next().await.is_err() && reads.is_empty() && reads.bytes == 0);
        assert!(matches!(reads.begin(0, std::future::ready(Ok(Answer::Done)), &service).await, Some(Ok(Answer::Done))));
    }
}
