//! Answers the requests of one connection.
//!
//! Role: hop *serve*: decode, bounds, read, reply. Neighbours: `server` accepts the streams; stores give the pages. Invariants: S7: lengths are bounded before
//! memory is taken, extents are checked against the region, a frame that breaks the protocol closes the connection; a page sent because it was
//! demanded is left out of a bulk read that has yet to reach it.

use super::{
    codec::{decode_run, encode_run, kinds_of},
    identity::PeerId,
    lane::{CONTROL_PRIORITY, priority},
    peer::{AGENT, VERSION},
    pull::CREDIT_STEP_BYTES,
    server::{CLOSE_BAD_FRAME, Granted, Shared, TakeStream},
    stream::{FrameReader, FrameWriter, StreamError},
    wire::{Access, Agent, Class, DataHead, EncodedRun, ErrorCode, Frame, MAX_READ_BYTES, MAX_RUN_BYTES, Message, WireError},
};
use crate::{Content, Extent, PULL_EXTENT_BYTES, PageSize, PageStore, Run, StoreError};
use bytes::Bytes;
use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// One connection's state at the server.
pub(super) struct Session {
    peer: PeerId,
    connection: quinn::Connection,
    shared: Arc<Shared>,
    /// Number minus one -> what was opened under it.
    regions: Mutex<Vec<Open>>,
    demanded: Arc<Demanded>,
}

/// When a fault was last answered.
struct Demanded {
    start: Instant,
    last_us: AtomicU64,
}

impl Demanded {
    fn now_us(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn note(&self) {
        self.last_us.store(self.now_us(), Relaxed);
    }

    /// Whether a thread at the other end is likely to be waiting for the next.
    fn recently(&self) -> bool {
        let last_us = self.last_us.load(Relaxed);
        last_us > 0 && self.now_us().saturating_sub(last_us) < DEMANDED_US
    }
}

/// A program that faults goes on faulting: it is missing its working set.
const DEMANDED_US: u64 = 5_000;

#[derive(Clone)]
struct Open {
    name: String,
    granted: Granted,
    /// Pages sent on demand since a bulk read began; none before one began.
    sent: Option<Arc<Sent>>,
}

/// Regions a connection may open.
const REGIONS_MAX: usize = 4096;
/// A bulk read keeps at least this much on the way, and more by what the path is seen to hold. Not by much more: what is ahead sits in this process's send buffer,
/// where quinn looks for each packet's bytes from the front, and by then out of the cache.
const PULL_AHEAD_MIN_BYTES: u64 = 2 << 20;
/// The same while threads fault: one run, and what a client may have used without saying so yet.
const PULL_AHEAD_DEMANDED_BYTES: u64 = PULL_EXTENT_BYTES + CREDIT_STEP_BYTES;

/// Pages, as words of 64 bits by number: memory follows from what was sent, not from how large the store says it is.
#[derive(Default)]
struct Sent(Mutex<HashMap<u64, u64>>);

impl Sent {
    fn words(&self) -> std::sync::MutexGuard<'_, HashMap<u64, u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, extent: Extent) {
        let mut words = self.words();
        for page in extent.pages() {
            *words.entry(page / 64).or_default() |= 1 << (page % 64);
        }
    }

    fn holds_all(&self, extent: Extent) -> bool {
        let words = self.words();
        extent.pages().all(|page| holds(&words, page))
    }

    /// The parts of an extent that were not sent.
    fn unsent(&self, extent: Extent) -> Vec<Extent> {
        let words = self.words();
        let mut parts = Vec::new();
        let mut first = extent.first();
        for page in extent.pages() {
            if holds(&words, page) {
                parts.push(Extent::between(first, page));
                first = page + 1;
            }
        }
        parts.push(Extent::between(first, extent.end()));
        parts.retain(|part| !part.is_empty());
        parts
    }
}

fn holds(words: &HashMap<u64, u64>, page: u64) -> bool {
    words.get(&(page / 64)).is_some_and(|word| word & (1 << (page % 64)) != 0)
}

/// A request that cannot be answered.
struct Refusal(ErrorCode, String);

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Refusal {
        let code = match error {
            StoreError::ReadOnly => ErrorCode::ReadOnly,
            StoreError::OutOfRange { .. } => ErrorCode::OutOfRange,
            _ => ErrorCode::StoreFailed,
        };
        Refusal(code, error.to_string())
    }
}

