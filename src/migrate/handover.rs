//! The decisions of a handover: who owns the program after each message, time-out and failure.
//!
//! Role: decides for `source` and `destination`, which carry it out. Neighbours: both feed it events and do what it answers; docs/protocol.md draws it. Invariants:
//! S6: at most one owner, ever. The source gives the program up in one step, when it decides to commit, and never takes it back; the destination owns it only
//! once it was told so. Before that step any failure gives the program back to the source. Messages may be repeated, late, or lost.
//!
//! Pure: no I/O, no clock, no bytes. The tests below run every order of messages, losses and repeats up to a depth that covers a whole handover with two faults.

/// Names one migration; chosen at random by the destination.
pub(crate) type SessionId = u128;

/// One attempt of a session to get the program. The epoch counts attempts and so names owners: the owner's is the highest that was committed. It
/// travels with every message, so that one of an attempt that was given up is never taken for one of the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Turn {
    pub(crate) session: SessionId,
    pub(crate) epoch: u64,
}

/// What the source knows of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SourceState {
    /// It runs here.
    Running,
    /// It runs here, and its regions were offered.
    Offered(Turn),
    /// It runs here, and its pages are being copied to the destination.
    Copying(Turn),
    /// It is being paused, or is paused and its state is on the way.
    Paused(Turn),
    /// It belongs to the destination.
    Committed(Turn),
    /// The destination has all its pages.
    Released(Turn),
    /// A standby took it over by its caller's word, without the source's.
    Deposed(Turn),
}

impl SourceState {
    /// The attempt that it is about.
    pub(crate) fn turn(self) -> Option<Turn> {
        match self {
            SourceState::Running => None,
            SourceState::Offered(turn)
            | SourceState::Copying(turn)
            | SourceState::Paused(turn)
            | SourceState::Committed(turn)
            | SourceState::Released(turn)
            | SourceState::Deposed(turn) => Some(turn),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SourceEvent {
    /// TAKE.
    Take(SessionId),
    /// MAPPED.
    Mapped(Turn),
    /// Its destination is a standby, which may take over without a word of the source's.
    StandsBy(Turn),
    /// Enough of its pages were copied, or none are to be.
    Copied(Turn),
    /// READY.
    Ready(Turn),
    /// COMPLETE.
    Complete(Turn),
    /// The attempt's stream ended, ABORT came, a time limit passed, the pause failed, or the program's owner cancelled.
    Failed(Turn),
    /// DEPOSE.
    Depose(Turn),
}

/// What the source does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum SourceAction {
    /// Nothing: late or repeated.
    Ignore,
    SendOffer(Turn),
    /// Copy pages while the program runs, as the strategy says.
    Copy(Turn),
    /// Pause the program, say which pages the destination lacks, then send PREPARE and its state.
    PauseAndPrepare(Turn),
    /// Tell the program to stop for good, then send COMMIT.
    StopAndCommit(Turn),
    /// Send COMMIT again.
    CommitAgain(Turn),
    /// Let the program run on.
    Resume,
    /// The same, then send OFFER of the next attempt.
    ResumeAndOffer(Turn),
    /// The regions may be freed; send RELEASED.
    Release(Turn),
    /// Send RELEASED again. The regions are no longer this migration's: their memory may have found another use.
    ReleasedAgain(Turn),
    /// Tell the program to stop for good, if it runs, then send DEPOSED.
    StopAndSayDeposed(Turn),
    /// Send ABORT: another attempt has the program, or is about to.
    Refuse,
}

/// The source's half.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct SourceHandover {
    state: SourceState,
    epoch: u64,
    /// Sessions whose destinations may take over, the latest last.
    standbys: Vec<SessionId>,
}

/// Standbys that are remembered.
const STANDBYS_MAX: usize = 64;

/// The number of an owner that took over without the source's word: above that of any attempt of the source's since, of which there are fewer than this has room for.
fn raised(epoch: u64) -> u64 {
    const ATTEMPTS: u64 = 1 << 32;
    (epoch / ATTEMPTS).saturating_add(1).saturating_mul(ATTEMPTS)
}

impl SourceHandover {
    /// The program runs here, as the owner numbered `epoch`.
    pub(crate) fn new(epoch: u64) -> SourceHandover {
        SourceHandover { state: SourceState::Running, epoch, standbys: Vec::new() }
    }

