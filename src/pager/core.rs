//! The decisions about one region: what to do about a fault, a reply, a discard.
//!
//! Role: hop *decide*. Neighbours: `engine` feeds it messages and replies and carries out what it answers; it knows pages and no bytes,
//! no addresses and no clock, so that every order of events can be enumerated. Invariants, each checked by `model`:
//! a page on its way is not asked for twice; only pages still wanted are installed (S4); a discarded page never gets store
//! bytes again; the number of pages asked for because of faults stays within the bound, the faults beyond it wait in order.

use super::{
    around::{Around, PIECE_PAGES},
    budget::{Budget, Chosen},
    residency::{PageState, Residency},
};
use crate::Extent;
use std::collections::VecDeque;

/// Why pages are brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A thread waits for them.
    Demand,
    /// A neighbour faulted.
    Around,
    /// The background pull streams them, asked or not.
    Pull,
}

/// What to do about a fault.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// It is here already: wake the thread.
    Wake,
    /// It was discarded: it holds zeros.
    Zero,
    /// It is on its way, or waits for its turn to be asked for.
    Joined,
    /// Ask for the page first, then for its neighbours.
    Ask { around: Vec<Extent> },
}

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct Core {
    residency: Residency,
    around: Around,
    /// Pages asked for and not yet answered.
    in_flight_pages: u64,
    max_in_flight_pages: u64,
    /// Faults that wait because the bound is reached. They count as asked.
    waiting: VecDeque<u64>,
    /// How much may be here, if there is a bound.
    budget: Option<Budget>,
}

impl Core {
    pub(crate) fn new(pages: u64, resident: bool, around: Around, max_in_flight_pages: u64) -> Core {
        let residency = Residency::new(pages, resident);
        let (max_in_flight_pages, waiting) = (max_in_flight_pages.max(1), VecDeque::new());
        Core { residency, around, in_flight_pages: 0, max_in_flight_pages, waiting, budget: None }
    }

    /// To begin with: nothing is here yet.
    pub(crate) fn set_budget(&mut self, budget: Budget) {
        self.budget = Some(budget);
    }

    pub(crate) fn budget(&self) -> Option<&Budget> {
        self.budget.as_ref()
    }

    /// Whether what is wanted comes although there is no room for it; [`Core::admit`] follows.
    pub(crate) fn lift_budget(&mut self, lifted: bool) {
        self.budget.iter_mut().for_each(|budget| budget.lift(lifted));
    }

    /// How many pages more may be asked for.
    fn room(&self) -> u64 {
        let in_flight = self.max_in_flight_pages.saturating_sub(self.in_flight_pages);
        self.budget.as_ref().map_or(in_flight, |budget| in_flight.min(budget.room(self.in_flight_pages)))
    }

    /// How many pages a pull may bring.
    pub(crate) fn room_for_pull(&self) -> u64 {
        let Some(budget) = &self.budget else { return u64::MAX };
        if budget.any_went() { 0 } else { budget.low_pages().saturating_sub(budget.held_pages() + self.in_flight_pages) }
    }

    /// Whether so much is here, or on its way, that pages shall go.
    pub(crate) fn wants_eviction(&self) -> bool {
        self.budget.as_ref().is_some_and(|budget| budget.held_pages() + self.in_flight_pages > budget.high_pages())
    }

    /// How many pages shall go.
    pub(crate) fn excess_pages(&self) -> u64 {
        self.budget.as_ref().map_or(0, |budget| (budget.held_pages() + self.in_flight_pages).saturating_sub(budget.low_pages()))
    }

    /// Chooses pages to go, see [`Budget::choose`].
    pub(crate) fn choose(&mut self, clean: impl Fn(u64) -> bool, (most_pages, look_pages): (u64, u64)) -> Chosen {
        let chosen = self.budget.as_mut().map(|budget| budget.choose(&self.residency, clean, (most_pages, look_pages)));
        chosen.unwrap_or_default()
    }

