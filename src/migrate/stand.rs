//! Keeps a standby near: at points the program pauses for as long as it takes to copy aside what it wrote last, and what was copied follows while it runs on.
//!
//! Role: an `attempt` whose destination stands by, from MAPPED until it is promoted. Neighbours: [`Points`](super::points::Points) decides when, `copy` sends, a gate pauses. Invariants: what a point's MARK closes on the
//! feeds, with what was sent before it, is the program's memory at that pause and no other moment's; a pause ends within its limit; what was copied aside and not acknowledged when the
//! connection broke is owed again.

use super::{
    MoveEvent,
    attempt::{Attempt, End, PROGRESS, length_of},
    copy::{Copy, CopyError, FIRST},
    handover::{SourceEvent, Turn},
    points::Next,
};
use crate::{
    Run,
    net::{FrameReader, StreamError, wire::Frame},
};
use std::{
    future::Future,
    time::{Duration, Instant},
};

/// What the program had written and the standby lacked at a pause.
struct Aside {
    number: u64,
    /// By region.
    runs: Vec<Vec<Run>>,
    bytes: u64,
}

impl Copy {
    /// What is to be done next for the standby.
    fn next(&mut self) -> Next {
        let look = self.look(false);
        // Measures the path; when there is a point is not its business.
        let _ = self.rounds.look(&look);
        let to_send = self.rounds.time_to_send(look.owed_bytes);
        match &mut self.points {
            Some(points) => {
                self.throttle.set(points.speed());
                points.look(&look, to_send)
            }
            None => Next::HandOver,
        }
    }

    fn outstanding(&self) -> bool {
        self.points.as_ref().is_some_and(super::points::Points::outstanding)
    }

    /// The program is paused: copies what is owed, and counts it as sent.
    async fn copy_aside(&mut self) -> Result<Aside, CopyError> {
        self.take_of_paused().await?;
        let look = self.look(false);
        let number = self.points.as_mut().map_or(0, |points| points.cut(&look));
        let mut aside = Aside { number, runs: Vec::with_capacity(self.parts.len()), bytes: 0 };
        for (part, feed) in self.parts.iter_mut().zip(&mut self.feeds) {
            let owed = part.owed.take(u64::MAX, true);
            // Whatever becomes of this future, they are not forgotten.
            part.unacknowledged.push_back((u64::MAX, owed.clone()));
            aside.bytes += part.bytes_of(&owed);
            aside.runs.push(feed.read(owed).await?);
        }
        // Nothing is owed: counting begins anew, or a standby of many months would come to the end of the numbers.
        self.tick = FIRST;
        Ok(aside)
    }

    async fn send_aside(&mut self, aside: Aside) -> Result<(), CopyError> {
        for ((runs, part), feed) in aside.runs.into_iter().zip(&mut self.parts).zip(&mut self.feeds) {
            feed.send_runs(runs).await?;
            if let Some((sent, _)) = part.unacknowledged.back_mut() {
                *sent = feed.sent_and_used_bytes().0;
            }
            feed.mark(aside.number).await?;
        }
        Ok(())
    }
}

/// What the standby said meanwhile.
#[derive(Default)]
struct Said {
    kept: Option<(u64, Instant)>,
    promote: bool,
}

impl Said {
    fn hear(&mut self, frame: Option<Frame>) -> Result<(), End> {
        match frame {
            Some(Frame::Kept { number, .. }) => self.kept = Some((number, Instant::now())),
            Some(Frame::Promote { .. }) => self.promote = true,
            Some(Frame::Mapped { .. }) => {}
            Some(Frame::Abort { message, .. }) => return Err(End::Failed(format!("the standby gave up: {}", &*message))),
            Some(other) => return Err(End::Failed(format!("{} came of a standby", other.kind().name()))),
            None => return Err(End::Orderly),
        }
        Ok(())
    }
}

/// Works, and listens to the standby meanwhile.
async fn beside<T>(reader: &mut FrameReader, said: &mut Said, work: impl Future<Output = Result<T, CopyError>>) -> Result<T, End> {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return Ok(done?),
            frame = reader.next() => said.hear(frame?)?,
        }
    }
}

