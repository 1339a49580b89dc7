//! Frozen regions against the real kernel: what is read is what the region held when it was frozen, whatever the program does since. Each call by itself; `frozen_races.rs` has
//! them at once.

mod common;
#[path = "common/frozen.rs"]
mod frozen;

use common::{KIB_4, PAGE, Random, address_of, block_on, page_bytes, watchdog};
use frozen::*;
use nix::sys::mman::{MRemapFlags, MmapAdvise, ProtFlags, madvise, mremap};
use pageferry::{
    Capabilities, Extent, FaultAround, Frozen, MemoryStore, PageStore, Program, Region, RegionError, StoreError, TrackerKind,
    testing::Gated,
};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

#[test]
fn what_is_written_later_is_not_in_it() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(40) {
        let frozen = freeze(&region);
        for page in [0, 3, 4, 5, 4, 39] {
            write(&region, page);
        }
        assert_held(&frozen, 0..40);
        assert_eq!((frozen.saved_pages(), frozen.saved_bytes()), (5, 5 * PAGE as u64), "{region:?}");
        // All at once: some from aside, most from the region.
        let all = read(&frozen, Extent::between(0, 40)).unwrap();
        (0..40).for_each(|page| common::assert_same(page, &all[page as usize * PAGE..][..PAGE], &page_bytes(page)));
        for page in [0, 3, 4, 5, 39] {
            let expected = [&page_bytes(page)[..8], &[0; 100], &page_bytes(page)[108..]].concat();
            common::assert_same(page, &common::read_page(&region, page), &expected);
        }
    }
}

#[test]
fn pages_that_held_nothing_are_zeros_in_it_and_cost_nothing() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    // Never touched; only read; written with zeros; discarded before; zeros in the store, here and missing.
    let (empty, sparse) = (plain(8), filled(MemoryStore::zeroed(8 * PAGE as u64, KIB_4)));
    empty.read_at(PAGE as u64, &mut [0]).unwrap();
    empty.write_at(2 * PAGE as u64, &[0; PAGE]).unwrap();
    let discarded = filled(common::memory(8));
    discarded.populate_blocking(0..4 * PAGE as u64).unwrap();
    for region in [&empty, &discarded] {
        region.discard(0..8 * PAGE as u64).unwrap();
    }
    sparse.populate_blocking(0..4 * PAGE as u64).unwrap();
    for region in [empty, sparse, discarded] {
        let frozen = freeze(&region);
        for page in 0..8 {
            write(&region, page);
            region.write_at(page * PAGE as u64, &[7; PAGE]).unwrap();
        }
        assert_eq!(read(&frozen, Extent::between(0, 8)).unwrap(), [0; 8 * PAGE], "{region:?}");
        assert_eq!(frozen.saved_bytes(), 0);
        drop(frozen);
        assert_eq!(common::read_page(&region, 5), [7; PAGE]);
    }
}

#[test]
fn a_region_can_be_frozen_again_and_again() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(16) {
        for round in 0..20_u64 {
            let page = round % 16;
            region.write_at(page * PAGE as u64, &[round as u8; PAGE]).unwrap();
            let frozen = freeze(&region);
            region.write_at(page * PAGE as u64, &[0xFF; PAGE]).unwrap();
            assert_eq!(read(&frozen, Extent::page(page)).unwrap(), [round as u8; PAGE]);
        }
    }
}

#[test]
fn one_moment_at_a_time_is_kept_and_clones_share_it() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(4) {
        let running = region.freeze(Program::Running).unwrap_err();
        assert!(matches!(running, RegionError::CannotFreeze { .. }) && running.to_string().contains("pause it"), "{running}");
        let frozen = freeze(&region);
        let twice = region.freeze(Program::Paused).unwrap_err();
        assert!(matches!(&twice, RegionError::AlreadyFrozen { region: name } if name == region.name()), "{twice}");
        let clone = frozen.clone();
        drop(frozen);
        write(&region, 2);
        assert_held(&clone, 0..4);
        assert!(matches!(block_on(clone.write(Extent::page(0), &[0; PAGE])), Err(StoreError::ReadOnly)));
        assert!(matches!(block_on(clone.read(Extent::between(3, 5))), Err(StoreError::OutOfRange { .. })));
        drop(clone);
        drop(freeze(&region));
    }
}

