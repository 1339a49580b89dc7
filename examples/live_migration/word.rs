//! Words of a text, packed into integers.
//!
//! Role: one definition of what a word is, for the builder, the queries and their check of a snippet. Neighbours: `build` stores
//! packed words, `search` compares them. Invariants: a word is 2 to 32 bytes of `a-z0-9` and starts with a letter, so its packed
//! form needs no terminator and two words are equal exactly when their packed forms are.

use std::fmt;

/// Runs of letters and digits longer than this are data, not words.
pub const MAX_BYTES: usize = 32;
const MIN_BYTES: usize = 2;
const PACKED: usize = MAX_BYTES / 8;

/// The lower-case form of each byte that may be in a word, 0 for the others: one load a byte, which keeps debug builds usable.
const LOWER: [u8; 256] = {
    let mut lower = [0; 256];
    let mut byte = 0;
    while byte < 256 {
        if (byte as u8).is_ascii_alphanumeric() {
            lower[byte] = (byte as u8).to_ascii_lowercase();
        }
        byte += 1;
    }
    lower
};

/// One word, eight bytes to an integer, the first byte lowest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Word {
    packed: [u64; PACKED],
    len_bytes: usize,
}

impl Word {
    /// A word from its packed form; `None` if that many integers do not make a word of this length.
    pub fn from_packed(packed: &[u64], len_bytes: usize) -> Option<Word> {
        let mut word = Word { packed: [0; PACKED], len_bytes };
        let allowed = (MIN_BYTES..=MAX_BYTES).contains(&len_bytes) && packed.len() == packed_words(len_bytes);
        word.packed.get_mut(..packed.len()).filter(|_| allowed)?.copy_from_slice(packed);
        Some(word)
    }

    pub fn packed(&self) -> &[u64] {
        &self.packed[..packed_words(self.len_bytes)]
    }

    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// A hash that is the same in every process: the table in the region is read by another one.
    pub fn hash(&self) -> u64 {
        self.packed().iter().fold(self.len_bytes as u64, |hash, packed| mix(hash ^ packed))
    }
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = self.packed.iter().flat_map(|packed| packed.to_le_bytes()).take(self.len_bytes);
        bytes.map(char::from).try_for_each(|letter| write!(f, "{letter}"))
    }
}

/// How many integers hold a word of this length.
pub fn packed_words(len_bytes: usize) -> usize {
    len_bytes.div_ceil(8)
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): every input bit reaches every output bit.
pub fn mix(value: u64) -> u64 {
    let value = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The words of a text, each with the byte at which it starts.
pub fn words(text: &[u8]) -> Words<'_> {
    Words { text, at: 0 }
}

/// See [`words`].
pub struct Words<'t> {
    text: &'t [u8],
    at: usize,
}

impl Iterator for Words<'_> {
    type Item = (usize, Word);

    fn next(&mut self) -> Option<(usize, Word)> {
        let (text, mut at) = (self.text, self.at);
        loop {
            while at < text.len() && LOWER[text[at] as usize] == 0 {
                at += 1;
            }
            if at == text.len() {
                self.at = at;
                return None;
            }
            let start = at;
            let mut packed = [0; PACKED];
            while at < text.len() && LOWER[text[at] as usize] != 0 {
                let nth = at - start;
                if nth < MAX_BYTES {
                    packed[nth / 8] |= u64::from(LOWER[text[at] as usize]) << (nth % 8 * 8);
                }
                at += 1;
            }
            let len_bytes = at - start;
            if (MIN_BYTES..=MAX_BYTES).contains(&len_bytes) && text[start].is_ascii_alphabetic() {
                self.at = at;
                return Some((start, Word { packed, len_bytes }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spelled(text: &str) -> Vec<(usize, String)> {
        words(text.as_bytes()).map(|(at, word)| (at, word.to_string())).collect()
    }

    #[test]
    fn words_are_lower_case_runs_that_start_with_a_letter() {
        let expected = [(0, "the"), (4, "u64"), (13, "of"), (18, "pages")].map(|(at, word)| (at, word.to_owned()));
        assert_eq!(spelled("The U64, 42x of a Pages"), expected);
    }

    #[test]
    fn the_length_limits_are_exact() {
        let (longest, longer) = ("a".repeat(MAX_BYTES), "a".repeat(MAX_BYTES + 1));
        assert_eq!(spelled(&format!("b {longer} {longest} bc")), [(36, longest), (69, "bc".to_owned())]);
    }

    #[test]
    fn a_packed_word_comes_back_and_a_wrong_length_does_not() {
        for text in ["ab", "abcdefgh", "abcdefghi", "abcdefghijklmnopqrstuvwxyz012345"] {
            let (_, word) = words(text.as_bytes()).next().unwrap();
            assert_eq!(Word::from_packed(word.packed(), text.len()), Some(word));
            assert_eq!(word.to_string(), text);
            assert_eq!(Word::from_packed(word.packed(), text.len() + 8), None);
        }
        assert_eq!(Word::from_packed(&[], 0), None);
    }
}