    pub(crate) fn state(&self) -> SourceState {
        self.state
    }

    fn next(&mut self, session: SessionId) -> Turn {
        self.epoch += 1;
        Turn { session, epoch: self.epoch }
    }

    fn remember(&mut self, session: SessionId) {
        self.standbys.retain(|known| *known != session);
        if self.standbys.len() >= STANDBYS_MAX {
            self.standbys.remove(0);
        }
        self.standbys.push(session);
    }

    pub(crate) fn on(&mut self, event: SourceEvent) -> SourceAction {
        use SourceAction::{
            CommitAgain, Copy, Ignore, PauseAndPrepare, Refuse, Release, ReleasedAgain, Resume, ResumeAndOffer, SendOffer,
            StopAndCommit, StopAndSayDeposed,
        };
        use SourceState::{Committed, Copying, Deposed, Offered, Paused, Released, Running};
        let (state, action) = match (self.state, event) {
            (Running, SourceEvent::Take(session)) => {
                let turn = self.next(session);
                (Offered(turn), SendOffer(turn))
            }
            // Its stream broke, as it seems: this attempt ends here, and what is still on the way of it comes too late. Its READY must never get a yes.
            (Offered(turn) | Copying(turn), SourceEvent::Take(session)) if turn.session == session => {
                let turn = self.next(session);
                (Offered(turn), SendOffer(turn))
            }
            (Paused(turn), SourceEvent::Take(session)) if turn.session == session => {
                let turn = self.next(session);
                (Offered(turn), ResumeAndOffer(turn))
            }
            (Committed(turn) | Released(turn), SourceEvent::Take(session)) if turn.session == session => {
                (self.state, CommitAgain(turn))
            }
            (_, SourceEvent::Take(_)) => (self.state, Refuse),

            (Copying(turn), SourceEvent::StandsBy(of)) if turn == of => {
                self.remember(turn.session);
                (self.state, Ignore)
            }
            (_, SourceEvent::StandsBy(_)) => (self.state, Ignore),

            (Deposed(turn), SourceEvent::Depose(by)) if turn == by => (self.state, StopAndSayDeposed(by)),
            // What was committed to somebody else is not the standby's to take.
            (Committed(turn) | Released(turn), SourceEvent::Depose(by)) if turn.session != by.session => (self.state, Refuse),
            (Deposed(_), SourceEvent::Depose(_)) => (self.state, Refuse),
            (_, SourceEvent::Depose(by)) if by.epoch > self.epoch && self.standbys.contains(&by.session) => {
                self.epoch = by.epoch;
                (Deposed(by), StopAndSayDeposed(by))
            }
            (_, SourceEvent::Depose(_)) => (self.state, Refuse),

            (Offered(turn), SourceEvent::Mapped(of)) if turn == of => (Copying(turn), Copy(turn)),
            (Copying(turn) | Paused(turn), SourceEvent::Mapped(of)) if turn == of => (self.state, Ignore),

            (Copying(turn), SourceEvent::Copied(of)) if turn == of => (Paused(turn), PauseAndPrepare(turn)),
            (_, SourceEvent::Copied(_)) => (self.state, Ignore),

            // The one step in which the program changes hands.
            (Paused(turn), SourceEvent::Ready(of)) if turn == of => (Committed(turn), StopAndCommit(turn)),
            (Committed(turn) | Released(turn), SourceEvent::Ready(of)) if turn == of => (self.state, CommitAgain(turn)),

            (Committed(turn), SourceEvent::Complete(of)) if turn == of => (Released(turn), Release(turn)),
            (Released(turn), SourceEvent::Complete(of)) if turn == of => (self.state, ReleasedAgain(turn)),
            (_, SourceEvent::Mapped(_) | SourceEvent::Ready(_) | SourceEvent::Complete(_)) => (self.state, Refuse),

            (Offered(turn) | Copying(turn), SourceEvent::Failed(of)) if turn == of => (Running, Ignore),
            (Paused(turn), SourceEvent::Failed(of)) if turn == of => (Running, Resume),
            // After the commit no failure gives it back.
            (_, SourceEvent::Failed(_)) => (self.state, Ignore),
        };
        self.state = state;
        action
    }
}

/// What the destination knows of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DestinationState {
    /// TAKE was sent, for the first time or because the stream of an attempt broke.
    Asked,
    /// The regions are mapped, MAPPED was sent.
    Mapped,
    /// The state is here and READY was sent: only the source knows who owns the program.
    Ready,
    /// It belongs to this end.
    Owner,
    /// And all its pages are here.
    Complete,
    /// A standby has taken it over without the source's word.
    TookOver,
    /// It never will.
    Failed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DestinationEvent {
    /// OFFER.
    Offer { epoch: u64 },
    /// PREPARE and all of the state.
    Prepared { epoch: u64 },
    /// COMMIT.
    Commit { epoch: u64 },
    /// All pages are here.
    AllHere,
    /// RELEASED.
    Released { epoch: u64 },
    /// ABORT.
    Abort,
    /// The stream ended without a word.
    Lost,
    /// The time for the source's answer is over.
    TimedOut,
    /// The caller of a standby that holds a point says that the source is lost.
    TakeOver,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DestinationAction {
    Ignore,
    /// Map the regions, if they are not, then send MAPPED.
    MapAndSayMapped,
    SendReady,
    /// The program is here: send RESUMED and let it run.
    Run,
    SendComplete,
    /// The source has let go.
    Finish,
    /// Connect again and send TAKE with the same session.
    AskAgain,
    /// The program is here as it was at the last point: let it run, and tell the source, if it ever comes back, with the epoch that is now this end's.
    RunAndDepose,
    /// Drop the regions and report.
    GiveUp,
}

/// The destination's half.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DestinationHandover {
    state: DestinationState,
    /// Of the attempt that it takes part in; zero before an offer.
    epoch: u64,
}

impl DestinationHandover {
    pub(crate) fn new() -> DestinationHandover {
        DestinationHandover { state: DestinationState::Asked, epoch: 0 }
    }

