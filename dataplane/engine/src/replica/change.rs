//! One membership after another: which step is allowed, and what raft is told of it.

use penstock_wire::peer::{MemberNo, Members, Role};
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2};

/// What raft is to be told when `from` becomes `to`; `None` when only roles change that raft does not know.
pub(super) fn raft_change(from: &Members, to: &Members) -> Option<ConfChangeV2> {
    let changed = |no: MemberNo| match (from.get(no), to.get(no)) {
        (Some(_), None) => Some(ConfChangeType::RemoveNode),
        (before, Some(now)) if before.is_none_or(|before| before.role.votes() != now.role.votes()) => {
            Some(if now.role.votes() { ConfChangeType::AddNode } else { ConfChangeType::AddLearnerNode })
        }
        _ => None,
    };
    let mut numbers: Vec<_> = from.list.iter().chain(&to.list).map(|member| member.no).collect();
    numbers.sort();
    numbers.dedup();
    let changes: Vec<_> = numbers
        .into_iter()
        .filter_map(|no| {
            let mut single = ConfChangeSingle { node_id: no.0, ..Default::default() };
            single.set_change_type(changed(no)?);
            Some(single)
        })
        .collect();
    if changes.is_empty() {
        return None;
    }
    let mut change = ConfChangeV2::default();
    change.set_changes(changes.into());
    Some(change)
}

/// The change for raft, if `to` is one allowed step from `from`. A log-only member counts as soon as it joins: as a learner it would want content.
pub(super) fn one_step(from: &Members, to: &Members) -> Option<ConfChangeV2> {
    let kept = |a: &Members, b: &Members| {
        a.list
            .iter()
            .filter(|member| b.get(member.no).is_some_and(|other| (other.replica, other.node) != (member.replica, member.node)))
            .count()
            == 0
    };
    let joined: Vec<_> = to.list.iter().filter(|member| from.get(member.no).is_none()).collect();
    let left = from.list.iter().filter(|member| to.get(member.no).is_none()).count();
    let promoted = to.list.iter().filter(|member| from.get(member.no).is_some_and(|before| before.role != member.role)).collect::<Vec<_>>();
    let numbered = match joined[..] {
        [] => to.next == from.next,
        [member] => member.no == from.next && to.next.0 == from.next.0 + 1 && member.role != Role::Voter,
        _ => false,
    };
    let risen = promoted.iter().all(|member| member.role == Role::Voter);
    (kept(from, to) && numbered && risen && joined.len() + left + promoted.len() == 1).then(|| raft_change(from, to)).flatten()
}
