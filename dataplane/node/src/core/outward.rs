//! The order in which a volume's commands go to whoever leads it, where their doors have no other path.
//!
//! Numbered as they come. One that overlaps another that came before it, where either changes something, waits until that is answered: a command whose
//! term is lost is sent again, and may have taken effect and be done once more, and nobody who has its answer, or that of one behind it, may see
//! it happen. Pure. Not here: where commands and answers go ([`super::forward`]).

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use penstock_engine::Millis;
use penstock_wire::{NodeId, Term};

/// What is not answered for this long is said again.
const AGAIN_MS: u64 = 1000;

/// Who carries out a volume's commands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// This node's store.
    Here(Term),
    There {
        node: NodeId,
        term: Term,
    },
}

#[derive(Debug)]
struct Out {
    target: Target,
    sent: Millis,
}

/// One that is not answered.
#[derive(Debug)]
struct Command {
    bytes: Range<u64>,
    changes: bool,
    /// Commands before it that it has to wait for.
    behind: u32,
    out: Option<Out>,
    /// It was out before, and nobody knows what came of that.
    again: bool,
}

impl Command {
    fn meets(&self, bytes: &Range<u64>, changes: bool) -> bool {
        (self.changes || changes) && self.bytes.start < bytes.end && bytes.start < self.bytes.end
    }
}

#[derive(Default, Debug)]
pub struct Outward {
    last: u64,
    target: Option<Target>,
    commands: BTreeMap<u64, Command>,
    /// Those that are not out and wait for no other.
    ready: BTreeSet<u64>,
}

impl Outward {
    /// A new command, which waits.
    pub fn take(&mut self, bytes: Range<u64>, changes: bool) -> u64 {
        self.last += 1;
        let behind = self.commands.values().filter(|one| one.meets(&bytes, changes)).count() as u32;
        if behind == 0 {
            self.ready.insert(self.last);
        }
        self.commands.insert(self.last, Command { bytes, changes, behind, out: None, again: false });
        self.last
    }

    /// Who leads, as far as is known.
    pub fn aim(&mut self, target: Option<Target>) {
        if target.is_none() || target == self.target {
            // Nobody new: what is out may still be answered.
            return;
        }
        self.target = target;
        // What the store here has it gives back by itself.
        for (id, command) in &mut self.commands {
            if command.out.take_if(|out| matches!(out.target, Target::There { .. })).is_some() {
                command.again = true;
                self.ready.insert(*id);
            }
        }
    }

    /// The next that may go now, and where to.
    pub fn next(&self) -> Option<(u64, Target)> {
        Some((*self.ready.first()?, self.target?))
    }

    /// It is on its way to the present target.
    pub fn went(&mut self, id: u64, now: Millis) {
        let target = self.target.expect("it went somewhere");
        if let Some(command) = self.commands.get_mut(&id) {
            self.ready.remove(&id);
            command.out = Some(Out { target, sent: now });
        }
    }

    /// It was not done, as far as is known, and waits again.
    pub fn back(&mut self, id: u64) {
        if let Some(command) = self.commands.get_mut(&id).filter(|command| command.out.is_some()) {
            (command.out, command.again) = (None, true);
            self.ready.insert(id);
        }
    }

    pub fn done(&mut self, id: u64) {
        self.ready.remove(&id);
        let Some(done) = self.commands.remove(&id) else { return };
        for (id, one) in self.commands.range_mut(id..).filter(|(_, one)| one.meets(&done.bytes, done.changes)) {
            one.behind -= 1;
            if one.behind == 0 {
                self.ready.insert(*id);
            }
        }
    }

    /// Whether an answer of `target` to a command counts: one that was sent elsewhere since is not answered by what was before.
    pub fn is_out(&self, id: u64, target: Target) -> bool {
        let out = self.commands.get(&id).and_then(|command| command.out.as_ref());
        out.is_some_and(|out| out.target == target)
    }

    /// It may have taken effect before it was sent as it is now.
    pub fn is_again(&self, id: u64) -> bool {
        self.commands.get(&id).is_some_and(|command| command.again)
    }

    /// Commands that another node has not answered for long: they, or their answers, may be lost.
    pub fn late(&mut self, now: Millis) -> Vec<u64> {
        let out = self.commands.iter_mut().filter_map(|(id, command)| Some((*id, command.out.as_mut()?)));
        let late = out.filter(|(_, out)| matches!(out.target, Target::There { .. }) && now.0 >= out.sent.0 + AGAIN_MS);
        late.map(|(id, out)| (id, out.sent = now).0).collect()
    }

    pub fn target(&self) -> Option<Target> {
        self.target
    }

    /// Some may go.
    pub fn wants(&self) -> bool {
        !self.ready.is_empty()
    }

    /// All before this one are answered.
    pub fn oldest(&self) -> u64 {
        self.commands.first_key_value().map_or(self.last + 1, |(id, _)| *id)
    }

