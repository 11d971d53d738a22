//! Tests: a control and three nodes in one small world, driven by random wishes, crashes and refusals, against the rule
//! that once the trouble stops, desired and observed agree, nothing was lost that nobody removed, and no id came
//! twice. A node is a few maps: media that survive, and what is open, which does not. A group is led by the first node that has it open.

use core::net::SocketAddr;
use std::collections::{BTreeMap, BTreeSet};

use penstock_api::http::{DriveAddBody, VolumeCreateBody};
use penstock_api::id::{ClusterTag, Id, Incarnation, NodeNumber};
use penstock_api::rpc::{BlockSize, Door, DriveLabel, DriveState, ErrorCode, GroupInfo, GroupPart, PeerAddress, RpcError, VolumeState};
use penstock_api::{ByteSize, ClusterId, DriveId, NodeId, ReplicaId, SegmentId, VolumeId};
use proptest::prelude::*;

use crate::change::{self, VolumeIds};
use crate::desired::{Desired, DesiredNode, Record};
use crate::import;
use crate::issuer::{Identity, Issuer, Mark, Take};
use crate::observed::{Observed, ObservedDrive, ObservedVolume};
use crate::reconcile::{NodeStep, Step, reconcile};

/// What lies on one medium: a label and the volumes.
#[derive(Clone, Debug, Default)]
struct Medium {
    label: Option<(ClusterId, NodeId, DriveId)>,
    volumes: BTreeMap<VolumeId, ObservedVolume>,
}

#[derive(Default)]
struct Node {
    /// By place. Survive everything.
    media: BTreeMap<String, Medium>,
    claim: Option<(ClusterId, NodeId)>,
    peers: Vec<PeerAddress>,
    /// Open drives and the doors served; gone with the process.
    open: BTreeMap<DriveId, (String, ObservedDrive)>,
    doors: BTreeMap<VolumeId, BTreeSet<Door>>,
}

impl Node {
    fn crash(&mut self, volatile_places: &[String]) {
        self.claim = None;
        self.peers.clear();
        self.open.clear();
        self.doors.clear();
        for place in volatile_places {
            self.media.remove(place);
        }
    }

    fn observe(&self) -> Observed {
        let volumes = self.open.values().flat_map(|(place, _)| {
            self.media[place].volumes.iter().map(|(id, volume)| {
                let doors = self.doors.get(id).cloned().unwrap_or_default();
                (*id, ObservedVolume { doors, ..volume.clone() })
            })
        });
        Observed {
            cluster_id: self.claim.map(|claim| claim.0),
            node_id: self.claim.map(|claim| claim.1),
            peers: self.peers.clone(),
            drives: self.open.iter().map(|(id, (_, drive))| (*id, drive.clone())).collect(),
            volumes: volumes.collect(),
        }
    }

    fn medium_of(&mut self, drive_id: DriveId) -> Result<&mut Medium, RpcError> {
        let (place, _) = self.open.get(&drive_id).ok_or_else(|| RpcError::new(ErrorCode::NotFound, "no such drive"))?;
        Ok(self.media.entry(place.clone()).or_default())
    }

    fn volume(&mut self, id: VolumeId) -> Option<&mut ObservedVolume> {
        let places: Vec<String> = self.open.values().map(|(place, _)| place.clone()).collect();
        let place = places.into_iter().find(|place| self.media[place].volumes.contains_key(&id))?;
        self.media.get_mut(&place)?.volumes.get_mut(&id)
    }

    fn make(&mut self, volume_id: VolumeId, volume: ObservedVolume) -> Result<(), RpcError> {
        self.medium_of(volume.drive_id)?.volumes.entry(volume_id).or_insert(volume);
        Ok(())
    }