impl Session {
    pub(super) fn new(peer: PeerId, connection: quinn::Connection, shared: Arc<Shared>) -> Session {
        Session {
            peer,
            connection,
            shared,
            regions: Mutex::default(),
            demanded: Arc::new(Demanded { start: Instant::now(), last_us: AtomicU64::new(0) }),
        }
    }

    /// Serves a stream to its end.
    pub(super) async fn serve(&self, mut writer: FrameWriter, mut reader: FrameReader) {
        let first = match reader.next().await {
            Ok(Some(first)) => first,
            Ok(None) => return,
            Err(error) => return self.broken(&error),
        };
        let served = match first {
            Frame::Hello { version, .. } => self.control(version, &mut writer, &mut reader).await,
            Frame::Lane { class } => self.lane(class, &mut writer, &mut reader).await,
            Frame::Pull { region, credit_bytes, extents } => {
                self.pull(region, credit_bytes, extents.to_vec(), &mut writer, reader).await
            }
            Frame::Take { session } => match &self.shared.extension {
                Some(extension) => {
                    writer.prioritise(CONTROL_PRIORITY);
                    extension.take(TakeStream { peer: self.peer, session, writer, reader }).await;
                    return;
                }
                None => writer.send(&failed(ErrorCode::NoSession, "this server has no program to hand over")).await,
            },
            other => Err(unexpected(&other, "the first frame of a stream")),
        };
        if let Err(error) = served {
            self.broken(&error);
        }
        writer.finish();
        writer.delivered().await;
    }

    /// A stream that cannot go on. One that only ended needs nothing; a peer that breaks the protocol is not listened to any longer.
    fn broken(&self, error: &StreamError) {
        if let StreamError::Wire(error) = error {
            tracing::warn!(peer = %self.peer, %error, "a peer broke the protocol");
            self.connection.close(CLOSE_BAD_FRAME.into(), error.to_string().as_bytes());
        }
    }

    async fn control(&self, version: u16, writer: &mut FrameWriter, reader: &mut FrameReader) -> Result<(), StreamError> {
        writer.prioritise(CONTROL_PRIORITY);
        // A client that speaks more speaks this too.
        if version < VERSION {
            let message = format!("version {version} is not spoken here, {VERSION} is");
            return writer.send(&failed(ErrorCode::UnknownVersion, &message)).await;
        }
        writer.send(&Frame::Welcome { version: VERSION, agent: Agent::cut(AGENT) }).await?;
        while let Some(frame) = reader.next().await? {
            let Frame::Open { name } = frame else { return Err(unexpected(&frame, "OPEN")) };
            let answer = self.open(&name).unwrap_or_else(|Refusal(code, message)| failed(code, &message));
            writer.send(&answer).await?;
        }
        Ok(())
    }

    fn open(&self, name: &str) -> Result<Frame, Refusal> {
        // What does not exist and what is not granted look the same: names are not for guessing.
        let not_granted = || Refusal(ErrorCode::NotGranted, format!("region {name:?} is not granted to {}", self.peer));
        let granted = self.shared.granted(self.peer, name).ok_or_else(not_granted)?;
        if granted.store.page_size().bytes() > MAX_RUN_BYTES.into() {
            let message =
                format!("region {name:?} has {:?}; a frame carries at most {MAX_RUN_BYTES} bytes", granted.store.page_size());
            return Err(Refusal(ErrorCode::StoreFailed, message));
        }
        let mut regions = self.regions();
        let at = match regions.iter().position(|open| open.name == name) {
            Some(at) => at,
            None if regions.len() >= REGIONS_MAX => {
                return Err(Refusal(ErrorCode::Busy, format!("{REGIONS_MAX} regions are open on this connection")));
            }
            None => {
                regions.push(Open { name: name.to_owned(), granted, sent: None });
                regions.len() - 1
            }
        };
        let region = u32::try_from(at + 1).unwrap_or(u32::MAX);
        // Of an open region: it keeps the store it had, whatever was granted since.
        let Granted { store, access } = &regions[at].granted;
        Ok(Frame::Opened { region, access: *access, page_size: store.page_size(), size_bytes: store.size() })
    }

