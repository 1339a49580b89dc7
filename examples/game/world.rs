//! The game itself: herds that graze on a meadow, wholly inside one region.
//!
//! Role: where each thing lies in the region, how a world begins, and what one tick changes. Neighbours: `player` ticks it, `proof` plays it again and digests it. Invariants: a tick is a
//! pure function of the region's bytes, in integers, so any host gets the same bytes after the same ticks; nothing of the world is outside the region.
//!
//! A page is a tile of 32 x 32 cells, so a map of the region's pages is a map of the meadow. Above the meadow lies one row of pages that is no meadow: a header, and the grazers.
//! A cell is the height of its grass when it is full grown (8 bits) and the tick at which it was grazed last (24 bits); grass grows back by the age of that, so that only hooves write.

use pageferry::{Region, RegionError};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};
use thiserror::Error;

pub const PAGE_BYTES: usize = 4096;
/// Cells on a side of a tile.
const TILE: usize = 32;
const TILE_CELLS: usize = TILE * TILE;
const PAGE_WORDS: usize = PAGE_BYTES / 8;

const MAGIC: u64 = u64::from_le_bytes(*b"grazers1");
const HERDS: usize = 16;
const GRAZERS_A_HERD: usize = 512;
const GRAZERS: usize = HERDS * GRAZERS_A_HERD;

// Words of the header; the herds' centres follow, one word of position and one of heading each.
const AT_MAGIC: usize = 0;
const AT_SIDE: usize = 1;
const AT_SEED: usize = 2;
const AT_TICK: usize = 3;
const AT_CHECKSUM: usize = 4;
const AT_EATEN: usize = 5;
const AT_HERDS: usize = 8;

/// What a herd's centre walks in a tick, in 1/256 cells.
const HERD_STEP: i64 = 3 * 256;
/// A herd thinks about its heading this often, in ticks.
const TURN: u64 = 24;
/// Further from its herd's centre than this, in cells, a grazer runs.
const STRAGGLER: i64 = 20;

/// Sixteen headings, in 1/256.
const HEADINGS: [(i64, i64); 16] = [
    (256, 0),
    (237, 98),
    (181, 181),
    (98, 237),
    (0, 256),
    (-98, 237),
    (-181, 181),
    (-237, 98),
    (-256, 0),
    (-237, -98),
    (-181, -181),
    (-98, -237),
    (0, -256),
    (98, -237),
    (181, -181),
    (237, -98),
];

#[derive(Debug, Error)]
pub enum WorldError {
    #[error("the region holds no world of this game: {what} is {found}")]
    NoWorld { what: &'static str, found: u64 },
    #[error(transparent)]
    Region(#[from] RegionError),
}

/// A world in its region.
#[derive(Clone)]
pub struct World {
    region: Region,
    /// Tiles on a side of the meadow, a power of two.
    side: usize,
}

/// The same, as shared atomics.
struct Parts<'r> {
    header: &'r [AtomicU64],
    grazers: &'r [AtomicU64],
    cells: &'r [AtomicU32],
}

/// A grazer, packed into one word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Grazer {
    x: u16,
    y: u16,
    heading: u8,
    herd: u8,
}

impl World {
    /// Bytes of the region of a meadow with `side` tiles on a side: its row of header and grazers comes on top.
    pub fn region_bytes(side: usize) -> u64 {
        (side * (side + 1) * PAGE_BYTES) as u64
    }

