//! Proves that what arrived is what left, to the last byte and the last operation.
//!
//! Role: digests both ends compare. Neighbours: `source` computes what must be, `destination` what is. Invariants: a digest covers
//! every byte of the region, unused ones too; the region must be at rest.
//!
//! The destination changes the region from its first instruction on, so the two ends never hold the same bytes. But an operation is
//! a pure function of seed and number: the source makes the updates of the destination's operations on its own copy, frozen at the
//! handover, and then both must be equal.

use crate::{
    index::{Index, IndexError},
    ledger::{LedgerError, WorkerState, replay},
};
use blake3::{Hash, Hasher};
use pageferry::{Region, RegionError};

const STEP_BYTES: usize = 4 << 20;

/// BLAKE3 of all bytes of a region. Touches all of it.
///
/// # Errors
/// Those of [`Region::read_at`].
pub fn digest(region: &Region) -> Result<Hash, RegionError> {
    let mut hasher = Hasher::new();
    let mut bytes = vec![0; STEP_BYTES.min(region.len())];
    for start in (0..region.len()).step_by(STEP_BYTES) {
        let len = STEP_BYTES.min(region.len() - start);
        region.read_at(start as u64, &mut bytes[..len])?;
        hasher.update_rayon(&bytes[..len]);
    }
    Ok(hasher.finalize())
}

/// Brings a copy that was frozen when the workers were at `from` to where they are at `to`, and digests it.
///
/// # Errors
/// [`LedgerError::State`] if `to` is not later than `from`, or of other workers.
pub fn expected_digest(frozen: &Region, from: &[WorkerState], to: &[WorkerState]) -> Result<Hash, LedgerError> {
    let index = Index::attach(frozen)?;
    for worker in 0..from.len().max(to.len()) {
        let nobody = WorkerState { seed: 0, next_operation: 0 };
        let [from, to] = [from, to].map(|states| states.get(worker).copied().unwrap_or(nobody));
        if from.seed != to.seed || to.next_operation < from.next_operation {
            return Err(LedgerError::State { worker, state: to, seed: from.seed, operations: from.next_operation });
        }
        replay(&index, worker, to.seed, from.next_operation..to.next_operation)?;
    }
    Ok(digest(frozen).map_err(IndexError::from)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{build::Builder, ledger::Slot};

    #[test]
    fn a_frozen_copy_catches_up_exactly_and_one_flipped_bit_shows() {
        let size = (4 << 20) + 8192;
        let [frozen, running] = [(); 2].map(|()| Region::builder().size(size).open().unwrap());
        let mut builder = Builder::new(&frozen).unwrap();
        builder.add("p", 0, b"four words are enough").unwrap();
        let index = builder.finish().unwrap();
        let from = [WorkerState { seed: 3, next_operation: 10 }];
        Slot::of(&index, 0).unwrap().claim(from[0]);
        replay(&index, 0, 3, 0..10).unwrap();

        let mut bytes = vec![0; frozen.len()];
        frozen.read_at(0, &mut bytes).unwrap();
        running.write_at(0, &bytes).unwrap();
        replay(&Index::attach(&running).unwrap(), 0, 3, 10..25).unwrap();
        assert_ne!(digest(&frozen).unwrap(), digest(&running).unwrap());
        let to = [WorkerState { seed: 3, next_operation: 25 }];
        assert_eq!(expected_digest(&frozen, &from, &to).unwrap(), digest(&running).unwrap());
        assert!(expected_digest(&frozen, &to, &from).is_err());

        running.write_at(size - 1, &[0x80]).unwrap();
        assert_ne!(digest(&frozen).unwrap(), digest(&running).unwrap());
    }
}
