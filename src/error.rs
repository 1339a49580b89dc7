//! Words: what can go wrong, one enum per kind of operation, with numbers and the remedy.
//!
//! Role: every cause a caller can tell apart is a variant. Neighbours: imported by all, imports only `page`.
//! Invariants: a detailed error is never turned into a vaguer one on its way up; an errno is carried, not swallowed.

use crate::Extent;
use std::{io, sync::Arc, time::Duration};
use thiserror::Error;

/// A store could not read, write or flush. Cheap to clone: one failure may answer many waiters.
///
/// ```
/// use pageferry::{Extent, StoreError};
/// let error = StoreError::OutOfRange { extent: Extent::page(9), store_pages: 4 };
/// assert_eq!(error.to_string(), "pages 9..10 reach past the store's 4 pages");
/// assert!(!error.is_transient());
/// ```
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The extent ends past the store.
    #[error("{extent} reach past the store's {store_pages} pages")]
    OutOfRange {
        /// What was asked for.
        extent: Extent,
        /// What there is.
        store_pages: u64,
    },
    /// A buffer or an answer does not have the length of its extent.
    #[error("expected {expected_bytes} bytes for the extent, got {got_bytes}")]
    WrongLength {
        /// The extent's length.
        expected_bytes: u64,
        /// The buffer's length.
        got_bytes: u64,
    },
    /// The store, or the grant that this program has for it, allows no writes.
    #[error("the store is read-only; ask its owner for a read-write grant")]
    ReadOnly,
    /// The operating system refused a read, write or flush.
    #[error("{operation} failed at {extent}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Where.
        extent: Extent,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// The peer cannot be reached now; trying again may help.
    #[error("peer {peer} cannot be reached: {reason}")]
    Unreachable {
        /// Who.
        peer: String,
        /// What the connection met.
        reason: String,
    },
    /// The peer answered with an error.
    #[error("peer refused: {message} (code {code})")]
    Refused {
        /// The protocol's error code, docs/protocol.md.
        code: u16,
        /// The peer's words.
        message: String,
    },
    /// The peer sent something that the protocol forbids.
    #[error("peer broke the protocol: {0}")]
    Protocol(String),
    /// What a frozen region held here at its moment cannot be had any more.
    #[error("what {extent} of the frozen region held is gone: {reason}")]
    Gone {
        /// Which pages.
        extent: Extent,
        /// Why, and what to do about it the next time.
        reason: &'static str,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

impl StoreError {
    /// Whether the same call may succeed later without anybody changing anything: the peer is away.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Unreachable { .. })
    }
}

