//! One 4 KiB block of a volume as a linearizable register: the search for an order that explains what hosts saw.
//!
//! Commands on a block are kept from the moment that any of them is open until none is; then every order that respects
//! real time is tried (with memory of what was tried) and all values that the block may hold at the end are kept. A write
//! that a crash left unanswered may have happened before the crash or never; what later reads see narrows that down for
//! good. Sub-block commands touch some sectors. Not here: which commands exist (`oracle`), and drives.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use crate::stamp::{Image, SECTORS, ZEROS};

/// A count of the oracle's own; orders invocations and responses.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Clock(pub u64);

pub const NEVER: Clock = Clock(u64::MAX);

/// Some sectors of a block: `mask` has a bit for each that counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Patch {
    pub mask: u8,
    pub image: Image,
}

impl Patch {
    pub fn over(&self, old: &Image) -> Image {
        let mut new = *old;
        for (s, sector) in new.iter_mut().enumerate() {
            if self.mask & 1 << s != 0 {
                *sector = self.image[s];
            }
        }
        new
    }

    pub fn matches(&self, image: &Image) -> bool {
        self.over(image) == *image
    }
}

/// What a command does to the block, or saw of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Act {
    /// A read that has not been answered.
    Look,
    /// One of these takes effect: more than one where the guest changed its payload meanwhile.
    Put(Vec<Patch>),
    /// A read saw this.
    See(Patch),
    /// The block could not be given: only where its value was destroyed by an injected fault.
    SeeLost,
    /// Compare-and-write: takes effect where the block matches.
    Swap { expect: Box<Patch>, put: Box<Patch> },
    /// Compare-and-write found sector `first` to be the first of `expect` that differs.
    Differ { expect: Box<Patch>, first: usize },
}

#[derive(Clone, Debug)]
struct Entry {
    serial: u64,
    from: Clock,
    to: Clock,
    act: Act,
    /// It was answered well, so it happened; otherwise it may have.
    must: bool,
}

/// The block's history since it was last at rest.
#[derive(Clone, Debug)]
pub struct Register {
    /// What it may have held then; never empty.
    states: Vec<Image>,
    entries: Vec<Entry>,
    open: u32,
    /// Writes refused because the drive was fenced: may still be found by the next recovery.
    ghosts: Vec<Act>,
    /// Values that an injected fault destroyed.
    destroyed: Vec<Image>,
}

/// No order explains what was seen.
#[derive(Debug)]
pub struct Contradiction(pub String);

/// Most commands in one history. The search's mask would hold 64; its time would not.
pub const ENTRIES_MAX: usize = 32;

impl Default for Register {
    fn default() -> Self {
        Register { states: vec![ZEROS], entries: Vec::new(), open: 0, ghosts: Vec::new(), destroyed: Vec::new() }
    }
}

impl Register {
    pub fn open_commands(&self) -> u32 {
        self.open
    }

    /// Whether another command may join the history.
    pub fn has_room(&self) -> bool {
        self.entries.len() + self.ghosts.len() + 4 < ENTRIES_MAX && self.open < 6 && self.ghosts.len() < 6
    }

    pub fn begin(&mut self, serial: u64, now: Clock, act: Act) {
        self.open += 1;
        self.entries.push(Entry { serial, from: now, to: NEVER, act, must: false });
    }

    /// The command was answered and this is what it did or saw; nothing if it did what it began as.
    pub fn answered(&mut self, serial: u64, now: Clock, act: Option<Act>) -> Result<(), Contradiction> {
        let entry = self.entries.iter_mut().find(|e| e.serial == serial).expect("answered, so begun");
        entry.to = now;
        entry.must = true;
        if let Some(act) = act {
            entry.act = act;
        }
        self.open -= 1;
        self.rest_if_idle()
    }

    /// The command was refused, or is a read that told nothing: it had no effect.
    pub fn withdrawn(&mut self, serial: u64) -> Result<(), Contradiction> {
        self.entries.retain(|e| e.serial != serial);
        self.open -= 1;
        self.rest_if_idle()
    }

