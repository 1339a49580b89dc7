//! The bare kernel's ways to follow writes, without pageferry, for baselines.
//!
//! Role: the least code that learns which pages were written, by each of the kernel's three means, so that what pageferry adds can be told. Neighbours: bench
//! `dirty`; takes the opening of a userfaultfd from `raw`. Invariants: with `raw` the only unsafe code under `benches/`; memory is written through atomics; a write
//! that one take does not tell is told by the next.

use super::{
    PAGE_BYTES, Result,
    raw::{Api, EVENT_PAGEFAULT, Register, UFFD_API, UFFDIO_API, UFFDIO_REGISTER, open_userfaultfd},
};
use std::{
    cell::RefCell,
    collections::HashMap,
    fs::File,
    io::{self, PipeReader, Read, Write},
    ops::Range,
    os::{
        fd::{AsRawFd, RawFd},
        unix::fs::FileExt,
    },
    ptr::NonNull,
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

// linux/userfaultfd.h and linux/fs.h: requests with the sizes of their arguments encoded, and the few bits used here.
const UFFDIO_WRITEPROTECT: libc::Ioctl = 0xc018_aa06_u32 as libc::Ioctl;
const PAGEMAP_SCAN: libc::Ioctl = 0xc060_6610_u32 as libc::Ioctl;
const FEATURE_PAGEFAULT_FLAG_WP: u64 = 1 << 0;
const FEATURE_WP_ASYNC: u64 = 1 << 15;
const REGISTER_MODE_WP: u64 = 1 << 1;
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
const PAGEFAULT_FLAG_WP: u64 = 1 << 1;
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
/// Of an entry of `/proc/self/pagemap`.
const SOFT_DIRTY: u64 = 1 << 55;

/// Bytes of a `struct uffd_msg`: the event in byte 0, a fault's flags in bytes 8..16 and its address in bytes 16..24.
const MESSAGE: usize = 32;
/// Messages asked for in one read.
const MESSAGES: usize = 64;
/// Ranges told by one scan: eight times as many made it no faster.
const FOUND: usize = 512;
/// As many pages that are protected still are protected again rather than passed over by a second call, which takes as long as eight.
const GAP: u64 = 8;
/// Pages whose soft-dirty bits are read in one call.
const ENTRIES: usize = 4096;

#[repr(C)]
struct WriteProtect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
#[derive(Default)]
struct Scan {
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

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Found {
    start: u64,
    end: u64,
    categories: u64,
}

/// Anonymous memory of small pages, as a region's is: a large page would be taken apart at its first write.
pub struct RawMemory {
    start: NonNull<AtomicU64>,
    len: usize,
}

// SAFETY: the mapping belongs to this value until it is dropped, and is read and written through atomics only.
unsafe impl Send for RawMemory {}
// SAFETY: as above.
unsafe impl Sync for RawMemory {}

impl RawMemory {
    /// Maps `len` bytes, whole pages. No page is there yet.
    pub fn new(len: usize) -> Result<RawMemory> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses touches no memory that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap of {len} bytes: {}", io::Error::last_os_error()).into());
        }
        // SAFETY: the range was mapped just now; the advice changes no content. A kernel without large pages refuses it, and need not obey.
        unsafe { libc::madvise(start, len, libc::MADV_NOHUGEPAGE) };
        Ok(RawMemory { start: NonNull::new(start.cast()).ok_or("mmap gave address 0")?, len })
    }

    /// All of it.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: inside the mapping, which lives as long as `self`; aligned, since the mapping starts at a page; any bits are a word, and atomics allow
        // others to write.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len / size_of::<AtomicU64>()) }
    }

    fn address(&self) -> u64 {
        self.start.addr().get() as u64
    }

    fn pages(&self) -> usize {
        self.len / PAGE_BYTES as usize
    }

    fn page_of(&self, address: u64) -> u64 {
        (address - self.address()) / PAGE_BYTES
    }
}

impl Drop for RawMemory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; every slice given out has ended, for it borrows `self`.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Follows the writes to memory.
pub trait RawTracker {
    /// Begins: from the return on, each page is told that is written.
    fn arm(&self) -> Result<()>;

    /// The pages written since the last call, as ranges in order.
    fn take(&self) -> Result<Vec<Range<u64>>>;
}

/// The kernel lifts protection by itself; `PAGEMAP_SCAN` finds what was written and protects it again.
pub struct RawWpAsync<'a> {
    memory: &'a RawMemory,
    uffd: File,
    pagemap: File,
    found: RefCell<Vec<Found>>,
}

