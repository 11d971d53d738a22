//! Drives of the node that serve: shown, fenced, scrubbed, let go. Not here: how they come (`opening`).

use std::collections::BTreeMap;
use std::rc::Rc;

use penstock_api::rpc::{
    Barrier, DriveAddParams, DriveCounters, DriveInfo, DriveRemoveParams, DriveState, Empty, ErrorCode, RecoveryInfo, ScrubAction,
    ScrubInfo, StoreInfo,
};
use penstock_api::{ByteSize, DriveId, DriveSpec, VolumeId};
use penstock_engine::{FenceReason, Order, RecoveryReport};
use penstock_wire::BLOCK;
use penstock_wire::label::Label;
use spdk_rs::bdev::BdevEvent;

use super::{Answer, Later, Node, fail};
use crate::core::{CoreIndex, DriveKey, ShardView};
use crate::disk::{Backend, DiskIndex};
use crate::label;
use crate::state::{FenceEntry, fence_text};

/// Where one store of a drive runs.
#[derive(Clone, Debug)]
pub(super) struct StorePlace {
    pub core: CoreIndex,
    pub serving: bool,
    /// What it said when it panicked; it is not run any more.
    pub quarantined: Option<String>,
    pub recovery: Option<(RecoveryReport, u64)>,
}

pub(super) struct Drive {
    pub key: DriveKey,
    pub spec: DriveSpec,
    pub state: DriveState,
    pub reason: Option<String>,
    pub backend: Option<Backend>,
    pub label: Option<Label>,
    pub barrier: Barrier,
    pub volatile: bool,
    pub stores: Vec<StorePlace>,
    /// The drive's place on each core that uses it.
    pub disks: BTreeMap<CoreIndex, DiskIndex>,
    /// Who waits until it serves, or is known not to.
    pub waiters: Vec<Answer<DriveInfo>>,
    scrub: Scrub,
    removing: bool,
}

#[derive(Clone, Debug, Default)]
struct Scrub {
    running: u32,
    blocks: u64,
    bad: u64,
    passes: u64,
    volumes_bad: Vec<VolumeId>,
}

/// Calls a closure when it has been passed a number of times.
pub(super) struct Gate {
    left: std::cell::Cell<usize>,
    then: std::cell::RefCell<Option<Later>>,
}

impl Gate {
    pub fn new(count: usize, then: impl FnOnce(&Rc<Node>) + 'static) -> Rc<Self> {
        Rc::new(Self { left: std::cell::Cell::new(count), then: std::cell::RefCell::new(Some(Box::new(then))) })
    }

    pub fn pass(&self, node: &Rc<Node>) {
        self.left.set(self.left.get() - 1);
        let then = if self.left.get() == 0 { self.then.borrow_mut().take() } else { None };
        if let Some(then) = then {
            then(node);
        }
    }
}

impl Node {
    pub(super) fn drive_of_key(&self, key: DriveKey) -> Option<DriveId> {
        self.drives.borrow().iter().find(|(_, drive)| drive.key == key).map(|(&id, _)| id)
    }

    pub(super) fn close_on_core(
        self: &Rc<Self>,
        core: CoreIndex,
        key: DriveKey,
        disk: Option<DiskIndex>,
        then: impl FnOnce(&Rc<Node>) + 'static,
    ) {
        self.ask_core(
            core,
            move |core, replier| {
                let closed = core.close_stores(key);
                let detached = disk.is_none_or(|disk| closed && core.detach_drive(disk));
                replier.reply(closed && detached);
            },
            move |node, closed: bool| {
                if !closed {
                    tracing::warn!(drive = key.0, "a drive stays attached to a core: commands are still out");
                }
                then(node);
            },
        );
    }

