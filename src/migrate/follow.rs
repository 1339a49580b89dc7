//! What a session does otherwise when its destination stands by.
//!
//! Role: a `taking` that waits for points, and for its caller's word. Neighbours: `standby` starts it and gives the word; `image` holds what comes. Invariants: a word is heeded between two points, never in the middle of one; once READY was sent
//! only the source's answer, or the caller's word that it is lost, decides.

use super::{
    MoveError, MoveEvent, StandbyOptions,
    destination::Moved,
    handover::{DestinationAction, DestinationEvent, DestinationState, SessionId},
    image::{Image, Shown},
    standby::{News, Status, Wish},
    taking::{Heard, Means, Stream, Taken, Taking},
};
use crate::net::{
    FrameWriter,
    wire::{ErrorCode, Frame},
};
use bytes::Bytes;
use std::{
    future::{Future, pending},
    sync::{Arc, RwLock},
    time::Duration,
};
use tokio::sync::watch;

/// What a standby has beside its session.
pub(super) struct Follow {
    pub(super) image: Image,
    wishes: watch::Receiver<Wish>,
    status: watch::Sender<Status>,
    /// On this stream.
    asked_for_promotion: bool,
}

impl Follow {
    /// A point is whole, or the last thing that the program did before it was promoted, which may come before any point.
    pub(super) async fn show(&mut self, state: Bytes, age: Duration) -> Result<u64, MoveError> {
        let shown = self.image.show(state, age).await?;
        self.status.send_if_modified(|status| !std::mem::replace(&mut status.has_point, true));
        Ok(shown)
    }
}

/// What a caller says that no source is asked about.
pub(super) enum Word {
    TakeOver,
    Leave,
}

impl Word {
    pub(super) fn heard(self) -> Result<Heard, MoveError> {
        match self {
            Word::TakeOver => Ok(Heard { event: DestinationEvent::TakeOver, reason: "the caller has taken over".into() }),
            Word::Leave => Err(MoveError::Closed),
        }
    }
}

impl Taking {
    pub(super) fn of_standby(
        means: Means,
        session: SessionId,
        options: StandbyOptions,
        wishes: watch::Receiver<Wish>,
        status: watch::Sender<Status>,
    ) -> Taking {
        let follow = Follow { image: Image::new(), wishes, status, asked_for_promotion: false };
        let mut taking = Taking::new(means, session, options.into());
        taking.follow = Some(follow);
        taking
    }

    pub(super) fn shown(&self) -> Arc<RwLock<Option<Shown>>> {
        self.follow.as_ref().map_or_else(Arc::default, |follow| follow.image.shown())
    }

    /// Whether there is a point to go on from, so that no failure is the end.
    pub(super) fn stands_by(&self) -> bool {
        self.follow.as_ref().is_some_and(|follow| follow.image.has_point())
    }

    /// The caller's word, when it is given and can be heeded.
    pub(super) fn word(&self) -> impl Future<Output = Word> + Send + use<> {
        let of = |follow: &Follow| (follow.wishes.clone(), follow.image.has_point());
        let follow = self.follow.as_ref().map(of);
        let undecided = self.handover.state() == DestinationState::Ready;
        async move {
            let Some((mut wishes, has_point)) = follow else { return pending().await };
            let heeded = |wish: &Wish| match wish {
                Wish::TakeOver => has_point,
                Wish::Leave => !undecided,
                Wish::Stand | Wish::Promote => false,
            };
            // A handle that is gone has said so.
            match wishes.wait_for(heeded).await.map(|wish| *wish) {
                Ok(Wish::TakeOver) => Word::TakeOver,
                _ => Word::Leave,
            }
        }
    }

    /// Returns when the source is to be asked for a promotion.
    pub(super) fn promotion(&self) -> impl Future<Output = ()> + Send + use<> {
        let may = self.handover.state() == DestinationState::Mapped;
        let follow = self.follow.as_ref().filter(|follow| may && !follow.asked_for_promotion);
        let wishes = follow.map(|follow| follow.wishes.clone());
        async move {
            let Some(mut wishes) = wishes else { return pending().await };
            if wishes.wait_for(|wish| *wish == Wish::Promote).await.is_err() {
                pending().await
            }
        }
    }

