//! A file whose bytes are a region: what SQLite takes for its disk.
//!
//! Role: a database file of a length that may change, in memory that may move. Neighbours: `vfs` offers it to SQLite; `bank` makes and opens it. Invariants: all that is
//! known of the file is in the region, its length too, so that it moves with it; file pages are region pages; a disk that was taken out is neither read nor written any more.

use pageferry::{Region, RegionError};
use std::sync::{
    Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU64, Ordering::Relaxed},
};
use thiserror::Error;

/// The region's first page holds a mark and the file's length; the file follows, so that a page of SQLite is a page of the region.
const HEAD_BYTES: u64 = 4096;
/// "ferrydb1", read as a little-endian number.
const MARK: u64 = u64::from_le_bytes(*b"ferrydb1");

/// Why the file cannot be used.
#[derive(Clone, Debug, Error)]
pub enum DiskError {
    #[error(transparent)]
    Region(#[from] RegionError),
    #[error("the region holds no file: its first word is {found:#x}, not {MARK:#x}; format it first")]
    NotFormatted { found: u64 },
    #[error("the file is full: byte {end} is past its {room_bytes}; give the database a larger --size, or fewer --seconds")]
    Full { end: u64, room_bytes: u64 },
    #[error("the program has left: its file may not be touched here any more")]
    Out,
}

/// The file, at this host.
pub struct Disk {
    /// `None` once it was taken out.
    region: Mutex<Option<Region>>,
    /// What SQLite can only call an I/O error.
    failure: Mutex<Option<DiskError>>,
}

impl Disk {
    /// An empty file.
    ///
    /// # Errors
    /// [`DiskError::Region`] if the region is smaller than a page.
    pub fn format(region: &Region) -> Result<(), DiskError> {
        let head = head(region)?;
        head[1].store(0, Relaxed);
        head[0].store(MARK, Relaxed);
        Ok(())
    }

    /// The file that is in the region. Faults its first page in, and so may block.
    ///
    /// # Errors
    /// [`DiskError::NotFormatted`], [`DiskError::Region`].
    pub fn insert(region: &Region) -> Result<Disk, DiskError> {
        let found = head(region)?[0].load(Relaxed);
        if found != MARK {
            return Err(DiskError::NotFormatted { found });
        }
        Ok(Disk { region: Mutex::new(Some(region.clone())), failure: Mutex::default() })
    }

    /// From now on every use of the file is an error. Until then the region stays open.
    pub fn take_out(&self) {
        *self.region() = None;
    }

    /// The first thing that went wrong, for a caller who heard of an I/O error only.
    pub fn failure(&self) -> Option<DiskError> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Bytes that a file in this region can have.
    pub fn room_bytes(region: &Region) -> u64 {
        region.size_bytes().saturating_sub(HEAD_BYTES)
    }

    /// The file's length in bytes.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn len_bytes(&self) -> Result<u64, DiskError> {
        self.with(|region| Ok(head(region)?[1].load(Relaxed)))
    }

    /// Reads what the file has of these bytes, and says how many.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn read(&self, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        self.with(|region| {
            let there = head(region)?[1].load(Relaxed).saturating_sub(offset);
            let len = usize::try_from(there).unwrap_or(usize::MAX).min(into.len());
            region.read_at(HEAD_BYTES + offset, &mut into[..len])?;
            Ok(len)
        })
    }

    /// Writes, and makes the file as long as needed.
    ///
    /// # Errors
    /// [`DiskError::Full`] where the region ends.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.with(|region| {
            let (end, room_bytes) = (offset.saturating_add(bytes.len() as u64), Disk::room_bytes(region));
            if end > room_bytes {
                return Err(DiskError::Full { end, room_bytes });
            }
            region.write_at(HEAD_BYTES + offset, bytes)?;
            head(region)?[1].fetch_max(end, Relaxed);
            Ok(())
        })
    }

    /// Shortens the file. Whole pages behind its end go back to the kernel, and nothing of them travels.
    ///
    /// # Errors
    /// [`DiskError`].
    pub fn truncate(&self, len_bytes: u64) -> Result<(), DiskError> {
        self.with(|region| {
            if head(region)?[1].fetch_min(len_bytes, Relaxed) > len_bytes {
                let page = region.page_size().bytes();
                region.discard((HEAD_BYTES + len_bytes).next_multiple_of(page)..region.len() as u64)?;
            }
            Ok(())
        })
    }

    fn with<T>(&self, work: impl FnOnce(&Region) -> Result<T, DiskError>) -> Result<T, DiskError> {
        let done = self.region().as_ref().ok_or(DiskError::Out).and_then(work);
        if let Err(error) = &done {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| error.clone());
        }
        done
    }

    fn region(&self) -> MutexGuard<'_, Option<Region>> {
        self.region.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn head(region: &Region) -> Result<&[AtomicU64], DiskError> {
    Ok(region.atomics_u64(0, 2)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region() -> Region {
        Region::builder().size(5 * 4096).open().unwrap()
    }

    #[test]
    fn a_file_is_as_long_as_what_was_written_and_moves_with_its_region() {
        let region = region();
        assert!(matches!(Disk::insert(&region), Err(DiskError::NotFormatted { found: 0 })));
        Disk::format(&region).unwrap();
        let disk = Disk::insert(&region).unwrap();
        let mut bytes = [9; 4];
        assert_eq!((disk.len_bytes().unwrap(), disk.read(0, &mut bytes).unwrap()), (0, 0));
        disk.write(4094, b"abc").unwrap();
        disk.write(0, b"x").unwrap();
        let disk = Disk::insert(&region).unwrap();
        assert_eq!((disk.len_bytes().unwrap(), disk.read(4094, &mut bytes).unwrap()), (4097, 3));
        assert_eq!(&bytes, b"abc\x09");
    }

    #[test]
    fn what_was_cut_off_reads_as_zeros_when_the_file_grows_again() {
        let region = region();
        Disk::format(&region).unwrap();
        let disk = Disk::insert(&region).unwrap();
        disk.write(0, &[7; 3 * 4096]).unwrap();
        disk.truncate(4096).unwrap();
        disk.truncate(8192).unwrap();
        assert_eq!(disk.len_bytes().unwrap(), 4096, "truncating makes no file longer");
        disk.write(2 * 4096, &[7]).unwrap();
        let mut bytes = [9; 2];
        assert_eq!(disk.read(4095, &mut bytes).unwrap(), 2);
        assert_eq!(bytes, [7, 0]);
    }

    #[test]
    fn a_full_file_and_one_that_was_taken_out_say_so() {
        let region = region();
        Disk::format(&region).unwrap();
        let disk = Disk::insert(&region).unwrap();
        assert!(matches!(disk.write(4 * 4096 - 1, b"ab"), Err(DiskError::Full { end: 16385, room_bytes: 16384 })));
        disk.take_out();
        assert!(matches!(disk.read(0, &mut [0]), Err(DiskError::Out)) && matches!(disk.write(0, &[0]), Err(DiskError::Out)));
        assert!(matches!(disk.failure(), Some(DiskError::Full { .. })), "the first failure is the one to tell");
    }
}
