//! How things end: regions, pagers, their last handles and their memory; no end shows a zero page (S1) or waits for itself (S2).

mod common;

use async_trait::async_trait;
use common::*;
use pageferry::{
    Extent, FaultAround, LossPolicy, MemoryStore, OnLoss, PageSize, PageStore, Pager, Pull, Region, Run, StoreError, Verdict,
    testing::Gated,
};
use std::{
    sync::{Arc, Mutex, mpsc},
    time::Duration,
};

#[test]
fn a_thread_that_waits_in_a_region_that_is_dropped_gets_sigsegv_and_no_zero() {
    if !uffd() {
        return;
    }
    let scene = in_child("a_thread_that_waits_in_a_region_that_is_dropped_gets_sigsegv_and_no_zero", "drop", || {
        let store = gated(4);
        let region = page_by_page(&store);
        let address = address_of(&region, 2);
        let waits = std::thread::spawn(move || {
            // SAFETY: none: this is the program's error that the test is about.
            let read = unsafe { (address as *const u8).read_volatile() };
            println!("it read {read}");
            std::process::exit(3);
        });
        block_on(store.arrived(1));
        println!("dropping");
        drop(region);
        let _ = waits.join();
    });
    scene.ends_by(libc::SIGSEGV, "dropping");
}

#[test]
fn regions_outlive_the_handles_of_their_pager() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(16);
    let pager = pager();
    let regions = [(); 2].map(|()| Region::builder().store(store.clone()).pager(&pager).open().unwrap());
    drop(pager);
    store.open();
    (0..16).for_each(|page| assert_page(&regions[0], page));
    let [first, second] = regions;
    drop(first);
    block_on(second.pull()).unwrap();
    (0..16).for_each(|page| assert_page(&second, page));
}

/// A store that keeps something alive: a region, say.
struct Keeps<T> {
    store: MemoryStore,
    kept: T,
}

#[async_trait]
impl<T: Send + Sync + 'static> PageStore for Keeps<T> {
    fn size(&self) -> u64 {
        self.store.size()
    }

    fn page_size(&self) -> PageSize {
        self.store.page_size()
    }

    async fn read(&self, extent: Extent) -> Result<Vec<Run>, StoreError> {
        let _ = &self.kept;
        tokio::task::yield_now().await;
        self.store.read(extent).await
    }

    async fn write(&self, extent: Extent, bytes: &[u8]) -> Result<(), StoreError> {
        self.store.write(extent, bytes).await
    }

    async fn flush(&self) -> Result<(), StoreError> {
        self.store.flush().await
    }

    async fn pull(&self, extents: Vec<Extent>) -> Result<Box<dyn Pull>, StoreError> {
        self.store.pull(extents).await
    }
}

/// Drops its region on whatever thread drops it, and says when that is done.
struct LastHandle {
    region: Option<Region>,
    dropped: Mutex<mpsc::Sender<bool>>,
    pager: pageferry::Service,
}

impl Drop for LastHandle {
    fn drop(&mut self) {
        self.region.take();
        let _ = self.dropped.lock().unwrap().send(self.pager.is_current());
    }
}

fn last_handle(pager: &Pager) -> (LastHandle, mpsc::Receiver<bool>) {
    let (dropped, is_dropped) = mpsc::channel();
    let region = Region::builder().store(memory(8)).pager(pager).open().unwrap();
    region.write_at(0, &[1]).unwrap();
    (LastHandle { region: Some(region), dropped: Mutex::new(dropped), pager: pager.service().clone() }, is_dropped)
}

/// The pager still answers.
fn serves(pager: &Pager) {
    let region = Region::builder().store(memory(8)).pager(pager).open().unwrap();
    (0..8).for_each(|page| assert_page(&region, page));
}

fn unreachable() -> StoreError {
    StoreError::Unreachable { peer: "other".into(), reason: "the test says so".into() }
}

#[test]
fn a_store_may_hold_the_last_handle_of_a_region() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let pager = pager();
    let (handle, is_dropped) = last_handle(&pager);
    let gate = Gated::new(Keeps { store: memory(8), kept: handle });
    let region = Region::builder().store(gate.clone()).pager(&pager).fault_around(FaultAround::OFF).open().unwrap();
    let asked = pager.service().run({
        let (region, gate) = (region.clone(), gate.clone());
        async move {
            // The request that waits at the gate is the last to know the store.
            drop(tokio::spawn(async move { region.populate(0..1).await }));
            gate.arrived(1).await;
        }
    });
    assert_eq!(asked, Some(()));
    drop(region);
    let release = std::thread::spawn(move || {
        gate.release(1);
        drop(gate);
    });
    is_dropped.recv_timeout(PATIENCE).expect("the store was dropped");
    release.join().unwrap();
    serves(&pager);
}