    pub(super) fn on_fenced(self: &Rc<Self>, key: DriveKey, store: u32, reason: FenceReason) {
        let Some(id) = self.drive_of_key(key) else { return };
        if self.drives.borrow().get(&id).is_some_and(|d| d.state == DriveState::Missing) {
            // Its stores were told to stop writing because it is gone, which is no verdict on what it holds.
            return;
        }
        if self.state.borrow().fence(id).is_none() {
            tracing::error!(drive = %id, store, why = fence_text(reason), "a drive is fenced: it takes no more writes");
            let at_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
            let kept = self.remember(|state| state.fences.push(FenceEntry { drive_id: id, reason: reason.into(), at_s }));
            if let Err(error) = kept {
                // The fence holds while we live. A restart would forget it, so there must not be one unseen.
                tracing::error!(drive = %id, %error, "the fence could not be recorded: do not restart penstockd before this is put right");
            }
        }
        // The first reason says what happened; those after it are its echo on the drive's other stores.
        if self.drives.borrow().get(&id).is_some_and(|d| matches!(d.state, DriveState::Serving | DriveState::Quarantined)) {
            self.judge_drive(id);
        }
        // A failed barrier may have lost what another store of the drive wrote.
        self.fence_cores(id, key);
    }

    pub(super) fn on_bdev_event(self: &Rc<Self>, key: DriveKey, event: BdevEvent) {
        let Some(id) = self.drive_of_key(key) else { return };
        match event {
            BdevEvent::Removed => self.on_drive_gone(id, key),
            BdevEvent::Resized | BdevEvent::Media | BdevEvent::Other(_) => tracing::info!(drive = %id, ?event, "a drive reports"),
        }
    }

    /// A drive went away under us. Its doors close, its stores end, and SPDK gets back what it waits for; the drive is shown as
    /// missing until it is added again or removed. Nothing is fenced: what it acknowledged before is on it.
    fn on_drive_gone(self: &Rc<Self>, id: DriveId, key: DriveKey) {
        let spec = {
            let mut drives = self.drives.borrow_mut();
            let Some(drive) = drives.get_mut(&id).filter(|d| !d.removing) else { return };
            drive.removing = true;
            drive.state = DriveState::Missing;
            drive.reason = Some("the drive went away while it was in use".to_owned());
            drive.spec.clone()
        };
        tracing::error!(drive = %id, "a drive is gone");
        self.fence_cores(id, key);
        let volumes: Vec<VolumeId> = self.volumes.borrow().iter().filter(|(_, v)| v.drive == id).map(|(&id, _)| id).collect();
        self.close_exports_of(volumes, move |node| {
            node.stop_drive(id, move |node| node.show_missing(id, spec, "the drive went away while it was in use".to_owned()));
        });
    }

    /// Tells every store of the drive that it is not to be written any more.
    fn fence_cores(self: &Rc<Self>, id: DriveId, key: DriveKey) {
        let cores: Vec<CoreIndex> = self.drives.borrow().get(&id).map(|d| d.disks.keys().copied().collect()).unwrap_or_default();
        for core in cores {
            self.ask_core(
                core,
                move |core, replier| {
                    core.fence_drive(key, FenceReason::Drive);
                    replier.reply(());
                },
                |_, ()| (),
            );
        }
    }

    pub(super) fn on_corrupt(self: &Rc<Self>, key: DriveKey, store: u32, slot: Option<crate::core::VolumeSlot>, block: u64) {
        let Some(id) = self.drive_of_key(key) else { return };
        let core = self.drives.borrow().get(&id).and_then(|d| d.stores.get(store as usize).map(|s| s.core));
        let volume = slot.and_then(|slot| {
            let volumes = self.volumes.borrow();
            volumes.iter().find(|(_, v)| Some(v.core) == core && v.slot == slot).map(|(&id, _)| id)
        });
        tracing::error!(drive = %id, store, volume = ?volume, block, "media do not match their checksum");
        if let (Some(drive), Some(volume)) = (self.drives.borrow_mut().get_mut(&id), volume)
            && !drive.scrub.volumes_bad.contains(&volume)
        {
            drive.scrub.volumes_bad.push(volume);
        }
    }

    pub(super) fn on_scrub_done(&self, key: DriveKey, blocks: u64, bad: u64) {
        if let Some(drive) = self.drives.borrow_mut().values_mut().find(|d| d.key == key) {
            drive.scrub.blocks += blocks;
            drive.scrub.bad += bad;
            drive.scrub.running = drive.scrub.running.saturating_sub(1);
            if drive.scrub.running == 0 {
                drive.scrub.passes += 1;
            }
        }
    }

