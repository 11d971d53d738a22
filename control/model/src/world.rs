//! Tests: a control and a node in one small world, driven by random wishes, crashes and refusals, against the rule
//! that once the trouble stops, desired and observed agree, nothing was lost that nobody removed, and no id came
//! twice. The node is a few maps: media that survive, and what is open, which does not.

use std::collections::{BTreeMap, BTreeSet};

use penstock_api::http::{DriveAddBody, VolumeCreateBody};
use penstock_api::id::{ClusterTag, Id, Incarnation, NodeNumber};
use penstock_api::rpc::{BlockSize, Door, DriveLabel, DriveState, ErrorCode, RpcError, VolumeState};
use penstock_api::{ByteSize, ClusterId, DriveId, NodeId, ReplicaId, SegmentId, VolumeId};
use proptest::prelude::*;

use crate::change::{self, VolumeIds};
use crate::desired::{Desired, Phase, Record};
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
    /// Open drives and the doors served; gone with the process.
    open: BTreeMap<DriveId, (String, ObservedDrive)>,
    doors: BTreeMap<VolumeId, BTreeSet<Door>>,
}

impl Node {
    fn crash(&mut self, volatile_places: &[String]) {
        self.claim = None;
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
                };
                self.medium_of(params.drive_id)?.volumes.entry(params.volume_id).or_insert(volume);
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
    node: Node,
    /// Volumes that were settled once and that nobody removed since: they must be there in the end.
    kept: BTreeSet<VolumeId>,
}

fn identity() -> Identity {
    let (cluster, node) = (ClusterTag::new(7).unwrap(), NodeNumber::new(1).unwrap());
    Identity { cluster, node, incarnation: Incarnation::FIRST }
}