    fn call(&mut self, step: &NodeStep) -> Result<(), RpcError> {
        let refuse = |code, message: &str| Err(RpcError::new(code, message));
        match step {
            NodeStep::Claim(params) => match self.claim {
                Some(claim) if claim != (params.cluster_id, params.node_id) => return refuse(ErrorCode::Conflict, "claimed"),
                _ => self.claim = Some((params.cluster_id, params.node_id)),
            },
            NodeStep::AddDrive(params) => {
                let place = params.spec.place();
                let medium = self.media.entry(place.clone()).or_default();
                let label = (params.cluster_id, params.node_id, params.drive_id);
                match medium.label {
                    Some(found) if found == label => {}
                    None if params.open_only => return refuse(ErrorCode::NotFound, "blank, and was to be opened only"),
                    None => medium.label = Some(label),
                    Some(_) if params.force => *medium = Medium { label: Some(label), ..Medium::default() },
                    Some(_) => return refuse(ErrorCode::ForeignData, "another label"),
                }
                let drive = ObservedDrive {
                    spec: params.spec.clone(),
                    state: DriveState::Serving,
                    reason: None,
                    volatile: params.spec.is_volatile(),
                    free: ByteSize::gib(100),
                };
                self.open.insert(params.drive_id, (place, drive));
            }
            NodeStep::RemoveDrive(params) => {
                let Ok(medium) = self.medium_of(params.drive_id) else { return Ok(()) };
                if !medium.volumes.is_empty() && !params.force {
                    return refuse(ErrorCode::Busy, "volumes live on it");
                }
                let gone: Vec<VolumeId> = medium.volumes.keys().copied().collect();
                gone.iter().for_each(|id| drop(self.doors.remove(id)));
                self.open.remove(&params.drive_id);
            }
            NodeStep::SetPeers(params) => self.peers = params.peers.clone(),
            NodeStep::CreateVolume(params) => {
                let volume = ObservedVolume {
                    segment_id: params.segment_id,
                    replica_id: params.replica_id,
                    name: params.name.clone(),
                    size: params.size_bytes,
                    block_size: params.block_size,
                    drive_id: params.drive_id,
                    state: VolumeState::Serving,
                    reason: None,
                    doors: BTreeSet::new(),
                    connections: 0,
                    group: None,
                };
                self.make(params.volume_id, volume)?;
            }
            NodeStep::CreateMember(params) => {
                let me = params.members.list.iter().find(|member| member.replica_id == params.replica_id);
                let Some(me) = me.filter(|member| Some(member.node_id) == self.claim.map(|claim| claim.1)) else {
                    return refuse(ErrorCode::Invalid, "no member is on this node");
                };
                let group = GroupInfo {
                    member: me.member,
                    part: GroupPart::Follower,
                    reason: None,
                    term: 1,
                    leader: Some(me.node_id),
                    serves: false,
                    asleep: false,
                    last: 0,
                    persisted: 0,
                    committed: 0,
                    applied: 0,
                    rebuild: None,
                    members: params.members.clone(),
                };
                let volume = ObservedVolume {
                    segment_id: params.segment_id,
                    replica_id: params.replica_id,
                    name: params.name.clone(),
                    size: params.size_bytes,
                    block_size: params.block_size,
                    drive_id: params.drive_id,
                    state: VolumeState::Serving,
                    reason: None,
                    doors: BTreeSet::new(),
                    connections: 0,
                    group: Some(group),
                };
                self.make(params.volume_id, volume)?;
            }
            NodeStep::ResizeVolume(params) => match self.volume(params.volume_id) {
                None => return refuse(ErrorCode::NotFound, "no such volume"),
                Some(volume) if params.size_bytes < volume.size && !params.allow_shrink => return refuse(ErrorCode::Invalid, "smaller"),
                Some(volume) => volume.size = params.size_bytes,
            },
            NodeStep::DeleteVolume(params) => {
                if self.doors.get(&params.volume_id).is_some_and(|doors| !doors.is_empty()) && !params.force {
                    return refuse(ErrorCode::Busy, "exported");
                }
                self.doors.remove(&params.volume_id);
                self.media.values_mut().for_each(|medium| drop(medium.volumes.remove(&params.volume_id)));
            }
            NodeStep::AddExport(params) => {
                if self.volume(params.volume_id).is_none() {
                    return refuse(ErrorCode::NotFound, "no such volume");
                }
                self.doors.entry(params.volume_id).or_default().insert(params.door.clone());
            }
            NodeStep::RemoveExport(params) => {
                self.doors.entry(params.volume_id).or_default().remove(&params.door);
            }
        }
        Ok(())
    }
}

