//! The page of benchmarks in the documentation: what a reader wants to know first, then everything.
//!
//! Role: writes `benchmarks.md` and its pictures from runs that were measured before. Neighbours: `report` reads the runs, `curves` and `svg` draw, `thesis` has what is quoted. Invariants: says of
//! each run on which machine, at which commit and how thoroughly it was measured; a missed target is named before any table; the same runs write the same bytes.

use super::{
    common::{
        Result,
        goals::{GOALS, PLOTS, unit_of},
        results::{figure, figure_of, hop_table, misses, peer_table, table},
    },
    curves::{Axes, Curve, NameAt, Point, curves},
    draw,
    svg::{Bar, bars},
    thesis,
};
use serde_json::{Map, Value};
use std::{fmt::Write, fs, path::Path};

type Run = Map<String, Value>;

/// Runs in the order in which they are read; others follow by name.
const ORDER: [&str; 7] = ["rtt_sweep", "working_set", "budget", "fault_latency", "throughput", "migration", "dirty"];
/// Of those the first two get pictures of their own.
const PICTURED: [&str; 2] = ["rtt_sweep", "working_set"];

/// What each bench asks.
fn question(bench: &str) -> &str {
    match bench {
        "rtt_sweep" => "Memory of a peer that is 0 to 50 ms away",
        "working_set" => "A start whose first touches were recorded",
        "budget" => "More memory than there is room for",
        "fault_latency" => "One page, from touch to return",
        "throughput" => "How fast a region fills",
        "migration" => "A running program moves",
        "dirty" => "What following writes costs",
        other => other,
    }
}

/// Writes the page; the runs are those of one folder.
pub fn write(docs: &Path, runs: &[Run]) -> Result<()> {
    let pictures = docs.join("benchmarks");
    fs::create_dir_all(&pictures)?;
    for entry in fs::read_dir(&pictures)? {
        let path = entry?.path();
        // Of a run that measured more than this one.
        if path.extension().is_some_and(|extension| extension == "svg") {
            fs::remove_file(path)?;
        }
    }
    let mut runs: Vec<&Run> = runs.iter().collect();
    runs.sort_by_key(|run| ORDER.iter().position(|name| *name == text(run, "bench")).unwrap_or(ORDER.len()));
    let page = Page { runs: &runs, pictures: &pictures };
    fs::write(docs.join("benchmarks.md"), page.markdown()?)?;
    Ok(())
}

fn text(run: &Run, key: &str) -> String {
    run.get(key).map_or_else(String::new, |value| value.as_str().map_or_else(|| value.to_string(), Into::into))
}

fn is_quick(run: &Run) -> bool {
    run.get("quick").and_then(Value::as_bool) == Some(true)
}

struct Page<'a> {
    runs: &'a [&'a Run],
    pictures: &'a Path,
}