impl World {
    fn new() -> Self {
        let desired = Desired { identity: Some(identity()), ..Desired::default() };
        let issuer = Issuer::open(identity(), None);
        let (issued, node, kept) = (BTreeSet::new(), Node::default(), BTreeSet::new());
        Self { desired, mark: None, issuer, issued, node, kept }
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

    /// One round of reconciling, of which the first `upto` steps happen before a crash. Answers how many there were.
    fn round(&mut self, upto: usize, lost_answer: bool) -> usize {
        let observed = self.node.observe();
        for id in observed.ids() {
            if let Some(mark) = self.issuer.on_seen(id).unwrap() {
                self.mark = Some(mark);
                self.issuer.on_durable(mark);
            }
        }
        let plan = reconcile(&self.desired, &observed);
        assert_eq!(plan, reconcile(&self.desired, &observed), "not deterministic");
        assert_eq!(plan.blocked, None);
        assert!(plan.lost.is_empty(), "lost {:?}", plan.lost);
        for (at, step) in plan.steps.iter().take(upto).enumerate() {
            match step {
                Step::Local(local) => {
                    let records = local.records(&self.desired);
                    self.desired.apply(&records);
                }
                Step::Node(step) => {
                    let first = self.node.call(step);
                    // Done at the node, but the answer never came: the step happens once more.
                    if lost_answer && at + 1 == upto {
                        assert_eq!(self.node.call(step).is_ok(), first.is_ok(), "{step:?} is not idempotent");
                    }
                }
            }
        }
        for (id, volume) in &self.desired.volumes {
            let serving = self.desired.drives.get(&volume.drive_id).is_some_and(|drive| drive.phase.is_present() && !drive.volatile);
            if volume.made && volume.phase.is_present() && serving {
                self.kept.insert(*id);
            } else {
                self.kept.remove(id);
            }
        }
        self.kept.retain(|id| self.desired.volumes.contains_key(id));
        plan.steps.len()
    }

    fn converge(&mut self) {
        for _ in 0..12 {
            if self.round(usize::MAX, false) == 0 {
                return;
            }
        }
        panic!("twelve quiet rounds and still {:?}", reconcile(&self.desired, &self.node.observe()).steps);
    }

    fn assert_agreed(&self) {
        let observed = self.node.observe();
        for (id, drive) in &self.desired.drives {
            assert!(drive.phase.is_present() && drive.made, "{drive:?}");
            assert_eq!(observed.drives[id].state, DriveState::Serving);
        }
        assert!(observed.drives.keys().all(|id| self.desired.drives.contains_key(id)));
        for (id, volume) in &self.desired.volumes {
            let seen = &observed.volumes[id];
            assert!(volume.phase.is_present() && volume.made && !volume.allow_shrink, "{volume:?}");
            assert_eq!((seen.size, seen.drive_id), (volume.size, volume.drive_id));
            let doors: BTreeSet<Door> = volume.doors.iter().map(|desired| desired.door.clone()).collect();
            assert_eq!(seen.doors, doors);
            assert!(volume.doors.iter().all(|desired| desired.phase == Phase::Present));
        }
        for id in &self.kept {
            assert!(observed.volumes.contains_key(id), "{id} was kept by nobody's wish but is gone");
        }
    }

    fn drive(&self, pick: usize) -> Option<DriveId> {
        self.desired.drives.keys().nth(pick % self.desired.drives.len().max(1)).copied()
    }

    fn name(&self, pick: usize) -> Option<String> {
        self.desired.volumes.values().nth(pick % self.desired.volumes.len().max(1)).map(|volume| volume.name.to_string())
    }

    fn volatile_places(&self) -> Vec<String> {
        self.desired.drives.values().filter(|drive| drive.volatile).map(|drive| drive.spec.place()).collect()
    }
}

#[derive(Clone, Debug)]
enum Event {
    AddDrive {
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
        upto: usize,
        lost_answer: bool,
    },
    ControlCrash,
    NodeCrash,
    /// Control loses its whole state and is rebuilt from the drives.
    Import,
}

fn any_event() -> impl Strategy<Value = Event> {
    let pick = 0usize..8;
    prop_oneof![
        2 => (0u8..4, any::<bool>()).prop_map(|(place, volatile)| Event::AddDrive { place, volatile }),
        1 => (pick.clone(), any::<bool>()).prop_map(|(pick, force)| Event::RemoveDrive { pick, force }),
        4 => (0u8..6, 1u64..9, proptest::option::of(pick.clone())).prop_map(|(name, size, pick)| Event::Create { name, size, pick }),
        2 => (pick.clone(), 1u64..9, any::<bool>()).prop_map(|(pick, size, shrink)| Event::Resize { pick, size, shrink }),
        2 => (pick.clone(), any::<bool>()).prop_map(|(pick, force)| Event::Remove { pick, force }),
        3 => (pick.clone(), 0u16..3).prop_map(|(pick, port)| Event::Export { pick, port }),
        2 => (pick, 0u16..3).prop_map(|(pick, port)| Event::Unexport { pick, port }),
        8 => (0usize..6, any::<bool>()).prop_map(|(upto, lost_answer)| Event::Round { upto, lost_answer }),
        2 => Just(Event::ControlCrash),
        2 => Just(Event::NodeCrash),
        1 => Just(Event::Import),
    ]
}

fn door(port: u16) -> Door {
    Door::Nvmf { address: [127, 0, 0, 1].into(), port: 4420 + port, nqn: None }
}

fn happen(world: &mut World, event: Event) {
    match event {
        Event::AddDrive { place, volatile } => {
            let text = if volatile { format!("malloc:m{place}?size=1GiB") } else { format!("file:/d{place}?size=1GiB") };
            let spec: penstock_api::DriveSpec = text.parse().unwrap();
            // As the server does: a drive of ours is imported, not added.
            if world.node.media.get(&spec.place()).is_some_and(|medium| medium.label.is_some()) {
                return;
            }
            let body = DriveAddBody { spec, volatile, stores: None, oplog_bytes: None, force: false };
            let id = DriveId(world.id());
            let judged = change::add_drive(&world.desired, id, &body, volatile);
            world.commit(judged);
        }
        Event::RemoveDrive { pick, force } => {
            if let Some(id) = world.drive(pick) {
                let judged = change::remove_drive(&world.desired, id, force);
                world.commit(judged);
            }
        }
        Event::Create { name, size, pick } => {
            let ids = VolumeIds { volume: VolumeId(world.id()), segment: SegmentId(world.id()), replica: ReplicaId(world.id()) };
            let (name, size) = (format!("v{name}").parse().unwrap(), ByteSize::mib(size));
            let asked = pick.and_then(|pick| world.drive(pick));
            let body = VolumeCreateBody { name, size, block_size: BlockSize::B4096, drive_id: asked };
            let observed = world.node.observe();
            let judged = change::place(&world.desired, Some(&observed), asked)
                .and_then(|drive_id| change::create_volume(&world.desired, ids, &body, drive_id));
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
                let judged = change::remove_volume(&world.desired, Some(&world.node.observe()), &name, force);
                world.commit(judged);
            }
        }
        Event::Export { pick, port } => {
            if let Some(name) = world.name(pick) {
                let judged = change::export(&world.desired, &name, &door(port));
                world.commit(judged);
            }
        }
        Event::Unexport { pick, port } => {
            if let Some(name) = world.name(pick) {
                let judged = change::unexport(&world.desired, &name, &door(port), false);
                world.commit(judged);
            }
        }
        Event::Round { upto, lost_answer } => {
            world.round(upto, lost_answer);
        }
        Event::ControlCrash => {
            let json = |value: &crate::DesiredVolume| serde_json::from_str(&serde_json::to_string(value).unwrap()).unwrap();
            world.desired.volumes = world.desired.volumes.iter().map(|(id, volume)| (*id, json(volume))).collect();
            world.issuer = Issuer::open(world.desired.identity.unwrap(), world.mark);
        }
        Event::NodeCrash => {
            let places = world.volatile_places();
            world.node.crash(&places);
        }
        Event::Import => import_after_loss(world),
    }
}

