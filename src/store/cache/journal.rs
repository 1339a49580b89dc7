//! What a cache's journal says, and what it means after a crash.
//!
//! Role: bytes of a journal in, which pages of the data file count out; frames to append. Neighbours: `cache::disk` writes and reads
//! the file, `spans` holds the outcome. Invariants: pure; never panics, whatever the bytes; a frame counts as a whole or not at all; a
//! frame that does not check out ends the journal if no good one stands behind it, else the journal is damaged and refused.

use super::spans::Spans;
use crate::{Extent, PageSize};
use thiserror::Error;

const MAGIC: &[u8; 8] = b"pgfcache";
const VERSION: u32 = 1;
/// Magic, version, page size, size, nonce, length of the identity; the identity and a checksum follow.
const HEADER_FIXED_BYTES: usize = 8 + 4 + 8 + 8 + 8 + 4;
const FRAME_MAGIC: u32 = 0x4d52_4650; // "PFRM"
/// Magic, count of entries, number of the frame, checksum, reserved.
const FRAME_FIXED_BYTES: usize = 4 + 4 + 8 + 4 + 4;
/// First page, count of pages, mark.
const ENTRY_BYTES: usize = 24;
/// Longer names are no names.
pub(super) const IDENTITY_MAX_BYTES: usize = 1024;

/// What the data file holds of a page for which the journal has a mark. Without one, it holds nothing that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// What the remote store has.
    Clean,
    /// What was written here and is not known to be durable in the remote store.
    Dirty,
}

/// One change: these pages have this mark from now on, or none.
pub(super) type Entry = (Extent, Option<Mark>);

/// What ties a journal to its store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) page_size: PageSize,
    pub(super) size_bytes: u64,
    /// Who the remote store is, in the caller's words; empty if not given.
    pub(super) identity: Vec<u8>,
    /// Differs from one file to the next, and goes into each frame's checksum: what a file system brings back of another is no frame.
    pub(super) nonce: u64,
}

/// What a journal says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Recovered {
    pub(super) header: Header,
    pub(super) marks: Spans<Mark>,
    /// Up to where it is good.
    pub(super) good_bytes: usize,
    /// The number of the next frame.
    pub(super) next_frame: u64,
}

/// Why a journal is not believed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub(super) enum JournalError {
    #[error("its header of {have_bytes} bytes is damaged or of no cache")]
    Header { have_bytes: usize },
    #[error("it has version {version}, this program knows {VERSION}")]
    Version { version: u32 },
    #[error("byte {bad_at} begins a damaged record, and byte {good_at} a good one behind it: this is no interrupted write")]
    Damaged { bad_at: usize, good_at: usize },
    #[error("the record at byte {at} speaks of {extent}, and the store has {store_pages} pages")]
    OutOfRange { at: usize, extent: Extent, store_pages: u64 },
}

impl Header {
    /// The beginning of a journal file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(self.page_size.bytes().to_le_bytes());
        bytes.extend(self.size_bytes.to_le_bytes());
        bytes.extend(self.nonce.to_le_bytes());
        bytes.extend((self.identity.len() as u32).to_le_bytes());
        bytes.extend(&self.identity);
        bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
        bytes
    }

    /// The header and its length.
    fn decode(bytes: &[u8]) -> Result<(Header, usize), JournalError> {
        let damaged = JournalError::Header { have_bytes: bytes.len() };
        let (Some(magic), Some(version)) = (bytes.get(..8), u32_at(bytes, 8)) else { return Err(damaged) };
        let parsed = || {
            let page_size = PageSize::new(u64_at(bytes, 12)?)?;
            let (size_bytes, nonce, identity_bytes) = (u64_at(bytes, 20)?, u64_at(bytes, 28)?, u32_at(bytes, 36)? as usize);
            let end = HEADER_FIXED_BYTES.checked_add(identity_bytes.min(IDENTITY_MAX_BYTES + 1))?;
            let identity = bytes.get(HEADER_FIXED_BYTES..end)?.to_vec();
            let sound = identity_bytes <= IDENTITY_MAX_BYTES && u32_at(bytes, end)? == crc32fast::hash(&bytes[..end]);
            sound.then_some((Header { page_size, size_bytes, identity, nonce }, end + 4))
        };
        match parsed() {
            _ if magic != MAGIC => Err(damaged),
            Some(parsed) if version == VERSION => Ok(parsed),
            // Of a later version the rest may look otherwise; of a flipped bit it is the checksum that speaks.
            Some(_) => Err(JournalError::Version { version }),
            None => Err(damaged),
        }
    }
}