    pub(super) async fn ask_for_promotion(&mut self, writer: &mut FrameWriter) {
        let (session, epoch) = (self.session, self.handover.epoch());
        // A stream that has ended says so when it is read.
        let _ = writer.send(&Frame::Promote { session, epoch }).await;
        if let Some(follow) = &mut self.follow {
            follow.asked_for_promotion = true;
        }
    }

    /// A point and its state were announced: waits for its pages, shows it, and says so.
    pub(super) async fn point(
        &mut self,
        stream: &mut Stream,
        number: u64,
        age: Duration,
        state: Bytes,
    ) -> Result<Option<Heard>, MoveError> {
        let (word, limit) = (self.word(), self.means.step_limit);
        let Some(follow) = &mut self.follow else {
            return Err(MoveError::Protocol("POINT came, and nobody stands by".into()));
        };
        let reached = tokio::select! {
            biased;
            word = word => return word.heard().map(Some),
            reached = tokio::time::timeout(limit, follow.image.reached(number)) => reached,
        };
        match reached {
            Ok(Ok(())) => {}
            Ok(Err(MoveError::Lost { reason })) => return Ok(Some(Heard { event: DestinationEvent::Lost, reason })),
            Err(_) => {
                let reason = format!("the pages of point {number} did not come within {limit:?}");
                return Ok(Some(Heard { event: DestinationEvent::Lost, reason }));
            }
            Ok(Err(error)) => {
                self.abort(&mut stream.writer, &error).await;
                return Err(error);
            }
        }
        let age = age + self.means.peer.rtt().unwrap_or_default() / 2;
        let shown = follow.show(state, age).await?;
        let behind = super::image::read(&follow.image.shown()).as_ref().map_or(age, |shown| shown.stood.elapsed());
        self.tell(MoveEvent::Kept { number: shown, behind });
        let kept = Frame::Kept { session: self.session, epoch: self.handover.epoch(), number };
        Ok(stream.writer.send(&kept).await.err().map(|error| Heard::lost(&error)))
    }

    /// Said to the handle.
    pub(super) fn undecided(&mut self, undecided: bool) {
        if let Some(follow) = &mut self.follow {
            follow.status.send_modify(|status| status.undecided = undecided);
            // A new attempt, or the last step of this one.
            follow.asked_for_promotion = undecided;
        }
    }

    /// Whether a standby follows on when the source has called an attempt off.
    pub(super) fn goes_on_after(&self, code: ErrorCode, message: &str) -> bool {
        let Some(follow) = self.follow.as_ref().filter(|follow| code == ErrorCode::Aborted && follow.image.has_point()) else {
            return false;
        };
        follow.status.send_modify(|status| status.called_off = (status.called_off.0 + 1, message.to_owned()));
        true
    }

    /// Nothing is followed any more. Returns what the caller makes of the last point, if there is one.
    pub(super) async fn ended(&mut self, error: MoveError) -> Option<Taken> {
        let follow = self.follow.as_mut()?;
        follow.image.cancel().await;
        let has_point = follow.image.has_point();
        let leaves = *follow.wishes.borrow() == Wish::Leave;
        follow.status.send_modify(|status| status.ended = Some(error));
        if !has_point || leaves {
            return None;
        }
        match self.word().await {
            Word::TakeOver if self.handover.on(DestinationEvent::TakeOver) == DestinationAction::RunAndDepose => {
                Some(Taken::ByWord)
            }
            _ => None,
        }
    }

    /// The program as it was at the last point, and what the source is to be told of it.
    pub(super) async fn taken_over(mut self) -> (Moved, News) {
        let epoch = self.handover.epoch();
        let state = super::image::read(&self.shown()).as_ref().map(|shown| shown.state.clone()).unwrap_or_default();
        if let Some(mut follow) = self.follow.take() {
            follow.image.leave().await;
        }
        let (regions, events) = (std::mem::take(&mut self.regions), self.events.clone());
        let moved = Moved { regions, state, epoch, completion: self.completion.subscribe(), events: events.clone() };
        let Taking { session, means, completion, .. } = self;
        let news = News { peer: means.peer, session, epoch, patience: means.loss.keep_trying, completion, events };
        (moved, news)
    }
}