    /// Makes a world in an empty region of [`region_bytes`](World::region_bytes). Writes every page of the meadow.
    ///
    /// # Errors
    /// Those of the region.
    pub fn create(region: Region, side: usize, seed: u64) -> Result<World, WorldError> {
        let mut tile = vec![0; PAGE_BYTES];
        for number in 0..side * side {
            grow(&mut tile, number % side, number / side, side, seed);
            region.write_at(((side + number) * PAGE_BYTES) as u64, &tile)?;
        }
        let world = World { region, side };
        let parts = world.parts()?;
        let cells_mask = side * TILE - 1;
        for (herd, words) in parts.header[AT_HERDS..].chunks_exact(2).take(HERDS).enumerate() {
            let dice = mix(seed ^ (herd as u64) << 32);
            let [x, y] = [dice & cells_mask as u64, dice >> 24 & cells_mask as u64];
            words[0].store(x << 8 | y << 40, Relaxed);
            words[1].store(dice >> 60, Relaxed);
            for number in 0..GRAZERS_A_HERD {
                let dice = mix(dice ^ number as u64);
                let about = |centre: u64, dice: u64| ((centre + dice % 64) & cells_mask as u64) as u16;
                #[allow(clippy::cast_possible_truncation, reason = "herds are few, headings 16")]
                let grazer = Grazer { x: about(x, dice), y: about(y, dice >> 16), heading: (dice >> 60) as u8, herd: herd as u8 };
                parts.grazers[herd * GRAZERS_A_HERD + number].store(grazer.pack(), Relaxed);
            }
        }
        for (at, value) in [(AT_SIDE, side as u64), (AT_SEED, seed), (AT_MAGIC, MAGIC)] {
            parts.header[at].store(value, Relaxed);
        }
        Ok(world)
    }

    /// The world that is in this region already. Touches its first page.
    ///
    /// # Errors
    /// [`WorldError::NoWorld`] if there is none.
    pub fn attach(region: Region) -> Result<World, WorldError> {
        let header = region.atomics_u64(0, PAGE_WORDS)?;
        let magic = header[AT_MAGIC].load(Relaxed);
        if magic != MAGIC {
            return Err(WorldError::NoWorld { what: "its first word", found: magic });
        }
        let found = header[AT_SIDE].load(Relaxed);
        let side = usize::try_from(found).ok().filter(|side| side.is_power_of_two() && *side <= 2048);
        let side = side.filter(|side| World::region_bytes(*side) == region.size_bytes());
        let side = side.ok_or(WorldError::NoWorld { what: "the side of its meadow", found })?;
        Ok(World { region, side })
    }

    pub fn region(&self) -> &Region {
        &self.region
    }

    /// Pages in a row of the map.
    pub fn side(&self) -> usize {
        self.side
    }

    pub fn seed(&self) -> Result<u64, WorldError> {
        self.word(AT_SEED)
    }

    /// Ticks so far.
    pub fn ticks(&self) -> Result<u64, WorldError> {
        self.word(AT_TICK)
    }

    /// Of all that every grazer ever did, in order.
    pub fn checksum(&self) -> Result<u64, WorldError> {
        self.word(AT_CHECKSUM)
    }

    /// One step of the game. `wrote` is told each page that is written, often more than once.
    ///
    /// # Errors
    /// Those of the region.
    pub fn tick(&self, mut wrote: impl FnMut(usize)) -> Result<(), WorldError> {
        let parts = self.parts()?;
        let tick = parts.header[AT_TICK].load(Relaxed);
        let seed = parts.header[AT_SEED].load(Relaxed);
        let centres = self.walk(&parts, seed, tick);
        let (mut checksum, mut eaten) = (parts.header[AT_CHECKSUM].load(Relaxed), 0);
        for (number, place) in parts.grazers.iter().enumerate() {
            let mut grazer = Grazer::unpack(place.load(Relaxed));
            let dice = mix(seed ^ tick << 20 ^ number as u64);
            grazer = self.step(&parts, grazer, centres[usize::from(grazer.herd) % HERDS], tick, dice);
            let at = self.cell(grazer.x.into(), grazer.y.into());
            let cell = parts.cells[at].load(Relaxed);
            let bite = height(cell, tick);
            parts.cells[at].store(cell & 0xff | stamp(tick) << 8, Relaxed);
            wrote(self.side + at / TILE_CELLS);
            place.store(grazer.pack(), Relaxed);
            wrote(1 + number / PAGE_WORDS);
            eaten += u64::from(bite);
            checksum = mix(checksum ^ grazer.pack() ^ u64::from(bite) << 56);
        }
        parts.header[AT_EATEN].fetch_add(eaten, Relaxed);
        parts.header[AT_CHECKSUM].store(checksum, Relaxed);
        parts.header[AT_TICK].store(tick + 1, Relaxed);
        wrote(0);
        Ok(())
    }

