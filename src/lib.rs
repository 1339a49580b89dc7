//! Moves the memory of a running program between hosts.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod error;
#[doc(hidden)]
pub mod fuzzing;
mod net;
mod options;
mod page;
mod page_store;
mod pager;
mod region;
mod service;
mod stats;
mod store;
mod sys;

pub use error::{NetError, RegionError, StoreError};
pub use net::{
    Grant, Identity, IdentityError, Peer, PeerBuilder, PeerId, PeerIdError, RemoteStore, Server, ServerBuilder, TransportOptions,
    Trust,
};
pub use options::{FaultAround, Loss, LossPolicy, OnLoss, PagerOptions, RegionEvent, Verdict};
pub use page::{Extent, PageSize};
pub use page_store::{Content, PULL_EXTENT_BYTES, PageStore, Pull, ReadAfterRead, Run};
pub use pager::Pager;
pub use region::{Capabilities, Region, RegionBuilder, RegionStore, ResidencySnapshot};
pub use service::{DEFAULT_POLL_BUDGET, Service};
pub use stats::{HOPS, Hop, Hops, Latency, Stats};
pub use store::{FileStore, MemoryStore};
#[doc(hidden)]
pub use store::{conformance, testing};