struct World {
    /// Control's disk and, being in step with it, its memory.
    desired: Desired,
    mark: Option<Mark>,
    issuer: Issuer,
    issued: BTreeSet<Id>,
    nodes: BTreeMap<NodeId, Node>,
    /// Replicas that were settled once and that nobody removed since: they must be there in the end.
    kept: BTreeSet<(VolumeId, NodeId)>,
}

const NODES: u16 = 3;

fn identity() -> Identity {
    let (cluster, node) = (ClusterTag::new(7).unwrap(), NodeNumber::new(1).unwrap());
    Identity { cluster, node, incarnation: Incarnation::FIRST }
}

fn node_id(n: u16) -> NodeId {
    NodeId::of(identity().cluster, NodeNumber::new(1 + n % NODES).unwrap())
}

fn named() -> BTreeMap<NodeId, DesiredNode> {
    let address = |port| Some(SocketAddr::from(([127, 0, 0, 1], port)));
    let named = |n| DesiredNode { name: format!("n{n}").parse().unwrap(), peer: address(7700 + n), nvmf: address(4420 + n) };
    (0..NODES).map(|n| (node_id(n), named(n))).collect()
}

impl World {
    fn new() -> Self {
        let desired = Desired { identity: Some(identity()), nodes: named(), ..Desired::default() };
        let issuer = Issuer::open(identity(), None);
        let nodes = (0..NODES).map(|n| (node_id(n), Node::default())).collect();
        Self { desired, mark: None, issuer, issued: BTreeSet::new(), nodes, kept: BTreeSet::new() }
    }

    /// What a node shows; the first one that has a group open leads it.
    fn observe(&self, node_id: NodeId) -> Observed {
        let mut observed = self.nodes[&node_id].observe();
        for (id, volume) in &mut observed.volumes {
            let has = |node: &Node| node.observe().volumes.contains_key(id);
            let leader = self.nodes.iter().find(|(_, node)| has(node)).map(|(id, _)| *id);
            if let Some(group) = &mut volume.group {
                group.serves = leader == Some(node_id);
            }
        }
        observed
    }

    fn observe_all(&self) -> BTreeMap<NodeId, Observed> {
        self.nodes.keys().map(|id| (*id, self.observe(*id))).collect()
    }

    fn call(&mut self, node_id: NodeId, step: &NodeStep) -> Result<(), RpcError> {
        if let NodeStep::ResizeVolume(params) = step
            && self.observe(node_id).volumes.get(&params.volume_id).is_some_and(|seen| !seen.is_served())
        {
            return Err(RpcError::new(ErrorCode::NotReady, "another node leads"));
        }
        let known =
            |world: &Self, id| world.nodes.values().flat_map(|node| node.media.values()).find_map(|m| m.volumes.get(&id)).map(|v| v.size);
        let (changed, size) = match step {
            NodeStep::ResizeVolume(params) => (params.volume_id, Some(params.size_bytes)),
            NodeStep::CreateMember(params) => (params.volume_id, known(self, params.volume_id)),
            _ => return self.nodes.get_mut(&node_id).unwrap().call(step),
        };
        self.nodes.get_mut(&node_id).unwrap().call(step)?;
        if let Some(size) = size {
            // By the group's log, wherever a member is.
            let media = self.nodes.values_mut().flat_map(|node| node.media.values_mut());
            media.filter_map(|medium| medium.volumes.get_mut(&changed)).for_each(|volume| volume.size = size);
        }
        Ok(())
    }

    fn id(&mut self) -> Id {
        loop {
            match self.issuer.take(1).unwrap() {
                Take::Reserve(mark) => {
                    self.mark = Some(mark);
                    self.issuer.on_durable(mark);
                }
                Take::Issued(ids) => {
                    assert!(self.issued.insert(ids[0]), "{} issued twice", ids[0]);
                    return ids[0];
                }
            }
        }
    }

    fn commit(&mut self, judged: change::Judged) {
        // A refused wish changes nothing.
        if let Ok(records) = judged {
            self.desired.apply(&records);
        }
    }