impl Page<'_> {
    fn markdown(&self) -> Result<String> {
        let mut page = String::from(
            "# Benchmarks\n\n<!-- Written by `make bench-report` from what `make bench` measured. Changes belong in benches/report. -->\n\n",
        );
        self.head(&mut page)?;
        self.picture(&mut page, "throughput_rtt", self.throughput(), "How much memory a second, over the round trip")?;
        writeln!(
            page,
            "*On demand*: a page, or with read-ahead some pages, for each touch that waits. *Managed*: everything is pulled in the background while it is read. *Written back*: until the peer has said \
             that it is durable. Both ends are processes of one machine and share its processors; the link between them is shaped, encrypted and real.\n"
        )?;
        self.picture(&mut page, "first_page", self.first_page(), "The first page, next door")?;
        self.picture(&mut page, "first_page_rtt", self.first_page_rtt(), "The first page, over the round trip")?;
        if let Some(svg) = self.working_set() {
            self.picture(&mut page, "working_set", Some(svg), "A start whose first touches were recorded")?;
            writeln!(
                page,
                "*On demand*: each page when it is touched, with its neighbours. *All, by number*: a mount as it comes, which pulls everything in the background. *Recorded, replayed*: the pull begins with what \
                 an earlier start touched, in its order; *no neighbours*: and a touch that outruns it asks for its page alone.\n"
            )?;
        }
        self.beside_thesis(&mut page)?;
        for run in self.runs {
            self.details(&mut page, run)?;
        }
        Ok(page)
    }

    /// Where, what, how thoroughly, and which targets were missed.
    fn head(&self, page: &mut String) -> Result<()> {
        let all = |key: &str| {
            let mut values: Vec<String> = self.runs.iter().map(|run| text(run, key)).collect();
            values.sort();
            values.dedup();
            values.join("; ")
        };
        writeln!(
            page,
            "Measured on {} ({} CPUs, host `{}`), Linux {}, {}. Commit {}.",
            all("cpu"),
            all("cpus"),
            all("host"),
            all("kernel"),
            all("rustc"),
            all("commit")
        )?;
        let quick: Vec<String> =
            self.runs.iter().filter(|run| is_quick(run)).map(|run| format!("`{}`", text(run, "bench"))).collect();
        match quick.len() {
            0 => writeln!(page, "All of these are full runs.")?,
            some if some == self.runs.len() => {
                writeln!(
                    page,
                    "**All of these are quick runs** (`--quick`): less of everything, fewer round trips; their ratios are honest, their figures coarse."
                )?;
            }
            _ => writeln!(page, "**Quick runs** (`--quick`, less of everything): {}; the others are full runs.", quick.join(", "))?,
        }
        writeln!(
            page,
            "Every figure is the median of rounds in which all ways take turns, beside a baseline of the same run; what was moved was checked. [benches/README.md](../benches/README.md) has the method \
             and what each key is; `make bench bench-report` measures and writes this page anew.\n"
        )?;
        let of = |key: &str| self.figure(key);
        let aimed = GOALS.iter().filter(|goal| of(goal.key).is_some() && goal.baseline.value(of).is_some()).count();
        let missed: Vec<String> = self.runs.iter().flat_map(|run| misses(run)).map(|key| format!("`{key}`")).collect();
        write!(page, "**{} of {aimed} targets are met", aimed - missed.len())?;
        match missed.len() {
            0 => writeln!(page, ".**\n")?,
            _ => writeln!(page, "; missed: {}.**\n", missed.join(", "))?,
        }
        Ok(())
    }

    fn picture(&self, page: &mut String, file: &str, svg: Option<String>, title: &str) -> Result<()> {
        let Some(svg) = svg else { return Ok(()) };
        fs::write(self.pictures.join(format!("{file}.svg")), svg)?;
        Ok(writeln!(page, "![{title}](benchmarks/{file}.svg)\n")?)
    }

    /// Of whichever run measured it.
    fn figure(&self, key: &str) -> Option<f64> {
        self.runs.iter().find_map(|run| figure_of(run, key))
    }

    /// The keys that begin so, by the round trip that they end with.
    fn by_rtt(&self, key: &str) -> Vec<Point> {
        let start = format!("{key}_rtt");
        let keys = self.runs.iter().flat_map(|run| run.iter());
        let point = |(key, value): (&String, &Value)| {
            let rtt_ms = key.strip_prefix(&start)?.parse().ok()?;
            Some(Point { rtt_ms, value: value.as_f64()?, is_below: false })
        };
        let mut points: Vec<Point> = keys.filter_map(point).collect();
        points.sort_by(|one, other| one.rtt_ms.total_cmp(&other.rtt_ms));
        points
    }

    /// `None` if none of these was measured.
    fn ours(&self, named: &[(&str, &'static str, &str)]) -> Option<Vec<Curve>> {
        let curve = |(name, class, key): &(&str, &'static str, &str)| Curve {
            name: (*name).into(),
            class,
            points: self.by_rtt(key),
            name_at: NameAt::End,
        };
        let ours: Vec<Curve> = named.iter().map(curve).filter(|curve| !curve.points.is_empty()).collect();
        (!ours.is_empty()).then_some(ours)
    }

    /// Said in a picture, which may be shown without its page.
    fn titled(&self, title: &str, bench: &str) -> String {
        let is_quick = self.runs.iter().any(|run| text(run, "bench") == bench && is_quick(run));
        if is_quick { format!("{title} (a quick run)") } else { title.to_owned() }
    }

    fn throughput(&self) -> Option<String> {
        let ours = self.ours(&[
            ("managed", "a", "managed_mb_s"),
            ("written back", "b", "write_mb_s"),
            ("on demand, in order", "c", "demand_seq_mb_s"),
            ("on demand, at random", "d", "demand_random_mb_s"),
        ])?;
        let axes = Axes {
            title: &self.titled("How much memory a second, from a peer that is so far away", "rtt_sweep"),
            about: "Coloured: pageferry, on this machine. Dashed: the thesis, on its own; a triangle says that its value lies below.",
            value: "MB/s",
            is_log: true,
        };
        curves(&axes, &thesis::throughput().into_iter().chain(ours).collect::<Vec<_>>())
    }

    fn first_page(&self) -> Option<String> {
        let bar = |label: &str, value: f64, is_baseline| Bar {
            label: label.into(),
            value,
            text: format!("{} us", figure(value)),
            target: None,
            is_met: true,
            is_baseline,
        };
        let ours = [("from memory", "store_us_p50"), ("over QUIC", "quic_us_p50")];
        let mut drawn: Vec<Bar> = ours.iter().filter_map(|(label, key)| Some(bar(label, self.figure(key)?, false))).collect();
        if drawn.is_empty() {
            return None;
        }
        let thesis = [("thesis: disk", 4.0), ("thesis: uffd", 58.0), ("thesis: direct", 115.0), ("thesis: managed", 160.0)];
        drawn.extend(thesis.map(|(label, us)| bar(label, us, true)));
        Some(bars(
            &self.titled("One page of 4 KiB, from touch to return, at no distance (us, p50)", "fault_latency"),
            "blue: pageferry, on this machine; grey: the thesis, on its own",
            &drawn,
        ))
    }

    fn first_page_rtt(&self) -> Option<String> {
        let mut ours = self.ours(&[("first page", "a", "first_page_ms")])?;
        let round_trip = ours[0].points.iter().map(|point| Point { value: point.rtt_ms.max(0.01), ..*point }).collect();
        ours.insert(0, Curve { name: "one round trip".into(), class: "bound", points: round_trip, name_at: NameAt::End });
        let axes = Axes {
            title: &self.titled("Opening a mount and touching its first page", "rtt_sweep"),
            about: "Dotted: one round trip, which no way can beat.",
            value: "ms",
            is_log: false,
        };
        curves(&axes, &ours)
    }

    fn working_set(&self) -> Option<String> {
        let ours = self.ours(&[
            ("on demand", "d", "ondemand_ms"),
            ("all, by number", "a", "linear_ms"),
            ("recorded, replayed", "b", "warm_ms"),
            ("the same, no neighbours", "c", "warm_narrow_ms"),
        ])?;
        let axes = Axes {
            title: &self.titled("A program starts: until it has touched its working set, a 32nd of the image", "working_set"),
            about: "The same scattered pages in the same order, each way from before the mount is opened. Lower is better.",
            value: "ms",
            is_log: true,
        };
        curves(&axes, &ours)
    }

    fn beside_thesis(&self, page: &mut String) -> Result<()> {
        writeln!(page, "## Beside the thesis\n\nIts figures are those of {}. {}\n", thesis::SOURCE, thesis::CAUTION)?;
        writeln!(page, "| what | the thesis, its machine | here | key here |\n| --- | --- | --- | --- |")?;
        for quote in thesis::QUOTES {
            let ours = quote.key.and_then(|key| Some((key, self.figure(key)?)));
            let here = ours.map(|(key, value)| format!("{} {}", figure(value), unit_of(key))).unwrap_or_default();
            let key = ours.map(|(key, _)| format!("`{key}`")).unwrap_or_default();
            writeln!(page, "| {} | {} | {here} | {key} |", quote.what, quote.figure)?;
        }
        Ok(())
    }

    fn details(&self, page: &mut String, run: &Run) -> Result<()> {
        let bench = text(run, "bench");
        writeln!(page, "\n## {bench}: {}\n", lower(question(&bench)))?;
        let quick = if is_quick(run) { "a quick run" } else { "a full run" };
        writeln!(page, "{}, commit {}, {} rounds, {quick}.\n", text(run, "date"), text(run, "commit"), text(run, "rounds"))?;
        if !PICTURED.contains(&bench.as_str()) {
            for plot in PLOTS {
                self.picture(page, plot.file, draw(plot, run), plot.title)?;
            }
        }
        page.push_str(&table(run, &|_| None));
        for more in [hop_table(run), peer_table(run)].into_iter().flatten() {
            write!(page, "\n{more}")?;
        }
        Ok(())
    }
}

fn lower(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
