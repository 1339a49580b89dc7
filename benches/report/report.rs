//! Draws what the other benches measured.
//!
//! Role: reads the JSON files of a folder, writes one SVG a plot and `summary.md`, and prints that; with `--docs`, `page` writes the page of the documentation. Neighbours: `common::goals` says what belongs
//! together and what was aimed at. Invariants: measures nothing, so it may run at any time; a file that is not a bench's is refused by name.

#[path = "../common/mod.rs"]
mod common;
mod curves;
mod page;
mod svg;
mod thesis;
mod timeline;

use clap::Parser;
use common::{
    Result,
    goals::{BASELINES, Goal, PLOTS, Plot, goal_of, unit_of},
    results::{figure, figure_of, hop_table, misses, peer_table, table},
    timeline::FILE_END,
};
use serde_json::{Map, Value};
use std::{
    fmt::Write,
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
};
use svg::{Bar, LEGEND, bars};

/// Draws the results of the other benches.
#[derive(Parser)]
struct Args {
    /// The folder with their JSON files, where the plots go too
    #[arg(default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/bench-results"))]
    folder: PathBuf,
    /// Write benchmarks.md and its pictures into this folder too
    #[arg(long, value_name = "FOLDER")]
    docs: Option<PathBuf>,
    /// Added by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    match report(&Args::parse()) {
        Ok(summary) => {
            println!("{summary}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("report: {error}");
            ExitCode::FAILURE
        }
    }
}

fn report(args: &Args) -> Result<String> {
    let folder = &*args.folder;
    let runs = runs(folder)?;
    if runs.is_empty() {
        return Err(format!("{} holds no results; run `make bench` or a bench with --json", folder.display()).into());
    }
    let mut summary =
        String::from("# Benchmarks\n\nMedians of rounds in which all ways take turns; benches/README.md says what each key is.\n");
    for run in &runs {
        let text =
            |key: &str| run.get(key).map_or_else(String::new, |value| value.as_str().map_or_else(|| value.to_string(), Into::into));
        let quick = if run.get("quick").and_then(Value::as_bool) == Some(true) { ", --quick" } else { "" };
        write!(summary, "\n## {}\n\n", text("bench"))?;
        let about = ["date", "commit", "cpu", "cpus", "kernel", "rustc"].map(text);
        let [date, commit, cpu, cpus, kernel, rustc] = about;
        writeln!(
            summary,
            "{date}, commit {commit}, {cpu} ({cpus} CPUs), Linux {kernel}, {rustc}, {} rounds{quick}.\n",
            text("rounds")
        )?;
        summary.push_str(&table(run, &|_| None));
        if let Some(hops) = hop_table(run) {
            write!(summary, "\n{hops}")?;
        }
        if let Some(peer) = peer_table(run) {
            write!(summary, "\n{peer}")?;
        }
        let missed = misses(run);
        if !missed.is_empty() {
            write!(summary, "\nMissed: {}.\n", missed.join(", "))?;
        }
        for plot in PLOTS {
            if let Some(svg) = draw(plot, run) {
                let file = format!("{}.svg", plot.file);
                fs::write(folder.join(&file), svg)?;
                write!(summary, "\n![{}]({file})\n", plot.title)?;
            }
        }
        draw_timelines(folder, &text("bench"), &mut summary)?;
    }
    fs::write(folder.join("summary.md"), &summary)?;
    if let Some(docs) = &args.docs {
        page::write(docs, &runs)?;
        eprintln!("wrote {}", docs.join("benchmarks.md").display());
    }
    Ok(summary)
}

/// The results in a folder, in the order of their names.
fn runs(folder: &Path) -> Result<Vec<Map<String, Value>>> {
    let entries = fs::read_dir(folder).map_err(|error| format!("{}: {error}; run `make bench` first", folder.display()))?;
    let mut files = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<PathBuf>>>()?;
    files.retain(|file| file.extension().is_some_and(|extension| extension == "json") && !is_timeline(file));
    files.sort();
    let read = |file: &PathBuf| match serde_json::from_str(&fs::read_to_string(file)?)? {
        Value::Object(run) if run.contains_key("bench") => Ok(run),
        _ => Err("no object of a bench".into()),
    };
    files.iter().map(|file| read(file).map_err(|error: common::AnyError| format!("{}: {error}", file.display()).into())).collect()
}

fn is_timeline(file: &Path) -> bool {
    file.file_name().is_some_and(|name| name.to_string_lossy().ends_with(FILE_END))
}

/// The time lines that a bench left beside its results: the one of hybrid, which shows all there is, under the name of the file.
fn draw_timelines(folder: &Path, bench: &str, summary: &mut String) -> Result<()> {
    let Ok(read) = fs::read_to_string(folder.join(format!("{bench}{FILE_END}"))) else { return Ok(()) };
    let moves: Map<String, Value> = serde_json::from_str(&read)?;
    for (name, of_move) in &moves {
        let title = format!("Time line of a move, {name}{}", if name == "hybrid" { "" } else { "-copy" });
        if let Some(svg) = timeline::draw(&title, of_move) {
            let file = if name == "hybrid" { format!("{bench}-timeline.svg") } else { format!("{bench}-timeline-{name}.svg") };
            fs::write(folder.join(&file), svg)?;
            write!(summary, "\n![{title}]({file})\n")?;
        }
    }
    Ok(())
}

/// A plot of the keys that this run measured; `None` if there are fewer than two, which is nothing to compare.
fn draw(plot: &Plot, run: &Map<String, Value>) -> Option<String> {
    let of = |key: &str| figure_of(run, key);
    let bar = |key: &&'static str| {
        let value = of(key).filter(|value| *value > 0.0)?;
        let goal = goal_of(key).and_then(|goal| Some((goal, goal.baseline.value(of)?)));
        Some(Bar {
            label: label(key),
            value,
            text: format!("{} {}", figure(value), unit_of(key)),
            target: goal.map(|(goal, baseline): (&Goal, f64)| baseline * goal.target),
            is_met: goal.is_none_or(|(goal, baseline)| goal.bound.holds(value / baseline, goal.target)),
            is_baseline: BASELINES.iter().any(|start| key.starts_with(start)),
        })
    };
    let drawn: Vec<Bar> = plot.keys.iter().filter_map(bar).collect();
    (drawn.len() > 1).then(|| bars(plot.title, LEGEND, &drawn))
}

/// `quic_us_p99` -> `quic p99`, `quic_hop_wire_us_mean` -> `wire`.
fn label(key: &str) -> String {
    let key = key.split_once("_hop_").map_or(key, |(_, hop)| hop);
    ["_us_mean", "_mb_s", "_total_s", "_downtime_ms"]
        .iter()
        .fold(key.to_owned(), |key, end| key.replace(end, ""))
        .replace("_us_", " ")
        .replace('_', " ")
}
