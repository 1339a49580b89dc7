//! Text such as fills the memory of servers: log lines and JSON records.
//!
//! Role: the compressible part of the VM-like image. Neighbours: `pages` fills text pages with it. Invariants: the words of a vocabulary, their
//! Zipf frequencies and every page follow from the seed; lines run on across the end of no page.

use super::pages::Random;

const WORDS: usize = 4096;
/// How finely a word is drawn: the rarest of the words is drawn about twice in this many.
const TICKETS: usize = 1 << 16;

/// Words drawn by Zipf's law: the n-th most frequent has a share proportional to 1/n.
pub struct Vocabulary {
    words: Vec<String>,
    tickets: Vec<u16>,
}

impl Vocabulary {
    pub fn new(seed: u64) -> Vocabulary {
        const SYLLABLES: [&str; 32] = [
            "ac", "be", "con", "da", "der", "ed", "el", "er", "est", "fo", "ge", "ing", "io", "ka", "le", "li", "mo", "na", "ne",
            "or", "pa", "pre", "qu", "re", "ri", "se", "st", "ta", "ti", "un", "ver", "xi",
        ];
        let mut random = Random::new(seed, WORDS as u64);
        let mut word = || {
            let syllables = 1 + random.below(4);
            (0..syllables).map(|_| SYLLABLES[random.below(32) as usize]).collect()
        };
        let words = (0..WORDS).map(|_| word()).collect();
        let harmonic: f64 = (1..=WORDS).map(|rank| 1.0 / rank as f64).sum();
        let mut tickets = Vec::with_capacity(TICKETS);
        for rank in 0..WORDS {
            let share = TICKETS as f64 / harmonic / (rank + 1) as f64;
            tickets.extend(std::iter::repeat_n(rank as u16, (share.ceil() as usize).min(TICKETS - tickets.len())));
        }
        tickets.resize(TICKETS, 0);
        Vocabulary { words, tickets }
    }

    fn word(&self, random: &mut Random) -> &str {
        &self.words[usize::from(self.tickets[random.below(TICKETS as u64) as usize])]
    }

    /// Fills a page with lines; the last one is cut.
    pub fn fill(&self, random: &mut Random, page: &mut [u8]) {
        let mut line = String::with_capacity(page.len() + 256);
        let mut at_ms = random.below(86_400_000);
        while line.len() < page.len() {
            at_ms += random.below(40);
            self.push_line(random, at_ms, &mut line);
        }
        page.copy_from_slice(&line.as_bytes()[..page.len()]);
    }

    fn push_line(&self, random: &mut Random, at_ms: u64, line: &mut String) {
        use std::fmt::Write;
        let (hour, minute, second, ms) = (at_ms / 3_600_000 % 24, at_ms / 60_000 % 60, at_ms / 1000 % 60, at_ms % 1000);
        let level = ["INFO", "INFO", "INFO", "DEBUG", "WARN"][random.below(5) as usize];
        let (target, words) = (self.word(random), 4 + random.below(12));
        let json = random.below(2) == 0;
        // Writing to a String cannot fail.
        let _ = if json {
            let id = random.next();
            write!(
                line,
                "{{\"ts\":\"2026-11-22T{hour:02}:{minute:02}:{second:02}.{ms:03}Z\",\"level\":\"{level}\",\"target\":\"{target}\",\"id\":\"{id:016x}\",\"message\":\""
            )
        } else {
            let pid = 300 + random.below(4000);
            write!(line, "Nov 22 {hour:02}:{minute:02}:{second:02} node-7 {target}[{pid}]: {level}")
        };
        for _ in 0..words {
            line.push(' ');
            line.push_str(self.word(random));
        }
        if json {
            let _ = write!(line, "\",\"latency_us\":{}}}", random.below(20_000));
        }
        line.push('\n');
    }
}
