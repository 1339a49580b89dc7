//! The bare kernel: userfaultfd without pageferry, for baselines.
//!
//! Role: the least code that resolves a fault or fills a range, so that what pageferry adds can be told. Neighbours: the benches; `raw_writes` does the same
//! for writes; shares nothing with `src/sys`. Invariants: these two files hold the only unsafe code under `benches/`; memory is read through atomics, for the
//! kernel fills it at any time.

use super::{PAGE_BYTES, Result};
use std::{
    fs::File,
    io::{self, PipeReader, PipeWriter, Read},
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    ptr::NonNull,
    sync::atomic::{
        AtomicU64,
        Ordering::{Acquire, Relaxed, Release},
    },
    time::Instant,
};

// linux/userfaultfd.h: requests with the sizes of their arguments encoded, and the few bits used here.
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
pub(super) const UFFDIO_API: libc::Ioctl = 0xc018_aa3f_u32 as libc::Ioctl;
pub(super) const UFFDIO_REGISTER: libc::Ioctl = 0xc020_aa00_u32 as libc::Ioctl;
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03_u32 as libc::Ioctl;
const UFFDIO_ZEROPAGE: libc::Ioctl = 0xc020_aa04_u32 as libc::Ioctl;
pub(super) const UFFD_API: u64 = 0xaa;
const UFFD_USER_MODE_ONLY: libc::c_int = 1;
const REGISTER_MODE_MISSING: u64 = 1;
pub(super) const EVENT_PAGEFAULT: u8 = 0x12;

#[repr(C)]
pub(super) struct Api {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct Register {
    pub(super) start: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
struct Copy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

/// Anonymous memory registered for missing pages with a userfaultfd of its own.
pub struct RawRegion {
    start: NonNull<u8>,
    len: usize,
    uffd: File,
}

// SAFETY: the mapping belongs to this value until it is dropped; it is read through atomics and written by the kernel only.
unsafe impl Send for RawRegion {}
// SAFETY: as above; every method takes `&self` and is a system call or an atomic load.
unsafe impl Sync for RawRegion {}

impl RawRegion {
    /// Maps and registers `len` bytes, whole pages. No page is there yet.
    pub fn new(len: usize) -> Result<RawRegion> {
        let uffd = File::from(open_userfaultfd()?);
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new anonymous mapping at an address that the kernel chooses touches no memory that exists.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(format!("mmap of {len} bytes: {}", io::Error::last_os_error()).into());
        }
        let start = NonNull::new(start.cast()).ok_or("mmap gave address 0")?;
        let region = RawRegion { start, len, uffd };
        let mut api = Api { api: UFFD_API, features: 0, ioctls: 0 };
        region.ioctl("UFFDIO_API", UFFDIO_API, &mut api)?;
        let mut register = Register { start: region.address(), len: len as u64, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        region.ioctl("UFFDIO_REGISTER", UFFDIO_REGISTER, &mut register)?;
        Ok(region)
    }

