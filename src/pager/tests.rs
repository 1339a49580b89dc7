//! The pager against the kernel, where a test must reach inside: panics, and orders of events that only a held lock makes certain.
//!
//! What a thread sees is looked at through process_vm_readv(2), which answers with an errno where the thread would get a signal.

use super::{Engine, address_map::Segment};
use crate::{Capabilities, Extent, FaultAround, MemoryStore, PageSize, Pager, PagerOptions, Region, RegionError, testing::Gated};
use nix::{
    errno::Errno,
    sys::uio::{RemoteIoVec, process_vm_readv},
};
use std::{
    io::IoSliceMut,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

const PAGE: usize = 4096;
const PAGES: usize = 16;

/// A region on a pager of its own, whose store holds the page's number plus one in each byte; `None` where this is not permitted.
fn open() -> Option<(Region, Gated<MemoryStore>, Pager)> {
    let found = Capabilities::probe();
    if !(found.faults_in_system_calls() && found.poison() && crate::sys::page_size() == PageSize::KIB_4) {
        assert!(std::env::var_os("REQUIRE_UFFD").is_none_or(|value| value != "1"), "REQUIRE_UFFD=1, but: {found}");
        eprintln!("*** SKIPPED, NOTHING WAS TESTED: {found}");
        return None;
    }
    let bytes: Vec<u8> = (0..PAGES * PAGE).map(|at| (at / PAGE) as u8 + 1).collect();
    let store = Gated::new(MemoryStore::from_bytes(bytes, PageSize::KIB_4));
    let pager = Pager::start(&PagerOptions::default()).unwrap();
    let region = Region::builder().store(store.clone()).pager(&pager).fault_around(FaultAround::OFF).open().unwrap();
    Some((region, store, pager))
}

fn address_of(region: &Region, page: usize) -> usize {
    region.as_ptr() as usize + page * PAGE
}

fn peek(region: &Region, page: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0xEE; PAGE];
    let remote = [RemoteIoVec { base: address_of(region, page), len: PAGE }];
    process_vm_readv(nix::unistd::Pid::this(), &mut [IoSliceMut::new(&mut bytes)], &remote).map(|_| bytes)
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "not in time: {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn after_a_panic_of_the_loop_no_page_reads_as_zeros_and_no_thread_waits() {
    let Some((region, store, pager)) = open() else { return };
    let engine: &Arc<Engine> = pager.engine();
    store.release(1);
    assert_eq!(peek(&region, 4), Ok(vec![5; PAGE]));
    let waits = |page: usize| {
        let region = region.clone();
        std::thread::spawn(move || peek(&region, page))
    };
    let waits_before = waits(1);
    until("page 1 is asked for", || store.waiting() == [Extent::page(1)]);
    engine.panic_next.store(true, Relaxed);
    let makes_it_turn = waits(2);
    for thread in [waits_before, makes_it_turn] {
        thread.join().unwrap().unwrap_err();
    }
    assert_eq!((region.residency().lost, region.residency().missing()), (PAGES as u64 - 1, 0));
    // A reply that comes now is too late, and what was here stays.
    store.open();
    peek(&region, 1).unwrap_err();
    assert_eq!(peek(&region, 4), Ok(vec![5; PAGE]));
    assert!(matches!(region.read_at(9 * PAGE as u64, &mut [0]), Err(RegionError::Lost { .. })));
    assert!(matches!(region.populate_blocking(0..1), Err(RegionError::Lost { .. })));
    // What the program discards is its own again, so the loop still runs; new regions are refused.
    region.discard(0..PAGE as u64).unwrap();
    assert_eq!(peek(&region, 0), Ok(vec![0; PAGE]));
    assert!(Region::builder().store(store).pager(&pager).open().is_err());
}

#[test]
fn after_a_panic_of_the_installer_a_pull_ends_and_what_is_missing_is_lost() {
    let Some((region, store, pager)) = open() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let pulling = {
        let region = region.clone();
        std::thread::spawn(move || runtime.block_on(region.pull()))
    };
    until("the pull waits for its bytes", || !store.waiting().is_empty());
    // No message is there to be read, so the next turn is the installer's.
    pager.engine().panic_next.store(true, Relaxed);
    store.open();
    assert!(matches!(pulling.join().unwrap(), Err(RegionError::Lost { .. })));
    assert_eq!(region.residency().lost, PAGES as u64);
    peek(&region, 3).unwrap_err();
}

