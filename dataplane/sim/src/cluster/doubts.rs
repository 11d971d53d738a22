//! A member starts: what its recovery could not judge it asks the others, who answer it, before its group is built.

use super::Bug;
use super::judge::Verdict;
use super::node::{SEGMENT, Stage};
use super::world::{Event, TICK, World, index_of};
use penstock_engine::replica::resolve::{self, Answer};
use penstock_engine::replica::{Ballot, Part};
use penstock_wire::peer::{Body, EntriesAnswer, EntriesAsk, EntryState, MemberNo, PROTOCOL};
use penstock_wire::{Index, Term};

impl World {
    pub(super) fn start(&mut self, node: usize) -> Verdict {
        if !matches!(self.nodes[node].stage, Stage::Down) {
            return Ok(());
        }
        let (timing, canary) = (self.plan.timing, self.canary());
        let built = self.nodes[node].start(timing, canary, self.bug == Some(Bug::UnknownIsAbsent))?;
        let life = self.nodes[node].life;
        self.trace.note(self.now, &[5, node as u64, u64::from(built)], || format!("{node} starts, built: {built}"));
        self.tally.did("starts", 1);
        let first = self.rng.within(1, TICK);
        self.after(first, Event::Tick { node, life });
        if built {
            self.built(node)?;
        } else {
            self.tally.fault("record that recovery cannot judge (1, 5)");
            self.after(1, Event::Ask { node, life });
        }
        Ok(())
    }

    fn built(&mut self, node: usize) -> Verdict {
        let it = &self.nodes[node];
        it.group().map_or(Ok(()), |group| self.judge.built(it.no, group, &mut self.tally))
    }

    pub(super) fn ask(&mut self, node: usize, life: u64) -> Verdict {
        let it = &self.nodes[node];
        let Stage::Resolving(resolving) = &it.stage else { return Ok(()) };
        if it.life != life {
            return Ok(());
        }
        let first = resolving.unknown.first;
        let others: Vec<_> = it.members.list.iter().map(|member| member.no).filter(|no| *no != it.no).collect();
        let from = it.no;
        for to in others {
            let ask = EntriesAsk { id: life, segment: SEGMENT, from, to, first, last: Index(first.0 + 1023) };
            self.transmit(node, index_of(to), Body::EntriesAsk(ask).encode(PROTOCOL, 1));
        }
        self.after(100, Event::Ask { node, life });
        Ok(())
    }

    pub(super) fn answer(&mut self, node: usize, ask: &EntriesAsk) -> Verdict {
        let it = &self.nodes[node];
        let (term, leads, entries) = match &it.stage {
            Stage::Down => return Ok(()),
            Stage::Up(group) => {
                let Some(view) = group.view() else { return Ok(()) };
                let entries = group.entries(ask.first, 1024).into_iter().map(EntryState::Whole).collect();
                // Its ballot may be on the way to the drive: what counts as a fence is what is persisted. A leader's is.
                (view.term, view.part == Part::Leader, entries)
            }
            Stage::Resolving(resolving) => {
                let own = resolving.recovered.entries.iter().filter(|entry| entry.index >= ask.first).cloned();
                let mut entries: Vec<_> = own.map(EntryState::Whole).collect();
                entries.push(EntryState::Unknown);
                (resolving.recovered.ballot.term, false, entries)
            }
        };
        let answer = EntriesAnswer {
            id: ask.id,
            segment: SEGMENT,
            from: it.no,
            to: ask.from,
            term: Term(term.0.max(1)),
            leads,
            more: false,
            first: ask.first,
            entries,
        };
        self.transmit(node, index_of(ask.from), Body::EntriesAnswer(answer).encode(PROTOCOL, 1));
        Ok(())
    }

    pub(super) fn answered(&mut self, node: usize, answer: EntriesAnswer) -> Verdict {
        let (timing, canary) = (self.plan.timing, self.canary());
        let it = &mut self.nodes[node];
        let life = it.life;
        let members = it.members.clone();
        let Stage::Resolving(resolving) = &mut it.stage else { return Ok(()) };
        if answer.id != life {
            return Ok(());
        }
        let votes = members.get(answer.from).is_some_and(|member| member.role.votes());
        let entries =
            answer.entries.iter().map_while(|state| if let EntryState::Whole(entry) = state { Some(entry.clone()) } else { None });
        resolving.answers.insert(answer.from, (Answer::of(&answer, votes), entries.collect()));
        let answers: Vec<_> = resolving.answers.values().map(|(answer, _)| answer.clone()).collect();
        let voters = members.voters().count();
        let verdict = resolve::judge(&resolving.unknown, voters - 1, voters / 2 + 1, &answers);
        let mut recovered = resolving.recovered.clone();
        if verdict != resolve::Verdict::Wait {
            it.disk.drop_bad();
        }
        match verdict {
            resolve::Verdict::Wait => return Ok(()),
            resolve::Verdict::Drop => self.tally.did("doubts dropped", 1),
            resolve::Verdict::Copy { from, count } => {
                self.tally.did("doubts copied", 1);
                let copies = &resolving.answers[&from].1[..count];
                recovered.entries.retain(|entry| entry.index < resolving.unknown.first);
                recovered.entries.extend_from_slice(copies);
                // A later leader's entries may be among them: the log never has a later term than the ballot.
                let term = copies.last().map_or(Term(0), |entry| entry.term);
                if term > recovered.ballot.term {
                    recovered.ballot = Ballot { term, vote: MemberNo(0) };
                    it.disk.adopt_ballot(recovered.ballot);
                }
                it.disk.adopt(copies);
            }
        }
        self.trace.note(self.now, &[6, node as u64], || format!("{node} resolved: {verdict:?}"));
        self.nodes[node].open(recovered, timing, canary)?;
        self.built(node)
    }
}
