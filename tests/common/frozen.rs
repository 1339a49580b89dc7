//! What the tests of frozen regions share: regions of every kind that hold known bytes, and readers that know what a moment held.

#![allow(dead_code, reason = "each test binary uses its own part")]

use crate::common::{PAGE, address_of, assert_same, block_on, memory, page_bytes, uffd};
use nix::sys::mman::{MmapAdvise, madvise};
use pageferry::{
    Capabilities, Extent, FaultAround, Frozen, PageStore, Pager, PagerOptions, Program, Region, StoreError, TrackerKind,
};
use std::{ffi::c_void, ptr::NonNull};

/// Whether regions can be frozen here.
pub fn freezes() -> bool {
    let found = Capabilities::probe();
    if uffd() && !found.write_protect() {
        assert_ne!(std::env::var("REQUIRE_UFFD").as_deref(), Ok("1"), "REQUIRE_UFFD=1, but: {found}");
        eprintln!("\n*** SKIPPED, NOTHING WAS TESTED: {found}\n");
    }
    uffd() && found.write_protect()
}

pub fn wp_sync() -> Pager {
    Pager::start(&PagerOptions { tracker: Some(TrackerKind::WpSync), ..PagerOptions::default() }).unwrap()
}

pub fn plain(pages: u64) -> Region {
    Region::builder().name("plain").size(pages * PAGE as u64).open().unwrap()
}

/// Filled page by page as it is touched.
pub fn filled(store: impl PageStore) -> Region {
    Region::builder().name("filled").store(store).fault_around(FaultAround::OFF).pager(&wp_sync()).open().unwrap()
}

/// Of each kind one that holds [`page_bytes`]: plain, plain with a pager that can freeze by itself, filled and not yet filled.
pub fn regions(pages: u64) -> Vec<Region> {
    let own = Region::builder().name("own").size(pages * PAGE as u64).pager(&wp_sync()).open().unwrap();
    let (plain, here, missing) = (plain(pages), filled(memory(pages)), filled(memory(pages)));
    for region in [&plain, &own] {
        (0..pages).for_each(|page| region.write_at(page * PAGE as u64, &page_bytes(page)).unwrap());
    }
    here.populate_blocking(0..pages * PAGE as u64).unwrap();
    vec![plain, own, here, missing]
}

pub fn freeze(region: &Region) -> Frozen {
    region.freeze(Program::Paused).unwrap()
}

pub fn write(region: &Region, page: u64) {
    region.write_at(page * PAGE as u64 + 8, &[0; 100]).unwrap();
}

pub fn read(frozen: &Frozen, extent: Extent) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0xEE; extent.count() as usize * PAGE];
    block_on(frozen.read_into(extent, &mut bytes)).map(|()| bytes)
}

#[track_caller]
pub fn assert_held(frozen: &Frozen, pages: impl IntoIterator<Item = u64>) {
    for page in pages {
        assert_same(page, &read(frozen, Extent::page(page)).unwrap(), &page_bytes(page));
    }
}

#[track_caller]
pub fn assert_gone(frozen: &Frozen, extent: Extent, reason: &str) {
    let Err(error) = read(frozen, extent) else { panic!("{extent} were read") };
    assert!(matches!(error, StoreError::Gone { extent: gone, .. } if gone == extent), "{error}");
    assert!(error.to_string().contains(reason), "{error}");
}

pub fn start_of(region: &Region, page: u64) -> NonNull<c_void> {
    NonNull::new(address_of(region, page) as *mut c_void).unwrap()
}

pub fn madvise_away(region: &Region, page: u64) {
    // SAFETY: a page of the region; only atomics look at it.
    unsafe { madvise(start_of(region, page), PAGE, MmapAdvise::MADV_DONTNEED) }.unwrap();
}
