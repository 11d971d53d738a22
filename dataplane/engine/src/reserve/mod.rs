//! Reservations of a volume: who may do what, decided at the leader, carried by the log, the same at every member.
//!
//! ```text
//! a host's command -> pass: nobody ever registered? (one branch) -> may this host? -> on its way (write, read, lead)
//! a reservation's  -> pass: the state that follows, by the rules -> an op of the log -> applied: the state, here and at all members
//! ```
//! While a change is in the log and not applied, the volume's other commands wait behind it: so nothing is ever decided by a state that may
//! yet be lost, and nobody is told of one. What was let in before the change and is not proposed when it is applied is looked at again before
//! it is proposed: so in the log no write of a host stands behind the change that took its right away. Who is refused is told once it is proven
//! that nobody else leads. Not here: the rules themselves ([`rules`]).

pub mod rules;

use crate::host::{JobId, JobStage, Proposed, What};
use crate::port::*;
use crate::store::Store;
use penstock_wire::reservation::Reservations;
use penstock_wire::{BLOCK, Index as RaftIndex};
use rules::{REPORT_MAX, Reserve, permits, report, rule};
use std::collections::VecDeque;

/// Of a volume with which a host ever registered.
#[derive(Debug, Default)]
pub struct Guard {
    /// As of what is applied.
    pub state: Reservations,
    /// Whose change of it is in the log, or on its way there.
    out: Option<JobId>,
    /// Commands that wait until it is applied.
    waiting: VecDeque<JobId>,
}

impl Guard {
    pub fn of(state: Option<Box<Reservations>>) -> Option<Box<Self>> {
        state.map(|state| Box::new(Self { state: *state, ..Self::default() }))
    }
}

impl Store {
    /// A volume's reservations as of what is applied; none where no host ever registered.
    pub fn reservations(&self, no: ReplicaNo) -> Option<Box<Reservations>> {
        let guard = self.map.get(no)?.guard.as_ref()?;
        (guard.state != Reservations::default()).then(|| Box::new(guard.state.clone()))
    }

    /// Whether commands to a volume are looked at here.
    #[inline]
    pub(crate) fn is_guarded(&self, no: ReplicaNo) -> bool {
        self.map.get(no).is_some_and(|replica| replica.guard.is_some())
    }

    fn guard(&mut self, no: ReplicaNo) -> &mut Guard {
        self.map.get_mut(no).expect("a command's volume stands").guard.get_or_insert_default()
    }

    /// Lets a command on, has it wait, or refuses it.
    pub(crate) fn pass_guard<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        if !self.may_go_on(id, mem, fx) {
            return;
        }
        match self.host.job(id).op {
            HostOp::Reserve(what) => self.reserve(id, what, mem, fx),
            _ => self.admit(id, mem, fx),
        }
    }

    /// Whether a command has the right to go on now. Asked when it comes, and again whenever it is about to be proposed.
    pub(crate) fn may_go_on<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) -> bool {
        let job = self.host.job(id);
        let (no, host, op) = (job.replica, job.host, job.op);
        let guard = self.guard(no);
        if guard.out.is_some() {
            guard.waiting.push_back(id);
            self.host.job(id).stage = JobStage::Parked;
            return false;
        }
        let may = matches!(op, HostOp::Reserve(_)) || permits(&guard.state, host, !op.reads());
        if !may {
            self.counters.host_conflicts += 1;
            self.tell(id, Status::Conflict, mem, fx);
        }
        may
    }

    /// Answers with what was found here, once nobody else can have found otherwise.
    pub(crate) fn tell<M: Memory>(&mut self, id: JobId, verdict: Status, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let no = job.replica;
        job.verdict = Some(verdict);
        if self.member(no).is_some() {
            self.prove(id);
        } else {
            self.finish_job(id, verdict, mem, fx);
        }
    }

    fn reserve<M: Memory>(&mut self, id: JobId, what: Reserve, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let (io, no, host) = (job.io, job.replica, job.host);
        let guard = self.guard(no);
        match (rule(&guard.state, host, what), what) {
            (Err(status), _) => self.tell(id, status, mem, fx),
            (Ok(Some(state)), _) => {
                guard.out = Some(id);
                self.host.job(id).stage = JobStage::Proposed;
                let what = What::Reserve(Box::new(state));
                let index = RaftIndex(0);
                self.make_ready(Proposed {
                    job: Some(id),
                    io: Some(io),
                    order: None,
                    replica: no,
                    block: 0,
                    blocks: 0,
                    what,
                    promises: 0,
                    index,
                });
            }
            (Ok(None), Reserve::Report { .. }) if self.member(no).is_none() => self.report_reservations(id, mem, fx),
            (Ok(None), Reserve::Report { .. }) => self.prove(id),
            (Ok(None), _) => self.tell(id, Status::Ok, mem, fx),
        }
    }

    /// Fills the payload of a report. Without memory for it the host is to ask again.
    pub(crate) fn report_reservations<M: Memory>(&mut self, id: JobId, mem: &mut M, fx: &mut Effects) {
        let job = self.host.job(id);
        let (io, no, op) = (job.io, job.replica, job.op);
        let HostOp::Reserve(Reserve::Report { len }) = op else { unreachable!("no report") };
        let bytes = self.map.get(no).and_then(|replica| replica.guard.as_ref()).map_or_else(Vec::new, |guard| report(&guard.state));
        let Some(buf) = mem.alloc(REPORT_BLOCKS) else { return self.finish_job(id, Status::NotReady, mem, fx) };
        let count = bytes.len().min(len as usize);
        mem.bytes_mut(buf)[..count].copy_from_slice(&bytes[..count]);
        mem.host_zero(io, 0, len);
        mem.buf_to_host(buf, 0, io, 0, count as u32);
        mem.free(buf);
        self.finish_job(id, Status::Ok, mem, fx);
    }

    /// A change is applied, here as at every member.
    pub(crate) fn apply_reserve(&mut self, no: ReplicaNo, state: Reservations) {
        if let Some(replica) = self.map.get_mut(no).filter(|replica| !replica.deleting) {
            replica.guard.get_or_insert_default().state = state;
        }
    }

    /// A change that was decided here took effect, or never will: who waited for it goes on.
    pub(crate) fn reserve_done<M: Memory>(&mut self, no: ReplicaNo, of: JobId, mem: &mut M, fx: &mut Effects) {
        let guard = self.map.get_mut(no).and_then(|replica| replica.guard.as_mut());
        let Some(guard) = guard.filter(|guard| guard.out == Some(of)) else { return };
        guard.out = None;
        for id in std::mem::take(&mut guard.waiting) {
            let op = self.host.job(id).op;
            match self.check_host(no, op) {
                Err(status) => self.finish_job(id, status, mem, fx),
                // It has its blocks locked and read, and waited with what it found.
                Ok(()) if self.host.job(id).locked => self.merged(id, mem, fx),
                Ok(()) => self.pass_guard(id, mem, fx),
            }
        }
    }

    /// Those that wait for a change, which is over as far as this member can tell.
    pub(crate) fn take_parked(&mut self, no: ReplicaNo) -> VecDeque<JobId> {
        let Some(guard) = self.map.get_mut(no).and_then(|replica| replica.guard.as_mut()) else { return VecDeque::new() };
        guard.out = None;
        std::mem::take(&mut guard.waiting)
    }
}

/// Blocks of the largest report.
const REPORT_BLOCKS: u32 = REPORT_MAX.div_ceil(BLOCK) as u32;
