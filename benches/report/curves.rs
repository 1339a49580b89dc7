//! Curves over a round trip as SVG.
//!
//! Role: one plot in which a person sees within seconds what distance costs. Neighbours: `page` says what to draw, `thesis` has the dashed ones. Invariants: both axes name their unit, and a logarithmic
//! one says so; every measured point is marked, so that a straight line between two is seen to be one; readable on a light and on a dark page.

use super::{
    svg::escaped,
    timeline::{nice, number},
};
use std::fmt::Write;

/// One line with its name at its end.
pub struct Curve {
    pub name: String,
    /// `a` to `d`: what pageferry does. `other`: what others measured elsewhere, dashed. `bound`: what cannot be beaten, dotted.
    pub class: &'static str,
    pub points: Vec<Point>,
    /// Where its name stands, unless the curve reaches the right edge, where all names stand in a column.
    pub name_at: NameAt,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum NameAt {
    End,
    /// Over the point of this number.
    Over(usize),
    Under(usize),
}

#[derive(Clone, Copy)]
pub struct Point {
    pub rtt_ms: f64,
    pub value: f64,
    /// No more than that is known: it lies below.
    pub is_below: bool,
}

/// What the axes mean.
pub struct Axes<'a> {
    pub title: &'a str,
    /// What a reader has to know, in one line.
    pub about: &'a str,
    /// With its unit.
    pub value: &'a str,
    pub is_log: bool,
}

const WIDTH: f64 = 860.0;
const LEFT: f64 = 70.0;
/// For the names.
const RIGHT: f64 = 190.0;
const TOP: f64 = 84.0;
const PLOT: f64 = 330.0;
const BOTTOM: f64 = 56.0;
/// Names on the right keep so far apart.
const NAME: f64 = 17.0;

