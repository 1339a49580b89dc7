//! What the checks compare with: a store as plain bytes, reads put together, pages that show who wrote them, and random numbers.
//!
//! Role: the part of the suite that could itself be wrong, kept too plain to be. Neighbours: the checks. Invariants: no knowledge of
//! any store; the same seed gives the same numbers everywhere.

use crate::{Content, Extent, PageSize, Run, StoreError};

/// What a store should hold: its bytes, padded with zeros to whole pages.
pub(super) struct Model {
    size_bytes: usize,
    page_size: PageSize,
    pub(super) extent: Extent,
    pub(super) bytes: Vec<u8>,
}

impl Model {
    pub(super) fn zeros(size_bytes: u64, page_size: PageSize) -> Model {
        let extent = Extent::between(0, page_size.pages_for(size_bytes));
        Model { size_bytes: size_bytes as usize, page_size, extent, bytes: vec![0; extent.bytes(page_size) as usize] }
    }

    pub(super) fn write(&mut self, extent: Extent, bytes: &[u8]) {
        let start = self.page_size.offset_of(extent.first()) as usize;
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.bytes[self.size_bytes..].fill(0);
    }

    pub(super) fn compare(&self, extent: Extent, read: Result<Vec<Run>, StoreError>) -> Result<(), String> {
        self.compare_bytes(extent, &joined(self.page_size, extent, read)?)
    }

    pub(super) fn compare_bytes(&self, extent: Extent, got: &[u8]) -> Result<(), String> {
        let wanted = &self.bytes[self.page_size.offset_of(extent.first()) as usize..][..got.len()];
        if got == wanted {
            return Ok(());
        }
        let at = got.iter().zip(wanted).position(|(got, wanted)| got != wanted).unwrap_or_default();
        let (page, byte) = (extent.first() + self.page_size.page_of(at as u64), at % self.page_size.len());
        let (got, wanted, size_bytes) = (got[at], wanted[at], self.size_bytes);
        Err(format!("reading {extent} of {size_bytes} bytes: byte {byte} of page {page} is {got:#04x}, not {wanted:#04x}"))
    }
}

/// The bytes of a read, if its runs are what a read must give: in order, without gaps, exactly covering the extent.
pub(super) fn joined(page_size: PageSize, extent: Extent, read: Result<Vec<Run>, StoreError>) -> Result<Vec<u8>, String> {
    let runs = read.map_err(|error| format!("read of {extent}: {error}"))?;
    let mut bytes = Vec::with_capacity(extent.bytes(page_size) as usize);
    let mut due = extent.first();
    for Run { extent: run, content } in runs {
        let fits = run.first() == due && run.end() <= extent.end() && !run.is_empty();
        ensure!(fits, "reading {extent}: a run of {run} came where page {due} was due");
        let expected = run.bytes(page_size) as usize;
        match content {
            Content::Zero => bytes.resize(bytes.len() + expected, 0),
            Content::Bytes(got) => {
                ensure!(got.len() == expected, "reading {extent}: a run of {run} has {} bytes", got.len());
                bytes.extend_from_slice(&got);
            }
        }
        due = run.end();
    }
    ensure!(due == extent.end(), "reading {extent}: the runs end before page {due}");
    Ok(bytes)
}

pub(super) fn stamped(stamp: u64, len: usize) -> Vec<u8> {
    stamp.to_le_bytes().repeat(len / 8)
}

/// The stamp that fills a page, if one does: then the page equals itself moved by the length of a stamp.
pub(super) fn stamp_of(page: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(page.first_chunk().copied()?);
    (page[8..] == page[..page.len() - 8]).then_some(stamp)
}

/// Random numbers that follow from a seed: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).
pub(super) struct Rng(pub(super) u64);

impl Rng {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub(super) fn fork(&mut self) -> Rng {
        Rng(self.next())
    }

    /// Lets other tasks go on, a few times: on a single thread, tasks that always yield once run in lockstep and never meet.
    pub(super) async fn pause(&mut self) {
        for _ in 0..=self.next() % 3 {
            tokio::task::yield_now().await;
        }
    }

    /// Pages inside `extent`, at least one: half the time only a few, so that borders are met as well as long runs.
    pub(super) fn extent_in(&mut self, extent: Extent) -> Extent {
        let most = if self.next().is_multiple_of(2) { extent.count().min(4) } else { extent.count() };
        let count = 1 + self.next() % most;
        let first = extent.first() + self.next() % (extent.count() - count + 1);
        Extent::between(first, first + count)
    }

    /// Bytes that differ from page to page: their period is random and prime to any page size.
    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        const PERIOD: usize = 509;
        let pattern: Vec<u8> = (0..PERIOD).map(|_| self.next() as u8).collect();
        let mut bytes = pattern.repeat(len.div_ceil(PERIOD));
        bytes.truncate(len);
        bytes
    }
}
