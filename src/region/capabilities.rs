//! What this kernel and this user may do, and why not.
//!
//! Role: answers before anything is opened. Neighbours: `sys` opens a throw-away descriptor; `pager` explains refusals. Invariants: detected at run time by asking the
//! kernel, never from its version number.

use crate::{
    RegionError, pager,
    sys::{Access, Features, Userfault},
};
use std::fmt;

/// What the kernel offers to this process. Printing it says the same in words, with the remedy for what is missing.
///
/// ```
/// let capabilities = pageferry::Capabilities::probe();
/// println!("{capabilities}");
/// if let Err(error) = capabilities.require_userfaultfd() {
///     eprintln!("{error}"); // what was met, and what to do about it
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Capabilities {
    found: Result<(Access, Features), RegionError>,
}

impl Capabilities {
    /// Asks the kernel, with a descriptor that is closed again.
    #[must_use]
    pub fn probe() -> Capabilities {
        Capabilities { found: Userfault::supported().map_err(|error| pager::explain(&error)) }
    }

    /// Whether regions with a store can be opened.
    #[must_use]
    pub fn userfaultfd(&self) -> bool {
        self.found.is_ok()
    }

    /// # Errors
    /// [`RegionError::NoUserfaultfd`] with reason and remedy.
    pub fn require_userfaultfd(&self) -> Result<(), RegionError> {
        self.found.as_ref().map(|_| ()).map_err(Clone::clone)
    }

    /// Whether a system call may touch a missing page (`read(2)` into a region). If not, it fails with EFAULT:
    /// [`populate`](crate::Region::populate) such buffers first.
    #[must_use]
    pub fn faults_in_system_calls(&self) -> bool {
        matches!(self.found, Ok((Access::Device | Access::SystemCall, _)))
    }

    /// Whether lost pages raise SIGBUS (`UFFDIO_POISON`, Linux 6.6). If not, they raise SIGSEGV.
    #[must_use]
    pub fn poison(&self) -> bool {
        self.has(Features::POISON)
    }

    /// Whether writes can be followed by write protection (Linux 5.7).
    #[must_use]
    pub fn write_protect(&self) -> bool {
        self.has(Features::WRITE_PROTECT)
    }

    /// Whether writes can be followed without a message for each (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7), pages never touched included.
    #[must_use]
    pub fn write_protect_async(&self) -> bool {
        self.has(Features::WP_ASYNC) && self.has(Features::WP_UNPOPULATED)
    }

    /// Whether pages can be moved in without a copy (`UFFDIO_MOVE`, Linux 6.8).
    #[must_use]
    pub fn move_pages(&self) -> bool {
        self.has(Features::MOVE)
    }

    fn has(&self, feature: Features) -> bool {
        self.found.as_ref().is_ok_and(|(_, features)| features.contains(feature))
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let access = match &self.found {
            Err(error) => return write!(f, "{error}"),
            Ok((Access::Device, _)) => "through /dev/userfaultfd",
            Ok((Access::SystemCall, _)) => "through the system call",
            Ok((Access::UserModeOnly, _)) => {
                "for user-mode faults only: system calls that touch missing pages fail with EFAULT; \
                 give this user access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd to 1"
            }
        };
        writeln!(f, "userfaultfd: yes, {access}")?;
        let yes_no = |yes: bool, otherwise: &'static str| if yes { "yes" } else { otherwise };
        writeln!(f, "poison: {}", yes_no(self.poison(), "no, lost pages raise SIGSEGV (needs Linux 6.6)"))?;
        writeln!(f, "write protection: {}", yes_no(self.write_protect(), "no (needs Linux 5.7)"))?;
        writeln!(f, "asynchronous write protection: {}", yes_no(self.write_protect_async(), "no (needs Linux 6.7)"))?;
        write!(f, "moving pages: {}", yes_no(self.move_pages(), "no (needs Linux 6.8)"))
    }
}
