//! A region whose program runs elsewhere still.
//!
//! Role: takes what a source sends before and after the program moves. Neighbours: `migrate::arrival` calls it. Invariants: until [`attach`](Region::attach) it is plain memory that
//! nobody runs on, and each page that came holds something, zeros too; from then on a page that came is never overwritten, and one that did not is missing and waited for (S1).

use super::{Paged, Region, WeakRegion};
use crate::{
    Content, Extent, FaultAround, LossPolicy, PageStore, Pager, RegionError, Run,
    pager::{Around, Core, Engine},
    sys::Trap,
};
use std::sync::Arc;

/// Where the pages come from that were lacking when the program moved.
pub(crate) struct Upstream {
    pub(crate) pager: Pager,
    pub(crate) store: Arc<dyn PageStore>,
    pub(crate) fault_around: Option<FaultAround>,
    pub(crate) loss: LossPolicy,
}

impl Region {
    /// Whether no store fills it.
    pub(crate) fn is_plain(&self) -> bool {
        self.paged().is_none()
    }

    /// Puts pages in place, over what was there. Before [`attach`](Region::attach) only.
    pub(crate) fn put(&self, run: &Run) -> Result<(), RegionError> {
        let offset = self.inner.page.offset_of(run.extent.first());
        match &run.content {
            Content::Bytes(bytes) => self.mapping().write_at(offset, bytes),
            Content::Zero => {
                let len = usize::try_from(run.extent.bytes(self.inner.page)).unwrap_or(usize::MAX);
                self.mapping().discard(offset, len)?;
                // A page that holds nothing would be taken for one that is missing.
                run.extent.pages().try_for_each(|page| self.mapping().read_at(self.inner.page.offset_of(page), &mut [0]))
            }
        }
    }

    /// The program is about to run here: what `lacking` names is missing from now on and comes from upstream, everything else is here.
    pub(crate) fn attach(&self, upstream: Upstream, lacking: &[Extent]) -> Result<(), RegionError> {
        let Upstream { pager, store, fault_around, loss } = upstream;
        let page = self.inner.page;
        let range = |extent: &Extent| (page.offset_of(extent.first()), usize::try_from(extent.bytes(page)).unwrap_or(usize::MAX));
        self.mapping().discard_all(&lacking.iter().map(range).collect::<Vec<_>>())?;
        let around = fault_around.unwrap_or(pager.options().fault_around);
        let around = Around::new(around.base_pages, around.max_pages);
        let core = Core::lacking(self.extent().count(), lacking, around, pager.options().max_in_flight_pages);
        let paged = Paged::join(self.name(), self.mapping(), pager, core, store, loss, Some(Trap::Missing))?;
        self.inner
            .paged
            .set(Arc::new(paged))
            .map_err(|_| RegionError::System { call: "attaching a region", source: Arc::new(already()) })
    }
}

fn already() -> std::io::Error {
    std::io::Error::other("it has a store already")
}

impl WeakRegion {
    /// Installs what of a run is missing; `false` if the region is gone. Waits for room, not for the install.
    pub(crate) async fn push_in(&self, run: Run) -> Result<bool, RegionError> {
        let Some((engine, id)) = self.paged() else { return Ok(false) };
        Engine::push_in(engine, id, run).await.map(|()| true)
    }

    /// Returns when everything that was pushed in is installed.
    pub(crate) async fn settled(&self) -> Result<(), RegionError> {
        match self.paged() {
            Some((engine, _)) => Engine::settled(engine).await,
            None => Ok(()),
        }
    }

    fn paged(&self) -> Option<(std::sync::Weak<Engine>, crate::pager::RegionId)> {
        let region = self.upgrade()?;
        let paged = region.paged()?;
        Some((Arc::downgrade(paged.pager.engine()), paged.id))
    }
}