    /// The command failed half way: it may have taken effect by now, and will not later.
    pub fn uncertain(&mut self, serial: u64, now: Clock) -> Result<(), Contradiction> {
        self.entries.iter_mut().find(|e| e.serial == serial).expect("answered, so begun").to = now;
        self.open -= 1;
        self.rest_if_idle()
    }

    /// The command was refused by a fence: it may take effect as late as at the next recovery.
    pub fn haunting(&mut self, serial: u64) -> Result<(), Contradiction> {
        let i = self.entries.iter().position(|e| e.serial == serial).expect("answered, so begun");
        let entry = self.entries.remove(i);
        self.ghosts.push(entry.act);
        self.open -= 1;
        self.rest_if_idle()
    }

    /// Every open command is cut off by a crash.
    pub fn crashed(&mut self, now: Clock) -> Result<(), Contradiction> {
        self.cut_off(now)?;
        self.ghosts.clear();
        Ok(())
    }

    /// What is open may have taken effect by now, and nothing will later.
    pub fn cut_off(&mut self, now: Clock) -> Result<(), Contradiction> {
        self.entries.retain(|e| e.must || e.to != NEVER || !matches!(e.act, Act::Look));
        for entry in &mut self.entries {
            entry.to = entry.to.min(now);
        }
        self.open = 0;
        self.rest()
    }

