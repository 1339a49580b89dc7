//! The userfaultfd backend: answers page faults of many regions from their stores.
//!
//! Role: hops *fault*, *decide*, *request*, *reply*, *install*, *wake* of a page's journey. Neighbours: `region` joins it; stores are asked through
//! [`PageStore`](crate::PageStore); `sys` makes the calls. Invariants: S1-S4 of docs/safety.md; pure decisions in `core`, `residency`, `around`,
//! `budget`, `address_map`, `retry`, `written`, `moment`; everything else runs on the service's thread.

mod address_map;
mod around;
mod budget;
mod children;
mod core;
mod engine;
mod evict;
mod fetch;
mod freezing;
mod install;
mod installer;
pub(crate) mod model;
mod moment;
mod order;
mod place;
mod requests;
mod residency;
mod retry;
mod saver;
#[cfg(test)]
mod tests;
mod tracker;
mod tracking;
mod written;

use crate::{
    PagerOptions, RegionError, Service, TrackerKind,
    sys::{Features, OpenError, Userfault},
};
use std::sync::{Arc, OnceLock};
use tokio::sync::oneshot;

pub(crate) use address_map::RegionId;
pub(crate) use around::Around;
pub(crate) use core::Core;
pub(crate) use engine::{Engine, Entry};
pub(crate) use evict::{Bell, Fill, Need};
pub(crate) use freezing::{Keeping, Look};
pub(crate) use moment::{Gone, Kept};

/// Answers the page faults of any number of regions on one OS thread of its own. Cheap to clone; ends with its last clone and
/// last region.
///
/// ```
/// use pageferry::{Pager, PagerOptions};
/// # if pageferry::Capabilities::probe().userfaultfd() {
/// let pager = Pager::start(&PagerOptions::default())?;
/// let same_thread_as_the_pager = pager.service();
/// # let _ = same_thread_as_the_pager;
/// # }
/// # Ok::<(), pageferry::RegionError>(())
/// ```
#[derive(Clone)]
pub struct Pager {
    inner: Arc<Inner>,
}

struct Inner {
    engine: Arc<Engine>,
    /// Dropped with the last handle: ends the message loop.
    _stop: oneshot::Sender<()>,
}

impl Pager {
    /// Starts a pager with a thread of its own.
    ///
    /// # Errors
    /// [`RegionError::NoUserfaultfd`] with the remedy if this kernel or user may not use it.
    pub fn start(options: &PagerOptions) -> Result<Pager, RegionError> {
        let service = Service::start("pageferry-pager", options.poll_budget)
            .map_err(|error| RegionError::system("starting a thread", error))?;
        Pager::on(service, options)
    }

    /// Starts a pager on an existing service, for instance that of a peer's connection: then a page crosses no thread between the socket
    /// and the install.
    ///
    /// # Errors
    /// As for [`Pager::start`].
    pub fn on(service: Service, options: &PagerOptions) -> Result<Pager, RegionError> {
        let uffd = open_userfault(options.tracker)?;
        tracing::debug!(access = ?uffd.access(), features = ?uffd.features(), "userfaultfd opened");
        let (stop, stopped) = oneshot::channel();
        let engine = Engine::start(uffd, service, crate::sys::page_size(), options.clone(), stopped)
            .map_err(|error| RegionError::system("starting the pager", error))?;
        Ok(Pager { inner: Arc::new(Inner { engine, _stop: stop }) })
    }

    /// The pager that regions use which name none: one for the whole process, started when first needed and never ended.
    ///
    /// # Errors
    /// As for [`Pager::start`].
    pub fn shared() -> Result<Pager, RegionError> {
        static SHARED: OnceLock<Result<Pager, RegionError>> = OnceLock::new();
        SHARED.get_or_init(|| Pager::start(&PagerOptions::default())).clone()
    }

