//! Forks of a program that is busy with its regions and undid `MADV_DONTFORK` on them: they end (S2), and no child reads a zero for what is missing (S1).
//!
//! What one child of a quiet program finds is tested in `endings.rs`.

mod common;

use common::*;
use pageferry::{FaultAround, Mount, PageStore, Pager, Region};
use std::{
    hint::black_box,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc, Barrier,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// A region of which children inherit page 4 and miss page 0.
fn inherited(pager: &Pager) -> Region {
    let store = gated(32);
    store.release(1);
    let region = Region::builder().store(store).pager(pager).fault_around(FaultAround::OFF).open().unwrap();
    inherit(&region);
    assert_page(&region, 4);
    region
}

/// Set also by a panic, or the others would be waited for.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Runs `main` while others allocate, and fault in regions of `pagers` that open and end.
fn while_others_allocate(pagers: &[Pager], main: impl FnOnce()) {
    let over = AtomicBool::new(false);
    let store: Arc<dyn PageStore> = Arc::new(memory(64));
    std::thread::scope(|scope| {
        let (over, store) = (&over, &store);
        for pager in pagers {
            scope.spawn(move || {
                while !over.load(Relaxed) {
                    let region = Region::builder().shared_store(store.clone()).pager(pager).fault_around(FaultAround::OFF).open();
                    let region = region.unwrap();
                    inherit(&region);
                    (0..64).for_each(|page| assert_page(&region, page));
                    region.discard(0..32 * PAGE as u64).unwrap();
                    (0..32).for_each(|page| assert_same(page, &read_page(&region, page), &[0; PAGE]));
                }
            });
        }
        for seed in 0..2 {
            scope.spawn(move || {
                let mut random = Random(seed);
                while !over.load(Relaxed) {
                    // More than the allocator's caches of a thread take, so that its locks are taken.
                    black_box((0..64).map(|_| Vec::<u8>::with_capacity(1 + random.below(8192) as usize)).collect::<Vec<_>>());
                }
            });
        }
        let _over = Over(over);
        main();
    });
}

const ENOUGH: Duration = Duration::from_secs(2);

/// Without a thread that reads messages in its place, a pager that allocates while fork(3) keeps the allocator's locks waits for them, and fork for the pager.
#[test]
fn fork_of_a_program_that_undid_dontfork_ends_while_others_allocate() {
    if !uffd_with_forks() {
        return;
    }
    in_child("fork_of_a_program_that_undid_dontfork_ends_while_others_allocate", "fork", || {
        let _watchdog = watchdog();
        let pagers = [pager()];
        let region = inherited(&pagers[0]);
        while_others_allocate(&pagers, || {
            let start = Instant::now();
            while start.elapsed() < ENOUGH {
                assert_eq!(seen_by_a_child(fork, address_of(&region, 4)), Ok(page_bytes(4)[0].into()));
                assert_eq!(seen_by_a_child(fork, address_of(&region, 0)), Err(libc::SIGBUS));
            }
        });
    })
    .ends_well();
}

#[test]
fn two_threads_may_fork_at_once_with_two_pagers() {
    if !uffd_with_forks() {
        return;
    }
    in_child("two_threads_may_fork_at_once_with_two_pagers", "fork", || {
        let _watchdog = watchdog();
        let pagers = [pager(), pager()];
        let regions = [0, 1].map(|pager| inherited(&pagers[pager]));
        while_others_allocate(&pagers, || {
            std::thread::scope(|scope| {
                for turn in [0, 1] {
                    let regions = &regions;
                    scope.spawn(move || {
                        let start = Instant::now();
                        while start.elapsed() < ENOUGH {
                            for region in [&regions[turn], &regions[1 - turn]] {
                                assert_eq!(seen_by_a_child(fork, address_of(region, 4)), Ok(page_bytes(4)[0].into()));
                                assert_eq!(seen_by_a_child(fork, address_of(region, 0)), Err(libc::SIGBUS));
                            }
                        }
                    });
                }
            });
        });
    })
    .ends_well();
}

#[test]
fn a_forked_child_may_fork_again() {
    if !uffd_with_forks() {
        return;
    }
    in_child("a_forked_child_may_fork_again", "fork", || {
        let _watchdog = watchdog();
        let pagers = [pager()];
        let region = inherited(&pagers[0]);
        while_others_allocate(&pagers, || {
            let start = Instant::now();
            while start.elapsed() < ENOUGH {
                let by_a_grandchild = ended(fork, || seen_by_a_child(fork, address_of(&region, 4)).unwrap_or(0));
                assert_eq!(by_a_grandchild, Ok(page_bytes(4)[0].into()));
            }
        });
    })
    .ends_well();
}

/// The thread that should read the kernel's message about the child waits for its own fork.
#[test]
fn the_pagers_own_thread_may_fork() {
    if !uffd_with_forks() {
        return;
    }
    in_child("the_pagers_own_thread_may_fork", "fork", || {
        let _watchdog = watchdog();
        let pager = pager();
        let region = inherited(&pager);
        for _ in 0..50 {
            let address = address_of(&region, 4);
            let seen = pager.service().run(async move { seen_by_a_child(fork, address) });
            assert_eq!(seen, Some(Ok(page_bytes(4)[0].into())));
        }
        assert_eq!(seen_by_a_child(fork, address_of(&region, 0)), Err(libc::SIGBUS));
    })
    .ends_well();
}

/// A child is made while the region ends: the pager is told of the child when the region may be gone from its books.
#[test]
fn a_child_forked_while_its_region_ends_reads_no_zero() {
    if !uffd_with_forks() {
        return;
    }
    in_child("a_child_forked_while_its_region_ends_reads_no_zero", "fork", || {
        let _watchdog = watchdog();
        /// Where nothing else is put, so that what is read there is the region or nothing.
        const ADDRESS: usize = 0x2000_0000_0000;
        let (pager, store, start) = (pager(), gated(4), Instant::now());
        let (both, mut inherited, mut random) = (Barrier::new(2), 0, Random(1));
        while start.elapsed() < ENOUGH {
            let region = Region::builder().store(store.clone()).pager(&pager).at(ADDRESS).open().unwrap();
            inherit(&region);
            let (after, both) = (Duration::from_micros(random.below(500)), &both);
            let seen = std::thread::scope(|scope| {
                scope.spawn(move || {
                    both.wait();
                    std::thread::sleep(after);
                    drop(region);
                });
                both.wait();
                seen_by_a_child(fork, ADDRESS)
            });
            match seen {
                Err(libc::SIGBUS) => inherited += 1,
                Err(libc::SIGSEGV) => {}
                other => panic!("a child saw {other:?} after {inherited} that inherited the region"),
            }
        }
        assert!(inherited > 0);
    })
    .ends_well();
}

/// A page that is being evicted counts as here until it is dropped, and a child that is made between the two misses it.
#[test]
fn a_child_forked_while_pages_are_evicted_reads_no_zero() {
    if !uffd_with_forks() {
        return;
    }
    in_child("a_child_forked_while_pages_are_evicted_reads_no_zero", "fork", || {
        const PAGES: u64 = 512;
        let _watchdog = watchdog();
        let mount = Mount::builder(Arc::new(memory(PAGES))).budget(1 << 20).fault_around(FaultAround::OFF).direct().open().unwrap();
        let region = mount.region().clone();
        inherit(&region);
        let (over, start, mut seen) = (AtomicBool::new(false), Instant::now(), 0);
        let (read_end, write_end) = nix::unistd::pipe().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Relaxed) {
                    (0..PAGES).for_each(|page| assert_page(&region, page));
                }
            });
            let _over = Over(&over);
            while start.elapsed() < ENOUGH || seen != HERE | MISSING {
                let found = ended(fork, || {
                    let mut found = 0;
                    for page in 0..PAGES {
                        found |= match first_byte(&read_end, &write_end, address_of(&region, page)) {
                            None => MISSING,
                            // No page begins with one.
                            Some(0) => return ZERO,
                            Some(_) => HERE,
                        };
                    }
                    found
                });
                assert_ne!(found, Ok(ZERO), "a child read a zero");
                seen |= found.unwrap();
            }
        });
    })
    .ends_well();
}

const ZERO: i32 = 1;
const HERE: i32 = 2;
const MISSING: i32 = 4;

/// The byte at an address, or that it cannot be read: the kernel answers EFAULT where a touch would raise a signal. For forked children.
fn first_byte(read_end: &OwnedFd, write_end: &OwnedFd, address: usize) -> Option<u8> {
    let mut byte = 0_u8;
    // SAFETY: the kernel checks the address; what it reads goes nowhere but into the pipe.
    let written = unsafe { libc::write(write_end.as_raw_fd(), address as *const libc::c_void, 1) };
    // SAFETY: `byte` is valid for the call.
    let read = if written == 1 { unsafe { libc::read(read_end.as_raw_fd(), (&raw mut byte).cast(), 1) } } else { 0 };
    (read == 1).then_some(byte)
}