#[test]
fn a_pager_that_cannot_says_what_to_do() {
    if !freezes() || !Capabilities::probe().write_protect_async() {
        return;
    }
    let _watchdog = watchdog();
    let filled = Region::builder().store(common::memory(4)).pager(&common::pager()).open().unwrap();
    let followed = plain(4);
    let tracking = followed.track().unwrap();
    for region in [&filled, &followed] {
        let error = region.freeze(Program::Paused).unwrap_err();
        assert!(matches!(error, RegionError::CannotFreeze { .. }) && error.to_string().contains("TrackerKind::WpSync"), "{error}");
        write(region, 1);
    }
    assert_eq!(tracking.take(Program::Running).unwrap().extents(), [Extent::page(1)]);
    drop(tracking);
    // Nobody follows it any more; and afterwards it is followed as before.
    let frozen = freeze(&followed);
    write(&followed, 2);
    assert_eq!(frozen.saved_pages(), 1);
    drop(frozen);
    assert_eq!(followed.track().unwrap().kind(), TrackerKind::WpAsync);
}

/// Each order of beginning and ending.
#[test]
fn a_region_is_followed_while_it_is_frozen() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let take = |tracking: &pageferry::Tracking| {
        let written = tracking.take(Program::Running).unwrap();
        let pages: Vec<u64> = written.extents().iter().flat_map(|extent| extent.pages()).collect();
        written.acknowledge();
        pages
    };
    for track_first in [true, false] {
        for untrack_first in [true, false] {
            for region in regions(16) {
                if track_first && region.name() == "plain" && Capabilities::probe().write_protect_async() {
                    // With its asynchronous pager that is refused.
                    continue;
                }
                region.populate_blocking(0..16 * PAGE as u64).unwrap();
                let tracked = track_first.then(|| region.track().unwrap());
                tracked.iter().for_each(|_| write(&region, 3));
                let held: Vec<Vec<u8>> = (0..16).map(|page| common::read_page(&region, page)).collect();
                let frozen = freeze(&region);
                let tracking = tracked.unwrap_or_else(|| region.track().unwrap());
                write(&region, 4);
                assert_eq!(take(&tracking), if track_first { vec![3, 4] } else { vec![4] }, "{region:?}");
                // Saved before, told again; told before, saved now.
                write(&region, 4);
                write(&region, 3);
                assert_eq!(take(&tracking), [3, 4]);
                let is_held = |frozen: &Frozen| {
                    for page in 0..16 {
                        assert!(read(frozen, Extent::page(page)).unwrap() == held[page as usize], "page {page} of {region:?}");
                    }
                };
                if untrack_first {
                    drop(tracking);
                    write(&region, 9);
                    is_held(&frozen);
                } else {
                    is_held(&frozen);
                    drop(frozen);
                    write(&region, 9);
                    write(&region, 4);
                    assert_eq!(take(&tracking), [4, 9]);
                    drop(tracking);
                }
                (0..16).for_each(|page| write(&region, page));
            }
        }
    }
}