    /// What was chosen of `extent` is dropped, unless the program discarded it meanwhile. How many pages; [`Core::admit`] follows.
    pub(crate) fn evicted(&mut self, extent: Extent) -> u64 {
        let Core { residency, budget: Some(budget), .. } = self else { return 0 };
        let gone: Vec<Extent> = budget.leaving(extent).collect();
        for page in &gone {
            residency.evict(*page);
            budget.evicted(*page, 1);
        }
        gone.len() as u64
    }

    /// What was chosen of `extent` is here still.
    pub(crate) fn stays(&mut self, extent: Extent) {
        self.budget.iter_mut().for_each(|budget| budget.stays(extent));
    }

    /// A thread was seen to touch a page that is here, or that comes.
    pub(crate) fn touched(&mut self, page: u64) {
        self.budget.iter_mut().for_each(|budget| budget.touched(Extent::page(page)));
    }

    /// Everything is here but what `lacking` names.
    pub(crate) fn lacking(pages: u64, lacking: &[Extent], around: Around, max_in_flight_pages: u64) -> Core {
        let mut core = Core::new(pages, true, around, max_in_flight_pages);
        lacking.iter().for_each(|extent| core.residency.lack(*extent));
        core
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.residency.heap_bytes() + self.budget.as_ref().map_or(0, Budget::heap_bytes)
    }

    pub(crate) fn residency(&self) -> &Residency {
        &self.residency
    }

    /// A thread touched `page` and waits.
    pub(crate) fn fault(&mut self, page: u64) -> Decision {
        match self.residency.state(page) {
            // Another fault on the page, or the pull, was faster. A poisoned page sends no message: this one is older than the poison.
            PageState::Resident | PageState::Lost => Decision::Wake,
            PageState::Discarded => Decision::Zero,
            // The kernel says it is missing: the discard's zap came after the zeros were put there.
            PageState::ResidentOnceDiscarded => {
                self.discarded(Extent::page(page));
                Decision::Zero
            }
            PageState::Asked => Decision::Joined,
            PageState::Missing => {
                self.residency.ask(Extent::page(page));
                if self.room() == 0 {
                    self.waiting.push_back(page);
                    return Decision::Joined;
                }
                self.requested(Extent::page(page), true);
                self.in_flight_pages += 1;
                let room_pages = self.room_ahead_pages();
                let window = self.around.window(page, room_pages);
                Decision::Ask { around: self.claim_near(page, window, room_pages) }
            }
        }
    }

    /// A thread waits for `page`, which is on its way: what to ask for ahead of it, as neighbours.
    pub(crate) fn ahead(&mut self, page: u64) -> Vec<Extent> {
        let room_pages = self.room_ahead_pages();
        let window = self.around.ahead(page, room_pages);
        self.claim_near(page, window, room_pages)
    }

    /// How many pages may be asked for that nobody waits for. An eighth of the bound is left to faults, which would queue behind whole windows otherwise.
    fn room_ahead_pages(&self) -> u64 {
        let in_flight = (self.max_in_flight_pages - self.max_in_flight_pages / 8).saturating_sub(self.in_flight_pages);
        in_flight.min(self.room())
    }

    /// Claims a window in pieces, the nearest to `page` first: they are on their way at once, where a long request would come in its parts, one round trip each.
    fn claim_near(&mut self, page: u64, window: Extent, limit_pages: u64) -> Vec<Extent> {
        let claimed = self.claim(window, limit_pages);
        let mut pieces: Vec<Extent> = claimed.iter().flat_map(|extent| extent.chunks(PIECE_PAGES)).collect();
        if window.end() <= page + 1 {
            pieces.reverse();
        }
        pieces
    }

    /// Marks up to `limit_pages` missing pages of `within` as asked for; the caller asks for what this returns, and says
    /// [`Core::answered`] for each.
    fn claim(&mut self, within: Extent, limit_pages: u64) -> Vec<Extent> {
        let mut left = limit_pages;
        let mut claimed = Vec::new();
        for extent in self.residency.unasked(within) {
            let extent = Extent::between(extent.first(), extent.end().min(extent.first().saturating_add(left)));
            if extent.is_empty() {
                break;
            }
            left -= extent.count();
            claimed.push(extent);
        }
        for extent in &claimed {
            self.residency.ask(*extent);
            self.requested(*extent, true);
            self.in_flight_pages += extent.count();
        }
        claimed
    }

