//! A member starts. In doubt of what it found, it asks the others how their logs end.

use super::judge::Verdict;
use super::node::{SEGMENT, Stage};
use super::world::{Event, TICK, World, index_of};
use crate::canaries::Bug;
use penstock_engine::replica::Group;
use penstock_engine::replica::resolve::{self, Answer};
use penstock_wire::Index;
use penstock_wire::peer::{Body, EntriesAnswer, EntriesAsk, PROTOCOL};

impl World {
    pub(super) fn start(&mut self, node: usize) -> Verdict {
        if !matches!(self.nodes[node].stage, Stage::Down) {
            return Ok(());
        }
        let (timing, canary) = (self.plan.timing, self.canary());
        let sure = self.nodes[node].start(timing, canary, self.bug == Some(Bug::UnknownIsAbsent))?;
        let life = self.nodes[node].life;
        self.trace.note(self.now, &[5, node as u64, u64::from(sure)], || format!("{node} starts, sure of its log: {sure}"));
        self.tally.did("starts", 1);
        let first = self.rng.within(1, TICK);
        self.after(first, Event::Tick { node, life });
        if !sure {
            self.tally.fault("record that recovery cannot judge (1, 5)");
            self.after(1, Event::Ask { node, life });
        }
        let it = &self.nodes[node];
        it.group().map_or(Ok(()), |group| self.judge.built(it.no, group, &mut self.tally))
    }

    pub(super) fn ask(&mut self, node: usize, life: u64) -> Verdict {
        let it = &self.nodes[node];
        if it.life != life || it.doubts.is_none() {
            return Ok(());
        }
        let others: Vec<_> = it.members.list.iter().map(|member| member.no).filter(|no| *no != it.no).collect();
        let from = it.no;
        for to in others {
            let ask = EntriesAsk { id: life, segment: SEGMENT, from, to, first: Index(1), last: Index(1) };
            self.transmit(node, index_of(to), Body::EntriesAsk(ask).encode(PROTOCOL, 1));
        }
        self.after(100, Event::Ask { node, life });
        Ok(())
    }

    pub(super) fn answer(&mut self, node: usize, ask: &EntriesAsk) -> Verdict {
        if let Some(standing) = self.nodes[node].group().and_then(Group::standing) {
            self.transmit(node, index_of(ask.from), Body::EntriesAnswer(standing.answer(ask)).encode(PROTOCOL, 1));
        }
        Ok(())
    }

    pub(super) fn answered(&mut self, node: usize, answer: &EntriesAnswer) -> Verdict {
        let it = &mut self.nodes[node];
        let (life, members) = (it.life, it.members.clone());
        let Some(doubts) = it.doubts.as_mut().filter(|_| answer.id == life) else { return Ok(()) };
        let votes = members.get(answer.from).is_some_and(|member| member.role.votes());
        let Some(answer) = Answer::of(answer, votes) else { return Err(format!("an answer that says nothing: {answer:?}")) };
        doubts.answers.insert(answer.from, answer);
        let answers: Vec<_> = doubts.answers.values().copied().collect();
        let voters = members.voters().count();
        let others = members.voters().filter(|no| *no != it.no).count();
        if let resolve::Verdict::Floor(end) = resolve::judge(doubts.term, others, voters / 2 + 1, &answers) {
            self.tally.did("floors lowered", 1);
            self.trace.note(self.now, &[6, node as u64, end.term.0, end.index.0], || format!("{node} is told of its log: {end:?}"));
            if let Some(group) = self.nodes[node].group_mut() {
                group.lower_floor(end);
            }
            return self.settle(node);
        }
        Ok(())
    }

    /// The log is as far again as it may have been.
    pub(super) fn resolved(&mut self, node: usize) {
        self.tally.did("doubts resolved", 1);
        self.trace.note(self.now, &[7, node as u64], || format!("{node} is in doubt no more"));
        let it = &mut self.nodes[node];
        it.doubts = None;
        it.disk.floor = None;
        it.rotten = false;
    }
}
