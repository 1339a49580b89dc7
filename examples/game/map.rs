//! The pages of a region as a picture.
//!
//! Role: what each part of the memory is doing, small enough for a terminal. Neighbours: `source` and `destination` make a map of what they see, `screen` paints it; it travels between
//! processes as text. Invariants: pure; a missing page shows unless somebody is writing beside it.

use pageferry::Extent;

/// No map is wider than this, in pages or groups of them.
pub const COLUMNS_MAX: usize = 64;
/// Ticks for which a written page is hot, and warm: a quarter of a second, and two.
const HOT: u64 = 15;
const WARM: u64 = 120;

/// What a page does, or the most telling page of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// The region is not here, or not here any more.
    Away,
    /// All pages of the group are at home.
    Home,
    /// One was written in the last two seconds.
    Warm,
    /// None of them has come yet.
    Missing,
    /// Some have come.
    Part,
    /// One was written a moment ago.
    Hot,
}

const LEVELS: [(Level, char); 6] =
    [(Level::Away, ' '), (Level::Home, '.'), (Level::Warm, '+'), (Level::Missing, '-'), (Level::Part, '~'), (Level::Hot, '#')];

/// Rows of equal length, from the region's start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    pub columns: usize,
    pub levels: Vec<Level>,
}

impl Map {
    /// A map of a region with `side` pages in a row: `here` says which pages are, `ages` how many ticks ago each was written.
    pub fn of(side: usize, here: &[Extent], ages: impl Iterator<Item = Option<u64>>) -> Map {
        let mut here = here.iter().peekable();
        let level = |(page, age): (u64, Option<u64>)| {
            while here.next_if(|extent| extent.end() <= page).is_some() {}
            match age {
                Some(..HOT) => Level::Hot,
                _ if here.peek().is_none_or(|extent| extent.first() > page) => Level::Missing,
                Some(..WARM) => Level::Warm,
                _ => Level::Home,
            }
        };
        let map = Map { columns: side, levels: (0..).zip(ages).map(level).collect() };
        map.narrowed(COLUMNS_MAX)
    }

    /// A region that is elsewhere.
    pub fn away(side: usize) -> Map {
        Map { columns: side, levels: vec![Level::Away; side * (side + 1)] }.narrowed(COLUMNS_MAX)
    }

    /// The same with squares of cells as one, so that at most `columns` stand in a row.
    pub fn narrowed(&self, columns: usize) -> Map {
        let by = self.columns.div_ceil(columns.max(1));
        if by <= 1 {
            return self.clone();
        }
        let narrow = self.columns.div_ceil(by);
        let rows: Vec<&[Level]> = self.levels.chunks(self.columns.max(1)).collect();
        let group = |rows: &[&[Level]], column: usize| {
            let cells = rows.iter().flat_map(|row| row.iter().skip(column * by).take(by)).copied();
            let (most, least) = cells.fold((Level::Away, Level::Hot), |(most, least), cell| (most.max(cell), least.min(cell)));
            if most == Level::Missing && least < Level::Missing { Level::Part } else { most }
        };
        let levels = rows.chunks(by).flat_map(|rows| (0..narrow).map(move |column| group(rows, column))).collect();
        Map { columns: narrow, levels }
    }

    pub fn to_text(&self) -> String {
        let sign = |level: &Level| LEVELS.iter().find(|(of, _)| of == level).map_or(' ', |(_, sign)| *sign);
        self.levels.iter().map(sign).collect()
    }

    /// `None` if a sign is none of a map's.
    pub fn from_text(columns: usize, text: &str) -> Option<Map> {
        let level = |sign: char| LEVELS.iter().find(|(_, of)| *of == sign).map(|(level, _)| *level);
        Some(Map { columns, levels: text.chars().map(level).collect::<Option<_>>()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_shows_what_it_does() {
        let here = [Extent::between(0, 2), Extent::page(4)];
        let ages = [Some(0), Some(WARM), None, Some(WARM - 1), Some(HOT)];
        let map = Map::of(8, &here, ages.into_iter());
        assert_eq!(map.levels, [Level::Hot, Level::Home, Level::Missing, Level::Missing, Level::Warm]);
        assert_eq!(map.to_text(), "#.--+");
        assert_eq!(Map::from_text(8, "#.--+"), Some(map));
        assert_eq!(Map::from_text(8, "?"), None);
    }

    #[test]
    fn a_group_shows_what_is_missing_in_it() {
        let map = Map::from_text(4, "..--.#--+.  +-  ....").unwrap();
        let narrow = map.narrowed(2);
        assert_eq!((narrow.columns, narrow.to_text().as_str()), (2, "#-~ .."));
        assert_eq!(map.narrowed(4), map);
        assert_eq!(Map::away(128).narrowed(32).levels.len(), 32 * 33);
    }
}
