//! [`MemoryStore`]: pages in this process's heap.
//!
//! Role: the simplest store, and the baseline of latency measurements: a read is a lookup and a reference count. Neighbours: `Layout`
//! cuts extents into chunks. Invariants: a chunk is padded with zeros to whole pages; bytes that a reader holds never change
//! (copy on write); lock order is table, then chunk, and no lock is held across an await.

use super::{Layout, pull_by_reading};
use crate::{Extent, PageSize, PageStore, Pull, Run, StoreError};
use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, PoisonError, RwLock},
};

/// Pages in memory. A clone is another handle to the same pages.
///
/// Contents are kept as chunks of 1 MiB (one page, where a page is larger); a chunk never written takes no memory, so that a sparse
/// store may be far larger than the machine. Reads copy nothing: a run is a slice of its chunk, one run a chunk, and stretches
/// without chunks are [`Content::Zero`](crate::Content). A write into a chunk that a reader still holds copies the chunk first;
/// otherwise it happens in place. Running out of memory aborts, as everywhere in Rust.
///
/// ```
/// use pageferry::{Content, MemoryStore, PageSize, PageStore};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), pageferry::StoreError> {
/// let store = MemoryStore::from_bytes(vec![7; 5000], PageSize::KIB_4);
/// assert_eq!((store.size(), store.extent().count()), (5000, 2));
/// let runs = store.read(store.extent()).await?;
/// let Content::Bytes(bytes) = &runs[0].content else { panic!("not zero") };
/// assert_eq!((bytes.len(), bytes[4999], bytes[5000]), (8192, 7, 0));
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct MemoryStore {
    inner: Arc<Inner>,
}

struct Inner {
    layout: Layout,
    /// By index. A tree and not an array: a size is a number that somebody sent, a chunk is memory that somebody filled.
    chunks: RwLock<BTreeMap<u64, RwLock<Bytes>>>,
}

impl MemoryStore {
    /// A store of `size_bytes` zeros, which take no memory until written. Any size will do, also one that is not whole pages.
    #[must_use]
    pub fn zeroed(size_bytes: u64, page_size: PageSize) -> MemoryStore {
        let layout = Layout { size_bytes, page_size };
        MemoryStore { inner: Arc::new(Inner { layout, chunks: RwLock::default() }) }
    }

    /// A store that holds `bytes`, without a copy, except of the last chunk if it ends in a partial page.
    #[must_use]
    pub fn from_bytes(bytes: impl Into<Bytes>, page_size: PageSize) -> MemoryStore {
        let mut rest: Bytes = bytes.into();
        let layout = Layout { size_bytes: rest.len() as u64, page_size };
        let chunks = layout.pieces(layout.extent()).map(|(index, chunk)| {
            let stored = rest.split_to(layout.stored_bytes(chunk));
            (index, RwLock::new(padded(stored, chunk.bytes(page_size) as usize)))
        });
        MemoryStore { inner: Arc::new(Inner { layout, chunks: RwLock::new(chunks.collect()) }) }
    }
}

impl Inner {
    fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.layout.check(extent)?;
        let mut runs = Vec::with_capacity(1);
        let mut at = extent.first();
        // Only chunks that exist are visited: reading a huge hole is one lookup.
        for (&index, chunk) in self.chunks.read().unwrap_or_else(PoisonError::into_inner).range(self.layout.chunks(extent)) {
            let chunk_extent = self.layout.chunk(index);
            let Some(piece) = chunk_extent.intersect(extent) else { continue };
            if at < piece.first() {
                runs.push(Run::zero(Extent::between(at, piece.first())));
            }
            let contents = chunk.read().unwrap_or_else(PoisonError::into_inner);
            runs.push(Run::bytes(piece, contents.slice(self.layout.range_in(chunk_extent, piece))));
            at = piece.end();
        }
        if at < extent.end() {
            runs.push(Run::zero(Extent::between(at, extent.end())));
        }
        Ok(runs)
    }

    fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.layout.check_write(extent, bytes)?;
        for (index, piece) in self.layout.pieces(extent) {
            let stored = &bytes[self.layout.range_in(extent, piece)][..self.layout.stored_bytes(piece)];
            if !self.write_to_existing(index, piece, stored) {
                let zeros = BytesMut::zeroed(self.layout.chunk(index).bytes(self.layout.page_size) as usize).freeze();
                self.chunks.write().unwrap_or_else(PoisonError::into_inner).entry(index).or_insert(RwLock::new(zeros));
                // No chunk is ever removed, so this time it is there.
                self.write_to_existing(index, piece, stored);
            }
        }
        Ok(())
    }

    /// Writes `stored`, the part of `piece` that lies inside the store's size, to its chunk; `false` if there is no such chunk.
    fn write_to_existing(&self, index: u64, piece: Extent, stored: &[u8]) -> bool {
        let chunks = self.chunks.read().unwrap_or_else(PoisonError::into_inner);
        let Some(chunk) = chunks.get(&index) else { return false };
        let start = self.layout.range_in(self.layout.chunk(index), piece).start;
        let mut contents = chunk.write().unwrap_or_else(PoisonError::into_inner);
        let mut ours = std::mem::take(&mut *contents).try_into_mut().unwrap_or_else(|held| BytesMut::from(&held[..]));
        ours[start..start + stored.len()].copy_from_slice(stored);
        *contents = ours.freeze();
        true
    }
}

