//! What the pages hold: every byte follows from a seed and the page's number.
//!
//! Role: both ends make the same image without sending it, and any page or word can be checked on its own. Neighbours: the benches and the
//! far ends. Invariants: the same seed gives the same bytes in every process; a word of an incompressible page costs a few instructions.

use super::{PAGE_BYTES, Result, text::Vocabulary};
use bytes::Bytes;

const PAGE: usize = PAGE_BYTES as usize;

/// A sequence of numbers from a seed: `SplitMix64` (Steele, Lea, Flood 2014), whose n-th number needs no others.
#[derive(Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64, stream: u64) -> Random {
        Random(nth(seed, stream))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        scramble(self.0)
    }

    /// A number below `end`, which is above zero.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

#[inline]
fn scramble(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[inline]
fn nth(seed: u64, n: u64) -> u64 {
    scramble(seed.wrapping_add(n.wrapping_add(1).wrapping_mul(GOLDEN)))
}

/// The pages `0..pages` in random order, cut to `count`.
pub fn random_order(pages: u64, count: usize, seed: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    let mut random = Random::new(seed, pages);
    let count = count.min(order.len());
    for at in 0..count {
        let other = at as u64 + random.below(pages - at as u64);
        order.swap(at, other as usize);
    }
    order.truncate(count);
    order
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Kind {
    Zero,
    Text,
    Incompressible,
}

/// Shares of a VM-like image; the rest is incompressible.
pub const ZERO_PERCENT: u64 = 40;
pub const TEXT_PERCENT: u64 = 30;

/// The content of a number of pages.
pub struct Image {
    seed: u64,
    pages: u64,
    vm: Option<(Vec<Kind>, Vocabulary)>,
}

impl Image {
    /// Random bytes, which nothing compresses.
    pub fn incompressible(bytes: u64, seed: u64) -> Image {
        Image { seed, pages: bytes / PAGE_BYTES, vm: None }
    }

    /// Like the memory of a virtual machine: 40 % of the pages zero, 30 % text, 30 % incompressible, in runs of 1 to 64 pages of one kind.
    pub fn vm_like(bytes: u64, seed: u64) -> Image {
        Image::mixed(bytes, seed, ZERO_PERCENT, TEXT_PERCENT)
    }

    /// The same with 40 % zero and all else incompressible.
    pub fn incompressible_and_zero(bytes: u64, seed: u64) -> Image {
        Image::mixed(bytes, seed, ZERO_PERCENT, 0)
    }

    fn mixed(bytes: u64, seed: u64, zero_percent: u64, text_percent: u64) -> Image {
        let pages = bytes / PAGE_BYTES;
        let mut random = Random::new(seed, u64::MAX);
        let mut left =
            [(Kind::Zero, pages * zero_percent / 100), (Kind::Text, pages * text_percent / 100), (Kind::Incompressible, 0)];
        left[2].1 = pages - left[0].1 - left[1].1;
        let mut kinds = Vec::with_capacity(pages as usize);
        // Each run's kind is drawn by what is left of each, so that the shares come out exactly.
        while (kinds.len() as u64) < pages {
            let mut ticket = random.below(pages - kinds.len() as u64);
            let drawn = left.iter_mut().find(|(_, left)| {
                let hit = ticket < *left;
                ticket = ticket.saturating_sub(*left);
                hit
            });
            let Some((kind, left)) = drawn else { unreachable!("a ticket is below the sum of what is left") };
            let run = (1 + random.below(64)).min(*left);
            *left -= run;
            kinds.extend((0..run).map(|_| *kind));
        }
        Image { seed, pages, vm: Some((kinds, Vocabulary::new(seed))) }
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Those that are not zero.
    pub fn full_pages(&self) -> u64 {
        let zero = |(kinds, _): &(Vec<Kind>, Vocabulary)| kinds.iter().filter(|kind| **kind == Kind::Zero).count() as u64;
        self.pages - self.vm.as_ref().map_or(0, zero)
    }

    /// Writes one page.
    pub fn fill(&self, page: u64, into: &mut [u8]) {
        match &self.vm {
            Some((kinds, _)) if kinds[page as usize] == Kind::Zero => into.fill(0),
            Some((kinds, words)) if kinds[page as usize] == Kind::Text => words.fill(&mut Random::new(self.seed, page), into),
            _ => {
                let seed = nth(self.seed, page);
                for (at, word) in into.chunks_exact_mut(8).enumerate() {
                    word.copy_from_slice(&nth(seed, at as u64).to_ne_bytes());
                }
            }
        }
    }

    /// One word of an incompressible page, for a check that costs nothing beside a fault: its number in the page, and its value.
    #[inline]
    pub fn probe(&self, page: u64) -> (usize, u64) {
        debug_assert!(self.vm.is_none());
        let seed = nth(self.seed, page);
        let at = (seed >> 32) as usize % (PAGE / 8);
        (at, nth(seed, at as u64))
    }

    /// All pages.
    pub fn bytes(&self) -> Bytes {
        let mut bytes = vec![0; self.pages as usize * PAGE];
        for (page, into) in bytes.chunks_exact_mut(PAGE).enumerate() {
            self.fill(page as u64, into);
        }
        bytes.into()
    }

    /// Compares whole pages with what they should be; `read` copies a page out.
    pub fn check(&self, pages: impl IntoIterator<Item = u64>, mut read: impl FnMut(u64, &mut [u8]) -> Result<()>) -> Result<()> {
        let (mut wanted, mut got) = (vec![0; PAGE], vec![0; PAGE]);
        for page in pages {
            self.fill(page, &mut wanted);
            read(page, &mut got)?;
            if wanted != got {
                let at = wanted.iter().zip(&got).position(|(wanted, got)| wanted != got).unwrap_or(0);
                return Err(format!("page {page} is wrong from byte {at} on: {} for {}", got[at], wanted[at]).into());
            }
        }
        Ok(())
    }

    /// The first `bytes_max` of the text, in runs that end where pages of another kind begin and at multiples of `step_pages`, as a bulk read cuts them.
    pub fn text_runs(&self, step_pages: u64, bytes_max: usize) -> Vec<Vec<u8>> {
        let kinds = self.vm.iter().flat_map(|(kinds, _)| kinds);
        let pages: Vec<u64> = (0..).zip(kinds).filter(|(_, kind)| **kind == Kind::Text).map(|(page, _)| page).collect();
        let pages = &pages[..pages.len().min(bytes_max / PAGE)];
        let run_of = |run: &[u64]| {
            let mut bytes = vec![0; run.len() * PAGE];
            run.iter().zip(bytes.chunks_exact_mut(PAGE)).for_each(|(page, into)| self.fill(*page, into));
            bytes
        };
        pages.chunk_by(|page, next| page + 1 == *next && !next.is_multiple_of(step_pages)).map(run_of).collect()
    }

    /// For each kind of page, how many there are and LZ4's ratio on a sample of them, page by page.
    pub fn describe(&self) -> String {
        let Some((kinds, _)) = &self.vm else { return "incompressible".into() };
        let mut page_bytes = vec![0; PAGE];
        let mut describe = |kind: Kind| {
            let of_kind = || kinds.iter().enumerate().filter(move |(_, other)| **other == kind);
            let (mut raw, mut packed) = (0, 0);
            for (page, _) in of_kind().step_by(97) {
                self.fill(page as u64, &mut page_bytes);
                raw += PAGE;
                packed += lz4_flex::block::compress(&page_bytes).len();
            }
            let share = 100.0 * of_kind().count() as f64 / self.pages as f64;
            format!("{share:.0} % {kind:?} (lz4 {:.1})", raw as f64 / packed.max(1) as f64)
        };
        [Kind::Zero, Kind::Text, Kind::Incompressible].map(&mut describe).join(", ")
    }
}