/// A fault at a place where pages have moved to, read before the message that says so.
#[test]
fn a_fault_that_the_kernel_put_off_is_decided_by_what_is_there_then() {
    let Some((region, store, pager)) = open() else { return };
    store.open();
    let engine: &Arc<Engine> = pager.engine();
    let address = address_of(&region, 7);
    let mut state = engine.lock();
    let discarding = {
        let region = region.clone();
        std::thread::spawn(move || region.discard(0..PAGE as u64).unwrap())
    };
    // The pager cannot read the message of the discard, so from now on the kernel puts every install off.
    until("the discard has begun", || !engine.uffd.is_quiet());
    let [(_, Segment { region: id, extent })] = state.map.remove(address as u64, PAGE as u64)[..] else {
        panic!("not one segment")
    };
    let mut asks = Vec::new();
    engine.fault(&mut state, address, Instant::now(), &mut asks);
    assert_eq!((state.again.len(), asks.len()), (1, 0));
    state.map.insert(address as u64, Segment { region: id, extent });
    drop(state);
    discarding.join().unwrap();
    until("nothing is put off any more", || engine.lock().again.is_empty());
    assert_eq!(peek(&region, 7), Ok(vec![8; PAGE]));
    assert_eq!(peek(&region, 0), Ok(vec![0; PAGE]));
}

/// Bytes and zeros that the kernel puts off land later, each where it belongs.
#[test]
fn what_the_kernel_puts_off_lands_later() {
    let Some((region, store, pager)) = open() else { return };
    let engine: &Arc<Engine> = pager.engine();
    region.discard(3 * PAGE as u64..4 * PAGE as u64).unwrap();
    let threads = [2, 3].map(|page| {
        let region = region.clone();
        std::thread::spawn(move || peek(&region, page))
    });
    until("page 2 is asked for", || store.waiting() == [Extent::page(2)]);
    let mut state = engine.lock();
    let discarding = {
        let region = region.clone();
        std::thread::spawn(move || region.discard(0..PAGE as u64).unwrap())
    };
    until("the discard has begun", || !engine.uffd.is_quiet());
    let id = state.map.find(address_of(&region, 2) as u64).unwrap().0;
    let bytes = super::place::Owned::Bytes(vec![3; PAGE].into());
    engine.install(&mut state, id, Extent::page(2), &bytes, super::core::Origin::Demand);
    assert_eq!((state.again.len(), state.regions[&id].counters.snapshot().installs_again), (1, 1));
    drop(state);
    discarding.join().unwrap();
    let [two, three] = threads.map(|thread| thread.join().unwrap());
    assert_eq!((two, three), (Ok(vec![3; PAGE]), Ok(vec![0; PAGE])));
    store.open();
    until("the reply is found stale", || region.stats().pages_stale == 1);
}

/// During a fork messages are read while the pager cannot apply them: the calls that wait for that return, and what they did counts all the same.
#[test]
fn what_was_read_and_not_applied_puts_installs_off_and_is_known_to_whoever_looks() {
    let Some((region, store, pager)) = open() else { return };
    let engine: &Arc<Engine> = pager.engine();
    let mut state = engine.lock();
    let discarding = {
        let region = region.clone();
        std::thread::spawn(move || region.discard(0..PAGE as u64).unwrap())
    };
    until("the discard is read", || engine.uffd.read_ahead());
    discarding.join().unwrap();
    // A fill would no longer be refused by the kernel.
    let id = state.map.find(address_of(&region, 0) as u64).unwrap().0;
    let bytes = super::place::Owned::Bytes(vec![1; PAGE].into());
    engine.install(&mut state, id, Extent::page(0), &bytes, super::core::Origin::Demand);
    assert_eq!(state.again.len(), 1);
    assert!(!engine.uffd.is_quiet());
    drop(state);
    assert_eq!(region.residency().discarded, 1);
    assert_eq!(peek(&region, 0), Ok(vec![0; PAGE]));
    store.open();
    assert_eq!(peek(&region, 1), Ok(vec![2; PAGE]));
}

