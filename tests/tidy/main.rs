//! The test that holds the shape of the source tree: what a reviewer would otherwise have to look for in every change.
//!
//! Goal: an edge between modules that the picture in ARCHITECTURE.md forbids, an `unsafe` outside `sys`, a missing header, an overlong
//! file or a promise without a test fails here and says where. Method: a lexer that knows comments, strings and use-trees, and rules
//! that are pure functions over `(path, text)`, so that the rules themselves are tested on small wrong trees (`cases.rs`).

mod cases;
mod lexer;

use lexer::{paths, tokens, without_test_items};
use std::{collections::HashMap, fs, path::Path};

/// The vocabulary: imported by all, imports only itself.
const WORDS: &[&str] = &["page", "page_store", "error", "options", "stats", "service", "flow"];
/// Where bytes come from and go to. These do not import each other: a handle brings them together.
const IO: &[&str] = &["store", "pager", "net", "block"];
/// Decisions: (event, now) -> actions. They import words and pure neighbours in their own folder, and meet no clock and no system.
const PURE: &[&str] = &[
    "flow",
    "pager::core",
    "pager::residency",
    "pager::written",
    "pager::moment",
    "pager::around",
    "pager::budget",
    "pager::order",
    "pager::address_map",
    "pager::retry",
    "net::wire",
    "net::codec",
    "net::shape",
    "net::shaper",
    "migrate::handover",
    "migrate::owed",
    "migrate::points",
    "migrate::rounds",
    "migrate::strategy",
    "store::cache::journal",
    "store::cache::spans",
];
/// What a pure module must not name: whole crates, and paths by their beginning or end.
const IMPURE_CRATES: &[&str] = &["tokio", "quinn", "libc", "nix", "userfaultfd"];
const IMPURE_PATHS: &[&str] = &["std::fs", "std::net", "std::thread", "Instant::now", "SystemTime::now"];

const LINES_MAX: usize = 600;
const REQUIRED: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "docs/protocol.md",
    "docs/safety.md",
];
const PROMISES: std::ops::RangeInclusive<u32> = 1..=9;

/// The layers of ARCHITECTURE.md: which top-level modules `module` may import besides itself; `None` if it has no layer yet.
fn may_import(module: &str) -> Option<Vec<&'static str>> {
    Some(match module {
        "sys" => vec!["page", "error"],
        _ if WORDS.contains(&module) => WORDS.to_vec(),
        _ if IO.contains(&module) => [WORDS, &["sys"]].concat(),
        "region" => [WORDS, &["sys"], IO].concat(),
        "migrate" | "mount" => [WORDS, &["region", "net", "pager", "store"]].concat(),
        "fuzzing" => [WORDS, &["net", "pager", "migrate"]].concat(), // opens pure modules to fuzz targets
        _ => return None,
    })
}

/// A source tree: file paths relative to the root, with their text.
type Tree<'a> = HashMap<&'a str, &'a str>;

#[test]
fn the_tree_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "benches", "examples", "fuzz/fuzz_targets"] {
        read_sources(root, Path::new(folder), &mut files);
    }
    for path in REQUIRED {
        if let Ok(text) = fs::read_to_string(root.join(path)) {
            files.push(((*path).to_owned(), text));
        }
    }
    assert!(files.iter().any(|(path, _)| path == "src/lib.rs"), "the tree was not found at {}", root.display());
    let problems = problems(&files.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect());
    assert!(problems.is_empty(), "{} to mend:\n{}", problems.len(), problems.join("\n"));
}

