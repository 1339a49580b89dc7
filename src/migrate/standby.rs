//! A host that follows a running program, and can go on from its last point.
//!
//! Role: the handle of a destination that stands by, and its run. Neighbours: `taking` speaks with the source, `image` holds the memory. Invariants: S6: without the source's word the program runs here only by the caller's, and then the source
//! is told, for as long as the program lives here and until it has heard, that it runs there no more.

use super::{
    MoveError, MoveEvent, StandbyOptions,
    destination::{Destination, Moved},
    image::{Shown, read},
    taking::{Taken, Taking},
};
use crate::{
    RegionError,
    net::wire::{ErrorCode, Frame},
    region::WeakRegion,
};
use std::{
    sync::{Arc, RwLock, RwLockReadGuard},
    time::{Duration, Instant},
};
use tokio::sync::{Mutex, broadcast, oneshot, watch};

/// A destination that stays near a running source, ready to go on in its place. It ends with the value.
///
/// What it holds is always the memory of one moment at which the program stood at its gate, with the state of that moment: see [`point`](Standby::point).
///
/// ```no_run
/// # #[tokio::main] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// use pageferry::{Destination, Identity, StandbyOptions};
/// let identity = Identity::load("standby.pem")?;
/// let source = "5f2c8c0e6b1f4d3a9e7b5c1d2f3a4b5c6d7e8f90a1b2c3d4e5f60718293a4b5c".parse()?;
/// let destination = Destination::connect("192.0.2.7:4433".parse()?, source, &identity).await?;
/// let standby = destination.stand_by(StandbyOptions::default()).await?; // it has its first point
/// println!("point {}, {:?} behind", standby.point().number(), standby.point().behind());
/// let source_is_dead = false; // as you know, and pageferry cannot
/// let moved = match source_is_dead {
///     false => standby.promote().await?,  // nothing is lost
///     true => standby.take_over().await?, // what was written since the last point is
/// };
/// # let _ = moved;
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct Standby {
    wish: watch::Sender<Wish>,
    shown: Arc<RwLock<Option<Shown>>>,
    status: watch::Receiver<Status>,
    moved: Mutex<Option<oneshot::Receiver<Moved>>>,
    events: broadcast::Sender<MoveEvent>,
    decision_limit: Duration,
}

/// What the caller wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    Stand,
    Promote,
    TakeOver,
    Leave,
}

/// What the run tells its handle.
#[derive(Clone, Debug, Default)]
pub(super) struct Status {
    pub(super) has_point: bool,
    /// READY was sent, and no answer has come.
    pub(super) undecided: bool,
    /// Promotions that the source called off, and why the last.
    pub(super) called_off: (u64, String),
    /// Why nothing is followed any more.
    pub(super) ended: Option<MoveError>,
}

/// One moment of the program, as a standby holds it. The next is shown after this is dropped: hold it for moments only.
#[derive(Debug)]
pub struct Point<'a> {
    shown: RwLockReadGuard<'a, Option<Shown>>,
}

impl Point<'_> {
    /// Counts the points that this standby has held, from 1.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.shown.as_ref().map_or(0, |shown| shown.number)
    }

    /// How long ago the program stood there, to half a round trip.
    #[must_use]
    pub fn behind(&self) -> Duration {
        self.shown.as_ref().map_or(Duration::MAX, |shown| shown.stood.elapsed())
    }

    /// Its small state then, as the source's state function gave it.
    #[must_use]
    pub fn state(&self) -> &[u8] {
        self.shown.as_ref().map_or(&[], |shown| &shown.state)
    }

    /// Copies bytes of a region as they were then.
    ///
    /// # Errors
    /// As for [`Region::read_at`](crate::Region::read_at), and [`RegionError::OutOfRange`] of a region of no bytes for a name that there is not.
    pub fn read_at(&self, region: &str, offset: u64, into: &mut [u8]) -> Result<(), RegionError> {
        let regions = self.shown.as_ref().map(|shown| shown.regions.as_slice()).unwrap_or_default();
        let none = RegionError::OutOfRange { offset, len: into.len() as u64, size_bytes: 0 };
        regions.iter().find(|known| known.name() == region).ok_or(none)?.read_at(offset, into)
    }
}

