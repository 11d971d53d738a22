//! Volumes of the node: made, resized, deleted, and shown. Their list comes from the drives; nothing else keeps one.

use std::rc::Rc;

use penstock_api::rpc::{
    BlockSize, ControllerRange, DriveState, Empty, ErrorCode, Origin, RpcError, VolumeCreateParams, VolumeDeleteParams, VolumeInfo,
    VolumeResizeParams, VolumeState,
};
use penstock_api::{ByteSize, DriveId, ReplicaId, SegmentId, VolumeId};
use penstock_engine::{Order, OrderError};
use penstock_wire::peer::{Members, Role};
use penstock_wire::{BLOCK, EXTENT, ReplicaShape, VOLUME_BLOCKS_MAX};

use super::exports::OpenExport;
use super::groups::{self, GroupStand};
use super::snapshots;
use super::{Answer, Node, fail};
use crate::core::{CoreIndex, CoreView, DriveKey, VolumeSlot, VolumeView};
use crate::door::{ALL_CONTROLLERS, VolumeFace};
use crate::inproc::Volume as LocalVolume;
use crate::placement;

pub(super) struct Volume {
    pub segment: SegmentId,
    pub replica: ReplicaId,
    pub name: String,
    /// 4 KiB blocks.
    pub blocks: u64,
    pub logical_block: u32,
    pub drive: DriveId,
    pub key: DriveKey,
    pub store: u32,
    pub core: CoreIndex,
    pub slot: VolumeSlot,
    pub deleting: bool,
    /// Of a volume of several replicas: what its group said last.
    pub group: Option<GroupStand>,
    pub exports: Vec<OpenExport>,
    /// Calls that wait until the volume is there.
    waiters: Vec<Answer<VolumeInfo>>,
}

/// Where a replica lives.
pub(super) struct Place {
    pub key: DriveKey,
    pub store: u32,
    pub core: CoreIndex,
    pub slot: VolumeSlot,
}

impl Volume {
    fn logical_blocks(&self) -> u64 {
        self.blocks * (BLOCK as u64 / u64::from(self.logical_block))
    }

    pub fn face(&self, id: VolumeId, controllers: Option<ControllerRange>) -> VolumeFace {
        VolumeFace {
            id,
            name: self.name.clone(),
            logical_block: self.logical_block,
            blocks: self.logical_blocks(),
            home: self.core,
            slot: self.slot,
            serves: self.group.as_ref().map(GroupStand::serves),
            controllers: controllers.unwrap_or(ALL_CONTROLLERS),
        }
    }
}

pub(super) fn no_volume(id: VolumeId) -> RpcError {
    fail(ErrorCode::NotFound, format!("there is no volume {id} on this node"), "`penstock volume ls` shows those there are")
}

/// Whether a volume may have this many bytes.
fn check_size(size: u64) -> Result<(), RpcError> {
    let limit = VOLUME_BLOCKS_MAX * BLOCK as u64;
    if size == 0 || !size.is_multiple_of(BLOCK as u64) {
        let message = format!("a volume of {size} bytes cannot be: the size must be a multiple of 4096 and more than 0");
        return Err(fail(ErrorCode::Invalid, message, "round it up to the next 4096"));
    }
    if size > limit {
        let message = format!("a volume of {} cannot be: the most is {}", ByteSize(size), ByteSize(limit));
        return Err(fail(ErrorCode::Invalid, message, "make it smaller, or make several"));
    }
    Ok(())
}

