//! What a leader knows of the commands that one node sends it for one volume: each takes effect once, however often it comes.
//!
//! One that is being carried out is not begun again, and what came of one that changed something is kept until its node has it. Another life of
//! that node is not served before all of the last one's is over: its hosts may have asked for the same again. Pure. Not here: where commands and
//! answers go ([`super::forward`]).

use std::collections::{BTreeMap, BTreeSet};

use penstock_wire::Incarnation;
use penstock_wire::peer::Outcome;

/// Commands of one node to one volume that are under way or kept.
const COMMANDS_MAX: usize = 4096;

/// What to do with a command that came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    Run,
    /// It is under way, or answered for good.
    Ignore,
    Say(Outcome, u32),
}

#[derive(Default, Debug)]
pub struct Visitor {
    session: Incarnation,
    running: BTreeSet<u64>,
    finished: BTreeMap<u64, (Outcome, u32)>,
    /// All before this one have their answer.
    done: u64,
}

impl Visitor {
    pub fn ask(&mut self, session: Incarnation, id: u64, done: u64) -> Verdict {
        if session != self.session {
            if !self.running.is_empty() {
                return Verdict::Say(Outcome::NotReady, 0);
            }
            *self = Self { session, ..Self::default() };
        }
        self.done = self.done.max(done);
        self.finished = self.finished.split_off(&self.done);
        if id < self.done || self.running.contains(&id) {
            return Verdict::Ignore;
        }
        if let Some((outcome, at)) = self.finished.get(&id) {
            return Verdict::Say(*outcome, *at);
        }
        if self.running.len() + self.finished.len() >= COMMANDS_MAX {
            return Verdict::Say(Outcome::NotReady, 0);
        }
        self.running.insert(id);
        Verdict::Run
    }

    /// `changes`: it must not be done again.
    pub fn end(&mut self, id: u64, outcome: Outcome, at: u32, changes: bool) {
        self.running.remove(&id);
        if changes && outcome != Outcome::NotReady && id >= self.done {
            self.finished.insert(id, (outcome, at));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIFE: Incarnation = Incarnation([1; 16]);

    #[test]
    fn change_that_comes_twice_is_carried_out_once() {
        let mut visitor = Visitor::default();
        assert_eq!(visitor.ask(LIFE, 1, 1), Verdict::Run);
        assert_eq!(visitor.ask(LIFE, 1, 1), Verdict::Ignore, "it is under way");
        visitor.end(1, Outcome::Ok, 0, true);
        assert_eq!(visitor.ask(LIFE, 1, 1), Verdict::Say(Outcome::Ok, 0), "its answer was lost");
        assert_eq!(visitor.ask(LIFE, 2, 2), Verdict::Run);
        assert_eq!(visitor.ask(LIFE, 1, 1), Verdict::Ignore, "it had its answer: this one was on its way for long");
    }

    #[test]
    fn what_was_not_done_and_what_changes_nothing_is_carried_out_again() {
        let mut visitor = Visitor::default();
        for (outcome, changes) in [(Outcome::NotReady, true), (Outcome::Ok, false)] {
            assert_eq!(visitor.ask(LIFE, 7, 7), Verdict::Run);
            visitor.end(7, outcome, 0, changes);
        }
        assert_eq!(visitor.ask(LIFE, 7, 7), Verdict::Run);
    }

    #[test]
    fn another_life_is_served_when_all_of_the_last_one_is_over() {
        let mut visitor = Visitor::default();
        let next = Incarnation([2; 16]);
        assert_eq!(visitor.ask(LIFE, 5, 5), Verdict::Run);
        assert_eq!(visitor.ask(next, 1, 1), Verdict::Say(Outcome::NotReady, 0));
        visitor.end(5, Outcome::Ok, 0, true);
        assert_eq!(visitor.ask(next, 1, 1), Verdict::Run);
        visitor.end(1, Outcome::Ok, 0, true);
        assert_eq!(visitor.ask(next, 5, 1), Verdict::Run, "numbers begin anew");
    }

    #[test]
    fn commands_that_are_kept_are_bounded() {
        let mut visitor = Visitor::default();
        for id in 1..=COMMANDS_MAX as u64 {
            assert_eq!(visitor.ask(LIFE, id, 1), Verdict::Run);
            visitor.end(id, Outcome::Ok, 0, true);
        }
        let next = COMMANDS_MAX as u64 + 1;
        assert_eq!(visitor.ask(LIFE, next, 1), Verdict::Say(Outcome::NotReady, 0));
        assert_eq!(visitor.ask(LIFE, next, 2), Verdict::Run);
    }
}