    /// Installs `bytes`, whole pages, at byte `offset` and wakes whoever waits for them.
    pub fn install(&self, offset: usize, bytes: &[u8]) -> Result<()> {
        assert!(offset.checked_add(bytes.len()).is_some_and(|end| end <= self.len), "{offset} + {} of {}", bytes.len(), self.len);
        let mut done = 0;
        while done < bytes.len() {
            let rest = &bytes[done..];
            let dst = self.address() + (offset + done) as u64;
            let mut copy = Copy { dst, src: rest.as_ptr().addr() as u64, len: rest.len() as u64, mode: 0, copied: 0 };
            match self.ioctl("UFFDIO_COPY", UFFDIO_COPY, &mut copy) {
                Ok(()) => return Ok(()),
                // A short copy fails too and says how far it came; a negative count is an errno, and then `source` is that.
                Err(_) if copy.copied > 0 => done += usize::try_from(copy.copied)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Maps the page of zeros at `len` bytes from byte `offset`, whole pages, and wakes whoever waits for them.
    pub fn zero(&self, offset: usize, len: usize) -> Result<()> {
        assert!(offset.checked_add(len).is_some_and(|end| end <= self.len), "{offset} + {len} of {}", self.len);
        let mut done = 0;
        while done < len {
            let start = self.address() + (offset + done) as u64;
            let mut zero = Zero { start, len: (len - done) as u64, mode: 0, zeroed: 0 };
            match self.ioctl("UFFDIO_ZEROPAGE", UFFDIO_ZEROPAGE, &mut zero) {
                Ok(()) => return Ok(()),
                // As in `install`.
                Err(_) if zero.zeroed > 0 => done += usize::try_from(zero.zeroed)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The word at byte `offset`, a multiple of 8. Blocks while its page is missing.
    #[inline]
    pub fn word(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: inside the mapping, which lives as long as `self`; aligned, since the mapping starts at a page. Nothing in this process
        // writes the range but through the kernel.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(offset).cast()) }.load(Relaxed)
    }

    /// Copies resident memory out.
    pub fn read(&self, offset: usize, into: &mut [u8]) {
        for (at, word) in into.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&self.word(offset + at * 8).to_ne_bytes());
        }
    }

    /// The bare loop: waits for faults and installs the page at the same offset of `source`, until the other end of `stop` is closed.
    pub fn serve(&self, source: &[u8], stop: &PipeReader, stamps: Option<&Stamps>) -> Result<()> {
        const PAGE: usize = PAGE_BYTES as usize;
        let mut waiting = [self.uffd.as_raw_fd(), stop.as_raw_fd()].map(|fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 });
        let mut message = [0; 32]; // struct uffd_msg: the event in byte 0, a fault's address in bytes 16..24
        loop {
            // SAFETY: two valid entries, and both descriptors outlive the call.
            let ready = unsafe { libc::poll(waiting.as_mut_ptr(), 2, -1) };
            if ready < 0 {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error.into());
            }
            if waiting[0].revents == 0 {
                return Ok(());
            }
            match (&self.uffd).read(&mut message) {
                Ok(32) if message[0] == EVENT_PAGEFAULT => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                other => return Err(format!("userfaultfd gave {other:?} and event {:#x}", message[0]).into()),
            }
            if let Some(stamps) = stamps {
                stamps.read.set();
            }
            let mut address = [0; 8];
            address.copy_from_slice(&message[16..24]);
            let offset = usize::try_from(u64::from_ne_bytes(address) - self.address())? & !(PAGE - 1);
            self.install(offset, &source[offset..offset + PAGE])?;
            if let Some(stamps) = stamps {
                stamps.installed.set();
            }
        }
    }

    fn address(&self) -> u64 {
        self.start.addr().get() as u64
    }

    fn ioctl<T>(&self, name: &str, request: libc::Ioctl, argument: &mut T) -> Result<()> {
        // SAFETY: `request` encodes the size of `T`, so the kernel writes inside `argument`. What UFFDIO_COPY and UFFDIO_ZEROPAGE fill besides
        // lies in this mapping (checked by `install` and `zero`), and what UFFDIO_COPY reads in a slice that is borrowed for the call.
        if unsafe { libc::ioctl(self.uffd.as_raw_fd(), request, std::ptr::from_mut(argument)) } == 0 {
            return Ok(());
        }
        Err(format!("{name}: {}", io::Error::last_os_error()).into())
    }
}

impl Drop for RawRegion {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this length; nobody can hold a reference, for none is given out. Unmapped before the descriptor is
        // closed, so that no thread ever sees the zeros of an unregistered page.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

pub(super) fn open_userfaultfd() -> Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    if let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") {
        // SAFETY: the request takes flags by value and touches no memory.
        let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if fd >= 0 {
            // SAFETY: a new descriptor that nobody else knows.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let mut refused = io::Error::from_raw_os_error(libc::ENOSYS);
    for flags in [flags, flags | UFFD_USER_MODE_ONLY] {
        // SAFETY: the call takes flags by value and touches no memory.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
        if fd >= 0 {
            // SAFETY: a new descriptor that nobody else knows.
            return Ok(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) });
        }
        refused = io::Error::last_os_error();
    }
    Err(format!("userfaultfd is not available: {refused}; see Capabilities::probe for the remedy").into())
}

/// When the bare loop passed its hops, for one fault at a time.
pub struct Stamps {
    /// The fault message was read.
    pub read: Stamp,
    /// The install call returned.
    pub installed: Stamp,
}

impl Stamps {
    pub fn new() -> Stamps {
        let start = Instant::now();
        let stamp = || Stamp { start, at_ns: AtomicU64::new(0) };
        Stamps { read: stamp(), installed: stamp() }
    }
}

/// An instant that one thread sets and another takes.
pub struct Stamp {
    start: Instant,
    /// Zero: not set.
    at_ns: AtomicU64,
}

impl Stamp {
    fn set(&self) {
        self.at_ns.store(self.start.elapsed().as_nanos() as u64, Release);
    }

