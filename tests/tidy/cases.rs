//! The rules, tried on trees that are right but for one thing.

use super::{HashMap, LINES_MAX, REQUIRED, lexer::*, problems};

const HEADER: &str = "//! Role: one. Neighbours: two.\n//! Invariants: three.\n";
const LIB: &str = "//! The crate.\npub use page::Extent;\npub use store::{MemoryStore as Memory, Slow};\n";

/// A small tree that breaks no rule.
fn tidy_tree() -> HashMap<String, String> {
    let mut tree: HashMap<String, String> = REQUIRED.iter().map(|path| ((*path).to_owned(), String::new())).collect();
    let promises: Vec<String> = (1..=9).map(|n| format!("\n## S{n}. A promise\nTests: `tests/kept.rs::it_holds`.\n")).collect();
    let mut add = |path: &str, text: String| tree.insert(path.to_owned(), text);
    add("docs/safety.md", promises.concat());
    add(
        "tests/kept.rs",
        "#[tokio::test(flavor = \"x\")]\nasync fn it_holds() {}\n#[test]\n#[ignore = \"slow\"]\nfn sleeps() {}\nfn helps() {}"
            .into(),
    );
    add("src/lib.rs", LIB.to_owned());
    for path in
        ["page", "error", "service", "store/mod", "pager/mod", "pager/core", "pager/residency", "net/mod", "sys/mod", "region"]
    {
        add(&format!("src/{path}.rs"), HEADER.to_owned());
    }
    tree
}

/// The problems of the tidy tree with `code` put at the end of the file at `path`.
fn with(path: &str, code: &str) -> Vec<String> {
    let mut tree = tidy_tree();
    let text = tree.entry(path.to_owned()).or_insert_with(|| HEADER.to_owned());
    text.push_str(code);
    problems_of(&tree)
}

fn problems_of(tree: &HashMap<String, String>) -> Vec<String> {
    problems(&tree.iter().map(|(path, text)| (path.as_str(), text.as_str())).collect())
}

#[track_caller]
fn assert_one(problems: &[String], expected: &str) {
    assert!(problems.len() == 1 && problems[0].contains(expected), "wanted one problem with {expected:?}, got {problems:#?}");
}

#[test]
fn a_tidy_tree_has_no_problem() {
    assert_eq!(problems_of(&tidy_tree()), Vec::<String>::new());
}

#[test]
fn edges_of_the_picture_are_allowed() {
    for (path, code) in [
        ("src/page.rs", "use crate::error::RegionError; use super::error;"),
        ("src/pager/mod.rs", "use crate::{Extent, page::PageSize, sys::{self, Mapping}}; use super::service; mod core;"),
        (
            "src/pager/core.rs",
            "use crate::{Extent, error}; use super::residency::Map; use std::time::Instant; fn f(now: Instant) {}",
        ),
        ("src/region.rs", "use crate::{net::Peer, pager::Pager, store, sys, Extent};"),
        ("src/net/mod.rs", "use tokio::net::UdpSocket; fn now() { std::time::Instant::now(); }"),
        ("src/sys/mod.rs", "use crate::page::PageSize; pub fn f() { unsafe { g() } }"),
        ("src/pager/core.rs", "#[cfg(test)] mod tests { use super::*; use crate::store::S; fn f() { tokio::x(); } }"),
        ("src/pager/tests.rs", "use crate::store::MemoryStore;"),
        (
            "src/pager/core.rs",
            "/// See [`P`](crate::net::P).\n/* crate::net /* nested */ crate::net */ const S: &str = r#\"crate::net \" unsafe\"#;",
        ),
        ("src/pager/core.rs", "fn f<'a>(c: char) -> bool { c == '\"' || c == '\\'' || c == '\\u{7f}' } // unsafe crate::net"),
    ] {
        assert_eq!(with(path, code), Vec::<String>::new(), "{path}: {code}");
    }
}

#[test]
fn forbidden_edges_are_found() {
    for (path, code, expected) in [
        ("src/page.rs", "\nuse crate::pager::Pager;", "src/page.rs:4: page must not import crate::pager::Pager"),
        ("src/sys/mod.rs", "use crate::service::Service;", "sys must not import crate::service::Service: sys may use page, error"),
        ("src/pager/mod.rs", "use crate::{Extent, net::{wire::*}};", "pager must not import crate::net::wire::*"),
        ("src/pager/mod.rs", "fn f() { crate::region::open() }", "must not import crate::region::open"),
        ("src/pager/core.rs", "use super::super::net::Peer;", "pager::core must not import super::super::net::Peer"),
        ("src/store/mod.rs", "use crate::net::Peer;", "store must not import crate::net::Peer"),
        ("src/net/mod.rs", "use crate::Memory;", "net must not import crate::Memory"),
        (
            "src/net/mod.rs",
            "#[cfg(test)] use crate::Memory;\nuse crate::Slow;",
            "src/net/mod.rs:4: net must not import crate::Slow",
        ),
        ("src/region.rs", "use crate::migrate::Gate;", "crate::migrate::Gate, which is neither a module nor re-exported"),
        ("src/region.rs", "use crate::*;", "crate::*, which is neither a module nor re-exported"),
        ("src/oddments.rs", "", "oddments has no layer"),
    ] {
        assert_one(&with(path, code), expected);
    }
}

