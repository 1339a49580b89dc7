//! What the program wrote, discarded, moved or unmapped is never overwritten by older bytes in flight, nor read as zeros (S1, S4).

mod common;

use common::*;
use nix::sys::mman::{MRemapFlags, MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, mremap, munmap};
use pageferry::{Extent, FaultAround, PULL_EXTENT_BYTES, PageStore, Region};
use std::{
    ffi::c_void,
    num::NonZeroUsize,
    ptr::NonNull,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
};

const ZEROS: [u8; PAGE] = [0; PAGE];

fn bytes_of(extent: Extent) -> std::ops::Range<u64> {
    extent.first() * PAGE as u64..extent.end() * PAGE as u64
}

fn at(address: usize) -> NonNull<c_void> {
    NonNull::new(address as *mut c_void).unwrap()
}

fn pointer(region: &Region, page: u64) -> NonNull<c_void> {
    at(address_of(region, page))
}

/// A test that unmaps or moves pages leaves a hole that anybody's memory may fill, and the drop of a region unmaps its whole range: so
/// that region is never dropped.
fn never_dropped(region: &Region) {
    std::mem::forget(region.clone());
}

/// Starts a pull of `region` on a thread, whose steps wait at the gate of its store.
fn pulling<'scope>(scope: &'scope std::thread::Scope<'scope, '_>, region: &'scope Region) {
    scope.spawn(|| block_on(region.pull()).unwrap());
}

#[test]
fn a_discard_makes_the_reply_in_flight_stale() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(16);
    let region = page_by_page(&store);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read_page(&region, 3));
        block_on(store.arrived(1));
        region.discard(bytes_of(Extent::page(3))).unwrap();
        // The reader does not need the reply any more.
        assert_same(3, &reader.join().unwrap(), &ZEROS);
        assert_eq!(store.waiting(), [Extent::page(3)]);
        region.write_at(3 * PAGE as u64 + 8, &[7]).unwrap();
        store.release(1);
        until("the reply is found stale", || region.stats().pages_stale == 1);
        let mut expected = ZEROS;
        expected[8] = 7;
        assert_same(3, &read_page(&region, 3), &expected);
    });
    // Discarded and not touched: zeros, whatever the pull brings.
    region.discard(bytes_of(Extent::between(2, 5))).unwrap();
    store.open();
    block_on(region.pull()).unwrap();
    assert_eq!((region.residency().discarded, region.residency().missing()), (3, 0));
    (2..5).for_each(|page| assert_same(page, &read_page(&region, page), &ZEROS));
    [0, 1, 5, 15].into_iter().for_each(|page| assert_page(&region, page));
    assert_eq!(region.stats().pages_discarded, 4);
}

#[test]
fn what_was_resident_and_then_discarded_reads_as_zeros() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(16);
    store.open();
    let region = page_by_page(&store);
    for round in 0..3 {
        if round == 0 {
            region.populate_blocking(0..16 * PAGE as u64).unwrap();
        }
        region.discard(bytes_of(Extent::between(4, 12))).unwrap();
        assert_eq!(region.residency().discarded, 8);
        for page in 4..12 {
            assert_same(page, &read_page(&region, page), &ZEROS);
            region.write_at(page * PAGE as u64, &[round; PAGE]).unwrap();
        }
    }
    assert_page(&region, 3);
    assert_page(&region, 12);
    assert_eq!((store.reads().len(), region.residency().discarded), (1, 0));
}

#[test]
fn a_write_is_not_overwritten_by_a_pull_in_flight() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let pull_pages = PULL_EXTENT_BYTES / PAGE as u64;
    let store = gated(2 * pull_pages);
    let region = page_by_page(&store);
    std::thread::scope(|scope| {
        pulling(scope, &region);
        block_on(store.arrived(1));
        assert_eq!(store.waiting(), [Extent::between(0, pull_pages)]);
        // Before the pull reaches it: by a fault of its own, which overtakes.
        let writer = scope.spawn(|| region.write_at(3 * PAGE as u64, &[0xAA; PAGE]).unwrap());
        block_on(store.arrived(2));
        assert!(store.release_extent(Extent::page(3)));
        writer.join().unwrap();
        // Newer bytes in the store change nothing either.
        block_on(store.inner().write(Extent::page(3), &[0xBB; PAGE])).unwrap();
        store.release(1);
        until("the rest of the step is here", || region.residency().resident == pull_pages);
        assert_same(3, &read_page(&region, 3), &[0xAA; PAGE]);
        // After the pull reached it.
        region.write_at(5 * PAGE as u64, &[0xCC; PAGE]).unwrap();
        store.open();
    });
    for page in 0..2 * pull_pages {
        match page {
            3 => assert_same(page, &read_page(&region, page), &[0xAA; PAGE]),
            5 => assert_same(page, &read_page(&region, page), &[0xCC; PAGE]),
            _ => assert_page(&region, page),
        }
    }
    assert_eq!((region.stats().pages_stale, region.stats().pages_pull), (1, 2 * pull_pages - 1));
}

