//! Remembers what a node refused and when to ask again: soon at first, then less and less often. Time is a number
//! that the caller brings. Lost in a crash, which just means asking again.

use std::collections::BTreeMap;

use penstock_api::rpc::RpcError;

use crate::reconcile::Subject;

/// Milliseconds of some steady clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Millis(pub u64);

pub const FIRST_MS: u64 = 200;
pub const LAST_MS: u64 = 30_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub error: RpcError,
    /// The step's word, for people.
    pub step: &'static str,
    pub attempts: u32,
    pub not_before: Millis,
}

#[derive(Clone, Debug, Default)]
pub struct Refusals(BTreeMap<Subject, Refusal>);

impl Refusals {
    pub fn get(&self, subject: &Subject) -> Option<&Refusal> {
        self.0.get(subject)
    }

    pub fn may_try(&self, subject: &Subject, now: Millis) -> bool {
        self.0.get(subject).is_none_or(|refusal| refusal.not_before <= now)
    }

    pub fn on_refused(&mut self, subject: Subject, step: &'static str, error: RpcError, now: Millis) {
        let attempts = self.0.get(&subject).filter(|before| before.step == step).map_or(1, |before| before.attempts.saturating_add(1));
        let wait = (FIRST_MS << (attempts - 1).min(16)).min(LAST_MS);
        self.0.insert(subject, Refusal { error, step, attempts, not_before: Millis(now.0.saturating_add(wait)) });
    }

    pub fn on_done(&mut self, subject: &Subject) {
        self.0.remove(subject);
    }

    /// Something changed about it: what was refused before may be taken now.
    pub fn forget(&mut self, subject: &Subject) {
        self.0.remove(subject);
    }

    /// The node restarted, or a person asked to try again.
    pub fn forget_all(&mut self) {
        self.0.clear();
    }

    /// Keeps only refusals whose subjects `wanted` still has a step for.
    pub fn retain(&mut self, wanted: impl Fn(&Subject) -> bool) {
        self.0.retain(|subject, _| wanted(subject));
    }

    /// When the next refused step is due, of those that may be tried then.
    pub fn next_due(&self, may: impl Fn(&Subject) -> bool) -> Option<Millis> {
        self.0.iter().filter(|(subject, _)| may(subject)).map(|(_, refusal)| refusal.not_before).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::rpc::ErrorCode;

    #[test]
    fn refusal_waits_longer_each_time_up_to_a_bound() {
        let mut refusals = Refusals::default();
        let mut now = Millis(0);
        let mut waits = Vec::new();
        for _ in 0..12 {
            refusals.on_refused(Subject::Node, "claim node", RpcError::new(ErrorCode::Busy, "no"), now);
            let due = refusals.next_due(|_| true).unwrap();
            assert!(!refusals.may_try(&Subject::Node, now));
            assert!(refusals.may_try(&Subject::Node, due));
            waits.push(due.0 - now.0);
            now = due;
        }
        assert_eq!(waits[..4], [200, 400, 800, 1600]);
        assert_eq!(*waits.last().unwrap(), LAST_MS);
        assert_eq!(refusals.next_due(|subject| *subject != Subject::Node), None);
        refusals.on_done(&Subject::Node);
        assert!(refusals.may_try(&Subject::Node, Millis(0)));
    }
}
