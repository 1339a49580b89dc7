//! Words: pages, extents and the arithmetic between bytes and pages.
//!
//! Role: every module speaks of pages through these types. Neighbours: none; imports nothing.
//! Invariants: an [`Extent`] never overflows (`first + count` fits in `u64`); a [`PageSize`] is a power of two.

use std::fmt;

/// The size of a page in bytes: a power of two, 4096 on x86-64.
///
/// ```
/// use pageferry::PageSize;
/// let size = PageSize::new(4096).unwrap();
/// assert_eq!(size.pages_for(4097), 2);
/// assert!(PageSize::new(3000).is_none());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageSize {
    shift: u32,
}

impl PageSize {
    /// 4 KiB, the base page of x86-64.
    pub const KIB_4: PageSize = PageSize { shift: 12 };

    /// A page size of `bytes`; `None` unless a power of two of at least 512 and at most 1 GiB.
    #[must_use]
    pub const fn new(bytes: u64) -> Option<PageSize> {
        if bytes.is_power_of_two() && bytes >= 512 && bytes <= 1 << 30 {
            Some(PageSize { shift: bytes.trailing_zeros() })
        } else {
            None
        }
    }

    /// Bytes in a page.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// Bytes in a page, as a length of memory.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "no page is empty")]
    pub const fn len(self) -> usize {
        1 << self.shift
    }

    /// Pages needed to hold `bytes`, rounded up.
    #[must_use]
    pub const fn pages_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }

    /// The page that holds the byte at `offset_bytes`.
    #[must_use]
    pub const fn page_of(self, offset_bytes: u64) -> u64 {
        offset_bytes >> self.shift
    }

    /// The byte offset at which `page` starts. Saturates at `u64::MAX`.
    #[must_use]
    pub const fn offset_of(self, page: u64) -> u64 {
        page.saturating_mul(self.bytes())
    }

    /// The smallest extent that covers `len` bytes from `offset_bytes`; `None` if the end overflows.
    #[must_use]
    pub const fn extent_of(self, offset_bytes: u64, len: u64) -> Option<Extent> {
        let Some(end) = offset_bytes.checked_add(len) else { return None };
        let first = self.page_of(offset_bytes);
        let count = if len == 0 { 0 } else { end.div_ceil(self.bytes()) - first };
        Extent::new(first, count)
    }
}

impl fmt::Debug for PageSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageSize({})", self.bytes())
    }
}

/// A run of whole pages `[first, first + count)`: the unit of requests, transfers and installs.
///
/// ```
/// use pageferry::Extent;
/// let extent = Extent::new(4, 3).unwrap();
/// assert!(extent.contains(6) && !extent.contains(7));
/// assert_eq!(extent.to_string(), "pages 4..7");
/// assert!(Extent::new(u64::MAX, 2).is_none());
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Extent {
    first: u64,
    count: u64,
}

impl Extent {
    /// The extent of `count` pages from `first`; `None` if its end does not fit in `u64`.
    #[must_use]
    pub const fn new(first: u64, count: u64) -> Option<Extent> {
        match first.checked_add(count) {
            Some(_) => Some(Extent { first, count }),
            None => None,
        }
    }

    /// The extent from `first` up to, not including, `end`; empty when `end <= first`.
    #[must_use]
    pub const fn between(first: u64, end: u64) -> Extent {
        Extent { first, count: end.saturating_sub(first) }
    }

    /// The one-page extent at `page`, which must be below `u64::MAX` (the last index has no end; it saturates to empty).
    #[must_use]
    pub const fn page(page: u64) -> Extent {
        Extent::between(page, page.saturating_add(1))
    }

    /// The first page.
    #[must_use]
    pub const fn first(self) -> u64 {
        self.first
    }

    /// How many pages.
    #[must_use]
    pub const fn count(self) -> u64 {
        self.count
    }

    /// One past the last page.
    #[must_use]
    pub const fn end(self) -> u64 {
        self.first + self.count
    }

