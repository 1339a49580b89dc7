//! A region seen as a store, so that peers can be given its pages.
//!
//! Role: hop *serve* when the pages are live memory. Neighbours: `net::server` reads it on its own thread. Invariants: S2: a thread that serves peers touches
//! only pages that are resident, and where a touch could block it is made on a thread that serves nobody; S8: bytes are copied by the kernel or by atomics.

use super::{Region, buffers::Buffers};
use crate::{Extent, PageSize, PageStore, Pull, ReadAfterRead, RegionError, Run, StoreError};
use async_trait::async_trait;
use bytes::Bytes;
use std::{io, sync::Arc};

/// The pages of a region as a [`PageStore`]. Reads see what the program wrote so far, page by page; for a state that existed at one instant the
/// program must pause.
///
/// ```
/// use pageferry::{Extent, PageStore, Region, RegionStore};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let region = Region::builder().name("world").size(1 << 20).open()?;
/// region.write_at(4096, &[1; 4096])?;
/// let store = RegionStore::new(&region);
/// let mut page = [0; 4096];
/// store.read_into(Extent::page(1), &mut page).await?;
/// assert_eq!(page, [1; 4096]);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct RegionStore {
    region: Region,
    buffers: Arc<Buffers>,
}

impl RegionStore {
    /// A store that keeps the region alive.
    #[must_use]
    pub fn new(region: &Region) -> RegionStore {
        RegionStore { region: region.clone(), buffers: Arc::default() }
    }
}

pub(super) fn store_error(operation: &'static str, extent: Extent, error: RegionError) -> StoreError {
    match error {
        RegionError::Store(error) | RegionError::Lost { cause: error, .. } => error,
        other => StoreError::Io { operation, extent, source: Arc::new(io::Error::other(other)) },
    }
}

#[async_trait]
impl PageStore for RegionStore {
    fn size(&self) -> u64 {
        self.region.size_bytes()
    }

    fn page_size(&self) -> PageSize {
        self.region.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.check(extent)?;
        if extent.is_empty() {
            return Ok(Vec::new());
        }
        let page = self.page_size();
        let len = usize::try_from(extent.bytes(page)).unwrap_or(usize::MAX);
        let offset = page.offset_of(extent.first());
        let failed = |error| store_error("reading a region", extent, error);
        let bytes = if self.region.is_plain() {
            self.buffers.copy(self.region.mapping(), offset, len).map_err(failed)?
        } else {
            self.region.populate(offset..offset + len as u64).await.map_err(failed)?;
            let (region, buffers) = (self.region.clone(), self.buffers.clone());
            // A page may be discarded between the populate and the copy, and the copy then waits for the pager.
            let copy = tokio::task::spawn_blocking(move || buffers.fill(len, |into| region.read_at(offset, into)));
            copy.await.map_err(|_| StoreError::Closed)?.map_err(failed)?
        };
        Ok(vec![Run::bytes(extent, bytes)])
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.check_write(extent, bytes)?;
        let page = self.page_size();
        let offset = page.offset_of(extent.first());
        // The last page may be partial: what lies past the size is not the program's.
        let room = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes.len());
        let (region, bytes) = (self.region.clone(), Bytes::copy_from_slice(&bytes[..room]));
        let copy = tokio::task::spawn_blocking(move || region.write_at(offset, &bytes));
        copy.await.map_err(|_| StoreError::Closed)?.map_err(|error| store_error("writing a region", extent, error))
    }

    /// Memory is as durable as it gets.
    async fn flush(&self) -> Result<(), StoreError> {
        Ok(())
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        extents.iter().try_for_each(|extent| self.check(*extent))?;
        Ok(Box::new(ReadAfterRead::new(self.clone(), extents)))
    }
}