    /// Microseconds from `earlier` to the stamp, which is cleared for the next fault. The toucher may be back before the thread that woke
    /// it has set its stamp; then this waits for it, and the result may exceed the touch.
    pub fn take_us_after(&self, earlier: Instant) -> f64 {
        loop {
            let at_ns = self.at_ns.swap(0, Acquire);
            if at_ns != 0 {
                return (at_ns as f64 - (earlier - self.start).as_nanos() as f64) / 1e3;
            }
            std::thread::yield_now();
        }
    }
}

/// Ends [`RawRegion::serve`] when its writer is dropped.
pub fn stop_pipe() -> Result<(PipeReader, PipeWriter)> {
    Ok(io::pipe()?)
}

/// Lets every processor have `bytes` of memory that a case is about to fill.
///
/// A virtual machine's host takes back what was free for a while and gives it again page by page, at a tenth of the speed of a copy. Linux keeps up to a GiB of
/// freed pages for the processor that freed them, so a thread on another processor is given pages that the host has yet to find: bare `UFFDIO_COPY` of 1 GiB made
/// 3,800 MB/s on the processor that had freed the last GiB and 440 to 1,500 on the other. Small pages, because large ones are kept elsewhere.
pub fn have_memory(bytes: u64) {
    // More would take longer than what is measured; on a large machine each keeps less.
    const PROCESSORS_MAX: usize = 8;
    // SAFETY: a set of bits, valid as zeros; the calls below write and read inside it.
    let mut all: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: as long as said.
    unsafe { libc::sched_getaffinity(0, size_of_val(&all), &raw mut all) };
    let may_use = |cpu: &usize| {
        // SAFETY: `cpu` is below the size of the set.
        unsafe { libc::CPU_ISSET(*cpu, &all) }
    };
    for cpu in (0..libc::CPU_SETSIZE as usize).filter(may_use).take(PROCESSORS_MAX) {
        // A thread of its own: the setting ends with it.
        std::thread::scope(|scope| scope.spawn(|| touch_on(cpu, bytes as usize)).join()).expect("touching memory does not panic");
    }
}

fn touch_on(cpu: usize, len: usize) {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the set is valid as zeros and `cpu` below its size. The mapping is new, and this function's alone until it unmaps it.
    unsafe {
        let mut one: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(cpu, &mut one);
        libc::sched_setaffinity(0, size_of_val(&one), &raw const one);
        let start = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0);
        if start == libc::MAP_FAILED {
            return;
        }
        libc::madvise(start, len, libc::MADV_NOHUGEPAGE);
        for offset in (0..len).step_by(PAGE_BYTES as usize) {
            start.cast::<u8>().add(offset).write_volatile(1);
        }
        libc::munmap(start, len);
    }
}

/// CPU seconds of this process so far, user and system.
pub fn cpu_s() -> f64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the structure, which is plain numbers and valid as zeros should the call fail.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr());
        usage.assume_init()
    };
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}