    /// Whether it holds no page.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.count == 0
    }

    /// Whether `page` lies inside.
    #[must_use]
    pub const fn contains(self, page: u64) -> bool {
        page >= self.first && page < self.end()
    }

    /// Whether all of `other` lies inside; an empty extent lies inside every other.
    #[must_use]
    pub const fn covers(self, other: Extent) -> bool {
        other.is_empty() || (other.first >= self.first && other.end() <= self.end())
    }

    /// The pages common to both, or `None` if there is none.
    #[must_use]
    pub fn intersect(self, other: Extent) -> Option<Extent> {
        let both = Extent::between(self.first.max(other.first), self.end().min(other.end()));
        (!both.is_empty()).then_some(both)
    }

    /// Cuts the extent into pieces of at most `pages` pages, in order. `pages` of zero counts as one.
    pub fn chunks(self, pages: u64) -> impl Iterator<Item = Extent> + Send {
        let step = pages.max(1);
        (0..self.count.div_ceil(step)).map(move |i| {
            let first = self.first + i * step;
            Extent::between(first, self.end().min(first.saturating_add(step)))
        })
    }

    /// The aligned window of `pages` pages (a power of two, else rounded up to one) around `page`.
    #[must_use]
    pub fn window(page: u64, pages: u64) -> Extent {
        let pages = pages.clamp(1, 1 << 32).next_power_of_two();
        let first = page & !(pages - 1);
        Extent::between(first, first.saturating_add(pages))
    }

    /// Length in bytes for pages of `size`. Saturates.
    #[must_use]
    pub const fn bytes(self, size: PageSize) -> u64 {
        size.offset_of(self.count)
    }

    /// The pages, in order.
    #[must_use]
    pub fn pages(self) -> std::ops::Range<u64> {
        self.first..self.end()
    }
}

impl fmt::Display for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pages {}..{}", self.first, self.end())
    }
}

impl fmt::Debug for Extent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.first, self.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_extent() -> impl Strategy<Value = Extent> {
        (0u64..200, 0u64..50).prop_map(|(first, count)| Extent::new(first, count).unwrap())
    }

    proptest! {
        #[test]
        fn intersection_holds_exactly_the_common_pages(a in any_extent(), b in any_extent()) {
            let naive: Vec<u64> = a.pages().filter(|page| b.contains(*page)).collect();
            let ours: Vec<u64> = a.intersect(b).map(|both| both.pages().collect()).unwrap_or_default();
            prop_assert_eq!(ours, naive);
        }

        #[test]
        fn chunks_cover_the_extent_once_in_order(extent in any_extent(), step in 0u64..9) {
            let pieces: Vec<Extent> = extent.chunks(step).collect();
            prop_assert!(pieces.iter().all(|piece| !piece.is_empty() && piece.count() <= step.max(1)));
            let pages: Vec<u64> = pieces.into_iter().flat_map(Extent::pages).collect();
            prop_assert_eq!(pages, extent.pages().collect::<Vec<_>>());
        }

        #[test]
        fn extent_of_bytes_is_the_smallest_cover(offset in 0u64..1 << 40, len in 1u64..1 << 20) {
            let size = PageSize::KIB_4;
            let extent = size.extent_of(offset, len).unwrap();
            prop_assert!(size.offset_of(extent.first()) <= offset);
            prop_assert!(size.offset_of(extent.end()) >= offset + len);
            prop_assert!(size.offset_of(extent.first() + 1) > offset);
            prop_assert!(size.offset_of(extent.end() - 1) < offset + len);
        }

        #[test]
        fn window_is_aligned_and_holds_its_page(page in 0u64..1 << 50, pages in 1u64..5000) {
            let window = Extent::window(page, pages);
            prop_assert!(window.contains(page));
            prop_assert!(window.count() >= pages && window.count() < pages * 2);
            prop_assert_eq!(window.first() % window.count(), 0);
        }
    }

    #[test]
    fn the_last_page_index_has_no_overflowing_extent() {
        assert!(Extent::page(u64::MAX).is_empty());
        assert_eq!(Extent::new(u64::MAX - 1, 1).unwrap().end(), u64::MAX);
        assert!(PageSize::KIB_4.extent_of(u64::MAX, 1).is_none());
    }
}
