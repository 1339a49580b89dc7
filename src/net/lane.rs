//! A stream that carries one client's requests one behind the other.
//!
//! Role: hops *request* and *reply* on the wire's client side. Neighbours: `peer` picks a lane for each request; `server` answers at the other
//! end. Invariants: answers come in the order of requests; a request that was not written whole ends the lane, and nothing is written behind it;
//! every request is answered, with an error if nothing comes for the answer time-out, never left waiting (S3).
//!
//! Why lanes and not a stream a request: opening and closing a stream costs frames and a task at the server for each fault. Several lanes keep one slow answer or
//! one lost datagram from holding up the others.

use super::{
    codec::decode_run,
    stream::{FrameReader, FrameWriter, StreamError},
    transport::within,
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
    setting: Setting,
}

/// What a lane has in common with the others of its peer.
#[derive(Clone)]
pub(super) struct Setting {
    pub(super) service: Service,
    pub(super) hops: Arc<Hops>,
    /// The peer's name in errors.
    pub(super) peer: Arc<str>,
    pub(super) answer_timeout: Duration,
}

impl Setting {
    pub(super) fn away(&self, reason: impl Into<String>) -> StoreError {
        StoreError::Unreachable { peer: self.peer.to_string(), reason: reason.into() }
    }

    /// Waits for `work` no longer than for an answer; `doing` says in the error what took too long.
    pub(super) async fn within<T>(&self, doing: &str, work: impl Future<Output = T>) -> Result<T, StoreError> {
        let limit = self.answer_timeout;
        within(&self.service, limit, work).await.ok_or_else(|| self.away(format!("{doing} took longer than {limit:?}")))
    }
}

/// A request that was written and waits for its answer.
struct Waiting {
    /// Pages to come; none for a write or flush, which is answered by DONE.
    extent: Option<Extent>,
    page: PageSize,
    /// It has no time-out but the connection's.
    may_take_long: bool,
    asked_at: Instant,
    written_at: Instant,
    answer: oneshot::Sender<Result<Vec<Run>, StoreError>>,
}

impl Lane {
    /// Opens a lane on a connection and starts its reader on the service.
    pub(super) async fn open(connection: &quinn::Connection, class: Class, setting: Setting) -> Result<Arc<Lane>, StoreError> {
        let (send, receive) = connection.open_bi().await.map_err(|error| setting.away(error.to_string()))?;
        let mut writer = FrameWriter::new(send);
        writer.prioritise(priority(class));
        writer.send(&Frame::Lane { class }).await.map_err(|error| setting.away(error.to_string()))?;
        let (waiting, to_read) = mpsc::unbounded_channel();
        let (load, ended) = (AtomicUsize::new(0), AtomicBool::new(false));
        let lane = Arc::new(Lane { writer: Mutex::new(writer), waiting, load, ended, setting: setting.clone() });
        let reader = FrameReader::new(receive);
        setting.service.clone().spawn(read_answers(Arc::downgrade(&lane), reader, to_read, setting));
        Ok(lane)
    }

    pub(super) fn load(&self) -> usize {
        self.load.load(Relaxed)
    }

    pub(super) fn ended(&self) -> bool {
        self.ended.load(Relaxed)
    }