#[test]
fn a_callback_may_hold_the_last_handle_of_a_region() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let pager = pager();
    let (handle, is_dropped) = last_handle(&pager);
    let spare: Arc<dyn PageStore> = Arc::new(memory(4));
    let ask = move |_: &_| {
        let _ = &handle;
        Verdict::Fallback(spare.clone())
    };
    let loss = LossPolicy { keep_trying: Duration::ZERO, then: OnLoss::Ask(Arc::new(ask)) };
    let store = gated(4);
    store.open();
    store.fail_next(usize::MAX, unreachable());
    let region = Region::builder().store(store).pager(&pager).loss(loss).open().unwrap();
    // The spare store has taken over, so the callback is not needed any more.
    (0..4).for_each(|page| assert_page(&region, page));
    assert_eq!(is_dropped.recv_timeout(PATIENCE), Ok(true), "dropped elsewhere than on the pager's thread");
    serves(&pager);
}

/// A process without room for another thread's stack.
fn no_more_threads() {
    let pages: u64 = std::fs::read_to_string("/proc/self/statm").unwrap().split(' ').next().unwrap().parse().unwrap();
    let limit_bytes = (pages + 64) * PAGE as u64;
    let limit = libc::rlimit { rlim_cur: limit_bytes, rlim_max: limit_bytes };
    // SAFETY: the argument is valid for the call.
    assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &raw const limit) }, 0);
    assert!(std::thread::Builder::new().spawn(|| ()).is_err(), "there is room for a thread");
}

#[test]
fn a_region_that_no_thread_can_unmap_leaks_and_the_pager_goes_on() {
    if !uffd() {
        return;
    }
    in_child("a_region_that_no_thread_can_unmap_leaks_and_the_pager_goes_on", "limit", || {
        let _watchdog = watchdog();
        let pager = pager();
        let other = Region::builder().store(memory(8)).pager(&pager).open().unwrap();
        let (handle, is_dropped) = last_handle(&pager);
        no_more_threads();
        assert_eq!(pager.service().run(async move { drop(handle) }), Some(()));
        assert_eq!(is_dropped.recv_timeout(PATIENCE), Ok(true));
        (0..8).for_each(|page| assert_page(&other, page));
    })
    .ends_well();
}

/// The address space that one region leaves is the first that the next one gets.
#[test]
fn regions_that_open_where_others_end_show_no_zeros() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let pager = pager();
    let store: Arc<dyn PageStore> = Arc::new(memory(8));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                for _ in 0..250 {
                    let region = Region::builder().shared_store(store.clone()).pager(&pager).open().unwrap();
                    assert_page(&region, 7);
                }
            });
        }
    });
}

#[test]
fn a_forked_child_gets_what_was_there_and_a_signal_for_the_rest() {
    if !uffd_with_forks() {
        return;
    }
    in_child("a_forked_child_gets_what_was_there_and_a_signal_for_the_rest", "fork", || {
        let _watchdog = watchdog();
        let store = gated(32);
        let region = page_by_page(&store);
        inherit(&region);
        store.open();
        assert_page(&region, 4);
        region.write_at(4 * PAGE as u64, &[77]).unwrap();
        region.discard(6 * PAGE as u64..7 * PAGE as u64).unwrap();
        for fork in FORKS {
            assert_eq!(seen_by_a_child(fork, address_of(&region, 4)), Ok(77));
            assert_eq!(seen_by_a_child(fork, address_of(&region, 6)), Ok(0));
            for page in [0, 5, 31] {
                assert_eq!(seen_by_a_child(fork, address_of(&region, page)), Err(libc::SIGBUS), "page {page}");
            }
        }
        // Here they still come.
        (0..32).filter(|page| ![4, 6].contains(page)).for_each(|page| assert_page(&region, page));
    })
    .ends_well();
}