/// A fault that is read while the pager cannot serve it, and found first by a thread that may not ask stores.
#[test]
fn a_fault_that_was_read_ahead_is_served() {
    let Some((region, store, pager)) = open() else { return };
    store.open();
    let engine: &Arc<Engine> = pager.engine();
    let state = engine.lock();
    let faulting = {
        let region = region.clone();
        std::thread::spawn(move || peek(&region, 3))
    };
    until("the fault is read", || engine.uffd.read_ahead());
    let discarding = {
        let region = region.clone();
        std::thread::spawn(move || region.discard(0..PAGE as u64).unwrap())
    };
    until("the discard is read", || engine.uffd.read_ahead());
    discarding.join().unwrap();
    drop(state);
    assert_eq!(region.residency().discarded, 1);
    // The message of another fault makes the pager look, as the thread that read ahead does otherwise.
    assert_eq!(peek(&region, 4), Ok(vec![5; PAGE]));
    assert_eq!(faulting.join().unwrap(), Ok(vec![4; PAGE]));
}

#[test]
fn after_a_panic_of_the_loop_whoever_waits_to_write_goes_on_and_the_page_is_held() {
    let Some(_) = open() else { return };
    let pager = Pager::start(&PagerOptions { tracker: Some(crate::TrackerKind::WpSync), ..PagerOptions::default() }).unwrap();
    let bytes: Vec<u8> = (0..PAGES * PAGE).map(|at| (at / PAGE) as u8 + 1).collect();
    let store = MemoryStore::from_bytes(bytes, PageSize::KIB_4);
    let filled = Region::builder().store(store).pager(&pager).open().unwrap();
    let plain = Region::builder().size((PAGES * PAGE) as u64).pager(&pager).open().unwrap();
    plain.write_at(0, &[1; PAGE]).unwrap();
    filled.populate_blocking(0..(PAGES * PAGE) as u64).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for region in [plain, filled] {
        let frozen = region.freeze(crate::Program::Paused).unwrap();
        pager.engine().panic_next.store(true, Relaxed);
        // Its message is lost with the panic, and it sends another.
        region.write_at(0, &[9; PAGE]).unwrap();
        assert!(!pager.engine().panic_next.load(Relaxed), "there was no panic");
        let mut page = vec![0; PAGE];
        runtime.block_on(crate::PageStore::read_into(&frozen, Extent::page(0), &mut page)).unwrap();
        assert_eq!(page, [1; PAGE]);
    }
}

/// The kernel dropped it after the pager had put zeros there, which it does when it tells of a discard before that: so it is protected while nothing is there, and the kernel refuses
/// to fill it with zeros then.
#[test]
fn a_page_that_was_dropped_late_reads_as_zeros_when_it_was_protected_meanwhile() {
    let Some((_, store, _)) = open() else { return };
    store.open();
    let pager = Pager::start(&PagerOptions { tracker: Some(crate::TrackerKind::WpSync), ..PagerOptions::default() }).unwrap();
    let region = Region::builder().store(store).pager(&pager).open().unwrap();
    region.populate_blocking(0..(PAGES * PAGE) as u64).unwrap();
    let discard = |page: usize| region.discard((page * PAGE) as u64..((page + 1) * PAGE) as u64).unwrap();
    let engine = pager.engine();
    let (id, _) = engine.lock().map.find(address_of(&region, 0) as u64).unwrap();
    let dropped_late = |page: u64| {
        discard(page as usize);
        engine.with_entry(id, |entry| entry.core.installed(Extent::page(page)));
    };
    dropped_late(3);
    let tracking = region.track().unwrap();
    assert_eq!(peek(&region, 3), Ok(vec![0; PAGE]));
    tracking.take(crate::Program::Paused).unwrap().acknowledge();
    dropped_late(4);
    dropped_late(5);
    let frozen = region.freeze(crate::Program::Paused).unwrap();
    region.write_at(4 * PAGE as u64, &[9; PAGE]).unwrap();
    assert_eq!(peek(&region, 5), Ok(vec![0; PAGE]));
    region.write_at(5 * PAGE as u64, &[9; PAGE]).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut held = vec![1; 4 * PAGE];
    runtime.block_on(crate::PageStore::read_into(&frozen, Extent::between(3, 7), &mut held)).unwrap();
    assert_eq!(held, [vec![0; 3 * PAGE], vec![7; PAGE]].concat());
}
