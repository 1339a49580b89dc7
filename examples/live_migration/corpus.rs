//! The files of this machine, as texts.
//!
//! Role: gives the builder real documents until it is full: text files first, then what is printable in the other files, as
//! strings(1) shows it. Neighbours: `source` reads from the channel. Invariants: never follows a symbolic link; reads only
//! directories of published software, none that may hold secrets; a file that cannot be read is skipped; memory and descriptors are
//! bounded by the channels.

use crate::build::MAX_TEXT_BYTES;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use std::{
    env,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SendError, SyncSender, sync_channel},
    thread,
};

/// Documents, and files, read ahead of the builder.
const AHEAD: usize = 64;
/// What the disk is asked for of each file ahead: all of most files. The kernel's own readahead brings the rest.
const AHEAD_BYTES: i64 = 64 << 10;
/// More of one file would make the load about that file.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Decides between text and binary, as git and grep do.
const LOOKED_AT_BYTES: u64 = 8192;
/// A shorter printable run is likely chance: of random bytes, as in compressed files, 1 position in 2700 starts a run of 8.
const MIN_STRING_BYTES: usize = 8;

/// A file, or a piece of one.
#[derive(Debug, PartialEq, Eq)]
pub struct Document {
    pub path: String,
    /// Where the piece starts in the file's text.
    pub start: u64,
    pub text: Vec<u8>,
}

/// Where software leaves texts: Debian's directories, and Rust's own sources and documentation.
pub fn roots() -> Vec<PathBuf> {
    let home = env::var_os("HOME").map(PathBuf::from);
    let in_home = |variable: &str, directory: &str| {
        env::var_os(variable).map(PathBuf::from).or_else(|| home.as_ref().map(|home| home.join(directory)))
    };
    let mut roots: Vec<PathBuf> = ["/usr/share", "/usr/lib", "/usr/include", "/usr/src"].map(PathBuf::from).into();
    roots.extend(in_home("RUSTUP_HOME", ".rustup").map(|rustup| rustup.join("toolchains")));
    // Only the registry: its parent holds the credentials.
    roots.extend(in_home("CARGO_HOME", ".cargo").map(|cargo| cargo.join("registry")));
    roots.extend(["/usr/bin", "/usr/local", "/opt"].map(PathBuf::from));
    roots
}

/// Starts threads that read the files under `roots`. They end when the receiver is dropped.
///
/// # Errors
/// When no thread can be started.
pub fn read(roots: Vec<PathBuf>) -> io::Result<Receiver<Document>> {
    let (opened, files) = sync_channel(AHEAD);
    let (documents, receiver) = sync_channel(AHEAD);
    // An error of a thread only says that nobody wants more.
    let opener =
        move || roots.iter().try_for_each(|root| walk(root, &mut |path| open(path).map_or(Ok(()), |file| opened.send(file))));
    let reader = move || {
        let mut binaries = Vec::new();
        for (path, mut file) in files {
            match read_text(&mut file) {
                Ok(Some(text)) => send_pieces(&documents, &path, &text)?,
                Ok(None) => binaries.push(path),
                Err(_) => {}
            }
        }
        binaries.iter().filter_map(|path| open(path)).try_for_each(|(path, file)| {
            let mut bytes = Vec::new();
            let read = file.take(MAX_FILE_BYTES).read_to_end(&mut bytes);
            read.map_or(Ok(()), |_| send_pieces(&documents, &path, &printable(&bytes)))
        })
    };
    thread::Builder::new().name("corpus-open".into()).spawn(opener)?;
    thread::Builder::new().name("corpus-read".into()).spawn(reader)?;
    Ok(receiver)
}

/// Calls `visit` for each regular file under `root`, in the order of names.
fn walk<E>(root: &Path, visit: &mut impl FnMut(&Path) -> Result<(), E>) -> Result<(), E> {
    let mut left = vec![root.to_owned()];
    while let Some(directory) = left.pop() {
        let mut entries: Vec<_> = fs::read_dir(&directory).into_iter().flatten().flatten().collect();
        entries.sort_by_key(fs::DirEntry::file_name);
        let mut below = Vec::new();
        for entry in entries {
            // Of the entry itself: a link is neither file nor directory.
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => below.push(entry.path()),
                Ok(kind) if kind.is_file() => visit(&entry.path())?,
                _ => {}
            }
        }
        left.extend(below.into_iter().rev());
    }
    Ok(())
}