    pub(super) fn drive_remove(self: &Rc<Self>, params: DriveRemoveParams, answer: Answer<Empty>) {
        let id = params.drive_id;
        let forget = move |state: &mut crate::state::NodeState| {
            state.drives.retain(|d| d.drive_id != id);
            state.openings.retain(|it| it.drive_id != id);
        };
        let state = self.drives.borrow().get(&id).map(|d| (d.state, d.removing));
        match state {
            None => return answer(self.remember(forget).map(|()| Empty {})),
            Some((_, true)) | Some((DriveState::Opening, _)) => {
                return answer(Err(fail(ErrorCode::NotReady, format!("drive {id} is being opened or removed"), "try again in a moment")));
            }
            Some((DriveState::Missing, _)) if self.drives.borrow().get(&id).is_some_and(|d| d.stores.is_empty()) => {
                self.drives.borrow_mut().remove(&id);
                return answer(self.remember(forget).map(|()| Empty {}));
            }
            Some(_) => {}
        }
        let living: Vec<VolumeId> = self.volumes.borrow().iter().filter(|(_, v)| v.drive == id).map(|(&id, _)| id).collect();
        if !living.is_empty() && !params.force {
            let message = format!("drive {id} holds volumes ({} of them)", living.len());
            return answer(Err(fail(ErrorCode::Busy, message, "remove them first, or detach the drive with force: nothing is erased")));
        }
        if let Some(drive) = self.drives.borrow_mut().get_mut(&id) {
            drive.removing = true;
        }
        self.close_exports_of(living, move |node| {
            node.stop_drive(id, move |node| {
                let answered = node.remember(forget).map(|()| Empty {});
                answer(answered);
            });
        });
    }

    /// Stops a drive's stores and lets it go.
    pub(super) fn stop_drive(self: &Rc<Self>, id: DriveId, then: impl FnOnce(&Rc<Node>) + 'static) {
        self.quiet_drive(id, move |node| node.release_drive(id, then));
    }

    /// Stops a drive's stores: held commands are answered, all is drained and checkpointed.
    pub(super) fn quiet_drive(self: &Rc<Self>, id: DriveId, then: impl FnOnce(&Rc<Node>) + 'static) {
        let stores = self.drives.borrow().get(&id).map(|d| (d.key, d.stores.clone()));
        let Some((key, stores)) = stores.filter(|(_, stores)| !stores.is_empty()) else { return then(self) };
        let gate = Gate::new(stores.len(), then);
        for (no, place) in stores.into_iter().enumerate() {
            let gate = gate.clone();
            self.order(place.core, key, no as u32, Order::Stop, move |node, result| {
                if let Err(error) = result
                    && place.quarantined.is_none()
                {
                    tracing::warn!(drive = %id, store = no, ?error, "a store did not stop");
                }
                gate.pass(node);
            });
        }
    }

    /// Lets go of a drive whose stores have stopped.
    pub(super) fn release_drive(self: &Rc<Self>, id: DriveId, then: impl FnOnce(&Rc<Node>) + 'static) {
        let Some(drive) = self.drives.borrow_mut().remove(&id) else { return then(self) };
        self.volumes.borrow_mut().retain(|_, v| v.drive != id);
        let Drive { key, spec, disks, backend, .. } = drive;
        let finish = move |node: &Rc<Node>| {
            drop(backend);
            node.forget_backend(&spec, key, then);
        };
        if disks.is_empty() {
            return finish(self);
        }
        let gate = Gate::new(disks.len(), finish);
        for (core, disk) in disks {
            let gate = gate.clone();
            self.close_on_core(core, key, Some(disk), move |node| gate.pass(node));
        }
    }

    /// Shows a drive that was ours and is not there.
    pub(super) fn show_missing(&self, id: DriveId, spec: DriveSpec, why: String) {
        let drive = Drive::new(self.next_drive_key(), spec, DriveState::Missing, why);
        self.drives.borrow_mut().entry(id).or_insert(drive);
    }

