//! What a region is when it opens: where it is, how large, and what the kernel was told about it.

mod common;

use common::*;
use pageferry::{FaultAround, MemoryStore, PageSize, Region, RegionError};

/// The flags of the mapping at `address`, as /proc/self/smaps shows them (proc_pid_smaps(5)).
fn flags(address: usize) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut inside = false;
    for line in smaps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let number = |text: &str| usize::from_str_radix(text, 16).ok();
        if let Some((Some(start), Some(end))) = range.map(|(start, end)| (number(start), number(end))) {
            inside = (start..end).contains(&address);
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| inside) {
            return flags.split_whitespace().map(str::to_owned).collect();
        }
    }
    panic!("nothing is mapped at {address:#x}")
}

#[test]
fn the_kernel_keeps_a_region_out_of_forks_core_dumps_and_huge_pages() {
    let huge_pages = std::fs::exists("/sys/kernel/mm/transparent_hugepage").unwrap();
    for in_core_dumps in [false, true] {
        let mut regions = vec![Region::builder().size(1 << 20).in_core_dumps(in_core_dumps).open().unwrap()];
        if uffd() {
            let paged = Region::builder().store(memory(8)).pager(&pager()).in_core_dumps(in_core_dumps);
            regions.push(paged.open().unwrap());
            assert!(flags(address_of(&regions[1], 7)).contains(&"um".to_owned()), "not registered");
        }
        for region in regions {
            let flags = flags(region.as_ptr() as usize);
            let has = |flag: &str| flags.iter().any(|found| found == flag);
            assert!(has("dc") && has("nr") && has("nh") == huge_pages, "{flags:?}");
            assert_eq!(has("dd"), !in_core_dumps, "{flags:?}");
        }
    }
}

#[test]
fn a_region_opens_at_the_address_that_was_asked_for_or_not_at_all() {
    let free = {
        let region = Region::builder().size(16 * PAGE as u64).open().unwrap();
        region.as_ptr() as usize - (1 << 40)
    };
    let at = |address| Region::builder().size(16 * PAGE as u64).at(address).open();
    let first = at(free).unwrap();
    assert_eq!((first.as_ptr() as usize, first.fixed_address()), (free, Some(free)));
    first.write_at(0, b"mine").unwrap();
    for taken in [free, free + 15 * PAGE, free - 15 * PAGE] {
        let error = at(taken).unwrap_err();
        assert!(matches!(error, RegionError::AddressTaken { address, .. } if address == taken), "{error}");
    }
    let mut bytes = [0; 4];
    first.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"mine");
    drop(first);
    assert_eq!(at(free).unwrap().as_ptr() as usize, free);
    for impossible in [0, 1, free + 1, 1 << 63, usize::MAX - PAGE + 1] {
        assert!(matches!(at(impossible), Err(RegionError::InvalidAddress { address, .. }) if address == impossible));
    }
    assert_eq!(Region::builder().size(1).open().unwrap().fixed_address(), None);
}

#[test]
fn a_paged_region_opens_at_an_address_and_faults_there() {
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let free = Region::builder().size(1).open().unwrap().as_ptr() as usize - (1 << 41);
    let pager = pager();
    let open = || Region::builder().store(memory(8)).pager(&pager).fault_around(FaultAround::OFF).at(free).open();
    for _ in 0..3 {
        let region = open().unwrap();
        assert!(matches!(open(), Err(RegionError::AddressTaken { .. })));
        assert_same(6, &peek_or_read(&region, free + 6 * PAGE), &page_bytes(6));
    }
}

fn peek_or_read(region: &Region, address: usize) -> Vec<u8> {
    peek(address).unwrap_or_else(|_| read_page(region, (address - region.as_ptr() as usize) as u64 / PAGE as u64))
}

#[test]
fn sizes_are_checked_before_anything_is_mapped() {
    for size_bytes in [0, u64::MAX, u64::MAX - PAGE as u64, 1 << 63] {
        let error = Region::builder().size(size_bytes).open().unwrap_err();
        assert!(matches!(error, RegionError::InvalidSize { size_bytes: found } if found == size_bytes), "{size_bytes}: {error}");
    }
    assert!(matches!(Region::builder().open(), Err(RegionError::InvalidSize { size_bytes: 0 })));
    // As large as a number, but not as the address space.
    let error = Region::builder().size(1 << 62).open().unwrap_err();
    assert!(matches!(error, RegionError::System { call: "mmap", .. }), "{error}");
    let one = Region::builder().size(1).open().unwrap();
    assert_eq!((one.size_bytes(), one.len(), one.extent().count()), (1, PAGE, 1));
}

#[test]
fn a_store_must_fit_its_region() {
    let store = || MemoryStore::from_bytes(vec![7; 5000], KIB_4);
    let error = Region::builder().store(store()).size(2 * PAGE as u64 + 1).open().unwrap_err();
    assert!(matches!(error, RegionError::StoreTooSmall { store_bytes: 5000, size_bytes: 8193 }), "{error}");
    let error = Region::builder().store(MemoryStore::zeroed(1 << 21, PageSize::new(1 << 21).unwrap())).open().unwrap_err();
    assert!(matches!(error, RegionError::PageSizeDiffers { store_bytes: 0x20_0000, region_bytes: 4096 }), "{error}");
    assert!(matches!(Region::builder().store(MemoryStore::zeroed(0, KIB_4)).open(), Err(RegionError::InvalidSize { .. })));
    if !uffd() {
        return;
    }
    let _watchdog = watchdog();
    let pager = pager();
    // The last page is partial: zeros behind the store's end.
    let region = Region::builder().store(store()).pager(&pager).open().unwrap();
    assert_eq!((region.size_bytes(), region.len()), (5000, 2 * PAGE));
    assert_same(1, &read_page(&region, 1), &[vec![7; 5000 - PAGE], vec![0; 2 * PAGE - 5000]].concat());
    // A region may be smaller than its store.
    let region = Region::builder().store(memory(8)).pager(&pager).size(3 * PAGE as u64).open().unwrap();
    assert_eq!(region.len(), 3 * PAGE);
    (0..3).for_each(|page| assert_page(&region, page));
    assert!(matches!(region.read_at(3 * PAGE as u64, &mut [0]), Err(RegionError::OutOfRange { .. })));
}
