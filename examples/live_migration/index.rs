//! An inverted word index laid out in a region: nothing outside the region is needed to read it.
//!
//! Role: the layout, and its reading. Neighbours: `build` fills it, `search` answers from it, `ledger` counts in it. Invariants:
//! every reference is an index of a 64-bit word from the start of the region, so the region may lie at any address of any process;
//! after the build only query counters and the ledger change; nothing read from the region is trusted to lie inside it.
//!
//! | from | what |
//! | --- | --- |
//! | word 0 | header: the magic word (written last), then [`Header`] |
//! | word 512 | ledger: [`MAX_WORKERS`] slots of [`SLOT_WORDS`] words, a cache line each |
//! | word 1024 | hash table, open addressing, linear probing: `hash >> 32`, then the record, 32 bits each; 0 is free |
//! | `ranks_start` | records of the words that are queried, from the most frequent on |
//! | `heap_start` | records, chunks of postings and documents, as they came |
//!
//! A record: query counter; length (8 bits), documents (24), occurrences (32); first chunk (32), last posting (32); the packed
//! word. A chunk: the next one, then its postings: 1, 2, 4 and so on up to 256. A posting: document (32 bits), occurrences (8,
//! saturating), first occurrence (24). A document: lengths of path and text (32 bits each); where in the file it starts; path;
//! text.

use crate::word::{Word, packed_words};
use pageferry::{Region, RegionError};
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed};
use thiserror::Error;

const MAGIC: u64 = u64::from_le_bytes(*b"pfindex1");
pub(crate) const LEDGER_START: u32 = 512;
pub(crate) const TABLE_START: u32 = 1024;
/// Words of a record before the packed word.
pub(crate) const RECORD_HEAD: u32 = 3;
/// Words of a document before its path.
pub(crate) const DOCUMENT_HEAD: u32 = 2;
pub(crate) const MAX_CHUNK: u32 = 256;
/// Slots of the ledger, so the most threads that may query.
pub const MAX_WORKERS: usize = 64;
/// Words of a slot of the ledger.
pub const SLOT_WORDS: usize = 8;

/// An index could not be built or read.
#[derive(Debug, Error)]
pub enum IndexError {
    #[error("the region holds no finished index: it starts with {found:#x}")]
    NotAnIndex { found: u64 },
    #[error("the index is damaged: {what} at word {at}")]
    Damaged { what: &'static str, at: u64 },
    #[error("a region of {size_bytes} bytes cannot hold an index: allowed are 1 MiB to 32 GiB")]
    Size { size_bytes: u64 },
    #[error("no word to query: the documents hold none; point the corpus at a directory with texts")]
    Empty,
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// The region as words, with checked access.
#[derive(Clone, Copy)]
pub(crate) struct Memory<'r> {
    pub(crate) region: &'r Region,
    words: &'r [AtomicU64],
}

impl<'r> Memory<'r> {
    pub(crate) fn of(region: &'r Region) -> Result<Memory<'r>, IndexError> {
        let size = IndexError::Size { size_bytes: region.size_bytes() };
        if !(1 << 20..=8 << 32).contains(&region.size_bytes()) {
            return Err(size);
        }
        let count = usize::try_from(region.size_bytes() / 8).map_err(|_| size)?;
        Ok(Memory { region, words: region.atomics_u64(0, count)? })
    }

    pub(crate) fn count(&self) -> u64 {
        self.words.len() as u64
    }

    pub(crate) fn at(&self, at: u32) -> Result<&'r AtomicU64, IndexError> {
        self.words.get(at as usize).ok_or(IndexError::Damaged { what: "a reference past the region", at: at.into() })
    }

    pub(crate) fn load(&self, at: u32) -> Result<u64, IndexError> {
        Ok(self.at(at)?.load(Relaxed))
    }

    pub(crate) fn store(&self, at: u32, value: u64) -> Result<(), IndexError> {
        self.at(at)?.store(value, Relaxed);
        Ok(())
    }