    pub(super) fn drive_clear_fence(self: &Rc<Self>, id: DriveId, answer: Answer<Empty>) {
        let Some((state, spec)) = self.drives.borrow().get(&id).map(|d| (d.state, d.spec.clone())) else {
            return answer(Err(fail(ErrorCode::NotFound, format!("there is no drive {id}"), "`penstock pool ls` shows those there are")));
        };
        // Which of its stores will not run is being found out.
        if state == DriveState::Opening {
            let node = self.clone();
            let again: Answer<DriveInfo> = Box::new(move |opened| match opened {
                Ok(_) => node.drive_clear_fence(id, answer),
                Err(error) => answer(Err(error)),
            });
            self.drives.borrow_mut().get_mut(&id).expect("it is opening").waiters.push(again);
            return;
        }
        if self.state.borrow().fence(id).is_none() && !matches!(state, DriveState::Fenced | DriveState::Quarantined) {
            return answer(Ok(Empty {}));
        }
        if self.state.borrow().fence(id) == Some(FenceReason::LogLost) {
            self.accepting.borrow_mut().insert(id);
        }
        let forgotten = self.remember(|state| {
            state.fences.retain(|f| f.drive_id != id);
            state.quarantines.retain(|q| q.drive_id != id);
        });
        if let Err(error) = forgotten {
            return answer(Err(error));
        }
        // The stores are opened anew, so that what the drive holds is read from it, not from memory.
        let volumes: Vec<VolumeId> = self.volumes.borrow().iter().filter(|(_, v)| v.drive == id).map(|(&id, _)| id).collect();
        let (cluster, node_id) = {
            let state = self.state.borrow();
            (state.get().cluster_id, state.get().node_id)
        };
        let (Some(cluster_id), Some(node_id)) = (cluster, node_id) else {
            return answer(Err(fail(ErrorCode::Internal, "the node has a drive and no claim", "report this")));
        };
        self.close_exports_of(volumes, move |node| {
            node.stop_drive(id, move |node| {
                let params = DriveAddParams {
                    spec,
                    drive_id: id,
                    cluster_id,
                    node_id,
                    stores: None,
                    oplog_bytes: None,
                    force: false,
                    open_only: true,
                };
                node.begin_drive(params, Box::new(move |result| answer(result.map(|_| Empty {}))));
            });
        });
    }

    pub(super) fn scrub(self: &Rc<Self>, id: DriveId, action: ScrubAction, answer: Answer<ScrubInfo>) {
        let Some((key, stores)) = self.drives.borrow().get(&id).map(|d| (d.key, d.stores.clone())) else {
            return answer(Err(fail(ErrorCode::NotFound, format!("there is no drive {id}"), "`penstock pool ls` shows those there are")));
        };
        let order = match action {
            ScrubAction::Start => Some(Order::ScrubStart),
            ScrubAction::Stop => Some(Order::ScrubStop),
            ScrubAction::Status => None,
        };
        if let Some(order) = order {
            if let Some(drive) = self.drives.borrow_mut().get_mut(&id) {
                if action == ScrubAction::Start {
                    drive.scrub = Scrub { running: stores.len() as u32, passes: drive.scrub.passes, ..Scrub::default() };
                } else {
                    drive.scrub.running = 0;
                }
            }
            for (no, place) in stores.iter().enumerate() {
                self.order(place.core, key, no as u32, order.clone(), |_, _| ());
            }
        }
        self.gather(move |node, views| {
            let drives = node.drives.borrow();
            let Some(drive) = drives.get(&id) else {
                return answer(Err(fail(ErrorCode::NotFound, format!("drive {id} has gone"), "`penstock pool ls` shows those there are")));
            };
            let shards: Vec<&ShardView> = views.iter().flat_map(|v| &v.shards).filter(|s| s.drive == key).collect();
            let used = |s: &&ShardView| s.view.extents - s.view.extents_free;
            let total: u64 = shards.iter().map(used).sum();
            let running = shards.iter().any(|s| s.view.scrub_permille.is_some());
            let done: u64 = shards.iter().map(|s| s.view.scrub_permille.map_or(0, |p| used(s) * u64::from(p) / 1000)).sum();
            let verified: u64 = shards.iter().map(|s| s.view.counters.scrubbed_blocks).sum();
            answer(Ok(ScrubInfo {
                drive_id: id,
                running,
                extents_done: if running { done } else { total },
                extents_total: total,
                blocks_verified: if running { verified } else { drive.scrub.blocks },
                blocks_bad: drive.scrub.bad,
                passes: drive.scrub.passes,
                volumes_bad: drive.scrub.volumes_bad.clone(),
            }));
        });
    }

