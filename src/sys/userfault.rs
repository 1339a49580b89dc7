//! A userfaultfd descriptor: open, register, install, poison, wake.
//!
//! Role: hops *fault* (messages are read by its `inbox`) and *install*/*wake* (ioctls) of a page's journey; write protection for trackers. Neighbours: `pager` calls it and
//! decides; no decision above reads an errno. Invariants: U1 of `sys`; the descriptor is non-blocking (poll on a blocking one
//! answers POLLERR) and closed only when no registered page that should hold data is missing (S1, kept by `pager`).
//!
//! The `userfaultfd` crate does messages and registration; opening falls back further than the crate's, and installs need the
//! outcome of a partial copy, which the crate turns into an unsigned number; so these ioctls are declared here from linux/userfaultfd.h.

use super::{
    forks::Attended,
    inbox::{Child, Inbox, Message, crate_error},
    watch,
};
use nix::errno::Errno;
use std::{
    fs::OpenOptions,
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
    sync::Arc,
};
use tokio::io::{Interest, unix::AsyncFd};
use userfaultfd::{RegisterMode, Uffd};

/// How the descriptor was obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// `/dev/userfaultfd`: file permissions decide; faults from kernel code are served too.
    Device,
    /// The system call with `CAP_SYS_PTRACE` or `vm.unprivileged_userfaultfd=1`; faults from kernel code are served too.
    SystemCall,
    /// `UFFD_USER_MODE_ONLY`: a system call that touches a missing page fails with EFAULT; populate such buffers first.
    UserModeOnly,
}

/// Why no descriptor could be opened: what each way answered.
#[derive(Debug)]
pub(crate) struct OpenError {
    pub(crate) device: io::Error,
    pub(crate) full: Errno,
    pub(crate) user_mode: Errno,
}

/// Feature bits of `UFFDIO_API` (linux/userfaultfd.h).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Features(u64);

impl Features {
    pub(crate) const WRITE_PROTECT: Features = Features(1 << 0);
    pub(crate) const EVENT_FORK: Features = Features(1 << 1);
    pub(crate) const EVENT_REMAP: Features = Features(1 << 2);
    pub(crate) const EVENT_REMOVE: Features = Features(1 << 3);
    pub(crate) const EVENT_UNMAP: Features = Features(1 << 6);
    pub(crate) const WP_UNPOPULATED: Features = Features(1 << 13);
    pub(crate) const POISON: Features = Features(1 << 14);
    pub(crate) const WP_ASYNC: Features = Features(1 << 15);
    pub(crate) const MOVE: Features = Features(1 << 16);

    pub(crate) fn bits(self) -> u64 {
        self.0
    }

    pub(crate) fn contains(self, other: Features) -> bool {
        self.0 & other.0 == other.0
    }

    pub(crate) const fn and(self, other: Features) -> Features {
        Features(self.0 | other.0)
    }
}

/// Which accesses of a range are told or followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trap {
    Missing,
    Writes,
    MissingAndWrites,
}

/// Why an install stopped before its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The page at this point is present already; nothing was woken.
    AlreadyHere,
    /// The mapping is changing, or memory is short for now: read messages and try again.
    Again,
    /// The range is not registered any more, or spans more than one mapping.
    Gone,
    /// The process that owns the memory has exited.
    Exited,
    /// An errno that a correct caller does not meet.
    Failed(Errno),
}

/// See the module header.
#[derive(Debug)]
pub(crate) struct Userfault {
    inbox: Arc<Inbox>,
    access: Access,
    features: Features,
}

const API: u64 = 0xAA;
const COPY_OR_ZERO_DONE_AT_START: i64 = 0;
/// The caller wakes the waiters (linux/userfaultfd.h).
const COPY_MODE_DONTWAKE: u64 = 1;
/// What is installed is write-protected from its first moment.
const COPY_MODE_WP: u64 = 2;
const WRITEPROTECT_MODE_WP: u64 = 1;

