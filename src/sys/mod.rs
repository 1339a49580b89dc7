//! The only unsafe code: mappings, userfaultfd and the ioctls that its crate lacks.
//!
//! Role: turns system calls into safe functions that return outcomes instead of errnos. Neighbours: used by `pager` (userfault,
//! install) and `region` (mapping); imports only the words. Invariants that SAFETY comments cite:
//! M1 a [`Mapping`] owns its address range from creation to drop: `start..start + len` stays reserved for it;
//! M2 no `&[u8]` or `&mut [u8]` of a mapping is ever made here: bytes are read and written as relaxed atomics or by the kernel (S8);
//! U1 a [`Userfault`] is registered only on ranges of a [`Mapping`], and its ioctls only fill missing pages of such ranges.

mod mapping;
mod userfault;

pub(crate) use mapping::{MapAt, Mapping, page_size};
pub(crate) use userfault::{Access, EVENTS_A_READ, Features, Message, OpenError, Stop, Userfault};

/// Binds the calling thread to the given scheduling slack so that timed waits are not rounded up to the default 50 us
/// (prctl(2), PR_SET_TIMERSLACK). Failure only costs latency and is ignored.
pub(crate) fn tighten_timer_slack() {
    // SAFETY: PR_SET_TIMERSLACK takes one integer, touches no memory and changes only the calling thread.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_000_u64, 0, 0, 0) };
}
