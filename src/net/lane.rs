//! A stream that carries one client's requests one behind the other.
//!
//! Role: hops *request* and *reply* on the wire's client side. Neighbours: `peer` picks a lane for each request; `server` answers at the other
//! end. Invariants: answers come in the order of requests; a request that cannot be written whole ends the lane, and every request on it
//! is answered with an error then, never left waiting.
//!
//! Why lanes and not a stream a request: opening and closing a stream costs frames and a task at the server for each fault. Several lanes keep one slow answer or
//! one lost datagram from holding up the others.

use super::{
    codec::decode_run,
    stream::{FrameReader, FrameWriter, StreamError},
    wire::{Class, Frame},
};
use crate::{Extent, Hop, Hops, PageSize, Run, Service, StoreError};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, mpsc, oneshot};

/// See the module header.
pub(super) struct Lane {
    writer: Mutex<FrameWriter>,
    waiting: mpsc::UnboundedSender<Waiting>,
    /// Requests on it that are not answered.
    load: AtomicUsize,
    ended: AtomicBool,
    hops: Arc<Hops>,
}

/// A request that was written and waits for its answer.
struct Waiting {
    /// Pages to come; none for a write or flush, which is answered by DONE.
    extent: Option<Extent>,
    page: PageSize,
    asked_at: Instant,
    written_at: Instant,
    answer: oneshot::Sender<Result<Vec<Run>, StoreError>>,
}

impl Lane {
    /// Opens a lane on a connection and starts its reader on `service`.
    pub(super) async fn open(
        connection: &quinn::Connection,
        class: Class,
        service: &Service,
        hops: Arc<Hops>,
        peer: &str,
    ) -> Result<Arc<Lane>, StoreError> {
        let away = |reason: String| StoreError::Unreachable { peer: peer.to_owned(), reason };
        let (send, receive) = connection.open_bi().await.map_err(|error| away(error.to_string()))?;
        let mut writer = FrameWriter::new(send);
        writer.prioritise(priority(class));
        writer.send(&Frame::Lane { class }).await.map_err(|error| away(error.to_string()))?;
        let (waiting, to_read) = mpsc::unbounded_channel();
        let lane =
            Arc::new(Lane { writer: Mutex::new(writer), waiting, load: AtomicUsize::new(0), ended: AtomicBool::new(false), hops });
        service.spawn(read_answers(Arc::downgrade(&lane), FrameReader::new(receive), to_read, peer.to_owned()));
        Ok(lane)
    }

    pub(super) fn load(&self) -> usize {
        self.load.load(Relaxed)
    }

    pub(super) fn ended(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Sends a request and waits for its answer. Dropping the future before the request is written whole ends the lane; after that the
    /// answer is read and dropped.
    pub(super) async fn ask(&self, request: &Frame, extent: Option<Extent>, page: PageSize) -> Result<Vec<Run>, StoreError> {
        let asked_at = Instant::now();
        let (answer, answered) = oneshot::channel();
        self.load.fetch_add(1, Relaxed);
        let _counted = Counted(&self.load);
        {
            let mut writer = self.writer.lock().await;
            let mut whole = Whole { lane: self, written: false };
            let lost = |error: StreamError| StoreError::Unreachable { peer: String::new(), reason: error.to_string() };
            writer.send(request).await.map_err(lost)?;
            whole.written = true;
            let waiting = Waiting { extent, page, asked_at, written_at: Instant::now(), answer };
            // The reader has gone: dropping the sender answers below.
            let _ = self.waiting.send(waiting);
        }
        answered
            .await
            .unwrap_or_else(|_| Err(StoreError::Unreachable { peer: String::new(), reason: "the connection was lost".into() }))
    }
}

struct Counted<'a>(&'a AtomicUsize);

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Ends the lane unless the request was written whole: half a frame would garble what follows.
struct Whole<'a> {
    lane: &'a Lane,
    written: bool,
}

impl Drop for Whole<'_> {
    fn drop(&mut self) {
        if !self.written {
            self.lane.ended.store(true, Relaxed);
        }
    }
}

