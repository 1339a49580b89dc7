//! Moves a running program between hosts.
//!
//! Role: the job above regions and peers: who owns the program, when it pauses, when its pages move. Neighbours: `handover` decides, `source` and `destination`
//! carry it out (each try at the source is an `attempt`, a session at the destination a `taking`), `gate` pauses the program; `rounds` decides how long pages are copied before that, `copy` and `arrival` carry
//! them, in the order of `owed`. Invariants: S6: at most one owner, ever.

mod arrival;
mod attempt;
mod copy;
mod destination;
mod follow;
mod gate;
mod handover;
mod image;
mod owed;
mod points;
mod rounds;
mod shared;
mod snapshot;
mod source;
mod stand;
mod standby;
mod strategy;
mod taking;

use crate::{NetError, RegionError, net::wire::Copying};
use std::time::Duration;
use thiserror::Error;

pub use destination::{Destination, DestinationBuilder, Moved};
pub use gate::{Gate, GateThread, Pass, PauseError};
pub use snapshot::{FrozenProgram, Snapshot, SnapshotBuilder, SnapshotError, SnapshotProgress};
pub use source::{Departed, Source, SourceBuilder};
pub use standby::{Point, Standby};
pub use strategy::{AtLimit, StandbyOptions, Strategy};

/// Something that happened in a migration, at the end that reports it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum MoveEvent {
    /// A destination asked, and was offered the program.
    Offered {
        /// The number of the owner that it would make.
        epoch: u64,
    },
    /// Pages are being copied while the program runs.
    Copying {
        /// Which round, from 1.
        round: u32,
        /// Of pages that the destination lacks.
        owed_bytes: u64,
        /// How much the program writes a second, in whole pages.
        dirty_bytes_s: u64,
        /// How much the destination takes in a second.
        bandwidth_bytes_s: u64,
        /// How long the program would pause if it moved now; unknown before enough has been sent.
        predicted_downtime: Option<Duration>,
    },
    /// The program is paused, to move.
    Paused,
    /// The program stood still for a point of its standby and runs on; what it had written is on the way.
    Point {
        /// Which point, from 1. Begins anew when the source has lost its account of the standby, as after its reconnect limit.
        number: u64,
        /// How long the program stood.
        paused: Duration,
        /// Of pages that were copied aside meanwhile.
        bytes: u64,
    },
    /// The standby has a point, whole: it could go on from there.
    Kept {
        /// Which point, as the end that reports it counts.
        number: u64,
        /// How far it was behind at that moment.
        behind: Duration,
    },
    /// No point could be made; the next one is tried in its time.
    PointMissed {
        /// Why.
        reason: String,
    },
    /// A standby has taken over without this source, whose program is to run no more.
    Deposed {
        /// The new owner's number.
        epoch: u64,
    },
    /// The program belongs to the destination.
    Committed {
        /// Its number as the owner.
        epoch: u64,
    },
    /// The destination said that the program runs there.
    Resumed,
    /// The connection broke before the commit. The program runs on at the source; the destination may come back and go on.
    Interrupted {
        /// What was met.
        reason: String,
    },
    /// The attempt failed before the commit; the program runs on at the source.
    Aborted {
        /// Why.
        reason: String,
    },
    /// Pages are coming in.
    Progress {
        /// Pages that are here.
        resident_pages: u64,
        /// Pages that will be.
        pages: u64,
    },
    /// Every page is at the destination.
    Complete,
    /// The source has let go of its copy.
    Released,
}

impl From<Copying> for MoveEvent {
    fn from(copying: Copying) -> MoveEvent {
        let Copying { round, owed_bytes, dirty_bytes_s, bandwidth_bytes_s, predicted_us } = copying;
        let predicted_downtime = (predicted_us < u64::MAX).then(|| Duration::from_micros(predicted_us));
        MoveEvent::Copying { round, owed_bytes, dirty_bytes_s, bandwidth_bytes_s, predicted_downtime }
    }
}

/// A migration failed.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum MoveError {
    /// The connection could not be made, or was refused.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A region could not be made or filled here.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The other end gave up before the commit. The program runs on at the source.
    #[error("the source called it off: {reason}")]
    Aborted {
        /// Its words.
        reason: String,
    },
    /// The connection was lost before the commit. The program runs on at the source.
    #[error("the connection was lost before the program changed hands: {reason}")]
    Lost {
        /// What was met.
        reason: String,
    },
    /// This end was ready, and then could not learn for `waited` whether the source had committed. It must not run the program; look at the source: if it committed,
    /// the program's memory is still there.
    #[error("no word from the source for {waited:?} on whether the program had changed hands ({reason}); it does not run here")]
    Unknown {
        /// For how long it was asked.
        waited: Duration,
        /// What was met last.
        reason: String,
    },
    /// A standby took the program over by its caller's word, as if this end were lost. The memory here stays as it was when the program was stopped: what was written after the
    /// standby's last point is in it alone.
    #[error("a standby has taken the program over as owner {epoch}; it must not run here")]
    TakenOver {
        /// The new owner's number.
        epoch: u64,
    },
    /// The state is larger than the protocol carries.
    #[error("the program's state has {state_bytes} bytes, at most {max_bytes} can move; keep large state in regions")]
    StateTooLarge {
        /// Its size.
        state_bytes: u64,
        /// The limit.
        max_bytes: u64,
    },
    /// The peer sent something that the protocol forbids.
    #[error("peer broke the protocol: {0}")]
    Protocol(String),
    /// This end was shut down.
    #[error("this end was shut down")]
    Closed,
}