    /// Those that the store here does not have.
    pub fn elsewhere(&self) -> Vec<u64> {
        self.commands.iter().filter(|(_, command)| !command.is_here()).map(|(id, _)| *id).collect()
    }

    pub fn is_idle(&self) -> bool {
        self.commands.values().all(Command::is_here)
    }
}

impl Command {
    fn is_here(&self) -> bool {
        self.out.as_ref().is_some_and(|out| matches!(out.target, Target::Here(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there(node: u8, term: u64) -> Target {
        Target::There { node: NodeId([node; 16]), term: Term(term) }
    }

    /// A write of one block.
    fn write(outward: &mut Outward, block: u64) -> u64 {
        outward.take(block..block + 1, true)
    }

    fn send(outward: &mut Outward) -> Vec<u64> {
        let mut sent = Vec::new();
        while let Some((id, _)) = outward.next() {
            outward.went(id, Millis(0));
            sent.push(id);
        }
        sent
    }

    #[test]
    fn commands_wait_for_a_leader_and_go_in_their_order() {
        let mut outward = Outward::default();
        assert_eq!([write(&mut outward, 1), write(&mut outward, 0)], [1, 2]);
        assert_eq!((send(&mut outward), outward.oldest(), outward.is_idle()), (vec![], 1, false));
        outward.aim(Some(there(2, 5)));
        assert_eq!(send(&mut outward), [1, 2]);
        outward.done(1);
        assert_eq!((outward.oldest(), outward.is_idle()), (2, false));
        outward.done(2);
        assert_eq!((outward.oldest(), outward.is_idle()), (3, true));
    }

    #[test]
    fn command_that_overlaps_one_before_it_waits_for_its_answer_where_either_changes_something() {
        let mut outward = Outward::default();
        outward.aim(Some(there(2, 5)));
        let first = outward.take(0..8, true);
        let (read, beside) = (outward.take(7..9, false), outward.take(8..9, false));
        let last = outward.take(8..10, true);
        assert_eq!(send(&mut outward), [first, beside], "two reads of a block wait for nothing of each other");
        outward.done(first);
        assert_eq!(send(&mut outward), [read]);
        outward.done(beside);
        assert!(send(&mut outward).is_empty(), "it is behind both reads");
        outward.done(read);
        assert_eq!(send(&mut outward), [last]);
    }

    #[test]
    fn what_is_out_when_another_comes_to_lead_goes_again_in_its_order() {
        let mut outward = Outward::default();
        outward.aim(Some(there(2, 5)));
        let (one, two) = (write(&mut outward, 1), write(&mut outward, 2));
        send(&mut outward);
        outward.aim(None);
        assert!(outward.is_out(one, there(2, 5)) && !outward.is_again(one), "nobody else is known to lead");
        let (three, behind) = (write(&mut outward, 3), write(&mut outward, 1));
        outward.aim(Some(there(3, 6)));
        assert!(!outward.is_out(one, there(2, 5)), "what the old one says of it counts no more");
        assert_eq!(send(&mut outward), [one, two, three]);
        assert_eq!([one, two, three].map(|id| outward.is_again(id)), [true, true, false]);
        outward.done(one);
        assert_eq!(send(&mut outward), [behind]);
    }

    #[test]
    fn what_the_store_here_has_comes_back_by_itself() {
        let mut outward = Outward::default();
        outward.aim(Some(Target::Here(Term(5))));
        let one = write(&mut outward, 1);
        send(&mut outward);
        assert!(outward.is_idle(), "the store's own clock runs for it");
        outward.aim(Some(there(3, 6)));
        let behind = write(&mut outward, 1);
        assert_eq!((send(&mut outward), outward.elsewhere()), (vec![], vec![behind]));
        outward.back(one);
        assert!(outward.is_again(one));
        assert_eq!(send(&mut outward), [one]);
        outward.done(one);
        assert_eq!(send(&mut outward), [behind]);
    }

    #[test]
    fn same_leader_in_another_term_is_another() {
        let mut outward = Outward::default();
        outward.aim(Some(there(2, 5)));
        let one = write(&mut outward, 1);
        send(&mut outward);
        outward.aim(Some(there(2, 7)));
        assert!(!outward.is_out(one, there(2, 5)));
        assert_eq!(send(&mut outward), [one]);
        assert!(outward.is_out(one, there(2, 7)));
    }

    #[test]
    fn what_is_not_answered_for_long_is_said_again_once_a_second() {
        let mut outward = Outward::default();
        outward.aim(Some(there(2, 5)));
        let one = write(&mut outward, 1);
        send(&mut outward);
        assert!(outward.late(Millis(999)).is_empty());
        assert_eq!(outward.late(Millis(1000)), [one]);
        assert!(outward.late(Millis(1500)).is_empty());
    }
}