/// Strictly higher goes first (quinn's stream priorities): faults before their neighbours before bulk.
pub(super) fn priority(class: Class) -> i32 {
    match class {
        Class::Background => 0,
        Class::Behind => 1,
        Class::Demand => 2,
    }
}

/// Control and handover frames go before all.
pub(super) const CONTROL_PRIORITY: i32 = 3;

async fn read_answers(
    lane: std::sync::Weak<Lane>,
    mut reader: FrameReader,
    mut to_read: mpsc::UnboundedReceiver<Waiting>,
    peer: String,
) {
    while let Some(waiting) = to_read.recv().await {
        let mut serve = Duration::ZERO;
        let mut first_byte = None;
        let result = read_answer(&mut reader, &waiting, &mut serve, &mut first_byte).await;
        let over = match &result {
            Ok(_) | Err(Broken::Answer(_)) => None,
            Err(Broken::Lane(error)) => Some(error.to_string()),
        };
        if let (Some(first_byte), Some(lane)) = (first_byte, lane.upgrade()) {
            let wire = first_byte.saturating_duration_since(waiting.written_at);
            lane.hops.hop(Hop::Request).record(waiting.written_at - waiting.asked_at);
            lane.hops.hop(Hop::Wire).record(wire.saturating_sub(serve));
            lane.hops.hop(Hop::Serve).record(serve);
            lane.hops.hop(Hop::Reply).record(first_byte.elapsed());
        }
        let answer = result.map_err(|broken| match broken {
            Broken::Answer(error) => error,
            Broken::Lane(StreamError::Wire(error)) => StoreError::Protocol(error.to_string()),
            Broken::Lane(StreamError::Ended(reason)) => StoreError::Unreachable { peer: peer.clone(), reason },
        });
        // Nobody waits any more: the request was cancelled.
        let _ = waiting.answer.send(answer);
        if let Some(reason) = over {
            if let Some(lane) = lane.upgrade() {
                lane.ended.store(true, Relaxed);
            }
            to_read.close();
            while let Ok(waiting) = to_read.try_recv() {
                let _ = waiting.answer.send(Err(StoreError::Unreachable { peer: peer.clone(), reason: reason.clone() }));
            }
            return;
        }
    }
}

enum Broken {
    /// This request failed; the next answer follows in order.
    Answer(StoreError),
    /// Nothing more can be read.
    Lane(StreamError),
}

impl From<StreamError> for Broken {
    fn from(error: StreamError) -> Broken {
        Broken::Lane(error)
    }
}

async fn read_answer(
    reader: &mut FrameReader,
    waiting: &Waiting,
    serve: &mut Duration,
    first_byte: &mut Option<Instant>,
) -> Result<Vec<Run>, Broken> {
    let unexpected = |what: String| Broken::Lane(StreamError::Ended(what));
    let mut runs = Vec::new();
    let mut next = waiting.extent.map_or(0, Extent::first);
    loop {
        let frame = reader.next().await?.ok_or_else(|| unexpected("the peer ended the stream".into()))?;
        first_byte.get_or_insert_with(Instant::now);
        match (frame, waiting.extent) {
            (Frame::Failed { code, message }, _) => return Err(Broken::Answer(super::refusal(code, &message))),
            (Frame::Done, None) => return Ok(runs),
            (Frame::Data { serve_us, run }, Some(extent)) => {
                if run.extent().first() != next || !extent.covers(run.extent()) {
                    return Err(unexpected(format!("asked for {extent}, got {}", run.extent())));
                }
                *serve += Duration::from_micros(serve_us.into());
                next = run.extent().end();
                let decoded_len = run.decoded_len(waiting.page).map_err(StreamError::from)?;
                let content = decode_run(run.encoding(), run.bytes().clone(), decoded_len).map_err(StreamError::from)?;
                runs.push(Run { extent: run.extent(), content });
                if next == extent.end() {
                    return Ok(runs);
                }
            }
            (other, _) => return Err(unexpected(format!("{} came where an answer is expected", other.kind().name()))),
        }
    }
}
