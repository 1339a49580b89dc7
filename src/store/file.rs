//! [`FileStore`]: pages in a file or block device.
//!
//! Role: a store that survives the process. Neighbours: `Layout` cuts extents into chunks; system calls run on tokio's blocking
//! threads. Invariants: a page is never read while it is being written, whatever the file system promises; a failed fsync is never
//! followed by a successful one; bytes past the recorded size are neither written nor read.

use super::{
    Layout,
    blocking::{at_path, failed, run_blocking, sync_directory_of},
    pull_by_reading,
};
use crate::{Extent, PageSize, PageStore, Pull, Run, StoreError};
use async_trait::async_trait;
use bytes::Bytes;
use nix::{
    errno::Errno,
    unistd::{Whence, lseek},
};
use std::{
    fmt,
    fs::{File, OpenOptions},
    io::{self, Seek, SeekFrom},
    os::unix::fs::{FileExt, FileTypeExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Locks for chunks, chosen by index: few enough to be nothing, enough that two chunks in use rarely share one.
const STRIPES: usize = 64;

/// Pages in a file or block device. A clone is another handle to the same file.
///
/// A read is cut at multiples of 1 MiB; a piece that lies wholly in a hole of a sparse file is answered as
/// [`Content::Zero`](crate::Content) without reading.
/// The file is not locked against other processes: one that truncates it makes reads past the new end fail with
/// [`StoreError::Io`]; one that writes to it may be seen in the middle of a page.
///
/// Cancellation: a dropped `write` stops after the chunk at hand and never overwrites a later write through this store.
/// Threads: reads, writes and flushes run on the blocking threads of the tokio runtime that polls them, and fail with
/// [`StoreError::Io`] outside of one. The constructors block for a few system calls.
///
/// ```
/// use pageferry::{Extent, FileStore, PageSize, PageStore};
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// let store = FileStore::create(dir.path().join("pages"), 64 * 1024, PageSize::KIB_4)?;
/// store.write(Extent::page(2), &[7; 4096]).await?;
/// store.flush().await?;
/// assert_eq!(std::fs::read(dir.path().join("pages"))?[8191..8193], [0, 7]);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct FileStore {
    inner: Arc<Inner>,
}

struct Inner {
    file: File,
    path: PathBuf,
    layout: Layout,
    writable: bool,
    stripes: [RwLock<()>; STRIPES],
    flushed: Mutex<Result<(), StoreError>>,
}

impl FileStore {
    /// Opens an existing file or block device for reading and writing. Its size now is the store's size for good.
    ///
    /// # Errors
    /// [`StoreError::Io`] with the path, if it cannot be opened so, or is neither a file nor a block device.
    pub fn open(path: impl AsRef<Path>, page_size: PageSize) -> Result<FileStore, StoreError> {
        FileStore::existing(path.as_ref(), page_size, true).map_err(|error| at_path("open", path.as_ref(), error))
    }

    /// Opens an existing file or block device for reading; writes are refused with [`StoreError::ReadOnly`].
    ///
    /// # Errors
    /// As for [`open`](FileStore::open).
    pub fn open_read_only(path: impl AsRef<Path>, page_size: PageSize) -> Result<FileStore, StoreError> {
        FileStore::existing(path.as_ref(), page_size, false).map_err(|error| at_path("open", path.as_ref(), error))
    }

    /// Creates a sparse file of `size_bytes` zeros, whose name is durable when this returns.
    ///
    /// # Errors
    /// [`StoreError::Io`] with the path: the file exists (remove it first, or open it), the directory cannot be written or synced,
    /// or the file system cannot have a file of that size.
    pub fn create(path: impl AsRef<Path>, size_bytes: u64, page_size: PageSize) -> Result<FileStore, StoreError> {
        let path = path.as_ref();
        let create = || {
            let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
            if let Err(error) = file.set_len(size_bytes).and_then(|()| file.sync_all()).and_then(|()| sync_directory_of(path)) {
                // Ours alone, and of no use to anybody; the first error is the one to report.
                let _ = std::fs::remove_file(path);
                return Err(error);
            }
            Ok(FileStore::new(file, path, Layout { size_bytes, page_size }, true))
        };
        create().map_err(|error| at_path("create", path, error))
    }

    fn existing(path: &Path, page_size: PageSize, writable: bool) -> io::Result<FileStore> {
        let mut file = OpenOptions::new().read(true).write(writable).open(path)?;
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        }
        // Not the metadata's length, which is zero for a block device.
        let size_bytes = file.seek(SeekFrom::End(0))?;
        Ok(FileStore::new(file, path, Layout { size_bytes, page_size }, writable))
    }

    fn new(file: File, path: &Path, layout: Layout, writable: bool) -> FileStore {
        let (path, stripes, flushed) = (path.to_owned(), [const { RwLock::new(()) }; STRIPES], Mutex::new(Ok(())));
        FileStore { inner: Arc::new(Inner { file, path, layout, writable, stripes, flushed }) }
    }

    /// Runs `work` on a blocking thread. Once the future is dropped, its flag tells `work` to stop.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        extent: Extent,
        work: impl FnOnce(&Inner, &AtomicBool) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let inner = self.inner.clone();
        run_blocking(operation, extent, move |abandoned| work(&inner, abandoned)).await
    }

    /// As `read`, on the thread that calls.
    pub(super) fn read_now(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.inner.read(extent, &AtomicBool::new(false))
    }

    /// As `write`, on the thread that calls.
    pub(super) fn write_now(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.inner.write(extent, bytes, &AtomicBool::new(false))
    }

    /// As `flush`, on the thread that calls.
    pub(super) fn flush_now(&self) -> Result<(), StoreError> {
        self.inner.flush()
    }
}