pub(super) fn order_error(doing: &str, error: OrderError) -> RpcError {
    match error {
        OrderError::NotServing | OrderError::Stopping => {
            fail(ErrorCode::NotReady, format!("{doing}: the drive does not serve now"), "try again when it does (`penstock pool ls`)")
        }
        OrderError::Fenced => fail(
            ErrorCode::Fenced,
            format!("{doing}: the drive is fenced"),
            "find out what is wrong with the drive, then clear the fence (`penstock pool clear-fence`)",
        ),
        OrderError::NotLeader(Some(leader)) => {
            let leader = penstock_api::NodeId::from_bytes(leader.0).map_or_else(|_| leader.to_string(), |id| id.to_string());
            fail(ErrorCode::NotReady, format!("{doing}: node {leader} leads the volume's group"), "ask that node")
        }
        OrderError::NotLeader(None) => {
            let message = format!("{doing}: nobody leads the volume's group, as far as this node knows");
            fail(ErrorCode::NotReady, message, "ask the other nodes of its members, or again in a moment")
        }
        OrderError::NoSuchSegment => {
            fail(ErrorCode::NotFound, format!("{doing}: the drive has no such segment"), "look at `penstock volume ls`")
        }
        OrderError::Conflict(shape) => fail(
            ErrorCode::Conflict,
            format!("{doing}: the segment exists as volume {} of {} blocks named {}", shape.volume, shape.blocks, shape.name),
            "use other ids",
        ),
        OrderError::NoSpace => fail(
            ErrorCode::Capacity,
            format!("{doing}: no space is left on the drive"),
            "delete volumes or discard data, or use another drive",
        ),
        OrderError::OtherSnapshot(name) => fail(
            ErrorCode::Conflict,
            format!("{doing}: that id is snapshot {name:?}, which stands under another name"),
            "use the name it has, or another id",
        ),
        OrderError::NoSuchSnapshot => fail(
            ErrorCode::NotFound,
            format!("{doing}: the volume has no such snapshot here"),
            "check the id against the volume's snapshots",
        ),
        OrderError::NotYet(why) => fail(ErrorCode::NotReady, format!("{doing}: {why}"), "try again in a moment"),
        OrderError::CloneStands(name, volume) => {
            fail(ErrorCode::Conflict, format!("{doing}: volume {name} ({volume}) is a clone that stands on it"), "delete the clone first")
        }
        OrderError::QuorumHeard { heard, quorum } => {
            let heard: Vec<_> = heard.iter().map(|no| no.0.to_string()).collect();
            let message = format!("{doing}: the volume's group has its quorum of {quorum}: member {} answers", heard.join(", "));
            fail(ErrorCode::Conflict, message, "it goes on by itself; replace the members that are lost")
        }
        OrderError::Unsound(why) => fail(
            ErrorCode::Conflict,
            format!("{doing}: what this replica has is in question: {why}"),
            "recover at another replica; if none is left, `--regardless` takes this one all the same",
        ),
        OrderError::Invalid(why) => fail(ErrorCode::Invalid, format!("{doing}: {why}"), "correct it"),
    }
}

impl Node {
    pub(super) fn on_replica(self: &Rc<Self>, place: Place, shape: ReplicaShape, is_member: bool, gone: bool) {
        let Place { key, store, core, slot } = place;
        let drive = self.drives.borrow().iter().find(|(_, d)| d.key == key).map(|(&id, _)| id);
        let ids = (VolumeId::from_bytes(shape.volume.0), SegmentId::from_bytes(shape.segment.0), ReplicaId::from_bytes(shape.replica.0));
        let (Some(drive), (Ok(id), Ok(segment), Ok(replica))) = (drive, ids) else {
            tracing::error!(?shape, "a drive holds a volume whose ids are not Penstock's: it is left alone");
            return;
        };
        self.spread_place(core, penstock_wire::SegmentId(segment.to_bytes()), gone);
        if gone {
            let known = self.volumes.borrow().get(&id).is_some_and(|v| v.key == key && v.slot == slot);
            if known {
                self.volumes.borrow_mut().remove(&id);
            }
            return;
        }
        let waiters = {
            let mut volumes = self.volumes.borrow_mut();
            match volumes.get_mut(&id) {
                Some(volume) if volume.key == key && volume.slot == slot => {
                    volume.blocks = shape.blocks;
                    std::mem::take(&mut volume.waiters)
                }
                Some(volume) => {
                    tracing::error!(volume = %id, on = %volume.drive, and = %drive, "two drives hold the same volume: the second is left alone");
                    return;
                }
                None => {
                    volumes.insert(
                        id,
                        Volume {
                            segment,
                            replica,
                            name: shape.name,
                            blocks: shape.blocks,
                            logical_block: shape.logical_block,
                            drive,
                            key,
                            store,
                            core,
                            slot,
                            deleting: false,
                            group: is_member.then(GroupStand::default),
                            exports: Vec::new(),
                            waiters: Vec::new(),
                        },
                    );
                    Vec::new()
                }
            }
        };
        for waiter in waiters {
            self.volume_info(id, waiter);
        }
    }

