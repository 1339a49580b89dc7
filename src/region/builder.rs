//! Describes and opens a region.
//!
//! Role: the options of one region and the order of opening it. Neighbours: `sys` maps the memory, `pager` registers it. Invariants: the
//! memory is registered before anybody has its address, so no page of it was ever touched.

use super::{Inner, Paged, Region};
use crate::{
    FaultAround, LossPolicy, PageStore, Pager, RegionError,
    pager::{Around, Core},
    sys::{MapAt, Mapping, Trap, page_size},
};
use std::{
    num::NonZeroUsize,
    sync::{Arc, Mutex, OnceLock},
};

/// See [`Region::builder`].
///
/// ```
/// use pageferry::{FaultAround, LossPolicy, MemoryStore, PageSize, Region};
/// # if pageferry::Capabilities::probe().userfaultfd() {
/// let store = MemoryStore::from_bytes(vec![7; 1 << 20], PageSize::KIB_4);
/// let region = Region::builder()
///     .name("world")
///     .store(store)                           // the size is the store's
///     .fault_around(FaultAround::OFF)         // default: 64 KiB, growing when read in order
///     .loss(LossPolicy::default())            // default: 30 s of reconnecting, then SIGBUS
///     .open()?;
/// let mut byte = [0];
/// region.read_at(123_456, &mut byte)?;        // a fault, a request, a page
/// assert_eq!(byte, [7]);
/// # }
/// # Ok::<(), pageferry::RegionError>(())
/// ```
#[derive(Default)]
pub struct RegionBuilder {
    name: String,
    size_bytes: Option<u64>,
    address: Option<usize>,
    store: Option<Arc<dyn PageStore>>,
    pager: Option<Pager>,
    fault_around: Option<FaultAround>,
    loss: LossPolicy,
    in_core_dumps: bool,
    read_only: bool,
}

impl RegionBuilder {
    pub(super) fn new() -> RegionBuilder {
        RegionBuilder::default()
    }

    /// The name by which peers ask for it: 1 to 255 bytes if it shall be served. Default empty.
    #[must_use]
    pub fn name(mut self, name: impl Into<String>) -> RegionBuilder {
        self.name = name.into();
        self
    }

    /// Size in bytes, rounded up to whole pages. Default: the store's size; needed without a store.
    #[must_use]
    pub fn size(mut self, bytes: u64) -> RegionBuilder {
        self.size_bytes = Some(bytes);
        self
    }

    /// Maps it at exactly this address, so that pointers inside it survive a move to another process. Opening fails if the range is in use
    /// (`MAP_FIXED_NOREPLACE`, mmap(2)). Default: wherever the kernel likes.
    #[must_use]
    pub fn at(mut self, address: usize) -> RegionBuilder {
        self.address = Some(address);
        self
    }

    /// Where its pages come from. Default: nowhere, it is plain zeroed memory.
    #[must_use]
    pub fn store(self, store: impl PageStore) -> RegionBuilder {
        self.shared_store(Arc::new(store))
    }

    /// As [`store`](RegionBuilder::store), for a store that others use too.
    #[must_use]
    pub fn shared_store(mut self, store: Arc<dyn PageStore>) -> RegionBuilder {
        self.store = Some(store);
        self
    }

    /// Which pager answers its faults, and follows its writes. Default: [`Pager::shared`].
    #[must_use]
    pub fn pager(mut self, pager: &Pager) -> RegionBuilder {
        self.pager = Some(pager.clone());
        self
    }

    /// What comes with a fault. Default: the pager's.
    #[must_use]
    pub fn fault_around(mut self, around: FaultAround) -> RegionBuilder {
        self.fault_around = Some(around);
        self
    }

    /// What happens when the store is lost. Default: [`LossPolicy::default`].
    #[must_use]
    pub fn loss(mut self, policy: LossPolicy) -> RegionBuilder {
        self.loss = policy;
        self
    }

    /// Whether core dumps hold its content. Default no: a dump of a region that is being filled would fault in all of it, and the content may be somebody
    /// else's.
    #[must_use]
    pub fn in_core_dumps(mut self, yes: bool) -> RegionBuilder {
        self.in_core_dumps = yes;
        self
    }

    /// Whether nobody may write it: [`Region::write_at`] and [`Region::discard`] answer [`RegionError::ReadOnly`], and a store through [`Region::as_ptr`] or an atomic raises SIGSEGV,
    /// as in a file that is mapped to be read (mmap(2), `PROT_READ`). For regions with a store. Default no.
    #[must_use]
    pub fn read_only(mut self, yes: bool) -> RegionBuilder {
        self.read_only = yes;
        self
    }

    /// Maps and, with a store, registers it.
    ///
    /// # Errors
    /// [`RegionError::InvalidSize`], [`RegionError::AddressTaken`], [`RegionError::InvalidAddress`], [`RegionError::NoUserfaultfd`],
    /// [`RegionError::System`].
    pub fn open(self) -> Result<Region, RegionError> {
        let page = page_size();
        let size_bytes = self.size_bytes.or_else(|| self.store.as_ref().map(|store| store.size())).unwrap_or(0);
        let invalid = RegionError::InvalidSize { size_bytes };
        let pages = page.pages_for(size_bytes);
        let len = usize::try_from(page.offset_of(pages)).ok().and_then(NonZeroUsize::new).ok_or(invalid.clone())?;
        if isize::try_from(len.get()).is_err() {
            return Err(invalid);
        }
        let at = match self.address.map(NonZeroUsize::new) {
            None => MapAt::Anywhere,
            Some(Some(address)) => MapAt::Address(address),
            Some(None) => return Err(RegionError::InvalidAddress { address: 0, page_bytes: page.bytes() }),
        };
        if let Some(store) = &self.store {
            if store.page_size() != page {
                return Err(RegionError::PageSizeDiffers { store_bytes: store.page_size().bytes(), region_bytes: page.bytes() });
            }
            if store.extent().count() < pages {
                return Err(RegionError::StoreTooSmall { store_bytes: store.size(), size_bytes });
            }
        }
        let mapping = Arc::new(Mapping::anonymous(len, at, self.in_core_dumps)?);
        let paged = match self.store {
            None => None,
            Some(store) => {
                let pager = self.pager.clone().map_or_else(Pager::shared, Ok)?;
                let around = self.fault_around.unwrap_or(pager.options().fault_around);
                let around = Around::new(around.base_pages, around.max_pages, around.ahead_pages);
                let core = Core::new(pages, false, around, pager.options().max_in_flight_pages);
                Some(Paged::join(&self.name, &mapping, pager, core, store, self.loss, Some(Trap::Missing))?)
            }
        };
        let read_only = self.read_only && paged.is_some();
        if read_only {
            // After it was registered, which takes memory that may be written (UFFDIO_REGISTER(2const)).
            mapping.forbid_writes()?;
        }
        Ok(Region {
            inner: Arc::new(Inner {
                name: self.name,
                size_bytes,
                page,
                fixed: self.address.is_some(),
                mapping: Some(mapping),
                paged: paged.map(Arc::new).map_or_else(OnceLock::new, OnceLock::from),
                followed: Mutex::default(),
                changing: Mutex::default(),
                follower: self.pager,
                read_only,
            }),
        })
    }
}

impl std::fmt::Debug for RegionBuilder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RegionBuilder").field("name", &self.name).field("size_bytes", &self.size_bytes).finish_non_exhaustive()
    }
}
