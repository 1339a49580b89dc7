//! What a program touches first, and in which order: recorded in one run, pulled first in the next.
//!
//! Role: the order of a mount's pull. Neighbours: `Mount` makes one of what the pager recorded, [`PullOrder`] takes it. Invariants: no page is in it twice; what is read from a file was checked, or it
//! is an error.
//!
//! A program that starts touches nearly the same pages each time (REAP, Ustiugov and others, ASPLOS 2021; FaaSnap, Ao and others, EuroSys 2022). Brought in that order they are there
//! before they are touched, where one after another on demand each waits a round trip.

use crate::{Extent, PageSize, PullOrder};
use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Write},
    path::Path,
};
use thiserror::Error;

/// Pages of a mount in the order in which they were first touched.
///
/// ```
/// use pageferry::{MemoryStore, Mount, PageSize, WorkingSet};
/// use std::sync::Arc;
/// # if pageferry::Capabilities::probe().write_protect() {
/// # let folder = std::env::temp_dir().join(format!("pageferry-doc-{}", std::process::id()));
/// # std::fs::create_dir_all(&folder)?;
/// let file = folder.join("start.pages");
/// let store = Arc::new(MemoryStore::zeroed(1 << 20, PageSize::KIB_4));
/// let mount = Mount::builder(store.clone()).record_touches().open()?;
/// mount.region().read_at(9 * 4096, &mut [0])?;
/// mount.region().read_at(5 * 4096, &mut [0])?;
/// mount.working_set().save(&file)?;
///
/// let again = Mount::builder(store).pull_order(WorkingSet::load(&file)?.order()).open()?; // pages 9 and 5 come first
/// # drop(again);
/// # std::fs::remove_dir_all(&folder)?;
/// # }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkingSet {
    page: PageSize,
    /// Of the whole mount.
    pages: u64,
    order: Vec<Extent>,
}

/// A working set could not be read or written.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum WorkingSetError {
    /// The file.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// What the operating system answered.
        source: io::Error,
    },
    /// It is no working set, or was cut short or changed.
    #[error("{path} is no working set that can be used: {reason}; record it again")]
    Broken {
        /// Which.
        path: String,
        /// What was found.
        reason: String,
    },
}

const MAGIC: [u8; 8] = *b"pfpages\n";
const VERSION: u32 = 1;
/// Magic, version, page in bytes, pages, extents.
const HEAD_BYTES: usize = 8 + 4 + 4 + 8 + 8;
const EXTENT_BYTES: usize = 16;
const SUM_BYTES: usize = 4;

impl WorkingSet {
    /// Of pages in the order in which they were touched, each perhaps more than once.
    pub(super) fn of_touches(page: PageSize, pages: u64, touched: &[u64]) -> WorkingSet {
        let (mut seen, mut order) = (HashSet::new(), Vec::<Extent>::new());
        for at in touched.iter().copied().filter(|at| *at < pages && seen.insert(*at)) {
            match order.last_mut() {
                Some(last) if last.end() == at => *last = Extent::between(last.first(), at + 1),
                _ => order.push(Extent::page(at)),
            }
        }
        WorkingSet { page, pages, order }
    }