    pub(super) fn volume_create(self: &Rc<Self>, params: VolumeCreateParams, answer: Answer<VolumeInfo>) {
        self.replica_create(params, None, answer);
    }

    /// Makes a replica: the only one of its volume, or a member of a group.
    pub(super) fn replica_create(self: &Rc<Self>, params: VolumeCreateParams, members: Option<Box<Members>>, answer: Answer<VolumeInfo>) {
        let id = params.volume_id;
        let size = params.size_bytes.bytes();
        if let Err(error) = check_size(size) {
            return answer(Err(error));
        }
        let same = self.volumes.borrow().get(&id).map(|v| {
            (v.segment, v.replica, v.name.as_str(), v.blocks * BLOCK as u64, v.logical_block, v.drive)
                == (params.segment_id, params.replica_id, params.name.as_str(), size, params.block_size.bytes(), params.drive_id)
        });
        match same {
            Some(true) => return self.volume_info(id, answer),
            Some(false) => {
                let message = format!("volume {id} exists with other properties");
                return answer(Err(fail(ErrorCode::Conflict, message, "compare `penstock volume show`, or use a new id")));
            }
            None => {}
        }
        let own =
            |members: &Members| members.list.iter().find(|member| member.replica.0 == params.replica_id.to_bytes()).map(|own| own.role);
        let keeps_the_log_alone = members.as_deref().and_then(own) == Some(Role::LogOnly);
        // What keeps the log alone stands over nothing.
        let above = params.origin.filter(|_| !keeps_the_log_alone);
        let above = match above.map(|origin| self.origin_store(origin, params.drive_id)).transpose() {
            Ok(store) => store,
            Err(error) => return answer(Err(error)),
        };
        let drive = self.drives.borrow().get(&params.drive_id).map(|d| (d.key, d.state, d.stores.clone()));
        let (key, stores) = match drive {
            None => {
                let message = format!("there is no drive {}", params.drive_id);
                return answer(Err(fail(ErrorCode::NotFound, message, "`penstock pool ls` shows those there are")));
            }
            Some((_, DriveState::Fenced, _)) => return answer(Err(order_error("creating a volume", OrderError::Fenced))),
            Some((_, DriveState::Quarantined, _)) => {
                let hint = "make it on another drive, or clear the quarantine (`penstock pool clear-fence`)";
                return answer(Err(fail(ErrorCode::Fenced, "a store of the drive is quarantined", hint)));
            }
            Some((_, DriveState::Opening | DriveState::Missing, _)) => {
                return answer(Err(order_error("creating a volume", OrderError::NotServing)));
            }
            Some((key, DriveState::Serving, stores)) => (key, stores),
        };
        self.gather(move |node, views| {
            let free = |no: usize| {
                let shards = views.iter().flat_map(|v| &v.shards);
                shards.filter(|s| s.drive == key && s.store_no == no as u32).map(|s| s.view.extents_free).sum::<u64>()
            };
            let living = |no: usize| node.volumes.borrow().values().filter(|v| v.key == key && v.store == no as u32).count() as u32;
            let emptiest = || placement::place_volume((0..stores.len()).map(|no| (free(no), living(no))));
            let Some(store) = above.map(|store| store as usize).or_else(emptiest) else {
                return answer(Err(order_error("creating a volume", OrderError::NotServing)));
            };
            let shape = ReplicaShape {
                volume: penstock_wire::VolumeId(id.to_bytes()),
                segment: penstock_wire::SegmentId(params.segment_id.to_bytes()),
                replica: penstock_wire::ReplicaId(params.replica_id.to_bytes()),
                segment_no: 0,
                blocks: size / BLOCK as u64,
                logical_block: params.block_size.bytes(),
                name: params.name.as_str().to_owned(),
            };
            let shape = Box::new(shape);
            let order = match (params.origin, members) {
                (Some(of), members) => Order::Clone {
                    shape,
                    members,
                    origin: penstock_wire::SegmentId(of.segment_id.to_bytes()),
                    snapshot: snapshots::wire_id(of.snapshot_id),
                },
                (None, None) => Order::Create(shape),
                (None, Some(members)) => Order::CreateMember { shape, members },
            };
            node.order(stores[store].core, key, store as u32, order, move |node, result| match result {
                // The volume's notice came before its order's end, since a core reports in order.
                Ok(()) => node.volume_info(id, answer),
                // Of a clone. It was there when it was asked for, so a removal is on its way, or the marker is.
                Err(OrderError::NoSuchSnapshot) => {
                    let hint = "try again in a moment, or look at the volume's snapshots";
                    answer(Err(fail(ErrorCode::NotReady, "creating a clone: its snapshot is not on this drive now", hint)));
                }
                Err(error) => answer(Err(order_error("creating a volume", error))),
            });
        });
    }