/// One thread writes, discards and reads its own pages, and knows what each must hold.
fn churn_own_pages(region: &Region, owner: u64, owners: u64, seed: u64) {
    let mut random = Random(seed);
    let pages = region.extent().count();
    let mut model: Vec<Vec<u8>> = (0..pages).map(page_bytes).collect();
    for step in 0..150u64 {
        let page = random.below(pages / owners) * owners + owner;
        let (at, expected) = (page * PAGE as u64, &mut model[page as usize]);
        match random.below(5) {
            0 => {
                region.discard(at..at + PAGE as u64).unwrap();
                expected.fill(0);
            }
            1 | 2 => {
                let word = random.below(PAGE as u64 / 8);
                region.write_at(at + word * 8, &step.to_le_bytes()).unwrap();
                expected[word as usize * 8..][..8].copy_from_slice(&step.to_le_bytes());
            }
            _ => assert_same(page, &read_page(region, page), expected),
        }
    }
    for page in (owner..pages).step_by(owners as usize) {
        assert_same(page, &read_page(region, page), &model[page as usize]);
    }
}

#[test]
fn writers_discards_and_a_pull_at_once_agree_with_a_model() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    const OWNERS: u64 = 6;
    for (round, around) in [FaultAround::default(), FaultAround::OFF].into_iter().enumerate() {
        let store = gated(96);
        let region = Region::builder().store(store.clone()).pager(&pager()).fault_around(around).open().unwrap();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            pulling(scope, &region);
            // Replies come late and out of order.
            scope.spawn(|| {
                let mut random = Random(round as u64);
                while !over.load(Relaxed) {
                    let waiting = store.waiting();
                    if waiting.len() as u64 > random.below(4) {
                        store.release_extent(waiting[random.below(waiting.len() as u64) as usize]);
                    }
                    std::thread::yield_now();
                }
                store.open();
            });
            let region = &region;
            let churning: Vec<_> = (0..OWNERS)
                .map(|owner| scope.spawn(move || churn_own_pages(region, owner, OWNERS, owner * 31 + round as u64)))
                .collect();
            let results: Vec<_> = churning.into_iter().map(std::thread::ScopedJoinHandle::join).collect();
            over.store(true, Relaxed);
            results.into_iter().for_each(Result::unwrap);
        });
        assert_eq!(region.residency().missing(), 0);
    }
}

#[test]
fn a_page_that_was_unmapped_is_forgotten_and_its_neighbours_come() {
    if !uffd_in_system_calls() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(16);
    let region = Region::builder().store(store.clone()).pager(&pager()).open().unwrap();
    std::thread::scope(|scope| {
        let waits_in_the_hole = scope.spawn(|| peek(address_of(&region, 9)));
        block_on(store.arrived(1));
        // The window of 16 pages around page 9 is in flight as three reads.
        never_dropped(&region);
        // SAFETY: pages 8..10 belong to `region` and hold nothing that anybody refers to.
        unsafe { munmap(pointer(&region, 8), 2 * PAGE) }.unwrap();
        assert_eq!(waits_in_the_hole.join().unwrap(), Err(nix::errno::Errno::EFAULT));
    });
    store.open();
    (0..8).chain(10..16).for_each(|page| assert_page(&region, page));
    until("the reply for what was unmapped is found stale", || region.stats().pages_stale == 2);
    assert_eq!((region.residency().resident, region.residency().discarded), (14, 2));
}

/// Reserves room for so many pages and gives its address, where `mremap` with `MREMAP_FIXED` may put them.
fn room(pages: u64) -> usize {
    let len = NonZeroUsize::new(pages as usize * PAGE).unwrap();
    // SAFETY: a new mapping anywhere.
    unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, MapFlags::MAP_PRIVATE) }.unwrap().as_ptr() as usize
}

fn move_pages(region: &Region, extent: Extent, to: usize, flags: MRemapFlags) {
    never_dropped(region);
    let len = extent.count() as usize * PAGE;
    let flags = flags | MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
    // SAFETY: the pages belong to `region`, and `to` is room that nobody uses.
    let moved = unsafe { mremap(pointer(region, extent.first()), len, len, flags, Some(at(to))) }.unwrap();
    assert_eq!(moved, at(to));
}