/// Then freezing protects only what was told of, or is to be.
#[test]
fn what_was_written_and_discarded_while_it_was_followed_is_held() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 64;
    for region in regions(PAGES).into_iter().filter(|region| region.name() != "plain") {
        for round in 0..6 {
            let tracking = region.track().unwrap();
            let mut random = Random(round);
            for step in 0..60 {
                let page = random.below(PAGES);
                match random.below(6) {
                    0 => madvise_away(&region, page),
                    1 => region.discard(page * PAGE as u64..(page + 1) * PAGE as u64).unwrap(),
                    2 => {
                        let _ = common::read_page(&region, page);
                    }
                    _ => region.write_at(page * PAGE as u64, &[step; PAGE]).unwrap(),
                }
                if step % 20 == 9 {
                    let program = if round % 2 == 0 { Program::Running } else { Program::Paused };
                    tracking.take(program).unwrap().acknowledge();
                }
            }
            let frozen = freeze(&region);
            // What was not touched since is looked at only now, and so as it was.
            let held: Vec<Vec<u8>> = (0..PAGES).map(|page| common::read_page(&region, page)).collect();
            (0..PAGES).for_each(|page| region.write_at(page * PAGE as u64, &[0xFF; PAGE]).unwrap());
            for page in 0..PAGES {
                assert!(
                    read(&frozen, Extent::page(page)).unwrap() == held[page as usize],
                    "page {page} of {region:?}, round {round}"
                );
            }
            drop(tracking);
        }
    }
}

#[test]
fn what_system_calls_write_later_is_not_in_it() {
    if !freezes() || !common::uffd_in_system_calls() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(16) {
        let frozen = freeze(&region);
        let bytes = vec![7; 2 * PAGE];
        let remote = [nix::sys::uio::RemoteIoVec { base: address_of(&region, 10), len: 2 * PAGE }];
        let local = [std::io::IoSlice::new(&bytes)];
        assert_eq!(nix::sys::uio::process_vm_writev(nix::unistd::Pid::this(), &local, &remote).unwrap(), 2 * PAGE);
        assert_held(&frozen, 8..14);
        assert_eq!(frozen.saved_pages(), 2);
    }
}

#[test]
fn huge_pages_are_saved_page_by_page() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    const PAGES: u64 = 2048;
    let region = plain(PAGES);
    // SAFETY: changes neither content nor address of the region's own range. A kernel without huge pages refuses, and then this tests small ones.
    let _ = unsafe { madvise(start_of(&region, 0), region.len(), MmapAdvise::MADV_HUGEPAGE) };
    (0..PAGES).for_each(|page| region.write_at(page * PAGE as u64, &page_bytes(page)).unwrap());
    let frozen = freeze(&region);
    let mut random = Random(9);
    (0..200).for_each(|_| write(&region, random.below(PAGES)));
    // Many small reads take their time on a busy machine.
    for extent in Extent::between(0, PAGES).chunks(256) {
        let bytes = read(&frozen, extent).unwrap();
        extent.pages().zip(bytes.chunks(PAGE)).for_each(|(page, bytes)| common::assert_same(page, bytes, &page_bytes(page)));
    }
    assert!((100..=200).contains(&frozen.saved_pages()), "{}", frozen.saved_pages());
}

#[test]
fn a_fork_leaves_it_as_it_is() {
    if !freezes() || !common::uffd_with_forks() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(16) {
        common::inherit(&region);
        let frozen = freeze(&region);
        write(&region, 1);
        for fork in common::FORKS {
            // What the parent has written by itself the child may share, and then copies.
            assert_eq!(common::ended(fork, || 3), Ok(3));
            (0..4).for_each(|page| write(&region, page));
        }
        assert_held(&frozen, 0..16);
    }
}

#[test]
fn what_is_released_is_freed_and_not_saved_again() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(16) {
        let frozen = freeze(&region);
        (0..8).for_each(|page| write(&region, page));
        frozen.release(Extent::between(4, 12));
        assert_eq!((frozen.saved_pages(), frozen.saved_bytes()), (8, 4 * PAGE as u64));
        (0..16).for_each(|page| write(&region, page));
        assert_eq!((frozen.saved_pages(), frozen.saved_bytes()), (12, 8 * PAGE as u64));
        assert_held(&frozen, (0..4).chain(12..16));
        assert_gone(&frozen, Extent::between(4, 12), "released");
        frozen.release(Extent::between(0, 100));
        assert_eq!(frozen.saved_bytes(), 0);
    }
}