    /// The store of `drive` where the origin of a clone is.
    fn origin_store(&self, origin: Origin, drive: DriveId) -> Result<u32, RpcError> {
        let (id, volumes) = (origin.volume_id, self.volumes.borrow());
        let Some(of) = volumes.get(&id).filter(|of| !of.deleting) else { return Err(no_volume(id)) };
        if of.drive != drive {
            let message = format!("a clone of volume {id} cannot be on drive {drive}: on this node that volume is on {}", of.drive);
            return Err(fail(ErrorCode::Invalid, message, "make it where its origin is"));
        }
        Ok(of.store)
    }

    /// Makes a volume for use inside the process; `ready` runs on its home core.
    pub(crate) fn make_local(
        self: &Rc<Self>,
        create: VolumeCreateParams,
        ready: impl FnOnce(Result<LocalVolume, String>) + Send + 'static,
    ) {
        let id = create.volume_id;
        let node = self.clone();
        self.volume_create(
            create,
            Box::new(move |made| match made {
                Ok(info) => {
                    let place = node.volumes.borrow().get(&id).map(|v| (v.core, v.slot));
                    let Some((core, slot)) = place else { return ready(Err("the volume has gone".to_owned())) };
                    let local = LocalVolume::new(slot, info.size_bytes.bytes(), info.block_size.bytes());
                    let sent = node.core(core).thread.send(move || ready(Ok(local)));
                    if sent.is_err() {
                        tracing::error!("the volume's core has ended");
                    }
                }
                Err(error) => ready(Err(crate::inproc::explain(&error))),
            }),
        );
    }

    pub(super) fn volume_delete(self: &Rc<Self>, params: VolumeDeleteParams, answer: Answer<Empty>) {
        let id = params.volume_id;
        let Some((exports, segment, core, key, store)) =
            self.volumes.borrow().get(&id).map(|v| (v.exports.len(), v.segment, v.core, v.key, v.store))
        else {
            return answer(Ok(Empty {}));
        };
        if exports > 0 && !params.force {
            let message = format!("volume {id} has {exports} open doors");
            return answer(Err(fail(ErrorCode::Busy, message, "unexport it first, or delete it with force")));
        }
        if let Some(volume) = self.volumes.borrow_mut().get_mut(&id) {
            volume.deleting = true;
        }
        self.close_exports_of(vec![id], move |node| {
            let order = Order::Delete { segment: penstock_wire::SegmentId(segment.to_bytes()) };
            node.order(core, key, store, order, move |node, result| match result {
                Ok(()) | Err(OrderError::NoSuchSegment) => {
                    node.volumes.borrow_mut().remove(&id);
                    answer(node.remember(|state| state.exports.retain(|e| e.volume_id != id)).map(|()| Empty {}));
                }
                Err(error) => {
                    if let Some(volume) = node.volumes.borrow_mut().get_mut(&id) {
                        volume.deleting = false;
                    }
                    answer(Err(order_error("deleting a volume", error)));
                }
            });
        });
    }

