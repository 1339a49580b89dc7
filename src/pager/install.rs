//! Puts bytes, zeros or poison in place and deals with every answer of the kernel.
//!
//! Role: hops *install* and *wake* of a page's journey. Neighbours: `engine` says what goes where; `sys::userfault` makes the calls. Invariants: a page
//! that is present already is never changed, and its waiters are woken (S4); what the kernel puts off is given back to the caller.

use crate::{
    PageSize,
    sys::{Stop, Userfault},
};
use nix::errno::Errno;

/// What to put in place.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fill<'a> {
    /// `wake`: or the caller wakes whoever waits for them. `protect`: the first write of them is trapped.
    Bytes {
        bytes: &'a [u8],
        wake: bool,
        protect: bool,
    },
    Zeros(usize),
    Poison(usize),
}

impl Fill<'_> {
    fn len(self) -> usize {
        match self {
            Fill::Bytes { bytes, .. } => bytes.len(),
            Fill::Zeros(len) | Fill::Poison(len) => len,
        }
    }

    fn call(self, uffd: &Userfault, address: usize, from: usize, to: usize) -> (usize, Option<Stop>) {
        match self {
            Fill::Bytes { bytes, wake, protect } => uffd.copy(address + from, &bytes[from..to], wake, protect),
            Fill::Zeros(_) => uffd.zero(address + from, to - from),
            Fill::Poison(_) => uffd.poison(address + from, to - from),
        }
    }
}

/// How it went. Counts are pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[must_use]
pub(super) struct Filled {
    /// The kernel puts off the rest, from this byte on.
    pub(super) again_from: Option<usize>,
    /// Pages that are present already.
    pub(super) already_here: u64,
    /// Pages that are not registered any more: the program unmapped them and the message is on its way.
    pub(super) gone: u64,
    /// The first errno that should not happen; its page and those behind it were not filled.
    pub(super) failed: Option<(usize, Errno)>,
    pub(super) calls: u64,
}

/// Fills whole pages from `address`.
pub(super) fn fill(uffd: &Userfault, page: PageSize, address: usize, what: Fill<'_>) -> Filled {
    let (len, page_len) = (what.len(), page.len());
    let mut filled = Filled::default();
    let mut from = 0;
    // Once a call says `Gone` the range may span mappings (mprotect and madvise split them): go on page by page.
    let mut step = len;
    while from < len {
        let to = len.min(from.saturating_add(step));
        let (done, stop) = what.call(uffd, address, from, to);
        filled.calls += 1;
        from += done;
        match stop {
            None => {}
            Some(Stop::AlreadyHere) => {
                uffd.wake(address + from, page_len);
                filled.already_here += 1;
                from += page_len;
            }
            Some(Stop::Again) => {
                filled.again_from = Some(from);
                break;
            }
            Some(Stop::Gone) if to - from > page_len => step = page_len,
            Some(Stop::Gone) => {
                filled.gone += 1;
                from += page_len;
            }
            Some(Stop::Exited) => {
                filled.gone += ((len - from) / page_len) as u64;
                break;
            }
            Some(Stop::Failed(errno)) => {
                filled.failed = Some((from, errno));
                break;
            }
        }
    }
    filled
}