#[test]
fn what_is_discarded_by_the_region_is_saved() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(80) {
        let frozen = freeze(&region);
        write(&region, 3);
        region.discard(2 * PAGE as u64..60 * PAGE as u64).unwrap();
        assert_eq!(common::read_page(&region, 40), [0; PAGE]);
        write(&region, 40);
        assert_held(&frozen, 0..80);
        assert_eq!(frozen.saved_pages(), 58, "{region:?}");
    }
}

#[test]
fn what_the_program_takes_away_by_itself_is_an_error_and_no_zeros() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    for region in regions(32) {
        let frozen = freeze(&region);
        write(&region, 3);
        (3..6).for_each(|page| madvise_away(&region, page));
        // Saved before it was taken away.
        assert_held(&frozen, 3..4);
        assert_gone(&frozen, Extent::between(4, 6), "Region::discard");
        assert_eq!(
            read(&frozen, Extent::between(0, 32)).unwrap_err().to_string().split(':').next(),
            Some("what pages 4..6 of the frozen region held is gone")
        );
        write(&region, 4);
        assert_gone(&frozen, Extent::between(4, 6), "Region::discard");

        // Moved, with another mapping in its place, and unmapped.
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_DONTUNMAP;
        // SAFETY: pages of the region, which only atomics look at; their old addresses stay taken.
        let moved = unsafe { mremap(start_of(&region, 8), 2 * PAGE, 2 * PAGE, flags, None) }.unwrap();
        // SAFETY: aligned, and mapped for as long as the process lives.
        let word = unsafe { AtomicU64::from_ptr(moved.as_ptr().cast()) };
        word.fetch_add(1, Relaxed);
        assert_gone(&frozen, Extent::between(8, 10), "Region::discard");
        let map_over = nix::sys::mman::MapFlags::MAP_FIXED | nix::sys::mman::MapFlags::MAP_PRIVATE;
        let length = std::num::NonZeroUsize::new(2 * PAGE).unwrap();
        let address = std::num::NonZeroUsize::new(address_of(&region, 12));
        // SAFETY: takes the place of two pages of the region, which only atomics look at.
        unsafe { nix::sys::mman::mmap_anonymous(address, length, ProtFlags::PROT_READ, map_over) }.unwrap();
        assert_gone(&frozen, Extent::between(12, 14), "Region::discard");
        // And what is left is held, and can be written when it is over.
        let rest = (0..32).filter(|page| ![4, 5, 8, 9, 12, 13].contains(page));
        assert_held(&frozen, rest.clone());
        drop(frozen);
        rest.for_each(|page| write(&region, page));
        word.fetch_add(1, Relaxed);
        // To a pager that saw it go it is gone in the next moment too; to one that the region joins anew, what is there is the region's.
        let frozen = freeze(&region);
        match region.name() {
            "plain" => assert!(read(&frozen, Extent::between(12, 14)).is_ok_and(|bytes| bytes == [0; 2 * PAGE])),
            _ => assert_gone(&frozen, Extent::between(12, 14), "Region::discard"),
        }
    }
}

#[test]
fn a_page_that_its_store_cannot_give_is_an_error() {
    if !freezes() {
        return;
    }
    let _watchdog = watchdog();
    let store = Gated::new(common::memory(8));
    let loss = pageferry::LossPolicy { keep_trying: std::time::Duration::ZERO, then: pageferry::OnLoss::Poison };
    let builder = Region::builder().store(store.clone()).fault_around(FaultAround::OFF).pager(&wp_sync()).loss(loss);
    let region = builder.open().unwrap();
    store.release(1);
    write(&region, 0);
    let frozen = freeze(&region);
    store.fail_next(usize::MAX, StoreError::Closed);
    store.open();
    assert!(matches!(read(&frozen, Extent::page(5)), Err(StoreError::Closed)), "{:?}", read(&frozen, Extent::page(5)));
    assert!(read(&frozen, Extent::page(0)).is_ok());
}
