//! What can happen to a [`Core`], and what it must make of it.
//!
//! Role: plays the pager around a core: the store that answers, the kernel that installs or puts off, the threads that wait. Neighbours: `super`.
//! Invariants: those of `super`.

use super::{Seen, extent};
use crate::{
    Extent,
    pager::{
        around::Around,
        core::{Core, Decision, Origin},
    },
};
use std::collections::BTreeSet;

/// Pages of the region that a [`CoreTrial`] is about.
const CORE_PAGES: u64 = 24;

/// What can happen to a [`Core`]. An index counts what there is of its kind, modulo how many there are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum CoreEvent {
    /// With `put_off`, the kernel puts off the zeros that it may get.
    Fault {
        page: u64,
        put_off: bool,
    },
    /// A request is answered with its pages; with `put_off`, the kernel puts their install off.
    Reply {
        request: usize,
        put_off: bool,
    },
    /// An install that was put off is tried again, and done.
    Settle {
        install: usize,
    },
    /// A request for neighbours fails and is not repeated.
    Forget {
        request: usize,
    },
    /// A request fails for good: its pages are given up.
    GiveUp {
        request: usize,
    },
    /// A bulk read brings pages; with `put_off`, the kernel puts their install off.
    Pulled {
        extent: Extent,
        put_off: bool,
    },
    Discard(Extent),
    Lose(Extent),
    Populate(Extent),
}

impl CoreEvent {
    /// The kinds are as frequent as makes them meet.
    pub(crate) fn of([kind, a, b, flag]: [u8; 4]) -> CoreEvent {
        let (index, put_off, extent) = (usize::from(a), flag & 1 == 1, extent(CORE_PAGES, 5, a, b));
        match kind % 20 {
            0..6 => CoreEvent::Fault { page: u64::from(a) % CORE_PAGES, put_off },
            6..12 => CoreEvent::Reply { request: index, put_off },
            12 => CoreEvent::Settle { install: index },
            13 => CoreEvent::Forget { request: index },
            14 => CoreEvent::GiveUp { request: index },
            15 => CoreEvent::Pulled { extent, put_off },
            16 | 17 => CoreEvent::Discard(extent),
            18 => CoreEvent::Lose(extent),
            _ => CoreEvent::Populate(extent),
        }
    }
}

/// Tries a core whose windows are of `base_pages` at first and which asks for at most `bound_pages` at once.
///
/// # Errors
/// What does not hold: a page is asked for twice, or older bytes are put over a page, or the bound is passed, or somebody waits for ever.
pub(crate) fn try_core(base_pages: u64, bound_pages: u64, events: &[CoreEvent]) -> Result<Seen, String> {
    let core = Core::new(CORE_PAGES, false, Around::new(base_pages, base_pages * 4, base_pages * 8), bound_pages);
    let mut trial = CoreTrial {
        core,
        bound_pages,
        pages: vec![Page::default(); CORE_PAGES as usize],
        in_flight: Vec::new(),
        put_off: Vec::new(),
        held: BTreeSet::new(),
        queued: BTreeSet::new(),
        blocked: BTreeSet::new(),
        seen: Seen::new(),
    };
    for (number, event) in events.iter().enumerate() {
        trial.happen(*event).and_then(|()| trial.check()).map_err(|what| format!("event {number}, {event:?}: {what}"))?;
    }
    trial.answer_all().map_err(|what| format!("in the end: {what}"))?;
    Ok(trial.seen)
}

/// What is known of one page.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Page {
    present: bool,
    discarded: bool,
    lost: bool,
}

impl Page {
    fn missing(self) -> bool {
        self == Page::default()
    }
}

struct CoreTrial {
    core: Core,
    bound_pages: u64,
    pages: Vec<Page>,
    in_flight: Vec<(Extent, Origin)>,
    /// Installs that the kernel put off, with whether they are zeros.
    put_off: Vec<(Extent, bool)>,
    /// Pages of those that count as asked for; the end of a request for them ends that.
    held: BTreeSet<u64>,
    /// Pages that wait for room under the bound.
    queued: BTreeSet<u64>,
    /// Pages that threads wait for.
    blocked: BTreeSet<u64>,
    seen: Seen,
}

