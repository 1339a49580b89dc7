//! Memory into which the kernel copies live pages, over and over.
//!
//! Role: what bulk reads of a region copy into. Neighbours: `region::buffers` lends its pieces out. Invariants: M3 of `sys`; a copy from an address that cannot be read is EFAULT and no signal.
//!
//! It is a file without a name, mapped once: write(2) to it copies from this process's memory as a user access does, page tables and all, where process_vm_readv(2) looks up and pins each page,
//! which takes twice as long (bench `migration`, `source_read_*`).

use nix::{
    errno::Errno,
    sys::{
        memfd::{MFdFlags, memfd_create},
        mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, munmap},
    },
};
use std::{
    ffi::c_void,
    num::NonZeroUsize,
    os::fd::{AsRawFd, OwnedFd},
    ptr::NonNull,
    sync::{Arc, Mutex, PoisonError},
};

/// Pieces of one length. Memory is taken when a piece is first used, and kept.
#[derive(Debug)]
pub(crate) struct Copies {
    file: OwnedFd,
    start: NonNull<c_void>,
    piece_bytes: usize,
    pieces: usize,
    /// Those that nobody holds; the one that was held last is the likeliest to be in a cache.
    free: Mutex<Vec<usize>>,
}

// SAFETY: the bytes of a piece are reached only through the one `Piece` that holds it (M3).
unsafe impl Send for Copies {}
// SAFETY: as above.
unsafe impl Sync for Copies {}

impl Copies {
    /// Maps room for `pieces` of `piece_bytes` each, a multiple of the page.
    pub(crate) fn new(pieces: usize, piece_bytes: usize) -> Result<Arc<Copies>, Errno> {
        let len = pieces.checked_mul(piece_bytes).and_then(NonZeroUsize::new).ok_or(Errno::EINVAL)?;
        let file = memfd_create(c"pageferry-copies", MFdFlags::MFD_CLOEXEC)?;
        nix::unistd::ftruncate(&file, i64::try_from(len.get()).map_err(|_| Errno::EINVAL)?)?;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping where the kernel likes, of a file that nobody else has.
        let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }?;
        let copies = Copies { file, start, piece_bytes, pieces, free: Mutex::new((0..pieces).rev().collect()) };
        // SAFETY: the mapping just made; the advices change neither its content nor its address. A child of a fork would share the bytes.
        unsafe { madvise(start, len.get(), MmapAdvise::MADV_DONTFORK) }?;
        // SAFETY: as above.
        unsafe { madvise(start, len.get(), MmapAdvise::MADV_DONTDUMP) }?;
        Ok(Arc::new(copies))
    }

    /// One that nobody holds.
    pub(crate) fn take(self: &Arc<Copies>) -> Option<Piece> {
        let at = self.free().pop()?;
        Some(Piece { copies: self.clone(), at, len: 0 })
    }

    fn free(&self) -> std::sync::MutexGuard<'_, Vec<usize>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        // SAFETY: this mapping's own range; every piece holds an Arc of this, so none is left.
        if let Err(errno) = unsafe { munmap(self.start, self.pieces * self.piece_bytes) } {
            tracing::error!(%errno, "munmap failed; the copies leak");
        }
    }
}

/// One copy, held.
#[derive(Debug)]
pub(crate) struct Piece {
    copies: Arc<Copies>,
    at: usize,
    /// Of what was copied.
    len: usize,
}

impl Piece {
    /// Copies `len` bytes from an address of this process. It waits like any access where the memory is registered and a page is missing.
    pub(crate) fn copy_live(&mut self, address: usize, len: usize) -> Result<(), Errno> {
        if len > self.copies.piece_bytes {
            return Err(Errno::EINVAL);
        }
        let (file, offset) = (self.copies.file.as_raw_fd(), self.at * self.copies.piece_bytes);
        let mut done = 0;
        while done < len {
            let from = (address + done) as *const c_void;
            let at = i64::try_from(offset + done).map_err(|_| Errno::EINVAL)?;
            // SAFETY: the kernel reads from any address and answers EFAULT where it cannot; it writes into this piece, which nobody reads meanwhile (M3).
            match Errno::result(unsafe { libc::pwrite64(file, from, len - done, at) }) {
                Ok(0) => return Err(Errno::EFAULT),
                Ok(n) => done += n.unsigned_abs(),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        self.len = len;
        Ok(())
    }

    /// The first `len` bytes of it, to be written over; at most a piece.
    pub(crate) fn resize(&mut self, len: usize) -> &mut [u8] {
        self.len = len.min(self.copies.piece_bytes);
        // SAFETY: inside the mapping, which `copies` keeps; nobody else reaches this piece (M3), which is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.first(), self.len) }
    }

    fn first(&self) -> *mut u8 {
        self.copies.start.as_ptr().cast::<u8>().wrapping_add(self.at * self.copies.piece_bytes)
    }
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: inside the mapping, which `copies` keeps; its bytes change only by methods that borrow this piece exclusively (M3), and `len` is within the piece.
        unsafe { std::slice::from_raw_parts(self.first(), self.len) }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.copies.free().push(self.at);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_piece_is_one_holders_and_comes_back() {
        let copies = Copies::new(2, 8192).unwrap();
        let (mut first, second) = (copies.take().unwrap(), copies.take().unwrap());
        assert!(copies.take().is_none());
        let from = vec![7u8; 8192];
        first.copy_live(from.as_ptr().addr(), 8192).unwrap();
        assert_eq!(first.as_ref(), from);
        assert_eq!(first.copy_live(from.as_ptr().addr(), 8193), Err(Errno::EINVAL));
        first.resize(3).fill(1);
        assert_eq!(first.as_ref(), [1; 3]);
        drop(second);
        let mut again = copies.take().unwrap();
        again.copy_live(from.as_ptr().addr(), 4096).unwrap();
        assert_eq!((first.as_ref(), again.as_ref()), (&[1u8; 3][..], &from[..4096]));
    }

    #[test]
    fn what_cannot_be_read_is_an_error_and_no_signal() {
        let copies = Copies::new(1, 8192).unwrap();
        let mut piece = copies.take().unwrap();
        assert_eq!(piece.copy_live(1, 8192), Err(Errno::EFAULT));
        assert_eq!(piece.as_ref(), []);
    }
}
