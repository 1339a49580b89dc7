//! What the user sees while it runs.
//!
//! Role: paints maps and ticks on a terminal, in place; prints plain lines anywhere else. Neighbours: `source` and `destination` hand it scenes. Invariants: standard output is touched
//! only if it is a terminal, so that otherwise it holds the report alone; what is painted fits the terminal; the cursor is back when the screen goes.

use crate::{
    map::{Level, Map},
    ticks::{PERIOD, Part, bar},
};
use console::Term;
use std::fmt::Write;

/// Rows that are no map: heading, titles, legend, ticks, two lines of figures; and that of the cursor.
const OTHER_ROWS: usize = 7;

pub struct Screen {
    term: Option<Term>,
    /// Lines painted last, to be painted over.
    painted: usize,
}

/// All that is shown at one moment.
pub struct Scene {
    pub heading: String,
    pub panes: Vec<Pane>,
    pub recent: Vec<(Part, u32)>,
    pub figures: [String; 2],
}

pub struct Pane {
    pub title: String,
    pub map: Map,
}

impl Screen {
    /// Pictures if standard output is a terminal that shows colours, unless `quiet`.
    pub fn new(quiet: bool) -> Screen {
        let term = Some(Term::stdout()).filter(|term| !quiet && term.is_term() && console::colors_enabled());
        if let Some(term) = &term {
            let _ = term.hide_cursor();
        }
        Screen { term, painted: 0 }
    }

    /// A line of progress. Stays on a screen of pictures, above them.
    pub fn say(&mut self, line: &str) {
        match &self.term {
            None => eprintln!("{line}"),
            Some(term) => {
                let _ = term.clear_last_lines(self.painted).and_then(|()| term.write_line(line));
                self.painted = 0;
            }
        }
    }

    /// Paints over the scene before.
    pub fn show(&mut self, scene: &Scene) {
        let Some(term) = &self.term else { return };
        let (rows, columns) = term.size();
        let lines = scene.lines(rows.into(), columns.into());
        let mut text = String::new();
        if self.painted > 0 {
            let _ = write!(text, "\x1b[{}A", self.painted);
        }
        for line in &lines {
            let _ = writeln!(text, "\r{line}\x1b[0m\x1b[K");
        }
        // Fewer lines than before leave the old ones below.
        text.push_str("\x1b[J");
        self.painted = lines.len();
        // What cannot be shown is not seen; the game goes on.
        let _ = term.write_str(&text);
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        if let Some(term) = &self.term {
            let _ = term.show_cursor();
        }
    }
}

impl Scene {
    fn lines(&self, rows: usize, columns: usize) -> Vec<String> {
        let panes = self.panes.len().max(1);
        // Two rows of the map stand in one line, and the map has a row more than columns.
        let high = (rows.saturating_sub(OTHER_ROWS) * 2).saturating_sub(1);
        let wide = (columns.saturating_sub(1) / panes).saturating_sub(2);
        let maps: Vec<Map> = self.panes.iter().map(|pane| pane.map.narrowed(high.min(wide))).collect();
        let cut = |line: &str| console::truncate_str(line, columns.saturating_sub(1), "").into_owned();
        let mut lines = vec![cut(&self.heading)];
        let titles = self.panes.iter().zip(&maps).map(|(pane, map)| {
            let title = console::truncate_str(&pane.title, map.columns, "").into_owned();
            format!("{title:<0$}  ", map.columns)
        });
        lines.push(titles.collect());
        let painted: Vec<Vec<String>> = maps.iter().map(paint).collect();
        for row in 0..painted.iter().map(Vec::len).max().unwrap_or(0) {
            let parts = painted
                .iter()
                .zip(&maps)
                .map(|(pane, map)| pane.get(row).map_or_else(|| " ".repeat(map.columns + 2), |line| format!("{line}\x1b[0m  ")));
            lines.push(parts.collect());
        }
        lines.push(legend(columns));
        lines.push(strip(&self.recent, columns.saturating_sub(1)));
        lines.extend(self.figures.iter().map(|line| cut(line)));
        lines
    }
}

const SHOWN: [(Level, u8, &str); 5] = [
    (Level::Hot, 226, "written now"),
    (Level::Warm, 136, "in the last 2 s"),
    (Level::Home, 28, "here"),
    (Level::Part, 61, "in part"),
    (Level::Missing, 238, "missing"),
];
/// The darkest grey: nothing is there.
const NOTHING: u8 = 233;

fn color(level: Level) -> u8 {
    SHOWN.iter().find(|(of, ..)| *of == level).map_or(NOTHING, |(_, color, _)| *color)
}

fn paint(map: &Map) -> Vec<String> {
    let rows: Vec<&[Level]> = map.levels.chunks(map.columns.max(1)).collect();
    let line = |pair: &[&[Level]]| {
        let mut line = String::new();
        for (column, upper) in pair[0].iter().enumerate() {
            let lower = pair.get(1).and_then(|row| row.get(column)).copied().unwrap_or(Level::Away);
            let _ = write!(line, "\x1b[38;5;{};48;5;{}m▀", color(*upper), color(lower));
        }
        line
    };
    rows.chunks(2).map(line).collect()
}

fn legend(columns: usize) -> String {
    let mut legend = String::new();
    let mut left = columns.saturating_sub(1);
    for (_, color, name) in SHOWN {
        let Some(after) = left.checked_sub(name.len() + 4) else { break };
        left = after;
        let _ = write!(legend, "\x1b[38;5;{color}m█\x1b[0m {name}  ");
    }
    legend
}

/// The last ticks, with a mark where the game changed hosts.
fn strip(recent: &[(Part, u32)], columns: usize) -> String {
    let mut strip = String::new();
    let shown = &recent[recent.len().saturating_sub(columns.saturating_sub(1))..];
    let mut before = None;
    for (part, took) in shown {
        if before == Some(Part::Before) && *part != Part::Before {
            strip.push_str("\x1b[38;5;255m┃");
        }
        before = Some(*part);
        let color = match part {
            _ if u128::from(*took) > PERIOD.as_micros() => 196,
            Part::Before => 39,
            Part::During => 208,
            Part::After => 77,
        };
        let _ = write!(strip, "\x1b[38;5;{color}m{}", bar(*took));
    }
    strip
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scene_fits_its_terminal() {
        let map = Map::from_text(64, &".#-~+".repeat(64 * 65 / 5)).unwrap();
        let pane = |title: &str| Pane { title: title.repeat(40), map: map.clone() };
        let scene = Scene {
            heading: "h".repeat(300),
            panes: vec![pane("source "), pane("destination ")],
            recent: vec![(Part::Before, 500); 200].into_iter().chain([(Part::During, 40_000); 9]).collect(),
            figures: ["f".repeat(300), String::new()],
        };
        for (rows, columns) in [(24, 80), (50, 140), (10, 30), (2, 2)] {
            let lines = scene.lines(rows, columns);
            assert!(lines.len() < rows.max(10), "{} lines for {rows} rows", lines.len());
            let widest = lines.iter().map(|line| console::measure_text_width(line)).max().unwrap();
            assert!(widest <= columns.max(8), "{widest} columns wide for {columns}");
        }
        let lines = scene.lines(24, 80);
        assert!(lines.iter().any(|line| line.contains('┃')) && lines.iter().any(|line| line.contains('▀')));
    }
}