    /// One round of reconciling at one node, of which the first `upto` steps happen before a crash. Answers how many there were.
    fn round(&mut self, node_id: NodeId, upto: usize, lost_answer: bool) -> usize {
        let observed = self.observe(node_id);
        for id in observed.ids() {
            if let Some(mark) = self.issuer.on_seen(id).unwrap() {
                self.mark = Some(mark);
                self.issuer.on_durable(mark);
            }
        }
        let plan = reconcile(&self.desired, node_id, &observed);
        assert_eq!(plan, reconcile(&self.desired, node_id, &observed), "not deterministic");
        assert_eq!(plan.blocked, None);
        assert!(plan.lost.iter().all(|id| self.is_forgetful(*id, node_id)), "lost {:?}", plan.lost);
        for (at, step) in plan.steps.iter().take(upto).enumerate() {
            match step {
                Step::Local(local) => {
                    let records = local.records(&self.desired);
                    self.desired.apply(&records);
                }
                Step::Node(step) => {
                    let first = self.call(node_id, step);
                    // Done at the node, but the answer never came: the step happens once more.
                    if lost_answer && at + 1 == upto {
                        assert_eq!(self.call(node_id, step).is_ok(), first.is_ok(), "{step:?} is not idempotent");
                    }
                }
            }
        }
        self.remember_kept();
        plan.steps.len()
    }

    /// A member on memory, which is not made anew when it is gone.
    fn is_forgetful(&self, id: VolumeId, node_id: NodeId) -> bool {
        let replica = self.desired.volumes[&id].replica_on(node_id).expect("planned here");
        self.desired.drives.get(&replica.drive_id).is_some_and(|drive| drive.volatile)
    }

    fn remember_kept(&mut self) {
        let mut kept = BTreeSet::new();
        for (id, volume) in &self.desired.volumes {
            for replica in &volume.replicas {
                let serving = self.desired.drives.get(&replica.drive_id).is_some_and(|drive| drive.phase.is_present() && !drive.volatile);
                if replica.made && volume.phase.is_present() && serving {
                    kept.insert((*id, replica.node_id));
                }
            }
        }
        self.kept = kept;
    }

    fn converge(&mut self) {
        let nodes: Vec<NodeId> = self.nodes.keys().copied().collect();
        for _ in 0..14 {
            let steps: usize = nodes.iter().map(|id| self.round(*id, usize::MAX, false)).sum();
            if steps == 0 {
                return;
            }
        }
        let left: Vec<_> = nodes.iter().map(|id| reconcile(&self.desired, *id, &self.observe(*id)).steps).collect();
        panic!("fourteen quiet rounds and still {left:?}");
    }

    fn assert_agreed(&self) {
        let observed = self.observe_all();
        for (id, drive) in &self.desired.drives {
            assert!(drive.phase.is_present() && drive.made, "{drive:?}");
            assert_eq!(observed[&drive.node_id].drives[id].state, DriveState::Serving);
        }
        assert!(observed.values().flat_map(|seen| seen.drives.keys()).all(|id| self.desired.drives.contains_key(id)));
        for (id, volume) in &self.desired.volumes {
            assert!(volume.phase.is_present(), "{volume:?}");
            for replica in &volume.replicas {
                let is_gone = volume.group.is_some()
                    && self.desired.drives.get(&replica.drive_id).is_none_or(|drive| drive.volatile)
                    && !observed[&replica.node_id].volumes.contains_key(id);
                if is_gone {
                    continue; // its drive was taken away, or forgot it: the others go on
                }
                let seen = &observed[&replica.node_id].volumes[id];
                assert!(replica.made, "{volume:?}");
                assert_eq!((seen.size, seen.drive_id), (volume.size, replica.drive_id));
                let doors = volume.doors.iter().filter(|desired| desired.node_id == replica.node_id);
                assert_eq!(seen.doors, doors.map(|desired| desired.door.clone()).collect());
                assert!(!volume.allow_shrink || observed.values().all(|seen| seen.volumes.get(id).is_none_or(|seen| !seen.is_served())));
            }
        }
        for (id, node_id) in &self.kept {
            assert!(observed[node_id].volumes.contains_key(id), "{id} on {node_id} was kept by nobody's wish but is gone");
        }
    }

    fn drive(&self, pick: usize) -> Option<DriveId> {
        self.desired.drives.keys().nth(pick % self.desired.drives.len().max(1)).copied()
    }

    fn name(&self, pick: usize) -> Option<String> {
        self.desired.volumes.values().nth(pick % self.desired.volumes.len().max(1)).map(|volume| volume.name.to_string())
    }