    /// Two 32-bit halves, the high one first.
    pub(crate) fn load_pair(&self, at: u32) -> Result<(u32, u32), IndexError> {
        Ok(halves(self.load(at)?))
    }
}

/// The high and the low 32 bits.
#[allow(clippy::cast_possible_truncation, reason = "halves are meant")]
pub(crate) fn halves(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

pub(crate) fn pair(high: u32, low: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

macro_rules! header {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// What the header tells, each a word of its own.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Header { $($(#[$doc])* pub $name: u64,)* }

        impl Header {
            fn load(memory: &Memory) -> Result<Header, IndexError> {
                let mut at = 0;
                $(at += 1; let $name = memory.load(at)?;)*
                Ok(Header { $($name),* })
            }

            fn store(&self, memory: &Memory) -> Result<(), IndexError> {
                let mut at = 0;
                $(at += 1; memory.store(at, self.$name)?;)*
                Ok(())
            }
        }
    };
}

header! {
    /// Words of the region: an index moves only into a region of the same size.
    size_words,
    /// Buckets of the hash table, a power of two.
    buckets,
    /// First word of the ranks.
    ranks_start,
    /// Words that are queried.
    ranked,
    /// First word of the heap.
    heap_start,
    /// First unused word of the heap.
    heap_end,
    /// Documents stored.
    documents,
    /// Different words indexed.
    words,
    /// Pairs of a word and a document it is in.
    postings,
    /// Occurrences of all indexed words.
    occurrences,
    /// Bytes of the documents' texts.
    text_bytes,
    /// Occurrences of words that came when the hash table was full.
    unindexed,
}

impl Header {
    /// Bytes of the region that hold something: all but the unused end of the heap.
    pub fn used_bytes(&self) -> u64 {
        self.heap_end * 8
    }

    pub(crate) fn publish(&self, memory: &Memory) -> Result<(), IndexError> {
        self.store(memory)?;
        memory.at(0)?.store(MAGIC, std::sync::atomic::Ordering::Release);
        Ok(())
    }

    fn check(self, memory: &Memory) -> Result<Header, IndexError> {
        let ends = [u64::from(TABLE_START), self.ranks_start, self.heap_start, self.heap_end, self.size_words];
        let table_fits = u64::from(TABLE_START).checked_add(self.buckets) == Some(self.ranks_start);
        let ranks_fit = self.ranks_start.checked_add(self.ranked).is_some_and(|end| end <= self.heap_start);
        let sound =
            ends.is_sorted() && self.size_words == memory.count() && self.buckets.is_power_of_two() && table_fits && ranks_fit;
        if sound && self.ranked > 0 { Ok(self) } else { Err(IndexError::Damaged { what: "the header", at: 1 }) }
    }
}

/// A word's entry in the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Record(pub(crate) u32);

/// What is known of a word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Facts {
    pub word: Word,
    pub documents: u32,
    pub occurrences: u32,
}

/// A word in one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Posting {
    /// Refers to the document; later documents have greater ones.
    pub document: u32,
    /// At most 255.
    pub occurrences: u32,
    /// Byte of the text where the first occurrence starts.
    pub first: u32,
}

impl Posting {
    pub(crate) fn pack(self) -> u64 {
        pair(self.document, self.occurrences << 24 | self.first)
    }

    pub(crate) fn unpack(word: u64) -> Posting {
        let (document, rest) = halves(word);
        Posting { document, occurrences: rest >> 24, first: rest & 0xff_ffff }
    }
}

/// A finished index. Cheap to copy; any number of threads may use it.
#[derive(Clone, Copy)]
pub struct Index<'r> {
    pub(crate) memory: Memory<'r>,
    header: Header,
}

impl<'r> Index<'r> {
    /// Finds the index in a region that was filled here or anywhere else. Touches the first page only.
    ///
    /// # Errors
    /// [`IndexError::NotAnIndex`], [`IndexError::Damaged`], [`IndexError::Size`].
    pub fn attach(region: &'r Region) -> Result<Index<'r>, IndexError> {
        let memory = Memory::of(region)?;
        let found = memory.at(0)?.load(Acquire);
        if found != MAGIC {
            return Err(IndexError::NotAnIndex { found });
        }
        Ok(Index { memory, header: Header::load(&memory)?.check(&memory)? })
    }

    pub fn header(&self) -> &Header {
        &self.header
    }

    /// How many words are queried, at least 1.
    pub fn ranked(&self) -> u32 {
        u32::try_from(self.header.ranked).unwrap_or(u32::MAX)
    }

    /// The word of a rank: 0 is the most frequent.
    ///
    /// # Errors
    /// [`IndexError::Damaged`], also for a rank that there is not.
    pub fn at_rank(&self, rank: u32) -> Result<Record, IndexError> {
        let damaged = IndexError::Damaged { what: "no such rank", at: rank.into() };
        if u64::from(rank) >= self.header.ranked {
            return Err(damaged);
        }
        let at = self.header.ranks_start + u64::from(rank);
        let (_, record) = self.memory.load_pair(u32::try_from(at).map_err(|_| damaged)?)?;
        if u64::from(record) < self.header.heap_start {
            return Err(IndexError::Damaged { what: "an empty rank", at });
        }
        Ok(Record(record))
    }

    /// Looks a word up in the hash table.
    ///
    /// # Errors
    /// [`IndexError::Damaged`].
    pub fn find(&self, word: &Word) -> Result<Option<Record>, IndexError> {
        match probe(&self.memory, self.header.buckets, word)? {
            Probe::Found(record) => Ok(Some(record)),
            Probe::Free(_) => Ok(None),
        }
    }

    pub fn facts(&self, record: Record) -> Result<Facts, IndexError> {
        facts(&self.memory, record)
    }

    /// The counter of a word's queries: the part of the index that changes.
    pub fn queries(&self, record: Record) -> Result<&'r AtomicU64, IndexError> {
        self.memory.at(record.0)
    }

