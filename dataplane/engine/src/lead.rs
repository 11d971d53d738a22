//! Leading: what hosts and orders decided under this member's term becomes entries of the group's log; reads wait for a proof of
//! leadership; and when leadership is over, everyone who waits is told to try elsewhere.
//!
//! A host is answered when its entry is applied. One whose entry is in the log of a term that is lost is told "not ready" once the device has
//! its payload: the entry may still be committed by the next leader, which a host that tries again must expect anyhow.

use crate::config::Canary;
use crate::host::{JobId, JobStage, Proposed, Source, What};
use crate::member::{Payload, Promise, Proposal};
use crate::port::*;
use crate::replica::ProposeError;
use crate::store::Store;
use penstock_wire::batch::{ENTRY_HEAD, OP_HEAD, OPS_MAX, PAYLOAD_BLOCKS_MAX};
use penstock_wire::peer::{Entry, EntryKind, MemberNo, Members};
use penstock_wire::{BLOCK, Index, NodeId, SegmentId, Term};

impl Store {
    /// Whether hosts are served here: volumes of one replica always are, others where they lead.
    #[inline]
    pub(crate) fn serves(&self, no: ReplicaNo) -> bool {
        self.map.live(no).is_some_and(|replica| replica.member.as_deref().is_none_or(|member| member.serving.is_some()))
    }

    /// The job goes on when the groups are settled and this member still leads: by its lease, or by a round of proof that all of a turn share.
    pub(crate) fn prove(&mut self, id: JobId) {
        let job = self.host.job(id);
        job.stage = JobStage::Proving;
        let no = job.replica;
        self.member_mut(no).expect("only members need proof").asking.push(id);
        self.touch(no);
    }