    pub(crate) fn state(&self) -> DestinationState {
        self.state
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    pub(crate) fn on(&mut self, event: DestinationEvent) -> DestinationAction {
        use DestinationAction::{AskAgain, Finish, GiveUp, Ignore, MapAndSayMapped, Run, RunAndDepose, SendComplete, SendReady};
        use DestinationEvent::{Abort, AllHere, Commit, Lost, Offer, Prepared, Released, TakeOver, TimedOut};
        use DestinationState::{Asked, Complete, Failed, Mapped, Owner, Ready, TookOver};
        let own = self.epoch;
        let (state, action) = match (self.state, event) {
            // The next attempt: the one before, if there was one, is over and has not committed.
            (Asked | Mapped | Ready, Offer { epoch }) if epoch > own => {
                self.epoch = epoch;
                (Mapped, MapAndSayMapped)
            }
            (Mapped, Prepared { epoch }) if epoch == own => (Ready, SendReady),
            (Ready, Commit { epoch }) if epoch == own => (Owner, Run),
            // COMMIT again answers a TAKE that asked again: the source listens.
            (Complete, Commit { epoch }) if epoch == own => (Complete, SendComplete),
            (Asked | Mapped | Ready | Failed, TakeOver) if own > 0 => {
                self.epoch = raised(own);
                (TookOver, RunAndDepose)
            }
            (Owner, AllHere) => (Complete, SendComplete),
            (Complete, Released { epoch }) if epoch == own => (Complete, Finish),
            // Nothing was promised yet: the program runs at the source. What has come of it is of use when it is asked for again.
            (Asked, Lost) if own == 0 => (Failed, GiveUp),
            (Asked | Mapped, Lost) => (Asked, AskAgain),
            (Asked | Mapped, TimedOut | Abort) => (Failed, GiveUp),
            // The source may have committed: ask. Once it owns the program it only asks to say that it has all pages.
            (Ready | Owner | Complete, Lost) => (self.state, AskAgain),
            // The source says that it did not commit; or nobody says anything: then this end must not run, whatever the source did.
            (Ready, Abort | TimedOut) => (Failed, GiveUp),
            _ => (self.state, Ignore),
        };
        self.state = state;
        action
    }
}

#[cfg(test)]
mod tests;
