//! What the kernel said about a userfaultfd and nobody has applied yet.
//!
//! Role: hop *fault*: every message is read here, by the pager or, while the program forks, by the thread that stands in for it, and waits until the
//! pager applies it. Neighbours: `userfault` has one and asks it before each fill; `forks` reads ahead. Invariants: messages leave in the order in
//! which they came, whoever read them; no fill is made while news of changed mappings waits (S4); under its lock nothing is
//! allocated, freed or logged, no other lock taken and no region touched, so that it is free soon whoever keeps the allocator's locks (S2).

use nix::errno::Errno;
use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError},
};
use userfaultfd::{Error, Event, EventBuffer, FaultKind, Uffd};

/// One message of the kernel, addresses as numbers.
#[derive(Debug)]
pub(crate) enum Message {
    Fault {
        address: usize,
    },
    /// A thread waits to write a page that is write-protected.
    Write {
        address: usize,
    },
    Remove {
        start: usize,
        len: usize,
    },
    Unmap {
        start: usize,
        len: usize,
    },
    Remap {
        from: usize,
        to: usize,
        len: usize,
    },
    Fork {
        child: Child,
    },
}

/// The descriptor of a forked child; closing it before its missing pages are settled would show zeros to the child.
#[derive(Debug)]
pub(crate) struct Child(pub(super) Uffd);

/// Messages asked for in one read(2): 64 threads faulting at once fit, at 2 KiB of buffer.
const EVENTS_A_READ: usize = 64;

/// Messages that may wait while the pager cannot take them, 32 bytes each. What counts is how many the kernel may hand out before that of a fork: faults come first, then other
/// events in their order, and a thread waits with each, so they are at most one fault and one event a thread: 2,000 threads that fault and change their mappings while another forks.
const ROOM_AHEAD: usize = 4096;

/// See the module header.
#[derive(Debug)]
pub(crate) struct Inbox {
    uffd: Uffd,
    room: usize,
    waiting: Mutex<Waiting>,
}

struct Waiting {
    buffer: EventBuffer,
    /// Never grows past the capacity that it began with.
    messages: Vec<Message>,
    /// Some of them are news of changed mappings or of a fork.
    news: bool,
    /// Messages of kinds that were not asked for, skipped.
    unknown: usize,
}

impl Inbox {
    /// `ahead`: whether somebody may read ahead.
    pub(super) fn new(uffd: Uffd, ahead: bool) -> Inbox {
        let room = if ahead { ROOM_AHEAD } else { EVENTS_A_READ };
        let waiting =
            Waiting { buffer: EventBuffer::new(EVENTS_A_READ), messages: Vec::with_capacity(room), news: false, unknown: 0 };
        Inbox { uffd, room, waiting: Mutex::new(waiting) }
    }

    pub(super) fn uffd(&self) -> &Uffd {
        &self.uffd
    }

    /// Reads all that the kernel has to say now, as far as there is room, and leaves it to be taken. Whether there was anything.
    ///
    /// What a read fails for, the pager's own read fails for too, which says so.
    pub(super) fn read_ahead(&self) -> bool {
        let mut waiting = self.lock();
        let before = (waiting.messages.len(), waiting.unknown);
        let _ = waiting.read(&self.uffd);
        (waiting.messages.len(), waiting.unknown) != before
    }

    /// Appends to `messages` what others read.
    pub(super) fn take(&self, messages: &mut Vec<Message>) {
        messages.reserve(self.room);
        let mut waiting = self.lock();
        waiting.hand_over(messages);
    }

    /// Appends to `messages` what others read, then everything the kernel has to say now. The kernel hands out faults before other events, so a
    /// reader that stops early would see a fault without the removal that caused it.
    pub(super) fn read_all(&self, messages: &mut Vec<Message>) -> io::Result<()> {
        loop {
            messages.reserve(self.room);
            let mut waiting = self.lock();
            let read = waiting.read(&self.uffd);
            waiting.hand_over(messages);
            let unknown = std::mem::take(&mut waiting.unknown);
            drop(waiting);
            if unknown > 0 {
                tracing::warn!(unknown, "userfaultfd events of kinds that were not asked for skipped");
            }
            match read {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                Err(error) => return Err(crate_error(error)),
            }
        }
    }

    /// Whether news waits to be taken. A call that changes mappings returns once its message is read: after it, this tells of that.
    pub(super) fn has_news(&self) -> bool {
        self.lock().news
    }

    /// Makes a call that fills pages, or puts it off as the kernel does while it has news itself.
    pub(super) fn unless_news<T>(&self, call: impl FnOnce() -> nix::Result<T>) -> nix::Result<T> {
        let waiting = self.lock();
        // The lock is kept: news that was read in between would come too late for this call.
        if waiting.news { Err(Errno::EAGAIN) } else { call() }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    /// Whether everything is read; otherwise there is no room.
    fn read(&mut self, uffd: &Uffd) -> Result<bool, Error> {
        loop {
            if self.messages.capacity() - self.messages.len() < EVENTS_A_READ {
                return Ok(false);
            }
            let mut events = 0;
            match uffd.read_events(&mut self.buffer) {
                Ok(read) => {
                    for event in read {
                        events += 1;
                        match event.ok().and_then(message) {
                            Some(message) => {
                                self.news |= !matches!(message, Message::Fault { .. } | Message::Write { .. });
                                self.messages.push(message);
                            }
                            None => self.unknown += 1,
                        }
                    }
                }
                Err(Error::SystemError(errno)) if errno as i32 == libc::EINTR => continue,
                Err(error) => return Err(error),
            }
            if events < EVENTS_A_READ {
                return Ok(true);
            }
        }
    }

    /// The caller has made room.
    fn hand_over(&mut self, messages: &mut Vec<Message>) {
        messages.append(&mut self.messages);
        self.news = false;
    }
}

impl std::fmt::Debug for Waiting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Waiting").field("messages", &self.messages).finish_non_exhaustive()
    }
}

fn message(event: Event) -> Option<Message> {
    Some(match event {
        Event::Pagefault { kind: FaultKind::Missing, addr, .. } => Message::Fault { address: addr as usize },
        Event::Pagefault { kind: FaultKind::WriteProtected, addr, .. } => Message::Write { address: addr as usize },
        #[allow(unreachable_patterns, reason = "the kinds depend on the crate's features")]
        Event::Pagefault { .. } => return None,
        Event::Fork { uffd } => Message::Fork { child: Child(uffd) },
        Event::Remap { from, to, len } => Message::Remap { from: from as usize, to: to as usize, len },
        Event::Remove { start, end } => Message::Remove { start: start as usize, len: end as usize - start as usize },
        Event::Unmap { start, end } => Message::Unmap { start: start as usize, len: end as usize - start as usize },
    })
}

/// The crate's errors carry an errno of an older `nix`; only the number crosses.
pub(super) fn crate_error(error: Error) -> io::Error {
    match error {
        Error::SystemError(errno) | Error::CopyFailed(errno) | Error::ZeropageFailed(errno) => {
            io::Error::from_raw_os_error(errno as i32)
        }
        other => io::Error::other(other.to_string()),
    }
}
