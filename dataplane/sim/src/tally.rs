//! What a run did: faults that hit, by class, checks that were made, and the hash of everything that happened.
//!
//! A fault class that counts zero over many seeds is a fault that is not injected, and a check that counts zero is none.
//! Not here: judgement.

use std::collections::BTreeMap;

use crate::rng::mix;

/// Counts by name. Names are the rows of the summary.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Tally {
    pub faults: BTreeMap<&'static str, u64>,
    pub checks: BTreeMap<&'static str, u64>,
    pub work: BTreeMap<&'static str, u64>,
}

impl Tally {
    pub fn fault(&mut self, name: &'static str) {
        *self.faults.entry(name).or_default() += 1;
    }

    pub fn faults(&mut self, name: &'static str, n: u64) {
        if n > 0 {
            *self.faults.entry(name).or_default() += n;
        }
    }

    pub fn check(&mut self, name: &'static str) {
        *self.checks.entry(name).or_default() += 1;
    }

    pub fn checks(&mut self, name: &'static str, n: u64) {
        if n > 0 {
            *self.checks.entry(name).or_default() += n;
        }
    }

    pub fn did(&mut self, name: &'static str, n: u64) {
        if n > 0 {
            *self.work.entry(name).or_default() += n;
        }
    }

    pub fn add(&mut self, other: &Tally) {
        for (mine, theirs) in [(&mut self.faults, &other.faults), (&mut self.checks, &other.checks), (&mut self.work, &other.work)] {
            for (name, n) in theirs {
                *mine.entry(name).or_default() += n;
            }
        }
    }
}

/// Hash of the run so far: two runs of a seed must agree in it, event by event.
#[derive(Debug)]
pub struct Trace {
    hash: u64,
    events: u64,
    print: bool,
}

impl Trace {
    pub fn new(print: bool) -> Self {
        Trace { hash: 0x51_7c_c1_b7, events: 0, print }
    }

    /// Something happened at `now` (virtual microseconds). `words` go into the hash, `text` to the eye.
    pub fn note(&mut self, now: u64, words: &[u64], text: impl FnOnce() -> String) {
        self.events += 1;
        self.hash = mix(self.hash ^ now);
        for w in words {
            self.hash = mix(self.hash.rotate_left(23) ^ w);
        }
        if self.print {
            println!("{:>8} {:>12} {:016x} {}", self.events, now, self.hash, text());
        }
    }

    pub fn hash(&self) -> u64 {
        self.hash
    }

    pub fn events(&self) -> u64 {
        self.events
    }
}