#[repr(C)]
struct ApiArgument {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgument {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `uffdio_zeropage` and `uffdio_poison` have the same layout: a range, a mode, and the bytes done.
#[repr(C)]
struct FillArgument {
    start: u64,
    len: u64,
    mode: u64,
    done: i64,
}

#[repr(C)]
struct WriteProtectArgument {
    start: u64,
    len: u64,
    mode: u64,
}

const _: () = assert!(size_of::<ApiArgument>() == 24 && size_of::<CopyArgument>() == 40 && size_of::<FillArgument>() == 32);
const _: () = assert!(size_of::<WriteProtectArgument>() == 24);

nix::ioctl_readwrite!(uffdio_api, 0xAA, 0x3F, ApiArgument);
nix::ioctl_readwrite!(uffdio_copy, 0xAA, 0x03, CopyArgument);
nix::ioctl_readwrite!(uffdio_zeropage, 0xAA, 0x04, FillArgument);
nix::ioctl_readwrite!(uffdio_writeprotect, 0xAA, 0x06, WriteProtectArgument);
nix::ioctl_readwrite!(uffdio_poison, 0xAA, 0x08, FillArgument);

impl Userfault {
    /// Opens a descriptor with `wanted` features, all of which the kernel must have.
    ///
    /// `UFFDIO_API` enables features once a descriptor, so probing uses another one, see [`Userfault::supported`].
    pub(crate) fn open(wanted: Features) -> Result<Result<Userfault, Errno>, OpenError> {
        let (fd, access) = open_descriptor()?;
        Ok(enable(&fd, wanted).map(|_| {
            // SAFETY: the descriptor is a userfaultfd owned by nobody else: `into_raw_fd` gives it up.
            let uffd = unsafe { Uffd::from_raw_fd(std::os::fd::IntoRawFd::into_raw_fd(fd)) };
            let forks = wanted.contains(Features::EVENT_FORK);
            Userfault { inbox: Arc::new(Inbox::new(uffd, forks)), access, features: wanted }
        }))
    }

    /// All features this kernel has for this user, and how a descriptor is obtained.
    pub(crate) fn supported() -> Result<(Access, Features), OpenError> {
        let (fd, access) = open_descriptor()?;
        Ok((access, enable(&fd, Features::default()).unwrap_or_default()))
    }

    pub(crate) fn access(&self) -> Access {
        self.access
    }

    pub(crate) fn features(&self) -> Features {
        self.features
    }

    /// Asks for what `trap` says of a mapping's range. A range that is registered already traps just that from then on.
    pub(crate) fn register(&self, start: usize, len: usize, trap: Trap) -> io::Result<()> {
        let mode = match trap {
            Trap::Missing => RegisterMode::MISSING,
            Trap::Writes => RegisterMode::WRITE_PROTECT,
            Trap::MissingAndWrites => RegisterMode::MISSING | RegisterMode::WRITE_PROTECT,
        };
        self.uffd().register_with_mode(start as *mut _, len, mode).map(|_| ()).map_err(crate_error)
    }

    /// Traps nothing of a range any more: what is protected may be written, and whoever waits to write goes on (UFFDIO_UNREGISTER(2const)). Of plain memory only: what is
    /// missing elsewhere would read as zeros (S1).
    pub(crate) fn unregister(&self, start: usize, len: usize) -> io::Result<()> {
        self.uffd().unregister(start as *mut _, len).map_err(crate_error)
    }

    /// Write-protects the pages that are there, or, with [`Features::WP_UNPOPULATED`], all; or lets them be written and wakes whoever waits to
    /// (UFFDIO_WRITEPROTECT(2const)). Why it stopped, if it did: some pages may be done then.
    pub(crate) fn write_protect(&self, start: usize, len: usize, protect: bool) -> Option<Stop> {
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        let mut argument = WriteProtectArgument { start: start as u64, len: len as u64, mode };
        // SAFETY: the kernel changes the protection of pages in ranges registered here (U1), not their content.
        let result = self.inbox.unless_news(|| unsafe { uffdio_writeprotect(self.raw(), &raw mut argument) });
        result.err().map(stop)
    }

