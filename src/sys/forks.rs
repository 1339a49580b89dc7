//! A thread that reads messages in the pager's place while the program forks.
//!
//! Role: the kernel keeps a fork waiting until its message is read, and the C library keeps the allocator's locks meanwhile: a pager that allocates just then
//! would wait for the fork that waits for it (S2). Neighbours: `pager` asks for it; `inbox` keeps what is read. Invariants: from before a fork takes the
//! allocator's locks until it has given them back, [`stand_in`] reads; there it allocates, frees and logs nothing and waits for no lock but
//! [`Roster::duty`] and those of inboxes, under which nobody else does or touches a region.
//!
//! Reading is all that cannot wait. What was read is applied by the pager, which goes on during a fork for as long as it needs no memory: whoever forks may first have to
//! wait for a thread that waits for a page, and so for the pager (for the lock of a stream that fread(3) fills into a region, say).

use super::{inbox::Inbox, watch};
use nix::errno::Errno;
use std::{
    cell::UnsafeCell,
    io,
    os::fd::{FromRawFd, OwnedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::io::{Interest, unix::AsyncFd};

/// How often the thread looks for messages during a fork, which takes some 200 us in a small program.
const PACE: Duration = Duration::from_micros(100);
/// The same once nothing came for long: much memory to copy, or a handler of fork(3) that takes its time.
const PACE_MAX: Duration = Duration::from_millis(1);

/// While this lives, a pager's messages are read during forks.
#[derive(Debug)]
pub(crate) struct Attended {
    inbox: Arc<Inbox>,
    told: Arc<OwnedFd>,
}

impl Attended {
    pub(super) fn new(inbox: &Arc<Inbox>) -> io::Result<Attended> {
        // SAFETY: eventfd(2) takes numbers and returns a new descriptor.
        let fd = Errno::result(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: as above, a fresh descriptor that nobody else owns.
        let told = Arc::new(unsafe { OwnedFd::from_raw_fd(fd) });
        let roster = roster();
        roster.start()?;
        roster.add(Entry { inbox: inbox.clone(), told: told.clone() });
        Ok(Attended { inbox: inbox.clone(), told })
    }

    /// Becomes readable anew whenever something was read, and when this is dropped. Called inside the runtime that shall be told.
    pub(crate) fn told(&self) -> io::Result<AsyncFd<OwnedFd>> {
        watch(self.told.try_clone()?, Interest::READABLE)
    }
}

impl Drop for Attended {
    fn drop(&mut self) {
        let removed = {
            let mut duty = roster().duty();
            let at = duty.entries.iter().position(|entry| Arc::ptr_eq(&entry.inbox, &self.inbox));
            at.map(|at| duty.entries.swap_remove(at))
        };
        tell(&self.told);
        // Freed without the lock.
        drop(removed);
    }
}

fn tell(told: &OwnedFd) {
    // Fails only when it was told 2^64 times and is readable anyway.
    let _ = nix::unistd::write(told, &1u64.to_ne_bytes());
}

/// Whom the thread stands in for, and when.
struct Roster {
    /// Whether the thread runs. Kept while it is started, so it may be kept for a whole fork: not needed by one.
    started: Mutex<bool>,
    duty: Mutex<Duty>,
    changed: Condvar,
}

struct Duty {
    /// Forks under way.
    forks: usize,
    /// The thread is past all that a thread needs memory for at its start.
    ready: bool,
    entries: Vec<Entry>,
}

struct Entry {
    inbox: Arc<Inbox>,
    told: Arc<OwnedFd>,
}

impl Roster {
    const fn new() -> Roster {
        let duty = Duty { forks: 0, ready: false, entries: Vec::new() };
        Roster { started: Mutex::new(false), duty: Mutex::new(duty), changed: Condvar::new() }
    }

    fn duty(&self) -> MutexGuard<'_, Duty> {
        self.duty.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts the thread, one a process, and has the C library tell of forks.
    fn start(&self) -> io::Result<()> {
        /// Children of fork(2) inherit the handlers.
        static HANDLERS: AtomicBool = AtomicBool::new(false);
        let mut started = self.started.lock().unwrap_or_else(PoisonError::into_inner);
        if *started {
            return Ok(());
        }
        if !HANDLERS.load(Ordering::Relaxed) {
            // SAFETY: the three are functions of this program that neither unwind nor allocate.
            let errno = unsafe { libc::pthread_atfork(Some(fork_begins), Some(fork_is_over), Some(this_is_a_child)) };
            if errno != 0 {
                return Err(io::Error::from_raw_os_error(errno));
            }
            HANDLERS.store(true, Ordering::Relaxed);
        }
        std::thread::Builder::new().name("pageferry-fork".into()).spawn(stand_in)?;
        *started = true;
        drop(self.changed.wait_while(self.duty(), |duty| !duty.ready).unwrap_or_else(PoisonError::into_inner));
        Ok(())
    }

    /// Neither allocates nor frees under the lock.
    fn add(&self, entry: Entry) {
        let mut room = Vec::new();
        loop {
            let mut duty = self.duty();
            let wanted = duty.entries.len() + 1;
            if duty.entries.capacity() < wanted && room.capacity() >= wanted {
                room.append(&mut duty.entries);
                std::mem::swap(&mut room, &mut duty.entries);
            }
            if duty.entries.capacity() >= wanted {
                return duty.entries.push(entry);
            }
            drop(duty);
            room = Vec::with_capacity(2 * wanted);
        }
    }
}

struct Place(UnsafeCell<Roster>);

// SAFETY: a roster is shared through its own locks; it is replaced only by `this_is_a_child`, where no other thread exists.
unsafe impl Sync for Place {}

static ROSTER: Place = Place(UnsafeCell::new(Roster::new()));

fn roster() -> &'static Roster {
    // SAFETY: initialised, and see `Place`: nobody else uses it while it is replaced.
    unsafe { &*ROSTER.0.get() }
}

/// Before the C library takes its locks; other allocators may have taken theirs already.
unsafe extern "C" fn fork_begins() {
    roster().duty().forks += 1;
    roster().changed.notify_all();
}

/// In the parent, whether there is a child or not. The thread sees it within its pace.
unsafe extern "C" fn fork_is_over() {
    let mut duty = roster().duty();
    duty.forks = duty.forks.saturating_sub(1);
}

/// The child has none of its parent's threads, and whatever these had locked stays locked. A fork of its own, or a pager, finds a roster as at a program's
/// start. The parent's descriptors stay as they are.
unsafe extern "C" fn this_is_a_child() {
    // SAFETY: the only thread of this process is here (fork(2)), so nobody uses the roster; the old one is not dropped, which would free memory and close what the parent's
    // regions in this memory still stand for.
    unsafe { ROSTER.0.get().write(Roster::new()) };
}

fn stand_in() {
    block_signals();
    let roster = roster();
    let mut duty = roster.duty();
    duty.ready = true;
    roster.changed.notify_all();
    let mut pace = PACE;
    loop {
        if duty.forks == 0 {
            pace = PACE;
            duty = roster.changed.wait(duty).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        let mut any = false;
        for entry in &duty.entries {
            if entry.inbox.read_ahead() {
                tell(&entry.told);
                any = true;
            }
        }
        pace = if any { PACE } else { PACE_MAX.min(pace * 2) };
        (duty, _) = roster.changed.wait_timeout(duty, pace).unwrap_or_else(PoisonError::into_inner);
    }
}

/// A handler of a signal is the program's code: it may allocate, or touch a region.
fn block_signals() {
    let mut all = std::mem::MaybeUninit::uninit();
    // SAFETY: the set is valid for the call, which fills it.
    unsafe { libc::sigfillset(all.as_mut_ptr()) };
    // SAFETY: filled above; no old set is asked for.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), std::ptr::null_mut()) };
}