    fn volatile_places(&self, node_id: NodeId) -> Vec<String> {
        let drives = self.desired.drives.values().filter(|drive| drive.node_id == node_id && drive.volatile);
        drives.map(|drive| drive.spec.place()).collect()
    }
}

#[derive(Clone, Debug)]
enum Event {
    AddDrive {
        node: u16,
        place: u8,
        volatile: bool,
    },
    RemoveDrive {
        pick: usize,
        force: bool,
    },
    Create {
        name: u8,
        size: u64,
        pick: Option<usize>,
        replicas: u8,
    },
    Resize {
        pick: usize,
        size: u64,
        shrink: bool,
    },
    Remove {
        pick: usize,
        force: bool,
    },
    Export {
        pick: usize,
        port: u16,
    },
    Unexport {
        pick: usize,
        port: u16,
    },
    /// A round that dies after `upto` steps; what was done stays done.
    Round {
        node: u16,
        upto: usize,
        lost_answer: bool,
    },
    ControlCrash,
    NodeCrash {
        node: u16,
    },
    /// Control loses its whole state and is rebuilt from the drives.
    Import,
}

fn any_event() -> impl Strategy<Value = Event> {
    let pick = 0usize..8;
    prop_oneof![
        4 => (0..NODES, 0u8..2, any::<bool>()).prop_map(|(node, place, volatile)| Event::AddDrive { node, place, volatile }),
        1 => (pick.clone(), any::<bool>()).prop_map(|(pick, force)| Event::RemoveDrive { pick, force }),
        2 => (0u8..6, 1u64..9, proptest::option::of(pick.clone())).prop_map(|(name, size, pick)| Event::Create { name, size, pick, replicas: 1 }),
        3 => (0u8..6, 1u64..9).prop_map(|(name, size)| Event::Create { name, size, pick: None, replicas: 3 }),
        2 => (pick.clone(), 1u64..9, any::<bool>()).prop_map(|(pick, size, shrink)| Event::Resize { pick, size, shrink }),
        2 => (pick.clone(), any::<bool>()).prop_map(|(pick, force)| Event::Remove { pick, force }),
        3 => (pick.clone(), 0u16..3).prop_map(|(pick, port)| Event::Export { pick, port }),
        2 => (pick, 0u16..3).prop_map(|(pick, port)| Event::Unexport { pick, port }),
        12 => (0..NODES, 0usize..6, any::<bool>()).prop_map(|(node, upto, lost_answer)| Event::Round { node, upto, lost_answer }),
        2 => Just(Event::ControlCrash),
        3 => (0..NODES).prop_map(|node| Event::NodeCrash { node }),
        1 => Just(Event::Import),
    ]
}

fn door(port: u16) -> Door {
    match port {
        0 => Door::NVMF_ANYWHERE,
        _ => Door::Vhost { name: Some(format!("s{port}").parse().unwrap()) },
    }
}

