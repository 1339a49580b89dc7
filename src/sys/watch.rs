//! Descriptors that a runtime watches.
//!
//! Role: tells I/O when a descriptor has something, or room. Neighbours: `pager` watches its userfaultfd, `net` its sockets; `timer` its timerfd. Invariants: only types that own
//! their descriptor can be watched, so it stays open and the same until the watch is dropped.

use std::{
    io,
    net::UdpSocket,
    os::fd::{AsRawFd, OwnedFd},
};
use tokio::io::{Interest, unix::AsyncFd};

/// Owns one descriptor, answers with it each time, and closes it when dropped and not before.
pub(crate) trait OwnsDescriptor: AsRawFd {}

impl OwnsDescriptor for OwnedFd {}
impl OwnsDescriptor for UdpSocket {}

/// Watches for what `interest` says, and for nothing else: each event that is watched for wakes the thread. Called inside the runtime that shall be told.
pub(crate) fn watch<T: OwnsDescriptor>(descriptor: T, interest: Interest) -> io::Result<AsyncFd<T>> {
    // SAFETY: `OwnsDescriptor` is this module's own, given only to types that keep one descriptor open until they are dropped.
    unsafe { AsyncFd::register_with_interest(descriptor, interest) }.map_err(|error| error.into_parts().1)
}