impl CoreTrial {
    fn happen(&mut self, event: CoreEvent) -> Result<(), String> {
        match event {
            CoreEvent::Fault { page, put_off } => self.fault(page, put_off),
            CoreEvent::Reply { request, put_off } => self.reply(request, put_off),
            CoreEvent::Settle { install } => self.settle(install),
            CoreEvent::Forget { request } => {
                let neighbours = |(_, (_, origin)): &(usize, &(Extent, Origin))| *origin == Origin::Around;
                let at = self.in_flight.iter().enumerate().filter(neighbours).map(|(at, _)| at).nth(request % 8);
                let Some((extent, _)) = at.map(|at| self.in_flight.remove(at)) else { return Ok(()) };
                self.seen.insert("forget");
                self.answered(extent)?;
                self.touch_again(extent)
            }
            CoreEvent::GiveUp { request } => {
                let Some((extent, _)) = take(&mut self.in_flight, request) else { return Ok(()) };
                self.seen.insert("give up");
                self.lose(extent)?;
                self.answered(extent)
            }
            CoreEvent::Pulled { extent, put_off } => {
                let wanted = self.wanted(extent, Origin::Pull)?;
                self.seen.insert("pulled");
                self.install(wanted, false, put_off)
            }
            CoreEvent::Discard(extent) => {
                self.seen.insert("discard");
                self.core.discarded(extent);
                self.each(extent, |page| *page = Page { discarded: true, ..Page::default() });
                self.touch_again(extent)
            }
            CoreEvent::Lose(extent) => self.lose(extent),
            CoreEvent::Populate(within) => {
                let claimed = self.core.want(within);
                self.seen.insert("populate");
                claimed.into_iter().try_for_each(|extent| self.ask(extent, Origin::Demand))
            }
        }
    }

    fn fault(&mut self, page: u64, put_off: bool) -> Result<(), String> {
        let known = self.pages[page as usize];
        let (asked, full) = (self.is_asked(page), self.in_flight_pages() >= self.bound_pages);
        self.blocked.insert(page);
        match self.core.fault(page) {
            Decision::Wake => {
                self.seen.insert("wake");
                ensure!(known.lost || known.present && !known.discarded, "woken, though the page is {known:?}");
                self.blocked.remove(&page);
            }
            Decision::Zero => {
                self.seen.insert("zero");
                ensure!(known.discarded, "zeros, though the page is {known:?}");
                // The kernel says that nothing is there: the zeros of before were zapped by the discard.
                self.pages[page as usize].present = false;
                self.install(vec![Extent::page(page)], true, put_off)?;
            }
            Decision::Joined => {
                self.seen.insert(if asked { "joined" } else { "queued" });
                ensure!(known.missing() && (asked || full), "joined, though the page is {known:?} and not asked for");
                if !asked {
                    self.queued.insert(page);
                }
                for extent in self.core.ahead(page) {
                    self.ask(extent, Origin::Around)?;
                }
            }
            Decision::Ask { around } => {
                self.seen.insert("ask");
                ensure!(!full, "asked for above the bound");
                self.ask(Extent::page(page), Origin::Demand)?;
                for extent in around {
                    self.seen.insert("around");
                    self.ask(extent, Origin::Around)?;
                }
            }
        }
        Ok(())
    }

    /// A request is made for pages that must be missing and not asked for.
    fn ask(&mut self, extent: Extent, origin: Origin) -> Result<(), String> {
        for page in extent.pages() {
            let known = self.pages[page as usize];
            ensure!(known.missing() && !self.is_asked(page), "page {page} is asked for, though {known:?} or on its way");
        }
        self.in_flight.push((extent, origin));
        Ok(())
    }

    fn reply(&mut self, request: usize, put_off: bool) -> Result<(), String> {
        let Some((extent, origin)) = take(&mut self.in_flight, request) else { return Ok(()) };
        self.seen.insert("reply");
        let wanted = self.wanted(extent, origin)?;
        self.answered(extent)?;
        self.install(wanted, false, put_off)
    }

    fn settle(&mut self, install: usize) -> Result<(), String> {
        let Some((extent, zeros)) = take(&mut self.put_off, install) else { return Ok(()) };
        self.seen.insert("settle");
        let wanted = if zeros { self.core.zeros_wanted(extent) } else { self.core.arrived(extent, Origin::Demand) };
        self.install(wanted, zeros, false)
    }

