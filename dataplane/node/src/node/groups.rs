//! Volumes of several replicas: members made, changed and moved by control, and how this node's member stands.
//!
//! Not here: what a group decides (the engine's), or which nodes are to have members (control's).

use std::rc::Rc;
use std::time::Duration;

use penstock_api::rpc::{
    Empty, ErrorCode, GroupChangeParams, GroupInfo, GroupMember, GroupMembers, GroupPart, GroupRecoverParams, GroupTransferParams,
    LogPoint, MemberCreateParams, MemberRole, RebuildInfo, RecoveryReceipt, RpcError, VolumeInfo,
};
use penstock_api::{NodeId, ReplicaId, VolumeId};
use penstock_engine::replica::{GroupView, LogEnd, Part};
use penstock_engine::{MemberView, Order, Receipt, Standing};
use penstock_wire::peer::{Member, MemberNo, Members, Role};

use super::drives::Gate;
use super::volumes::{no_volume, order_error};
use super::{Answer, Node, fail};
use crate::core::{CoreIndex, VolumeSlot};
use crate::door::ana;

/// Between two attempts to end hosts.
const AGAIN: Duration = Duration::from_millis(100);

/// What a group's member said last.
#[derive(Clone, Debug, Default)]
pub(super) struct GroupStand {
    pub standing: Option<Standing>,
    /// Why it answers nothing any more.
    pub stopped: Option<String>,
    /// Of its last recovery by force, in this life of the node.
    pub receipt: Option<RecoveryReceipt>,
}

impl GroupStand {
    /// Hosts are served here.
    pub fn serves(&self) -> bool {
        self.stopped.is_none() && self.standing.is_some_and(|standing| standing.serves)
    }
}

fn wire_role(role: MemberRole) -> Role {
    match role {
        MemberRole::Voter => Role::Voter,
        MemberRole::Learner => Role::Learner,
        MemberRole::LogOnly => Role::LogOnly,
    }
}

fn api_role(role: Role) -> MemberRole {
    match role {
        Role::Voter => MemberRole::Voter,
        Role::Learner => MemberRole::Learner,
        Role::LogOnly => MemberRole::LogOnly,
    }
}

/// `None` where its ids are not ones that this project makes.
fn api_members(members: &Members) -> Option<GroupMembers> {
    let member = |member: &Member| {
        let (replica_id, node_id) = (ReplicaId::from_bytes(member.replica.0).ok()?, NodeId::from_bytes(member.node.0).ok()?);
        Some(GroupMember { member: member.no.0, role: api_role(member.role), replica_id, node_id })
    };
    Some(GroupMembers { next: members.next.0, list: members.list.iter().map(member).collect::<Option<_>>()? })
}

fn api_receipt(receipt: &Receipt) -> Option<RecoveryReceipt> {
    let point = |end: LogEnd| LogPoint { term: end.term.0, index: end.index.0 };
    Some(RecoveryReceipt {
        member: receipt.me.0,
        members: api_members(&receipt.members)?,
        heard: receipt.heard.iter().filter(|no| **no != receipt.me).map(|no| no.0).collect(),
        term: receipt.term.0,
        new_term: receipt.new_term.0,
        last: point(receipt.last),
        committed: receipt.committed.0,
        acknowledged: receipt.floor.map(point),
        whole_as_of: receipt.whole_as_of.map(|index| index.0),
        stopped: receipt.stopped.clone(),
    })
}

