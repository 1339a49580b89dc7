//! The only unsafe code: mappings, userfaultfd and the ioctls that its crate lacks.
//!
//! Role: turns system calls into safe functions that return outcomes instead of errnos. Neighbours: used by `pager` (userfault,
//! install, pagemap), `region` (mapping) and `net` (watch, timer); imports only the words. Invariants that SAFETY comments cite:
//! M1 a [`Mapping`] owns its address range from creation to drop: `start..start + len` stays reserved for it;
//! M2 no `&[u8]` or `&mut [u8]` of a mapping is ever made here: bytes are read and written as relaxed atomics or by the kernel (S8);
//! M3 the bytes of [`Copies`] are reached only through the one [`Piece`] that holds them, and no other mapping of them or descriptor for them leaves it;
//! U1 a [`Userfault`] is registered only on ranges of a [`Mapping`], and its ioctls only fill missing pages of such ranges, or change whether they are write-protected.

mod copies;
mod forks;
mod inbox;
mod mapping;
mod pagemap;
mod timer;
mod userfault;
mod watch;

pub(crate) use copies::{Copies, Piece};
pub(crate) use forks::Attended;
pub(crate) use inbox::Message;
pub(crate) use mapping::{MapAt, Mapping, page_size, read_live_at};
pub(crate) use pagemap::Pagemap;
pub(crate) use timer::Timer;
pub(crate) use userfault::{Access, Features, OpenError, Stop, Trap, Userfault};
pub(crate) use watch::watch;