fn read_sources(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) {
    let Ok(entries) = fs::read_dir(root.join(folder)) else { return };
    for entry in entries {
        let path = folder.join(entry.unwrap().file_name());
        if root.join(&path).is_dir() {
            read_sources(root, &path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push((path.to_str().unwrap().to_owned(), fs::read_to_string(root.join(&path)).unwrap()));
        }
    }
}

fn problems(tree: &Tree) -> Vec<String> {
    let mut problems: Vec<String> =
        REQUIRED.iter().filter(|path| !tree.contains_key(*path)).map(|path| format!("{path}: missing")).collect();
    let exports = tree.get("src/lib.rs").map(|text| exports(text)).unwrap_or_default();
    for (path, text) in tree.iter().filter(|(path, _)| path.ends_with(".rs")) {
        let lines = text.lines().count();
        if lines > LINES_MAX {
            problems.push(format!("{path}: {lines} lines, allowed are {LINES_MAX}: it holds more than one idea"));
        }
        if let Some(module) = module_of(path) {
            problems.extend(unsafe_outside_sys(path, &module, text));
            problems.extend(header(path, &module, text));
            problems.extend(edges(path, &module, text, tree, &exports));
        }
    }
    if let Some(safety) = tree.get("docs/safety.md") {
        problems.extend(promises(safety, tree));
    }
    problems.sort();
    problems
}

/// `src/net/wire.rs` -> `[net, wire]`, `src/net/mod.rs` -> `[net]`, `src/lib.rs` -> `[]`; `None` outside `src`.
fn module_of(path: &str) -> Option<Vec<&str>> {
    let mut module: Vec<&str> = path.strip_prefix("src/")?.strip_suffix(".rs")?.split('/').collect();
    module.pop_if(|last| *last == "mod" || *last == "lib");
    Some(module)
}

fn unsafe_outside_sys(path: &str, module: &[&str], text: &str) -> Vec<String> {
    let tokens = if module.first() == Some(&"sys") { vec![] } else { tokens(text) };
    let found = tokens.iter().filter(|token| token.text == "unsafe");
    found.map(|token| format!("{path}:{}: unsafe code belongs in src/sys, behind a safe function", token.line)).collect()
}

fn header(path: &str, module: &[&str], text: &str) -> Option<String> {
    let header: String = text.lines().take_while(|line| line.starts_with("//!")).collect();
    let (is_root, is_test) = (module.is_empty(), module.contains(&"tests"));
    let complete = is_root || is_test || (header.contains("Role") && header.contains("Invariants"));
    let problem = || format!("{path}:1: the file must begin with a //! header that states its Role and its Invariants");
    (!complete || (header.is_empty() && !text.starts_with("#![doc"))).then(problem)
}

/// What lib.rs re-exports: the name, and the path behind it.
fn exports(lib: &str) -> HashMap<String, Vec<String>> {
    paths(&tokens(lib)).into_iter().map(|path| (path.name, path.segments)).collect()
}

/// Every import that the picture forbids. Test code is free: a test may bring a pager and a memory store together.
fn edges(file: &str, module: &[&str], text: &str, tree: &Tree, exports: &HashMap<String, Vec<String>>) -> Vec<String> {
    let Some(&from) = module.first() else { return vec![] }; // lib.rs names everything
    if module.contains(&"tests") {
        return vec![];
    }
    let Some(allowed) = may_import(from) else {
        return vec![format!("{file}: {from} has no layer; give it one in tests/tidy/main.rs and in ARCHITECTURE.md")];
    };
    let pure = PURE.iter().find(|pure| is_within(module, pure));
    let tokens = without_test_items(tokens(text));
    let mut problems = Vec::new();
    if let Some(pure) = pure {
        for token in tokens.iter().filter(|token| IMPURE_CRATES.contains(&token.text.as_str())) {
            problems.push(format!("{file}:{}: {pure} is pure and must not name {}", token.line, token.text));
        }
    }
    for path in paths(&tokens) {
        let joined = path.segments.join("::");
        let mut report = |problem: &str| problems.push(format!("{file}:{}: {} {problem}", path.line, module.join("::")));
        if pure.is_some()
            && IMPURE_PATHS
                .iter()
                .any(|impure| joined == *impure || joined.starts_with(&format!("{impure}::")) || joined.ends_with(impure))
        {
            report(&format!("is pure and must not name {joined}; take it as an argument"));
        }
        let Some(mut target) = absolute(&path.segments, module) else { continue }; // another crate, or a name in scope
        let first = target.first().cloned().unwrap_or_default();
        if !is_module(&first, tree) {
            match exports.get(&first) {
                Some(behind) => target = behind.clone(),
                None => {
                    report(&format!("names {joined}, which is neither a module nor re-exported by name from src/lib.rs"));
                    continue;
                }
            }
        }
        let target: Vec<&str> = target.iter().map(String::as_str).collect();
        let to = target[0];
        if to != from && !allowed.contains(&to) {
            report(&format!("must not import {joined}: {from} may use {}", allowed.join(", ")));
        } else if pure.is_some() {
            let is_word = WORDS.contains(&to) && to != "service";
            if !is_word && !PURE.iter().any(|pure| is_within(&target, pure)) && !target.starts_with(module) {
                report(&format!("is pure and must not import {joined}, which is not"));
            }
        }
    }
    problems
}

fn is_within(module: &[&str], ancestor: &str) -> bool {
    let ancestor: Vec<&str> = ancestor.split("::").collect();
    module.starts_with(&ancestor)
}

fn is_module(name: &str, tree: &Tree) -> bool {
    tree.contains_key(format!("src/{name}.rs").as_str()) || tree.contains_key(format!("src/{name}/mod.rs").as_str())
}

/// The path from the crate's root, if `segments` begins with `crate`, `self` or `super` and stands in `module`.
fn absolute(segments: &[String], module: &[&str]) -> Option<Vec<String>> {
    let mut base: Vec<String> = module.iter().map(|part| (*part).to_owned()).collect();
    match segments.first()?.as_str() {
        "crate" => base.clear(),
        "self" => {}
        "super" => base.truncate(base.len() - 1),
        _ => return None,
    }
    for segment in &segments[1..] {
        match segment.as_str() {
            "super" => base.truncate(base.len().saturating_sub(1)),
            _ => base.push(segment.clone()),
        }
    }
    Some(base)
}

/// Each promise has a section in docs/safety.md that names, in backticks, a test that runs (`tests/faults.rs::discard_wins`); a promise
/// whose code is still to come says so instead.
fn promises(safety: &str, tree: &Tree) -> Vec<String> {
    let sections: Vec<&str> = safety.split("\n## ").collect();
    let mut problems = Vec::new();
    for number in PROMISES {
        let title = format!("S{number}.");
        let Some(section) = sections.iter().find(|section| section.starts_with(&title)) else {
            problems.push(format!("docs/safety.md: no section `## {title}`"));
            continue;
        };
        let quoted = section.split('`').skip(1).step_by(2);
        let references: Vec<(&str, &str)> = quoted.filter_map(|quote| quote.split_once(".rs::")).collect();
        if references.is_empty() && !section.contains("not yet exercised: arrives with ") {
            problems.push(format!("docs/safety.md: {title} names no test, so nothing holds it"));
        }
        for (stem, name) in references {
            let path = format!("{stem}.rs");
            let test = name.rsplit("::").next().unwrap_or(name);
            if !tree.get(path.as_str()).is_some_and(|text| has_test(text, test)) {
                problems.push(format!("docs/safety.md: {title} names {path}::{name}, and there is no such test that runs"));
            }
        }
    }
    problems
}

/// Whether `fn name` stands in `text` under an attribute that makes it a test, and none that ignores it.
fn has_test(text: &str, name: &str) -> bool {
    let tokens = tokens(text);
    let texts: Vec<&str> = tokens.iter().map(|token| token.text.as_str()).collect();
    texts.windows(2).enumerate().filter(|(_, pair)| *pair == ["fn", name]).any(|(at, _)| {
        let start = texts[..at].iter().rposition(|text| ["}", "{", ";"].contains(text)).map_or(0, |end| end + 1);
        texts[start..at].contains(&"test") && !texts[start..at].contains(&"ignore")
    })
}