    /// Sends a request and waits for its answer; `None` if the lane ended before anything of it was written, so that another may take it.
    ///
    /// Dropping the future before the request is written whole ends the lane; after that the answer is read and dropped.
    pub(super) async fn ask(
        &self,
        request: &Frame,
        extent: Option<Extent>,
        page: PageSize,
    ) -> Option<Result<Vec<Run>, StoreError>> {
        let asked_at = Instant::now();
        let (answer, answered) = oneshot::channel();
        self.load.fetch_add(1, Relaxed);
        let _counted = Counted(&self.load);
        {
            let mut writer = self.writer.lock().await;
            // Whoever had the lane before may have left half a frame behind.
            if self.ended() {
                return None;
            }
            let mut whole = Whole { lane: self, written: false };
            let sent = self.setting.within("sending a request", writer.send(request)).await;
            if let Err(error) = sent.and_then(|sent| sent.map_err(|error| self.setting.away(error.to_string()))) {
                return Some(Err(error));
            }
            whole.written = true;
            let may_take_long = matches!(request, Frame::Flush { .. });
            let waiting = Waiting { extent, page, may_take_long, asked_at, written_at: Instant::now(), answer };
            // The reader has gone: dropping the sender answers below.
            let _ = self.waiting.send(waiting);
        }
        Some(answered.await.unwrap_or_else(|_| Err(self.setting.away("the connection was lost"))))
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
    setting: Setting,
) {
    while let Some(waiting) = to_read.recv().await {
        let mut serve = Duration::ZERO;
        let mut first_byte = None;
        let result = read_answer(&mut reader, &waiting, setting.answer_timeout, &mut serve, &mut first_byte).await;
        if let Some(first_byte) = first_byte {
            let wire = first_byte.saturating_duration_since(waiting.written_at);
            setting.hops.hop(Hop::Request).record(waiting.written_at - waiting.asked_at);
            setting.hops.hop(Hop::Wire).record(wire.saturating_sub(serve));
            setting.hops.hop(Hop::Serve).record(serve);
            setting.hops.hop(Hop::Reply).record(first_byte.elapsed());
        }
        let (answer, over) = match result {
            Ok(runs) => (Ok(runs), None),
            Err(Broken::Answer(error)) => (Err(error), None),
            Err(Broken::Lane(StreamError::Ended(reason))) => (Err(setting.away(reason.clone())), Some(reason)),
            Err(Broken::Lane(StreamError::Wire(error))) => (Err(StoreError::Protocol(error.to_string())), Some(error.to_string())),
            Err(Broken::Wrong(what)) => (Err(StoreError::Protocol(what.clone())), Some(what)),
            Err(Broken::Late) => {
                let reason = format!("no answer for {:?} on a connection that is alive", setting.answer_timeout);
                (Err(setting.away(reason.clone())), Some(reason))
            }
        };
        if over.is_some()
            && let Some(lane) = lane.upgrade()
        {
            lane.ended.store(true, Relaxed);
        }
        // Nobody waits any more: the request was cancelled.
        let _ = waiting.answer.send(answer);
        if let Some(reason) = over {
            to_read.close();
            while let Ok(waiting) = to_read.try_recv() {
                let _ = waiting.answer.send(Err(setting.away(reason.clone())));
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
    /// A frame that is well formed and no answer to the request.
    Wrong(String),
    /// Nothing came for the answer time-out.
    Late,
}

impl From<StreamError> for Broken {
    fn from(error: StreamError) -> Broken {
        Broken::Lane(error)
    }
}

async fn read_answer(
    reader: &mut FrameReader,
    waiting: &Waiting,
    answer_timeout: Duration,
    serve: &mut Duration,
    first_byte: &mut Option<Instant>,
) -> Result<Vec<Run>, Broken> {
    let mut runs = Vec::new();
    let mut next = waiting.extent.map_or(0, Extent::first);
    loop {
        let frame = if waiting.may_take_long {
            reader.next().await?
        } else {
            tokio::time::timeout(answer_timeout, reader.next()).await.map_err(|_| Broken::Late)??
        };
        let frame = frame.ok_or_else(|| StreamError::Ended("the peer ended the stream".into()))?;
        first_byte.get_or_insert_with(Instant::now);
        match (frame, waiting.extent) {
            (Frame::Failed { code, message }, _) => return Err(Broken::Answer(super::refusal(code, &message))),
            (Frame::Done, None) => return Ok(runs),
            (Frame::Data { serve_us, run }, Some(extent)) => {
                if run.extent().first() != next || !extent.covers(run.extent()) {
                    return Err(Broken::Wrong(format!("asked for {extent}, got {} where page {next} is due", run.extent())));
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
            (other, _) => return Err(Broken::Wrong(format!("{} came where an answer is expected", other.kind().name()))),
        }
    }
}