fn happen(world: &mut World, event: Event) {
    match event {
        Event::AddDrive { node, place, volatile } => {
            let node_id = node_id(node);
            let text = if volatile { format!("malloc:m{place}?size=1GiB") } else { format!("file:/d{place}?size=1GiB") };
            let spec: penstock_api::DriveSpec = text.parse().unwrap();
            // As the server does: a drive of ours is imported, not added.
            if world.nodes[&node_id].media.get(&spec.place()).is_some_and(|medium| medium.label.is_some()) {
                return;
            }
            let body = DriveAddBody { spec, node: None, volatile, stores: None, oplog_bytes: None, force: false };
            let id = DriveId(world.id());
            let judged = change::add_drive(&world.desired, id, node_id, &body, volatile);
            world.commit(judged);
        }
        Event::RemoveDrive { pick, force } => {
            if let Some(id) = world.drive(pick) {
                let judged = change::remove_drive(&world.desired, id, force);
                world.commit(judged);
            }
        }
        Event::Create { name, size, pick, replicas } => {
            let (volume, segment) = (VolumeId(world.id()), SegmentId(world.id()));
            let ids = VolumeIds { volume, segment, replicas: (0..replicas).map(|_| ReplicaId(world.id())).collect() };
            let (name, size) = (format!("v{name}").parse().unwrap(), ByteSize::mib(size));
            let drive_ids: Vec<DriveId> = pick.and_then(|pick| world.drive(pick)).into_iter().collect();
            let body = VolumeCreateBody { name, size, block_size: BlockSize::B4096, replicas, drive_ids };
            let observed = world.observe_all();
            let there = observed.iter().map(|(id, seen)| (*id, seen)).collect();
            let judged = change::place(&world.desired, &there, &body.drive_ids, replicas)
                .and_then(|places| change::create_volume(&world.desired, &ids, &body, &places));
            world.commit(judged);
        }
        Event::Resize { pick, size, shrink } => {
            if let Some(name) = world.name(pick) {
                let judged = change::resize_volume(&world.desired, &name, ByteSize::mib(size), shrink);
                world.commit(judged);
            }
        }
        Event::Remove { pick, force } => {
            if let Some(name) = world.name(pick) {
                let judged = change::remove_volume(&world.desired, &BTreeMap::new(), &name, force);
                world.commit(judged);
            }
        }
        Event::Export { pick, port } => {
            if let Some(name) = world.name(pick) {
                let (_, volume) = world.desired.find_volume(&name).unwrap();
                let judged = change::doors_meant(&world.desired, volume, &door(port), None)
                    .and_then(|doors| change::export(&world.desired, &name, &doors));
                world.commit(judged);
            }
        }
        Event::Unexport { pick, port } => {
            if let Some(name) = world.name(pick) {
                let (_, volume) = world.desired.find_volume(&name).unwrap();
                if let Some(door) = volume.doors.get(usize::from(port)).map(|desired| desired.door.clone()) {
                    let judged = change::unexport(&world.desired, &name, &door, None, false).map(|(_, records)| records);
                    world.commit(judged);
                }
            }
        }
        Event::Round { node, upto, lost_answer } => {
            world.round(node_id(node), upto, lost_answer);
        }
        Event::ControlCrash => {
            let json = |value: &crate::DesiredVolume| serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap();
            world.desired.volumes = world.desired.volumes.iter().map(|(id, volume)| (*id, json(volume))).collect();
            world.issuer = Issuer::open(world.desired.identity.unwrap(), world.mark);
        }
        Event::NodeCrash { node } => {
            let places = world.volatile_places(node_id(node));
            world.nodes.get_mut(&node_id(node)).unwrap().crash(&places);
        }
        Event::Import => import_after_loss(world),
    }
}