    /// What the core wants of an answer: the pages that are missing, and no others.
    fn wanted(&self, extent: Extent, origin: Origin) -> Result<Vec<Extent>, String> {
        let wanted = self.core.arrived(extent, origin);
        let pages: Vec<u64> = wanted.iter().flat_map(|extent| extent.pages()).collect();
        let missing: Vec<u64> = extent.pages().filter(|page| self.pages[*page as usize].missing()).collect();
        ensure!(pages == missing, "of {extent}, {pages:?} are wanted and {missing:?} are missing");
        Ok(wanted)
    }

    fn install(&mut self, wanted: Vec<Extent>, zeros: bool, put_off: bool) -> Result<(), String> {
        for extent in wanted {
            if put_off {
                self.seen.insert("put off");
                self.core.postponed(extent);
                self.put_off.push((extent, zeros));
                self.held.extend(extent.pages().filter(|_| !zeros));
                continue;
            }
            for page in extent.pages() {
                let known = self.pages[page as usize];
                ensure!(zeros || !known.discarded, "page {page} was discarded and gets older bytes");
                ensure!(!known.present && !known.lost, "page {page} is installed, though {known:?}");
                self.blocked.remove(&page);
            }
            self.each(extent, |page| page.present = true);
            self.core.installed(extent);
        }
        Ok(())
    }

    fn answered(&mut self, extent: Extent) -> Result<(), String> {
        self.held.retain(|page| !extent.contains(*page));
        for page in self.core.answered(extent) {
            let (extent, known) = (Extent::page(page), self.pages[page as usize]);
            ensure!(self.queued.remove(&page), "page {page} was not waiting for its turn");
            // A bulk read may have brought it and the kernel put it off: asking for it all the same costs a request and nothing else.
            let in_flight = self.in_flight.iter().any(|(extent, _)| extent.contains(page));
            ensure!(known.missing() && !in_flight, "page {page} is asked for in its turn, though {known:?} or on its way");
            self.in_flight.push((extent, Origin::Demand));
        }
        Ok(())
    }

    fn lose(&mut self, extent: Extent) -> Result<(), String> {
        self.seen.insert("lose");
        let lost: Vec<u64> = self.core.lose(extent).into_iter().flat_map(Extent::pages).collect();
        let missing: Vec<u64> = extent.pages().filter(|page| self.pages[*page as usize].missing()).collect();
        ensure!(lost == missing, "of {extent}, {lost:?} are given up and {missing:?} are missing");
        for page in lost {
            self.pages[page as usize].lost = true;
            self.blocked.remove(&page);
        }
        Ok(())
    }

    /// Threads that wait for these pages are woken and touch them again.
    fn touch_again(&mut self, extent: Extent) -> Result<(), String> {
        extent.pages().filter(|page| self.blocked.contains(page)).collect::<Vec<_>>().into_iter().try_for_each(|page| {
            self.seen.insert("touched again");
            self.fault(page, false)
        })
    }

    fn is_asked(&self, page: u64) -> bool {
        self.in_flight.iter().any(|(extent, _)| extent.contains(page)) || self.queued.contains(&page) || self.held.contains(&page)
    }

    fn in_flight_pages(&self) -> u64 {
        self.in_flight.iter().map(|(extent, _)| extent.count()).sum()
    }

    fn each(&mut self, extent: Extent, change: impl Fn(&mut Page)) {
        extent.pages().for_each(|page| change(&mut self.pages[page as usize]));
    }

    fn check(&mut self) -> Result<(), String> {
        let (pages, bound) = (self.in_flight_pages(), self.bound_pages);
        ensure!(pages <= bound, "{pages} pages are in flight, the bound is {bound}");
        // What came otherwise waits no longer.
        self.queued.retain(|page| self.pages[*page as usize].missing());
        self.held.retain(|page| self.pages[*page as usize].missing());
        let whole = self.core.residency().extent();
        let missing: Vec<u64> = self.core.residency().missing(whole).flat_map(Extent::pages).collect();
        let expected: Vec<u64> = whole.pages().filter(|page| self.pages[*page as usize].missing()).collect();
        ensure!(missing == expected, "{missing:?} count as missing, {expected:?} are");
        Ok(())
    }

    fn answer_all(&mut self) -> Result<(), String> {
        while !self.in_flight.is_empty() || !self.put_off.is_empty() {
            self.reply(0, false)?;
            self.settle(0)?;
            self.check()?;
        }
        ensure!(self.blocked.is_empty(), "threads wait for {:?} for ever", self.blocked);
        Ok(())
    }
}

fn take<T>(from: &mut Vec<T>, index: usize) -> Option<T> {
    (!from.is_empty()).then(|| from.remove(index % from.len()))
}