impl std::fmt::Debug for Shown {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shown").field("number", &self.number).field("regions", &self.regions).finish_non_exhaustive()
    }
}

impl Destination {
    /// Follows the program without taking it, and returns when its first point is here. From then on this end stays near: see [`StandbyOptions`]. A connection that breaks is dialled again for as long as the value lives.
    ///
    /// One destination at a time follows a source, or takes its program.
    ///
    /// Cancellation: dropping the future ends it.
    ///
    /// # Errors
    /// As for [`take`](Destination::take).
    pub async fn stand_by(&self, options: StandbyOptions) -> Result<Standby, MoveError> {
        let (wish, wishes) = watch::channel(Wish::Stand);
        let (tell, status) = watch::channel(Status::default());
        let (send, moved) = oneshot::channel();
        let taking = Taking::of_standby(self.means(), Destination::new_session()?, options, wishes, tell);
        let (shown, events) = (taking.shown(), self.events.clone());
        let decision_limit = self.decision_limit;
        let standby = Standby { wish, shown, status, moved: Mutex::new(Some(moved)), events, decision_limit };
        self.pager.service().spawn(run(taking, send));
        let mut status = standby.status.clone();
        let begun = status.wait_for(|status| status.has_point || status.ended.is_some()).await;
        match begun.map_err(|_| MoveError::Closed)?.ended.clone() {
            None => Ok(standby),
            Some(error) => Err(error),
        }
    }
}

impl Standby {
    /// The last point that is here.
    #[must_use]
    pub fn point(&self) -> Point<'_> {
        Point { shown: read(&self.shown) }
    }

    /// News from now on: points, as [`MoveEvent::Kept`], interruptions and how copying goes. A receiver that falls 64 events behind misses the oldest.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<MoveEvent> {
        self.events.subscribe()
    }

    /// Returns when nothing is followed any more, with the reason: the source's owner called it off, the program was given to another host, or moved here. The last point stays, and
    /// [`take_over`](Standby::take_over) still goes on from it.
    ///
    /// Cancellation: dropping the future changes nothing.
    pub async fn ended(&self) -> MoveError {
        let mut status = self.status.clone();
        let ended = status.wait_for(|status| status.ended.is_some()).await;
        ended.ok().and_then(|status| status.ended.clone()).unwrap_or(MoveError::Closed)
    }

    /// Takes the program from its source, which stands still from the last thing it wrote until it runs here: a handover, in which nothing is lost. A connection that breaks meanwhile is dialled again.
    ///
    /// Cancellation: dropping the future does not stop the handover; call this again, or [`take_over`](Standby::take_over), for what becomes of it.
    ///
    /// # Errors
    /// [`MoveError::Aborted`]: the source called it off, and is followed as before. [`MoveError::Lost`]: it was not heard of within the decision limit of the destination; it is followed again
    /// when it comes back. [`MoveError::Unknown`]: the same, and it may have given the program away already. [`MoveError::Closed`]: the program was taken before.
    pub async fn promote(&self) -> Result<Moved, MoveError> {
        let before = self.status.borrow().called_off.0;
        self.wish.send_if_modified(|wish| {
            let stands = *wish == Wish::Stand;
            if stands {
                *wish = Wish::Promote;
            }
            stands
        });
        let mut status = self.status.clone();
        let fails = async {
            let failed = status.wait_for(|status| status.called_off.0 > before || status.ended.is_some()).await;
            match failed {
                Ok(status) if status.called_off.0 > before => MoveError::Aborted { reason: status.called_off.1.clone() },
                Ok(status) => status.ended.clone().unwrap_or(MoveError::Closed),
                // The session is over: by what has moved.
                Err(_) => std::future::pending().await,
            }
        };
        let start = Instant::now();
        let error = tokio::select! {
            biased;
            moved = self.moved() => return moved,
            error = fails => error,
            () = tokio::time::sleep(self.decision_limit) => {
                let reason = "the source was not heard of".to_owned();
                if self.status.borrow().undecided {
                    MoveError::Unknown { waited: start.elapsed(), reason }
                } else {
                    MoveError::Lost { reason }
                }
            }
        };
        self.wish.send_if_modified(|wish| {
            let promotes = *wish == Wish::Promote;
            if promotes {
                *wish = Wish::Stand;
            }
            promotes
        });
        Err(error)
    }

    /// Goes on from the last point **without the source's word**: calling this says that the source runs the program no more. pageferry cannot know that, for a source that is out of reach looks like
    /// one that is dead: see to it first, or the program runs twice until they meet. What the source wrote after the last point is not part of the program any more.
    ///
    /// The new owner's number is above all that the source may have given. A source that is within reach, or comes back, is told that it is no longer the owner, stops its program for good, and says
    /// [`MoveEvent::Deposed`]; so does this end when it has. That is tried as long as the program's regions live here.
    ///
    /// Cancellation: dropping the future does not take the word back; call this again for what becomes of it.
    ///
    /// # Errors
    /// [`MoveError::Closed`]: the program was taken before.
    pub async fn take_over(&self) -> Result<Moved, MoveError> {
        self.wish.send_if_modified(|wish| {
            *wish = Wish::TakeOver;
            true
        });
        self.moved().await
    }

    async fn moved(&self) -> Result<Moved, MoveError> {
        let mut receiver = self.moved.lock().await;
        let Some(waiting) = receiver.as_mut() else { return Err(MoveError::Closed) };
        let moved = waiting.await;
        *receiver = None;
        moved.map_err(|_| MoveError::Closed)
    }
}

