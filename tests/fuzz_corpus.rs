//! Replays the inputs that the fuzzers start from, so that a plain `cargo test` notices what they would.

use std::{collections::BTreeSet, fs, path::Path};

/// The seeds as (file name, content).
fn corpus(target: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    entries
        .map(|entry| {
            let path = entry.unwrap().path();
            (path.file_name().unwrap().to_string_lossy().into_owned(), fs::read(&path).unwrap())
        })
        .collect()
}

#[test]
fn every_seed_of_wire_decode_is_frames_and_together_they_have_every_kind() {
    let mut kinds = BTreeSet::new();
    for (file, bytes) in corpus("wire_decode") {
        let frames = pageferry::fuzzing::wire_decode(&bytes).unwrap_or_else(|broken| panic!("{file}: {broken}"));
        assert!(!frames.is_empty(), "{file} has no frame: run write_the_seed_corpus, see fuzz/README.md");
        kinds.extend(frames);
    }
    let protocol = include_str!("../docs/protocol.md");
    let documented: BTreeSet<&str> =
        protocol.lines().filter(|line| line.starts_with("| 0x")).filter_map(|row| row.split('|').nth(2)).map(str::trim).collect();
    assert_eq!(kinds, documented);
}

/// Each seed with each of its bytes changed: the neighbourhood a fuzzer visits first.
#[test]
fn no_seed_of_wire_decode_breaks_with_one_byte_changed() {
    for (file, bytes) in corpus("wire_decode") {
        for at in 0..bytes.len() {
            for change in [0x01, 0x80, 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] ^= change;
                let result = pageferry::fuzzing::wire_decode(&bytes);
                assert!(result.is_ok(), "{file}, byte {at} ^ {change:#x}: {result:?}");
            }
        }
    }
}
