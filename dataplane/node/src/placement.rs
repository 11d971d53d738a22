//! Which core runs which store, and how a new drive is cut. Pure.
//!
//! Store `i` of a drive goes to the `i`-th of the cores rotated by what they already carry, so that several drives with
//! fewer stores than there are cores do not all land on the first. A drive formatted on a machine with more cores keeps
//! its stores: some cores then run several. Not here: moving a running store.

use penstock_wire::BLOCK;
use penstock_wire::label::{RING_BLOCKS_MIN, STORES_MAX};

/// For each of `stores` stores the place of its core in `load`, which counts the stores each core has; `load` is updated.
pub fn place_stores(load: &mut [u32], stores: usize) -> Vec<usize> {
    assert!(!load.is_empty(), "a node has a core");
    (0..stores)
        .map(|_| {
            let (core, _) = load.iter().enumerate().min_by_key(|&(at, &n)| (n, at)).expect("not empty");
            load[core] += 1;
            core
        })
        .collect()
}

/// The store for a new volume: the one with most free extents; of equals the one with fewest volumes.
pub fn place_volume(stores: impl Iterator<Item = (u64, u32)>) -> Option<usize> {
    stores.enumerate().max_by_key(|&(at, (free, volumes))| (free, std::cmp::Reverse(volumes), std::cmp::Reverse(at))).map(|(at, _)| at)
}

/// How a blank drive is cut.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Cut {
    pub stores: usize,
    /// 4 KiB blocks of each store's oplog.
    pub ring_blocks: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CutError {
    #[error("{asked} stores were asked for: use 1 to {STORES_MAX}")]
    Stores { asked: usize },
    #[error("an oplog of {asked} bytes was asked for: use at least {least}, and at most half of each store ({most})")]
    Oplog { asked: u64, least: u64, most: u64 },
    #[error("the drive has {blocks} blocks of 4 KiB, too few for {stores} stores: use a drive of at least {need} bytes, or fewer stores")]
    TooSmall { blocks: u64, stores: usize, need: u64 },
}

/// Oplog of a store if nobody said: an eighth of it, within these.
const RING_DEFAULT_MIN: u64 = 16 << 20;
const RING_DEFAULT_MAX: u64 = 1 << 30;

/// # Errors
/// When what was asked for does not fit the drive.
pub fn cut(drive_blocks: u64, cores: usize, stores: Option<u16>, oplog_bytes: Option<u64>) -> Result<Cut, CutError> {
    let block = BLOCK as u64;
    // A store wants its smallest ring and as much again for extents.
    let share_min = 2 * RING_BLOCKS_MIN + 64;
    let room = drive_blocks.saturating_sub(2) / share_min;
    let stores = match stores.map(usize::from) {
        Some(asked) if asked == 0 || asked > STORES_MAX => return Err(CutError::Stores { asked }),
        Some(asked) => asked,
        None => (cores.min(STORES_MAX) as u64).min(room.max(1)) as usize,
    };
    if stores as u64 > room {
        let need = (share_min * stores as u64 + 2) * block;
        return Err(CutError::TooSmall { blocks: drive_blocks, stores, need });
    }
    let share = (drive_blocks - 2) / stores as u64;
    let most = share / 2;
    let ring_blocks = match oplog_bytes {
        Some(asked) => {
            let blocks = asked / block;
            if !(RING_BLOCKS_MIN..=most).contains(&blocks) {
                return Err(CutError::Oplog { asked, least: RING_BLOCKS_MIN * block, most: most * block });
            }
            blocks
        }
        None => (share / 8).clamp(RING_DEFAULT_MIN / block, RING_DEFAULT_MAX / block).clamp(RING_BLOCKS_MIN, most),
    };
    Ok(Cut { stores, ring_blocks })
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::label::Label;
    use penstock_wire::{ClusterId, DriveId, Incarnation, NodeId};
    use proptest::prelude::*;

    #[test]
    fn stores_go_to_the_least_loaded_core() {
        let mut load = vec![0, 0, 0];
        assert_eq!(place_stores(&mut load, 2), [0, 1]);
        assert_eq!(place_stores(&mut load, 2), [2, 0]);
        assert_eq!(place_stores(&mut load, 4), [1, 2, 0, 1]);
        assert_eq!(load, [3, 3, 2]);
    }

    #[test]
    fn volume_goes_where_most_is_free() {
        assert_eq!(place_volume([(5, 0), (9, 3), (9, 1)].into_iter()), Some(2));
        assert_eq!(place_volume([(5, 1), (5, 1)].into_iter()), Some(0));
        assert_eq!(place_volume(std::iter::empty()), None);
    }

    #[test]
    fn cut_names_what_does_not_fit() {
        let gib = 1u64 << 30;
        assert_eq!(cut(gib / 4096, 2, None, None), Ok(Cut { stores: 2, ring_blocks: (gib / 4096 - 2) / 2 / 8 }));
        assert!(matches!(cut(gib / 4096, 2, Some(65), None), Err(CutError::Stores { asked: 65 })));
        assert!(matches!(cut(gib / 4096, 2, Some(0), None), Err(CutError::Stores { asked: 0 })));
        assert!(matches!(cut(gib / 4096, 2, Some(64), None), Err(CutError::TooSmall { stores: 64, .. })));
        assert!(matches!(cut(gib / 4096, 2, None, Some(4096)), Err(CutError::Oplog { .. })));
        assert!(matches!(cut(10, 1, None, None), Err(CutError::TooSmall { .. })));
        assert_eq!(cut(gib / 4096, 1, None, Some(64 << 20)).unwrap().ring_blocks, 16384);
    }

    proptest! {
        #[test]
        fn any_cut_makes_a_label(blocks in 0u64..1 << 32, cores in 1usize..128, stores in proptest::option::of(1u16..100), oplog in proptest::option::of(0u64..1 << 32)) {
            if let Ok(cut) = cut(blocks, cores, stores, oplog) {
                let label = Label::plan(ClusterId([1; 16]), NodeId([2; 16]), DriveId([3; 16]), Incarnation([4; 16]), blocks, cut.stores, cut.ring_blocks);
                prop_assert!(label.is_ok(), "{:?} of {} blocks: {:?}", cut, blocks, label);
            }
        }
    }
}