#[test]
fn a_pure_module_meets_no_clock_and_no_system() {
    for (code, expected) in [
        ("\nuse tokio::sync;", "src/pager/core.rs:4: pager::core is pure and must not name tokio"),
        ("use std::{fs, time::Instant};", "must not name std::fs"),
        ("fn f() -> std::net::IpAddr { g() }", "must not name std::net::IpAddr"),
        ("fn f() { let now = std::time::Instant::now(); }", "must not name std::time::Instant::now"),
        ("use std::time::Instant; fn f() { Instant::now(); }", "must not name Instant::now"),
        ("use crate::sys::Mapping;", "must not import crate::sys::Mapping"),
        ("use crate::service::Service;", "must not import crate::service::Service"),
        ("use super::Pager;", "must not import super::Pager"),
        ("use crate::pager::install::Install;", "must not import crate::pager::install::Install"),
    ] {
        assert_one(&with("src/pager/core.rs", code), expected);
    }
}

#[test]
fn unsafe_stays_in_sys() {
    assert_one(&with("src/region.rs", "\nfn f() { unsafe { g() } }"), "src/region.rs:4: unsafe code belongs in src/sys");
    assert_one(&with("src/region.rs", "#[cfg(test)] mod tests { unsafe fn f() {} }"), "unsafe code belongs in src/sys");
}

#[test]
fn headers_lengths_and_files_are_required() {
    let mut tree = tidy_tree();
    tree.insert("src/region.rs".into(), "//! Role: it holds a region.\nuse crate::page;".into());
    assert_one(&problems_of(&tree), "src/region.rs:1: the file must begin");
    tree.insert("src/region.rs".into(), format!("use crate::page;\n{HEADER}"));
    assert_one(&problems_of(&tree), "src/region.rs:1: the file must begin");

    assert_one(&with("tests/long.rs", &"\n".repeat(LINES_MAX)), &format!("allowed are {LINES_MAX}"));

    let mut tree = tidy_tree();
    tree.remove("LICENSE-MIT");
    assert_one(&problems_of(&tree), "LICENSE-MIT: missing");
}

#[test]
fn a_promise_names_a_test_that_runs() {
    let with_s4 = |body: &str| {
        let mut tree = tidy_tree();
        let safety = tree.get_mut("docs/safety.md").unwrap();
        *safety = safety.replace("## S4. A promise\nTests: `tests/kept.rs::it_holds`.", body);
        problems_of(&tree)
    };
    assert_one(&with_s4("S4 is no heading"), "no section `## S4.`");
    assert_one(&with_s4("## S4. Kept\nTests: some."), "S4. names no test");
    assert_one(
        &with_s4("## S4. Kept\nTests: `tests/kept.rs::was_renamed`."),
        "names tests/kept.rs::was_renamed, and there is no such test",
    );
    assert_one(&with_s4("## S4. Kept\nTests: `tests/gone.rs::it_holds`."), "there is no such test");
    assert_one(&with_s4("## S4. Kept\nTests: `tests/kept.rs::helps`."), "there is no such test");
    assert_one(&with_s4("## S4. Kept\nTests: `tests/kept.rs::sleeps`."), "there is no such test that runs");
    assert_eq!(with_s4("## S4. Kept\nTests: not yet exercised: arrives with trackers."), Vec::<String>::new());
    assert_eq!(with_s4("## S4. Kept\nTests: `tests/kept.rs::tests::it_holds`."), Vec::<String>::new());
}

#[test]
fn use_trees_are_spread_out_with_their_lines_and_names() {
    let found = paths(&tokens("use a::{self, b::{C, D as E}, f::*};\nlet x = g::h::<T>(i::J::K);"));
    let seen: Vec<String> = found.iter().map(|path| format!("{} {} {}", path.line, path.segments.join("::"), path.name)).collect();
    assert_eq!(seen, ["1 a a", "1 a::b::C C", "1 a::b::D E", "1 a::f::* *", "2 g::h h", "2 i::J::K K"]);
}

#[test]
fn unfinished_source_ends_the_lexer() {
    for text in
        ["\"open", "r#\"open\"", "/* open", "'", "'\\", "a::", "use a::{b", "use a::{b::{", "#[cfg(test)] mod x {", "use a as"]
    {
        let all = without_test_items(tokens(text));
        assert!(paths(&all).len() <= all.len(), "{text}");
    }
}