fn padded(bytes: Bytes, len: usize) -> Bytes {
    if bytes.len() == len {
        return bytes;
    }
    let mut whole = BytesMut::zeroed(len);
    whole[..bytes.len()].copy_from_slice(&bytes);
    whole.freeze()
}

#[async_trait]
impl PageStore for MemoryStore {
    fn size(&self) -> u64 {
        self.inner.layout.size_bytes
    }

    fn page_size(&self) -> PageSize {
        self.inner.layout.page_size
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.inner.read(extent)
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.write(extent, bytes)
    }

    async fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        pull_by_reading(self, extents)
    }
}

impl fmt::Debug for MemoryStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let chunks = self.inner.chunks.read().unwrap_or_else(PoisonError::into_inner).len();
        write!(f, "MemoryStore({} bytes, {:?}, {chunks} chunks in use)", self.size(), self.page_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Content;

    fn only_bytes(runs: Vec<Run>) -> Bytes {
        match <[Run; 1]>::try_from(runs).unwrap() {
            [Run { content: Content::Bytes(bytes), .. }] => bytes,
            runs => panic!("zeros: {runs:?}"),
        }
    }

    #[test]
    fn a_read_shares_the_callers_bytes() {
        let bytes = Bytes::from(vec![5; 3 << 20]);
        let store = MemoryStore::from_bytes(bytes.clone(), PageSize::KIB_4);
        let second_chunk = only_bytes(store.inner.read(Extent::between(256, 512)).unwrap());
        assert_eq!((second_chunk.len(), second_chunk.as_ptr()), (1 << 20, bytes[1 << 20..].as_ptr()));
    }

    #[test]
    fn a_write_happens_in_place_unless_a_reader_holds_the_chunk() {
        let store = MemoryStore::zeroed(1 << 20, PageSize::KIB_4);
        let address = |store: &MemoryStore| only_bytes(store.inner.read(Extent::page(0)).unwrap()).as_ptr();
        store.inner.write(Extent::page(0), &[1; 4096]).unwrap();
        let before = address(&store);
        store.inner.write(Extent::page(0), &[2; 4096]).unwrap();
        assert_eq!(address(&store), before);

        let held = only_bytes(store.inner.read(Extent::page(0)).unwrap());
        store.inner.write(Extent::page(0), &[3; 4096]).unwrap();
        assert_ne!(address(&store), before);
        assert_eq!((held[0], only_bytes(store.inner.read(Extent::page(0)).unwrap())[0]), (2, 3));
    }

    #[test]
    fn a_huge_sparse_store_costs_what_was_written() {
        let store = MemoryStore::zeroed(u64::MAX, PageSize::KIB_4);
        let all = Extent::between(0, PageSize::KIB_4.pages_for(u64::MAX));
        assert_eq!(store.inner.read(all).unwrap(), [Run::zero(all)]);
        store.inner.write(Extent::page(all.end() - 1), &[9; 4096]).unwrap();
        let runs = store.inner.read(all).unwrap();
        assert_eq!((runs.len(), runs[0].extent.count()), (2, all.end() - 256));
        assert_eq!(only_bytes(store.inner.read(Extent::page(all.end() - 1)).unwrap())[4094..], [9, 0]);
    }
}
