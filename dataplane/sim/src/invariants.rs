//! What must hold after every turn, at promises, after deaths and recoveries. Each check panics with what it found.
//!
//! Numbers in the tally are those of FAULTS's invariants. To add one: a function here, a call where the moment is, a count
//! in the tally, and a canary that makes it fail. Not here: histories of blocks (`register`) and memory (`memory`).

use std::collections::BTreeSet;

use penstock_engine::{FenceReason, HostOp, LayerNo, RecoveryReport, ReplicaNo, Stage, Status, StoreConfig};

use penstock_wire::label::Label;

use crate::drive::{Cut, Drive};
use crate::faults::rot;
use crate::oracle::Command;
use crate::orders::{Pending, volume_of};
use crate::probe::Probe;
use crate::snapshots::layer_in;
use crate::stamp::{BLOCK, Image, SECTOR, ZEROS, sector_of};
use crate::world::{Standing, World};

/// Blocks that a look at a promise reads.
const PROMISE_BLOCKS: usize = 4;
/// And blocks that it did not promise.
const OLD_PROMISE_BLOCKS: usize = 24;

/// What a life on a copy is asked for: the oracle's volume, and where the store has it.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Sight {
    volume: u32,
    replica: ReplicaNo,
    /// For a snapshot.
    layer: Option<LayerNo>,
}

/// Blocks that a life on a copy has shown whole.
struct Shown {
    sight: Sight,
    blocks: Vec<u64>,
    images: Vec<Image>,
}

impl World {
    /// After every turn.
    pub fn check_cheap(&mut self, shard: usize) {
        let s = &self.shards[shard];
        let view = s.store.as_ref().expect("alive").view();
        assert!(view.ring_used <= view.ring_blocks, "{} of {} blocks of the log are in use", view.ring_used, view.ring_blocks);
        assert!(view.extents_free <= view.extents, "{} of {} extents are free", view.extents_free, view.extents);
        assert_eq!(view.disk_out, s.out.len() as u64, "the store counts {} device commands, {} are out", view.disk_out, s.out.len());
        assert!(view.held >= s.ios.len() as u64, "the store holds {} commands, {} were not answered", view.held, s.ios.len());
        assert!(!view.quiescent || s.out.is_empty() && s.ios.is_empty(), "a store with work calls itself quiescent: {view:?}");
        if s.turns.is_multiple_of(8) {
            s.store.as_ref().expect("alive").audit_promises().unwrap_or_else(|error| panic!("shard {shard}: {error}"));
        }
        match (&s.standing, view.stage) {
            (Standing::Opening, Stage::Opening)
            | (Standing::Serving, Stage::Serving | Stage::Fenced(_) | Stage::Stopping)
            | (Standing::Failed(_), Stage::Failed)
            | (Standing::Stopped, Stage::Stopped) => {}
            (told, is) => panic!("shard {shard} says it is {is:?}; told was {told:?}"),
        }
        assert!(
            s.fence.is_none() || !matches!(view.stage, Stage::Serving),
            "the node remembers fence {:?}, and shard {shard} serves as if well",
            s.fence
        );
        self.tally.check("cheap, after each turn");
    }

    /// Recovery is over: what was acknowledged is there (1), and space adds up (24).
    pub fn check_recovered(&mut self, shard: usize, report: &RecoveryReport) {
        let s = &self.shards[shard];
        assert!(
            report.lost_blocks == 0 && report.lost_batches == 0 || self.plan.faults.destroys(),
            "recovery lost {report:?}, and nothing was destroyed"
        );
        assert!(report.lost_batches == 0 || s.clouded, "recovery lost batches, and no header was destroyed: {report:?}");
        self.tally.check("recovery reports true (13)");
        self.shards[shard].look_over = true;
    }

