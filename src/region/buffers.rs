//! Memory into which live pages are copied to be sent.
//!
//! Role: keeps it for the next copy. Neighbours: `serve` and `frozen` copy a region's pages into it. Invariants: what was given away is never written again while anybody holds it.
//!
//! The allocator takes pieces of this size from the kernel and gives them back: each would be faulted in page by page, which costs as much as the copy. And memory that is kept as it is need not be
//! cleared before it is written over.

use crate::{
    PULL_EXTENT_BYTES, RegionError,
    sys::{Copies, Mapping, Piece},
};
use bytes::Bytes;
use std::sync::{Arc, OnceLock};

/// Smaller copies are the allocator's.
const LARGE_BYTES: usize = 32 * 1024;
/// Pieces that may be on their way out while the next is filled: 8 MiB of bulk. Beyond that the path is slower than this end, and the allocator fast enough.
const PIECES: usize = 32;

/// See the module header.
#[derive(Debug, Default)]
pub(super) struct Buffers(OnceLock<Option<Arc<Copies>>>);

impl Buffers {
    /// As many bytes as `fill` puts there; what it does not, is anything.
    pub(super) fn fill<E>(&self, len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Bytes, E> {
        match self.piece(len) {
            Some(mut piece) => fill(piece.resize(len)).map(|()| Bytes::from_owner(piece)),
            None => {
                let mut bytes = vec![0; len];
                fill(&mut bytes).map(|()| bytes.into())
            }
        }
    }

    /// Bytes of memory that others may write meanwhile, all of it resident.
    pub(super) fn copy(&self, mapping: &Mapping, offset: u64, len: usize) -> Result<Bytes, RegionError> {
        match self.piece(len) {
            Some(mut piece) => mapping.copy_live(offset, len, &mut piece).map(|()| Bytes::from_owner(piece)),
            None => {
                let mut bytes = vec![0; len];
                mapping.read_live(offset, &mut bytes).map(|()| bytes.into())
            }
        }
    }

    fn piece(&self, len: usize) -> Option<Piece> {
        let piece_bytes = usize::try_from(PULL_EXTENT_BYTES).ok()?;
        if !(LARGE_BYTES..=piece_bytes).contains(&len) {
            return None;
        }
        let made = || {
            let made = Copies::new(PIECES, piece_bytes);
            // A seccomp profile may forbid it.
            made.inspect_err(|error| tracing::debug!(%error, "memory for copies is allocated each time")).ok()
        };
        self.0.get_or_init(made).as_ref()?.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn what_is_held_is_not_written_again_and_what_is_not_is_used_again() {
        let buffers = Buffers::default();
        let filled = |with: u8, len: usize| {
            let fill = |into: &mut [u8]| {
                into.fill(with);
                Ok::<(), Infallible>(())
            };
            let bytes = buffers.fill(len, fill).unwrap();
            assert_eq!(bytes.len(), len);
            bytes
        };
        let lens = [LARGE_BYTES, 3 * LARGE_BYTES, 100, 2 * LARGE_BYTES, 20 * LARGE_BYTES];
        let held: Vec<Bytes> = (0..100).map(|with| filled(with, lens[usize::from(with) % 5])).collect();
        for (with, bytes) in (0u8..).zip(&held) {
            assert!(bytes.iter().all(|byte| *byte == with), "piece {with} was written again");
        }
        drop(held);
        let places: Vec<*const u8> = (0..100).map(|_| filled(1, LARGE_BYTES).as_ptr()).collect();
        assert!(places.iter().all(|place| *place == places[0]), "the piece that is in the cache was not used again");
    }
}