impl Drop for Standby {
    fn drop(&mut self) {
        self.wish.send_replace(Wish::Leave);
    }
}

async fn run(mut taking: Taking, moved: oneshot::Sender<Moved>) {
    let taken = match taking.hand_over().await {
        Ok(taken) => Some(taken),
        Err(error) => taking.ended(error).await,
    };
    match taken {
        Some(Taken::Committed(stream)) => drop(moved.send(taking.moved_here(*stream).await)),
        Some(Taken::ByWord) => {
            let (taken_over, news) = taking.taken_over().await;
            let regions = taken_over.regions.iter().map(crate::Region::downgrade).collect();
            let _ = moved.send(taken_over);
            depose(news, regions).await;
        }
        None => taking.unmap().await,
    }
}

/// What the source is to be told.
pub(super) struct News {
    pub(super) peer: crate::Peer,
    pub(super) session: u128,
    pub(super) epoch: u64,
    pub(super) patience: Duration,
    pub(super) completion: watch::Sender<Option<Result<(), MoveError>>>,
    pub(super) events: broadcast::Sender<MoveEvent>,
}

const TELL_AGAIN: Duration = Duration::from_millis(100);
const TELL_AGAIN_MAX: Duration = Duration::from_secs(5);

/// Tells the source until it has heard.
async fn depose(news: News, regions: Vec<WeakRegion>) {
    let (start, mut pause) = (Instant::now(), TELL_AGAIN);
    while regions.iter().any(|region| region.upgrade().is_some()) {
        match tell(&news).await {
            Ok(Frame::Deposed { .. }) => {
                tracing::info!(epoch = news.epoch, "the source has stopped");
                let _ = news.events.send(MoveEvent::Deposed { epoch: news.epoch });
                break;
            }
            Ok(Frame::Abort { code, message, .. } | Frame::Failed { code, message }) if is_final(code) => {
                tracing::warn!(reason = &*message, "who answers at the source's address is not the source that was followed");
                break;
            }
            _ => {}
        }
        if start.elapsed() >= news.patience {
            news.completion.send_if_modified(|done| done.replace(Ok(())).is_none());
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(TELL_AGAIN_MAX);
    }
    news.completion.send_replace(Some(Ok(())));
}

/// Whether who says so is another, or never was to be told: anything else may pass.
fn is_final(code: ErrorCode) -> bool {
    matches!(code, ErrorCode::NotOwner | ErrorCode::NotGranted | ErrorCode::NoSession)
}

async fn tell(news: &News) -> Result<Frame, MoveError> {
    let lost = |error: crate::net::StreamError| MoveError::Lost { reason: error.to_string() };
    let (mut writer, mut reader) = news.peer.open_stream().await?;
    writer.send(&Frame::Depose { session: news.session, epoch: news.epoch }).await.map_err(lost)?;
    writer.finish();
    let answer = tokio::time::timeout(TELL_AGAIN_MAX, reader.next()).await;
    answer.map_err(|_| MoveError::Closed)?.map_err(lost)?.ok_or(MoveError::Closed)
}