    /// At the end of the turn in which a store began to serve.
    pub fn look_over(&mut self, shard: usize) {
        let s = &mut self.shards[shard];
        if !std::mem::take(&mut s.look_over) {
            return;
        }
        let clouded = s.clouded;
        for v in self.volumes.values().filter(|v| v.shard == shard && v.created && !v.doomed) {
            let store = self.shards[shard].store.as_ref().expect("it serves");
            for (no, layer, _) in self.taken(v.no) {
                let found = v.replica.and_then(|replica| layer_in(store, replica, no));
                assert!(found == Some(layer) || clouded, "snapshot {no} of volume {} is layer {found:?} and was {layer:?}", v.no);
            }
            assert!(v.replica.is_some() || clouded, "volume {} was acknowledged, and shard {shard} has recovered without it", v.no);
        }
        self.tally.check("volumes there after recovery (1)");
    }

    /// Extents taken are those reachable. Where metadata was hit, what a lost page mapped is rightly counted as leaked.
    pub fn audit(&self, shard: usize, when: &str) {
        let s = &self.shards[shard];
        let (drive, start) = (&self.drives[s.drive], s.share.start.0);
        if !s.clouded {
            let store = s.store.as_ref().expect("alive");
            store.audit(|at| drive.bytes(start + at.0)).unwrap_or_else(|e| panic!("shard {shard}, audit {when}: {e}"));
        }
    }

    /// An acknowledgement is going out: were the power to go now, would the next life find what it promises? (1, 5, 9, 15)
    pub fn check_promise(&mut self, shard: usize, command: &Command) {
        let (HostOp::Write(span) | HostOp::Zero(span) | HostOp::CompareWrite(span)) = command.op else { return };
        if !self.volumes.contains_key(&command.volume) || self.volumes[&command.volume].doomed {
            return;
        }
        let cut = self.rng.pick(&[Cut::AllLost, Cut::AllLost, Cut::PerBlock, Cut::PerSector]);
        let rng = &mut self.rng.fork(3);
        let twin = self.drives[self.shards[shard].drive].after_cut(cut, rng);
        let Some(mut probe) = self.second_life(shard, twin, "a promise") else { return };
        let Some(replica) = probe.replicas.iter().find(|(_, shape)| volume_of(&shape.segment) == command.volume).map(|(no, _)| *no) else {
            panic!("volume {} would be gone after a power cut, and a write to it was just acknowledged", command.volume);
        };
        let sight = Sight { volume: command.volume, replica, layer: None };
        let (first, last) = (span.offset / BLOCK as u64, (span.offset + span.len - 1) / BLOCK as u64);
        let some = PROMISE_BLOCKS.min((last - first + 1) as usize);
        let promised: Vec<u64> = (0..some).map(|_| self.rng.within(first, last)).collect();
        self.check_blocks(&mut probe, sight, &promised, "after an acknowledgement and a power cut");
        // Older promises stand too: of the blocks that were ever touched, some.
        let (touched, size) = (self.oracle.touched(command.volume), self.volumes[&command.volume].shape.blocks);
        let some = OLD_PROMISE_BLOCKS.min(touched.len());
        let old: Vec<u64> = (0..some).map(|_| self.rng.pick(&touched)).filter(|block| *block < size).collect();
        self.check_blocks(&mut probe, sight, &old, "after another acknowledgement and a power cut");
        self.tally.check("promises on a copy of the media (9)");
    }

    /// The node died: whatever a next life finds on each drive must be what hosts may expect, all of it (1, 2, 3, 4, 13, 15).
    pub fn check_after_death(&mut self) {
        for shard in 0..self.shards.len() {
            if self.rng.one_in(2) {
                let twin = self.drives[self.shards[shard].drive].clone();
                self.check_all(shard, twin, "after a death");
            }
            for _ in 0..self.plan.malformed {
                self.check_malformed(shard);
            }
        }
    }

    /// Opens a copy and reads every block that was ever touched.
    pub fn check_all(&mut self, shard: usize, twin: Drive, when: &str) {
        let Some(mut probe) = self.second_life(shard, twin, when) else { return };
        let shown = self.read_all(shard, &mut probe, when);
        if self.rng.one_in(2) {
            self.check_outlives(shard, probe, shown, when);
        } else if self.shards[shard].fence.is_none() && !self.shards[shard].clouded {
            probe.come_to_rest().unwrap_or_else(|stuck| panic!("shard {shard} {when}: {stuck}"));
            probe.audit().unwrap_or_else(|e| panic!("shard {shard} {when}: {e}"));
            self.tally.check("accounting after recovery and drain (24)");
        }
        self.tally.check("whole drives read back (1, 3, 13, 24)");
    }

