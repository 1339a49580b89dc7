//! Moves the memory of a running program between hosts.

#![deny(unsafe_op_in_unsafe_fn, missing_docs)]

mod error;
#[doc(hidden)]
pub mod fuzzing;
mod net;
mod page;
mod page_store;
mod stats;

pub use error::{NetError, RegionError, StoreError};
pub use page::{Extent, PageSize};
pub use page_store::{Content, PULL_EXTENT_BYTES, PageStore, Pull, ReadAfterRead, Run};
pub use stats::{HOPS, Hop, Hops, Latency, Stats};
