//! Horizontal bars as SVG.
//!
//! Role: the kind of plot that a comparison of medians needs, without a dependency. Neighbours: `report` says what to draw. Invariants: bars
//! start at zero, so that their lengths compare as their values do; readable on a light and on a dark page.

use std::fmt::Write;

/// One bar.
pub struct Bar {
    pub label: String,
    pub value: f64,
    /// The value as a reader wants it, with its unit.
    pub text: String,
    /// Where a mark goes.
    pub target: Option<f64>,
    /// Whether the value lies on the right side of its target.
    pub is_met: bool,
    /// Drawn in grey: what others are compared with.
    pub is_baseline: bool,
}

const WIDTH: f64 = 720.0;
const LABELS: f64 = 130.0;
const VALUES: f64 = 110.0;
const TOP: f64 = 44.0;
const STEP: f64 = 26.0;
const THICK: f64 = 16.0;

/// What the colours of a comparison with baselines mean.
pub const LEGEND: &str = "grey: baseline; blue: pageferry; orange: target missed; stroke: target";

/// A plot with its legend.
pub fn bars(title: &str, legend: &str, bars: &[Bar]) -> String {
    let most = bars.iter().flat_map(|bar| [Some(bar.value), bar.target]).flatten().fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let scale = (WIDTH - LABELS - VALUES) / most;
    let height = TOP + STEP * (bars.len() as f64 + 1.0) + 8.0;
    let mut svg = String::new();
    // Writing to a String cannot fail.
    let _ = write!(
        svg,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" role="img" font-family="system-ui, sans-serif" font-size="12">
<style>
.page {{ fill: #ffffff }} text {{ fill: #24292f }} .baseline {{ fill: #9aa4af }} .ours {{ fill: #2f6fb7 }} .missed {{ fill: #c4622d }} .target {{ stroke: #24292f }}
@media (prefers-color-scheme: dark) {{ .page {{ fill: #0d1117 }} text {{ fill: #d0d7de }} .baseline {{ fill: #6e7781 }} .ours {{ fill: #539bf5 }} .missed {{ fill: #e0823d }} .target {{ stroke: #d0d7de }} }}
</style>
<rect class="page" width="100%" height="100%"/>
<text x="12" y="24" font-size="15" font-weight="600">{}</text>
"##,
        escaped(title)
    );
    for (row, bar) in bars.iter().enumerate() {
        let y = TOP + STEP * row as f64;
        let length = (bar.value * scale).max(1.0);
        let class = match bar {
            Bar { is_baseline: true, .. } => "baseline",
            Bar { is_met: false, .. } => "missed",
            _ => "ours",
        };
        let text_y = y + THICK - 4.0;
        let _ = writeln!(svg, r#"<text x="{:.1}" y="{text_y:.1}" text-anchor="end">{}</text>"#, LABELS - 8.0, escaped(&bar.label));
        let _ = writeln!(svg, r#"<rect class="{class}" x="{LABELS}" y="{y:.1}" width="{length:.1}" height="{THICK}" rx="2"/>"#);
        let end = bar.target.map_or(length, |target| length.max(target * scale));
        let _ = writeln!(svg, r#"<text x="{:.1}" y="{text_y:.1}">{}</text>"#, LABELS + end + 8.0, escaped(&bar.text));
        if let Some(target) = bar.target {
            let (x, top, bottom) = (LABELS + target * scale, y - 3.0, y + THICK + 3.0);
            let _ =
                writeln!(svg, r#"<line class="target" x1="{x:.1}" x2="{x:.1}" y1="{top:.1}" y2="{bottom:.1}" stroke-width="2"/>"#);
        }
    }
    let y = TOP + STEP * bars.len() as f64 + THICK;
    let _ = writeln!(svg, r#"<text x="{LABELS}" y="{y:.1}" font-size="11" opacity="0.7">{}</text>"#, escaped(legend));
    svg.push_str("</svg>\n");
    svg
}

/// Text as it may stand in SVG.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