/// A frame: changes that count together or not at all.
pub(super) fn encode_frame(nonce: u64, number: u64, entries: &[Entry]) -> Vec<u8> {
    let mut body = Vec::with_capacity(entries.len() * ENTRY_BYTES);
    for (extent, mark) in entries {
        body.extend(extent.first().to_le_bytes());
        body.extend(extent.count().to_le_bytes());
        let mark: u64 = match mark {
            None => 0,
            Some(Mark::Clean) => 1,
            Some(Mark::Dirty) => 2,
        };
        body.extend(mark.to_le_bytes());
    }
    let count = entries.len() as u32;
    let mut frame = FRAME_MAGIC.to_le_bytes().to_vec();
    frame.extend(count.to_le_bytes());
    frame.extend(number.to_le_bytes());
    frame.extend(frame_checksum(nonce, count, number, &body).to_le_bytes());
    frame.extend([0; 4]);
    frame.extend(body);
    frame
}

/// What a journal says: everything up to the last good frame.
///
/// # Errors
/// It is not a journal, or a damaged one.
pub(super) fn recover(bytes: &[u8]) -> Result<Recovered, JournalError> {
    let (header, mut at) = Header::decode(bytes)?;
    let store_pages = header.page_size.pages_for(header.size_bytes);
    let (mut marks, mut next_frame) = (Spans::default(), 0);
    while let Some((number, entries, len)) = decode_frame(header.nonce, bytes.get(at..).unwrap_or_default()) {
        if number != next_frame {
            return Err(JournalError::Damaged { bad_at: at, good_at: at });
        }
        for (extent, mark) in entries {
            if extent.end() > store_pages {
                return Err(JournalError::OutOfRange { at, extent, store_pages });
            }
            marks.set(extent, mark);
        }
        at += len;
        next_frame += 1;
    }
    // Each frame is durable before the next is begun: a write that was interrupted is the last one, and nothing good stands behind it.
    let behind = (at + 1..bytes.len()).find(|start| decode_frame(header.nonce, &bytes[*start..]).is_some());
    match behind {
        Some(good_at) => Err(JournalError::Damaged { bad_at: at, good_at }),
        None => Ok(Recovered { header, marks, good_bytes: at, next_frame }),
    }
}

/// The frame that `bytes` begin with: its number, entries and length; `None` if there is no good one.
fn decode_frame(nonce: u64, bytes: &[u8]) -> Option<(u64, Vec<Entry>, usize)> {
    if u32_at(bytes, 0)? != FRAME_MAGIC || u32_at(bytes, 20)? != 0 {
        return None;
    }
    let (count, number, checksum) = (u32_at(bytes, 4)?, u64_at(bytes, 8)?, u32_at(bytes, 16)?);
    let len = (count as usize).checked_mul(ENTRY_BYTES)?.checked_add(FRAME_FIXED_BYTES)?;
    let body = bytes.get(FRAME_FIXED_BYTES..len)?;
    if frame_checksum(nonce, count, number, body) != checksum {
        return None;
    }
    let entry = |entry: &[u8]| {
        let mark = match u64_at(entry, 16)? {
            0 => None,
            1 => Some(Mark::Clean),
            2 => Some(Mark::Dirty),
            _ => return None,
        };
        Some((Extent::new(u64_at(entry, 0)?, u64_at(entry, 8)?)?, mark))
    };
    let entries = body.chunks_exact(ENTRY_BYTES).map(entry).collect::<Option<Vec<Entry>>>()?;
    Some((number, entries, len))
}

