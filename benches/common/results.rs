//! What a run found, for people and for programs.
//!
//! Role: the table with verdicts, the table of hops, the flat JSON object. Neighbours: `goals` has the targets; the bench `report` prints the
//! same tables from JSON files. Invariants: a verdict is given only where key and baseline were measured in this run.

use super::{
    Result,
    args::Args,
    goals::{GOALS, HOPS, PEER, goal_of, unit_of},
    measure::Measured,
};
use serde_json::{Map, Value, json};
use std::process::Command;

/// Prints a run and writes its JSON file. Whether the process shall succeed: always, unless `--strict` and a target was missed.
pub fn report(name: &str, args: &Args, measured: &Measured) -> Result<bool> {
    let mut object = Map::new();
    object.insert("bench".into(), name.into());
    object.insert("quick".into(), args.quick.into());
    object.extend(machine());
    object.insert("rounds".into(), measured.rounds.into());
    object.extend(measured.words.iter().map(|(key, text)| ((*key).to_owned(), text.as_str().into())));
    object.extend(measured.series.iter().map(|series| (series.key.to_owned(), rounded(series.median()))));
    object.extend(measured.derived.iter().map(|(key, value)| ((*key).to_owned(), rounded(*value))));
    let spread = |key: &str| {
        let series = measured.series.iter().find(|series| series.key == key)?;
        let (least, most) = series.range();
        Some(format!("{} .. {}", figure(least), figure(most)))
    };
    println!("{}", table(&object, &spread));
    if let Some(hops) = hop_table(&object) {
        println!("{hops}");
    }
    if let Some(peer) = peer_table(&object) {
        println!("{peer}");
    }
    measured.notes.iter().for_each(|note| println!("{note}"));
    println!("Figures are medians of {} rounds; range: the least and the greatest round.", measured.rounds);
    if let Some(file) = args.json_file()? {
        let missed = misses(&object);
        std::fs::write(file, serde_json::to_string_pretty(&object)? + "\n")
            .map_err(|error| format!("{}: {error}", file.display()))?;
        eprintln!("wrote {} ({} targets missed)", file.display(), missed.len());
    }
    Ok(!args.strict || misses(&object).is_empty())
}

/// A key's figure in the JSON object of a run.
pub fn figure_of(object: &Map<String, Value>, key: &str) -> Option<f64> {
    object.get(key).and_then(Value::as_f64).filter(|_| !unit_of(key).is_empty())
}

/// The keys of targets that were measured and missed.
pub fn misses(object: &Map<String, Value>) -> Vec<&'static str> {
    let of = |key: &str| figure_of(object, key);
    let missed = GOALS.iter().filter(|goal| {
        let ratio = of(goal.key).zip(goal.baseline.value(of)).map(|(figure, baseline)| figure / baseline);
        ratio.is_some_and(|ratio| !goal.bound.holds(ratio, goal.target))
    });
    missed.map(|goal| goal.key).collect()
}

/// All keys but the hops, as a Markdown table.
pub fn table(object: &Map<String, Value>, spread: &dyn Fn(&str) -> Option<String>) -> String {
    let of = |key: &str| figure_of(object, key);
    let mut rows = vec![["key", "median", "unit", "range", "baseline", "ratio", "target", "verdict"].map(String::from)];
    for (key, value) in object.keys().filter(|key| !key.contains("_hop_")).filter_map(|key| Some((key, of(key)?))) {
        let mut row = [key.clone(), figure(value), unit_of(key).into(), spread(key).unwrap_or_default()].to_vec();
        let goal = goal_of(key);
        row.extend(match goal.and_then(|goal| Some((goal, value / goal.baseline.value(of)?))) {
            None => [goal.map(|goal| goal.baseline.text()).unwrap_or_default(), String::new(), String::new(), String::new()],
            Some((goal, ratio)) => {
                let holds = |factor| goal.bound.holds(ratio, factor);
                let verdict = match goal.stretch {
                    Some(stretch) if holds(stretch) => "PASS, stretch too",
                    _ if holds(goal.target) => "PASS",
                    _ => "MISS",
                };
                let stretch = goal.stretch.map(|stretch| format!(" (stretch {stretch})")).unwrap_or_default();
                let target = format!("{} {}{stretch}", goal.bound.sign(), goal.target);
                [goal.baseline.text(), format!("{ratio:.2}"), target, verdict.into()]
            }
        });
        rows.extend(<[String; 8]>::try_from(row));
    }
    markdown(&rows)
}

