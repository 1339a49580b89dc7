//! A region whose program runs elsewhere still.
//!
//! Role: takes what a source sends before and after the program moves. Neighbours: `migrate::arrival` calls it. Invariants: until [`attach`](Region::attach) it is plain memory that
//! nobody runs on, and each page that came holds something, zeros too; from then on a page that came is never overwritten, and one that did not is missing and waited for (S1).

use super::{Paged, Region, WeakRegion};
use crate::{
    Content, Extent, FaultAround, LossPolicy, PageStore, Pager, RegionError, Run,
    pager::{Around, Core, Engine, explain},
    sys::{Features, Stop, Trap, Userfault},
};
use nix::errno::Errno;
use std::{sync::Arc, time::Duration};

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

    /// Begins to take its pages in. Before [`attach`](Region::attach) only.
    pub(crate) fn landing(&self) -> Result<Landing, RegionError> {
        let uffd = match Userfault::open(Features::default()).map_err(|error| explain(&error))? {
            Ok(uffd) => uffd,
            Err(errno) => return Err(RegionError::system("UFFDIO_API", errno)),
        };
        let mapping = self.mapping();
        let registered = uffd.register(mapping.address(), mapping.len(), Trap::Missing);
        registered.map_err(|error| RegionError::system("UFFDIO_REGISTER", error))?;
        Ok(Landing { region: self.clone(), uffd })
    }

    /// The program is about to run here: what `lacking` names is missing from now on and comes from upstream, everything else is here.
    pub(crate) fn attach(&self, upstream: Upstream, lacking: &[Extent]) -> Result<(), RegionError> {
        let Upstream { pager, store, fault_around, loss } = upstream;
        let page = self.inner.page;
        let range = |extent: &Extent| (page.offset_of(extent.first()), usize::try_from(extent.bytes(page)).unwrap_or(usize::MAX));
        self.mapping().discard_all(&lacking.iter().map(range).collect::<Vec<_>>())?;
        let around = fault_around.unwrap_or(pager.options().fault_around);
        let around = Around::new(around.base_pages, around.max_pages, around.ahead_pages);
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

/// Puts pages of a region in place while nobody runs on it. A page that came for the first time is made of what came, where a write to it would have the kernel clear it
/// first, one fault each. A touch of a page that has not come would wait until this is dropped.
pub(crate) struct Landing {
    region: Region,
    uffd: Userfault,
}

/// How often memory that is short is asked for again, a millisecond apart: reclaim may help.
const TRIES: u32 = 1000;

impl Landing {
    /// Puts whole pages in place, over what was there.
    pub(crate) fn put(&self, run: &Run) -> Result<(), RegionError> {
        let (mapping, page) = (self.region.mapping(), self.region.inner.page);
        let offset = page.offset_of(run.extent.first());
        let len = usize::try_from(run.extent.bytes(page)).unwrap_or(usize::MAX);
        // Checked here: what follows goes by addresses.
        let address = mapping.address_of(offset, len)?;
        let (mut at, mut tries) = (0, 0);
        while at < len {
            let (call, (done, stop)) = match &run.content {
                Content::Bytes(bytes) => ("UFFDIO_COPY", self.uffd.copy(address + at, &bytes[at..], true, false)),
                // A page that holds nothing would be taken for one that is missing.
                Content::Zero => ("UFFDIO_ZEROPAGE", self.uffd.zero(address + at, len - at)),
            };
            at += done;
            match stop {
                None => {}
                Some(Stop::AlreadyHere) => match &run.content {
                    Content::Bytes(bytes) => {
                        let until = len.min(at + page.len());
                        mapping.write_at(offset + at as u64, &bytes[at..until])?;
                        at = until;
                    }
                    Content::Zero => mapping.discard(offset + at as u64, len - at)?,
                },
                Some(Stop::Again) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(Duration::from_millis(1));
                }
                Some(Stop::Again) => return Err(RegionError::system(call, Errno::ENOMEM)),
                Some(Stop::Gone) => return Err(RegionError::system(call, Errno::ENOENT)),
                Some(Stop::Exited) => return Err(RegionError::system(call, Errno::ESRCH)),
                Some(Stop::Failed(errno)) => return Err(RegionError::system(call, errno)),
            }
        }
        Ok(())
    }
}

impl WeakRegion {
    /// Installs what of these runs is missing; `false` if the region is gone. Waits for room, not for the install.
    pub(crate) async fn push_in(&self, runs: Vec<Run>) -> Result<bool, RegionError> {
        let Some((engine, id)) = self.paged() else { return Ok(false) };
        Engine::push_in(engine, id, runs).await.map(|()| true)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PageSize;

    #[test]
    fn what_lands_is_what_came_last_and_zeros_are_there_too() {
        let page = PageSize::KIB_4;
        let region = Region::builder().name("landing").size(8 * page.bytes()).open().unwrap();
        let landing = region.landing().unwrap();
        let bytes = |first: u64, with: &[u8]| {
            let content: Vec<u8> = with.iter().flat_map(|with| vec![*with; page.len()]).collect();
            Run::bytes(Extent::between(first, first + with.len() as u64), content.into())
        };
        // Pages that are there in the middle of ones that are not, and the other way round.
        for run in [bytes(1, &[1]), bytes(0, &[2, 3, 4]), Run::zero(Extent::between(2, 5)), bytes(4, &[5, 6]), bytes(3, &[7])] {
            landing.put(&run).unwrap();
        }
        assert!(matches!(landing.put(&bytes(7, &[1, 1])), Err(RegionError::OutOfRange { .. })));
        drop(landing);
        let (mut there, start) = (Vec::new(), region.mapping().address());
        let pagemap = crate::sys::Pagemap::open().unwrap();
        pagemap.read(start, region.mapping().len(), |_, bits| there.push(bits.populated())).unwrap();
        assert_eq!(there, [true, true, true, true, true, true, false, false]);
        for (at, expected) in (0..6).zip([2, 3, 0, 7, 5, 6]) {
            let mut found = vec![1; page.len()];
            region.read_at(page.offset_of(at), &mut found).unwrap();
            assert!(found.iter().all(|byte| *byte == expected), "page {at} holds {} and not {expected}", found[0]);
        }
    }
}
