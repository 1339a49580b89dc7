//! Answers queries of one or two words.
//!
//! Role: the work of the load: postings, scores, a snippet of the best document. Neighbours: `load` asks; reads `index` only.
//! Invariants: integers only, so every host answers alike; an answer is checked against the text it points to, so a wrong page of
//! postings or text does not pass as an answer.

use crate::{
    index::{Index, IndexError, Posting, Postings, Record},
    word::words,
};

/// Bytes of text shown of the best document: the longest word and some of what follows.
const SNIPPET_BYTES: usize = 96;

/// What a query found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Documents that hold all words.
    pub matches: u32,
    /// The one with the highest score, the oldest of equals.
    pub best: Option<Hit>,
}

/// The best document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    pub document: u32,
    pub score: u64,
    snippet: [u8; SNIPPET_BYTES],
    snippet_bytes: usize,
}

impl Hit {
    /// The text from the first occurrence of the first word on.
    pub fn snippet(&self) -> &[u8] {
        &self.snippet[..self.snippet_bytes]
    }
}

/// Finds the documents that hold a word, or both of two words.
///
/// # Errors
/// [`IndexError::Damaged`], also when the text does not hold the word where its posting says.
pub fn search(index: &Index, first: Record, second: Option<Record>) -> Result<Answer, IndexError> {
    let mut tally = Tally::default();
    let weight = weight(index, first)?;
    let mut postings = index.postings(first)?;
    match second {
        None => {
            while let Some(posting) = postings.advance()? {
                tally.add(posting, score(posting, weight));
            }
        }
        Some(second) => {
            let second_weight = self::weight(index, second)?;
            let mut pairs = Both { left: postings, right: index.postings(second)? };
            while let Some((left, right)) = pairs.advance()? {
                tally.add(left, score(left, weight) + score(right, second_weight));
            }
        }
    }
    let Some((best, score)) = tally.best else { return Ok(Answer { matches: 0, best: None }) };
    let mut snippet = [0; SNIPPET_BYTES];
    let snippet_bytes = index.text(best.document, best.first, &mut snippet)?;
    let word = index.facts(first)?.word;
    if words(&snippet[..snippet_bytes]).next() != Some((0, word)) {
        return Err(IndexError::Damaged { what: "a text without its word in the document", at: best.document.into() });
    }
    Ok(Answer { matches: tally.matches, best: Some(Hit { document: best.document, score, snippet, snippet_bytes }) })
}

/// Answers a person's question of one or two words with two lines: in how many documents it is and in which best; that one's text.
///
/// # Errors
/// As for [`search`].
pub fn tell(index: &Index, question: &str) -> Result<String, IndexError> {
    let mut records = Vec::new();
    for (_, word) in words(question.as_bytes()).take(2) {
        match index.find(&word)? {
            Some(record) => records.push(record),
            None => return Ok(format!("\"{word}\" is in no document")),
        }
    }
    let Some(&first) = records.first() else { return Ok(format!("\"{question}\" holds no word")) };
    let answer = search(index, first, records.get(1).copied())?;
    let Some(best) = answer.best else { return Ok(format!("\"{question}\" is in no document")) };
    let (path, start) = index.path(best.document)?;
    let snippet = String::from_utf8_lossy(best.snippet());
    let snippet: Vec<&str> = snippet.split_whitespace().collect();
    Ok(format!("\"{question}\" is in {} documents, best in {path} from byte {start}:\n{}", answer.matches, snippet.join(" ")))
}

/// A rare word says more than a common one: the logarithm of its rarity.
fn weight(index: &Index, record: Record) -> Result<u64, IndexError> {
    let documents = u64::from(index.facts(record)?.documents).max(1);
    Ok(u64::from((index.header().documents / documents).max(1).ilog2()) + 1)
}

/// Further occurrences say less and less: `n / (n + 1)`, in thousandths.
fn score(posting: Posting, weight: u64) -> u64 {
    let occurrences = u64::from(posting.occurrences);
    weight * 1000 * occurrences / (occurrences + 1)
}

#[derive(Default)]
struct Tally {
    matches: u32,
    best: Option<(Posting, u64)>,
}

impl Tally {
    fn add(&mut self, posting: Posting, score: u64) {
        self.matches += 1;
        if self.best.is_none_or(|(_, best)| score > best) {
            self.best = Some((posting, score));
        }
    }
}

/// The postings that two words have in common.
struct Both<'r> {
    left: Postings<'r>,
    right: Postings<'r>,
}

impl Both<'_> {
    fn advance(&mut self) -> Result<Option<(Posting, Posting)>, IndexError> {
        let (mut left, mut right) = (self.left.advance()?, self.right.advance()?);
        while let (Some(a), Some(b)) = (left, right) {
            match a.document.cmp(&b.document) {
                std::cmp::Ordering::Equal => return Ok(Some((a, b))),
                std::cmp::Ordering::Less => left = self.left.advance()?,
                std::cmp::Ordering::Greater => right = self.right.advance()?,
            }
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::build::Builder;
    use pageferry::Region;

    #[test]
    fn an_answer_names_the_documents_with_all_words_and_shows_the_best() {
        let region = Region::builder().size(1 << 20).open().unwrap();
        let mut builder = Builder::new(&region).unwrap();
        let texts = ["lamb", "some Sheep, lamb", "grass", "sheep", "sheep lamb sheep lamb grass", "LAMB sheep Lamb sheep"];
        for (name, text) in ('a'..).zip(texts) {
            builder.add(&name.to_string(), 0, text.as_bytes()).unwrap();
        }
        let index = builder.finish().unwrap();
        let record = |word: &str| index.find(&words(word.as_bytes()).next().unwrap().1).unwrap().unwrap();
        let ask = |first: &str, second: Option<&str>| {
            let answer = search(&index, record(first), second.map(record)).unwrap();
            let best = answer.best.map(|hit| {
                let (path, _) = index.path(hit.document).unwrap();
                (path, String::from_utf8(hit.snippet().to_vec()).unwrap())
            });
            (answer.matches, best.unwrap_or_default())
        };
        let told = |path: &str, snippet: &str| (path.to_owned(), snippet.to_owned());
        assert_eq!(ask("grass", None), (2, told("c", "grass")));
        assert_eq!(ask("sheep", Some("lamb")), (3, told("e", "sheep lamb sheep lamb grass")));
        assert_eq!(ask("lamb", Some("sheep")), (3, told("e", "lamb sheep lamb grass")));
        assert_eq!(ask("some", Some("grass")), (0, told("", "")));
        assert_eq!(ask("some", Some("lamb")), (1, told("b", "some Sheep, lamb")));

        let told = tell(&index, "Grass, sheep").unwrap();
        assert_eq!(told, "\"Grass, sheep\" is in 1 documents, best in e from byte 0:\ngrass");
        assert!(tell(&index, "wolf lamb").unwrap().starts_with("\"wolf\" is in no"));

        // A page of zeros where the text was: the answer is refused.
        let text_offset = u64::from(index.postings(record("some")).unwrap().advance().unwrap().unwrap().document + 3) * 8;
        region.write_at(text_offset, &[0; 16]).unwrap();
        assert!(matches!(search(&index, record("some"), None), Err(IndexError::Damaged { .. })));
    }
}