/// How a member stands; `None` where its ids are not ones that this project makes.
pub(super) fn info(view: &MemberView) -> Option<GroupInfo> {
    let node = |id: penstock_wire::NodeId| NodeId::from_bytes(id.0).ok();
    let is_learner = view.members.get(view.me).is_some_and(|me| me.role == Role::Learner);
    let standing = view.standing;
    let waits = view.doubtful || !view.admitted;
    let (part, reason) = match (&view.stopped, waits, standing.map(|standing| standing.part)) {
        (Some(why), ..) => (GroupPart::Stopped, Some(why.clone())),
        (None, true, _) => {
            let reason = if view.admitted {
                "its log ends in records that may have counted: the other members are asked before it takes part"
            } else {
                "the other members are asked whether its drive is what it was, and enough of them have not answered yet"
            };
            (GroupPart::Doubtful, Some(reason.to_owned()))
        }
        (None, false, Some(Part::Leader)) => (GroupPart::Leader, None),
        (None, false, Some(Part::Candidate)) => (GroupPart::Candidate, None),
        (None, false, _) if is_learner => (GroupPart::Learner, None),
        (None, false, _) => (GroupPart::Follower, None),
    };
    let group = view.group;
    let index = |of: fn(&GroupView) -> penstock_wire::Index| group.as_ref().map_or(view.applied.0, |group| of(group).0);
    Some(GroupInfo {
        member: view.me.0,
        part,
        reason,
        term: standing.map_or(0, |standing| standing.term.0),
        leader: standing.and_then(|standing| standing.leader).and_then(node),
        serves: standing.is_some_and(|standing| standing.serves) && view.stopped.is_none(),
        asleep: group.is_some_and(|group| group.asleep),
        last: index(|group| group.last),
        last_term: group.as_ref().map_or(0, |group| group.last_term.0),
        persisted: index(|group| group.persisted),
        committed: index(|group| group.committed),
        applied: view.applied.0,
        rebuild: view.rebuild.map(|rebuild| RebuildInfo { done: rebuild.done, total: rebuild.total }),
        members: api_members(&view.members)?,
    })
}

/// A membership as the engine takes it.
fn wire_members(members: &GroupMembers) -> Result<Box<Members>, RpcError> {
    let of = |member: &GroupMember| Member {
        no: MemberNo(member.member),
        role: wire_role(member.role),
        replica: penstock_wire::ReplicaId(member.replica_id.to_bytes()),
        node: penstock_wire::NodeId(member.node_id.to_bytes()),
    };
    let members = Members { next: MemberNo(members.next), list: members.list.iter().map(of).collect() };
    match members.check() {
        Ok(()) => Ok(Box::new(members)),
        Err(error) => {
            let hint =
                "members are numbered from 1 in rising order, each on another node, with one voter or more, and `next` is above them all";
            Err(fail(ErrorCode::Invalid, format!("these cannot be a group's members: {error}"), hint))
        }
    }
}

impl Node {
    pub(super) fn on_standing(self: &Rc<Self>, core: CoreIndex, slot: VolumeSlot, standing: Standing) {
        let Some(id) = self.volume_at(core, slot) else { return };
        let Standing { part, term, leader, serves } = standing;
        tracing::info!(volume = %id, ?part, term = term.0, leader = ?leader, serves, "a volume's part in its group changed");
        if let Some(volume) = self.volumes.borrow_mut().get_mut(&id) {
            volume.group.get_or_insert_default().standing = Some(standing);
        }
        self.show_serving(id);
    }

    pub(super) fn on_stepping_aside(&self, core: CoreIndex, slot: VolumeSlot, to: penstock_wire::NodeId) {
        let Some(id) = self.volume_at(core, slot) else { return };
        tracing::warn!(volume = %id, to = ?to, "the drive here is far behind the other members': another is asked to lead");
    }

    pub(super) fn on_differs(&self, core: CoreIndex, slot: VolumeSlot, block: u64, mends: bool) {
        let Some(id) = self.volume_at(core, slot) else { return };
        if mends {
            tracing::error!(volume = %id, block, "the 64 KiB from this block on were silently wrong here: most replicas have another content, which is copied");
        } else {
            tracing::error!(volume = %id, block, "replicas have the 64 KiB from this block on otherwise, each with its checksums right, and no majority tells which is wrong");
        }
    }

