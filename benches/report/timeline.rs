//! The time line of a move as SVG.
//!
//! Role: panels over one axis of time, so that what happens together stands together, with the pause and the rounds across all of them. Neighbours: `common::timeline` records what is
//! drawn; `report` names the file. Invariants: every scale starts at zero; a pause too short to be seen is drawn two pixels wide and says how long it was; readable on
//! a light and on a dark page.

use super::{common::results::figure, svg::escaped};
use serde_json::Value;
use std::fmt::Write;

const WIDTH: f64 = 860.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 16.0;
/// Rows of labels of what is marked in all panels.
const ROWS: usize = 4;
/// The title and those.
const TOP: f64 = 104.0;
const PANEL: f64 = 104.0;
/// Of that, for its title and its legend.
const TITLE: f64 = 14.0;
const GAP: f64 = 36.0;
const BOTTOM: f64 = 44.0;
/// A label of a mark takes about as much.
const LABEL: f64 = 62.0;

/// One scale with what is measured on it.
struct Panel {
    title: &'static str,
    lines: Vec<Line>,
}

struct Line {
    class: &'static str,
    name: &'static str,
    /// Milliseconds since the move was asked for, and the value.
    points: Vec<(f64, f64)>,
}

/// A move as `common::timeline` has it; `None` if it lacks a part.
pub fn draw(title: &str, of_move: &Value) -> Option<String> {
    let at = |key: &str| of_move.get(key).and_then(Value::as_f64);
    let (paused, resumed, complete) = (at("paused_ms")?, at("resumed_ms")?, at("complete_ms")?);
    let panels = panels(of_move);
    let every = || panels.iter().flat_map(|panel| &panel.lines).flat_map(|line| &line.points);
    let from = every().map(|(at, _)| *at).fold(0.0, f64::min);
    let to = every().map(|(at, _)| *at).fold(complete, f64::max);
    let height = TOP + panels.len() as f64 * (PANEL + GAP) - GAP + BOTTOM;
    let x = |at: f64| LEFT + (at - from) / (to - from) * (WIDTH - LEFT - RIGHT);
    let (top, bottom) = (TOP, height - BOTTOM);

    let mut svg = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif" font-size="12">
<style>
.page {{ fill: #ffffff }} text {{ fill: #24292f }} .grid {{ stroke: #d8dee4 }} .axis {{ stroke: #57606a }} .mark {{ stroke: #57606a; stroke-dasharray: 4 3 }} .pause {{ fill: #cf222e; fill-opacity: 0.35 }}
.a {{ stroke: #2f6fb7 }} .b {{ stroke: #1a7f37 }} .c {{ stroke: #c4622d }} .line {{ fill: none; stroke-width: 1.6; stroke-linejoin: round }}
@media (prefers-color-scheme: dark) {{ .page {{ fill: #0d1117 }} text {{ fill: #d0d7de }} .grid {{ stroke: #30363d }} .axis {{ stroke: #8b949e }} .mark {{ stroke: #8b949e }} .pause {{ fill: #ff7b72 }}
.a {{ stroke: #539bf5 }} .b {{ stroke: #57ab5a }} .c {{ stroke: #e0823d }} }}
</style>
<rect class="page" width="100%" height="100%"/>
<text x="12" y="24" font-size="15" font-weight="600">{}</text>
"##,
        escaped(title)
    );
    let width = (x(resumed) - x(paused)).max(2.0);
    let _ =
        writeln!(svg, r#"<rect class="pause" x="{:.1}" y="{top}" width="{width:.1}" height="{:.1}"/>"#, x(paused), bottom - top);
    let pause = format!("pause {} ms", figure((resumed - paused).max(0.0)));
    let rounds = rounds(of_move);
    let mut labels = vec![(0.0, if rounds.is_empty() { "asked for" } else { "asked for, round 1" }.to_owned())];
    // Those that would stand on each other get one label.
    for many in rounds.chunk_by(|one, next| x(next.0) - x(one.0) < LABEL) {
        let ((at, first), (_, last)) = (many[0], many[many.len() - 1]);
        labels.push((at, if first == last { format!("round {first}") } else { format!("rounds {first} to {last}") }));
    }
    labels.extend([(paused, pause), (complete, "every page there".to_owned())]);
    labels.sort_by(|(one, _), (other, _)| one.total_cmp(other));
    draw_labels(&mut svg, &labels, paused, x);
    let marks: Vec<f64> = rounds.iter().map(|(at, _)| *at).chain([0.0, complete]).map(x).collect();
    for (row, panel) in panels.iter().enumerate() {
        let top = TOP + row as f64 * (PANEL + GAP);
        for at_x in &marks {
            let (from, to) = (top + TITLE, top + PANEL);
            let _ = writeln!(svg, r#"<line class="mark" x1="{at_x:.1}" x2="{at_x:.1}" y1="{from:.1}" y2="{to:.1}"/>"#);
        }
        draw_panel(&mut svg, panel, top, x);
    }
    let step = nice((to - from) / 8.0);
    let first = (from / step).ceil() as i64;
    for tick in (first..).map(|tick| tick as f64 * step).take_while(|tick| *tick <= to) {
        let _ = writeln!(
            svg,
            r#"<line class="axis" x1="{0:.1}" x2="{0:.1}" y1="{bottom:.1}" y2="{1:.1}"/><text x="{0:.1}" y="{2:.1}" text-anchor="middle">{3}</text>"#,
            x(tick),
            bottom + 4.0,
            bottom + 17.0,
            number(tick, step)
        );
    }
    let (middle, y) = (f64::midpoint(LEFT, WIDTH - RIGHT), height - 10.0);
    let _ = writeln!(svg, r#"<text x="{middle:.1}" y="{y:.1}" text-anchor="middle">ms since the move was asked for</text>"#);
    svg.push_str("</svg>\n");
    Some(svg)
}

/// Those that have something to show: post-copy copies nothing before the pause.
fn panels(of_move: &Value) -> Vec<Panel> {
    let points = |key: &str| -> Vec<(f64, f64)> {
        let pair = |pair: &Value| Some((pair.get(0)?.as_f64()?, pair.get(1)?.as_f64()?));
        of_move.get(key).and_then(Value::as_array).into_iter().flatten().filter_map(pair).collect()
    };
    let told = |key: &str| -> Vec<(f64, f64)> {
        let pair = |told: &Value| Some((told.get("at_ms")?.as_f64()?, told.get(key)?.as_f64()?));
        of_move.get("copying").and_then(Value::as_array).into_iter().flatten().filter_map(pair).collect()
    };
    let line = |class, name, points| Line { class, name, points };
    let mut panels = vec![
        Panel {
            title: "bytes on the wire, MB/s",
            lines: vec![
                line("a", "loopback device", points("wire_mb_s")),
                line("c", "what the source takes the link for", told("bandwidth_mb_s")),
            ],
        },
        Panel { title: "dirty rate, MB/s, as the source tells", lines: vec![line("c", "whole pages", told("dirty_mb_s"))] },
        Panel {
            title: "predicted downtime, ms, as the source tells",
            lines: vec![line("c", "if it moved now", told("predicted_downtime_ms"))],
        },
        Panel {
            title: "the program's writes, operations/s",
            lines: vec![
                line("a", "at the source", points("source_writes_s")),
                line("b", "at the destination", points("destination_writes_s")),
            ],
        },
    ];
    for panel in &mut panels {
        panel.lines.retain(|line| !line.points.is_empty());
    }
    panels.retain(|panel| !panel.lines.is_empty());
    panels
}

/// When each round but the first, which begins with the move, was told of first.
fn rounds(of_move: &Value) -> Vec<(f64, u64)> {
    let told = of_move.get("copying").and_then(Value::as_array).into_iter().flatten();
    let mut rounds: Vec<(f64, u64)> =
        told.filter_map(|told| Some((told.get("at_ms")?.as_f64()?, told.get("round")?.as_u64()?))).collect();
    rounds.dedup_by_key(|(_, round)| *round);
    rounds.retain(|(_, round)| *round > 1);
    rounds
}

/// What the strokes through the panels are, above them; labels give way to each other.
fn draw_labels(svg: &mut String, marks: &[(f64, String)], paused: f64, x: impl Fn(f64) -> f64) {
    let mut ends = [f64::NEG_INFINITY; ROWS];
    for (at, label) in marks {
        let (at_x, width) = (x(*at), LABEL.max(label.len() as f64 * 7.6));
        let is_last = at_x + width > WIDTH;
        let (start, end) = if is_last { (at_x - width, at_x) } else { (at_x, at_x + width) };
        let row = ends.iter().position(|end| *end < start).unwrap_or(ROWS - 1);
        ends[row] = end;
        let y = TOP - 8.0 - row as f64 * 15.0;
        let anchor = if is_last { "end" } else { "start" };
        let weight = if *at == paused { 600 } else { 400 };
        let _ =
            writeln!(svg, r#"<text x="{:.1}" y="{y:.1}" text-anchor="{anchor}" font-weight="{weight}">{label}</text>"#, at_x + 1.0);
    }
}

fn draw_panel(svg: &mut String, panel: &Panel, top: f64, x: impl Fn(f64) -> f64) {
    let (peak, most) = scale(panel);
    let step = nice(most.max(f64::MIN_POSITIVE) / 3.0);
    let most = (most / step).ceil().max(1.0) * step;
    let bottom = top + PANEL;
    let y = |value: f64| bottom - value / most * (PANEL - TITLE - 4.0);
    let (left, right) = (LEFT, WIDTH - RIGHT);
    for tick in (0..=(most / step).round() as u32).map(|tick| f64::from(tick) * step) {
        let class = if tick == 0.0 { "axis" } else { "grid" };
        let _ = writeln!(
            svg,
            r#"<line class="{class}" x1="{left}" x2="{right}" y1="{0:.1}" y2="{0:.1}"/><text x="{1}" y="{2:.1}" text-anchor="end">{3}</text>"#,
            y(tick),
            left - 6.0,
            y(tick) + 4.0,
            number(tick, step)
        );
    }
    let cut = if peak > most { format!(" (peak {}, cut)", figure(peak)) } else { String::new() };
    let _ = writeln!(svg, r#"<text x="{left}" y="{:.1}"><tspan font-weight="600">{}</tspan>{cut}</text>"#, top + 8.0, panel.title);
    let mut end = right;
    for line in panel.lines.iter().rev() {
        let points: Vec<String> =
            line.points.iter().map(|(at, value)| format!("{:.1},{:.1}", x(*at), y(value.min(most)))).collect();
        let _ = writeln!(svg, r#"<polyline class="line {}" points="{}"/>"#, line.class, points.join(" "));
        let _ = writeln!(svg, r#"<text x="{end}" y="{:.1}" text-anchor="end" font-size="11">{}</text>"#, top + 8.0, line.name);
        let start = end - line.name.len() as f64 * 5.6;
        let _ = writeln!(
            svg,
            r#"<line class="{}" stroke-width="3" x1="{:.1}" x2="{:.1}" y1="{3:.1}" y2="{3:.1}"/>"#,
            line.class,
            start - 26.0,
            start - 8.0,
            top + 4.0
        );
        end = start - 40.0;
    }
}

/// A multiple of `step`, without what floating point adds.
pub fn number(value: f64, step: f64) -> String {
    format!("{value:.0$}", (-step.log10().floor()).max(0.0) as usize)
}

/// The greatest value, and how far the scale has to reach: not to a peak so far above the others that they could not be read, as of a program that makes up for a stall.
fn scale(panel: &Panel) -> (f64, f64) {
    let mut values: Vec<f64> = panel.lines.iter().flat_map(|line| &line.points).map(|(_, value)| *value).collect();
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values.get((values.len() as f64 * share) as usize).or(values.last()).copied().unwrap_or(0.0);
    let (most, usual) = (at(1.0), at(0.75));
    (most, if usual > 0.0 { most.min(usual * 2.5) } else { most })
}

/// The least of 1, 2 and 5 times a power of ten that is not below `value`.
pub fn nice(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|times| times * power).find(|step| *step >= value).unwrap_or(power * 10.0)
}
