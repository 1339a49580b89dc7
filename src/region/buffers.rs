//! Memory into which live pages are copied to be sent.
//!
//! Role: keeps it for the next copy. Neighbours: `serve` copies a region's pages into it. Invariants: what was given away is never written again while anybody holds it.
//!
//! The allocator takes pieces of this size from the kernel and gives them back: each would be faulted in page by page, which costs as much as the copy. And memory that is kept as it is need not be
//! cleared before it is written over.

use bytes::Bytes;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

/// Smaller pieces the allocator keeps by itself.
const LARGE_BYTES: usize = 32 * 1024;
/// Pieces that may be on their way out while the next is filled: 8 MiB of bulk.
const KEPT: usize = 32;

/// See the module header.
#[derive(Debug, Default)]
pub(super) struct Buffers(Mutex<VecDeque<Arc<Vec<u8>>>>);

/// The beginning of a piece, for whoever sends it.
struct Filled {
    piece: Arc<Vec<u8>>,
    len: usize,
}

impl AsRef<[u8]> for Filled {
    fn as_ref(&self) -> &[u8] {
        &self.piece[..self.len]
    }
}

impl Buffers {
    /// As many bytes as `fill` puts there; what it does not, is anything.
    pub(super) fn fill<E>(&self, len: usize, fill: impl FnOnce(&mut [u8]) -> Result<(), E>) -> Result<Bytes, E> {
        if len < LARGE_BYTES {
            let mut bytes = vec![0; len];
            return fill(&mut bytes).map(|()| bytes.into());
        }
        let mut piece = self.piece();
        let bytes = match Arc::get_mut(&mut piece) {
            Some(bytes) => bytes,
            // Somebody sends it still: the path is slower than this end.
            None => {
                piece = Arc::default();
                Arc::make_mut(&mut piece)
            }
        };
        if bytes.len() < len {
            bytes.resize(len, 0);
        }
        let filled = fill(&mut bytes[..len]);
        self.kept().push_back(piece.clone());
        filled.map(|()| Bytes::from_owner(Filled { piece, len }))
    }

    /// The oldest, which is the likeliest to have been sent, if there are enough.
    fn piece(&self) -> Arc<Vec<u8>> {
        let mut kept = self.kept();
        if kept.len() >= KEPT { kept.pop_front() } else { None }.unwrap_or_default()
    }

    fn kept(&self) -> std::sync::MutexGuard<'_, VecDeque<Arc<Vec<u8>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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
        let lens = [LARGE_BYTES, 3 * LARGE_BYTES, 100, 2 * LARGE_BYTES];
        let held: Vec<Bytes> = (0..100).map(|with| filled(with, lens[usize::from(with) % 4])).collect();
        for (with, bytes) in (0u8..).zip(&held) {
            assert!(bytes.iter().all(|byte| *byte == with), "piece {with} was written again");
        }
        drop(held);
        let before: Vec<*const u8> = (0..KEPT).map(|_| filled(1, LARGE_BYTES).as_ptr()).collect();
        let after: Vec<*const u8> = (0..KEPT).map(|_| filled(2, LARGE_BYTES).as_ptr()).collect();
        assert_eq!(before, after);
    }
}