impl Inner {
    fn read(&self, extent: Extent, abandoned: &AtomicBool) -> Result<Vec<Run>, StoreError> {
        let read = |(chunk, piece): (u64, Extent)| {
            let _shared = self.stripe(chunk).read().unwrap_or_else(PoisonError::into_inner);
            if abandoned.load(Ordering::Acquire) {
                return Err(StoreError::Closed);
            }
            self.read_piece(piece).map_err(|error| failed("read", piece, error))
        };
        self.layout.pieces(extent).map(read).collect()
    }

    fn read_piece(&self, piece: Extent) -> io::Result<Run> {
        let stored = self.layout.stored_bytes(piece);
        let start = self.layout.page_size.offset_of(piece.first());
        if self.is_hole(start, stored as u64)? {
            return Ok(Run::zero(piece));
        }
        let mut bytes = vec![0; piece.bytes(self.layout.page_size) as usize];
        let mut done = 0;
        while done < stored {
            match self.file.read_at(&mut bytes[done..stored], start + done as u64) {
                Ok(0) => return Err(self.truncated(start + done as u64)),
                Ok(n) => done += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Run::bytes(piece, Bytes::from(bytes)))
    }

    /// Whether the file holds no data in `len_bytes` from `start`. A file system that does not know its holes says that all is data.
    /// Moves the file's offset, which nothing here uses.
    fn is_hole(&self, start: u64, len_bytes: u64) -> io::Result<bool> {
        let end = start + len_bytes;
        match lseek(&self.file, start as i64, Whence::SeekData) {
            Ok(data) => Ok(data as u64 >= end),
            // No data up to the end of the file (lseek(2)); if that has moved to before `end`, it is not a hole but a loss.
            Err(Errno::ENXIO) => Ok(self.file.metadata()?.len() >= end),
            // A device that cannot seek for data can still be read.
            Err(_) => Ok(false),
        }
    }

    fn truncated(&self, at_bytes: u64) -> io::Error {
        let size_bytes = self.layout.size_bytes;
        let text = format!(
            "the file ends at byte {at_bytes} but had {size_bytes} when opened: somebody truncated it; restore and reopen it"
        );
        io::Error::new(io::ErrorKind::UnexpectedEof, text)
    }

    fn write(&self, extent: Extent, bytes: &[u8], abandoned: &AtomicBool) -> Result<(), StoreError> {
        for (chunk, piece) in self.layout.pieces(extent) {
            let _alone = self.stripe(chunk).write().unwrap_or_else(PoisonError::into_inner);
            // Under the lock: a write begun after this one was dropped either waits here for the piece at hand, or was first and its
            // unlocking shows us the flag. Either way it is not overwritten.
            if abandoned.load(Ordering::Acquire) {
                return Err(StoreError::Closed);
            }
            let stored = &bytes[self.layout.range_in(extent, piece)][..self.layout.stored_bytes(piece)];
            let offset = self.layout.page_size.offset_of(piece.first());
            self.file.write_all_at(stored, offset).map_err(|error| failed("write", piece, error))?;
        }
        Ok(())
    }

    /// After a failed fsync the kernel may drop the dirty pages, mark them clean and let the next fsync succeed; it reports an error
    /// once per descriptor (fsync(2), EIO; Rebello et al., "Can Applications Recover from fsync Failures?", USENIX ATC 2020). So the
    /// first failure is kept and the call is never repeated, and flushes take turns, so that none misses the error of another.
    fn flush(&self) -> Result<(), StoreError> {
        let mut flushed = self.flushed.lock().unwrap_or_else(PoisonError::into_inner);
        if flushed.is_ok() {
            *flushed = self.file.sync_data().map_err(|error| failed("flush", self.layout.extent(), error));
        }
        flushed.clone()
    }

    fn stripe(&self, chunk: u64) -> &RwLock<()> {
        &self.stripes[chunk as usize % STRIPES]
    }
}

#[async_trait]
impl PageStore for FileStore {
    fn size(&self) -> u64 {
        self.inner.layout.size_bytes
    }