    /// This member led after the job came.
    pub(crate) fn proven<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        match (job.verdict, job.op) {
            (Some(verdict), _) => self.finish_job(id, verdict, mem, fx),
            (None, HostOp::Reserve(_)) => self.report_reservations(id, mem, fx),
            (None, HostOp::Flush) => self.finish_job(id, Status::Ok, mem, fx),
            (None, _) => {
                self.next_read_chunk(id);
                self.issue_reads(id, mem, fx);
            }
        }
    }

    /// Makes entries of what is ready, in order, and proposes them.
    pub(crate) fn gather<M: Memory>(&mut self, mem: &mut M, fx: &mut Effects) {
        if self.host.grouped.is_empty() {
            return;
        }
        let mut ops: Vec<Proposed> = self.host.grouped.drain(..).collect();
        // Order within a replica stays, and between replicas there is none.
        ops.sort_by_key(|op| op.replica);
        let enough = self.config.limits.batch_blocks.min(PAYLOAD_BLOCKS_MAX);
        let mut ops = ops.into_iter().peekable();
        while let Some(first) = ops.next() {
            let (mut blocks, mut bytes) = (first.payload_blocks(), OP_HEAD + first.section_bytes());
            let mut taken = vec![first];
            while !taken[taken.len() - 1].ends_entry()
                && let Some(next) = ops.next_if(|next| {
                    let more = (blocks + next.payload_blocks(), bytes + OP_HEAD + next.section_bytes());
                    next.replica == taken[0].replica && more.0 <= enough && more.1 <= OPS_MAX
                })
            {
                blocks += next.payload_blocks();
                bytes += OP_HEAD + next.section_bytes();
                taken.push(next);
            }
            self.propose_entry(taken, mem, fx);
        }
    }

    fn propose_entry<M: Memory>(&mut self, mut ops: Vec<Proposed>, mem: &mut M, fx: &mut Effects) {
        let no = ops[0].replica;
        let mut section = std::mem::take(&mut self.groups.section);
        section.clear();
        section.entry(no.0, Term(0), Index(0));
        for op in &ops {
            match &op.what {
                What::Write { source, .. } => section.write(op.block, &checksums(op, *source, mem)),
                What::Zero => section.zero(op.block, op.blocks as u32),
                What::Resize => section.resize(op.block),
                What::Reserve(state) => section.reserve(state),
                What::Snapshot(shape) => section.snapshot(op.block, shape),
                What::Unsnapshot(id) => section.unsnapshot(*id),
                What::Create(_) | What::CreateMember(_) | What::Clone(_) | What::Delete => {
                    unreachable!("a store's own op goes into no group's log")
                }
            }
        }
        let bytes = section.bytes()[ENTRY_HEAD..].to_vec();
        self.groups.section = section;
        let member = self.member_mut(no);
        let proposed = member.and_then(|member| {
            let term = member.serving?;
            Some((term, member.group_mut()?.propose(term, bytes.clone()).ok()?))
        });
        let Some((term, index)) = proposed else {
            if self.canary(Canary::StampNewTerm) {
                self.host.grouped.extend(ops);
                return;
            }
            self.touch(no);
            self.fail_ops(ops, Status::NotReady, mem, fx);
            return;
        };
        for op in &mut ops {
            op.index = index;
            let promises = std::mem::take(&mut op.promises);
            self.give_up_promises(promises);
        }
        // Never refused: no more than was given up just now.
        let promised = self.promise_entry(no, &entry(term, index, bytes), false).unwrap_or_default();
        let bare: Vec<Promise> = ops.iter().flat_map(|op| self.bare_extents(no, op.written())).collect();
        let member = self.member_mut(no).expect("it has just proposed");
        member.rooms.spend(index, &promised);
        member.rooms.spend(index, &bare);
        if ops.last().is_some_and(Proposed::ends_entry) {
            member.note_marker(index);
        }
        member.proposals.push_back(Proposal { index, term, ops, promised, lost: false });
        self.touch(no);
    }

    /// Hosts are not served here any more: everything that has not become an entry is refused, and what has is once it is on the drive.
    pub(crate) fn step_down<M: Memory>(&mut self, no: ReplicaNo, mem: &mut M, fx: &mut Effects) {
        self.cancel_sends(no);
        if !self.canary(Canary::StampNewTerm) {
            let mut waiting = self.host.take_waiting(no);
            waiting.extend(self.take_parked(no));
            for id in waiting {
                self.finish_job(id, Status::NotReady, mem, fx);
            }
            for op in self.host.take_grouped(no) {
                self.fail_ops(vec![op], Status::NotReady, mem, fx);
            }
        }
        if let Some(replica) = self.map.get_mut(no) {
            // Of a shrink that may never come.
            replica.limit_blocks = replica.shape.blocks;
        }
        let Some(member) = self.member_mut(no) else { return };
        let (mut at, mut done) = (0, Vec::new());
        let change = member.change.take();
        member.rooms = Default::default();
        member.asking.clear();
        while at < member.proposals.len() {
            let proposal = &mut member.proposals[at];
            let (index, term) = (proposal.index, proposal.term);
            proposal.lost = true;
            if member.holds(index, term).is_some_and(|logged| logged.seq.is_some() && !matches!(logged.payload, Payload::Host)) {
                done.extend(member.proposals.remove(at));
            } else {
                at += 1;
            }
        }
        let leader = self.leader_of(no);
        if let Some((id, _)) = change {
            fx.list.push(Effect::OrderDone { id, result: Err(OrderError::NotLeader(leader)) });
        }
        for proposal in done {
            self.fail_ops(proposal.ops, Status::NotReady, mem, fx);
        }
    }

    /// An entry is on the drive: if its term is lost, who waits for it is told now.
    pub(crate) fn lost_persisted<M: Memory>(&mut self, no: ReplicaNo, index: Index, term: Term, mem: &mut M, fx: &mut Effects) {
        let Some(member) = self.member_mut(no) else { return };
        let Ok(at) = member.proposals.binary_search_by_key(&index, |proposal| proposal.index) else { return };
        if member.proposals[at].lost && member.proposals[at].term == term {
            let proposal = member.proposals.remove(at).expect("just found");
            self.fail_ops(proposal.ops, Status::NotReady, mem, fx);
        }
    }

    /// Node that leads a member's group, where that is known.
    pub(crate) fn leader_of(&self, no: ReplicaNo) -> Option<NodeId> {
        let member = self.member(no)?;
        member.node_of(member.group()?.view()?.leader)
    }

    /// The member that an order is for, if it leads.
    fn leading(&mut self, segment: SegmentId) -> Result<(ReplicaNo, Term), OrderError> {
        let no = self.map.by_segment(segment).ok_or(OrderError::NoSuchSegment)?;
        let member = self.member(no).ok_or(OrderError::Invalid("a volume with one replica has no group"))?;
        let term = member.serving.ok_or_else(|| OrderError::NotLeader(self.leader_of(no)))?;
        Ok((no, term))
    }

    pub(crate) fn begin_transfer(&mut self, segment: SegmentId, to: MemberNo) -> Result<(), OrderError> {
        let (no, _) = self.leading(segment)?;
        let member = self.member_mut(no).expect("it leads");
        if !member.members.voters().any(|voter| voter == to) || !member.members.has_content(to) {
            return Err(OrderError::Invalid("leadership can be given to a voter of the group alone that has the volume's content"));
        }
        if self.feeds(no, to) {
            return Err(OrderError::Invalid("that member is being rebuilt; wait until it is whole"));
        }
        let member = self.member_mut(no).expect("it leads");
        if to != member.me {
            member.group_mut().expect("it leads").transfer(to);
            self.touch(no);
        }
        Ok(())
    }

    /// This member's drive is too slow to lead: the one that has most of the log is asked to, unless it is not whole.
    pub(crate) fn step_aside(&mut self, no: ReplicaNo, fx: &mut Effects) {
        let Some(segment) = self.map.get(no).map(|replica| replica.shape.segment) else { return };
        let Some(member) = self.member(no) else { return };
        let mut others = member.group().map(crate::replica::Group::matched).unwrap_or_default();
        others.retain(|(other, _)| *other != member.me);
        others.sort_by_key(|(_, matched)| std::cmp::Reverse(*matched));
        for (to, _) in others {
            if self.begin_transfer(segment, to).is_ok() {
                self.counters.stepped_aside += 1;
                let to = self.member(no).and_then(|member| member.node_of(to)).expect("a voter is a member");
                fx.list.push(Effect::Notice(Notice::SteppingAside { replica: no, to }));
                return;
            }
        }
    }

    /// Proposes a change of members; answered when it is applied, or refused at once.
    pub(crate) fn begin_change(&mut self, id: OrderId, segment: SegmentId, members: &Members) -> Option<Result<(), OrderError>> {
        let (no, term) = match self.leading(segment) {
            Ok(leading) => leading,
            Err(error) => return Some(Err(error)),
        };
        let member = self.member_mut(no).expect("it leads");
        if member.members == *members {
            return Some(Ok(()));
        }
        if member.change.is_some() {
            return Some(Err(OrderError::Invalid(text_of(ProposeError::ChangePending))));
        }
        let proposed = member.group_mut().expect("it leads").change(term, members);
        if let Ok(index) = proposed {
            member.change = Some((id, index));
        }
        self.touch(no);
        match proposed {
            Ok(_) => None,
            Err(ProposeError::NotLeader | ProposeError::SteppingAside | ProposeError::Stopped) => {
                Some(Err(OrderError::NotLeader(self.leader_of(no))))
            }
            Err(error) => Some(Err(OrderError::Invalid(text_of(error)))),
        }
    }

    pub(crate) fn change_applied(&mut self, no: ReplicaNo, index: Index, fx: &mut Effects) {
        let Some(member) = self.member_mut(no) else { return };
        if let Some((id, _)) = member.change.take_if(|(_, at)| *at <= index) {
            fx.list.push(Effect::OrderDone { id, result: Ok(()) });
        }
    }

    /// Whether something on its way covers a block of a member's, on the leading side.
    pub(crate) fn proposals_overlap(&self, no: ReplicaNo, first: u64, end: u64) -> bool {
        let proposals = self.member(no).into_iter().flat_map(|member| &member.proposals).flat_map(|proposal| &proposal.ops);
        self.host.grouped.iter().chain(proposals).any(|op| op.overlaps(no, first, end))
    }

    /// Whether an entry that is not applied writes a block of a member's.
    pub(crate) fn log_touches(&self, no: ReplicaNo, first: u64, end: u64) -> bool {
        let Some(replica) = self.map.get(no) else { return false };
        let Some(member) = replica.member.as_deref() else { return false };
        let behind = (replica.applied.0 - member.start.0.min(replica.applied.0)) as usize;
        let writes = |op: &penstock_wire::batch::Op| match op {
            penstock_wire::batch::Op::Write { block, crcs } => *block < end && first < block + crcs.len() as u64,
            _ => false,
        };
        member.log.iter().skip(behind).any(|logged| logged.entry.ops().unwrap_or_default().iter().any(writes))
    }
}