    /// The pager that plain regions are with while they are frozen, unless their own can do that: one for the whole process, as [`Pager::shared`] is.
    pub(crate) fn freezing() -> Result<Pager, RegionError> {
        static FREEZING: OnceLock<Result<Pager, RegionError>> = OnceLock::new();
        let options = PagerOptions { tracker: Some(TrackerKind::WpSync), ..PagerOptions::default() };
        FREEZING.get_or_init(|| Pager::start(&options)).clone()
    }

    /// The thread it runs on.
    #[must_use]
    pub fn service(&self) -> &Service {
        self.inner.engine.service()
    }

    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.inner.engine
    }

    pub(crate) fn options(&self) -> &PagerOptions {
        &self.inner.engine.options
    }
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pager").field("service", self.service()).finish_non_exhaustive()
    }
}

/// Features without which discards and moves of memory would go unnoticed (Linux 4.11, below the floor of 5.7).
const NEEDED: Features = Features::EVENT_REMAP.and(Features::EVENT_REMOVE).and(Features::EVENT_UNMAP);

/// Opens a descriptor with all that helps and is offered. Each is detected here, never by the kernel's version number.
fn open_userfault(tracker: Option<TrackerKind>) -> Result<Userfault, RegionError> {
    let (_, offered) = Userfault::supported().map_err(|error| explain(&error))?;
    if !offered.contains(NEEDED) {
        return Err(RegionError::NoUserfaultfd {
            reason: format!("the kernel offers features {:#x}, needed are {:#x}", offered.bits(), NEEDED.bits()),
            remedy: "use Linux 5.7 or newer".into(),
        });
    }
    // The tracker decides: with `WP_ASYNC` the kernel sends no messages of writes.
    let mut follow = Features::default();
    for feature in [Features::WRITE_PROTECT, Features::WP_UNPOPULATED, Features::WP_ASYNC] {
        if offered.contains(feature) && (feature != Features::WP_ASYNC || tracker.is_none_or(|kind| kind == TrackerKind::WpAsync)) {
            follow = follow.and(feature);
        }
    }
    let poison = if offered.contains(Features::POISON) { Features::POISON } else { Features::default() };
    // Fork events need CAP_SYS_PTRACE even where the descriptor does not: try with, then without. Without them a child that inherited
    // a region against MADV_DONTFORK would read zeros.
    let mut refused = None;
    for fork in [Features::EVENT_FORK, Features::default()] {
        match Userfault::open(NEEDED.and(follow).and(poison).and(fork)).map_err(|error| explain(&error))? {
            Ok(uffd) => return Ok(uffd),
            Err(errno) => refused = Some(errno),
        }
    }
    Err(RegionError::NoUserfaultfd {
        reason: format!("UFFDIO_API refused the features that it offers: {refused:?}"),
        remedy: "report this kernel's version".into(),
    })
}

/// What each way to a descriptor answered, and what to do about it.
pub(crate) fn explain(error: &OpenError) -> RegionError {
    use nix::errno::Errno;
    let OpenError { device, full, user_mode } = error;
    let reason = format!("/dev/userfaultfd: {device}; userfaultfd(2): {full}; with UFFD_USER_MODE_ONLY: {user_mode}");
    let unprivileged = std::fs::read_to_string("/proc/sys/vm/unprivileged_userfaultfd");
    let remedy = match (user_mode, unprivileged.as_deref().map(str::trim)) {
        (Errno::ENOSYS, _) => "this kernel is built without CONFIG_USERFAULTFD: use one that has it".into(),
        (Errno::EPERM | Errno::EACCES, Ok("0")) => {
            "vm.unprivileged_userfaultfd is 0 and a seccomp profile forbids the system call: \
             allow userfaultfd in the profile, or give this user read and write access to /dev/userfaultfd (Linux 6.1)"
                .into()
        }
        (Errno::EPERM | Errno::EACCES, _) => {
            "a seccomp profile or security module forbids it: allow the userfaultfd system call, or pass \
             /dev/userfaultfd into the container"
                .into()
        }
        _ => "raise the limit that the error names (open files: ulimit -n)".into(),
    };
    RegionError::NoUserfaultfd { reason, remedy }
}
