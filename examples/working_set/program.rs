//! The program: which pages it touches, in which order, and what it computes of them.
//!
//! Role: the same work in every start, and at the host, which has the image itself. Neighbours: `start` runs it over a mount, `host` over the image. Invariants: a pure function of the image's
//! bytes and the two numbers of pages; the image is a pure function of its size.

/// The unit of the image, and of what is asked for.
pub const PAGE_BYTES: u64 = 4096;

/// Bytes that do not compress, so that the link carries all of them.
pub fn image(size_bytes: u64) -> Vec<u8> {
    (0..size_bytes / 8).flat_map(|word| scramble(word).to_le_bytes()).collect()
}

/// Pages scattered over the whole image, each once: as a program's first steps go through its code, its tables and its heap.
pub fn touched(pages: u64, count: u64) -> Vec<u64> {
    let mut order: Vec<u64> = (0..pages).collect();
    order.sort_by_key(|page| scramble(!page));
    order.truncate(usize::try_from(count).unwrap_or(usize::MAX));
    order
}

/// What the program makes of its next page: some microseconds of work that depend on all that it met before.
pub fn compute(state: u64, page: &[u8]) -> u64 {
    page.chunks_exact(8).fold(state, |state, word| {
        let word = word.try_into().map_or(0, u64::from_le_bytes);
        scramble(state ^ word)
    })
}

/// A number without pattern from one with: `SplitMix64`'s last step (Steele, Lea, Flood 2014).
fn scramble(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