    pub(super) fn volume_resize(self: &Rc<Self>, params: VolumeResizeParams, answer: Answer<VolumeInfo>) {
        let id = params.volume_id;
        let size = params.size_bytes.bytes();
        let found = self.volumes.borrow().get(&id).map(|v| (v.blocks * BLOCK as u64, v.segment, v.core, v.key, v.store, v.exports.len()));
        let Some((now, segment, core, key, store, exports)) = found else { return answer(Err(no_volume(id))) };
        if let Err(error) = check_size(size) {
            return answer(Err(error));
        }
        if size == now {
            return self.volume_info(id, answer);
        }
        if size < now && !params.allow_shrink {
            let message = format!("volume {id} has {now} bytes; {size} would cut off its end for good");
            return answer(Err(fail(ErrorCode::Invalid, message, "allow shrinking if that is meant")));
        }
        if size < now && exports > 0 {
            let message = format!("volume {id} is exported: hosts would lose what they see");
            return answer(Err(fail(ErrorCode::Busy, message, "unexport it, shrink it, export it again")));
        }
        let order = Order::Resize { segment: penstock_wire::SegmentId(segment.to_bytes()), blocks: size / BLOCK as u64 };
        self.order(core, key, store, order, move |node, result| match result {
            Ok(()) => {
                let grown = {
                    let mut volumes = node.volumes.borrow_mut();
                    let Some(volume) = volumes.get_mut(&id) else { return answer(Err(no_volume(id))) };
                    volume.blocks = size / BLOCK as u64;
                    let blocks = volume.logical_blocks();
                    volume.exports.iter().filter_map(|e| e.export.as_ref()).try_for_each(|e| e.resize(blocks))
                };
                match grown {
                    Ok(()) => node.volume_info(id, answer),
                    Err(error) => answer(Err(fail(ErrorCode::Internal, error.to_string(), "unexport the volume and export it again"))),
                }
            }
            Err(error) => answer(Err(order_error("resizing a volume", error))),
        });
    }

    pub(super) fn volume_info(self: &Rc<Self>, id: VolumeId, answer: Answer<VolumeInfo>) {
        self.gather(move |node, views| {
            let info = node.volume_of(id, &views);
            answer(info.ok_or_else(|| no_volume(id)));
        });
    }

    pub(super) fn volume_list(self: &Rc<Self>, answer: Answer<Vec<VolumeInfo>>) {
        self.gather(move |node, views| {
            let ids: Vec<VolumeId> = node.volumes.borrow().keys().copied().collect();
            answer(Ok(ids.into_iter().filter_map(|id| node.volume_of(id, &views)).collect()));
        });
    }

    fn volume_of(&self, id: VolumeId, views: &[CoreView]) -> Option<VolumeInfo> {
        let volumes = self.volumes.borrow();
        let volume = volumes.get(&id)?;
        let view: Option<&VolumeView> =
            views.iter().find(|v| v.index == volume.core).and_then(|v| v.volumes.iter().find(|one| one.slot == volume.slot));
        let usage = view.map(|v| v.usage).unwrap_or_default();
        let drives = self.drives.borrow();
        let drive = drives.get(&volume.drive);
        let fallen = drive.and_then(|d| d.stores.get(volume.store as usize)).and_then(|place| place.quarantined.clone());
        let (state, reason) = match drive.map(|d| (d.state, d.reason.clone())) {
            _ if volume.deleting => (VolumeState::Deleting, Some("it is being deleted".to_owned())),
            _ if fallen.is_some() => (VolumeState::Unavailable, fallen.map(|panic| format!("its store is quarantined: {panic}"))),
            Some((DriveState::Serving | DriveState::Quarantined, _)) => (VolumeState::Serving, None),
            Some((DriveState::Opening, why)) => (VolumeState::Opening, why),
            Some((_, why)) => (VolumeState::Unavailable, why),
            None => (VolumeState::Unavailable, Some("its drive is gone".to_owned())),
        };
        let exports: Vec<_> = volume.exports.iter().map(OpenExport::info).collect();
        Some(VolumeInfo {
            volume_id: id,
            segment_id: volume.segment,
            replica_id: volume.replica,
            name: volume.name.parse().ok()?,
            size_bytes: ByteSize(volume.blocks * BLOCK as u64),
            block_size: BlockSize::try_from(volume.logical_block).ok()?,
            drive_id: volume.drive,
            core: self.core_numbers().get(usize::from(volume.core.0)).copied().unwrap_or(0),
            state,
            reason,
            allocated_bytes: ByteSize(usage.allocated_extents * EXTENT as u64),
            undrained_bytes: ByteSize(usage.undrained_blocks * BLOCK as u64),
            origin: view.and_then(|view| view.origin.as_ref()).and_then(snapshots::origin),
            snapshots: view.map(|view| view.snapshots.iter().filter_map(snapshots::info).collect()).unwrap_or_default(),
            connections: exports.iter().map(|e| e.connected_hosts.len() as u32).sum(),
            exports,
            counters: view.map(|v| v.counters).unwrap_or_default(),
            latency: view.map(|v| v.latency).unwrap_or_default(),
            group: view.and_then(|view| view.member.as_ref()).and_then(groups::info),
        })
    }
}
