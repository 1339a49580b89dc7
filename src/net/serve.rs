//! One connection's state at the server, and what each of its streams is for.
//!
//! Role: hop *serve*: a stream's first frame, and the control stream. Neighbours: `server` accepts the streams; `lane` answers requests, `pull` streams bulk reads and `feed` what a source sends
//! by itself, all from the stores opened here. Invariants: S7: a peer reaches what it was granted and nothing else, a frame that breaks the protocol closes the connection.

mod bulk;
mod feed;
mod lane;
mod pull;

pub(crate) use self::feed::Feed;

use self::bulk::Sent;
use super::{
    identity::PeerId,
    lane::CONTROL_PRIORITY,
    peer::{AGENT, VERSION},
    server::{CLOSE_BAD_FRAME, Granted, Shared, TakeStream},
    stream::{FrameReader, FrameWriter, StreamError},
    wire::{Agent, ErrorCode, Frame, MAX_RUN_BYTES, Message, WireError},
};
use crate::{Content, Extent, PageSize, Run, StoreError};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Instant,
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
    name: Arc<str>,
    granted: Granted,
    /// Pages sent on demand since a bulk read began; none before one began.
    sent: Option<Arc<Sent>>,
}

/// Regions a connection may open.
const REGIONS_MAX: usize = 4096;
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
    pub(super) async fn serve(self: Arc<Self>, mut writer: FrameWriter, mut reader: FrameReader) {
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
            Frame::Take { session, plan } => match &self.shared.extension {
                Some(extension) => {
                    writer.prioritise(CONTROL_PRIORITY);
                    extension.take(TakeStream { peer: self.peer, session, plan, writer, reader }).await;
                    return;
                }
                None => writer.send(&no_program()).await,
            },
            Frame::Depose { session, epoch } => {
                writer.prioritise(CONTROL_PRIORITY);
                let extension = self.shared.extension.as_ref();
                writer.send(&extension.map_or_else(no_program, |extension| extension.depose(self.peer, session, epoch))).await
            }
            Frame::Feed { session, epoch, region, credit_bytes } => {
                return self.feed((session, epoch), region, credit_bytes, writer, reader).await;
            }
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
        let at = match regions.iter().position(|open| &*open.name == name) {
            Some(at) => at,
            None if regions.len() >= REGIONS_MAX => {
                return Err(Refusal(ErrorCode::Busy, format!("{REGIONS_MAX} regions are open on this connection")));
            }
            None => {
                regions.push(Open { name: name.into(), granted, sent: None });
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

fn failed(code: ErrorCode, message: &str) -> Frame {
    Frame::Failed { code, message: Message::cut(message) }
}

fn no_program() -> Frame {
    failed(ErrorCode::NoSession, "this server has no program to hand over")
}

fn unexpected(frame: &Frame, expected: &'static str) -> StreamError {
    StreamError::Wire(WireError::Unexpected { found: frame.kind().name(), expected })
}