impl<'a> RawWpAsync<'a> {
    pub fn new(memory: &'a RawMemory) -> Result<RawWpAsync<'a>> {
        let (uffd, pagemap) = (open(FEATURE_WP_ASYNC)?, File::open("/proc/self/pagemap")?);
        Ok(RawWpAsync { memory, uffd, pagemap, found: vec![Found::default(); FOUND].into() })
    }
}

impl RawTracker for RawWpAsync<'_> {
    fn arm(&self) -> Result<()> {
        register(&self.uffd, self.memory)?;
        // A fifth of the time of UFFDIO_WRITEPROTECT.
        self.take().map(drop)
    }

    fn take(&self) -> Result<Vec<Range<u64>>> {
        let mut taken: Vec<Range<u64>> = Vec::new();
        let mut found = self.found.borrow_mut();
        let mut scan = Scan {
            size: size_of::<Scan>() as u64,
            flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
            start: self.memory.address(),
            end: self.memory.address() + self.memory.len as u64,
            vec: found.as_mut_ptr().addr() as u64,
            vec_len: found.len() as u64,
            category_mask: PAGE_IS_WRITTEN,
            // The question that pageferry asks, which leaves out pages that hold nothing. Without it the kernel has a shorter way, but marks those too, and gives
            // them page tables; benches/README.md has the difference.
            category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            return_mask: PAGE_IS_WRITTEN,
            ..Scan::default()
        };
        while scan.start < scan.end {
            // SAFETY: `scan` has the kernel's layout, and `found` room for what is asked for; both live for the call. No content changes.
            let count = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut scan) };
            let count = usize::try_from(count).map_err(|_| format!("PAGEMAP_SCAN: {}", io::Error::last_os_error()))?;
            for found in &found[..count] {
                let pages = self.memory.page_of(found.start)..self.memory.page_of(found.end);
                match taken.last_mut() {
                    // Where one scan ended and the next began.
                    Some(last) if last.end == pages.start => last.end = pages.end,
                    _ => taken.push(pages),
                }
            }
            scan.start = scan.walk_end;
        }
        Ok(taken)
    }
}

/// A thread lifts protection, page by page, as messages come.
pub struct RawWpSync<'a> {
    memory: &'a RawMemory,
    uffd: File,
    /// A bit a page.
    written: Vec<AtomicU64>,
    /// What pages held before they were written, if that is wanted.
    kept: Option<Mutex<HashMap<u64, Vec<u64>>>>,
}

impl<'a> RawWpSync<'a> {
    pub fn new(memory: &'a RawMemory) -> Result<RawWpSync<'a>> {
        let written = (0..memory.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Ok(RawWpSync { memory, uffd: open(FEATURE_PAGEFAULT_FLAG_WP)?, written, kept: None })
    }

    /// Copies each page aside before its first write.
    pub fn keeping(memory: &'a RawMemory) -> Result<RawWpSync<'a>> {
        Ok(RawWpSync { kept: Some(Mutex::default()), ..RawWpSync::new(memory)? })
    }

    /// The first word that a page held.
    pub fn kept(&self, page: u64) -> Result<u64> {
        let kept = self.kept.as_ref().and_then(|kept| Some(kept.lock().ok()?.get(&page)?[0]));
        kept.ok_or_else(|| format!("page {page} was not kept").into())
    }

    /// The thread: notes each page that somebody waits to write and lets it be written, until the other end of `stop` is closed.
    pub fn serve(&self, stop: &PipeReader) -> Result<()> {
        let mut waiting = [self.uffd.as_raw_fd(), stop.as_raw_fd()].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        let mut messages = [0; MESSAGE * MESSAGES];
        loop {
            // SAFETY: two valid entries, and both descriptors outlive the call.
            if unsafe { libc::poll(waiting.as_mut_ptr(), 2, -1) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error.into());
            }
            if waiting[0].revents == 0 {
                return Ok(());
            }
            let read = match (&self.uffd).read(&mut messages) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                read => read?,
            };
            for message in messages[..read].as_chunks::<MESSAGE>().0 {
                let [flags, address] = [8, 16].map(|at| u64::from_ne_bytes(std::array::from_fn(|byte| message[at + byte])));
                if message[0] != EVENT_PAGEFAULT || flags & PAGEFAULT_FLAG_WP == 0 {
                    return Err(format!("userfaultfd gave event {:#x} with flags {flags:#x}", message[0]).into());
                }
                let page = self.memory.page_of(address);
                self.written[page as usize / 64].fetch_or(1 << (page % 64), Relaxed);
                if let Some(kept) = &self.kept {
                    const WORDS: usize = PAGE_BYTES as usize / size_of::<u64>();
                    let words = &self.memory.words()[page as usize * WORDS..][..WORDS];
                    let words = words.iter().map(|word| word.load(Relaxed)).collect();
                    kept.lock().map_err(|_| "another thread panicked")?.entry(page).or_insert(words);
                }
                protect(&self.uffd, self.memory.address() + page * PAGE_BYTES, PAGE_BYTES, false)?;
            }
        }
    }
}

impl RawTracker for RawWpSync<'_> {
    fn arm(&self) -> Result<()> {
        register(&self.uffd, self.memory)?;
        protect(&self.uffd, self.memory.address(), self.memory.len as u64, true)
    }