    fn requested(&mut self, extent: Extent, under_way: bool) {
        self.budget.iter_mut().for_each(|budget| budget.request(extent, under_way));
    }

    /// Pages of `within` that somebody wants resident soon (populate): claimed up to the bound.
    pub(crate) fn want(&mut self, within: Extent) -> Vec<Extent> {
        self.claim(within, self.room())
    }

    /// A request for `extent` is over, whatever came of it, and before what came is installed. Pages of it still marked as asked are missing
    /// again. Returns the faults that may be asked for now.
    pub(crate) fn answered(&mut self, extent: Extent) -> Vec<u64> {
        self.residency.unask(extent);
        self.requested(extent, false);
        self.in_flight_pages = self.in_flight_pages.saturating_sub(extent.count());
        self.admit()
    }

    /// The faults that may be asked for now.
    pub(crate) fn admit(&mut self) -> Vec<u64> {
        let mut now = Vec::new();
        while self.room() > 0 {
            let Some(page) = self.waiting.pop_front() else { break };
            // It may have come with a pull, or have been discarded, while it waited.
            if self.residency.state(page) == PageState::Asked {
                self.in_flight_pages += 1;
                self.requested(Extent::page(page), true);
                now.push(page);
            }
        }
        now
    }

    /// Which of the pages that arrived shall be installed. A demanded or neighbouring page must still be asked for: if it is not, it was
    /// installed from elsewhere or the program discarded it meanwhile. A pulled page must be missing.
    pub(crate) fn arrived(&self, extent: Extent, origin: Origin) -> Vec<Extent> {
        match origin {
            Origin::Demand | Origin::Around => self.residency.asked(extent).collect(),
            Origin::Pull => self.residency.missing(extent).collect(),
        }
    }

    /// Which of the pages whose zeros the kernel put off shall get them now: those that were discarded, and those still wanted.
    pub(crate) fn zeros_wanted(&self, extent: Extent) -> Vec<Extent> {
        self.residency.discarded(extent).chain(self.residency.asked(extent)).collect()
    }

    /// The kernel put off installing pages. What the store's bytes are for counts as asked for until it takes them, though no request brings
    /// them; a discarded page that waits for its zeros does not, or a reply older than the discard would be let in.
    pub(crate) fn postponed(&mut self, extent: Extent) {
        let missing: Vec<Extent> = self.residency.missing(extent).collect();
        missing.into_iter().for_each(|extent| self.residency.ask(extent));
    }

    /// The kernel has the pages.
    pub(crate) fn installed(&mut self, extent: Extent) {
        if let Some(budget) = &mut self.budget {
            budget.came(extent.count() - self.residency.resident_in(extent));
        }
        self.residency.install(extent);
    }

    /// The program gave the pages back to the kernel, or unmapped them.
    pub(crate) fn discarded(&mut self, extent: Extent) {
        if let Some(budget) = &mut self.budget {
            budget.went(extent, self.residency.resident_in(extent));
        }
        self.residency.discard(extent);
    }

    /// Gives up what is missing of `extent`; the caller poisons what this returns.
    pub(crate) fn lose(&mut self, extent: Extent) -> Vec<Extent> {
        let lost: Vec<Extent> = self.residency.missing(extent).collect();
        for extent in &lost {
            self.residency.lose(*extent);
        }
        lost
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::model::{CoreEvent, try_core},
        *,
    };
    use proptest::{collection::vec, prelude::*};

    fn core(pages: u64, base: u64, bound: u64) -> Core {
        Core::new(pages, false, Around::new(base, base, 0), bound)
    }

    #[test]
    fn the_faulting_page_is_asked_for_first_and_its_neighbours_behind_it() {
        let mut core = core(64, 8, 64);
        assert_eq!(core.fault(10), Decision::Ask { around: vec![Extent::between(8, 10), Extent::between(11, 16)] });
        assert_eq!(core.fault(12), Decision::Joined);
        assert_eq!(core.fault(10), Decision::Joined);
    }

