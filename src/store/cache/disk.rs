//! The two files of a cache: their lock, what they say when opened, and records appended to the journal.
//!
//! Role: every change of what counts goes through [`JournalFile::append`]. Neighbours: `journal` says what bytes mean; `shared` calls.
//! Invariants: a frame is durable before the next is begun; one that could not be written is taken back or ends the journal for good;
//! the caller has made page bytes durable before it appends that they count.

use super::{
    journal::{Entry, Header, IDENTITY_MAX_BYTES, Mark, encode_frame, recover},
    spans::Spans,
};
use crate::{
    Extent, StoreError,
    store::{
        Layout,
        blocking::{at_path, failed, sync_directory_of},
    },
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};
use std::{
    fs::{self, File, OpenOptions},
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, ErrorKind},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

/// A journal is not rewritten before it has so many bytes: some 1,300 records of one extent.
const COMPACT_MIN_BYTES: u64 = 64 << 10;
/// And not before it has so many times what is left of it.
const COMPACT_FACTOR: u64 = 4;

/// The journal of an open cache.
pub(super) struct JournalFile {
    path: PathBuf,
    file: File,
    header: Header,
    /// What the file says.
    marks: Spans<Mark>,
    len_bytes: u64,
    next_frame: u64,
    compact_at_bytes: u64,
    /// What could not be appended: true all the same, and first in the next frame.
    owed: Vec<Entry>,
    /// After a failed fsync nobody knows what the file holds (see `FileStore`).
    broken: Option<StoreError>,
}

/// Opens the files of a cache, or makes them; gives what the journal says and the lock that lasts as long as it is kept.
///
/// # Errors
/// [`StoreError::Io`] with the path: in use, of another store, damaged, or what the system refused.
pub(super) fn open(path: &Path, layout: Layout, identity: &[u8]) -> Result<(JournalFile, Spans<Mark>, Flock<File>), StoreError> {
    let named = |error| at_path("open", path, error);
    if identity.len() > IDENTITY_MAX_BYTES {
        let text = format!("the identity has {} bytes, allowed are {IDENTITY_MAX_BYTES}", identity.len());
        return Err(named(io::Error::new(ErrorKind::InvalidInput, text)));
    }
    let data = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(named)?;
    let lock = Flock::lock(data, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => {
            let text = "another CacheStore, of this process or another, has this cache open: close it, or use another path";
            named(io::Error::new(ErrorKind::WouldBlock, text))
        }
        errno => named(errno.into()),
    })?;
    let journal = open_journal(path, layout, identity, &lock).map_err(named)?;
    let marks = journal.marks.clone();
    Ok((journal, marks, lock))
}

/// Beside the data file.
fn journal_path(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn refused(text: String) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, text)
}

fn open_journal(path: &Path, layout: Layout, identity: &[u8], data: &File) -> io::Result<JournalFile> {
    let (at, data_bytes) = (journal_path(path, ".journal"), data.metadata()?.len());
    let shown = at.display();
    let mut journal = match fs::read(&at) {
        Ok(bytes) => {
            let recovered = recover(&bytes).map_err(|error| {
                refused(format!(
                    "the cache's journal {shown} cannot be believed: {error}; restore both files from a backup, or remove both to begin \
                     anew, without what was written and not pushed"
                ))
            })?;
            let header = recovered.header;
            let (page_bytes, wanted_bytes) = (header.page_size.bytes(), layout.page_size.bytes());
            if (header.size_bytes, page_bytes) != (layout.size_bytes, wanted_bytes) {
                return Err(refused(format!(
                    "this is the cache of a store of {} bytes in pages of {page_bytes}, the remote store has {} in pages of \
                     {wanted_bytes}: use another path",
                    header.size_bytes, layout.size_bytes
                )));
            }
            if header.identity != identity {
                return Err(refused(format!(
                    "this is the cache of store {:?}, not of {:?}: use another path",
                    String::from_utf8_lossy(&header.identity),
                    String::from_utf8_lossy(identity)
                )));
            }
            let file = OpenOptions::new().read(true).write(true).open(&at)?;
            if recovered.good_bytes < bytes.len() {
                tracing::warn!(journal = %shown, cut_bytes = bytes.len() - recovered.good_bytes, "cut off an interrupted record");
                file.set_len(recovered.good_bytes as u64)?;
            }
            // Also what a killed process left in the page cache: from here on it counts.
            file.sync_all()?;
            let (len_bytes, marks, next_frame) = (recovered.good_bytes as u64, recovered.marks, recovered.next_frame);
            JournalFile { path: at, file, header, marks, len_bytes, next_frame, compact_at_bytes: 0, owed: vec![], broken: None }
        }
        Err(error) if error.kind() == ErrorKind::NotFound && data_bytes == 0 => {
            let header =
                Header { page_size: layout.page_size, size_bytes: layout.size_bytes, identity: identity.to_vec(), nonce: 0 };
            let (file, header, len_bytes) = write_new(path, &at, &header, &Spans::default())?;
            let marks = Spans::default();
            JournalFile { path: at, file, header, marks, len_bytes, next_frame: 1, compact_at_bytes: 0, owed: vec![], broken: None }
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Err(refused(format!(
                "there are {data_bytes} bytes here and no journal {shown}, so nothing says what they are: restore it, or remove the \
                 file to begin anew"
            )));
        }
        Err(error) => return Err(error),
    };
    journal.compact_at_bytes = COMPACT_MIN_BYTES.max(journal.len_bytes);
    if data_bytes != layout.size_bytes {
        let pages = journal.marks.pages(|_| true);
        if pages > 0 {
            return Err(refused(format!(
                "the cache's file has {data_bytes} bytes instead of {}, and its journal speaks of {pages} pages in it: restore it, or \
                 remove both files to begin anew",
                layout.size_bytes
            )));
        }
        data.set_len(layout.size_bytes)?;
        data.sync_all()?;
        sync_directory_of(path)?;
    }
    Ok(journal)
}

