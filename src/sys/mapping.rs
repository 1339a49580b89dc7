//! An anonymous private mapping of this process, owned.
//!
//! Role: reserves the address range of a region and reads and writes it soundly while others write it too. Neighbours: `region` holds
//! one; `userfault` registers it. Invariants: M1 and M2 of `sys`.

use super::Piece;
use crate::{PageSize, RegionError};
use nix::{
    errno::Errno,
    sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap},
};
use std::{
    ffi::c_void,
    num::NonZeroUsize,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed},
};

/// The page size of this kernel.
pub(crate) fn page_size() -> PageSize {
    nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE)
        .ok()
        .flatten()
        .and_then(|bytes| PageSize::new(u64::try_from(bytes).ok()?))
        .unwrap_or(PageSize::KIB_4)
}

/// Where a mapping shall start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapAt {
    Anywhere,
    /// Exactly here, never over another mapping (`MAP_FIXED_NOREPLACE`, Linux 4.17, mmap(2)).
    Address(NonZeroUsize),
}

/// See the module header.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<c_void>,
    len: usize,
}

// SAFETY: a mapping is an address range; all access to its bytes goes through atomics or the kernel (M2), so it may be used from
// any thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; no method hands out a plain reference to its bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes (a multiple of the page) of zeroed memory: not inherited by fork (a child would read zeros where
    /// pages are missing), never a transparent huge page (a huge page would populate neighbours that must fault).
    pub(crate) fn anonymous(len: NonZeroUsize, at: MapAt, in_core_dumps: bool) -> Result<Mapping, RegionError> {
        let page_bytes = page_size().bytes();
        let size_bytes = len.get() as u64;
        let (wanted, flags) = match at {
            MapAt::Anywhere => (None, MapFlags::empty()),
            MapAt::Address(address) => (Some(address), MapFlags::MAP_FIXED_NOREPLACE),
        };
        if let MapAt::Address(address) = at
            && !(address.get() as u64).is_multiple_of(page_bytes)
        {
            return Err(RegionError::InvalidAddress { address: address.get(), page_bytes });
        }
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = flags | MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: an anonymous mapping that replaces nothing: anywhere, or MAP_FIXED_NOREPLACE which fails if the range is in use.
        let mapped = unsafe { mmap_anonymous(wanted, len, protection, flags) };
        let start = mapped.map_err(|errno| match (errno, at) {
            (Errno::EEXIST, MapAt::Address(address)) => RegionError::AddressTaken { address: address.get(), size_bytes },
            (Errno::EPERM | Errno::EINVAL | Errno::ENOMEM, MapAt::Address(address)) => {
                RegionError::InvalidAddress { address: address.get(), page_bytes }
            }
            (errno, _) => RegionError::system("mmap", errno),
        })?;
        let mapping = Mapping { start, len: len.get() };
        if let Some(address) = wanted
            && mapping.address() != address.get()
        {
            // A kernel older than 4.17 treats the flag as a hint and maps elsewhere.
            return Err(RegionError::AddressTaken { address: address.get(), size_bytes });
        }
        mapping.advise("madvise(MADV_DONTFORK)", MmapAdvise::MADV_DONTFORK)?;
        // A kernel without transparent huge pages answers EINVAL: nothing to switch off.
        let _ = mapping.advise("madvise(MADV_NOHUGEPAGE)", MmapAdvise::MADV_NOHUGEPAGE);
        if !in_core_dumps {
            mapping.advise("madvise(MADV_DONTDUMP)", MmapAdvise::MADV_DONTDUMP)?;
        }
        Ok(mapping)
    }

    fn advise(&self, call: &'static str, advice: MmapAdvise) -> Result<(), RegionError> {
        // SAFETY: the range is this mapping's own (M1), and the advices used change neither its content nor its address.
        unsafe { madvise(self.start, self.len, advice) }.map_err(|errno| RegionError::system(call, errno))
    }

    pub(crate) fn address(&self) -> usize {
        self.start.as_ptr() as usize
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// `offset + len` checked against the mapping; the start of the range as an address.
    pub(crate) fn address_of(&self, offset: u64, len: usize) -> Result<usize, RegionError> {
        let out = || RegionError::OutOfRange { offset, len: len as u64, size_bytes: self.len as u64 };
        let start = usize::try_from(offset).map_err(|_| out())?;
        let end = start.checked_add(len).ok_or_else(out)?;
        if end > self.len { Err(out()) } else { Ok(self.address() + start) }
    }

    /// The bytes at `offset` as atomics.
    fn bytes(&self, offset: u64, len: usize) -> Result<&[AtomicU8], RegionError> {
        let address = self.address_of(offset, len)?;
        // SAFETY: inside the mapping (M1), which outlives `&self`; AtomicU8 has no alignment and allows others to write (M2).
        Ok(unsafe { std::slice::from_raw_parts(address as *const AtomicU8, len) })
    }

    /// `count` words of 64 bits at `offset`, which must be a multiple of 8.
    pub(crate) fn words64(&self, offset: u64, count: usize) -> Result<&[AtomicU64], RegionError> {
        let len = count.checked_mul(8).ok_or(RegionError::OutOfRange { offset, len: u64::MAX, size_bytes: self.len as u64 })?;
        let address = self.address_of(offset, len)?;
        if !address.is_multiple_of(8) {
            return Err(RegionError::Misaligned { offset, align: 8 });
        }
        // SAFETY: inside the mapping (M1), aligned, valid for any bits; atomics allow others to write (M2).
        Ok(unsafe { std::slice::from_raw_parts(address as *const AtomicU64, count) })
    }

    /// `count` words of 32 bits at `offset`, which must be a multiple of 4.
    pub(crate) fn words32(&self, offset: u64, count: usize) -> Result<&[AtomicU32], RegionError> {
        let len = count.checked_mul(4).ok_or(RegionError::OutOfRange { offset, len: u64::MAX, size_bytes: self.len as u64 })?;
        let address = self.address_of(offset, len)?;
        if !address.is_multiple_of(4) {
            return Err(RegionError::Misaligned { offset, align: 4 });
        }
        // SAFETY: as in `words64`.
        Ok(unsafe { std::slice::from_raw_parts(address as *const AtomicU32, count) })
    }

    /// Copies bytes out by relaxed atomic loads: sound under racing writers; a word that is written meanwhile is old or new.
    pub(crate) fn read_at(&self, offset: u64, into: &mut [u8]) -> Result<(), RegionError> {
        let (head, words, tail) = self.split(offset, into.len())?;
        let (head_into, rest) = into.split_at_mut(head.len());
        let (words_into, tail_into) = rest.split_at_mut(words.len() * 8);
        for (to, from) in head_into.iter_mut().zip(head) {
            *to = from.load(Relaxed);
        }
        for (to, from) in words_into.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&from.load(Relaxed).to_ne_bytes());
        }
        for (to, from) in tail_into.iter_mut().zip(tail) {
            *to = from.load(Relaxed);
        }
        Ok(())
    }

    /// Copies bytes in by relaxed atomic stores.
    pub(crate) fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<(), RegionError> {
        let (head, words, tail) = self.split(offset, bytes.len())?;
        let (head_bytes, rest) = bytes.split_at(head.len());
        let (word_bytes, tail_bytes) = rest.split_at(words.len() * 8);
        for (to, from) in head.iter().zip(head_bytes) {
            to.store(*from, Relaxed);
        }
        for (to, from) in words.iter().zip(word_bytes.as_chunks::<8>().0) {
            to.store(u64::from_ne_bytes(*from), Relaxed);
        }
        for (to, from) in tail.iter().zip(tail_bytes) {
            to.store(*from, Relaxed);
        }
        Ok(())
    }

    /// The range as unaligned head, aligned words and tail.
    #[allow(clippy::type_complexity, reason = "three parts of one range, used by the two copies above")]
    fn split(&self, offset: u64, len: usize) -> Result<(&[AtomicU8], &[AtomicU64], &[AtomicU8]), RegionError> {
        let bytes = self.bytes(offset, len)?;
        let head_len = bytes.as_ptr().align_offset(8).min(len);
        let words = (len - head_len) / 8;
        let tail_at = head_len + words * 8;
        // A range that ends before the next word has no aligned part, and its head may end anywhere.
        let aligned = if words == 0 { &[][..] } else { self.words64(offset + head_len as u64, words)? };
        Ok((&bytes[..head_len], aligned, &bytes[tail_at..]))
    }

    /// Lets the kernel copy bytes out (process_vm_readv(2)): for threads that serve peers, which must get an error and not a
    /// signal when the program unmapped or protected part of the range. All pages must be resident (S2).
    pub(crate) fn read_live(&self, offset: u64, into: &mut [u8]) -> Result<(), RegionError> {
        let address = self.address_of(offset, into.len())?;
        match read_live_at(address, into) {
            Ok(()) => Ok(()),
            // A seccomp profile may forbid the call; the atomic copy reads the same bytes.
            Err(Errno::EPERM | Errno::ENOSYS) => self.read_at(offset, into),
            Err(errno) => Err(RegionError::system("process_vm_readv", errno)),
        }
    }

    /// As [`read_live`](Mapping::read_live), into a piece.
    pub(crate) fn copy_live(&self, offset: u64, len: usize, into: &mut Piece) -> Result<(), RegionError> {
        let address = self.address_of(offset, len)?;
        into.copy_live(address, len).map_err(|errno| RegionError::system("pwrite64", errno))
    }

    /// Gives pages back to the kernel: they read as zeros afterwards (`MADV_DONTNEED`, madvise(2)). `extent` in bytes, whole pages.
    pub(crate) fn discard(&self, offset: u64, len: usize) -> Result<(), RegionError> {
        let address = self.address_of(offset, len)?;
        let Some(start) = NonNull::new(address as *mut c_void) else { return Ok(()) };
        // SAFETY: inside the mapping (M1); dropping pages is a write of zeros as far as readers through atomics can tell (M2).
        unsafe { madvise(start, len, MmapAdvise::MADV_DONTNEED) }
            .map_err(|errno| RegionError::system("madvise(MADV_DONTNEED)", errno))
    }

    /// As [`discard`](Mapping::discard), many ranges of offset and length in one call where the kernel can (process_madvise(2) on oneself, Linux 6.13): each call by itself
    /// interrupts every processor that runs this process.
    pub(crate) fn discard_all(&self, ranges: &[(u64, usize)]) -> Result<(), RegionError> {
        // Of UIO_MAXIOV.
        const TOGETHER: usize = 1024;
        // SAFETY: makes a descriptor of this process, or fails.
        let opened = unsafe { libc::syscall(libc::SYS_pidfd_open, libc::getpid(), 0) };
        let me = i32::try_from(opened).ok().filter(|fd| *fd >= 0).map(|fd| {
            // SAFETY: just opened, and nobody else's.
            unsafe { OwnedFd::from_raw_fd(fd) }
        });
        for ranges in ranges.chunks(TOGETHER) {
            let vectors = ranges.iter().map(|(offset, len)| {
                let iov_base = self.address_of(*offset, *len)? as *mut c_void;
                Ok(libc::iovec { iov_base, iov_len: *len })
            });
            let vectors: Vec<libc::iovec> = vectors.collect::<Result<_, RegionError>>()?;
            let bytes: usize = ranges.iter().map(|(_, len)| len).sum();
            let advised = me.as_ref().map_or(-1, |me| {
                let (count, advice) = (vectors.len(), libc::MADV_DONTNEED);
                // SAFETY: the vectors live for the call, and lie inside the mapping (M1); dropping pages is as in `discard` (M2).
                unsafe { libc::syscall(libc::SYS_process_madvise, me.as_raw_fd(), vectors.as_ptr(), count, advice, 0) }
            });
            // Refused by an older kernel, or stopped half-way: once more, one by one, changes nothing.
            if usize::try_from(advised) != Ok(bytes) {
                ranges.iter().try_for_each(|(offset, len)| self.discard(*offset, *len))?;
            }
        }
        Ok(())
    }

    /// Makes writes raise SIGSEGV, for good. What is missing is filled all the same.
    pub(crate) fn forbid_writes(&self) -> Result<(), RegionError> {
        // SAFETY: this mapping's own range (M1), which stays mapped; what is forbidden is a signal and changes no content.
        unsafe { nix::sys::mman::mprotect(self.start, self.len, ProtFlags::PROT_READ) }
            .map_err(|errno| RegionError::system("mprotect", errno))
    }

    /// Makes any access raise SIGSEGV: the last resort for missing pages on kernels without `UFFDIO_POISON` (S1).
    pub(crate) fn forbid(&self, offset: u64, len: usize) -> Result<(), RegionError> {
        let address = self.address_of(offset, len)?;
        let Some(start) = NonNull::new(address as *mut c_void) else { return Ok(()) };
        // SAFETY: inside the mapping (M1); the range stays mapped, so no other object can appear in it.
        unsafe { nix::sys::mman::mprotect(start, len, ProtFlags::PROT_NONE) }
            .map_err(|errno| RegionError::system("mprotect", errno))
    }
}