fn frame_checksum(nonce: u64, count: u32, number: u64, body: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&nonce.to_le_bytes());
    hasher.update(&count.to_le_bytes());
    hasher.update(&number.to_le_bytes());
    hasher.update(body);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 64;

    fn header() -> Header {
        Header { page_size: PageSize::KIB_4, size_bytes: PAGES * 4096 - 5, identity: b"world".to_vec(), nonce: 0x1234_5678_9abc }
    }

    /// The journal's bytes, where each frame ends, and the marks after each.
    fn journal(frames: &[Vec<Entry>]) -> (Vec<u8>, Vec<usize>, Vec<Vec<Option<Mark>>>) {
        let mut bytes = header().encode();
        let (mut ends, mut model, mut states) = (vec![bytes.len()], vec![None; PAGES as usize], vec![]);
        states.push(model.clone());
        for (number, entries) in frames.iter().enumerate() {
            bytes.extend(encode_frame(header().nonce, number as u64, entries));
            for (extent, mark) in entries {
                extent.pages().for_each(|page| model[page as usize] = *mark);
            }
            ends.push(bytes.len());
            states.push(model.clone());
        }
        (bytes, ends, states)
    }

    fn marks(recovered: &Recovered) -> Vec<Option<Mark>> {
        let all = recovered.marks.within(Extent::between(0, PAGES));
        all.into_iter().flat_map(|(piece, mark)| piece.pages().map(move |_| mark)).collect()
    }

    fn frames() -> impl Strategy<Value = Vec<Vec<Entry>>> {
        let mark = prop::sample::select(vec![None, Some(Mark::Clean), Some(Mark::Dirty)]);
        let entry = (0..PAGES, 0..PAGES, mark).prop_map(|(first, end, mark)| (Extent::between(first, end), mark));
        prop::collection::vec(prop::collection::vec(entry, 0..3), 0..4)
    }

    proptest! {
        #[test]
        fn cut_at_any_byte_it_says_what_the_frames_before_said(frames in frames()) {
            let (bytes, ends, states) = journal(&frames);
            for cut in 0..=bytes.len() {
                let whole = ends.iter().filter(|end| **end <= cut).count();
                match recover(&bytes[..cut]) {
                    Ok(recovered) => {
                        prop_assert_eq!(marks(&recovered), states[whole - 1].clone());
                        prop_assert_eq!((recovered.good_bytes, recovered.next_frame), (ends[whole - 1], whole as u64 - 1));
                        prop_assert_eq!(recovered.header, header());
                    }
                    Err(error) => prop_assert!(whole == 0, "cut at {}: {}", cut, error),
                }
            }
        }

        #[test]
        fn with_any_bit_flipped_it_is_refused_or_ends_before_its_last_frame(frames in frames()) {
            let (bytes, ends, states) = journal(&frames);
            for bit in 0..bytes.len() * 8 {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                let hit = ends.iter().filter(|end| **end <= bit / 8).count();
                match recover(&flipped) {
                    // The last frame alone cannot be told from one that was interrupted.
                    Ok(recovered) => {
                        prop_assert!(hit == frames.len() && hit > 0, "bit {} of frame {} went unnoticed", bit, hit);
                        prop_assert_eq!(marks(&recovered), states[frames.len() - 1].clone());
                    }
                    Err(JournalError::Damaged { bad_at, good_at }) => prop_assert_eq!((bad_at, good_at), (ends[hit - 1], ends[hit])),
                    Err(_) => prop_assert_eq!(hit, 0),
                }
            }
        }

        #[test]
        fn any_bytes_are_decoded_without_a_panic(tail in prop::collection::vec(any::<u8>(), 0..400), behind_header: bool) {
            let mut bytes = if behind_header { header().encode() } else { vec![] };
            bytes.extend(tail);
            let _ = recover(&bytes);
        }
    }

    #[test]
    fn a_frame_that_is_missing_is_damage() {
        let (bytes, ends, _) = journal(&vec![vec![(Extent::page(1), Some(Mark::Dirty))]; 3]);
        let without = [&bytes[..ends[1]], &bytes[ends[2]..]].concat();
        assert!(matches!(recover(&without), Err(JournalError::Damaged { .. })));
    }

    #[test]
    fn frames_of_another_journal_and_pages_past_the_store_do_not_count() {
        let dirty = |page| vec![(Extent::page(page), Some(Mark::Dirty))];
        let other = [header().encode(), encode_frame(1, 0, &dirty(3))].concat();
        assert_eq!(recover(&other).unwrap().next_frame, 0);
        let past = [header().encode(), encode_frame(header().nonce, 0, &dirty(PAGES))].concat();
        assert!(matches!(recover(&past), Err(JournalError::OutOfRange { .. })));
    }
}