/// Control's disk is gone. An operator starts an empty control and imports every persistent drive there is.
fn import_after_loss(world: &mut World) {
    world.converge();
    let before = world.desired.clone();
    world.desired = Desired::default();
    let label = |drive: &crate::DesiredDrive| world.nodes[&drive.node_id].media.get(&drive.spec.place())?.label;
    let found: Vec<(penstock_api::DriveSpec, (ClusterId, NodeId, DriveId), bool)> =
        before.drives.values().filter_map(|drive| Some((drive.spec.clone(), label(drive)?, drive.volatile))).collect();
    let Some((_, (cluster_id, node_id, _), _)) = found.first() else {
        world.desired = before;
        return;
    };
    let adopted = import::adopt(&world.desired, *cluster_id, *node_id).unwrap().expect("an empty control adopts");
    world.desired.apply(&[Record::Identity(adopted)]);
    world.mark = None;
    world.issuer = Issuer::open(adopted, None);
    // Those that say who they are first: the others get numbers that are free then.
    let mut names: Vec<(Option<NodeId>, DesiredNode)> =
        named().into_iter().map(|(id, node)| (world.nodes[&id].claim.map(|claim| claim.1), node)).collect();
    names.sort_by_key(|(shown, _)| shown.is_none());
    for (shown, node) in &names {
        // Unclaimed means that nothing of the cluster was ever there, so any id will do for it.
        if shown.is_some() {
            let (_, records) = crate::enroll(&world.desired, node, *shown).unwrap();
            world.desired.apply(&records);
        }
    }
    for (spec, (cluster_id, node_id, drive_id), volatile) in &found {
        let label = DriveLabel { cluster_id: *cluster_id, node_id: *node_id, drive_id: *drive_id, incarnation: 1 };
        let records = import::import_drive(&world.desired, spec, &label, *volatile);
        world.desired.apply(&records);
    }
    let nodes: Vec<NodeId> = world.nodes.keys().copied().collect();
    for id in nodes {
        world.round(id, usize::MAX, false);
    }
    let observed = world.observe_all();
    let take_up = |world: &mut World| {
        let mut report = import::empty_report(&adopted);
        let mut changed = 0;
        for (id, seen) in &observed {
            let records = import::import_observed(&world.desired, *id, seen, true, &mut report);
            changed += records.len();
            world.desired.apply(&records);
        }
        changed
    };
    take_up(world);
    assert_eq!(take_up(world), 0, "importing twice changed something");
    for (id, node) in &before.nodes {
        world.desired.apply(&[Record::PutNode(*id, node.clone())]);
    }
    // Ids that lie on no drive are known to nobody now; those of things removed before do not matter either.
    let alive: BTreeSet<Id> = observed.values().flat_map(Observed::ids).collect();
    world.issued.retain(|id| alive.contains(id));
    // Replicas that are nowhere any more (on a drive that was taken away, or that forgot) are not found again.
    let facts = |desired: &Desired| {
        let there = |id: &VolumeId, node_id: &NodeId| observed[node_id].volumes.contains_key(id);
        let replicas = desired.volumes.iter().flat_map(|(id, volume)| {
            let here = volume.replicas.iter().filter(|replica| there(id, &replica.node_id));
            here.map(|replica| (*id, volume.size, replica.clone(), volume.doors.iter().filter(|d| d.node_id == replica.node_id).count()))
        });
        replicas.collect::<Vec<_>>()
    };
    assert_eq!(facts(&world.desired), facts(&before));
    assert_eq!(world.desired.drives.keys().collect::<Vec<_>>(), before.drives.keys().collect::<Vec<_>>());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn world_after_any_crashes_agrees_again(events in proptest::collection::vec(any_event(), 1..50)) {
        let mut world = World::new();
        for event in events {
            happen(&mut world, event);
        }
        world.converge();
        world.assert_agreed();
    }
}

/// One node with a drive and a volume, settled; the other two have nothing to do.
fn small() -> World {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { node: 0, place: 0, volatile: false });
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None, replicas: 1 });
    world.converge();
    world
}

/// Three nodes with a drive each, and a volume on all of them.
fn wide() -> World {
    let mut world = World::new();
    (0..NODES).for_each(|node| happen(&mut world, Event::AddDrive { node, place: 0, volatile: false }));
    world.converge();
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None, replicas: 3 });
    world
}

fn plan_of(world: &World, n: u16) -> crate::Plan {
    reconcile(&world.desired, node_id(n), &world.observe(node_id(n)))
}

#[test]
fn world_swapped_blank_drive_is_not_formatted_and_its_volumes_are_not_replaced() {
    let mut world = small();
    let node = world.nodes.get_mut(&node_id(0)).unwrap();
    node.crash(&[]);
    node.media.clear();
    let plan = plan_of(&world, 0);
    let Step::Node(claim) = &plan.steps[0] else { panic!("{plan:?}") };
    world.call(node_id(0), claim).unwrap();
    let plan = plan_of(&world, 0);
    let add = plan.steps.iter().find_map(|step| match step {
        Step::Node(step @ NodeStep::AddDrive(_)) => Some(step.clone()),
        _ => None,
    });
    assert_eq!(world.call(node_id(0), &add.unwrap()).unwrap_err().kind(), Some(ErrorCode::NotFound));
    assert_eq!(world.nodes[&node_id(0)].media.values().next().unwrap().label, None);
}

#[test]
fn world_volume_gone_from_a_serving_drive_is_reported_lost_not_made_anew() {
    let mut world = small();
    let id = *world.desired.volumes.keys().next().unwrap();
    world.nodes.get_mut(&node_id(0)).unwrap().media.values_mut().for_each(|medium| medium.volumes.clear());
    let plan = plan_of(&world, 0);
    assert_eq!((plan.steps, plan.lost), (vec![], vec![id]));
}