    pub(super) fn on_group_stopped(self: &Rc<Self>, core: CoreIndex, slot: VolumeSlot, why: String) {
        let Some(id) = self.volume_at(core, slot) else { return };
        tracing::error!(volume = %id, why, "a volume's group answers nothing here any more");
        if let Some(volume) = self.volumes.borrow_mut().get_mut(&id) {
            volume.group.get_or_insert_default().stopped = Some(why);
        }
        self.show_serving(id);
    }

    /// Kept for whoever ordered it, and orders it again: that it goes on alone already tells nothing of what it was.
    pub(super) fn on_recovered(self: &Rc<Self>, core: CoreIndex, slot: VolumeSlot, receipt: &Receipt) {
        let Some(id) = self.volume_at(core, slot) else { return };
        tracing::warn!(volume = %id, ?receipt, "a volume goes on with this replica alone: what came after the last committed entry and is not in its log is lost");
        if let Some(group) = self.volumes.borrow_mut().get_mut(&id).and_then(|volume| volume.group.as_mut()) {
            group.stopped = None;
            let is_news = group.receipt.is_none() || receipt.members.list.len() > 1;
            if let Some(receipt) = api_receipt(receipt).filter(|_| is_news) {
                group.receipt = Some(receipt);
            }
        }
        self.show_serving(id);
    }

    /// Another node leads what was served here: hosts' connections end before the core takes anything from them again.
    pub(super) fn end_hosts(self: &Rc<Self>, core: CoreIndex, slot: VolumeSlot) {
        let unbar = move |node: &Rc<Node>| {
            if crate::core::send(&node.core(core).thread, move |core| core.unbar(slot)).is_err() {
                tracing::debug!("a core has ended already");
            }
        };
        let target = self.target.borrow().clone();
        let (Some(id), Some(target)) = (self.volume_at(core, slot), target) else { return unbar(self) };
        let paths: Vec<_> = {
            let volumes = self.volumes.borrow();
            volumes
                .get(&id)
                .map(|v| v.exports.iter().filter_map(|open| open.export.as_ref()?.path().cloned()).collect())
                .unwrap_or_default()
        };
        let gate = Gate::new(paths.len() + 1, unbar);
        for nqn in paths {
            let (node, gate, target) = (self.clone(), gate.clone(), target.clone());
            let attempt = {
                let nqn = nqn.clone();
                Rc::new(move |told: ana::Told| target.end_hosts(&nqn, told))
            };
            // Nothing is taken from any of them while one may still be read.
            let rest = Rc::new(move |errno: spdk_rs::Errno, then: ana::Then| {
                tracing::warn!(%nqn, %errno, "hosts of a volume that another node leads now are not all gone: tried again");
                if let Some(node) = super::current() {
                    node.after(AGAIN, move |_| then());
                }
            });
            ana::persist(attempt, rest, Box::new(move || gate.pass(&node)));
        }
        gate.pass(self);
    }

    /// Tells hosts of all doors of a group's volume whether it is served here.
    pub(super) fn show_serving(&self, id: VolumeId) {
        let Some(target) = self.target.borrow().clone() else { return };
        let (paths, serves) = {
            let volumes = self.volumes.borrow();
            let Some(volume) = volumes.get(&id) else { return };
            let Some(serves) = volume.group.as_ref().map(GroupStand::serves) else { return };
            let paths: Vec<_> = volume.exports.iter().filter_map(|open| open.export.as_ref()?.path().cloned()).collect();
            (paths, serves)
        };
        for nqn in paths {
            target.want_path(&nqn, serves);
        }
    }

    fn volume_at(&self, core: CoreIndex, slot: VolumeSlot) -> Option<VolumeId> {
        self.volumes.borrow().iter().find(|(_, volume)| (volume.core, volume.slot) == (core, slot)).map(|(&id, _)| id)
    }