    /// Everything that the block may hold if the node died at this moment.
    pub fn possible(&self) -> Result<Cow<'_, [Image]>, Contradiction> {
        let live: Vec<Entry> = self.entries.iter().filter(|e| e.act != Act::Look).cloned().collect();
        if live.is_empty() && self.ghosts.is_empty() {
            return Ok(Cow::Borrowed(&self.states));
        }
        self.search(live).map(Cow::Owned)
    }

    pub fn destroy(&mut self, image: Image) {
        if !self.destroyed.contains(&image) {
            self.destroyed.push(image);
        }
    }

    pub fn has_destroyed(&self) -> bool {
        !self.destroyed.is_empty()
    }

    /// Whether the block may hold, now or within the open history, a value that was destroyed.
    pub fn may_be_lost(&self) -> bool {
        self.possible().is_ok_and(|all| all.iter().chain(&self.states).any(|s| self.destroyed.contains(s)))
            || self.open > 0 && self.has_destroyed()
    }

    /// The block was seen to hold `image` by a look that excludes every other command.
    pub fn settled(&mut self, image: Image) {
        assert!(self.entries.is_empty());
        self.states = vec![image];
    }

    fn rest_if_idle(&mut self) -> Result<(), Contradiction> {
        if self.open == 0 { self.rest() } else { Ok(()) }
    }

    fn rest(&mut self) -> Result<(), Contradiction> {
        match (self.entries.as_slice(), self.ghosts.is_empty()) {
            ([], true) => return Ok(()),
            // Most blocks rest after one command.
            ([Entry { must: true, act: Act::Put(puts), .. }], true) if puts.len() == 1 => {
                for s in &mut self.states {
                    *s = puts[0].over(s);
                }
                self.states.sort_unstable();
                self.states.dedup();
            }
            ([Entry { must: true, act: Act::See(seen), .. }], true) if self.states.iter().any(|s| seen.matches(s)) => {
                self.states.retain(|s| seen.matches(s));
            }
            _ => {
                let entries = std::mem::take(&mut self.entries);
                self.states = self.search(entries)?;
            }
        }
        self.entries.clear();
        Ok(())
    }

    fn search(&self, mut entries: Vec<Entry>) -> Result<Vec<Image>, Contradiction> {
        entries.extend(self.ghosts.iter().map(|act| Entry { serial: 0, from: Clock(0), to: NEVER, act: act.clone(), must: false }));
        assert!(entries.len() <= 64, "a history of {} commands", entries.len());
        let all_musts = entries.iter().enumerate().filter(|(_, e)| e.must).fold(0u64, |m, (i, _)| m | 1 << i);
        let mut ends = BTreeSet::new();
        // Commands that may have happened are taken in as late as can be: by what has happened and the state, with each set of them that was tried. One
        // that has not happened yet still may, and forbids nothing, so whatever follows from a set follows from any part of it.
        let mut tried: BTreeMap<(u64, Image), Vec<u64>> = BTreeMap::new();
        let mut count = 0;
        // By how many of them were taken in, so that a set comes after its parts.
        let mut ahead = vec![self.states.iter().map(|s| (0, *s)).collect::<Vec<(u64, Image)>>()];
        while let Some((mut done, state)) = pop_fewest(&mut ahead) {
            // What can be seen now costs nothing to see now, unless a command that may have happened must come before.
            loop {
                let bound = bound(&entries, done).min(last_call(&entries, done));
                let sight =
                    (0..entries.len()).find(|i| done & 1 << i == 0 && entries[*i].from <= bound && self.sees(&entries[*i].act, &state));
                match sight {
                    Some(i) => done |= 1 << i,
                    None => break,
                }
            }
            let sets = tried.entry((done & all_musts, state)).or_default();
            if sets.iter().any(|set| set & done == *set) {
                continue;
            }
            sets.push(done & !all_musts);
            count += 1;
            assert!(count < 2_000_000, "the search for an order does not end: {entries:?}");
            if done & all_musts == all_musts {
                ends.insert(state);
            }
            let bound = bound(&entries, done);
            let begun = entries.iter().enumerate().filter(|(i, _)| done & 1 << i != 0).map(|(_, e)| e.from).max().unwrap_or(Clock(0));
            let mut go_on = |done: u64, state| {
                let taken = (done & !all_musts).count_ones() as usize;
                ahead.resize_with(ahead.len().max(taken + 1), Vec::new);
                ahead[taken].push((done, state));
            };
            for (i, e) in entries.iter().enumerate().filter(|(i, e)| done & 1 << i == 0 && e.from <= bound && begun <= e.to) {
                match &e.act {
                    act if self.sees(act, &state) => go_on(done | 1 << i, state),
                    Act::Put(puts) => puts.iter().for_each(|p| go_on(done | 1 << i, p.over(&state))),
                    Act::Swap { expect, put } if expect.matches(&state) => go_on(done | 1 << i, put.over(&state)),
                    _ => {}
                }
            }
        }
        if ends.is_empty() {
            return Err(Contradiction(self.explain(&entries)));
        }
        Ok(ends.into_iter().collect())
    }

    fn sees(&self, act: &Act, state: &Image) -> bool {
        match act {
            Act::See(patch) => patch.matches(state),
            Act::SeeLost => self.destroyed.contains(state),
            Act::Differ { expect, first } => {
                let differs = |s: usize| expect.mask & 1 << s != 0 && expect.image[s] != state[s];
                (0..SECTORS).find(|s| differs(*s)) == Some(*first)
            }
            Act::Look | Act::Put(_) | Act::Swap { .. } => false,
        }
    }

    fn explain(&self, entries: &[Entry]) -> String {
        use std::fmt::Write;
        let mut text = String::from("no order explains this history of a block\n");
        for s in &self.states {
            let _ = writeln!(text, "  may have held {s:?}");
        }
        for d in &self.destroyed {
            let _ = writeln!(text, "  destroyed by a fault: {d:?}");
        }
        for e in entries {
            let to = if e.to == NEVER { "open".into() } else { e.to.0.to_string() };
            let _ = writeln!(text, "  [{:>6} .. {:>6}] {} {:?}", e.from.0, to, if e.must { "did" } else { "may" }, e.act);
        }
        text
    }
}

/// One of those of which the fewest commands that may have happened did.
fn pop_fewest(ahead: &mut [Vec<(u64, Image)>]) -> Option<(u64, Image)> {
    ahead.iter_mut().find_map(Vec::pop)
}

