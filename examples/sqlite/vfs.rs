//! Gives SQLite a [`Disk`] for its file.
//!
//! Role: the only unsafe code of this example: SQLite's file interface (<https://www.sqlite.org/vfs.html>), as thin as it can be over safe code. Neighbours: `bank` connects;
//! `disk` is the file. Invariants: a disk is connected to once; nothing but a database's own file can be opened, so a journal on disk, a WAL or a temporary file is an error
//! and not a file beside the region; no lock is ever needed, because a file has one connection.

use crate::disk::{Disk, DiskError};
use rusqlite::{Connection, OpenFlags, ffi};
use std::{
    collections::HashMap,
    ffi::{CStr, c_char, c_int, c_void},
    mem,
    ptr::{null, null_mut},
    slice,
    sync::{
        Arc, LazyLock, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

const NAME: &CStr = c"pageferry";
/// Longest name of a file, with its zero.
const MAX_NAME: c_int = 64;

/// Disks that SQLite was not asked to open yet, by the name of their file.
static WAITING: LazyLock<Mutex<HashMap<String, Arc<Disk>>>> = LazyLock::new(Mutex::default);

/// Opens the database on this disk, or begins one if the file is empty.
///
/// # Errors
/// What SQLite says.
pub fn connect(disk: &Arc<Disk>) -> rusqlite::Result<Connection> {
    static FILES: AtomicU64 = AtomicU64::new(1);
    register()?;
    let name = format!("disk-{}", FILES.fetch_add(1, Relaxed));
    waiting(|disks| disks.insert(name.clone(), disk.clone()));
    // One connection, one thread: no mutex of SQLite's is needed either.
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags_and_vfs(&name, flags, NAME);
    waiting(|disks| disks.remove(&name));
    connection
}

fn waiting<T>(work: impl FnOnce(&mut HashMap<String, Arc<Disk>>) -> T) -> T {
    work(&mut WAITING.lock().unwrap_or_else(PoisonError::into_inner))
}

/// Makes the interface known to SQLite, once a process. It is never taken back.
fn register() -> rusqlite::Result<()> {
    static REGISTERED: OnceLock<c_int> = OnceLock::new();
    let code = *REGISTERED.get_or_init(|| {
        let vfs = Box::leak(Box::new(ffi::sqlite3_vfs {
            iVersion: 1,
            szOsFile: c_int::try_from(size_of::<File>()).unwrap_or(c_int::MAX),
            mxPathname: MAX_NAME,
            pNext: null_mut(),
            zName: NAME.as_ptr(),
            pAppData: null_mut(),
            xOpen: Some(open),
            xDelete: Some(delete),
            xAccess: Some(access),
            xFullPathname: Some(full_name),
            // Loading of extensions is compiled out of rusqlite without its feature of that name.
            xDlOpen: None,
            xDlError: None,
            xDlSym: None,
            xDlClose: None,
            xRandomness: Some(randomness),
            xSleep: Some(sleep),
            xCurrentTime: Some(current_time),
            xGetLastError: None,
            xCurrentTimeInt64: None,
            xSetSystemCall: None,
            xGetSystemCall: None,
            xNextSystemCall: None,
        }));
        // SAFETY: the structure is leaked, so it lives and stays in place for ever, as sqlite3_vfs_register(3) asks; SQLite alone writes it (`pNext`) from here on.
        unsafe { ffi::sqlite3_vfs_register(vfs, 0) }
    });
    if code == ffi::SQLITE_OK { Ok(()) } else { Err(rusqlite::Error::SqliteFailure(ffi::Error::new(code), None)) }
}

/// What SQLite holds of an open file: room that SQLite allocates, `szOsFile` bytes aligned to 8, filled in by [`open`].
#[repr(C)]
struct File {
    /// First, because SQLite knows the whole by a pointer to this.
    base: ffi::sqlite3_file,
    disk: Arc<Disk>,
}

const _: () = assert!(align_of::<File>() <= 8, "SQLite aligns what it allocates to 8 bytes");

static METHODS: ffi::sqlite3_io_methods = ffi::sqlite3_io_methods {
    iVersion: 1,
    xClose: Some(close),
    xRead: Some(read),
    xWrite: Some(write),
    xTruncate: Some(truncate),
    xSync: Some(sync),
    xFileSize: Some(file_size),
    xLock: Some(lock),
    xUnlock: Some(lock),
    xCheckReservedLock: Some(check_reserved_lock),
    xFileControl: Some(file_control),
    xSectorSize: Some(sector_size),
    xDeviceCharacteristics: Some(device_characteristics),
    xShmMap: None,
    xShmLock: None,
    xShmBarrier: None,
    xShmUnmap: None,
    xFetch: None,
    xUnfetch: None,
};

// All that follow are for SQLite to call, with pointers as its interface says; the unsafe ones rely on that.

unsafe extern "C" fn open(
    _: *mut ffi::sqlite3_vfs,
    name: ffi::sqlite3_filename,
    file: *mut ffi::sqlite3_file,
    flags: c_int,
    out_flags: *mut c_int,
) -> c_int {
    // SAFETY: SQLite hands over `szOsFile` bytes for the file. Without methods it does not close what was not opened.
    unsafe { (&raw mut (*file).pMethods).write(null()) };
    if name.is_null() || flags & ffi::SQLITE_OPEN_MAIN_DB == 0 {
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: a name that is not null ends with a zero and stays until the file is closed.
    let name = unsafe { CStr::from_ptr(name) };
    let Some(disk) = waiting(|disks| disks.remove(&*name.to_string_lossy())) else { return ffi::SQLITE_CANTOPEN };
    let opened = File { base: ffi::sqlite3_file { pMethods: &raw const METHODS }, disk };
    // SAFETY: the room is `szOsFile` bytes, the size of `File`, and aligned (checked above); it holds nothing that would have to be dropped.
    unsafe { file.cast::<File>().write(opened) };
    if !out_flags.is_null() {
        // SAFETY: it is null or points to an int.
        unsafe { out_flags.write(flags) };
    }
    ffi::SQLITE_OK
}

/// The disk of an open file.
///
/// # Safety
/// `file` was filled in by [`open`] and is not closed yet, for as long as the reference lives.
unsafe fn disk_of<'f>(file: *mut ffi::sqlite3_file) -> &'f Disk {
    // SAFETY: as promised by the caller; only `close` ever takes it back, and one thread at a time uses a connection.
    unsafe { &(*file.cast::<File>()).disk }
}

unsafe extern "C" fn close(file: *mut ffi::sqlite3_file) -> c_int {
    // SAFETY: SQLite closes once what `open` filled in, and uses it no more.
    unsafe { file.cast::<File>().drop_in_place() };
    ffi::SQLITE_OK
}

unsafe extern "C" fn read(file: *mut ffi::sqlite3_file, into: *mut c_void, len: c_int, offset: ffi::sqlite3_int64) -> c_int {
    let (Ok(len), Ok(offset)) = (usize::try_from(len), u64::try_from(offset)) else { return ffi::SQLITE_IOERR_READ };
    // SAFETY: SQLite has room for `len` bytes there. What is behind the file's end must read as zeros, and a slice must hold something.
    unsafe { into.cast::<u8>().write_bytes(0, len) };
    // SAFETY: the same room, just filled, and SQLite's own: nobody else uses it during the call.
    let into = unsafe { slice::from_raw_parts_mut(into.cast::<u8>(), len) };
    // SAFETY: SQLite calls this on files that are open.
    match unsafe { disk_of(file) }.read(offset, into) {
        Ok(read) if read == len => ffi::SQLITE_OK,
        Ok(_) => ffi::SQLITE_IOERR_SHORT_READ,
        Err(_) => ffi::SQLITE_IOERR_READ,
    }
}

unsafe extern "C" fn write(file: *mut ffi::sqlite3_file, bytes: *const c_void, len: c_int, offset: ffi::sqlite3_int64) -> c_int {
    let (Ok(len), Ok(offset)) = (usize::try_from(len), u64::try_from(offset)) else { return ffi::SQLITE_IOERR_WRITE };
    // SAFETY: SQLite has `len` bytes there, which nobody changes during the call.
    let bytes = unsafe { slice::from_raw_parts(bytes.cast::<u8>(), len) };
    // SAFETY: SQLite calls this on files that are open.
    match unsafe { disk_of(file) }.write(offset, bytes) {
        Ok(()) => ffi::SQLITE_OK,
        Err(DiskError::Full { .. }) => ffi::SQLITE_FULL,
        Err(_) => ffi::SQLITE_IOERR_WRITE,
    }
}

unsafe extern "C" fn truncate(file: *mut ffi::sqlite3_file, len: ffi::sqlite3_int64) -> c_int {
    let Ok(len) = u64::try_from(len) else { return ffi::SQLITE_IOERR_TRUNCATE };
    // SAFETY: SQLite calls this on files that are open.
    let truncated = unsafe { disk_of(file) }.truncate(len);
    truncated.map_or(ffi::SQLITE_IOERR_TRUNCATE, |()| ffi::SQLITE_OK)
}

/// Nothing to do: the file is memory, which moves whole. What a crash of the host would take, it takes with the database.
extern "C" fn sync(_: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn file_size(file: *mut ffi::sqlite3_file, size: *mut ffi::sqlite3_int64) -> c_int {
    // SAFETY: SQLite calls this on files that are open.
    let len = unsafe { disk_of(file) }.len_bytes();
    let Some(len) = len.ok().and_then(|len| i64::try_from(len).ok()) else { return ffi::SQLITE_IOERR_FSTAT };
    // SAFETY: it points to a 64-bit integer of SQLite's.
    unsafe { size.write(len) };
    ffi::SQLITE_OK
}

/// Nobody else has the file: see the module's invariants.
extern "C" fn lock(_: *mut ffi::sqlite3_file, _: c_int) -> c_int {
    ffi::SQLITE_OK
}

unsafe extern "C" fn check_reserved_lock(_: *mut ffi::sqlite3_file, held: *mut c_int) -> c_int {
    // SAFETY: it points to an int of SQLite's.
    unsafe { held.write(0) };
    ffi::SQLITE_OK
}

extern "C" fn file_control(_: *mut ffi::sqlite3_file, _: c_int, _: *mut c_void) -> c_int {
    ffi::SQLITE_NOTFOUND
}

extern "C" fn sector_size(_: *mut ffi::sqlite3_file) -> c_int {
    4096
}

/// A write changes the bytes that it names and no others, in the order of the calls.
extern "C" fn device_characteristics(_: *mut ffi::sqlite3_file) -> c_int {
    ffi::SQLITE_IOCAP_POWERSAFE_OVERWRITE | ffi::SQLITE_IOCAP_SEQUENTIAL
}

/// There are no files but open ones.
extern "C" fn delete(_: *mut ffi::sqlite3_vfs, _: *const c_char, _: c_int) -> c_int {
    ffi::SQLITE_IOERR_DELETE_NOENT
}

/// Asked for journals that a crash left behind: there are none.
unsafe extern "C" fn access(_: *mut ffi::sqlite3_vfs, _: *const c_char, _: c_int, exists: *mut c_int) -> c_int {
    // SAFETY: it points to an int of SQLite's.
    unsafe { exists.write(0) };
    ffi::SQLITE_OK
}

unsafe extern "C" fn full_name(_: *mut ffi::sqlite3_vfs, name: *const c_char, room: c_int, full: *mut c_char) -> c_int {
    // SAFETY: the name ends with a zero.
    let name = unsafe { CStr::from_ptr(name) }.to_bytes_with_nul();
    if name.len() > usize::try_from(room).unwrap_or(0) {
        return ffi::SQLITE_CANTOPEN;
    }
    // SAFETY: `full` has room for `room` bytes, which were just compared, and is not the name itself.
    unsafe { full.copy_from_nonoverlapping(name.as_ptr().cast(), name.len()) };
    ffi::SQLITE_OK
}

/// SQLite seeds itself from its default interface; how many bytes come from here may be 0 (<https://www.sqlite.org/c3ref/vfs.html>).
extern "C" fn randomness(_: *mut ffi::sqlite3_vfs, _: c_int, _: *mut c_char) -> c_int {
    0
}

extern "C" fn sleep(_: *mut ffi::sqlite3_vfs, us: c_int) -> c_int {
    thread::sleep(Duration::from_micros(u64::try_from(us).unwrap_or(0)));
    us
}

/// As a Julian day: 1970 began at 2440587.5.
unsafe extern "C" fn current_time(_: *mut ffi::sqlite3_vfs, day: *mut f64) -> c_int {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    // SAFETY: it points to a double of SQLite's.
    unsafe { day.write(2_440_587.5 + since_1970.as_secs_f64() / 86_400.0) };
    ffi::SQLITE_OK
}

// What `open` leaves behind for SQLite must not need more than SQLite knows of.
const _: () = assert!(mem::offset_of!(File, base) == 0);

#[cfg(test)]
mod tests {
    use super::*;
    use pageferry::Region;

    fn disk(pages: u64) -> Arc<Disk> {
        let region = Region::builder().size(pages * 4096).open().unwrap();
        Disk::format(&region).unwrap();
        Arc::new(Disk::insert(&region).unwrap())
    }

    fn memory_only(connection: &Connection) {
        connection.execute_batch("PRAGMA journal_mode = MEMORY; PRAGMA temp_store = MEMORY").unwrap();
    }

    fn count(connection: &Connection) -> rusqlite::Result<i64> {
        connection.query_row("SELECT count(*) FROM t", [], |row| row.get(0))
    }

    #[test]
    fn a_database_is_found_again_by_the_next_connection() {
        let disk = disk(64);
        let connection = connect(&disk).unwrap();
        memory_only(&connection);
        connection.execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1), (2), (randomblob(20000))").unwrap();
        connection.execute_batch("BEGIN; DELETE FROM t; ROLLBACK").unwrap();
        drop(connection);
        let connection = connect(&disk).unwrap();
        assert_eq!(count(&connection).unwrap(), 3);
        memory_only(&connection);
        connection.execute_batch("DELETE FROM t; VACUUM").unwrap();
        let verdict: String = connection.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
        assert_eq!((verdict.as_str(), disk.len_bytes().unwrap()), ("ok", 2 * 4096));
    }

    #[test]
    fn a_journal_beside_the_region_is_refused() {
        let connection = connect(&disk(64)).unwrap();
        connection.execute_batch("PRAGMA journal_mode = DELETE").unwrap();
        assert!(connection.execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1)").is_err());
    }

    #[test]
    fn a_full_region_is_a_full_disk_and_the_transaction_is_undone() {
        let disk = disk(16);
        let connection = connect(&disk).unwrap();
        memory_only(&connection);
        connection.execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1)").unwrap();
        let full = connection.execute_batch("INSERT INTO t VALUES (randomblob(100000))").unwrap_err();
        assert_eq!(full.sqlite_error_code(), Some(rusqlite::ErrorCode::DiskFull), "{full}");
        assert_eq!(count(&connection).unwrap(), 1);
    }

    #[test]
    fn a_disk_that_was_taken_out_is_an_error_and_not_what_sqlite_remembers() {
        let disk = disk(64);
        let connection = connect(&disk).unwrap();
        memory_only(&connection);
        connection.execute_batch("CREATE TABLE t (a); INSERT INTO t VALUES (1)").unwrap();
        disk.take_out();
        assert!(connection.execute_batch("INSERT INTO t VALUES (2)").is_err());
        assert!(matches!(disk.failure(), Some(DiskError::Out)));
    }
}