    fn regions(&self) -> std::sync::MutexGuard<'_, Vec<Open>> {
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn region(&self, region: u32) -> Result<Open, Refusal> {
        let at = (region as usize).checked_sub(1);
        let open = at.and_then(|at| self.regions().get(at).cloned());
        open.ok_or_else(|| Refusal(ErrorCode::NotGranted, format!("region {region} is not open on this connection")))
    }

    async fn lane(&self, class: Class, writer: &mut FrameWriter, reader: &mut FrameReader) -> Result<(), StreamError> {
        writer.prioritise(priority(class));
        while let Some(frame) = reader.next().await? {
            let done = match frame {
                Frame::Read { region, extent } => self.read(region, *extent, writer).await?,
                Frame::Write { region, run } => self.write(region, run).await,
                Frame::Flush { region } => self.flush(region).await,
                other => return Err(unexpected(&other, "a request")),
            };
            match done {
                Ok(None) => {}
                Ok(Some(answer)) => writer.send(&answer).await?,
                Err(Refusal(code, message)) => {
                    writer.send(&failed(code, &message)).await?;
                    if code == ErrorCode::BadFrame {
                        return Ok(());
                    }
                }
            }
            if class == Class::Demand {
                self.demanded.note();
                // The next fault of the same thread follows an install and a few instructions.
                self.shared.service.polling().expect();
            }
        }
        Ok(())
    }