/// A command may be next if no other that must happen ended before it began.
fn bound(entries: &[Entry], done: u64) -> Clock {
    entries.iter().enumerate().filter(|(i, e)| done & 1 << i == 0 && e.must).map(|(_, e)| e.to).min().unwrap_or(NEVER)
}

/// The earliest end of a command that may have happened and has not been taken in yet.
fn last_call(entries: &[Entry], done: u64) -> Clock {
    entries.iter().enumerate().filter(|(i, e)| done & 1 << i == 0 && !e.must).map(|(_, e)| e.to).min().unwrap_or(NEVER)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(id: u64) -> Patch {
        Patch { mask: 0xff, image: [id; SECTORS] }
    }
    fn put(id: u64) -> Act {
        Act::Put(vec![whole(id)])
    }
    fn see(id: u64) -> Act {
        Act::See(whole(id))
    }
    fn swap(expect: u64, put: u64) -> Act {
        Act::Swap { expect: Box::new(whole(expect)), put: Box::new(whole(put)) }
    }

    type Row = (u64, u64, u64, Act);

    /// Rows of `(serial, from, to, act)`; `to` 0 is never answered, then the node crashes at 100.
    fn run(rows: &[Row]) -> Result<Register, Contradiction> {
        let mut r = Register::default();
        let mut moments: Vec<(u64, bool, usize)> = Vec::new();
        for (i, (_, from, to, _)) in rows.iter().enumerate() {
            moments.push((*from, false, i));
            if *to > 0 {
                moments.push((*to, true, i));
            }
        }
        moments.sort_unstable();
        for (t, ends, i) in moments {
            let (serial, _, _, act) = &rows[i];
            match (ends, act) {
                (false, Act::Put(_) | Act::Swap { .. }) => r.begin(*serial, Clock(t), act.clone()),
                (false, _) => r.begin(*serial, Clock(t), Act::Look),
                (true, _) => r.answered(*serial, Clock(t), Some(act.clone()))?,
            }
        }
        if rows.iter().any(|row| row.2 == 0) {
            r.crashed(Clock(100))?;
        }
        Ok(r)
    }

    #[test]
    fn table_of_histories() {
        let cases: &[(&str, bool, Vec<Row>)] = &[
            ("read after write sees it", true, vec![(1, 1, 2, put(1)), (2, 3, 4, see(1))]),
            ("read after write sees zeros", false, vec![(1, 1, 2, put(1)), (2, 3, 4, see(0))]),
            ("read beside write sees either", true, vec![(1, 1, 9, put(1)), (2, 2, 3, see(0)), (3, 4, 5, see(1))]),
            ("reads beside a write go back", false, vec![(1, 1, 9, put(1)), (2, 2, 3, see(1)), (3, 4, 5, see(0))]),
            (
                "two writes, reads agree on an order",
                true,
                vec![(1, 1, 9, put(1)), (2, 2, 8, put(2)), (3, 10, 11, see(1)), (4, 12, 13, see(1))],
            ),
            ("two writes, reads do not agree", false, vec![(1, 1, 9, put(1)), (2, 2, 8, put(2)), (3, 10, 11, see(1)), (4, 12, 13, see(2))]),
            (
                "a mix of two writes",
                false,
                vec![(1, 1, 9, put(1)), (2, 2, 8, put(2)), (3, 10, 11, Act::See(Patch { mask: 0xff, image: [1, 1, 1, 1, 2, 2, 2, 2] }))],
            ),
            (
                "two half writes both stay",
                true,
                vec![
                    (1, 1, 9, Act::Put(vec![Patch { mask: 0x0f, image: [1; SECTORS] }])),
                    (2, 2, 8, Act::Put(vec![Patch { mask: 0xf0, image: [2; SECTORS] }])),
                    (3, 10, 11, Act::See(Patch { mask: 0xff, image: [1, 1, 1, 1, 2, 2, 2, 2] })),
                ],
            ),
            (
                "one half write lost to the other",
                false,
                vec![
                    (1, 1, 9, Act::Put(vec![Patch { mask: 0x0f, image: [1; SECTORS] }])),
                    (2, 2, 8, Act::Put(vec![Patch { mask: 0xf0, image: [2; SECTORS] }])),
                    (3, 10, 11, Act::See(Patch { mask: 0xff, image: [0, 0, 0, 0, 2, 2, 2, 2] })),
                ],
            ),
            ("swap that matched", true, vec![(1, 1, 2, put(1)), (2, 3, 4, swap(1, 2)), (3, 5, 6, see(2))]),
            ("two swaps from one value", false, vec![(1, 1, 2, put(1)), (2, 3, 9, swap(1, 2)), (3, 4, 8, swap(1, 3))]),
            (
                "miscompare where it matched",
                false,
                vec![(1, 1, 2, put(1)), (2, 3, 4, Act::Differ { expect: Box::new(whole(1)), first: 0 })],
            ),
            ("lost without a fault", false, vec![(1, 1, 2, put(1)), (2, 3, 4, Act::SeeLost)]),
        ];
        for (name, fine, rows) in cases {
            assert_eq!(run(rows).is_ok(), *fine, "{name}");
        }
    }

    /// All orders, tried one after the other.
    fn every_order(r: &Register, entries: &[Entry], done: u64, begun: Clock, state: Image, ends: &mut BTreeSet<Image>) {
        if entries.iter().enumerate().all(|(i, e)| !e.must || done & 1 << i != 0) {
            ends.insert(state);
        }
        for (i, e) in entries.iter().enumerate().filter(|(i, e)| done & 1 << i == 0 && e.from <= bound(entries, done) && begun <= e.to) {
            let next: Vec<Image> = match &e.act {
                Act::Put(puts) => puts.iter().map(|p| p.over(&state)).collect(),
                Act::Swap { expect, put } => expect.matches(&state).then(|| put.over(&state)).into_iter().collect(),
                act => r.sees(act, &state).then_some(state).into_iter().collect(),
            };
            next.into_iter().for_each(|next| every_order(r, entries, done | 1 << i, begun.max(e.from), next, ends));
        }
    }

    #[test]
    fn search_finds_what_trying_every_order_finds() {
        let rng = &mut crate::rng::Rng::new(7);
        let (mut explained, mut not) = (0, 0);
        for round in 0..20_000 {
            let some = |rng: &mut crate::rng::Rng| {
                let mask = rng.pick(&[0xff, 0xff, 0x0f, 0xf0]);
                let id = rng.below(5);
                Patch { mask, image: std::array::from_fn(|s| if mask & 1 << s != 0 { id } else { 0 }) }
            };
            let entries: Vec<Entry> = (0..rng.within(1, 6))
                .map(|serial| {
                    let (from, act) = (rng.below(12), rng.below(5));
                    let act = match act {
                        0 | 1 => Act::Put((0..rng.within(1, 2)).map(|_| some(rng)).collect()),
                        2 => Act::Swap { expect: Box::new(some(rng)), put: Box::new(some(rng)) },
                        3 => Act::Differ { expect: Box::new(some(rng)), first: rng.pick(&[0, 4]) },
                        _ => Act::See(some(rng)),
                    };
                    let sees = matches!(act, Act::See(_) | Act::Differ { .. });
                    let to = if sees || rng.one_in(2) { Clock(from + 1 + rng.below(8)) } else { NEVER };
                    Entry { serial, from: Clock(from), to, act, must: sees || to != NEVER && rng.one_in(2) }
                })
                .collect();
            let r = Register::default();
            let mut ends = BTreeSet::new();
            every_order(&r, &entries, 0, Clock(0), ZEROS, &mut ends);
            let found = r.search(entries.clone()).unwrap_or_default();
            assert_eq!(found, ends.iter().copied().collect::<Vec<_>>(), "round {round}: {entries:?}");
            (explained, not) = if ends.is_empty() { (explained, not + 1) } else { (explained + 1, not) };
        }
        assert!(explained > 5_000 && not > 2_000, "{explained} {not}");
    }

    #[test]
    fn search_among_many_commands_that_may_have_happened_ends() {
        let mut r = Register::default();
        for serial in 1..=26 {
            r.begin(serial, Clock(serial), Act::Put(vec![whole(2 * serial), whole(2 * serial + 1)]));
        }
        r.begin(99, Clock(50), Act::Look);
        r.answered(99, Clock(60), Some(see(9))).expect("one of them");
        r.cut_off(Clock(70)).expect("fine");
        assert_eq!(r.possible().expect("fine").len(), 51, "the one that was seen, or any other after it");
    }

    #[test]
    fn unanswered_write_happened_or_not_until_a_read_tells() {
        let mut r = run(&[(1, 1, 2, put(1)), (2, 3, 0, put(2))]).expect("fine");
        assert_eq!(r.possible().expect("fine").len(), 2);
        r.begin(3, Clock(101), Act::Look);
        r.answered(3, Clock(102), Some(see(1))).expect("either is fine");
        r.begin(4, Clock(103), Act::Look);
        let late = r.answered(4, Clock(104), Some(see(2)));
        assert!(late.is_err(), "once seen not to have happened, it never does");
    }

    #[test]
    fn destroyed_value_may_be_lost_until_overwritten() {
        let mut r = run(&[(1, 1, 2, put(1))]).expect("fine");
        r.destroy([1; SECTORS]);
        r.begin(2, Clock(3), Act::Look);
        r.answered(2, Clock(4), Some(Act::SeeLost)).expect("destroyed");
        r.begin(3, Clock(5), put(2));
        r.answered(3, Clock(6), Some(put(2))).expect("fine");
        r.begin(4, Clock(7), Act::Look);
        assert!(r.answered(4, Clock(8), Some(Act::SeeLost)).is_err(), "the new value was not destroyed");
    }

    #[test]
    fn meddling_guest_gets_one_of_its_two_payloads_for_good() {
        let both = Act::Put(vec![whole(1), whole(2)]);
        let mut r = run(&[(1, 1, 2, both)]).expect("fine");
        assert_eq!(r.possible().expect("fine").len(), 2);
        r.begin(2, Clock(3), Act::Look);
        r.answered(2, Clock(4), Some(see(2))).expect("one of them");
        assert_eq!(*r.possible().expect("fine"), [[2; SECTORS]]);
    }

    #[test]
    fn command_that_failed_half_way_does_not_happen_later() {
        let mut r = Register::default();
        r.begin(1, Clock(1), put(1));
        r.begin(2, Clock(2), put(2));
        r.uncertain(2, Clock(3)).expect("fine");
        r.begin(3, Clock(4), Act::Look);
        r.answered(3, Clock(5), Some(see(0))).expect("nothing happened yet");
        r.begin(4, Clock(6), Act::Look);
        r.answered(4, Clock(7), Some(see(2))).expect("judged when the block rests");
        assert!(r.answered(1, Clock(8), Some(put(1))).is_err());
    }

    #[test]
    fn fenced_write_may_appear_at_the_next_recovery_and_not_after() {
        let mut r = run(&[(1, 1, 2, put(1))]).expect("fine");
        r.begin(2, Clock(3), put(2));
        r.haunting(2).expect("fine");
        r.begin(3, Clock(5), Act::Look);
        r.answered(3, Clock(6), Some(see(1))).expect("not yet");
        r.crashed(Clock(7)).expect("fine");
        assert_eq!(r.possible().expect("fine").len(), 2);
        r.begin(4, Clock(8), Act::Look);
        r.answered(4, Clock(9), Some(see(1))).expect("it was not found");
        r.begin(5, Clock(10), Act::Look);
        assert!(r.answered(5, Clock(11), Some(see(2))).is_err());
    }
}
