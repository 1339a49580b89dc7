//! Builds the index in an empty region, document by document, until it is full.
//!
//! Role: the only writer of everything but the counters. Neighbours: `corpus` gives the documents; the layout is `index`'s.
//! Invariants: one thread; a document that does not fit is cut, and then exactly the words before the cut are indexed; an index
//! that is not finished cannot be attached to.

use crate::{
    index::{
        DOCUMENT_HEAD, Header, Index, IndexError, MAX_CHUNK, Memory, Posting, Probe, RECORD_HEAD, TABLE_START, halves, pair, probe,
    },
    word::{Word, words},
};
use pageferry::Region;

/// Longest text of a document: its positions fit in the 24 bits of a posting, and one file does not fill a small region.
pub const MAX_TEXT_BYTES: usize = 128 << 10;
/// A posting's field of 8 bits.
const MAX_OCCURRENCES: u32 = 255;
/// A record's field of 24 bits.
const MAX_DOCUMENTS: u64 = (1 << 24) - 1;
/// Words in more than one of so many documents are not queried: search engines call them stop words.
const STOP_SHARE: u64 = 8;

/// An index that grows.
pub struct Builder<'r> {
    memory: Memory<'r>,
    header: Header,
    ranks_room: u64,
}

impl<'r> Builder<'r> {
    /// Lays out an index in a region of zeros: a sixteenth of it is hash table, a 512th ranks.
    ///
    /// # Errors
    /// [`IndexError::Size`].
    pub fn new(region: &'r Region) -> Result<Builder<'r>, IndexError> {
        let memory = Memory::of(region)?;
        let size_words = memory.count();
        let buckets = 1 << (size_words / 16).ilog2();
        let ranks_start = u64::from(TABLE_START) + buckets;
        let ranks_room = size_words / 512;
        let heap_start = ranks_start + ranks_room;
        let header = Header { size_words, buckets, ranks_start, heap_start, heap_end: heap_start, ..Header::default() };
        Ok(Builder { memory, header, ranks_room })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Stores a document and indexes its words. `false` says that the index is full: the document was cut, or not stored.
    ///
    /// # Errors
    /// [`IndexError::Damaged`] when something else writes the region.
    pub fn add(&mut self, path: &str, start: u64, text: &[u8]) -> Result<bool, IndexError> {
        // At the end half of what is left goes to the text, so that its words find room too.
        let room_bytes = usize::try_from((self.header.size_words - self.header.heap_end) * 8 / 2).unwrap_or(usize::MAX);
        let whole = text.len();
        let text = &text[..whole.min(room_bytes).min(MAX_TEXT_BYTES)];
        let (Ok(path_bytes), Ok(text_bytes)) = (u32::try_from(path.len()), u32::try_from(text.len())) else { return Ok(false) };
        let path_words = path_bytes.div_ceil(8);
        let stored = self.allocate(DOCUMENT_HEAD + path_words + text_bytes.div_ceil(8));
        let Some(document) = stored.filter(|_| self.header.documents < MAX_DOCUMENTS) else { return Ok(false) };
        let path_offset = u64::from(document + DOCUMENT_HEAD) * 8;
        self.memory.region.write_at(path_offset, path.as_bytes())?;
        self.memory.region.write_at(path_offset + u64::from(path_words) * 8, text)?;
        self.memory.store(document + 1, start)?;
        let mut indexed = text_bytes;
        for (at, word) in words(text) {
            let at = u32::try_from(at).unwrap_or(u32::MAX);
            if !self.add_word(&word, document, at)? {
                indexed = at;
                break;
            }
        }
        self.memory.store(document, pair(path_bytes, indexed))?;
        self.header.documents += 1;
        self.header.text_bytes += u64::from(indexed);
        Ok(indexed as usize == whole)
    }

    /// Ranks the words and makes the index attachable.
    ///
    /// # Errors
    /// [`IndexError::Empty`] without any word.
    pub fn finish(mut self) -> Result<Index<'r>, IndexError> {
        let most = (self.header.documents / STOP_SHARE).max(STOP_SHARE);
        let mut ranked = Vec::new();
        for bucket in TABLE_START..halves(self.header.ranks_start).1 {
            let (_, record) = self.memory.load_pair(bucket)?;
            if record != 0 {
                let documents = self.documents(record)?;
                if u64::from(documents) <= most {
                    ranked.push((std::cmp::Reverse(documents), record));
                }
            }
        }
        ranked.sort_unstable();
        ranked.truncate(usize::try_from(self.ranks_room).unwrap_or(usize::MAX));
        if ranked.is_empty() {
            return Err(IndexError::Empty);
        }
        for ((_, record), at) in ranked.iter().zip(halves(self.header.ranks_start).1..) {
            self.memory.store(at, u64::from(*record))?;
        }
        self.header.ranked = ranked.len() as u64;
        self.header.publish(&self.memory)?;
        Index::attach(self.memory.region)
    }

    /// Counts one occurrence; `false` if there is no room for it.
    fn add_word(&mut self, word: &Word, document: u32, first: u32) -> Result<bool, IndexError> {
        let posting = Posting { document, occurrences: 1, first };
        match probe(&self.memory, self.header.buckets, word)? {
            Probe::Found(record) => {
                if !self.add_occurrence(record.0, posting)? {
                    return Ok(false);
                }
            }
            // Probing stays short up to three quarters.
            Probe::Free(_) if self.header.words >= self.header.buckets / 4 * 3 => {
                self.header.unindexed += 1;
                return Ok(true);
            }
            Probe::Free(bucket) => {
                let packed = word.packed();
                let record_words = RECORD_HEAD + halves(packed.len() as u64).1;
                let Some(record) = self.allocate(record_words + 2) else { return Ok(false) };
                let chunk = record + record_words;
                self.memory.store(record + 1, describe(word.len_bytes(), 1, 1))?;
                self.memory.store(record + 2, pair(chunk, chunk + 1))?;
                for (at, packed) in (record + RECORD_HEAD..).zip(packed) {
                    self.memory.store(at, *packed)?;
                }
                self.memory.store(chunk + 1, posting.pack())?;
                self.memory.store(bucket, pair(halves(word.hash()).0, record))?;
                self.header.words += 1;
                self.header.postings += 1;
            }
        }
        self.header.occurrences += 1;
        Ok(true)
    }

    fn add_occurrence(&mut self, record: u32, posting: Posting) -> Result<bool, IndexError> {
        let (high, occurrences) = self.memory.load_pair(record + 1)?;
        let (len_bytes, mut documents) = ((high >> 24) as usize, high & 0xff_ffff);
        let (first_chunk, last) = self.memory.load_pair(record + 2)?;
        let mut previous = Posting::unpack(self.memory.load(last)?);
        if previous.document == posting.document {
            previous.occurrences = (previous.occurrences + 1).min(MAX_OCCURRENCES);
            self.memory.store(last, previous.pack())?;
        } else {
            let at = if let Some(capacity) = chunk_due(documents) {
                let Some(chunk) = self.allocate(1 + capacity) else { return Ok(false) };
                // The last posting ends the last chunk, which says how long that is.
                let full = chunk_before(documents);
                self.memory.store(last - full, u64::from(chunk))?;
                chunk + 1
            } else {
                last + 1
            };
            self.memory.store(at, posting.pack())?;
            self.memory.store(record + 2, pair(first_chunk, at))?;
            self.header.postings += 1;
            documents += 1;
        }
        self.memory.store(record + 1, describe(len_bytes, documents, occurrences.saturating_add(1)))?;
        Ok(true)
    }

    fn documents(&self, record: u32) -> Result<u32, IndexError> {
        Ok(self.memory.load_pair(record + 1)?.0 & 0xff_ffff)
    }

    fn allocate(&mut self, words: u32) -> Option<u32> {
        let end = self.header.heap_end + u64::from(words);
        let start = u32::try_from(self.header.heap_end).ok().filter(|_| end <= self.header.size_words)?;
        self.header.heap_end = end;
        Some(start)
    }
}

/// A record's second word.
fn describe(len_bytes: usize, documents: u32, occurrences: u32) -> u64 {
    (len_bytes as u64) << 56 | pair(documents, occurrences)
}

/// The capacity of the chunk that must follow `postings` of them, if the chunks so far are full. Capacities 1, 2, 4 and so on are
/// full after `2^n - 1` postings, and from [`MAX_CHUNK`] on all are as long.
fn chunk_due(postings: u32) -> Option<u32> {
    let grown = MAX_CHUNK * 2 - 1;
    if postings < grown {
        (postings + 1).is_power_of_two().then_some(postings + 1)
    } else {
        (postings - grown).is_multiple_of(MAX_CHUNK).then_some(MAX_CHUNK)
    }
}

/// The capacity of the last chunk when `postings` fill all chunks.
fn chunk_before(postings: u32) -> u32 {
    postings.div_ceil(2).min(MAX_CHUNK)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn region() -> Region {
        Region::builder().size(1 << 20).open().unwrap()
    }

    /// Texts with words of every frequency: word `n` is in every `n`-th document, up to `n` times.
    fn text(document: u32) -> String {
        let times = |n: u32| (document / n % n + 1) as usize;
        let words: String =
            (1..40).filter(|n| document.is_multiple_of(*n)).map(|n| format!("word{n}x ").repeat(times(n))).collect();
        words + &"often ".repeat(if document == 3 { 300 } else { 0 })
    }

    type Model = HashMap<String, Vec<(u32, u32, u32)>>;

    /// What the index must say, computed from the same texts with the standard library.
    fn model(texts: &[String]) -> Model {
        let mut model = Model::new();
        for (document, text) in (0..).zip(texts) {
            let mut at = 0;
            for word in text.split(' ') {
                if word.len() >= 2 {
                    let postings = model.entry(word.to_owned()).or_default();
                    match postings.last_mut() {
                        Some((last, occurrences, _)) if *last == document => *occurrences = (*occurrences + 1).min(255),
                        _ => postings.push((document, 1, at)),
                    }
                }
                at += u32::try_from(word.len()).unwrap() + 1;
            }
        }
        model
    }

    fn postings(index: &Index, word: &str) -> Vec<Posting> {
        let (_, word) = words(word.as_bytes()).next().unwrap();
        let Some(record) = index.find(&word).unwrap() else { return Vec::new() };
        assert_eq!(index.facts(record).unwrap().word, word);
        let mut postings = index.postings(record).unwrap();
        std::iter::from_fn(|| postings.advance().unwrap()).collect()
    }

    #[test]
    fn the_index_says_what_a_hash_map_says_and_so_does_its_copy() {
        let texts: Vec<String> = (0..1100).map(text).collect();
        let (original, copy) = (region(), region());
        let mut builder = Builder::new(&original).unwrap();
        for (number, text) in texts.iter().enumerate() {
            assert!(builder.add(&format!("/file/{number}"), 7, text.as_bytes()).unwrap(), "the texts fit");
        }
        builder.finish().unwrap();
        let mut bytes = vec![0; original.len()];
        original.read_at(0, &mut bytes).unwrap();
        copy.write_at(0, &bytes).unwrap();
        let model = model(&texts);
        for index in [Index::attach(&original).unwrap(), Index::attach(&copy).unwrap()] {
            assert_eq!(index.header().words, model.len() as u64);
            assert_eq!(index.header().postings, model.values().map(|list| list.len() as u64).sum::<u64>());
            for (word, expected) in &model {
                let found = postings(&index, word);
                assert_eq!(found.len(), expected.len(), "{word}");
                for (posting, (document, occurrences, first)) in found.iter().zip(expected) {
                    assert_eq!(index.path(posting.document).unwrap(), (format!("/file/{document}"), 7));
                    assert_eq!((posting.occurrences, posting.first), (*occurrences, *first), "{word} in {document}");
                    let mut stored = vec![0; 1 << 16];
                    let len = index.text(posting.document, 0, &mut stored).unwrap();
                    assert_eq!(&stored[..len], texts[*document as usize].as_bytes());
                }
            }
            assert!(postings(&index, "absent").is_empty());
            let frequencies: Vec<u32> =
                (0..index.ranked()).map(|rank| index.facts(index.at_rank(rank).unwrap()).unwrap().documents).collect();
            assert!(frequencies.is_sorted_by(|a, b| a >= b) && frequencies[0] <= 1100 / 8);
            assert!(index.at_rank(index.ranked()).is_err());
        }
    }

    #[test]
    fn a_full_index_is_cut_at_a_word_and_is_full() {
        let region = region();
        let mut builder = Builder::new(&region).unwrap();
        let mut documents = 0;
        while builder.add("p", 0, format!("common unique{documents}x ").repeat(200).as_bytes()).unwrap() {
            documents += 1;
        }
        let index = builder.finish().unwrap();
        assert!(index.header().used_bytes() > region.size_bytes() * 99 / 100, "{:?}", index.header());
        let (first, last) = (postings(&index, "common")[0], *postings(&index, "common").last().unwrap());
        assert_eq!(first.occurrences, 200);
        let mut text = [0; 1 << 14];
        let len = index.text(last.document, 0, &mut text).unwrap();
        let in_text = words(&text[..len]).filter(|(_, word)| word.to_string() == "common").count();
        assert_eq!(in_text, last.occurrences as usize, "every word before the cut is indexed, none after");
    }

    #[test]
    fn a_full_table_refuses_new_words_only() {
        let region = region();
        let mut builder = Builder::new(&region).unwrap();
        let most = builder.header.buckets / 4 * 3;
        let text: String = (0..most + 100).map(|n| format!("w{n} ")).collect();
        assert!(text.as_bytes().chunks(1 << 13).all(|piece| builder.add("p", 0, piece).unwrap()));
        assert!(builder.header.unindexed >= 10 && builder.header.words == most);
        assert!(builder.add("p", 0, b"w1 w1").unwrap());
        assert_eq!(postings(&builder.finish().unwrap(), "w1").len(), 2);
    }

    #[test]
    fn what_is_no_index_or_a_damaged_one_is_refused() {
        let region = region();
        assert!(matches!(Index::attach(&region), Err(IndexError::NotAnIndex { found: 0 })));
        assert!(matches!(Builder::new(&region).unwrap().finish(), Err(IndexError::Empty)));
        let mut builder = Builder::new(&region).unwrap();
        builder.add("p", 0, b"some words").unwrap();
        let index = builder.finish().unwrap();
        let record = index.at_rank(0).unwrap();
        let (chunk, _) = index.memory.load_pair(record.0 + 2).unwrap();
        index.memory.store(chunk + 1, 0).unwrap();
        assert!(matches!(index.postings(record).unwrap().advance(), Err(IndexError::Damaged { what: "an empty posting", .. })));
        index.memory.store(record.0 + 1, u64::MAX).unwrap();
        assert!(matches!(index.postings(record), Err(IndexError::Damaged { what: "a record", .. })));
        index.memory.store(1, index.memory.count() + 1).unwrap();
        assert!(matches!(Index::attach(&region), Err(IndexError::Damaged { what: "the header", .. })));
    }

    #[test]
    fn chunks_follow_each_other_without_gaps() {
        let (mut full_after, mut capacity) = (0, 1);
        for _ in 0..20 {
            full_after += capacity;
            assert_eq!(chunk_before(full_after), capacity);
            capacity = (capacity * 2).min(MAX_CHUNK);
            assert_eq!(chunk_due(full_after), Some(capacity));
            assert!((full_after + 1..full_after + capacity).all(|postings| chunk_due(postings).is_none()));
        }
    }
}