/// Lets the kernel copy bytes out of this process, from any address (process_vm_readv(2)): what cannot be read is EFAULT and no signal. Whoever reads by number alone keeps no
/// mapping from ending. It waits like any access where the memory is registered and a page is missing.
pub(crate) fn read_live_at(address: usize, into: &mut [u8]) -> Result<(), Errno> {
    let me = nix::unistd::Pid::this();
    let mut done = 0;
    while done < into.len() {
        let remote = [nix::sys::uio::RemoteIoVec { base: address + done, len: into.len() - done }];
        let mut local = [std::io::IoSliceMut::new(&mut into[done..])];
        match nix::sys::uio::process_vm_readv(me, &mut local, &remote) {
            Ok(0) => return Err(Errno::EFAULT),
            Ok(n) => done += n,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this mapping's own range (M1); whoever still holds a raw pointer into it was told when it got the pointer.
        if let Err(errno) = unsafe { munmap(self.start, self.len) } {
            tracing::error!(%errno, start = self.address(), len = self.len, "munmap failed; the range leaks");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn mapping(pages: usize) -> Mapping {
        Mapping::anonymous(NonZeroUsize::new(pages * page_size().len()).unwrap(), MapAt::Anywhere, false).unwrap()
    }

    proptest! {
        #[test]
        fn reads_give_what_writes_put_at_any_alignment(offset in 0u64..100, bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mapping = mapping(1);
            mapping.write_at(offset, &bytes).unwrap();
            let mut live = vec![1; bytes.len()];
            let mut back = vec![1; bytes.len() + 1];
            mapping.read_at(offset, &mut back).unwrap();
            mapping.read_live(offset, &mut live).unwrap();
            prop_assert_eq!(&back[..bytes.len()], &bytes[..]);
            prop_assert_eq!(back[bytes.len()], 0);
            prop_assert_eq!(live, bytes);
        }
    }

    #[test]
    fn what_is_discarded_together_reads_as_zeros_and_the_rest_stays() {
        let mapping = mapping(3000);
        for page in 0..3000 {
            mapping.write_at(page * 4096, &[7; 4096]).unwrap();
        }
        let odd: Vec<(u64, usize)> = (1..3000).step_by(2).map(|page| (page * 4096, 4096)).collect();
        mapping.discard_all(&odd).unwrap();
        for page in 0..3000 {
            let mut byte = [1];
            mapping.read_at(page * 4096 + 5, &mut byte).unwrap();
            assert_eq!(byte, [if page % 2 == 1 { 0 } else { 7 }], "page {page}");
        }
        assert!(matches!(mapping.discard_all(&[(0, 4096), (3000 * 4096, 4096)]), Err(RegionError::OutOfRange { .. })));
    }

    #[test]
    fn ranges_are_checked_before_any_pointer_is_made() {
        let mapping = mapping(2);
        let size = mapping.len() as u64;
        assert!(mapping.read_at(size - 4, &mut [0; 4]).is_ok());
        for offset in [size - 3, size, u64::MAX - 1, u64::MAX] {
            let error = mapping.read_at(offset, &mut [0; 4]).unwrap_err();
            assert!(matches!(error, RegionError::OutOfRange { len: 4, .. }), "{error}");
        }
        assert!(matches!(mapping.words64(4, 1), Err(RegionError::Misaligned { offset: 4, align: 8 })));
        assert!(matches!(mapping.words64(0, usize::MAX / 4), Err(RegionError::OutOfRange { .. })));
    }

    #[test]
    fn a_taken_address_is_named_in_the_error() {
        let first = mapping(4);
        let inside = NonZeroUsize::new(first.address() + page_size().len()).unwrap();
        let error = Mapping::anonymous(NonZeroUsize::new(page_size().len()).unwrap(), MapAt::Address(inside), false).unwrap_err();
        assert!(matches!(error, RegionError::AddressTaken { address, .. } if address == inside.get()), "{error}");
    }

    #[test]
    fn an_unaligned_or_impossible_address_is_refused() {
        let len = NonZeroUsize::new(4096).unwrap();
        for address in [4097, 1 << 63] {
            let error = Mapping::anonymous(len, MapAt::Address(NonZeroUsize::new(address).unwrap()), false).unwrap_err();
            assert!(matches!(error, RegionError::InvalidAddress { .. }), "{error}");
        }
    }

    #[test]
    fn a_live_read_of_a_forbidden_page_is_an_error_and_no_signal() {
        let mapping = mapping(2);
        mapping.forbid(4096, 4096).unwrap();
        assert!(mapping.read_live(0, &mut [0; 4096]).is_ok());
        assert!(matches!(mapping.read_live(4096, &mut [0; 8]), Err(RegionError::System { call: "process_vm_readv", .. })));
    }
}