    #[test]
    fn a_discard_makes_the_reply_in_flight_stale() {
        let mut core = core(8, 1, 8);
        assert_eq!(core.fault(3), Decision::Ask { around: vec![] });
        core.discarded(Extent::page(3));
        assert_eq!(core.arrived(Extent::page(3), Origin::Demand), []);
        assert_eq!(core.arrived(Extent::page(3), Origin::Pull), []);
        assert_eq!(core.fault(3), Decision::Zero);
        core.installed(Extent::page(3));
        // The kernel zapped the zero page after the message had been read: still zeros, never the store's bytes.
        assert_eq!(core.fault(3), Decision::Zero);
    }

    #[test]
    fn faults_beyond_the_bound_wait_in_order_and_are_asked_for_as_answers_come() {
        let mut core = core(8, 1, 2);
        assert_eq!(core.fault(0), Decision::Ask { around: vec![] });
        assert_eq!(core.fault(1), Decision::Ask { around: vec![] });
        assert_eq!(core.fault(2), Decision::Joined);
        assert_eq!(core.fault(3), Decision::Joined);
        // Page 2 comes with the pull while it waits.
        core.installed(Extent::page(2));
        core.installed(Extent::page(0));
        assert_eq!(core.answered(Extent::page(0)), [3]);
        core.installed(Extent::page(1));
        assert!(core.answered(Extent::page(1)).is_empty());
    }

    #[test]
    fn faults_beyond_the_budget_wait_until_pages_went_or_it_is_lifted() {
        let mut core = core(64, 1, 64);
        core.set_budget(Budget::new(64, 2));
        for page in [0, 1] {
            assert_eq!(core.fault(page), Decision::Ask { around: vec![] });
            assert!(core.answered(Extent::page(page)).is_empty());
            core.installed(Extent::page(page));
        }
        assert_eq!([2, 3, 4].map(|page| core.fault(page)), [const { Decision::Joined }; 3]);
        assert!(core.wants_eviction() || core.excess_pages() == 0);
        assert_eq!(core.choose(|page| page == 1, (1, 64)).extents, [Extent::page(1)]);
        assert!(core.admit().is_empty());
        assert_eq!((core.evicted(Extent::page(1)), core.admit()), (1, vec![2]));
        // It is missing again: not zeros, and the next touch waits its turn.
        assert_eq!(core.fault(1), Decision::Joined);
        core.lift_budget(true);
        assert_eq!(core.admit(), [3, 4, 1]);
    }

    #[test]
    fn a_page_does_not_go_while_a_reply_with_older_bytes_is_under_way() {
        let mut core = core(8, 1, 8);
        core.set_budget(Budget::new(8, 4));
        assert_eq!(core.fault(3), Decision::Ask { around: vec![] });
        // It comes with the pull, and could be written and pushed before the reply is here.
        core.installed(Extent::page(3));
        assert_eq!(core.choose(|_| true, (1, 8)).extents, []);
        let _ = core.answered(Extent::page(3));
        assert!(core.room_for_pull() > 0);
        assert_eq!(core.choose(|_| true, (1, 8)).extents, [Extent::page(3)]);
        assert_eq!((core.evicted(Extent::page(3)), core.room_for_pull()), (1, 0));
    }

    #[test]
    fn a_discard_wins_over_an_eviction() {
        let mut core = core(8, 1, 8);
        core.set_budget(Budget::new(8, 4));
        core.installed(Extent::between(0, 4));
        assert_eq!(core.choose(|_| true, (2, 8)).extents, [Extent::between(0, 2)]);
        core.discarded(Extent::page(0));
        assert_eq!(core.evicted(Extent::between(0, 2)), 1);
        assert_eq!((core.fault(0), core.fault(1)), (Decision::Zero, Decision::Ask { around: vec![] }));
    }

    proptest! {
        /// Any order of events, see `model`.
        #[test]
        fn every_order_of_events_keeps_the_invariants(
            base_pages in 1u64..9, bound_pages in 1u64..10, events in vec(any::<[u8; 4]>().prop_map(CoreEvent::of), 0..80)
        ) {
            let tried = try_core(base_pages, bound_pages, &events);
            prop_assert!(tried.is_ok(), "{}", tried.unwrap_err());
        }
    }
}