    /// A checkpoint is half way: a power cut now leaves it or the one before, and the log that it needs (5, 9).
    pub fn check_checkpoint(&mut self, shard: usize) {
        let cut = self.rng.pick(&[Cut::AllLost, Cut::AllLost, Cut::PerBlock]);
        let rng = &mut self.rng.fork(9);
        let twin = self.drives[self.shards[shard].drive].after_cut(cut, rng);
        let when = "after a power cut in a checkpoint";
        let Some(mut probe) = self.second_life(shard, twin, when) else { return };
        self.read_all(shard, &mut probe, when);
        self.tally.check("checkpoints cut off (5, 9)");
    }

    /// A flush failed, and the process dies before anybody hears of it: what the next life shows must stay (7).
    pub fn check_forgotten(&mut self, shard: usize) {
        let when = "after a failed flush that nobody heard of";
        let twin = self.drives[self.shards[shard].drive].clone();
        let config = StoreConfig { fenced: None, ..self.second_config(shard) };
        let Some(mut probe) = self.life_on(shard, twin, config, when) else { return };
        let shown = self.read_all(shard, &mut probe, when);
        self.check_outlives(shard, probe, shown, when);
    }

    /// What a life has shown to a host stays: the power goes at once, and the life after must show the same (1, 7).
    fn check_outlives(&mut self, shard: usize, probe: Probe, shown: Vec<Shown>, when: &str) {
        let fenced = probe.began_fenced();
        let (mut drive, config) = probe.end();
        let rng = &mut self.rng.fork(8);
        drive.power_cut(rng.pick(&[Cut::AllLost, Cut::AllLost, Cut::PerBlock]), rng);
        let Some(mut next) = self.life_on(shard, drive, config, "when the power goes as soon as a store serves") else { return };
        for Shown { sight, blocks, images } in shown {
            let mut images = images.iter();
            let show = |block, status, bytes: &[u8]| {
                let image = images.next().expect("one for each block");
                let after = (status == Status::Ok).then(|| image_of(bytes, self.oracle.kin(sight.volume), block));
                // A fenced store shows what is proven, and a power cut may take the proof.
                let same = after.as_ref() == Some(&Ok(*image)) || after.is_none() && fenced;
                assert!(
                    same || self.shards[shard].clouded && after.is_none(),
                    "{when}: volume {} block {block} was shown as {image:?}; after a power cut it is {status:?} {after:?}",
                    sight.volume,
                );
            };
            let read = next.read_each(sight.replica, sight.layer, &blocks, show);
            read.unwrap_or_else(|stuck| panic!("{when}, then a power cut: {stuck}"));
            self.tally.checks("shown, and there after a power cut (7)", blocks.len() as u64);
        }
    }

    /// Reads every block that was ever touched; returns what was whole.
    fn read_all(&mut self, shard: usize, probe: &mut Probe, when: &str) -> Vec<Shown> {
        let mut shown = Vec::new();
        let clouded = self.shards[shard].clouded;
        for no in self.volumes.values().filter(|v| v.shard == shard && v.created && !v.doomed).map(|v| v.no).collect::<Vec<_>>() {
            let found = probe.replicas.iter().find(|(_, shape)| volume_of(&shape.segment) == no).map(|(no, shape)| (*no, shape.blocks));
            let Some((replica, blocks)) = found else {
                assert!(clouded, "volume {no} is gone {when}");
                continue;
            };
            let mut views = vec![(no, None, blocks)];
            for (snapshot, layer, size) in self.taken(no) {
                let found = layer_in(probe.store(), replica, snapshot);
                assert!(found == Some(layer) || clouded, "snapshot {snapshot} of volume {no} is layer {found:?} and was {layer:?} {when}");
                views.extend(found.map(|layer| (snapshot, Some(layer), size)));
            }
            for (volume, layer, size) in views {
                let mut blocks = self.oracle.touched(volume);
                blocks.retain(|block| *block < size);
                shown.push(self.check_blocks(probe, Sight { volume, replica, layer }, &blocks, when));
            }
        }
        shown
    }