#[test]
fn world_node_of_another_cluster_is_left_alone_and_the_others_are_not() {
    let mut world = wide();
    let other = ClusterTag::new(9).unwrap();
    world.nodes.get_mut(&node_id(1)).unwrap().claim = Some((ClusterId::of(other), NodeId::of(other, NodeNumber::new(1).unwrap())));
    let plan = plan_of(&world, 1);
    assert!(plan.steps.is_empty() && plan.blocked.unwrap().contains("belongs to cluster"));
    assert!(plan_of(&world, 0).steps.iter().any(|step| matches!(step, Step::Node(NodeStep::CreateMember(_)))));
}

#[test]
fn world_older_control_state_never_shrinks_or_deletes() {
    let mut world = small();
    let copy = (world.desired.clone(), world.mark);
    happen(&mut world, Event::Resize { pick: 0, size: 8, shrink: false });
    for _ in 0..2000 {
        world.id();
    }
    happen(&mut world, Event::Create { name: 1, size: 1, pick: None, replicas: 1 });
    world.converge();
    (world.desired, world.mark) = copy;
    world.issuer = Issuer::open(world.desired.identity.unwrap(), world.mark);
    let plan = plan_of(&world, 0);
    assert_eq!(plan.steps, vec![]);
    assert_eq!(plan.strays.len(), 1);
    world.round(node_id(0), usize::MAX, false);
    assert_eq!(world.issuer.identity().incarnation.get(), 1, "the drives show ids that this state never issued");
    happen(&mut world, Event::Create { name: 2, size: 1, pick: None, replicas: 1 });
}

#[test]
fn world_members_are_told_the_same_membership_and_doors_wait_for_a_majority() {
    let mut world = wide();
    happen(&mut world, Event::Export { pick: 0, port: 0 });
    let first = |world: &World, n: u16| {
        plan_of(world, n).steps.into_iter().find_map(|step| match step {
            Step::Node(NodeStep::CreateMember(params)) => Some(params),
            _ => None,
        })
    };
    let (a, b) = (first(&world, 0).unwrap(), first(&world, 2).unwrap());
    assert_eq!((&a.members, a.segment_id, a.volume_id), (&b.members, b.segment_id, b.volume_id));
    assert!(a.replica_id != b.replica_id && a.members.list.len() == 3 && a.members.next == 4);

    let opens = |world: &World, n: u16| plan_of(world, n).steps.iter().any(|step| matches!(step, Step::Node(NodeStep::AddExport(_))));
    world.round(node_id(0), usize::MAX, false); // made
    world.round(node_id(0), usize::MAX, false); // recorded
    assert!(!opens(&world, 0), "one of three is made");
    world.round(node_id(1), usize::MAX, false);
    world.round(node_id(1), usize::MAX, false);
    assert!(opens(&world, 0) && opens(&world, 1) && !opens(&world, 2), "node 3 is away, and holds up nobody");
    world.converge();
    world.assert_agreed();
}

#[test]
fn world_member_that_its_drive_forgot_is_never_made_again() {
    let mut world = wide();
    world.converge();
    let id = *world.desired.volumes.keys().next().unwrap();
    world.nodes.get_mut(&node_id(1)).unwrap().media.values_mut().for_each(|medium| medium.volumes.clear());
    let plan = plan_of(&world, 1);
    assert_eq!((plan.steps, plan.lost), (vec![], vec![id]));
    happen(&mut world, Event::Remove { pick: 0, force: false });
    world.converge();
    assert!(world.desired.volumes.is_empty());
}

#[test]
fn world_nodes_know_each_other_and_hear_of_changes() {
    let mut world = wide();
    world.converge();
    let peers = |world: &World, n: u16| world.nodes[&node_id(n)].peers.iter().map(|peer| peer.node_id).collect::<Vec<_>>();
    assert_eq!(peers(&world, 0), [node_id(1), node_id(2)]);
    assert_eq!(peers(&world, 2), [node_id(0), node_id(1)]);
    let moved = DesiredNode { peer: Some("127.0.0.1:9".parse().unwrap()), ..world.desired.nodes[&node_id(1)].clone() };
    world.desired.apply(&[Record::PutNode(node_id(1), moved)]);
    assert!(plan_of(&world, 1).steps.is_empty());
    world.converge();
    assert_eq!(world.nodes[&node_id(0)].peers[0].address.port(), 9);
}
