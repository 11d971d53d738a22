//! Whether a leader's own drive is what everyone waits for (gray failure): hosts are answered when an entry is committed *and* persisted here, so
//! one that the others have long had is late by this member's drive alone.
//!
//! One entry is watched at a time. By how long its own copy came after the others' adds up over entries in a row; an entry for which it did not
//! come much later halves the sum. So hiccups fade, and what is slow all the time, or stands still, comes to the limit in little more time than
//! the limit itself. A follower is never worse: who is chosen has shown that it is faster. Not here: who that is (the store knows who is whole),
//! and slow links, which delay the others' word by as much.

use crate::port::Millis;

/// Later than the others by less says nothing: time comes in milliseconds.
const LATE_MS_MIN: u64 = 3;
/// Later than the others by so many times what they took.
const LATE_TIMES_MIN: u64 = 4;
/// Handing over again within this time doubles the limit, to so many times at most, so that two slow drives do not play with leadership.
const SOON_MS: u64 = 60_000;
const TIMES_MAX: u64 = 32;

#[derive(Debug)]
struct Watched {
    index: u64,
    proposed: Millis,
    /// When a quorum of the others had it.
    committed: Option<Millis>,
}

impl Watched {
    /// By how much this member's drive is later than the others, if that is much.
    fn late(&self, now: Millis) -> Option<u64> {
        let committed = self.committed?;
        let (late, others) = (now.0 - committed.0, committed.0 - self.proposed.0);
        Some(late).filter(|late| *late >= LATE_MS_MIN && *late >= LATE_TIMES_MIN * others)
    }
}

#[derive(Debug, Default)]
pub(super) struct Pace {
    term: u64,
    watched: Option<Watched>,
    behind_ms: u64,
    /// When this member gave leadership up last, and what the limit is multiplied by since.
    gave_up: Option<Millis>,
    times: u64,
}

/// What a leader knows of its log.
#[derive(Clone, Copy, Debug)]
pub(super) struct Log {
    pub term: u64,
    pub last: u64,
    pub committed: u64,
    pub persisted: u64,
}

impl Pace {
    /// Looks at the log of a leader; whether leadership is better given up. Said once, and again only after as much more has added up.
    pub fn look(&mut self, now: Millis, log: Log, limit_ms: u64) -> bool {
        if log.term != self.term {
            (self.term, self.watched, self.behind_ms) = (log.term, None, 0);
        }
        if let Some(watched) = &mut self.watched {
            if watched.committed.is_none() && log.committed >= watched.index {
                watched.committed = Some(now);
            }
            if log.persisted >= watched.index {
                match watched.late(now) {
                    Some(late) => self.behind_ms += late,
                    None => self.behind_ms /= 2,
                }
                self.watched = None;
            }
        }
        if self.watched.is_none() && log.last > log.committed.max(log.persisted) {
            self.watched = Some(Watched { index: log.last, proposed: now, committed: None });
        }
        let waits = self.watched.as_ref().and_then(|watched| watched.late(now)).unwrap_or(0);
        let soon = self.gave_up.is_some_and(|at| now.0 < at.0 + SOON_MS);
        let times = if soon { self.times } else { 1 };
        if self.behind_ms + waits < limit_ms * times {
            return false;
        }
        self.times = (times * 2).min(TIMES_MAX);
        (self.gave_up, self.watched, self.behind_ms) = (Some(now), None, 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: u64 = 1000;

    /// Writes one after another, each so many ms late at others and here; at which of them leadership is given up.
    fn given_up(pace: &mut Pace, term: u64, began: u64, entries: impl IntoIterator<Item = (u64, u64)>) -> Vec<u64> {
        let (mut now, mut said) = (began, Vec::new());
        let mut log = Log { term, last: 0, committed: 0, persisted: 0 };
        for (index, (others, own)) in (1..).zip(entries) {
            log.last = index;
            for ms in 0..=others.max(own) {
                (log.committed, log.persisted) = (index - u64::from(ms < others), index - u64::from(ms < own));
                if ms == 0 {
                    // It is proposed before anybody can have it.
                    (log.committed, log.persisted) = (index - 1, index - 1);
                }
                if pace.look(Millis(now + ms), log, LIMIT) {
                    said.push(now + ms - began);
                }
            }
            now += others.max(own) + 1;
        }
        said
    }

    fn first(entries: impl IntoIterator<Item = (u64, u64)>) -> Option<u64> {
        given_up(&mut Pace::default(), 1, 5000, entries).first().copied()
    }

    #[test]
    fn drive_is_slow_table() {
        let alternating =
            |slow: (u64, u64), well: (u64, u64), every: usize| (0..3000).map(move |i| if i % every == 0 { well } else { slow });
        for (name, time, entries) in [
            ("a drive that is well", None, vec![(1, 1); 5000]),
            ("others that are slower", None, vec![(50, 1); 500]),
            ("slow, as the others are", None, vec![(50, 50); 500]),
            ("somewhat slower than slow others", None, vec![(20, 60); 500]),
            ("nobody else has it: nothing is gained", None, vec![(400, 400); 50]),
            ("one long hiccup below the limit", None, vec![(1, 900)]),
            ("hiccups", None, alternating((1, 30), (1, 1), 5).collect()),
            ("hundreds of times slower", Some(1010..1300), vec![(0, 10); 500]),
            ("ten times slower yet", Some(1000..1200), vec![(1, 100); 50]),
            ("standing still", Some(1000..1010), vec![(2, 100_000)]),
            ("mostly slow, at times well", Some(1000..1600), alternating((1, 200), (1, 1), 10).collect()),
        ] {
            let found = first(entries);
            match time {
                None => assert_eq!(found, None, "{name}"),
                Some(time) => assert!(found.is_some_and(|at| time.contains(&at)), "{name}: {found:?}, not within {time:?}"),
            }
        }
    }

    #[test]
    fn leadership_that_comes_back_soon_is_given_up_later_each_time_and_after_a_while_as_at_first() {
        let mut pace = Pace::default();
        let said = given_up(&mut pace, 1, 0, std::iter::repeat_n((0, 50), 2200));
        // 51 ms of time have 50 of lateness.
        let between: Vec<_> = [0].iter().chain(&said).zip(&said).map(|(before, at)| (at - before) / 1020).collect();
        assert_eq!(between, [1, 2, 4, 8, 16, 32, 32]);
        let later = said.last().unwrap() + SOON_MS;
        assert_eq!(given_up(&mut pace, 2, later, std::iter::repeat_n((0, 50), 25))[0] / 1000, 1);
    }

    #[test]
    fn new_term_begins_with_nothing() {
        let mut pace = Pace::default();
        assert_eq!(given_up(&mut pace, 1, 0, vec![(0, 300); 3]), []);
        assert_eq!(given_up(&mut pace, 2, 1000, vec![(0, 300); 3]), []);
        assert_ne!(given_up(&mut pace, 2, 2000, vec![(0, 300)]), []);
    }
}
