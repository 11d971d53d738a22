//! When an operation starts.
//!
//! Closed loop: as soon as a place in the queue is free. Open loop: at times fixed beforehand, whatever the device
//! does; an operation that finds the queue full waits, and its latency still counts from the time it was meant to
//! start. That is what keeps a stalled device from hiding its stall (coordinated omission).

use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Exp1};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};

use crate::units::Nanos;

/// How starts are spaced.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pace {
    Closed,
    /// Equal gaps at this many operations a second.
    Fixed(f64),
    /// Exponential gaps (independent arrivals) at this many operations a second on average.
    Poisson(f64),
}

/// Gives the intended start of each operation.
pub struct Pacer {
    pace: Pace,
    start: Nanos,
    started: u64,
    next: Nanos,
    rng: Xoshiro256PlusPlus,
}

impl Pacer {
    pub fn new(pace: Pace, seed: u64, start: Nanos) -> Self {
        // A stream of its own, so that the pace does not change which operations are drawn.
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
        rng.jump();
        Self { pace, start, started: 0, next: start, rng }
    }

    /// The intended start of the next operation if it is due at `now`, else `None`.
    /// Each `Some` counts as taken.
    pub fn take_due(&mut self, now: Nanos) -> Option<Nanos> {
        if self.pace == Pace::Closed {
            return Some(now);
        }
        if self.next > now {
            return None;
        }
        let intended = self.next;
        self.started += 1;
        self.next = match self.pace {
            Pace::Closed => unreachable!("handled above"),
            // From the start each time: adding rounded gaps would drift from the rate asked for.
            Pace::Fixed(rate) => self.start.plus(Nanos::from_secs_f64(self.started as f64 / rate)),
            Pace::Poisson(rate) => {
                let gap: f64 = Exp1.sample(&mut self.rng);
                self.next.plus(Nanos::from_secs_f64(gap / rate))
            }
        };
        Some(intended)
    }

    /// True when latencies count from a schedule.
    pub fn is_open(&self) -> bool {
        self.pace != Pace::Closed
    }

    /// Operations that were due by `now` and have not started: the backlog of an overloaded open loop.
    pub fn overdue(&self, now: Nanos) -> u64 {
        match self.pace {
            Pace::Closed => 0,
            Pace::Fixed(rate) | Pace::Poisson(rate) => {
                if self.next > now {
                    0
                } else {
                    1 + (now.since(self.next).as_secs_f64() * rate) as u64
                }
            }
        }
    }
}

/// Picks a seed when the user gave none; printed with every report so that a run can be repeated.
pub fn fresh_seed() -> u64 {
    rand::rng().random()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn starts(pace: Pace, until: Nanos) -> Vec<Nanos> {
        let mut pacer = Pacer::new(pace, 3, Nanos(0));
        std::iter::from_fn(|| pacer.take_due(until)).collect()
    }

    #[test]
    fn fixed_pace_intends_equal_gaps_without_drift() {
        let starts = starts(Pace::Fixed(3.0), Nanos(1_000_000_000));
        assert_eq!(starts, [Nanos(0), Nanos(333_333_333), Nanos(666_666_666), Nanos(1_000_000_000)]);
    }

    #[test]
    fn open_pace_after_a_stall_gives_the_missed_starts_with_their_old_times() {
        let mut pacer = Pacer::new(Pace::Fixed(1000.0), 3, Nanos(0));
        assert_eq!(pacer.take_due(Nanos(0)), Some(Nanos(0)));
        assert_eq!(pacer.take_due(Nanos(500_000)), None);
        // The device stalls for 10 ms.
        assert_eq!(pacer.overdue(Nanos(10_000_000)), 10);
        let late: Vec<_> = std::iter::from_fn(|| pacer.take_due(Nanos(10_000_000))).collect();
        assert_eq!(late.len(), 10);
        assert_eq!(late[0], Nanos(1_000_000));
    }

    #[test]
    fn poisson_pace_keeps_its_mean_rate_and_varies_its_gaps() {
        let starts = starts(Pace::Poisson(10_000.0), Nanos(1_000_000_000));
        assert!((9_600..10_400).contains(&starts.len()), "{}", starts.len());
        let gaps: Vec<u64> = starts.windows(2).map(|pair| pair[1].0 - pair[0].0).collect();
        assert!(gaps.iter().max() > gaps.iter().min().map(|min| min + 400_000).as_ref());
    }

    #[test]
    fn closed_pace_is_always_due_now() {
        let mut pacer = Pacer::new(Pace::Closed, 3, Nanos(0));
        assert_eq!(pacer.take_due(Nanos(77)), Some(Nanos(77)));
        assert!(!pacer.is_open());
        assert_eq!(pacer.overdue(Nanos(1 << 40)), 0);
    }
}