impl Attempt {
    /// Returns when the standby was promoted and lacks nothing but what was written in the last moment.
    pub(super) async fn stand(&mut self, turn: Turn) -> Result<(), End> {
        // Before it gets anything: whoever holds a point may take over, and is known to.
        self.shared.decide(SourceEvent::StandsBy(turn));
        let mut told = Instant::now();
        let mut said = Said::default();
        loop {
            if *self.shared.finalize.borrow() == Some(turn) {
                said.promote = true;
            }
            self.note(&mut said);
            let Some((copy, copy_rest)) = &mut self.copy else { return Err(End::CalledOff) };
            match copy.next() {
                Next::Wait(time) => beside(&mut self.reader, &mut said, copy.wait(time)).await?,
                Next::Send => beside(&mut self.reader, &mut said, copy.send_some()).await?,
                Next::Cut => self.point(turn, &mut said, false).await?,
                Next::HoldAndCut => self.point(turn, &mut said, true).await?,
                Next::HandOver => {
                    *copy_rest = true;
                    copy.drain().await;
                    return Ok(());
                }
            }
            if told.elapsed() >= PROGRESS {
                told = Instant::now();
                let Some((copy, _)) = &self.copy else { return Err(End::CalledOff) };
                let copying = copy.progress();
                self.writer.send(&Frame::Progress { session: turn.session, epoch: turn.epoch, copying }).await?;
                self.shared.tell(copying.into());
            }
        }
    }

    fn note(&mut self, said: &mut Said) {
        let Some((copy, _)) = &mut self.copy else { return };
        let (tick, now) = (copy.tick, copy.at());
        let Some(points) = &mut copy.points else { return };
        if said.promote {
            points.promote(tick);
        }
        if let Some((number, heard)) = said.kept.take()
            && let Some(behind) = points.kept(number, now.saturating_sub(heard.elapsed()))
        {
            self.shared.tell(MoveEvent::Kept { number, behind });
        }
    }

    /// Makes a point of this moment, and sends it.
    async fn point(&mut self, turn: Turn, said: &mut Said, hold: bool) -> Result<(), End> {
        let cut = self.cut(said, hold).await;
        self.deadline = None;
        if self.pause.is_some() {
            self.shared.gate.resume().await;
            self.pause = None;
        }
        let (aside, state, at) = match cut {
            Ok(cut) => cut,
            Err(Missed::Program(reason)) => {
                self.shared.tell(MoveEvent::PointMissed { reason });
                let Some((copy, _)) = &mut self.copy else { return Err(End::CalledOff) };
                return beside(&mut self.reader, said, copy.wait(AFTER_A_MISS)).await;
            }
            Err(Missed::End(end)) => return Err(end),
        };
        let (number, state_bytes) = (aside.number, length_of(&state)?);
        self.shared.tell(MoveEvent::Point { number, paused: at.elapsed(), bytes: aside.bytes });
        let Some((copy, _)) = &mut self.copy else { return Err(End::CalledOff) };
        beside(&mut self.reader, said, copy.send_aside(aside)).await?;
        let age_us = u64::try_from(at.elapsed().as_micros()).unwrap_or(u64::MAX);
        let Turn { session, epoch } = turn;
        self.send(&Frame::Point { session, epoch, number, age_us, state_bytes }).await?;
        self.send_state(state).await
    }

    /// Pauses the program and copies aside what the standby lacks. Whoever calls it lets the program go, whatever comes of it.
    async fn cut(&mut self, said: &mut Said, hold: bool) -> Result<(Aside, bytes::Bytes, Instant), Missed> {
        self.pause().await.map_err(|end| match end {
            End::Failed(reason) => Missed::Program(reason),
            end => Missed::End(end),
        })?;
        while hold && self.copy.as_ref().is_some_and(|(copy, _)| copy.outstanding()) {
            let heard = self.bound().wait(self.reader.next()).await?;
            said.hear(heard.map_err(End::from)?)?;
            self.note(said);
        }
        let at = Instant::now();
        let (state, bound) = (self.state(), self.bound());
        let Some((copy, _)) = &mut self.copy else { return Err(End::CalledOff.into()) };
        let (state, aside) = bound.wait(async { tokio::join!(state, copy.copy_aside()) }).await?;
        Ok((aside.map_err(End::from)?, state?, at))
    }
}

/// Until the next try, if the program did not pause.
const AFTER_A_MISS: Duration = Duration::from_millis(100);

/// Why there is no point.
enum Missed {
    /// The program did not pause; it may the next time.
    Program(String),
    End(End),
}

impl From<End> for Missed {
    fn from(end: End) -> Missed {
        Missed::End(end)
    }
}

impl From<StreamError> for Missed {
    fn from(error: StreamError) -> Missed {
        Missed::End(error.into())
    }
}