    pub(super) fn drive_info(self: &Rc<Self>, id: DriveId, answer: Answer<DriveInfo>) {
        self.gather(move |node, views| {
            let shards: Vec<ShardView> = views.into_iter().flat_map(|v| v.shards).collect();
            let info = node.drives.borrow().get(&id).map(|drive| drive.info(id, &shards, &node.core_numbers()));
            answer(
                info.ok_or_else(|| fail(ErrorCode::NotFound, format!("drive {id} has gone"), "`penstock pool ls` shows those there are")),
            );
        });
    }

    pub(super) fn drive_list(self: &Rc<Self>, answer: Answer<Vec<DriveInfo>>) {
        self.gather(move |node, views| {
            let shards: Vec<ShardView> = views.into_iter().flat_map(|v| v.shards).collect();
            let cores = node.core_numbers();
            let list = node.drives.borrow().iter().map(|(&id, drive)| drive.info(id, &shards, &cores)).collect();
            answer(Ok(list));
        });
    }
}

impl Drive {
    pub fn new(key: DriveKey, spec: DriveSpec, state: DriveState, reason: String) -> Self {
        Self {
            key,
            volatile: spec.is_volatile(),
            spec,
            state,
            reason: Some(reason),
            backend: None,
            label: None,
            barrier: Barrier::Missing,
            stores: Vec::new(),
            disks: BTreeMap::new(),
            waiters: Vec::new(),
            scrub: Scrub::default(),
            removing: false,
        }
    }

    fn info(&self, id: DriveId, shards: &[ShardView], cores: &[u32]) -> DriveInfo {
        let mut counters = DriveCounters::default();
        let mut seen = Vec::new();
        let stores = self.stores.iter().enumerate().map(|(no, place)| {
            let shard = shards.iter().find(|s| s.drive == self.key && s.store_no == no as u32);
            let block = BLOCK as u64;
            if let Some(shard) = shard {
                counters.checksum_errors += shard.view.counters.corrupt_blocks;
                counters.repaired_blocks += shard.view.counters.repaired_blocks;
                // Stores of one core count their drive's commands together.
                if !seen.contains(&place.core) {
                    seen.push(place.core);
                    counters.reads += shard.disk.reads;
                    counters.writes += shard.disk.writes;
                    counters.flushes += shard.disk.flushes;
                    counters.read_bytes += shard.disk.read_bytes;
                    counters.write_bytes += shard.disk.write_bytes;
                    counters.read_errors += shard.disk.read_errors;
                    counters.write_errors += shard.disk.write_errors;
                    counters.flush_errors += shard.disk.flush_errors;
                }
            }
            StoreInfo {
                store: no as u16,
                core: cores.get(usize::from(place.core.0)).copied().unwrap_or(0),
                quarantined: place.quarantined.clone(),
                oplog_bytes: ByteSize(shard.map_or(0, |s| s.view.ring_blocks * block)),
                oplog_used: ByteSize(shard.map_or(0, |s| s.view.ring_used * block)),
                undrained_bytes: ByteSize(shard.map_or(0, |s| s.view.undrained_extents * penstock_wire::EXTENT as u64)),
                extents_total: shard.map_or(0, |s| s.view.extents),
                extents_free: shard.map_or(0, |s| s.view.extents_free),
                recovery: place.recovery.map(|(report, ms)| RecoveryInfo {
                    entries: report.entries,
                    bytes: ByteSize(report.bytes),
                    ms,
                    lost_blocks: report.lost_blocks,
                    dropped_batches: report.dropped_batches,
                }),
            }
        });
        let stores = stores.collect();
        DriveInfo {
            drive_id: id,
            spec: self.spec.clone(),
            size: ByteSize(self.backend.as_ref().map_or(0, Backend::size)),
            state: self.state,
            reason: self.reason.clone(),
            incarnation: self.label.as_ref().map_or(0, |l| label::incarnation_number(&l.incarnation.0)),
            barrier: self.barrier,
            volatile: self.volatile,
            stores,
            counters,
        }
    }
}