/// Control's disk is gone. An operator starts an empty control and imports every persistent drive there is.
fn import_after_loss(world: &mut World) {
    world.converge();
    let before = world.desired.clone();
    world.desired = Desired::default();
    let named: Vec<(penstock_api::DriveSpec, (ClusterId, NodeId, DriveId), bool)> = before
        .drives
        .values()
        .filter_map(|drive| Some((drive.spec.clone(), world.node.media.get(&drive.spec.place())?.label?, drive.volatile)))
        .collect();
    let Some((_, (cluster_id, node_id, _), _)) = named.first() else {
        world.desired = before;
        return;
    };
    let adopted = import::adopt(&world.desired, *cluster_id, *node_id).unwrap().expect("an empty control adopts");
    world.desired.apply(&[Record::Identity(adopted)]);
    world.mark = None;
    world.issuer = Issuer::open(adopted, None);
    for (spec, (cluster_id, node_id, drive_id), volatile) in &named {
        let label = DriveLabel { cluster_id: *cluster_id, node_id: *node_id, drive_id: *drive_id, incarnation: 1 };
        let records = import::import_drive(&world.desired, spec, &label, *volatile);
        world.desired.apply(&records);
    }
    world.round(usize::MAX, false);
    let observed = world.node.observe();
    let (records, _) = import::import_observed(&world.desired, &observed, &adopted, true);
    world.desired.apply(&records);
    let (again, report) = import::import_observed(&world.desired, &observed, &adopted, true);
    assert!(again.is_empty() && report.volumes.is_empty(), "importing twice changed {again:?}");
    // Ids that lie on no drive are known to nobody now; those of things removed before do not matter either.
    let alive: BTreeSet<Id> = observed.ids().collect();
    world.issued.retain(|id| alive.contains(id));
    let facts = |desired: &Desired| {
        desired.volumes.iter().map(|(id, volume)| (*id, volume.size, volume.drive_id, volume.doors.len())).collect::<Vec<_>>()
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

#[test]
fn world_swapped_blank_drive_is_not_formatted_and_its_volumes_are_not_replaced() {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { place: 0, volatile: false });
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None });
    world.converge();
    world.node.crash(&[]);
    world.node.media.clear();
    let plan = reconcile(&world.desired, &world.node.observe());
    let Step::Node(claim) = &plan.steps[0] else { panic!("{plan:?}") };
    world.node.call(claim).unwrap();
    let plan = reconcile(&world.desired, &world.node.observe());
    let Step::Node(add) = &plan.steps[0] else { panic!("{plan:?}") };
    assert_eq!(world.node.call(add).unwrap_err().kind(), Some(ErrorCode::NotFound));
    assert_eq!(world.node.media.values().next().unwrap().label, None);
}

#[test]
fn world_volume_gone_from_a_serving_drive_is_reported_lost_not_made_anew() {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { place: 0, volatile: false });
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None });
    world.converge();
    let id = *world.desired.volumes.keys().next().unwrap();
    world.node.media.values_mut().for_each(|medium| medium.volumes.clear());
    let plan = reconcile(&world.desired, &world.node.observe());
    assert_eq!((plan.steps, plan.lost), (vec![], vec![id]));
}

#[test]
fn world_node_of_another_cluster_is_left_alone() {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { place: 0, volatile: false });
    let other = ClusterTag::new(9).unwrap();
    world.node.claim = Some((ClusterId::of(other), NodeId::of(other, NodeNumber::new(1).unwrap())));
    let plan = reconcile(&world.desired, &world.node.observe());
    assert!(plan.steps.is_empty() && plan.blocked.unwrap().contains("belongs to cluster"));
}

#[test]
fn world_older_control_state_never_shrinks_or_deletes() {
    let mut world = World::new();
    happen(&mut world, Event::AddDrive { place: 0, volatile: false });
    happen(&mut world, Event::Create { name: 0, size: 1, pick: None });
    world.converge();
    let copy = (world.desired.clone(), world.mark);
    happen(&mut world, Event::Resize { pick: 0, size: 8, shrink: false });
    for _ in 0..2000 {
        world.id();
    }
    happen(&mut world, Event::Create { name: 1, size: 1, pick: None });
    world.converge();
    (world.desired, world.mark) = copy;
    world.issuer = Issuer::open(world.desired.identity.unwrap(), world.mark);
    let plan = reconcile(&world.desired, &world.node.observe());
    assert_eq!(plan.steps, vec![]);
    assert_eq!(plan.strays.len(), 1);
    world.round(usize::MAX, false);
    assert_eq!(world.issuer.identity().incarnation.get(), 1, "the drives show ids that this state never issued");
    happen(&mut world, Event::Create { name: 2, size: 1, pick: None });
}
