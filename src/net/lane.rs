//! A stream that carries one client's requests one behind the other.
//!
//! Role: hops *request* and *reply* on the wire's client side. Neighbours: `peer` picks a lane for each request; `server` answers at the other
//! end. Invariants: answers come in the order of requests; every request is answered, with an error if nothing comes for the answer time-out, never left waiting
//! (S3); two tasks of the lane's own read and write, so a caller that is cancelled, or that stops polling and stays, leaves no half frame and holds no lock.
//!
//! Why lanes and not a stream a request: opening and closing a stream costs frames and a task at the server for each fault. Several lanes keep one slow answer or
//! one lost datagram from holding up the others. Requests that are made together share a lane: one frame of QUIC, one datagram and one turn of each task instead of one each.

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
use tokio::sync::{mpsc, oneshot};

/// See the module header.
pub(super) struct Lane {
    requests: mpsc::UnboundedSender<Request>,
    state: Arc<State>,
}

/// What a lane's tasks tell whoever picks one.
#[derive(Default)]
struct State {
    /// Requests that are not answered, those that were cancelled included: their answers come all the same.
    load: AtomicUsize,
    /// Requests that wait to be written.
    unwritten: AtomicUsize,
    ended: AtomicBool,
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

/// A request on its way to the stream.
struct Request {
    frame: Frame,
    waiting: Waiting,
}

/// A request that waits for its answer.
struct Waiting {
    /// Pages to come; none for a write or flush, which is answered by DONE.
    extent: Option<Extent>,
    page: PageSize,
    /// It has no time-out but the connection's.
    may_take_long: bool,
    asked_at: Instant,
    written_at: Instant,
    /// Dropped unanswered: the request was not written.
    answer: oneshot::Sender<Result<Vec<Run>, StoreError>>,
    _counted: Counted,
}

struct Counted(Arc<State>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.load.fetch_sub(1, Relaxed);
    }
}

impl Lane {
    /// Opens a lane on a connection, on the service; requests may be made at once.
    pub(super) fn open(connection: &quinn::Connection, class: Class, setting: Setting) -> Lane {
        let (requests, to_write) = mpsc::unbounded_channel();
        let state = Arc::<State>::default();
        setting.service.clone().spawn(carry(connection.clone(), class, to_write, state.clone(), setting));
        Lane { requests, state }
    }

    pub(super) fn load(&self) -> usize {
        self.state.load.load(Relaxed)
    }

    pub(super) fn unwritten(&self) -> usize {
        self.state.unwritten.load(Relaxed)
    }

    pub(super) fn ended(&self) -> bool {
        self.state.ended.load(Relaxed)
    }

    /// Sends a request. The future returned waits for its answer and needs the lane no more; it gives `None` if nothing of the request was written, so that another
    /// lane may take it. Dropping it leaves the answer to be read and thrown away.
    pub(super) fn ask(
        &self,
        frame: Frame,
        extent: Option<Extent>,
        page: PageSize,
    ) -> impl Future<Output = Option<Result<Vec<Run>, StoreError>>> + use<> {
        let (answer, answered) = oneshot::channel();
        let now = Instant::now();
        self.state.load.fetch_add(1, Relaxed);
        self.state.unwritten.fetch_add(1, Relaxed);
        let may_take_long = matches!(frame, Frame::Flush { .. });
        let counted = Counted(self.state.clone());
        let waiting = Waiting { extent, page, may_take_long, asked_at: now, written_at: now, answer, _counted: counted };
        // A lane that has ended drops it, and so says that it was not written.
        let _ = self.requests.send(Request { frame, waiting });
        async { answered.await.ok() }
    }
}

/// No request joins others that are so long together: what is written at once has one time-out.
const WRITTEN_TOGETHER_BYTES: usize = 64 * 1024;

/// Writes requests until the lane is dropped or its stream ends.
async fn carry(
    connection: quinn::Connection,
    class: Class,
    mut to_write: mpsc::UnboundedReceiver<Request>,
    state: Arc<State>,
    setting: Setting,
) {
    let _ended = Ended(state.clone());
    let limit = setting.answer_timeout;
    let (send, receive) = match tokio::time::timeout(limit, connection.open_bi()).await {
        Ok(Ok(stream)) => stream,
        // What waits here is asked for anew, and learns from the connection what became of it.
        Ok(Err(_)) => return,
        // Streams that the peer never answered have used up what it allows: only a new connection has more.
        Err(_) => return connection.close(0u32.into(), b"no stream"),
    };
    let mut writer = FrameWriter::new(send);
    writer.prioritise(priority(class));
    let (written, to_read) = mpsc::unbounded_channel();
    tokio::spawn(read_answers(state.clone(), FrameReader::new(receive), to_read, setting.clone()));
    writer.queue(&Frame::Lane { class });
    while let Some(first) = to_write.recv().await {
        let mut next = Some(first);
        while let Some(Request { frame, mut waiting }) = next {
            state.unwritten.fetch_sub(1, Relaxed);
            if !waiting.answer.is_closed() {
                writer.queue(&frame);
                waiting.written_at = Instant::now();
                // The reader has gone, or goes when the stream does.
                let _ = written.send(waiting);
            }
            next = if writer.queued_len() < WRITTEN_TOGETHER_BYTES { to_write.try_recv().ok() } else { None };
        }
        // On failure the reader answers what was handed to it: its end of the stream fails too, or has as little time.
        if !matches!(tokio::time::timeout(limit, writer.flush()).await, Ok(Ok(()))) {
            return;
        }
    }
}

struct Ended(Arc<State>);

impl Drop for Ended {
    fn drop(&mut self) {
        self.0.ended.store(true, Relaxed);
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

/// Reads answers until the lane is dropped and all are read, or its stream ends.
async fn read_answers(state: Arc<State>, mut reader: FrameReader, mut to_read: mpsc::UnboundedReceiver<Waiting>, setting: Setting) {
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
        if over.is_some() {
            state.ended.store(true, Relaxed);
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