    /// The pages, in the order of their first touch; those that follow one another in both ways are one extent.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.order
    }

    /// How many.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.order.iter().map(|extent| extent.count()).sum()
    }

    /// For [`MountBuilder::pull_order`](super::MountBuilder::pull_order). A mount that has become smaller leaves out what it has no more.
    #[must_use]
    pub fn order(&self) -> PullOrder {
        PullOrder::List(self.order.clone())
    }

    /// Writes it to a file, which it replaces as a whole or not at all. 16 bytes an extent.
    ///
    /// # Errors
    /// [`WorkingSetError::File`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<(), WorkingSetError> {
        let path = path.as_ref();
        let failed = |source| WorkingSetError::File { path: path.display().to_string(), source };
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.new", std::process::id()));
        let new = path.with_file_name(name);
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&self.encode())?;
            file.sync_all()?;
            fs::rename(&new, path)
        };
        write().map_err(|error| {
            let _ = fs::remove_file(&new);
            failed(error)
        })
    }

    /// Reads one that was [saved](WorkingSet::save).
    ///
    /// # Errors
    /// [`WorkingSetError::File`], [`WorkingSetError::Broken`].
    pub fn load(path: impl AsRef<Path>) -> Result<WorkingSet, WorkingSetError> {
        let path = path.as_ref();
        let name = || path.display().to_string();
        let bytes = fs::read(path).map_err(|source| WorkingSetError::File { path: name(), source })?;
        WorkingSet::decode(&bytes).map_err(|reason| WorkingSetError::Broken { path: name(), reason })
    }

    fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD_BYTES + self.order.len() * EXTENT_BYTES + SUM_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::try_from(self.page.bytes()).unwrap_or(u32::MAX).to_le_bytes());
        bytes.extend(self.pages.to_le_bytes());
        bytes.extend((self.order.len() as u64).to_le_bytes());
        for extent in &self.order {
            bytes.extend(extent.first().to_le_bytes());
            bytes.extend(extent.count().to_le_bytes());
        }
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<WorkingSet, String> {
        let word = |at: usize| bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes);
        let half = |at: usize| bytes.get(at..at + 4).and_then(|half| half.try_into().ok()).map_or(0, u32::from_le_bytes);
        if bytes.len() < HEAD_BYTES + SUM_BYTES || bytes[..8] != MAGIC {
            return Err(format!("its {} bytes do not begin with the {HEAD_BYTES} of a working set's head", bytes.len()));
        }
        let (version, page_bytes, pages, extents) = (half(8), half(12), word(16), word(24));
        if version != VERSION {
            return Err(format!("it has version {version}, and this is version {VERSION}"));
        }
        let sum_at = bytes.len() - SUM_BYTES;
        let (found, expected) = (half(sum_at), crc32fast::hash(&bytes[..sum_at]));
        if found != expected {
            return Err(format!("its checksum is {found:08x}, and that of its content {expected:08x}"));
        }
        if (sum_at - HEAD_BYTES) as u64 != extents.saturating_mul(EXTENT_BYTES as u64) {
            return Err(format!("it says that it has {extents} extents and holds {} bytes of them", sum_at - HEAD_BYTES));
        }
        let page = PageSize::new(page_bytes.into()).ok_or_else(|| format!("its pages have {page_bytes} bytes"))?;
        let mut order = Vec::with_capacity((sum_at - HEAD_BYTES) / EXTENT_BYTES);
        for at in (HEAD_BYTES..sum_at).step_by(EXTENT_BYTES) {
            let (first, count) = (word(at), word(at + 8));
            let end = first.checked_add(count).filter(|end| count > 0 && *end <= pages);
            let end = end.ok_or_else(|| format!("{count} pages from {first} on are not in a mount of {pages}"))?;
            order.push(Extent::between(first, end));
        }
        Ok(WorkingSet { page, pages, order })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn set(touched: &[u64]) -> WorkingSet {
        WorkingSet::of_touches(PageSize::KIB_4, 100, touched)
    }

    #[test]
    fn the_first_touch_counts() {
        let set = set(&[9, 10, 11, 5, 9, 4, 5, 6, 7, 200]);
        let expected = [(9, 12), (5, 6), (4, 5), (6, 8)].map(|(first, end)| Extent::between(first, end));
        assert_eq!((set.extents(), set.pages()), (&expected[..], 7));
    }

    #[test]
    fn a_file_that_was_cut_or_changed_anywhere_is_refused() {
        let bytes = set(&[3, 4, 50]).encode();
        assert_eq!(WorkingSet::decode(&bytes).unwrap(), set(&[3, 4, 50]));
        for at in 0..bytes.len() {
            assert!(WorkingSet::decode(&bytes[..at]).is_err(), "{at} bytes");
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(WorkingSet::decode(&changed).is_err(), "bit {bit} of byte {at}");
            }
        }
    }

    #[test]
    fn an_extent_outside_the_mount_is_named() {
        let mut outside = set(&[3]);
        outside.pages = 3;
        let reason = WorkingSet::decode(&outside.encode()).unwrap_err();
        assert_eq!(reason, "1 pages from 3 on are not in a mount of 3");
    }

    proptest! {
        #[test]
        fn what_is_saved_is_what_is_loaded(touched in proptest::collection::vec(0u64..100, 0..200)) {
            let set = set(&touched);
            prop_assert_eq!(WorkingSet::decode(&set.encode()).unwrap(), set);
        }

        #[test]
        fn garbage_never_panics(garbage in proptest::collection::vec(any::<u8>(), 0..200), sum: bool) {
            let mut bytes = [&MAGIC[..], &VERSION.to_le_bytes(), &garbage].concat();
            if sum {
                bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
            }
            let _ = WorkingSet::decode(&bytes);
        }
    }
}
