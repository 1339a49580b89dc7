//! How much to bring beside the page that faulted.
//!
//! Role: part of hop *decide*: the window around a fault. Neighbours: `core` asks it at each fault that becomes a request. Invariants: a
//! window holds its page; random access never gets more than the base window.
//!
//! A fault right behind the last window of a stream doubles that stream's window up to a limit, as the kernel's own file read-ahead does
//! (mm/readahead.c, "ramp up"); any other fault starts a new stream with the base window. A few streams are kept, so that threads that each
//! read their own part in order do not disturb one another.

use crate::Extent;

/// How many sequential readers are told apart.
const STREAMS: usize = 16;

/// See the module header.
#[derive(Clone, Debug)]
pub(crate) struct Around {
    base_pages: u64,
    max_pages: u64,
    streams: [Stream; STREAMS],
    clock: u64,
}

#[derive(Clone, Copy, Debug, Default)]
struct Stream {
    /// The page at which the stream would fault next.
    next: u64,
    /// Size of its last window; zero marks an unused slot.
    window_pages: u64,
    used: u64,
}

impl Around {
    /// Windows of `base_pages` (1: the page alone) that grow to `max_pages` when read in order.
    pub(crate) fn new(base_pages: u64, max_pages: u64) -> Around {
        let base_pages = base_pages.clamp(1, 1 << 20);
        Around { base_pages, max_pages: max_pages.clamp(base_pages, 1 << 20), streams: [Stream::default(); STREAMS], clock: 0 }
    }

    /// The window to bring for a fault at `page`.
    pub(crate) fn window(&mut self, page: u64) -> Extent {
        if self.max_pages == 1 {
            return Extent::page(page);
        }
        self.clock += 1;
        let (slot, continues) = match self.streams.iter().position(|stream| stream.window_pages > 0 && stream.next == page) {
            Some(slot) => (slot, true),
            None => (self.oldest(), false),
        };
        let stream = &mut self.streams[slot];
        let window = if continues {
            stream.window_pages = (stream.window_pages * 2).min(self.max_pages);
            Extent::between(page, page.saturating_add(stream.window_pages))
        } else {
            stream.window_pages = self.base_pages;
            Extent::window(page, self.base_pages)
        };
        stream.next = window.end();
        stream.used = self.clock;
        window
    }

    fn oldest(&self) -> usize {
        let oldest = self.streams.iter().enumerate().min_by_key(|(_, stream)| stream.used);
        oldest.map_or(0, |(slot, _)| slot)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sequential_reader_gets_windows_that_double_up_to_the_limit() {
        let mut around = Around::new(4, 64);
        let mut page = 0;
        let mut sizes = Vec::new();
        for _ in 0..7 {
            let window = around.window(page);
            assert_eq!(window.first(), page);
            sizes.push(window.count());
            page = window.end();
        }
        assert_eq!(sizes, [4, 8, 16, 32, 64, 64, 64]);
    }

    #[test]
    fn random_faults_never_get_more_than_the_base_window() {
        let mut around = Around::new(4, 512);
        for step in 0..1000u64 {
            let page = step.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40;
            let window = around.window(page);
            assert!(window.contains(page) && window.count() == 4, "{window} for {page}");
        }
    }

    #[test]
    fn interleaved_readers_keep_their_own_windows() {
        let mut around = Around::new(4, 64);
        let mut next: Vec<u64> = (0..8).map(|reader| reader << 20).collect();
        for round in 0..6 {
            for page in &mut next {
                let window = around.window(*page);
                assert_eq!(window.count(), (4 << round).min(64));
                *page = window.end();
            }
        }
    }

    #[test]
    fn one_page_means_one_page() {
        let mut around = Around::new(1, 1);
        assert!((0..10).all(|page| around.window(page) == Extent::page(page)));
    }
}
