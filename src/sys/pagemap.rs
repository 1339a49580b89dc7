//! What the kernel knows of this process's pages: written or not, present or not.
//!
//! Role: the kernel's side of trackers. Neighbours: `pager::tracker` asks; no decision above knows a bit's number. Invariants: reads page tables, never pages; the scan that
//! protects changes no content, and tells and protects each page in one step, so that no write falls between the two.
//!
//! Documentation/admin-guide/mm/pagemap.rst; soft-dirty.rst beside it.

use nix::errno::Errno;
use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    ops::Range,
    os::{fd::AsRawFd, unix::fs::FileExt},
    sync::OnceLock,
};

/// What `/proc/self/pagemap` says of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageBits(u64);

impl PageBits {
    /// Written since the last [`Pagemap::clear_soft_dirty`], or its mapping is newer than that.
    pub(crate) fn soft_dirty(self) -> bool {
        self.0 >> 55 & 1 == 1
    }

    /// It holds something: in memory, or swapped out.
    pub(crate) fn populated(self) -> bool {
        self.0 >> 62 & 3 != 0
    }
}

/// See the module header.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
    page_len: usize,
}

/// `struct pm_scan_arg` (linux/fs.h).
#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

const _: () = assert!(size_of::<ScanArgument>() == 96 && size_of::<Found>() == 24);

nix::ioctl_readwrite!(pagemap_scan, b'f', 16, ScanArgument);

const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;

/// Ranges told in one call.
const FOUND_MAX: usize = 512;
/// Entries of the pagemap read in one call.
const ENTRIES_MAX: usize = 4096;

impl Pagemap {
    pub(crate) fn open() -> io::Result<Pagemap> {
        let page_len = super::page_size().len();
        Ok(Pagemap { file: File::open("/proc/self/pagemap")?, page_len })
    }

    /// Calls `written` with the addresses of pages that were written since they were protected last, or never protected, and protects them (PAGEMAP_SCAN, Linux 6.7).
    /// Pages that hold nothing are passed over and stay as they are. The range must be registered for writes with `WP_ASYNC`.
    ///
    /// # Errors
    /// EPERM: a part of the range is not registered so. What came before it was told.
    pub(crate) fn take_written(&self, start: usize, len: usize, mut written: impl FnMut(Range<usize>)) -> Result<(), Errno> {
        let mut found = [Found::default(); FOUND_MAX];
        let mut argument = ScanArgument {
            size: size_of::<ScanArgument>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start: start as u64,
            end: (start + len) as u64,
            walk_end: 0,
            vec: found.as_mut_ptr() as u64,
            vec_len: FOUND_MAX as u64,
            max_pages: 0,
            category_inverted: 0,
            category_mask: PAGE_IS_WRITTEN,
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN,
        };
        while argument.start < argument.end {
            // SAFETY: the argument has the kernel's layout; `found` has room for `vec_len` regions and lives for the call. Protection of pages
            // in the range changes, their content does not.
            let count = match unsafe { pagemap_scan(self.file.as_raw_fd(), &raw mut argument) } {
                Ok(count) => usize::try_from(count).unwrap_or(0),
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(errno),
            };
            for region in found.iter().take(count) {
                #[allow(clippy::cast_possible_truncation, reason = "addresses of this process fit usize")]
                written(region.start as usize..region.end as usize);
            }
            argument.start = argument.walk_end;
        }
        Ok(())
    }

    /// Calls `page` with the address and bits of each page of a range, in order.
    pub(crate) fn read(&self, start: usize, len: usize, mut page: impl FnMut(usize, PageBits)) -> io::Result<()> {
        let mut entries = [0; ENTRIES_MAX * 8];
        let (mut at, end) = (start / self.page_len, (start + len).div_ceil(self.page_len));
        while at < end {
            let now = (end - at).min(ENTRIES_MAX);
            self.file.read_exact_at(&mut entries[..now * 8], at as u64 * 8)?;
            for (i, entry) in entries[..now * 8].as_chunks::<8>().0.iter().enumerate() {
                page((at + i) * self.page_len, PageBits(u64::from_ne_bytes(*entry)));
            }
            at += now;
        }
        Ok(())
    }

    /// Whether the kernel keeps soft-dirty bits. Found out once, because it clears those of this process.
    pub(crate) fn has_soft_dirty() -> Result<bool, String> {
        static FOUND: OnceLock<Result<bool, String>> = OnceLock::new();
        FOUND.get_or_init(|| Pagemap::try_soft_dirty().map_err(|error| error.to_string())).clone()
    }

    /// Writes a page, and looks. That one which was not written is clean proves nothing more, and may fail: the kernel may merge it with a newer mapping, which is dirty as a whole.
    fn try_soft_dirty() -> io::Result<bool> {
        let page_len = super::page_size().len();
        let len = std::num::NonZeroUsize::new(page_len).ok_or(Errno::EINVAL)?;
        let page = super::Mapping::anonymous(len, super::MapAt::Anywhere, false).map_err(io::Error::other)?;
        let write = || page.write_at(0, &[1]).map_err(io::Error::other);
        write()?;
        match Pagemap::clear_soft_dirty() {
            // A kernel that keeps none refuses the number.
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => return Ok(false),
            other => other?,
        }
        write()?;
        let mut dirty = false;
        Pagemap::open()?.read(page.address(), page.len(), |_, bits| dirty = bits.soft_dirty())?;
        Ok(dirty)
    }

    /// Forgets what was written so far, in all of this process.
    pub(crate) fn clear_soft_dirty() -> io::Result<()> {
        OpenOptions::new().write(true).open("/proc/self/clear_refs")?.write_all(b"4")
    }
}