    /// A worker's slot of the ledger: [`SLOT_WORDS`] words.
    ///
    /// # Errors
    /// [`RegionError::OutOfRange`] is impossible for fewer than [`MAX_WORKERS`]; [`IndexError::Damaged`] for more.
    pub fn slot(&self, worker: usize) -> Result<&'r [AtomicU64], IndexError> {
        if worker >= MAX_WORKERS {
            return Err(IndexError::Damaged { what: "no such slot of the ledger", at: worker as u64 });
        }
        let offset = (u64::from(LEDGER_START) + (worker * SLOT_WORDS) as u64) * 8;
        Ok(self.memory.region.atomics_u64(offset, SLOT_WORDS)?)
    }

    /// The documents a word is in, oldest first.
    pub fn postings(&self, record: Record) -> Result<Postings<'r>, IndexError> {
        let left = facts(&self.memory, record)?.documents;
        let (chunk, _) = self.memory.load_pair(record.0.saturating_add(2))?;
        Ok(Postings { memory: self.memory, left, chunk, capacity: 1, passed: 0 })
    }

    /// A document's path and where in that file its text starts.
    pub fn path(&self, document: u32) -> Result<(String, u64), IndexError> {
        let (path_bytes, _) = self.memory.load_pair(document)?;
        let start = self.memory.load(document.saturating_add(1))?;
        let mut path = vec![0; path_bytes.min(4096) as usize];
        self.memory.region.read_at((u64::from(document) + u64::from(DOCUMENT_HEAD)) * 8, &mut path)?;
        Ok((String::from_utf8_lossy(&path).into_owned(), start))
    }

    /// Copies text of a document from byte `from` on; returns how much there was.
    pub fn text(&self, document: u32, from: u32, into: &mut [u8]) -> Result<usize, IndexError> {
        let (path_bytes, text_bytes) = self.memory.load_pair(document)?;
        let len = into.len().min(text_bytes.saturating_sub(from) as usize);
        let start = (u64::from(document) + u64::from(DOCUMENT_HEAD) + u64::from(path_bytes.div_ceil(8))) * 8;
        self.memory.region.read_at(start + u64::from(from), &mut into[..len])?;
        Ok(len)
    }
}

/// The postings of one word, see [`Index::postings`].
pub struct Postings<'r> {
    memory: Memory<'r>,
    left: u32,
    chunk: u32,
    capacity: u32,
    passed: u32,
}

impl Postings<'_> {
    /// The next one. Not an `Iterator`: a damaged index ends the walk with an error.
    ///
    /// # Errors
    /// [`IndexError::Damaged`].
    pub fn advance(&mut self) -> Result<Option<Posting>, IndexError> {
        if self.left == 0 {
            return Ok(None);
        }
        if self.passed == self.capacity {
            (_, self.chunk) = self.memory.load_pair(self.chunk)?;
            (self.passed, self.capacity) = (0, (self.capacity * 2).min(MAX_CHUNK));
        }
        let at = self.chunk.saturating_add(1 + self.passed);
        let posting = Posting::unpack(self.memory.load(at)?);
        if posting.document == 0 {
            return Err(IndexError::Damaged { what: "an empty posting", at: at.into() });
        }
        self.passed += 1;
        self.left -= 1;
        Ok(Some(posting))
    }
}

/// What a probe of the hash table met first.
pub(crate) enum Probe {
    Found(Record),
    /// The bucket in which the word would be.
    Free(u32),
}

pub(crate) fn probe(memory: &Memory, buckets: u64, word: &Word) -> Result<Probe, IndexError> {
    let hash = word.hash();
    let (tag, _) = halves(hash);
    let mut bucket = hash & (buckets - 1);
    for _ in 0..buckets {
        let (_, at) = halves(u64::from(TABLE_START) + bucket);
        let entry = memory.load(at)?;
        let (found, record) = halves(entry);
        if entry == 0 {
            return Ok(Probe::Free(at));
        }
        if found == tag && facts(memory, Record(record))?.word == *word {
            return Ok(Probe::Found(Record(record)));
        }
        bucket = (bucket + 1) & (buckets - 1);
    }
    Err(IndexError::Damaged { what: "a full hash table", at: TABLE_START.into() })
}

fn facts(memory: &Memory, record: Record) -> Result<Facts, IndexError> {
    let (high, occurrences) = memory.load_pair(record.0.saturating_add(1))?;
    let (len_bytes, documents) = ((high >> 24) as usize, high & 0xff_ffff);
    let mut packed = [0; 4];
    let damaged = IndexError::Damaged { what: "a record", at: record.0.into() };
    let Some(packed) = packed.get_mut(..packed_words(len_bytes)) else { return Err(damaged) };
    for (at, packed) in (record.0.saturating_add(RECORD_HEAD)..).zip(packed.iter_mut()) {
        *packed = memory.load(at)?;
    }
    let word = Word::from_packed(packed, len_bytes).ok_or(damaged)?;
    Ok(Facts { word, documents, occurrences })
}