    /// Whether every change of the mappings so far has been read as a message and taken. While one has not been read, the kernel refuses every fill, one of
    /// no length too (fs/userfaultfd.c, `mmap_changing`, which counts from before a range is unmapped until after its message is read).
    pub(crate) fn is_quiet(&self) -> bool {
        !matches!(self.inbox.unless_news(|| self.zero_nothing()), Err(Errno::EAGAIN))
    }

    fn zero_nothing(&self) -> nix::Result<i32> {
        let mut argument = FillArgument { start: 0, len: 0, mode: 0, done: COPY_OR_ZERO_DONE_AT_START };
        // SAFETY: a range of no length; the kernel answers EINVAL, or EAGAIN before it looks.
        unsafe { uffdio_zeropage(self.raw(), &raw mut argument) }
    }

    /// See [`Inbox::read_all`].
    pub(crate) fn read_all(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        self.inbox.read_all(messages)
    }

    /// See [`Inbox::take`].
    pub(crate) fn take_read(&self, messages: &mut Vec<Message>) {
        self.inbox.take(messages);
    }

    /// See [`Inbox::has_news`].
    pub(crate) fn has_read_news(&self) -> bool {
        self.inbox.has_news()
    }

    /// As the thread that stands in during a fork does.
    #[cfg(test)]
    pub(crate) fn read_ahead(&self) -> bool {
        self.inbox.read_ahead()
    }

    /// Has messages read during forks too, whatever the threads wait for that should read them; `None` where the kernel tells of no forks, so that none waits.
    pub(crate) fn attend(&self) -> io::Result<Option<Attended>> {
        self.features.contains(Features::EVENT_FORK).then(|| Attended::new(&self.inbox)).transpose()
    }

    /// The child's end of a fork.
    pub(crate) fn of_child(&self, child: Child) -> Userfault {
        Userfault { inbox: Arc::new(Inbox::new(child.0, false)), access: self.access, features: self.features }
    }

    /// Fills missing pages from `start` with `bytes` (whole pages) and wakes their waiters (UFFDIO_COPY(2const)), unless `wake` is false and the caller
    /// [wakes](Userfault::wake) them; write-protected, if `protect`, which takes a range whose writes are trapped. Returns how many bytes are in place, and why it stopped
    /// if that is not all.
    pub(crate) fn copy(&self, start: usize, bytes: &[u8], wake: bool, protect: bool) -> (usize, Option<Stop>) {
        advance(bytes.len(), |done| {
            let mut argument = CopyArgument {
                dst: (start + done) as u64,
                src: bytes.as_ptr() as u64 + done as u64,
                len: (bytes.len() - done) as u64,
                mode: if wake { 0 } else { COPY_MODE_DONTWAKE } | if protect { COPY_MODE_WP } else { 0 },
                copy: COPY_OR_ZERO_DONE_AT_START,
            };
            // SAFETY: the kernel reads `bytes` inside its bounds and writes only missing pages of ranges registered here (U1).
            let result = self.inbox.unless_news(|| unsafe { uffdio_copy(self.raw(), &raw mut argument) });
            (result, argument.copy)
        })
    }

    /// Fills missing pages with zeros, as [`Userfault::copy`] does, without a buffer (UFFDIO_ZEROPAGE(2const)).
    pub(crate) fn zero(&self, start: usize, len: usize) -> (usize, Option<Stop>) {
        self.fill(start, len, uffdio_zeropage)
    }

    /// Makes missing pages raise SIGBUS when touched, also after the descriptor is closed (UFFDIO_POISON(2const), Linux 6.6).
    pub(crate) fn poison(&self, start: usize, len: usize) -> (usize, Option<Stop>) {
        self.fill(start, len, uffdio_poison)
    }

    fn fill(
        &self,
        start: usize,
        len: usize,
        call: unsafe fn(RawFd, *mut FillArgument) -> nix::Result<i32>,
    ) -> (usize, Option<Stop>) {
        advance(len, |done| {
            let mut argument =
                FillArgument { start: (start + done) as u64, len: (len - done) as u64, mode: 0, done: COPY_OR_ZERO_DONE_AT_START };
            // SAFETY: the kernel changes only missing pages of ranges registered here (U1).
            let result = self.inbox.unless_news(|| unsafe { call(self.raw(), &raw mut argument) });
            (result, argument.done)
        })
    }

