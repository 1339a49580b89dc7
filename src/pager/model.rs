//! What the pager's pure parts must do, said in the plainest way, and the events that try them.
//!
//! Role: one reference each for `core`, `residency` and `address_map`, held against it event by event. Neighbours: the property tests of these
//! three files, and the fuzz target `pager_ops` through `fuzzing`, run the same trials. Invariants: any bytes are events; a trial
//! panics on nothing, it tells what does not hold; it ends by answering everything, after which nobody may be left waiting.

use super::{
    address_map::{AddressMap, RegionId, Segment},
    residency::Residency,
};
use crate::{Extent, PageSize};
use std::collections::{BTreeMap, BTreeSet};

macro_rules! ensure {
    ($condition:expr, $($text:tt)+) => { if !$condition { return Err(format!($($text)+)); } };
}

mod core;

pub(crate) use self::core::{CoreEvent, try_core};

/// What a trial came by: names of events and of decisions.
pub(crate) type Seen = BTreeSet<&'static str>;

/// Events from bytes: four make one, the rest is dropped.
pub(crate) fn events<E>(bytes: &[u8], event: fn([u8; 4]) -> E) -> Vec<E> {
    bytes.as_chunks().0.iter().map(|chunk| event(*chunk)).collect()
}

/// An extent inside `pages` pages, at most `count_max` long, that two bytes name.
fn extent(pages: u64, count_max: u64, first: u8, count: u8) -> Extent {
    let first = u64::from(first) % pages;
    Extent::between(first, pages.min(first + u64::from(count) % (count_max + 1)))
}

/// More than two words of a bit plane.
const RESIDENCY_PAGES: u64 = 150;

/// What can be done to a [`Residency`].
#[derive(Clone, Copy, Debug)]
pub(crate) enum ResidencyOp {
    Ask(Extent),
    Unask(Extent),
    Install(Extent),
    Discard(Extent),
    Lose(Extent),
}

impl ResidencyOp {
    pub(crate) fn of([kind, a, b, _]: [u8; 4]) -> ResidencyOp {
        let extent = extent(RESIDENCY_PAGES, 40, a, b);
        match kind % 5 {
            0 => ResidencyOp::Ask(extent),
            1 => ResidencyOp::Unask(extent),
            2 => ResidencyOp::Install(extent),
            3 => ResidencyOp::Discard(extent),
            _ => ResidencyOp::Lose(extent),
        }
    }
}