    async fn read(
        &self,
        region: u32,
        extent: Extent,
        writer: &mut FrameWriter,
    ) -> Result<Result<Option<Frame>, Refusal>, StreamError> {
        let start = Instant::now();
        let (runs, page) = match self.read_runs(region, extent).await {
            Ok(answer) => answer,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let mut serve_us = u32::try_from(start.elapsed().as_micros()).unwrap_or(u32::MAX);
        for Run { extent, content } in runs.into_iter().flat_map(|run| split(run, page)) {
            // Compressing one page costs more time than it saves on any link a fault is bearable on.
            let (encoding, bytes) = encode_run(content, false);
            writer.send_data(DataHead::new(encoding, extent, serve_us, bytes.len())?, bytes).await?;
            serve_us = 0;
        }
        Ok(Ok(None))
    }

    async fn read_runs(&self, region: u32, extent: Extent) -> Result<(Vec<Run>, PageSize), Refusal> {
        let open = self.region(region)?;
        let store = &open.granted.store;
        store.check(extent)?;
        if extent.bytes(store.page_size()) > MAX_READ_BYTES.into() {
            let message = format!("{extent} are more than the {MAX_READ_BYTES} bytes that one READ may ask for");
            return Err(Refusal(ErrorCode::BadFrame, message));
        }
        let runs = store.read(extent).await?;
        if let Some(sent) = &open.sent {
            sent.add(extent);
        }
        Ok((runs, store.page_size()))
    }

    async fn write(&self, region: u32, run: EncodedRun) -> Result<Option<Frame>, Refusal> {
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
        Ok(Some(Frame::Done))
    }

    async fn flush(&self, region: u32) -> Result<Option<Frame>, Refusal> {
        let open = self.region(region)?;
        open.granted.store.flush().await?;
        Ok(Some(Frame::Done))
    }

    async fn pull(
        &self,
        region: u32,
        credit_bytes: u64,
        extents: Vec<Extent>,
        writer: &mut FrameWriter,
        reader: FrameReader,
    ) -> Result<(), StreamError> {
        writer.prioritise(priority(Class::Background));
        match self.start_pull(region, &extents) {
            Err(Refusal(code, message)) => writer.send(&failed(code, &message)).await,
            Ok((store, sent)) => {
                let credit = Credit::new(self.connection.clone(), reader, credit_bytes, self.demanded.clone());
                self.stream(store, sent, extents, credit, writer).await
            }
        }
    }

    fn start_pull(&self, region: u32, extents: &[Extent]) -> Result<(Arc<dyn PageStore>, Arc<Sent>), Refusal> {
        let open = self.region(region)?;
        let store = open.granted.store;
        extents.iter().try_for_each(|extent| store.check(*extent))?;
        let sent = Arc::<Sent>::default();
        let at = (region as usize).saturating_sub(1);
        if let Some(open) = self.regions().get_mut(at) {
            open.sent = Some(sent.clone());
        }
        Ok((store, sent))
    }

    /// Reads ahead of the network by one step, on other threads where there is compressing to do.
    async fn stream(
        &self,
        store: Arc<dyn PageStore>,
        sent: Arc<Sent>,
        extents: Vec<Extent>,
        mut credit: Credit,
        writer: &mut FrameWriter,
    ) -> Result<(), StreamError> {
        let page = store.page_size();
        let step = (PULL_EXTENT_BYTES / page.bytes()).max(1);
        let mut ready: VecDeque<tokio::task::JoinHandle<Result<Vec<EncodedRun>, Refusal>>> = VecDeque::new();
        let mut steps = extents.into_iter().flat_map(|extent| extent.chunks(step));
        loop {
            while ready.len() < ENCODE_AHEAD
                && let Some(extent) = steps.next()
            {
                let (store, sent) = (store.clone(), sent.clone());
                let compress = self.shared.options.compress && credit.pace.bytes_s < COMPRESS_BELOW_BYTES_S;
                ready.push_back(self.shared.service.spawn(async move { encode_step(&*store, &sent, extent, compress).await }));
            }
            let Some(next) = ready.pop_front() else { return writer.send(&Frame::End).await };
            let runs = match next.await {
                Ok(Ok(runs)) => runs,
                Ok(Err(Refusal(code, message))) => return writer.send(&failed(code, &message)).await,
                Err(_) => return writer.send(&failed(ErrorCode::StoreFailed, "the store panicked")).await,
            };
            for run in runs {
                // Demanded and sent while it was being encoded.
                if sent.holds_all(run.extent()) {
                    continue;
                }
                let len_bytes = run.bytes().len() as u64;
                credit.take(len_bytes).await?;
                let head = DataHead::new(run.encoding(), run.extent(), 0, run.bytes().len())?;
                writer.send_data(head, run.bytes().clone()).await?;
            }
        }
    }
}

/// Steps of a bulk read that are read and encoded while an earlier one is sent.
const ENCODE_AHEAD: usize = 3;

async fn encode_step(store: &dyn PageStore, sent: &Sent, extent: Extent, compress: bool) -> Result<Vec<EncodedRun>, Refusal> {
    let mut runs = Vec::new();
    for part in sent.unsent(extent) {
        runs.extend(store.read(part).await?);
    }
    let page = store.page_size();
    let parts: Vec<(bool, Run)> = runs.into_iter().flat_map(|run| kinds_of(run, page)).collect();
    // Sorting the pages is quick, compressing is not.
    let compress = compress && parts.iter().any(|(shrinks, _)| *shrinks);
    let encode = move || -> Result<Vec<EncodedRun>, WireError> {
        let parts = parts.into_iter().flat_map(|(shrinks, run)| split(run, page).into_iter().map(move |run| (shrinks, run)));
        parts
            .map(|(shrinks, run)| {
                let (encoding, bytes) = encode_run(run.content, compress && shrinks);
                EncodedRun::new(run.extent, encoding, bytes)
            })
            .collect()
    };
    let failed = |error: String| Refusal(ErrorCode::StoreFailed, error);
    let encoded =
        if compress { tokio::task::spawn_blocking(encode).await.map_err(|error| failed(error.to_string()))? } else { encode() };
    encoded.map_err(|error| failed(error.to_string()))
}

/// Cuts a run into parts that fit a frame, zeros too: what a frame stands for is bounded, whatever it weighs.
fn split(run: Run, page: PageSize) -> Vec<Run> {
    let part_pages = u64::from(MAX_RUN_BYTES) / page.bytes();
    if run.extent.count() <= part_pages {
        return vec![run];
    }
    let Run { extent, content } = run;
    #[allow(clippy::cast_possible_truncation, reason = "offsets inside `bytes`")]
    let cut = |part: Extent| match &content {
        Content::Zero => Run::zero(part),
        Content::Bytes(bytes) => {
            let from = page.offset_of(part.first() - extent.first()) as usize;
            Run::bytes(part, bytes.slice(from..from + part.bytes(page) as usize))
        }
    };
    extent.chunks(part_pages).map(cut).collect()
}

/// How much a bulk read may have on the way.
struct Credit {
    connection: quinn::Connection,
    total: tokio::sync::watch::Receiver<u64>,
    window_bytes: u64,
    sent_bytes: u64,
    pace: Pace,
    demanded: Arc<Demanded>,
}

/// How fast the client uses what is sent, by its credit.
struct Pace {
    since: Instant,
    used_bytes: u64,
    bytes_s: u64,
}

impl Pace {
    /// What twice the path holds at this pace: enough to keep it full and to find out whether it takes more.
    fn ahead_bytes(&mut self, used_bytes: u64, round_trip: Duration) -> u64 {
        // A shorter look would count bursts, a longer one would miss that the pace changed.
        let look = round_trip + PACE_LOOK;
        let elapsed = self.since.elapsed();
        if elapsed >= look {
            let bytes = u128::from(used_bytes.saturating_sub(self.used_bytes));
            let now = u64::try_from(bytes * 1_000_000 / elapsed.as_micros().max(1)).unwrap_or(u64::MAX);
            // Falls slowly: a pause of the client says nothing about the path.
            self.bytes_s = now.max(self.bytes_s / 4 * 3);
            (self.since, self.used_bytes) = (Instant::now(), used_bytes);
        }
        let path = u128::from(self.bytes_s) * look.as_micros() / 1_000_000;
        u64::try_from(path * 2).unwrap_or(u64::MAX)
    }
}

impl Pace {
    /// What the path holds at this pace.
    fn path_bytes(&self, round_trip: Duration) -> u64 {
        u64::try_from(u128::from(self.bytes_s) * round_trip.as_micros() / 1_000_000).unwrap_or(u64::MAX)
    }
}

/// Compressing is for paths that are slower than a core: LZ4 takes text in at about 400 MB/s and leaves 55 %, and QUIC itself sends 600 MB/s a core, so
/// where the path carries more than this the core is better spent on sending (bench `throughput`, `pull_vmlike_mb_s`).
const COMPRESS_BELOW_BYTES_S: u64 = 200_000_000;

/// Credit comes in steps, and its thread may be late by this much.
const PACE_LOOK: Duration = Duration::from_millis(1);

impl Credit {
    /// Reads CREDIT frames until the stream ends.
    fn new(connection: quinn::Connection, mut reader: FrameReader, credit_bytes: u64, demanded: Arc<Demanded>) -> Credit {
        let (granted, total) = tokio::sync::watch::channel(credit_bytes);
        tokio::spawn(async move {
            while let Ok(Some(Frame::Credit { total_bytes })) = reader.next().await {
                if granted.send(total_bytes).is_err() {
                    return;
                }
            }
        });
        let pace = Pace { since: Instant::now(), used_bytes: 0, bytes_s: 0 };
        Credit { connection, total, window_bytes: credit_bytes, sent_bytes: 0, pace, demanded }
    }

