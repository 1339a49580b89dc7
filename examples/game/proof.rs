//! Proves that the world which arrived is the one that left.
//!
//! Role: plays the same ticks once more, on memory that never moved, and compares. Neighbours: `destination` proves what it took over, `source` what it kept. Invariants: the replay sees
//! of the played world its seed, its size and its number of ticks, nothing else; a digest covers every byte of the region; the game must be at rest.

use crate::world::{World, WorldError};
use blake3::{Hash, Hasher};
use pageferry::{Region, RegionError};

const STEP_BYTES: usize = 4 << 20;

/// What was found, and what must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proof {
    pub ticks: u64,
    pub checksums: [u64; 2],
    pub digests: [String; 2],
}

impl Proof {
    /// Plays a new world as far as this one has come.
    ///
    /// # Errors
    /// [`WorldError`]: of the played region, or no memory for the second.
    pub fn of(played: &World) -> Result<Proof, WorldError> {
        let ticks = played.ticks()?;
        // Without a store a region is plain memory: no pager, no peer.
        let region = Region::builder().size(played.region().size_bytes()).open()?;
        let again = World::create(region, played.side(), played.seed()?)?;
        for _ in 0..ticks {
            again.tick(|_| ())?;
        }
        let digests = [digest(again.region())?, digest(played.region())?].map(|digest| digest.to_hex().to_string());
        Ok(Proof { ticks, checksums: [again.checksum()?, played.checksum()?], digests })
    }

    pub fn holds(&self) -> bool {
        self.checksums[0] == self.checksums[1] && self.digests[0] == self.digests[1]
    }
}

fn digest(region: &Region) -> Result<Hash, RegionError> {
    let mut hasher = Hasher::new();
    let mut bytes = vec![0; STEP_BYTES.min(region.len())];
    for start in (0..region.len()).step_by(STEP_BYTES) {
        let len = STEP_BYTES.min(region.len() - start);
        region.read_at(start as u64, &mut bytes[..len])?;
        hasher.update_rayon(&bytes[..len]);
    }
    Ok(hasher.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_world_that_moved_by_copying_proves_and_one_flipped_bit_does_not() {
        let empty = || Region::builder().size(World::region_bytes(32)).open().unwrap();
        let source = World::create(empty(), 32, 5).unwrap();
        (0..7).for_each(|_| source.tick(|_| ()).unwrap());
        let mut bytes = vec![0; source.region().len()];
        source.region().read_at(0, &mut bytes).unwrap();
        let region = empty();
        region.write_at(0, &bytes).unwrap();
        let moved = World::attach(region).unwrap();
        (0..5).for_each(|_| moved.tick(|_| ()).unwrap());
        let proof = Proof::of(&moved).unwrap();
        assert!(proof.holds() && proof.ticks == 12, "{proof:?}");

        let last = moved.region().size_bytes() - 1;
        moved.region().write_at(last, &[0x80]).unwrap();
        assert!(!Proof::of(&moved).unwrap().holds());
    }
}