#[test]
fn pages_that_move_get_their_bytes_at_the_new_place() {
    if !uffd_in_system_calls() {
        return;
    }
    // In a process of its own, whose threads do not put something else where the pages were.
    in_child("pages_that_move_get_their_bytes_at_the_new_place", "move", || {
        let _watchdog = watchdog();
        let store = gated(16);
        let region = page_by_page(&store);
        let to = room(8);
        let new_address = |page: u64| to + (page as usize - 4) * PAGE;
        std::thread::scope(|scope| {
            let waits_at_the_old_place = scope.spawn(|| peek(address_of(&region, 5)));
            block_on(store.arrived(1));
            move_pages(&region, Extent::between(4, 12), to, MRemapFlags::empty());
            assert_eq!(waits_at_the_old_place.join().unwrap(), Err(nix::errno::Errno::EFAULT));
            // The reply that was asked for at the old place lands at the new one.
            store.release(1);
            until("page 5 is resident", || region.residency().resident == 1);
            assert_same(5, &peek(new_address(5)).unwrap(), &page_bytes(5));
            assert_eq!(store.reads(), [Extent::page(5)]);
        });
        store.open();
        (4..12).for_each(|page| assert_same(page, &peek(new_address(page)).unwrap(), &page_bytes(page)));
        [3, 12].into_iter().for_each(|page| assert_page(&region, page));
        // SAFETY: nobody refers to the moved pages any more.
        unsafe { munmap(at(to), 8 * PAGE) }.unwrap();
    })
    .ends_well();
}

#[test]
fn what_a_move_leaves_behind_reads_as_zeros() {
    if !uffd_in_system_calls() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(16);
    store.open();
    let region = page_by_page(&store);
    assert_page(&region, 6);
    let to = room(8);
    move_pages(&region, Extent::between(4, 12), to, MRemapFlags::MREMAP_DONTUNMAP);
    (4..12).for_each(|page| assert_same(page, &read_page(&region, page), &ZEROS));
    for page in 4..12 {
        assert_same(page, &peek(to + (page as usize - 4) * PAGE).unwrap(), &page_bytes(page));
    }
    // SAFETY: nobody refers to the moved pages any more.
    unsafe { munmap(at(to), 8 * PAGE) }.unwrap();
}

/// A thread may touch the new place before the pager has read that the pages moved there.
#[test]
fn a_touch_right_after_a_move_gets_no_zeros() {
    if !uffd_in_system_calls() {
        return;
    }
    let _watchdog = watchdog();
    const MOVES: u64 = 300;
    let store = gated(MOVES);
    store.open();
    let region = page_by_page(&store);
    let (places, next) = (room(MOVES), std::sync::Barrier::new(2));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..MOVES {
                next.wait();
                move_pages(&region, Extent::page(page), places + page as usize * PAGE, MRemapFlags::empty());
            }
        });
        for page in 0..MOVES {
            next.wait();
            // EFAULT while it has not arrived: what is there cannot be read.
            let mut got = Err(nix::errno::Errno::EFAULT);
            until("the page has moved", || {
                got = peek(places + page as usize * PAGE);
                got.is_ok()
            });
            assert_same(page, &got.unwrap(), &page_bytes(page));
        }
    });
}

#[test]
fn an_install_that_spans_mappings_is_done_piece_by_piece() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let store = gated(64);
    let around = FaultAround { base_pages: 64, max_pages: 64, ahead_pages: 0 };
    let region = Region::builder().store(store.clone()).pager(&pager()).fault_around(around).open().unwrap();
    // SAFETY: advice about core dumps and a protection that is taken back below; both split the mapping.
    unsafe {
        madvise(pointer(&region, 20), 3 * PAGE, MmapAdvise::MADV_DODUMP).unwrap();
        mprotect(pointer(&region, 40), PAGE, ProtFlags::PROT_READ).unwrap();
    }
    std::thread::scope(|scope| {
        scope.spawn(|| assert_page(&region, 0));
        block_on(store.arrived(2));
        assert_eq!(store.waiting(), [Extent::page(0), Extent::between(1, 64)]);
        // And while the reply is in flight.
        // SAFETY: as above.
        unsafe { madvise(pointer(&region, 30), PAGE, MmapAdvise::MADV_DODUMP) }.unwrap();
        store.open();
    });
    until("the window is resident", || region.residency().resident == 64);
    assert_eq!(region.stats().pages_stale, 0);
    (0..64).for_each(|page| assert_page(&region, page));
    assert_eq!(store.reads().len(), 2);
}