/// Mean time by hop for each way a fault can go, as a Markdown table; `None` if no hop was measured.
pub fn hop_table(object: &Map<String, Value>) -> Option<String> {
    // Exactly zero is no time but a hop that nobody measured.
    let mean = |path: &str, hop: &str| figure_of(object, &format!("{path}_hop_{hop}_us_mean")).filter(|mean| *mean != 0.0);
    let mut rows = vec![["hop (mean, us)", "raw", "store", "quic"].map(String::from)];
    for (hop, meaning) in HOPS {
        let means = ["raw", "store", "quic"].map(|path| mean(path, hop));
        if means.iter().any(Option::is_some) {
            let [raw, store, quic] = means.map(|mean| mean.map(figure).unwrap_or_default());
            rows.push([(*meaning).into(), raw, store, quic]);
        }
    }
    (rows.len() > 1).then(|| markdown(&rows))
}

/// What another program took for the same, as a Markdown table; `None` if there was none.
pub fn peer_table(object: &Map<String, Value>) -> Option<String> {
    let peer = object.get(PEER.trim_end_matches('_')).and_then(Value::as_str)?;
    let mut rows = vec![[format!("beside {peer}"), "unit".into(), "pageferry".into(), "QEMU".into(), "pageferry : QEMU".into()]];
    for (twin, theirs) in object.keys().filter_map(|key| Some((key.strip_prefix(PEER)?, figure_of(object, key)?))) {
        if let Some(ours) = figure_of(object, twin) {
            let ratio = if theirs == 0.0 { String::new() } else { format!("{:.2}", ours / theirs) };
            rows.push([twin.into(), unit_of(twin).into(), figure(ours), figure(theirs), ratio]);
        }
    }
    (rows.len() > 1).then(|| markdown(&rows))
}

/// Rows with aligned columns, the first as header; columns that hold nothing are left out.
fn markdown<const N: usize>(rows: &[[String; N]]) -> String {
    let columns = (0..N).filter(|column| rows[1..].iter().any(|row| !row[*column].is_empty()));
    let widths = columns.map(|column| (column, rows.iter().map(|row| row[column].len()).max().unwrap_or(0)));
    let widths: Vec<(usize, usize)> = widths.collect();
    let line = |cell: &dyn Fn(usize, usize) -> String| {
        let cells: Vec<String> = widths.iter().map(|(column, width)| cell(*column, *width)).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let mut lines: Vec<String> = rows.iter().map(|row| line(&|column, width| format!("{:width$}", row[column]))).collect();
    lines.insert(1, line(&|_, width| "-".repeat(width)));
    lines.concat()
}

/// Three to four significant digits.
pub fn figure(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

fn rounded(value: f64) -> Value {
    json!((value * 1000.0).round() / 1000.0)
}

/// Where and on what the figures were taken.
fn machine() -> Map<String, Value> {
    let read = |path: &str| std::fs::read_to_string(path).ok().map(|text| text.trim().to_owned());
    let cpu = read("/proc/cpuinfo").and_then(|text| {
        let line = text.lines().find(|line| line.starts_with("model name"))?;
        line.split_once(": ").map(|(_, model)| model.to_owned())
    });
    let cpus = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let text = |value: Option<String>| Value::from(value.unwrap_or_else(|| "unknown".into()));
    [
        ("host", text(read("/proc/sys/kernel/hostname"))),
        ("cpu", text(cpu)),
        ("cpus", cpus.into()),
        ("kernel", text(read("/proc/sys/kernel/osrelease"))),
        ("rustc", text(output("rustc", &["--version"]))),
        ("commit", text(output("git", &["describe", "--always", "--dirty", "--exclude", "*"]))),
        ("date", text(output("date", &["--utc", "+%Y-%m-%dT%H:%M:%SZ"]))),
    ]
    .map(|(key, value)| (key.to_owned(), value))
    .into_iter()
    .collect()
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).current_dir(env!("CARGO_MANIFEST_DIR")).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