    /// Moves the herds' centres on, and says where they are, in cells.
    fn walk(&self, parts: &Parts, seed: u64, tick: u64) -> [(i64, i64); HERDS] {
        let mask = (self.side * TILE * 256 - 1) as i64;
        let mut centres = [(0, 0); HERDS];
        for (herd, words) in parts.header[AT_HERDS..].chunks_exact(2).take(HERDS).enumerate() {
            let mut heading = words[1].load(Relaxed);
            if (tick + herd as u64).is_multiple_of(TURN) {
                heading = (heading + 15 + mix(seed ^ tick << 8 ^ herd as u64) % 3) % 16;
                words[1].store(heading, Relaxed);
            }
            let (dx, dy) = HEADINGS[heading as usize % 16];
            let position = words[0].load(Relaxed);
            let (x, y) = (i64::from(position as u32), i64::from((position >> 32) as u32));
            let [x, y] = [(x, dx), (y, dy)].map(|(at, along)| (at + along * HERD_STEP / 256) & mask);
            words[0].store(x.cast_unsigned() | y.cast_unsigned() << 32, Relaxed);
            centres[herd] = (x / 256, y / 256);
        }
        centres
    }

    /// Where a grazer goes: straight on or a little aside, to higher grass, and not too far from its herd.
    fn step(&self, parts: &Parts, grazer: Grazer, centre: (i64, i64), tick: u64, dice: u64) -> Grazer {
        let cells = (self.side * TILE) as i64;
        // The meadow has no edge: the way around may be the shorter one.
        let way = |from: u16, to: i64| (to - i64::from(from) + cells / 2).rem_euclid(cells) - cells / 2;
        let (to_x, to_y) = (way(grazer.x, centre.0), way(grazer.y, centre.1));
        let strides = if to_x.abs().max(to_y.abs()) > STRAGGLER { 5 } else { 2 };
        let mut best = (i64::MIN, grazer);
        for (turn, jitter) in [(0, dice & 15), (1, dice >> 4 & 15), (15, dice >> 8 & 15)] {
            let heading = (grazer.heading + turn) % 16;
            let (dx, dy) = HEADINGS[usize::from(heading)];
            let [x, y] = [(grazer.x, dx), (grazer.y, dy)].map(|(at, along)| (i64::from(at) + along * strides / 256) & (cells - 1));
            let grass = i64::from(height(parts.cells[self.cell(x.cast_unsigned(), y.cast_unsigned())].load(Relaxed), tick));
            let score = grass + (dx * to_x + dy * to_y) / 64 + jitter.cast_signed();
            if score > best.0 {
                #[allow(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "masked to the meadow, at most 65,536 cells wide"
                )]
                let there = Grazer { x: x as u16, y: y as u16, heading, ..grazer };
                best = (score, there);
            }
        }
        best.1
    }

    /// The number of a cell among the meadow's: tile by tile.
    fn cell(&self, x: u64, y: u64) -> usize {
        let [x, y] = [x, y].map(|at| usize::try_from(at).unwrap_or(0));
        ((y / TILE) * self.side + x / TILE) * TILE_CELLS + (y % TILE) * TILE + x % TILE
    }

    fn word(&self, at: usize) -> Result<u64, WorldError> {
        Ok(self.region.atomics_u64(0, PAGE_WORDS)?[at].load(Relaxed))
    }

    fn parts(&self) -> Result<Parts<'_>, WorldError> {
        let meadow = self.side * PAGE_BYTES;
        Ok(Parts {
            header: self.region.atomics_u64(0, PAGE_WORDS)?,
            grazers: self.region.atomics_u64(PAGE_BYTES as u64, GRAZERS)?,
            cells: self.region.atomics_u32(meadow as u64, self.side * self.side * TILE_CELLS)?,
        })
    }
}

impl Grazer {
    fn pack(self) -> u64 {
        u64::from(self.x) | u64::from(self.y) << 16 | u64::from(self.heading) << 32 | u64::from(self.herd) << 40
    }

    #[allow(clippy::cast_possible_truncation, reason = "that is how they were packed")]
    fn unpack(word: u64) -> Grazer {
        Grazer { x: word as u16, y: (word >> 16) as u16, heading: (word >> 32) as u8 % 16, herd: (word >> 40) as u8 }
    }
}