/// Opens a file and has the disk begin to read it: with one file after the other, the disk would be idle most of the time.
fn open(path: &Path) -> Option<(PathBuf, File)> {
    let file = File::open(path).ok()?;
    // Only advice: a file system that does not take it reads later.
    let _ = posix_fadvise(&file, 0, AHEAD_BYTES, PosixFadviseAdvice::POSIX_FADV_WILLNEED);
    Some((path.to_owned(), file))
}

/// All of a text; of a binary, for which it gives `None`, no more than the start is read.
fn read_text(file: &mut File) -> io::Result<Option<Vec<u8>>> {
    let mut text = Vec::new();
    file.take(LOOKED_AT_BYTES).read_to_end(&mut text)?;
    if !is_text(&text) {
        return Ok(None);
    }
    file.take(MAX_FILE_BYTES - LOOKED_AT_BYTES).read_to_end(&mut text)?;
    Ok(Some(text))
}

/// No zero byte and hardly a control character at its start. Encodings that extend ASCII pass.
fn is_text(start: &[u8]) -> bool {
    let odd = start.iter().filter(|byte| byte.is_ascii_control() && !byte.is_ascii_whitespace()).count();
    !start.contains(&0) && odd * 100 <= start.len()
}

/// The printable runs of a binary file, one a line.
fn printable(bytes: &[u8]) -> Vec<u8> {
    let runs = bytes.split(|byte| !(byte.is_ascii_graphic() || *byte == b' '));
    runs.filter(|run| run.len() >= MIN_STRING_BYTES).flat_map(|run| run.iter().copied().chain([b'\n'])).collect()
}

/// Cuts a text at line ends, or at blanks, into pieces a document can hold.
fn send_pieces(to: &SyncSender<Document>, path: &Path, text: &[u8]) -> Result<(), SendError<Document>> {
    let mut start = 0;
    while start < text.len() {
        let rest = &text[start..];
        let end = if rest.len() <= MAX_TEXT_BYTES {
            rest.len()
        } else {
            let most = &rest[..MAX_TEXT_BYTES];
            let line_end = most.iter().rposition(|byte| *byte == b'\n');
            line_end.or_else(|| most.iter().rposition(u8::is_ascii_whitespace)).map_or(MAX_TEXT_BYTES, |at| at + 1)
        };
        let path = path.to_string_lossy().into_owned();
        to.send(Document { path, start: start as u64, text: rest[..end].to_vec() })?;
        start += end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_come_first_then_the_strings_of_binaries_and_links_never() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("below")).unwrap();
        fs::write(root.path().join("a.bin"), b"\0\x01short\0a long enough string\0\xff").unwrap();
        fs::write(root.path().join("below/b.txt"), "na\u{ef}ve text\n").unwrap();
        fs::write(root.path().join("empty"), "").unwrap();
        std::os::unix::fs::symlink(root.path(), root.path().join("loop")).unwrap();
        let documents: Vec<(String, String)> = read(vec![root.path().to_owned(), root.path().join("absent")])
            .unwrap()
            .iter()
            .map(|document| (document.path.rsplit('/').next().unwrap().to_owned(), String::from_utf8(document.text).unwrap()))
            .collect();
        let expected = [("b.txt", "na\u{ef}ve text\n"), ("a.bin", "a long enough string\n")];
        assert_eq!(documents, expected.map(|(name, text)| (name.to_owned(), text.to_owned())));
    }

    #[test]
    fn pieces_end_at_lines_and_add_up_to_the_text() {
        let line = [b"x".repeat(99), b"\n".to_vec()].concat();
        for text in [line.repeat(MAX_TEXT_BYTES / 40), vec![b'x'; MAX_TEXT_BYTES * 2 + 1]] {
            let (to, pieces) = sync_channel(9);
            send_pieces(&to, Path::new("p"), &text).unwrap();
            drop(to);
            let mut joined = Vec::new();
            for piece in pieces {
                assert_eq!(piece.start, joined.len() as u64);
                assert!(piece.text.len() <= MAX_TEXT_BYTES && (text[0..99].len() == 99));
                joined.extend(piece.text);
                assert!(text[99] == b'x' || joined.ends_with(b"\n"));
            }
            assert!(joined == text);
        }
    }
}