    /// Reads blocks in a second life and holds each against what it may hold; returns those that were whole.
    fn check_blocks(&mut self, probe: &mut Probe, sight: Sight, blocks: &[u64], when: &str) -> Shown {
        let Sight { volume, replica, layer } = sight;
        let mut shown = Shown { sight, blocks: Vec::new(), images: Vec::new() };
        if self.volumes.get(&volume).is_some_and(|v| matches!(v.pending, Some(Pending::Resize { .. }))) {
            // A shrink may or may not have taken hold.
            return shown;
        }
        let (oracle, fenced) = (&self.oracle, probe.began_fenced());
        let show = |block, status, bytes: &[u8]| {
            let possible = oracle.possible(volume, block).unwrap_or_else(|wrong| panic!("{wrong}"));
            match status {
                Status::Ok => match image_of(bytes, oracle.kin(volume), block) {
                    Ok(image) if possible.contains(&image) => {
                        shown.blocks.push(block);
                        shown.images.push(image);
                    }
                    Ok(image) => panic!("{when}: volume {volume} block {block} would hold {image:?}; it may hold {possible:?}"),
                    Err(wrong) => panic!("{when}: volume {volume} block {block}: {wrong}"),
                },
                Status::Unrecovered => assert!(
                    oracle.may_be_lost(volume, block) || fenced,
                    "{when}: volume {volume} block {block} would be lost, and no fault destroyed it; it may hold {possible:?}"
                ),
                other => panic!("{when}: a read of volume {volume} block {block} would be answered {other:?}"),
            }
        };
        probe.read_each(replica, layer, blocks, show).unwrap_or_else(|stuck| panic!("{when}: {stuck}"));
        self.tally.checks("blocks read in a second life", blocks.len() as u64);
        shown
    }

    /// `None` where metadata was hit and the store says so.
    fn second_life(&mut self, shard: usize, twin: Drive, when: &str) -> Option<Probe> {
        let mut config = self.second_config(shard);
        if config.fenced != Some(FenceReason::LogLost) && self.rng.one_in(2) {
            // Were the operator to clear the fence now.
            config.fenced = None;
        }
        self.life_on(shard, twin, config, when)
    }

    fn life_on(&mut self, shard: usize, twin: Drive, config: StoreConfig, when: &str) -> Option<Probe> {
        let rng = self.rng.fork(4);
        let probe = Probe::open(twin, self.shards[shard].share, config, rng).unwrap_or_else(|stuck| panic!("{when}: {stuck}"));
        if self.shards[shard].clouded && (probe.failed.is_some() || probe.report.is_some_and(|r| r.lost_batches > 0)) {
            self.tally.did("second lives that told of lost metadata", 1);
            return None;
        }
        if let Some(error) = &probe.failed {
            panic!("{when}: shard {shard} would not open: {error}");
        }
        Some(probe)
    }

    fn second_config(&self, shard: usize) -> StoreConfig {
        let s = &self.shards[shard];
        StoreConfig { fenced: s.fence, ..s.config.clone() }
    }