    /// Waits until `bytes` more may be sent.
    async fn take(&mut self, bytes: u64) -> Result<(), StreamError> {
        loop {
            let total = *self.total.borrow_and_update();
            // What the client has used up, by its own word.
            let used_bytes = total.saturating_sub(self.window_bytes);
            let round_trip = self.connection.min_rtt();
            let ahead_bytes = PULL_AHEAD_MIN_BYTES + self.pace.ahead_bytes(used_bytes, round_trip);
            // While threads wait for faults only what the path itself holds is kept on the way: priority orders what is still here, and what
            // queues behind it, in the other end's socket, is waited for.
            let demanded_bytes = PULL_AHEAD_DEMANDED_BYTES + self.pace.path_bytes(round_trip);
            let limit = if self.demanded.recently() { demanded_bytes } else { ahead_bytes };
            let limit = limit.min(self.window_bytes);
            let ahead = self.sent_bytes.saturating_sub(used_bytes);
            // A run longer than the whole credit goes alone.
            if ahead == 0 || ahead + bytes <= limit {
                self.sent_bytes += bytes;
                return Ok(());
            }
            // The limit rises by itself once no thread faults any more.
            let more = tokio::time::timeout(Duration::from_micros(DEMANDED_US), self.total.changed()).await;
            if matches!(more, Ok(Err(_))) {
                return Err(StreamError::Ended("the client left the bulk read".into()));
            }
        }
    }
}

fn failed(code: ErrorCode, message: &str) -> Frame {
    Frame::Failed { code, message: Message::cut(message) }
}

fn unexpected(frame: &Frame, expected: &'static str) -> StreamError {
    StreamError::Wire(WireError::Unexpected { found: frame.kind().name(), expected })
}