    fn take(&self) -> Result<Vec<Range<u64>>> {
        let mut taken: Vec<Range<u64>> = Vec::new();
        for (word, pages) in self.written.iter().zip((0..).step_by(64)) {
            let mut bits = word.swap(0, Relaxed);
            while bits != 0 {
                let page = pages + u64::from(bits.trailing_zeros());
                bits &= bits - 1;
                match taken.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => taken.push(page..page + 1),
                }
            }
        }
        for near in taken.chunk_by(|range, next| next.start - range.end <= GAP) {
            if let [first, .., last] | [first @ last] = near {
                let (start, end) = (first.start * PAGE_BYTES, last.end * PAGE_BYTES);
                protect(&self.uffd, self.memory.address() + start, end - start, true)?;
            }
        }
        Ok(taken)
    }
}

/// The kernel's soft-dirty bits, which are read, and then cleared for the whole process.
pub struct RawSoftDirty<'a> {
    memory: &'a RawMemory,
    pagemap: File,
}

impl<'a> RawSoftDirty<'a> {
    pub fn new(memory: &'a RawMemory) -> Result<RawSoftDirty<'a>> {
        Ok(RawSoftDirty { memory, pagemap: File::open("/proc/self/pagemap")? })
    }
}

impl RawTracker for RawSoftDirty<'_> {
    fn arm(&self) -> Result<()> {
        Ok(File::options().write(true).open("/proc/self/clear_refs")?.write_all(b"4")?)
    }

    fn take(&self) -> Result<Vec<Range<u64>>> {
        let mut taken: Vec<Range<u64>> = Vec::new();
        let (first, pages) = (self.memory.address() / PAGE_BYTES, self.memory.pages());
        let mut entries = vec![0; ENTRIES * 8];
        for step in (0..pages).step_by(ENTRIES) {
            let entries = &mut entries[..ENTRIES.min(pages - step) * 8];
            self.pagemap.read_exact_at(entries, (first + step as u64) * 8)?;
            for (entry, page) in entries.as_chunks::<8>().0.iter().zip(step as u64..) {
                if u64::from_ne_bytes(*entry) & SOFT_DIRTY == 0 {
                    continue;
                }
                match taken.last_mut() {
                    Some(last) if last.end == page => last.end += 1,
                    _ => taken.push(page..page + 1),
                }
            }
        }
        self.arm()?;
        Ok(taken)
    }
}

/// A userfaultfd with these features.
fn open(features: u64) -> Result<File> {
    let uffd = File::from(open_userfaultfd()?);
    ioctl(uffd.as_raw_fd(), "UFFDIO_API", UFFDIO_API, &mut Api { api: UFFD_API, features, ioctls: 0 })?;
    Ok(uffd)
}

fn register(uffd: &File, memory: &RawMemory) -> Result<()> {
    let mut register = Register { start: memory.address(), len: memory.len as u64, mode: REGISTER_MODE_WP, ioctls: 0 };
    ioctl(uffd.as_raw_fd(), "UFFDIO_REGISTER", UFFDIO_REGISTER, &mut register)
}

/// Protects pages, or lets them be written and wakes who waits for that.
fn protect(uffd: &File, start: u64, len: u64, protect: bool) -> Result<()> {
    let mut argument = WriteProtect { start, len, mode: if protect { WRITEPROTECT_MODE_WP } else { 0 } };
    ioctl(uffd.as_raw_fd(), "UFFDIO_WRITEPROTECT", UFFDIO_WRITEPROTECT, &mut argument)
}

fn ioctl<T>(fd: RawFd, name: &str, request: libc::Ioctl, argument: &mut T) -> Result<()> {
    // SAFETY: `request` encodes the size of `T`, so the kernel writes inside `argument`. These requests change protection and registration of the ranges
    // they name, and no content.
    if unsafe { libc::ioctl(fd, request, std::ptr::from_mut(argument)) } == 0 {
        return Ok(());
    }
    Err(format!("{name}: {}", io::Error::last_os_error()).into())
}