/// The tick as a cell keeps it: never 0, which is grass that nobody has grazed.
fn stamp(tick: u64) -> u32 {
    u32::try_from(tick % 0xff_ffff).unwrap_or(0) + 1
}

/// Of the grass in a cell, now: it takes four ticks to grow by one, up to what the ground gives.
fn height(cell: u32, tick: u64) -> u32 {
    let (full, grazed) = (cell & 0xff, cell >> 8);
    if grazed == 0 {
        return full;
    }
    let age = (stamp(tick) + 0xff_ffff - grazed) % 0xff_ffff;
    full.min(age / 4)
}

/// A tile of a new meadow: hills of 64 cells, smooth between their corners.
fn grow(tile: &mut [u8], column: usize, row: usize, side: usize, seed: u64) {
    let hills = (side / 2).max(1);
    let corner = |x: usize, y: usize| mix(seed ^ ((x % hills) << 16 | (y % hills)) as u64) as u32 % 192;
    let (left, top) = (column / 2, row / 2);
    let corners = [corner(left, top), corner(left + 1, top), corner(left, top + 1), corner(left + 1, top + 1)];
    for (number, cell) in tile.chunks_exact_mut(4).enumerate() {
        let (x, y) = ((column % 2 * TILE + number % TILE) as u32, (row % 2 * TILE + number / TILE) as u32);
        let [top, bottom] = [(0, 1), (2, 3)].map(|(l, r)| corners[l] * (64 - x) + corners[r] * x);
        let full = 63 + (top * (64 - y) + bottom * y) / 4096;
        cell.copy_from_slice(&full.to_le_bytes());
    }
}

/// Spreads every bit over all others (the finalizer of SplitMix64).
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn world(seed: u64) -> World {
        let region = Region::builder().size(World::region_bytes(32)).open().unwrap();
        World::create(region, 32, seed).unwrap()
    }

    #[test]
    fn what_a_tick_writes_is_told_and_the_herds_move_on() {
        let world = world(7);
        let pages = world.region().len() / PAGE_BYTES;
        let look = |page: usize| {
            let mut bytes = vec![0; PAGE_BYTES];
            world.region().read_at((page * PAGE_BYTES) as u64, &mut bytes).unwrap();
            bytes
        };
        let mut ever = HashSet::new();
        let mut most = 0;
        for number in 0..60 {
            // Each look reads everything.
            let looks = number % 20 == 7;
            let before: Vec<_> = (0..pages).filter(|_| looks).map(look).collect();
            let mut told = HashSet::new();
            world.tick(|page| told.extend([page])).unwrap();
            assert!(before.iter().enumerate().all(|(page, before)| told.contains(&page) || *before == look(page)));
            most = most.max(told.len());
            ever.extend(told);
        }
        assert_eq!(world.ticks().unwrap(), 60);
        assert!(ever.len() > most * 5 / 4 && most < pages, "{} pages in a second, {most} in a tick, of {pages}", ever.len());
    }

    #[test]
    fn a_world_is_found_again_and_nothing_else_is() {
        let first = world(3);
        first.tick(|_| ()).unwrap();
        let again = World::attach(first.region().clone()).unwrap();
        assert_eq!((again.ticks().unwrap(), again.seed().unwrap(), again.side()), (1, 3, 32));
        first.region().write_at(8, &[33]).unwrap();
        assert!(World::attach(first.region().clone()).is_err());
        assert!(World::attach(Region::builder().size(8192).open().unwrap()).is_err());
    }

    #[test]
    fn grass_grows_back() {
        let grazed = 200 | stamp(1000) << 8;
        assert_eq!([1000, 1004, 1400, 1800, 9999].map(|tick| height(grazed, tick)), [0, 1, 100, 200, 200]);
        assert_eq!(height(200, 5), 200);
        assert_eq!(height(200 | stamp(0xff_fffe) << 8, 0xff_ffff), 0);
    }

    #[test]
    fn a_grazer_comes_back_from_its_word() {
        let grazer = Grazer { x: 65_535, y: 1, heading: 15, herd: 3 };
        assert_eq!(Grazer::unpack(grazer.pack()), grazer);
    }
}