/// A region could not be opened, read, written or populated.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum RegionError {
    /// The size is zero or cannot be rounded up to whole pages.
    #[error("a region of {size_bytes} bytes cannot be made: the size must be at least 1 and fit the address space")]
    InvalidSize {
        /// What was asked for.
        size_bytes: u64,
    },
    /// The fixed address is in use.
    #[error(
        "address {address:#x} (+{size_bytes} bytes) is already in use by this process; choose another, or map the region before what took it"
    )]
    AddressTaken {
        /// The wanted start.
        address: usize,
        /// The wanted length.
        size_bytes: u64,
    },
    /// The fixed address is not the start of a page, or outside what user space may map.
    #[error("address {address:#x} cannot be mapped: it must be a multiple of {page_bytes} and inside user space")]
    InvalidAddress {
        /// The wanted start.
        address: usize,
        /// The page size.
        page_bytes: u64,
    },
    /// A system call on the mapping failed.
    #[error("{call} failed: {source}")]
    System {
        /// Which call.
        call: &'static str,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// This kernel or user may not use userfaultfd; the text says why and what to do.
    #[error("userfaultfd is not available: {reason}; {remedy}")]
    NoUserfaultfd {
        /// What was met.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// A memory budget cannot be kept.
    #[error("a budget of {budget_bytes} bytes cannot be kept: {reason}; {remedy}")]
    Budget {
        /// What may be here.
        budget_bytes: u64,
        /// What was met.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// The region is larger than the store that shall fill it.
    #[error("the region of {size_bytes} bytes is larger than its store of {store_bytes} bytes")]
    StoreTooSmall {
        /// The store's size.
        store_bytes: u64,
        /// The region's size.
        size_bytes: u64,
    },
    /// The store counts in other pages than this kernel.
    #[error("the store's pages have {store_bytes} bytes, this kernel's {region_bytes}; serve it with the same page size")]
    PageSizeDiffers {
        /// The store's page size.
        store_bytes: u64,
        /// This kernel's page size.
        region_bytes: u64,
    },
    /// The range does not lie inside the region.
    #[error("{len} bytes from offset {offset} reach past the region's {size_bytes} bytes")]
    OutOfRange {
        /// Start of the range in bytes.
        offset: u64,
        /// Its length in bytes.
        len: u64,
        /// The region's size in bytes.
        size_bytes: u64,
    },
    /// A typed view was asked for at an offset that its type cannot have.
    #[error("offset {offset} is not a multiple of {align}")]
    Misaligned {
        /// The offset in bytes.
        offset: u64,
        /// The alignment the type needs.
        align: usize,
    },
    /// The pages were given up by the region's loss policy; touching them raises SIGBUS.
    #[error("{extent} are lost: {cause}")]
    Lost {
        /// Which pages.
        extent: Extent,
        /// What the store met last.
        cause: StoreError,
    },
    /// Writes cannot be followed here; the text says why and what to do.
    #[error("writes cannot be followed: {reason}; {remedy}")]
    NoTracker {
        /// What was met.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// The region was opened to be read.
    #[error("region {region:?} was opened read-only")]
    ReadOnly {
        /// Its name.
        region: String,
    },
    /// Somebody follows the writes to this region already.
    #[error("the writes to region {region:?} are followed already; drop the other `Tracking` first")]
    AlreadyTracked {
        /// Its name.
        region: String,
    },
    /// This tracker cannot be asked while the program writes.
    #[error("{tracker} cannot be asked while the program runs: pause it, and take with `Program::Paused`")]
    MustPause {
        /// Which tracker.
        tracker: crate::TrackerKind,
    },
    /// The region cannot be frozen; the text says why and what to do.
    #[error("the region cannot be frozen: {reason}; {remedy}")]
    CannotFreeze {
        /// What was met.
        reason: String,
        /// What to do about it.
        remedy: String,
    },
    /// The region is frozen already, at another moment.
    #[error("region {region:?} is frozen already; clone the other `Frozen`, or drop it first")]
    AlreadyFrozen {
        /// Its name.
        region: String,
    },
    /// The pager of this region has stopped.
    #[error("the pager has stopped; open the region with a new one")]
    PagerStopped,
    /// The store of the region failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl RegionError {
    pub(crate) fn system(call: &'static str, source: impl Into<io::Error>) -> RegionError {
        RegionError::System { call, source: Arc::new(source.into()) }
    }
}

/// A connection to a peer could not be made or a server could not be started.
#[derive(Clone, Debug, Error)]
#[non_exhaustive]
pub enum NetError {
    /// The socket could not be opened or set up.
    #[error("{call} on {address} failed: {source}")]
    Socket {
        /// Which call.
        call: &'static str,
        /// Which address.
        address: std::net::SocketAddr,
        /// Why.
        #[source]
        source: Arc<io::Error>,
    },
    /// No connection within the time allowed.
    #[error("no connection to {address} within {waited:?}: {reason}")]
    NoConnection {
        /// Who was called.
        address: std::net::SocketAddr,
        /// For how long.
        waited: Duration,
        /// What was met last.
        reason: String,
    },
    /// The two ends do not know each other: wrong id, no certificate, not let in, or no common protocol version.
    #[error("peer at {address} and this end do not accept each other: {reason}")]
    Rejected {
        /// Who was called.
        address: std::net::SocketAddr,
        /// What TLS or the peer said.
        reason: String,
    },
    /// An identity could not be used for TLS.
    #[error("this identity cannot be used: {reason}")]
    Identity {
        /// What TLS said.
        reason: String,
    },
    /// The peer refused a request.
    #[error("peer refused: {message} (code {code})")]
    Refused {
        /// The protocol's error code, docs/protocol.md.
        code: u16,
        /// The peer's words.
        message: String,
    },
    /// The peer sent something that the protocol forbids.
    #[error("peer broke the protocol: {0}")]
    Protocol(String),
    /// An option has a value outside its range.
    #[error("option {option} is {value}, allowed is {allowed}")]
    InvalidOption {
        /// The option's name.
        option: &'static str,
        /// What was given.
        value: String,
        /// What may be given.
        allowed: String,
    },
    /// This end was shut down.
    #[error("this end was shut down")]
    Closed,
}