    /// Metadata of a copy is damaged in any way (29): the store refuses clearly or recovers honestly. It never lies.
    pub fn check_malformed(&mut self, shard: usize) {
        let share = self.shards[shard].share;
        let mut twin = self.drives[self.shards[shard].drive].clone();
        let hits = self.rng.within(1, 3);
        let metadata = self.plan.faults.metadata;
        self.plan.faults.metadata = true;
        let targets: Vec<u64> = twin
            .occupied(share.start.0..share.start.0 + share.blocks)
            .into_iter()
            .filter(|at| crate::stamp::block_of(&twin.look(*at).expect("occupied")[..]).is_none() && self.may_be_damaged(shard, *at, true))
            .collect();
        self.plan.faults.metadata = metadata;
        if targets.is_empty() {
            return;
        }
        for _ in 0..hits {
            let at = self.rng.pick(&targets);
            let mut page = **twin.look(at).expect("occupied");
            if self.rng.one_in(4) {
                let other = self.rng.pick(&targets);
                page = **twin.look(other).expect("occupied");
            } else {
                rot(&mut page, &mut self.rng);
            }
            twin.corrupt(at, Some(std::rc::Rc::new(page)));
        }
        self.tally.faults("malformed record (29)", hits);
        self.check_label(shard);
        let config = self.second_config(shard);
        let rng = self.rng.fork(5);
        let mut probe = Probe::open(twin, share, config, rng).unwrap_or_else(|stuck| panic!("on a malformed drive: {stuck}"));
        if probe.failed.is_some() {
            self.tally.did("malformed drives refused", 1);
        } else {
            let (clouded, fresh): (bool, Vec<u32>) = (
                self.shards[shard].clouded,
                self.volumes.values().filter(|v| v.shard == shard && !self.oracle.is_clouded(v.no)).map(|v| v.no).collect(),
            );
            self.shards[shard].clouded = true;
            fresh.iter().for_each(|no| self.oracle.cloud(*no));
            self.read_all(shard, &mut probe, "on a malformed drive");
            fresh.iter().for_each(|no| self.oracle.uncloud(*no));
            self.shards[shard].clouded = clouded;
            self.tally.did("malformed drives opened", 1);
        }
        self.tally.check("malformed drives (29)");
    }

    /// A damaged label is no label, and its copy is whole.
    fn check_label(&mut self, shard: usize) {
        let drive = &self.drives[self.shards[shard].drive];
        let mut page = drive.bytes(0);
        let whole = Label::decode(&page).expect("the label stands");
        assert_eq!(Label::decode(&drive.bytes(drive.blocks() - 1)).expect("its copy stands"), whole);
        rot(&mut page, &mut self.rng);
        assert!(Label::decode(&page).is_err(), "a damaged label was taken for one");
        self.tally.fault("malformed label (29)");
    }

    /// No space: only where space is short.
    pub fn check_full(&mut self, shard: usize, command: &Command) {
        let s = &self.shards[shard];
        let view = s.store.as_ref().map_or_else(|| panic!("a dead store answers"), |st| st.view());
        let (HostOp::Write(span) | HostOp::Zero(span) | HostOp::CompareWrite(span)) = command.op else {
            panic!("{:?} was answered NoSpace", command.op);
        };
        let whole = (span.offset | span.len).is_multiple_of(BLOCK as u64);
        // Over a snapshot zeros take pages of the map, and over what is left of removed ones.
        let has_left = |no: &ReplicaNo| s.store.as_ref().is_some_and(|store| store.usage(*no).snapshot_extents > 0);
        let unmerged = s.replicas.iter().any(|(no, volume)| *volume == command.volume && has_left(no));
        let stands = self.snapshots.values().any(|s| s.of == command.volume);
        let kept = stands || unmerged || self.volumes[&command.volume].origin.is_some();
        assert!(!(whole && matches!(command.op, HostOp::Zero(_))) || kept, "giving space back was answered NoSpace");
        // What the command may need, what others out may need, and what is held back for checkpoints.
        let extents = |len: u64| len / (16 * BLOCK as u64) + 2;
        let others: u64 = s.ios.values().map(|c| if c.op.reads() { 0 } else { c.op.span().map_or(0, |s| extents(s.len)) }).sum();
        let need = extents(span.len) + others + view.undrained_extents;
        let reserve = 16 + view.extents / 8;
        assert!(
            view.extents_free <= need + need / 8 + reserve,
            "NoSpace for {} bytes with {} of {} extents free and {} undrained",
            span.len,
            view.extents_free,
            view.extents,
            view.undrained_extents
        );
        self.tally.check("NoSpace only when space is short (15)");
    }
}

fn image_of(bytes: &[u8], kin: &BTreeSet<u32>, block: u64) -> Result<Image, String> {
    let mut image = ZEROS;
    for (s, sector) in bytes.chunks_exact(SECTOR).enumerate() {
        let (id, told) = sector_of(sector).ok_or_else(|| format!("sector {s} is no host's data: {:02x?}", &sector[..32]))?;
        if let Some((place, at)) = told
            && (!kin.contains(&place.volume) || place.block != block || at != s)
        {
            return Err(format!("sector {s} belongs to {place:?} sector {at}"));
        }
        image[s] = id;
    }
    Ok(image)
}
