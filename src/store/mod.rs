//! Stores on this host: memory, files and caches of other stores as [`PageStore`]s.
//!
//! Role: the stores that need no network, the suite that every store has to pass, and the gate that tests put before one.
//! Neighbours: imports the words; used by `mount`, by servers and by tests. Invariants: what one lock guards is a chunk, which is
//! whole pages, so that no reader sees half of a write to a page; a refused call has no effect.

mod blocking;
mod cache;
pub mod conformance;
mod file;
mod memory;
pub mod testing;

pub use cache::{CacheBuilder, CacheDurability, CacheStatus, CacheStore};
pub use file::FileStore;
pub use memory::MemoryStore;

use crate::{Extent, PageSize, PageStore, Pull, ReadAfterRead, StoreError};
use std::ops::Range;

/// What one lock guards and one run holds: large enough that its cost vanishes beside a copy of it (1 MiB is about 0.1 ms), small
/// enough that a reader waits no longer than that for a writer.
const CHUNK_BYTES: u64 = 1 << 20;

/// A store's size in bytes and pages, cut into chunks of whole pages.
#[derive(Clone, Copy, Debug)]
struct Layout {
    size_bytes: u64,
    page_size: PageSize,
}

impl Layout {
    fn extent(self) -> Extent {
        Extent::between(0, self.page_size.pages_for(self.size_bytes))
    }

    /// Refuses an extent that ends past the store.
    fn check(self, extent: Extent) -> Result<(), StoreError> {
        let store_pages = self.extent().end();
        if extent.end() <= store_pages { Ok(()) } else { Err(StoreError::OutOfRange { extent, store_pages }) }
    }

    /// Refuses a write outside the store, or of more or fewer bytes than its extent has.
    fn check_write(self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check(extent)?;
        let (expected_bytes, got_bytes) = (extent.bytes(self.page_size), bytes.len() as u64);
        if got_bytes == expected_bytes { Ok(()) } else { Err(StoreError::WrongLength { expected_bytes, got_bytes }) }
    }

    /// The pages of a chunk: [`CHUNK_BYTES`], or one page where a page is larger; fewer at the end of the store.
    fn chunk(self, index: u64) -> Extent {
        let first = index * self.chunk_pages();
        Extent::between(first, self.extent().end().min(first + self.chunk_pages()))
    }

    /// An extent inside the store cut at the borders of chunks, in order, each piece with the index of its chunk.
    fn pieces(self, extent: Extent) -> impl Iterator<Item = (u64, Extent)> {
        self.chunks(extent).filter_map(move |chunk| Some((chunk, self.chunk(chunk).intersect(extent)?)))
    }

    /// The chunks that `extent` reaches into; if it is empty, perhaps one that it touches.
    fn chunks(self, extent: Extent) -> Range<u64> {
        extent.first() / self.chunk_pages()..extent.end().div_ceil(self.chunk_pages())
    }

    fn chunk_pages(self) -> u64 {
        (CHUNK_BYTES / self.page_size.bytes()).max(1)
    }

    /// Where the bytes of `piece` lie in a buffer that holds `outer`.
    fn range_in(self, outer: Extent, piece: Extent) -> Range<usize> {
        let start = Extent::between(outer.first(), piece.first()).bytes(self.page_size) as usize;
        start..start + piece.bytes(self.page_size) as usize
    }

    /// How many bytes of `extent` the store holds: all, less where the last page is partial.
    fn stored_bytes(self, extent: Extent) -> usize {
        let rest_bytes = self.size_bytes.saturating_sub(self.page_size.offset_of(extent.first()));
        extent.bytes(self.page_size).min(rest_bytes) as usize
    }
}

/// A pull of a store that has no better way than reading. Checks the whole of what is asked first: the reads would find out late, and
/// name only the step at hand.
fn pull_by_reading<S: PageStore + Clone>(store: &S, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
    let layout = Layout { size_bytes: store.size(), page_size: store.page_size() };
    extents.iter().try_for_each(|extent| layout.check(*extent))?;
    Ok(Box::new(ReadAfterRead::new(store.clone(), extents)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pieces_cover_an_extent_once_and_stay_inside_their_chunks(
            size_bytes in 1u64..5 << 20, shift in 9u32..23, first in 0u64..9000, count in 0u64..9000,
        ) {
            let layout = Layout { size_bytes, page_size: PageSize::new(1 << shift).unwrap() };
            let Some(extent) = Extent::new(first, count).unwrap().intersect(layout.extent()) else { return Ok(()) };
            let pieces: Vec<(u64, Extent)> = layout.pieces(extent).collect();
            let pages: Vec<u64> = pieces.iter().flat_map(|(_, piece)| piece.pages()).collect();
            prop_assert_eq!(pages, extent.pages().collect::<Vec<_>>());
            for (index, piece) in pieces {
                let chunk = layout.chunk(index);
                prop_assert!(chunk.covers(piece) && chunk.bytes(layout.page_size) <= CHUNK_BYTES.max(1 << shift));
            }
        }
    }

    #[test]
    fn the_largest_store_does_not_overflow() {
        let layout = Layout { size_bytes: u64::MAX, page_size: PageSize::KIB_4 };
        let last = Extent::page(layout.extent().end() - 1);
        assert_eq!(layout.stored_bytes(last), 4095);
        assert_eq!(layout.pieces(last).map(|(_, piece)| piece).collect::<Vec<_>>(), [last]);
        assert!(layout.check(Extent::new(last.end(), 1).unwrap()).is_err());
    }
}