#[test]
fn a_forked_child_gets_a_signal_for_what_is_lost() {
    if !uffd_with_forks() {
        return;
    }
    in_child("a_forked_child_gets_a_signal_for_what_is_lost", "fork", || {
        let _watchdog = watchdog();
        let store = gated(8);
        store.open();
        store.fail_next(usize::MAX, unreachable());
        let loss = LossPolicy { keep_trying: Duration::ZERO, then: OnLoss::Poison };
        let region = Region::builder().store(store).pager(&pager()).loss(loss).open().unwrap();
        inherit(&region);
        assert!(peek(address_of(&region, 3)).is_err());
        assert_eq!(region.residency().lost, 8);
        for fork in FORKS {
            // Nothing is resident: of a mapping without a page fork(2) might copy nothing, the poison included.
            assert_eq!(seen_by_a_child(fork, address_of(&region, 3)), Err(libc::SIGBUS));
        }
    })
    .ends_well();
}

#[test]
fn what_was_moved_out_of_a_region_is_poisoned_when_it_ends() {
    use nix::sys::mman::{MRemapFlags, mremap};
    if !uffd_with_poison() {
        return;
    }
    in_child("what_was_moved_out_of_a_region_is_poisoned_when_it_ends", "move", || {
        let _watchdog = watchdog();
        let store = gated(16);
        let region = page_by_page(&store);
        let from = std::ptr::NonNull::new(address_of(&region, 8) as *mut std::ffi::c_void).unwrap();
        // DONTUNMAP keeps the addresses taken until the region's drop.
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_DONTUNMAP;
        // SAFETY: the pages belong to the region, and nobody refers to them.
        let moved = unsafe { mremap(from, 8 * PAGE, 8 * PAGE, flags, None) }.unwrap().as_ptr() as usize;
        let waits = std::thread::spawn(move || peek(moved + 5 * PAGE));
        block_on(store.arrived(1));
        store.open();
        assert_same(13, &waits.join().unwrap().unwrap(), &page_bytes(13));
        store.close();
        let waits = std::thread::spawn(move || peek(moved + 6 * PAGE));
        block_on(store.arrived(1));
        drop(region);
        assert!(waits.join().unwrap().is_err(), "who waited in what was moved got no signal");
        assert_same(13, &peek(moved + 5 * PAGE).unwrap(), &page_bytes(13));
        assert!(peek(moved).is_err(), "a page that was missing can be read");
    })
    .ends_well();
}

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    statm.split(' ').nth(1).unwrap().parse::<usize>().unwrap() * PAGE
}

#[test]
fn a_thousand_regions_share_one_thread_and_little_memory() {
    if !uffd() {
        return;
    }
    const REGIONS: u64 = 1000;
    const PAGES: u64 = 2560;
    let scene = in_child("a_thousand_regions_share_one_thread_and_little_memory", "thousand", || {
        let pager = pager();
        let store: Arc<dyn PageStore> = Arc::new(MemoryStore::zeroed(PAGES * PAGE as u64, KIB_4));
        block_on(store.write(Extent::page(PAGES - 1), &page_bytes(9))).unwrap();
        let open = || Region::builder().shared_store(store.clone()).pager(&pager).fault_around(FaultAround::OFF).open().unwrap();
        let allowed_bytes = PAGES as usize + (64 << 10);
        let (threads_before, mut bytes_before) = (threads(), resident_bytes());
        let mut left_bytes = Vec::new();
        for _ in 0..4 {
            let regions: Vec<Region> = (0..REGIONS).map(|_| open()).collect();
            assert!(regions.iter().all(|region| region.overhead_bytes() <= allowed_bytes), "{}", regions[0].overhead_bytes());
            let grown_bytes = resident_bytes().saturating_sub(bytes_before);
            assert!(grown_bytes <= REGIONS as usize * allowed_bytes, "{grown_bytes} bytes more for {REGIONS} regions");
            for region in &regions {
                let mut got = vec![0; PAGE];
                region.read_at((PAGES - 1) * PAGE as u64, &mut got).unwrap();
                assert_same(9, &got, &page_bytes(9));
            }
            assert_eq!(threads(), threads_before);
            drop(regions);
            left_bytes.push(resident_bytes().saturating_sub(bytes_before));
            bytes_before = resident_bytes();
        }
        // What the allocator keeps of one round serves the others, now and then with a page more; a leak comes back in each.
        assert!(left_bytes[1..].iter().any(|left| *left < 1 << 20), "{left_bytes:?} bytes leaked in the rounds");
    });
    scene.ends_well();
}
