//! Replays the inputs that the fuzzers start from, so that a plain `cargo test` notices what they would.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

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

/// Name, settings and events.
type Seed = (&'static str, [u8; 3], &'static [[u8; 4]]);

/// The seeds of `pager_ops`: which part, two settings, and its events (`src/pager/model.rs`).
const PAGER_OPS: &[Seed] = &[
    ("core_neighbours_come_behind", [2, 3, 8], &[[FAULT, 5, 0, 0], [FAULT, 5, 0, 0], [REPLY, 0, 0, 0], [FAULT, 5, 0, 0]]),
    ("core_faults_beyond_the_bound", [2, 0, 0], &[[FAULT, 1, 0, 0], [FAULT, 2, 0, 0], [FAULT, 3, 0, 0], [REPLY, 0, 0, 0]]),
    ("core_discard_in_flight", [2, 0, 8], &[[FAULT, 3, 0, 0], [DISCARD, 3, 1, 0], [REPLY, 0, 0, 0], [FAULT, 3, 0, 0]]),
    ("core_install_put_off", [2, 0, 8], &[[FAULT, 3, 0, 0], [REPLY, 0, 0, 1], [FAULT, 3, 0, 0], [SETTLE, 0, 0, 0]]),
    ("core_zeros_put_off", [2, 0, 8], &[[DISCARD, 4, 1, 0], [FAULT, 4, 0, 1], [DISCARD, 4, 1, 0], [SETTLE, 0, 0, 0]]),
    ("core_neighbours_fail", [2, 3, 8], &[[FAULT, 9, 0, 0], [FAULT, 8, 0, 0], [FORGET, 0, 0, 0]]),
    ("core_given_up", [2, 0, 8], &[[FAULT, 9, 0, 0], [FAULT, 7, 0, 0], [GIVE_UP, 0, 0, 0], [FAULT, 9, 0, 0], [LOSE, 5, 4, 0]]),
    ("core_pull_beside_demand", [2, 0, 1], &[[FAULT, 3, 0, 0], [PULLED, 1, 5, 1], [POPULATE, 0, 5, 0], [REPLY, 0, 0, 0]]),
    ("residency", [0, 10, 90], &[[0, 0, 40, 0], [1, 5, 9, 0], [2, 20, 40, 0], [3, 60, 10, 0], [4, 100, 40, 0], [0, 50, 40, 0]]),
    ("addresses", [1, 0, 0], &[[0, 5, 3, 0], [1, 10, 4, 30], [1, 28, 8, 50], [0, 49, 3, 0]]),
];
const FAULT: u8 = 0;
const REPLY: u8 = 6;
const SETTLE: u8 = 12;
const FORGET: u8 = 13;
const GIVE_UP: u8 = 14;
const PULLED: u8 = 15;
const DISCARD: u8 = 16;
const LOSE: u8 = 18;
const POPULATE: u8 = 19;

#[test]
fn the_seeds_of_pager_ops_hold_and_together_reach_every_event_and_decision() {
    let seeds: BTreeMap<String, Vec<u8>> = corpus("pager_ops").into_iter().collect();
    let mut seen = BTreeSet::new();
    for (name, settings, events) in PAGER_OPS {
        let bytes = [&settings[..], events.as_flattened()].concat();
        assert_eq!(seeds.get(*name), Some(&bytes), "{name} differs: run write_the_seeds_of_pager_ops, see fuzz/README.md");
        seen.extend(pageferry::fuzzing::pager_ops(&bytes).unwrap_or_else(|broken| panic!("{name}: {broken}")));
    }
    assert_eq!(seeds.len(), PAGER_OPS.len(), "a file that this table does not have");
    let core = [
        "around",
        "ask",
        "discard",
        "forget",
        "give up",
        "joined",
        "lose",
        "populate",
        "pulled",
        "put off",
        "queued",
        "reply",
        "settle",
        "touched again",
        "wake",
        "zero",
    ];
    let others = ["ask", "discard", "install", "lose", "unask"].map(|name| format!("residency: {name}"));
    let others = others.into_iter().chain(["move", "unmap"].map(|name| format!("addresses: {name}")));
    let expected: BTreeSet<String> = core.into_iter().map(str::to_owned).chain(others).collect();
    assert_eq!(seen.into_iter().map(str::to_owned).collect::<BTreeSet<_>>(), expected);
}

/// Each seed with each of its bytes changed.
#[test]
fn no_seed_of_pager_ops_breaks_with_one_byte_changed() {
    for (file, bytes) in corpus("pager_ops") {
        for at in 0..bytes.len() {
            // 13 has no divisor in common with the number of kinds, 20, so each kind of event has its turn.
            for to in (0..=u8::MAX).step_by(13) {
                let mut bytes = bytes.clone();
                bytes[at] = to;
                let result = pageferry::fuzzing::pager_ops(&bytes);
                assert!(result.is_ok(), "{file}, byte {at} = {to}: {result:?}");
            }
        }
    }
}

#[test]
#[ignore = "writes fuzz/corpus/pager_ops"]
fn write_the_seeds_of_pager_ops() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/pager_ops");
    fs::create_dir_all(&folder).unwrap();
    for (name, settings, events) in PAGER_OPS {
        fs::write(folder.join(name), [&settings[..], events.as_flattened()].concat()).unwrap();
    }
}
