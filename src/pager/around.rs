//! How much to bring beside the page that faulted, and how far ahead of a reader.
//!
//! Role: part of hop *decide*: the window around a fault. Neighbours: `core` asks it at each fault that becomes a request, and at each fault on a page
//! that is on its way. Invariants: a window holds its page; random access never gets more than the base window; a window of a stream is no larger than the room
//! that is left; no page is further ahead of the reader than the limit.
//!
//! A fault right behind the last window of a stream, or right before it, grows that stream's window up to a limit, as the kernel's own file read-ahead does
//! (mm/readahead.c, "ramp up"); any other fault starts a new stream with the base window. A few streams are kept, so that threads that each
//! read their own part in order do not disturb one another.
//!
//! Installed pages are read without a fault, so a reader shows where it is only when it meets a page that is not here. On a far link those are the pages on
//! their way: a fault on one of them tells how far the reader is, and what comes next is asked for at once, while the reader still waits for pages asked for earlier.

use crate::Extent;

/// How many readers are told apart: a few dozen threads, and found in a scan of 2 KiB.
const STREAMS: usize = 32;

/// The least that is asked for ahead of a reader at a time, so that each page of it does not become a request of its own: what a peer gets in one READ.
pub(super) const PIECE_PAGES: u64 = 256;

/// A chance neighbour of a window continues it once; whoever continues it twice reads in order.
const CONTINUED_MIN: u64 = 2;

/// Backward streams are kept mirrored at this page, so that each decision is made once. A region has fewer pages than addresses.
const MIRROR: u64 = 1 << 60;

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct Around {
    base_pages: u64,
    max_pages: u64,
    ahead_pages: u64,
    streams: [Stream; STREAMS],
    clock: u64,
}

/// Where a reader is. All pages are mirrored if it reads backward.
#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    backward: bool,
    /// Where the reader was seen last.
    at: u64,
    /// The page behind all that was asked for.
    next: u64,
    /// Size of its last window, or how far ahead of the reader to ask; zero marks an unused slot.
    window_pages: u64,
    /// A reader that waits for this page or one behind it was too fast for the window.
    grows_at: u64,
    /// How many windows followed on one another.
    continued: u64,
    used: u64,
}

impl Around {
    /// Windows of `base_pages` (1: the page alone) that grow to `max_pages` when read in order. Streams are kept up to `ahead_pages` ahead of their reader (0:
    /// nothing is asked for before the reader is at the end of what was).
    pub(crate) fn new(base_pages: u64, max_pages: u64, ahead_pages: u64) -> Around {
        let base_pages = base_pages.clamp(1, 1 << 20);
        let max_pages = max_pages.clamp(base_pages, 1 << 20);
        let ahead_pages = if max_pages == 1 { 0 } else { ahead_pages.min(1 << 20) };
        Around { base_pages, max_pages, ahead_pages, streams: [Stream::default(); STREAMS], clock: 0 }
    }

    /// The window to bring for a fault at `page`, of which at most `room_pages` besides the page can be asked for.
    pub(crate) fn window(&mut self, page: u64, room_pages: u64) -> Extent {
        if self.max_pages == 1 {
            return Extent::page(page);
        }
        self.clock += 1;
        let found = self.streams.iter().enumerate().find_map(|(slot, stream)| Some((slot, stream.continued_at(page)?)));
        let Some((slot, backward)) = found else {
            let window = Extent::window(page, self.base_pages);
            let slot = self.oldest();
            self.streams[slot] = Stream {
                at: window.first(),
                next: window.end(),
                window_pages: self.base_pages,
                used: self.clock,
                ..Stream::default()
            };
            return window;
        };
        let (max_pages, often) = (self.max_pages.max(self.ahead_pages), self.ahead_pages > 0);
        let stream = &mut self.streams[slot];
        // Twice until it is certain that this is a stream: a fault by chance gets no more than that.
        let factor = if often && stream.continued > 0 { 4 } else { 2 };
        let page = mirrored(page, backward);
        let window_pages = (stream.window_pages * factor).min(max_pages);
        let next = page.saturating_add(window_pages.min(room_pages.saturating_add(1))).min(MIRROR + 1);
        *stream =
            Stream { backward, at: page, next, window_pages, grows_at: page, continued: stream.continued + 1, used: self.clock };
        extent(page, next, backward)
    }

    /// What to ask for besides, at most `room_pages`, now that a reader waits for `page`, which is on its way.
    pub(crate) fn ahead(&mut self, page: u64, room_pages: u64) -> Extent {
        let found = self.streams.iter_mut().find(|stream| {
            stream.continued >= CONTINUED_MIN && (stream.at..stream.next).contains(&mirrored(page, stream.backward))
        });
        let Some(stream) = found.filter(|_| self.ahead_pages > 0) else { return Extent::default() };
        let page = mirrored(page, stream.backward);
        self.clock += 1;
        (stream.at, stream.used) = (page, self.clock);
        if page >= stream.grows_at {
            // What is asked for with the larger window comes a round trip from now: until the reader is there it has not failed.
            stream.grows_at = stream.next;
            stream.window_pages = (stream.window_pages * 4).min(self.ahead_pages);
        }
        let target = page.saturating_add(stream.window_pages).min(stream.next.saturating_add(room_pages)).min(MIRROR + 1);
        if target < stream.next.saturating_add(PIECE_PAGES.min((stream.window_pages / 4).max(1))) {
            return Extent::default();
        }
        let from = std::mem::replace(&mut stream.next, target);
        extent(from, target, stream.backward)
    }