/// A journal of one frame in the place of whatever is at `at`: wholly there or not at all. Returns it, its header and its length.
fn write_new(path: &Path, at: &Path, like: &Header, marks: &Spans<Mark>) -> io::Result<(File, Header, u64)> {
    let header = Header { nonce: RandomState::new().build_hasher().finish(), ..like.clone() };
    let entries: Vec<Entry> = marks.iter().map(|(extent, mark)| (extent, Some(mark))).collect();
    let bytes = [header.encode(), encode_frame(header.nonce, 0, &entries)].concat();
    let aside = journal_path(path, ".journal.new");
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(&aside)?;
    file.write_all_at(&bytes, 0)?;
    file.sync_all()?;
    fs::rename(&aside, at)?;
    Ok((file, header, bytes.len() as u64)).and_then(|new| sync_directory_of(at).map(|()| new))
}

impl JournalFile {
    /// Makes it durable that `entries` hold. If that fails they are owed, and first in whatever is appended next.
    pub(super) fn append(&mut self, entries: impl IntoIterator<Item = Entry>) -> Result<(), StoreError> {
        self.owed.extend(entries);
        self.write_owed()
    }

    /// As `append`, but what fails is as if it had not been tried.
    pub(super) fn try_append(&mut self, entries: impl IntoIterator<Item = Entry>) -> Result<(), StoreError> {
        let owed = self.owed.len();
        self.append(entries).inspect_err(|_| self.owed.truncate(owed))
    }

    fn write_owed(&mut self) -> Result<(), StoreError> {
        if let Some(broken) = &self.broken {
            return Err(broken.clone());
        }
        if self.owed.is_empty() {
            return Ok(());
        }
        let whole = self.owed.iter().map(|(extent, _)| extent.end()).max().map_or(Extent::default(), |end| Extent::between(0, end));
        let frame = encode_frame(self.header.nonce, self.next_frame, &self.owed);
        if let Err(error) = self.file.write_all_at(&frame, self.len_bytes) {
            let error = failed("write to the cache's journal", whole, error);
            if self.file.set_len(self.len_bytes).is_err() {
                self.broken = Some(error.clone());
            }
            return Err(error);
        }
        if let Err(error) = self.file.sync_data() {
            let error = failed("flush of the cache's journal", whole, error);
            self.broken = Some(error.clone());
            return Err(error);
        }
        self.len_bytes += frame.len() as u64;
        self.next_frame += 1;
        for (extent, mark) in self.owed.drain(..) {
            self.marks.set(extent, mark);
        }
        if self.len_bytes > self.compact_at_bytes {
            self.compact();
        }
        Ok(())
    }

    /// Rewrites the journal as what it says. One that cannot be rewritten goes on as it is.
    fn compact(&mut self) {
        let data_path = self.path.with_extension("");
        match write_new(&data_path, &self.path, &self.header, &self.marks) {
            Ok((file, header, len_bytes)) => {
                (self.file, self.header, self.len_bytes, self.next_frame) = (file, header, len_bytes, 1);
                self.compact_at_bytes = COMPACT_MIN_BYTES.max(len_bytes.saturating_mul(COMPACT_FACTOR));
            }
            Err(error) => {
                tracing::warn!(journal = %self.path.display(), %error, "the journal could not be rewritten");
                self.compact_at_bytes = self.len_bytes.saturating_mul(2);
                // Renamed, perhaps, and then this descriptor is of a file without a name: what goes there is lost.
                let ours = self.file.metadata().ok().map(|ours| std::os::unix::fs::MetadataExt::ino(&ours));
                let named = fs::metadata(&self.path).ok().map(|named| std::os::unix::fs::MetadataExt::ino(&named));
                if ours != named {
                    self.broken = Some(failed("flush of the cache's journal", Extent::default(), error));
                }
            }
        }
    }
}