    fn page_size(&self) -> PageSize {
        self.inner.layout.page_size
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        self.inner.layout.check(extent)?;
        self.blocking("read", extent, move |inner, abandoned| inner.read(extent, abandoned)).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        if !self.inner.writable {
            return Err(StoreError::ReadOnly);
        }
        self.inner.layout.check_write(extent, bytes)?;
        let bytes = Bytes::copy_from_slice(bytes);
        self.blocking("write", extent, move |inner, abandoned| inner.write(extent, &bytes, abandoned)).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        if !self.inner.writable {
            return Ok(());
        }
        self.blocking("flush", self.extent(), |inner, _| inner.flush()).await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        pull_by_reading(self, extents)
    }
}

impl fmt::Debug for FileStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = if self.inner.writable { "read-write" } else { "read-only" };
        write!(f, "FileStore({}, {} bytes, {:?}, {access})", self.inner.path.display(), self.size(), self.page_size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        pin::Pin,
        task::{Context, Poll, Waker},
    };

    /// Every write to it fails with ENOSPC and every fsync with EINVAL.
    fn full_store() -> FileStore {
        let file = OpenOptions::new().read(true).write(true).open("/dev/full").unwrap();
        FileStore::new(file, Path::new("/dev/full"), Layout { size_bytes: 1 << 20, page_size: PageSize::KIB_4 }, true)
    }

    fn cause(error: StoreError) -> Arc<io::Error> {
        match error {
            StoreError::Io { source, .. } => source,
            other => panic!("not a failed system call: {other}"),
        }
    }

    fn poll_once<T>(mut future: Pin<&mut dyn Future<Output = T>>) -> Poll<T> {
        future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }

    #[tokio::test]
    async fn a_full_device_refuses_a_write_with_its_errno_and_place() {
        let error = full_store().write(Extent::page(3), &[1; 4096]).await.unwrap_err();
        assert!(error.to_string().starts_with("write failed at pages 3..4: "), "{error}");
        assert_eq!(cause(error).raw_os_error(), Some(Errno::ENOSPC as i32));
    }

    #[tokio::test]
    async fn a_failed_flush_fails_every_later_one_without_asking_again() {
        let store = full_store();
        let first = cause(store.flush().await.unwrap_err());
        assert_eq!(first.raw_os_error(), Some(Errno::EINVAL as i32));
        let second = cause(store.clone().flush().await.unwrap_err());
        assert!(Arc::ptr_eq(&first, &second), "the device was asked a second time");
    }

    #[test]
    fn what_is_left_of_a_dropped_write_never_lands() {
        // One blocking thread takes its tasks in order: when the read is done, so is what is left of the dropped write.
        let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let store = FileStore::create(dir.path().join("pages"), 4 << 20, PageSize::KIB_4).unwrap();
        let last_chunk = store.inner.layout.chunk(3);

        let busy = store.inner.stripe(3).read().unwrap();
        let _inside = runtime.enter();
        let bytes = vec![1; 4 << 20];
        let mut write = store.write(store.extent(), &bytes);
        assert!(poll_once(write.as_mut()).is_pending());
        drop(write);
        drop(busy);
        assert_eq!(runtime.block_on(store.read(last_chunk)).unwrap(), [Run::zero(last_chunk)]);
    }

    #[test]
    fn outside_of_a_runtime_a_read_fails_and_does_not_panic() {
        let store = full_store();
        let Poll::Ready(Err(error)) = poll_once(store.read(Extent::page(0)).as_mut()) else { panic!("did not fail") };
        assert!(error.to_string().contains("runtime"), "{error}");
    }
}