    /// Tells the other cores where a segment lives, for words that come in there.
    pub(super) fn spread_place(self: &Rc<Self>, home: CoreIndex, segment: penstock_wire::SegmentId, gone: bool) {
        let cores = self.cores.borrow().clone();
        for other in cores.into_iter().filter(|core| core.index != home) {
            let place = (!gone).then_some(home);
            if crate::core::send(&other.thread, move |core| core.learn_place(segment, place)).is_err() {
                tracing::debug!(core = other.core, "a core has ended already");
            }
        }
    }

    pub(super) fn member_create(self: &Rc<Self>, params: MemberCreateParams, answer: Answer<VolumeInfo>) {
        let members = match wire_members(&params.members) {
            Ok(members) => members,
            Err(error) => return answer(Err(error)),
        };
        let me = self.state.borrow().get().node_id;
        if params.own().is_none_or(|own| Some(own.node_id) != me) {
            let message = match me {
                Some(me) => format!("replica {} is not the member on this node, {me}", params.replica_id),
                None => "this node belongs to no cluster yet".to_owned(),
            };
            return answer(Err(fail(ErrorCode::Invalid, message, "each node is asked for its own of the members")));
        }
        self.replica_create(params.volume(), Some(members), answer);
    }

    pub(super) fn group_change(self: &Rc<Self>, params: GroupChangeParams, answer: Answer<Empty>) {
        match wire_members(&params.members) {
            Ok(members) => {
                let order = move |segment| Order::Change { segment, members };
                self.segment_order(params.volume_id, "changing the members", order, answer);
            }
            Err(error) => answer(Err(error)),
        }
    }

    pub(super) fn group_transfer(self: &Rc<Self>, params: GroupTransferParams, answer: Answer<Empty>) {
        let id = params.volume_id;
        let to = penstock_wire::NodeId(params.to.to_bytes());
        self.gather(move |node, views| {
            let place = node.volumes.borrow().get(&id).map(|v| (v.core, v.slot));
            let Some((core, slot)) = place else { return answer(Err(no_volume(id))) };
            let view = views.iter().find(|v| v.index == core).and_then(|v| v.volumes.iter().find(|one| one.slot == slot));
            let Some(members) = view.and_then(|view| view.member.as_ref()).map(|member| &member.members) else {
                return answer(Err(fail(ErrorCode::Invalid, format!("volume {id} has one replica"), "there is nobody to transfer it to")));
            };
            match members.list.iter().find(|member| member.node == to) {
                Some(member) => {
                    let to = member.no;
                    node.segment_order(id, "transferring", move |segment| Order::Transfer { segment, to }, answer);
                }
                None => {
                    let message = format!("node {} has no member of volume {id}", params.to);
                    answer(Err(fail(ErrorCode::NotFound, message, "`penstock volume show` shows its members")));
                }
            }
        });
    }

    pub(super) fn group_recover(self: &Rc<Self>, params: GroupRecoverParams, answer: Answer<RecoveryReceipt>) {
        let GroupRecoverParams { volume_id: id, regardless } = params;
        let node = self.clone();
        let order = move |segment| Order::Recover { segment, regardless };
        let told: Answer<Empty> = Box::new(move |result| {
            let kept = || node.volumes.borrow().get(&id).and_then(|volume| volume.group.as_ref()?.receipt.clone());
            answer(result.and_then(|Empty {}| kept().ok_or_else(|| no_volume(id))));
        });
        self.segment_order(id, "recovering by force", order, told);
    }

    /// Orders something of the store that has the volume.
    pub(super) fn segment_order(
        self: &Rc<Self>,
        id: VolumeId,
        doing: &'static str,
        order: impl FnOnce(penstock_wire::SegmentId) -> Order,
        answer: Answer<Empty>,
    ) {
        let place = self.volumes.borrow().get(&id).map(|v| (v.segment, v.core, v.key, v.store));
        let Some((segment, core, key, store)) = place else { return answer(Err(no_volume(id))) };
        let order = order(penstock_wire::SegmentId(segment.to_bytes()));
        self.order(core, key, store, order, move |_, result| {
            answer(result.map(|()| Empty {}).map_err(|error| order_error(doing, error)));
        });
    }
}
