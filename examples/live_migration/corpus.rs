//! The files of this machine, as texts.
//!
//! Role: gives the builder real documents until it is full: text files first, then what is printable in the other files, as
//! strings(1) shows it. Neighbours: `source` reads from the channel. Invariants: never follows a symbolic link; reads only
//! directories of published software, none that may hold secrets; a file that cannot be read is skipped; memory is bounded by the
//! channel.

use crate::build::MAX_TEXT_BYTES;
use std::{
    env,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SendError, SyncSender, sync_channel},
    thread,
};

/// Documents read ahead of the builder.
const AHEAD: usize = 64;
/// More of one file would make the load about that file.
const MAX_FILE_BYTES: u64 = 64 << 20;
/// Decides between text and binary, as git and grep do.
const LOOKED_AT_BYTES: usize = 8192;
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

/// Starts a thread that reads the files under `roots`. It ends when the receiver is dropped.
///
/// # Errors
/// When no thread can be started.
pub fn read(roots: Vec<PathBuf>) -> std::io::Result<Receiver<Document>> {
    let (documents, receiver) = sync_channel(AHEAD);
    let reader = move || {
        let mut binaries = Vec::new();
        let texts = roots.iter().try_for_each(|root| {
            walk(root, &mut |path| match read_file(path) {
                Some(bytes) if is_text(&bytes) => send_pieces(&documents, path, &bytes),
                Some(_) => {
                    binaries.push(path.to_owned());
                    Ok(())
                }
                None => Ok(()),
            })
        });
        let strings = texts.and_then(|()| {
            binaries.iter().try_for_each(|path| {
                let text = read_file(path).map(|bytes| printable(&bytes)).unwrap_or_default();
                send_pieces(&documents, path, &text)
            })
        });
        // An error only says that nobody wants more.
        drop(strings);
    };
    thread::Builder::new().name("corpus".into()).spawn(reader)?;
    Ok(receiver)
}

type Sent = Result<(), SendError<Document>>;

/// Calls `visit` for each regular file under `root`, in the order of names.
fn walk(root: &Path, visit: &mut impl FnMut(&Path) -> Sent) -> Sent {
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

fn read_file(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// No zero byte and hardly a control character at its start. Encodings that extend ASCII pass.
fn is_text(bytes: &[u8]) -> bool {
    let start = &bytes[..bytes.len().min(LOOKED_AT_BYTES)];
    let odd = start.iter().filter(|byte| byte.is_ascii_control() && !byte.is_ascii_whitespace()).count();
    !start.contains(&0) && odd * 100 <= start.len()
}

/// The printable runs of a binary file, one a line.
fn printable(bytes: &[u8]) -> Vec<u8> {
    let runs = bytes.split(|byte| !(byte.is_ascii_graphic() || *byte == b' '));
    runs.filter(|run| run.len() >= MIN_STRING_BYTES).flat_map(|run| run.iter().copied().chain([b'\n'])).collect()
}

/// Cuts a text at line ends, or at blanks, into pieces a document can hold.
fn send_pieces(to: &SyncSender<Document>, path: &Path, text: &[u8]) -> Sent {
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