/// As an order's answer says it.
fn text_of(error: ProposeError) -> &'static str {
    match error {
        ProposeError::ChangePending => "a change of members is under way; wait for it",
        ProposeError::NotOneStep => {
            "a change must add a learner or log-only member under the next number, promote a learner to voter, or remove one member"
        }
        ProposeError::TransferFirst => "the leader cannot remove itself: transfer first",
        ProposeError::Invalid => "this membership cannot be one",
        ProposeError::NotLeader | ProposeError::SteppingAside | ProposeError::Stopped => "this member does not lead",
    }
}

/// Checksum of each block of a write.
fn checksums<M: Memory>(op: &Proposed, source: Source, mem: &M) -> Vec<u32> {
    (0..op.blocks as u32)
        .map(|i| match source {
            Source::Host { offset } => mem.host_crc(op.io.expect("a host payload has its command"), offset + i * BLOCK as u32),
            Source::Buf { buf } => penstock_wire::crc32c(&mem.bytes(buf)[i as usize * BLOCK..][..BLOCK]),
        })
        .collect()
}

fn entry(term: Term, index: Index, bytes: Vec<u8>) -> Entry {
    let payload_blocks = penstock_wire::batch::payload_blocks_of(&bytes);
    Entry { term, index, kind: EntryKind::Ops, bytes, payload_blocks }
}