/// Tries the bit planes against a record for each page, and looks at the result within an extent that two bytes name.
///
/// # Errors
/// Which question they answer differently.
pub(crate) fn try_residency(within: [u8; 2], ops: &[ResidencyOp]) -> Result<Seen, String> {
    #[derive(Clone, Copy, Default)]
    struct Record {
        resident: bool,
        asked: bool,
        discarded: bool,
        lost: bool,
    }
    let (mut ours, mut naive, mut seen) =
        (Residency::new(RESIDENCY_PAGES, false), vec![Record::default(); RESIDENCY_PAGES as usize], Seen::new());
    for op in ops {
        let (name, extent, change): (_, Extent, fn(&mut Record)) = match *op {
            ResidencyOp::Ask(extent) => {
                ours.ask(extent);
                ("residency: ask", extent, |page| page.asked = true)
            }
            ResidencyOp::Unask(extent) => {
                ours.unask(extent);
                ("residency: unask", extent, |page| page.asked = false)
            }
            ResidencyOp::Install(extent) => {
                ours.install(extent);
                ("residency: install", extent, |page| (page.resident, page.asked) = (true, false))
            }
            ResidencyOp::Discard(extent) => {
                ours.discard(extent);
                ("residency: discard", extent, |page| *page = Record { discarded: true, ..Record::default() })
            }
            ResidencyOp::Lose(extent) => {
                ours.lose(extent);
                ("residency: lose", extent, |page| (page.asked, page.lost) = (false, true))
            }
        };
        seen.insert(name);
        extent.pages().for_each(|page| change(&mut naive[page as usize]));
    }
    let within = extent(RESIDENCY_PAGES, RESIDENCY_PAGES, within[0], within[1]);
    let missing = |page: &Record| !page.resident && !page.discarded && !page.lost;
    type Holds<'a> = &'a dyn Fn(&Record) -> bool;
    let questions: [(_, Vec<Extent>, Holds<'_>); 6] = [
        ("missing", ours.missing(within).collect(), &missing),
        ("unasked", ours.unasked(within).collect(), &|page| missing(page) && !page.asked),
        ("asked", ours.asked(within).collect(), &|page| missing(page) && page.asked),
        ("discarded", ours.discarded(within).collect(), &|page| page.discarded && !page.resident),
        ("resident", ours.resident(within).collect(), &|page| page.resident),
        ("lost", ours.lost(within).collect(), &|page| page.lost),
    ];
    for (name, runs, holds) in questions {
        let pages: Vec<u64> = runs.into_iter().flat_map(Extent::pages).collect();
        let expected: Vec<u64> = within.pages().filter(|page| holds(&naive[*page as usize])).collect();
        ensure!(pages == expected, "{name} in {within} are {pages:?}, expected {expected:?} after {ops:?}");
    }
    let count = |holds: &dyn Fn(&Record) -> bool| naive.iter().filter(|page| holds(page)).count() as u64;
    let counts = [ours.resident_pages(), ours.discarded_pages(), ours.lost_pages()];
    let expected = [count(&|page| page.resident), count(&|page| page.discarded && !page.resident), count(&|page| page.lost)];
    ensure!(counts == expected, "resident, discarded and lost are {counts:?}, expected {expected:?} after {ops:?}");
    Ok(seen)
}

/// What a program can do to the addresses of its regions, in pages from a base.
#[derive(Clone, Copy, Debug)]
pub(crate) enum AddressOp {
    Unmap { first: u64, count: u64 },
    Move { first: u64, count: u64, to: u64 },
}

impl AddressOp {
    pub(crate) fn of([kind, a, b, c]: [u8; 4]) -> AddressOp {
        let (first, count, to) = (u64::from(a) % 64, u64::from(b) % 20, u64::from(c) % 64);
        // The kernel never moves a range onto itself.
        if kind % 3 == 0 || to.abs_diff(first) < count {
            AddressOp::Unmap { first, count }
        } else {
            AddressOp::Move { first, count, to }
        }
    }
}

/// Tries the map of two regions of 20 pages against a map from each single page.
///
/// # Errors
/// Which page it finds elsewhere.
pub(crate) fn try_address_map(ops: &[AddressOp]) -> Result<Seen, String> {
    const BASE: u64 = 0x10_0000;
    let page = PageSize::KIB_4;
    let address = |at: u64| BASE + page.offset_of(at);
    let (mut ours, mut naive, mut seen) = (AddressMap::new(page), BTreeMap::new(), Seen::new());
    for (region, start) in [(RegionId(1), 0), (RegionId(2), 40)] {
        ours.insert(address(start), Segment { region, extent: Extent::between(5, 25) });
        naive.extend((0..20).map(|number| (start + number, (region, 5 + number))));
    }
    for op in ops {
        let (first, count, to) = match *op {
            AddressOp::Unmap { first, count } => (first, count, None),
            AddressOp::Move { first, count, to } => (first, count, Some(to)),
        };
        seen.insert(if to.is_some() { "addresses: move" } else { "addresses: unmap" });
        match to {
            Some(to) => ours.relocate(address(first), address(to), page.offset_of(count)),
            None => drop(ours.remove(address(first), page.offset_of(count))),
        }
        let taken: Vec<_> = (0..count).filter_map(|number| Some((number, naive.remove(&(first + number))?))).collect();
        naive.extend(taken.into_iter().filter_map(|(number, what)| Some((to? + number, what))));
    }
    for at in 0..100 {
        let (found, expected) = (ours.find(address(at) + 17), naive.get(&at).copied());
        ensure!(found == expected, "page {at} from the base is {found:?}, expected {expected:?} after {ops:?}");
        let Some((region, number)) = found else { continue };
        let places = ours.locate(region, Extent::page(number));
        ensure!(
            places.iter().any(|(place, _)| *place == address(at)),
            "{region:?} page {number} is at {places:?}, not at page {at}"
        );
    }
    Ok(seen)
}
