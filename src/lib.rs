#![doc = include_str!("../README.md")]
// Lints of the library alone; those of every target stand in Cargo.toml.
#![deny(
    unsafe_code,         // `sys` allows it, on its `mod` line; nothing else does
    missing_docs,        // what is public is documented
    clippy::unwrap_used, // nothing panics across the API
    clippy::expect_used  // the same
)]
#![warn(unreachable_pub)] // `pub` means public, what is not says `pub(crate)`; only a warning, so that half-done work still builds

mod error;
mod flow;
#[doc(hidden)]
pub mod fuzzing;
mod migrate;
mod mount;
mod net;
mod options;
mod page;
mod page_store;
mod pager;
mod region;
mod service;
mod stats;
mod store;
#[allow(unsafe_code, reason = "the one place for it")]
mod sys;

pub use error::{NetError, RegionError, StoreError};
pub use migrate::{
    AtLimit, Departed, Destination, DestinationBuilder, Gate, GateThread, MoveError, MoveEvent, Moved, Pass, PauseError, Point,
    Source, SourceBuilder, Standby, StandbyOptions, Strategy,
};
pub use migrate::{FrozenProgram, Snapshot, SnapshotBuilder, SnapshotError, SnapshotProgress};
pub use mount::{Mount, MountBuilder, MountError, MountEvent, MountProgress, Pushed, WorkingSet, WorkingSetError};
pub use net::{
    Grant, Identity, IdentityError, LinkControl, LinkShape, LinkShapeError, Peer, PeerBuilder, PeerId, PeerIdError, RemoteStore,
    Server, ServerBuilder, TransportOptions, Trust,
};
pub use options::{FaultAround, Loss, LossPolicy, OnLoss, PagerOptions, PullOrder, RegionEvent, TrackerKind, Verdict};
pub use page::{Extent, PageSize};
pub use page_store::{Content, PULL_EXTENT_BYTES, PageStore, Pull, ReadAfterRead, Run};
pub use pager::Pager;
pub use region::{Capabilities, Frozen, Program, Region, RegionBuilder, RegionStore, ResidencySnapshot, Tracking, Written};
pub use service::{DEFAULT_POLL_BUDGET, Service};
pub use stats::{HOPS, Hop, Hops, Latency, Stats};
pub use store::{CacheBuilder, CacheDurability, CacheStatus, CacheStore, FileStore, MemoryStore};
#[doc(hidden)]
pub use store::{conformance, testing};