    fn oldest(&self) -> usize {
        let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
        oldest.map_or(0, |(slot, _)| slot)
    }
}

impl Stream {
    /// Whether a fault at `page` continues it, and then whether backward.
    fn continued_at(&self, page: u64) -> Option<bool> {
        if self.window_pages == 0 {
            return None;
        }
        if self.next == mirrored(page, self.backward) {
            return Some(self.backward);
        }
        // Of one window it is not known yet which way it is read.
        (self.continued == 0 && page + 1 == self.at).then_some(true)
    }
}

fn mirrored(page: u64, backward: bool) -> u64 {
    if backward { MIRROR.saturating_sub(page) } else { page }
}

/// Pages from `from` to before `next`, of a stream.
fn extent(from: u64, next: u64, backward: bool) -> Extent {
    // A stream that runs backward ends at page 0, which is `MIRROR`; no `next` is past the one behind it.
    if backward { Extent::between(MIRROR + 1 - next, MIRROR + 1 - from) } else { Extent::between(from, next) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::{collection::vec, prelude::*};

    const ROOM: u64 = 1 << 20;

    #[test]
    fn a_sequential_reader_gets_windows_that_double_up_to_the_limit() {
        let mut around = Around::new(4, 64, 0);
        let mut page = 0;
        let mut sizes = Vec::new();
        for _ in 0..7 {
            let window = around.window(page, ROOM);
            assert_eq!(window.first(), page);
            sizes.push(window.count());
            page = window.end();
        }
        assert_eq!(sizes, [4, 8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn random_faults_never_get_more_than_the_base_window() {
        let mut around = Around::new(4, 512, 4096);
        for step in 0..1000u64 {
            let page = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            let window = around.window(page, ROOM);
            assert!(window.contains(page) && window.count() == 4, "{window} for {page}");
            // Another thread touches a neighbour that is on its way.
            assert!(window.pages().all(|page| around.ahead(page, ROOM).is_empty()));
        }
    }

    #[test]
    fn interleaved_readers_keep_their_own_windows() {
        let mut around = Around::new(4, 64, 0);
        let mut next: Vec<u64> = (1..=STREAMS as u64).map(|reader| reader << 20).collect();
        for round in 0..6 {
            for page in &mut next {
                let window = around.window(*page, ROOM);
                assert_eq!(window.count(), (4 << round).min(64));
                *page = window.end();
            }
        }
    }

    #[test]
    fn one_page_means_one_page() {
        let mut around = Around::new(1, 1, 4096);
        assert!((0..10).all(|page| around.window(page, ROOM) == Extent::page(page) && around.ahead(page, ROOM).is_empty()));
    }

    #[test]
    fn a_reader_that_catches_up_has_more_asked_for_before_it_is_at_the_end() {
        let mut around = Around::new(16, 64, 4096);
        assert_eq!(around.window(0, ROOM), Extent::between(0, 16));
        assert_eq!(around.window(16, ROOM), Extent::between(16, 48));
        // Continued once may be chance.
        assert!(around.ahead(20, ROOM).is_empty());
        assert_eq!(around.window(48, ROOM), Extent::between(48, 176));
        assert_eq!(around.ahead(49, ROOM), Extent::between(176, 49 + 512));
        // The same window is not found too small twice.
        assert!(around.ahead(50, ROOM).is_empty());
        assert_eq!(around.ahead(178, ROOM), Extent::between(561, 178 + 2048));
        assert_eq!(around.ahead(561, 300), Extent::between(2226, 2526));
        assert!(around.ahead(561, 0).is_empty());
        // Behind the reader nobody is taken for it.
        assert!(around.ahead(300, ROOM).is_empty());
    }

    #[test]
    fn a_backward_reader_gets_what_a_forward_one_gets_down_to_the_first_page() {
        let mut around = Around::new(16, 64, 4096);
        assert_eq!(around.window(1007, ROOM), Extent::between(992, 1008));
        assert_eq!(around.window(991, ROOM), Extent::between(960, 992));
        assert_eq!(around.window(959, ROOM), Extent::between(832, 960));
        assert_eq!(around.ahead(958, ROOM), Extent::between(447, 832));
        assert_eq!(around.ahead(831, ROOM), Extent::between(0, 447));
        assert!(around.ahead(400, ROOM).is_empty());
    }

    proptest! {
        /// Whatever faults: a window holds its page, room and limit are kept, and nothing is asked for ahead that is not next to what was.
        #[test]
        fn windows_hold_their_page_and_keep_to_the_limits(
            faults in vec((0u64..600, any::<bool>(), 0u64..200), 1..200), base in 1u64..9, ahead in 0u64..300
        ) {
            let mut around = Around::new(base, 64, ahead);
            for (page, on_its_way, room) in faults {
                if on_its_way {
                    let more = around.ahead(page, room);
                    let near = if more.first() > page { more.end() <= page + ahead } else { page < more.first() + ahead };
                    prop_assert!(more.count() <= room, "{more} with room for {room}");
                    prop_assert!(more.is_empty() || near, "{more} is too far from {page}");
                    prop_assert!(!more.contains(page));
                } else {
                    let window = around.window(page, room);
                    let base = base.next_power_of_two();
                    prop_assert!(window.contains(page) && window.count() <= base.max(room + 1).min(64.max(ahead)), "{window} for {page}");
                }
            }
        }
    }
}