/// A plot; `None` without a point.
pub fn curves(axes: &Axes, curves: &[Curve]) -> Option<String> {
    let points = || curves.iter().flat_map(|curve| &curve.points);
    let most = points().map(|point| point.value).fold(0.0, f64::max);
    let least = points().map(|point| point.value).fold(f64::INFINITY, f64::min);
    let far = points().map(|point| point.rtt_ms).fold(0.0, f64::max).max(1.0);
    if points().next().is_none() || least <= 0.0 {
        return None;
    }
    let height = TOP + PLOT + BOTTOM;
    let (right, bottom) = (WIDTH - RIGHT, TOP + PLOT);
    let scale = Scale::of(least, most, axes.is_log);
    let x = |rtt_ms: f64| LEFT + rtt_ms / far * (right - LEFT - 12.0);
    let y = |value: f64| bottom - scale.share(value) * PLOT;

    let mut svg = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif" font-size="12">
<style>
.page {{ fill: #ffffff }} text {{ fill: #24292f }} .quiet {{ fill: #57606a }} .grid {{ stroke: #d8dee4 }} .axis {{ stroke: #57606a }} .halo {{ stroke: #ffffff; stroke-width: 4; paint-order: stroke; stroke-linejoin: round }} .line {{ fill: none; stroke-width: 2.4; stroke-linejoin: round }} .other {{ stroke-dasharray: 6 4; stroke-width: 1.6 }} .bound {{ stroke-dasharray: 2 4; stroke-width: 1.6 }}
.sa {{ stroke: #2f6fb7 }} .sb {{ stroke: #1a7f37 }} .sc {{ stroke: #c4622d }} .sd {{ stroke: #8250df }} .sother, .sbound {{ stroke: #6e7781 }}
.fa {{ fill: #2f6fb7 }} .fb {{ fill: #1a7f37 }} .fc {{ fill: #b3541e }} .fd {{ fill: #8250df }} .fother, .fbound {{ fill: #57606a }}
@media (prefers-color-scheme: dark) {{ .page {{ fill: #0d1117 }} text {{ fill: #d0d7de }} .quiet {{ fill: #8b949e }} .grid {{ stroke: #30363d }} .axis {{ stroke: #8b949e }} .halo {{ stroke: #0d1117 }}
.sa {{ stroke: #539bf5 }} .sb {{ stroke: #57ab5a }} .sc {{ stroke: #e0823d }} .sd {{ stroke: #b083f0 }} .sother, .sbound {{ stroke: #8b949e }}
.fa {{ fill: #539bf5 }} .fb {{ fill: #57ab5a }} .fc {{ fill: #e0823d }} .fd {{ fill: #b083f0 }} .fother, .fbound {{ fill: #9ea7b3 }} }}
</style>
<rect class="page" width="100%" height="100%"/>
<text x="12" y="24" font-size="15" font-weight="600">{}</text>
<text class="quiet" x="12" y="43">{}</text>
<text class="quiet" x="12" y="{:.1}">{}</text>
"##,
        escaped(axes.title),
        escaped(axes.about),
        TOP - 14.0,
        escaped(&if axes.is_log { format!("{}, each line ten times the one below", axes.value) } else { axes.value.to_owned() }),
    );
    for (value, text) in scale.ticks() {
        let (class, at) = (if value <= scale.from { "axis" } else { "grid" }, y(value));
        let _ = writeln!(svg, r#"<line class="{class}" x1="{LEFT}" x2="{right}" y1="{at:.1}" y2="{at:.1}"/>"#);
        let _ = writeln!(svg, r#"<text class="quiet" x="{:.1}" y="{:.1}" text-anchor="end">{text}</text>"#, LEFT - 8.0, at + 4.0);
    }
    draw_round_trips(&mut svg, far, x);
    for curve in curves {
        draw_curve(&mut svg, curve, x, y);
    }
    draw_names(&mut svg, curves, x, y);
    svg.push_str("</svg>\n");
    Some(svg)
}

/// Values to shares of the height.
struct Scale {
    from: f64,
    to: f64,
    is_log: bool,
}

impl Scale {
    fn of(least: f64, most: f64, is_log: bool) -> Scale {
        if is_log {
            return Scale { from: 10f64.powf(least.log10().floor()), to: 10f64.powf((most * 1.05).log10().ceil()), is_log };
        }
        let step = nice(most / 6.0);
        Scale { from: 0.0, to: (most / step).ceil() * step, is_log }
    }

    fn share(&self, value: f64) -> f64 {
        match self.is_log {
            true => (value / self.from).log10() / (self.to / self.from).log10(),
            false => value / self.to,
        }
    }

    fn ticks(&self) -> Vec<(f64, String)> {
        if self.is_log {
            let decades = (self.to / self.from).log10().round() as i32;
            let value = |decade| self.from * 10f64.powi(decade);
            return (0..=decades).map(value).map(|value| (value, grouped(value))).collect();
        }
        let step = nice(self.to / 6.0);
        (0..=(self.to / step).round() as u32).map(|tick| f64::from(tick) * step).map(|at| (at, number(at, step))).collect()
    }
}

/// A power of ten as people write it: `0.01`, `10,000`.
fn grouped(value: f64) -> String {
    if value < 0.99 {
        return number(value, value);
    }
    let digits = format!("{value:.0}");
    let groups: Vec<&str> = digits.as_bytes().rchunks(3).rev().filter_map(|group| std::str::from_utf8(group).ok()).collect();
    groups.join(",")
}

fn draw_round_trips(svg: &mut String, far: f64, x: impl Fn(f64) -> f64) {
    let bottom = TOP + PLOT;
    let step = nice(far / 6.0);
    for at in (0..=(far / step).floor() as u32).map(|tick| f64::from(tick) * step) {
        let _ = writeln!(
            svg,
            r#"<line class="axis" x1="{0:.1}" x2="{0:.1}" y1="{bottom:.1}" y2="{1:.1}"/><text class="quiet" x="{0:.1}" y="{2:.1}" text-anchor="middle">{3}</text>"#,
            x(at),
            bottom + 4.0,
            bottom + 18.0,
            number(at, step)
        );
    }
    let (middle, y) = (f64::midpoint(LEFT, WIDTH - RIGHT), bottom + 40.0);
    let _ =
        writeln!(svg, r#"<text class="quiet" x="{middle:.1}" y="{y:.1}" text-anchor="middle">round trip of the link, ms</text>"#);
}

fn draw_curve(svg: &mut String, curve: &Curve, x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) {
    let at: Vec<(f64, f64, bool)> = curve.points.iter().map(|point| (x(point.rtt_ms), y(point.value), point.is_below)).collect();
    let line: Vec<String> = at.iter().map(|(x, y, _)| format!("{x:.1},{y:.1}")).collect();
    let class = curve.class;
    let _ = writeln!(svg, r#"<polyline class="line {class} s{class}" points="{}"/>"#, line.join(" "));
    for (x, y, is_below) in at.into_iter().filter(|_| class != "bound") {
        let _ = match is_below {
            // Pointing to where the value is.
            true => writeln!(svg, r#"<path class="f{class}" d="M{:.1} {y:.1}h10l-5 9z"/>"#, x - 5.0),
            false => writeln!(
                svg,
                r#"<circle class="f{class}" cx="{x:.1}" cy="{y:.1}" r="{}"/>"#,
                if class == "other" { 2.5 } else { 3.5 }
            ),
        };
    }
}

/// Names of curves that reach the right edge stand in a column there, as near to their ends as they may; others at their ends.
fn draw_names(svg: &mut String, curves: &[Curve], x: impl Fn(f64) -> f64, y: impl Fn(f64) -> f64) {
    let edge = WIDTH - RIGHT - 20.0;
    let place = |curve: &Curve| match curve.name_at {
        NameAt::End => curve.points.last().copied(),
        NameAt::Over(at) | NameAt::Under(at) => curve.points.get(at).copied(),
    };
    let ends = curves.iter().filter_map(|curve| place(curve).map(|at| (curve, x(at.rtt_ms), y(at.value), at.is_below)));
    let (mut column, inside): (Vec<_>, Vec<_>) = ends.partition(|(_, x, ..)| *x >= edge);
    column.sort_by(|(_, _, one, _), (_, _, other, _)| one.total_cmp(other));
    // Downwards as far as needed, and back up from the bottom.
    let mut ys: Vec<f64> = column.iter().map(|(_, _, y, _)| *y).collect();
    for at in 1..ys.len() {
        ys[at] = ys[at].max(ys[at - 1] + NAME);
    }
    let mut lowest = TOP + PLOT;
    for y in ys.iter_mut().rev() {
        *y = y.min(lowest);
        lowest = *y - NAME;
    }
    for ((curve, ..), y) in column.iter().zip(ys) {
        let (class, name) = (curve.class, escaped(&curve.name));
        let _ = writeln!(
            svg,
            r#"<text class="f{class}" x="{:.1}" y="{:.1}" font-weight="600">{name}</text>"#,
            WIDTH - RIGHT + 4.0,
            y + 4.0
        );
    }
    for (curve, x, y, is_below) in inside {
        let (class, name) = (curve.class, escaped(&curve.name));
        let (x, y) = match curve.name_at {
            NameAt::Over(_) => (x + 4.0, y - 9.0),
            NameAt::Under(_) => (x + 4.0, y + 15.0),
            NameAt::End => (x + 10.0, y + if is_below { 9.0 } else { 4.0 }),
        };
        let _ = writeln!(svg, r#"<text class="halo f{class}" x="{x:.1}" y="{y:.1}" font-size="11">{name}</text>"#);
    }
}
