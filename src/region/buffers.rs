//! Memory into which live pages are copied to be sent.
//!
//! Role: keeps it for the next copy. Neighbours: `serve` copies a region's pages into it. Invariants: what was given away is never written again while anybody holds it.
//!
//! The allocator takes pieces of this size from the kernel and gives them back: each would be faulted in page by page, which costs as much as the copy.

use bytes::{Bytes, BytesMut};
use std::{
    collections::VecDeque,
    sync::{Mutex, PoisonError},
};

/// Smaller pieces the allocator keeps by itself.
const LARGE_BYTES: usize = 32 * 1024;
/// Pieces that may be on their way out while the next is filled: 8 MiB of bulk.
const KEPT: usize = 32;

/// See the module header.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<VecDeque<BytesMut>>);

impl Buffers {
    /// As many bytes as `fill` puts there.
    pub(super) fn fill<E>(&self, len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Bytes, E> {
        let mut buffer = BytesMut::new();
        if len >= LARGE_BYTES {
            let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            // The oldest: the likeliest to have been sent.
            if kept.len() >= KEPT {
                buffer = kept.pop_front().unwrap_or_default();
            }
        }
        // Its own memory again, if nobody holds any of it, else new.
        buffer.reserve(len);
        buffer.resize(len, 0);
        let filled = fill(&mut buffer);
        let bytes = buffer.split_to(len).freeze();
        if len >= LARGE_BYTES {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).push_back(buffer);
        }
        filled.map(|()| bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn what_is_held_is_not_written_again_and_what_is_not_is_used_again() {
        let buffers = Buffers::default();
        let filled = |with: u8| {
            let fill = |into: &mut [u8]| {
                into.fill(with);
                Ok::<(), Infallible>(())
            };
            buffers.fill(LARGE_BYTES, fill).unwrap()
        };
        let held: Vec<Bytes> = (0..100).map(filled).collect();
        for (with, bytes) in (0u8..).zip(&held) {
            assert!(bytes.iter().all(|byte| *byte == with), "piece {with} was written again");
        }
        drop(held);
        let before: Vec<*const u8> = (0..KEPT).map(|_| filled(1).as_ptr()).collect();
        let after: Vec<*const u8> = (0..KEPT).map(|_| filled(2).as_ptr()).collect();
        assert_eq!(before, after);
    }
}
