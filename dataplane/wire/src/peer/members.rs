//! A group's membership: who the members are, where, and in which role. The whole of it after a change, not the change, so
//! that any one record tells who must be asked.

use super::{Grow, limit, zeros};
use crate::codec::Take;
use crate::{DecodeError, NodeId, ReplicaId};

/// A member's number in its group: given when it joins, one after the other from 1, never used again.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord, Default)]
pub struct MemberNo(pub u64);

/// Members of a group at most.
pub const MEMBERS_MAX: usize = 16;
/// Voters at most.
pub const VOTERS_MAX: usize = 7;
const VERSION: u16 = 1;

/// What a member counts for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Voter,
    /// Takes the log, counts in no quorum.
    Learner,
    /// A voter that keeps the log and no extents.
    LogOnly,
}

impl Role {
    pub fn votes(self) -> bool {
        !matches!(self, Self::Learner)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Member {
    pub no: MemberNo,
    pub role: Role,
    pub replica: ReplicaId,
    pub node: NodeId,
}

/// Everyone in the group, in order of number.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Members {
    /// The number that the next one to join gets: whoever is below it and not in the list was removed for good.
    pub next: MemberNo,
    pub list: Vec<Member>,
}

impl Members {
    pub fn get(&self, no: MemberNo) -> Option<&Member> {
        self.list.iter().find(|member| member.no == no)
    }

    pub fn voters(&self) -> impl Iterator<Item = MemberNo> + '_ {
        self.list.iter().filter(|member| member.role.votes()).map(|member| member.no)
    }

    pub fn learners(&self) -> impl Iterator<Item = MemberNo> + '_ {
        self.list.iter().filter(|member| !member.role.votes()).map(|member| member.no)
    }

    /// Whether a member has the volume's content, or is to have it.
    pub fn has_content(&self, no: MemberNo) -> bool {
        self.get(no).is_none_or(|member| member.role != Role::LogOnly)
    }

    /// Was a member and is none any more.
    pub fn was_removed(&self, no: MemberNo) -> bool {
        no < self.next && self.get(no).is_none()
    }

    /// Was the membership before some member of the other was added: who was born with that one, or recovered by force, meets these again in its log.
    pub fn precedes(&self, other: &Self) -> bool {
        self.next < other.next
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut w = Grow(Vec::new());
        self.put(&mut w);
        w.0
    }

    /// # Errors
    /// When the bytes are not exactly a membership that a group can have.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Take::new(bytes, 0, "membership");
        let members = Self::take(&mut r)?;
        match r.left() {
            0 => Ok(members),
            more => Err(DecodeError::Value { what: "bytes after a membership", found: more as u64 }),
        }
    }

    pub(super) fn put(&self, w: &mut Grow) {
        w.u16(VERSION);
        w.u16(self.list.len() as u16);
        w.zeros(4);
        w.u64(self.next.0);
        for member in &self.list {
            w.u64(member.no.0);
            w.u8(match member.role {
                Role::Voter => 0,
                Role::Learner => 1,
                Role::LogOnly => 2,
            });
            w.zeros(7);
            w.bytes(&member.replica.0);
            w.bytes(&member.node.0);
        }
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let version = r.u16()?;
        if version != VERSION {
            return Err(DecodeError::Version { what: "membership", found: version.into(), known: VERSION.into() });
        }
        let count = r.u16()?;
        limit("members of a group", count.into(), MEMBERS_MAX as u64)?;
        zeros(r, 4)?;
        let next = MemberNo(r.count("next number of a member")?);
        let list = (0..count).map(|_| take_member(r)).collect::<Result<Vec<_>, _>>()?;
        let members = Self { next, list };
        members.check()?;
        Ok(members)
    }

    /// Whether a group can have these members.
    ///
    /// # Errors
    /// Names what is wrong.
    pub fn check(&self) -> Result<(), DecodeError> {
        let ordered = self.list.windows(2).all(|pair| pair[0].no < pair[1].no);
        let first = self.list.first().is_some_and(|member| member.no.0 > 0);
        let last = self.list.last().is_some_and(|member| member.no < self.next);
        if !ordered || !first || !last {
            return Err(DecodeError::Value { what: "order of the members' numbers, next", found: self.next.0 });
        }
        if self.list.iter().enumerate().any(|(i, a)| self.list[..i].iter().any(|b| a.replica == b.replica || a.node == b.node)) {
            return Err(DecodeError::Value { what: "members of one replica or node", found: self.list.len() as u64 });
        }
        let data = self.list.iter().filter(|member| member.role == Role::Voter).count();
        let voters = self.voters().count();
        if data == 0 || voters > VOTERS_MAX {
            return Err(DecodeError::Value { what: "voters of a group", found: voters as u64 });
        }
        limit("members of a group", self.list.len() as u64, MEMBERS_MAX as u64)
    }
}

fn take_member(r: &mut Take<'_>) -> Result<Member, DecodeError> {
    let no = MemberNo(r.count("number of a member")?);
    let role = match r.u8()? {
        0 => Role::Voter,
        1 => Role::Learner,
        2 => Role::LogOnly,
        other => return Err(DecodeError::Value { what: "role of a member", found: other.into() }),
    };
    zeros(r, 7)?;
    Ok(Member { no, role, replica: ReplicaId(r.id()?), node: NodeId(r.id()?) })
}