    /// Wakes every thread that waits in the range; each touches its page again (UFFDIO_WAKE(2const)). Works on any range, also
    /// one that is not registered any more.
    pub(crate) fn wake(&self, start: usize, len: usize) {
        if let Err(error) = self.uffd().wake(start as *mut _, len) {
            tracing::warn!(%error, start, len, "UFFDIO_WAKE failed");
        }
    }

    /// A duplicate that tells when there are messages. Called inside the runtime that shall tell it.
    pub(crate) fn readable(&self) -> io::Result<AsyncFd<OwnedFd>> {
        watch(self.uffd().as_fd().try_clone_to_owned()?, Interest::READABLE)
    }

    fn uffd(&self) -> &Uffd {
        self.inbox.uffd()
    }

    fn raw(&self) -> RawFd {
        self.uffd().as_raw_fd()
    }
}

/// Repeats a fill until it is done or gives a reason. A short fill (EAGAIN with bytes done) is repeated: the next call tells why.
fn advance(len: usize, mut call: impl FnMut(usize) -> (nix::Result<i32>, i64)) -> (usize, Option<Stop>) {
    let mut done = 0;
    loop {
        let (result, progress) = call(done);
        let stop = match result {
            Ok(_) => return (len, None),
            Err(errno) => match usize::try_from(progress) {
                // Bytes done. A kernel that leaves the field untouched on EAGAIN (before 6.15) shows the zero we put there.
                Ok(bytes) if bytes > 0 => {
                    done += bytes;
                    if done >= len {
                        return (len, None);
                    }
                    continue;
                }
                _ => stop(errno),
            },
        };
        return (done, Some(stop));
    }
}

fn stop(errno: Errno) -> Stop {
    match errno {
        Errno::EEXIST => Stop::AlreadyHere,
        // ENOMEM is the memory cgroup's limit being met: reclaim may help.
        Errno::EAGAIN | Errno::EINTR | Errno::ENOMEM => Stop::Again,
        Errno::ENOENT => Stop::Gone,
        Errno::ESRCH | Errno::ENOSPC => Stop::Exited,
        other => Stop::Failed(other),
    }
}

/// `/dev/userfaultfd`, then the system call, then the system call for user-mode faults only.
fn open_descriptor() -> Result<(OwnedFd, Access), OpenError> {
    const USER_MODE_ONLY: i32 = 1;
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = match OpenOptions::new().read(true).write(true).open("/dev/userfaultfd") {
        Ok(file) => {
            // SAFETY: USERFAULTFD_IOC_NEW takes the flags by value and returns a new descriptor that nobody else owns.
            let made = Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), nix::request_code_none!(0xAA, 0), flags) });
            match made {
                // SAFETY: as above, a fresh descriptor.
                Ok(fd) => return Ok((unsafe { OwnedFd::from_raw_fd(fd) }, Access::Device)),
                Err(errno) => errno.into(),
            }
        }
        Err(error) => error,
    };
    let call = |flags: i32| {
        // SAFETY: userfaultfd(2) takes flags by value and returns a new descriptor.
        let fd = Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })?;
        let fd = i32::try_from(fd).map_err(|_| Errno::EBADF)?;
        // SAFETY: as above, a fresh descriptor that nobody else owns.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    };
    let full = match call(flags) {
        Ok(fd) => return Ok((fd, Access::SystemCall)),
        Err(errno) => errno,
    };
    match call(flags | USER_MODE_ONLY) {
        Ok(fd) => Ok((fd, Access::UserModeOnly)),
        Err(user_mode) => Err(OpenError { device, full, user_mode }),
    }
}

/// `UFFDIO_API`: enables `wanted`, returns what the kernel has.
fn enable(fd: &OwnedFd, wanted: Features) -> Result<Features, Errno> {
    let mut argument = ApiArgument { api: API, features: wanted.0, ioctls: 0 };
    // SAFETY: the argument has the kernel's layout and lives for the call.
    unsafe { uffdio_api(fd.as_raw_fd(), &raw mut argument) }?;
    Ok(Features(argument.features))
}
