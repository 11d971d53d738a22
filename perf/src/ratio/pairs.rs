//! The measuring itself: two arms in turns A B B A, void pairs thrown out and counted, the rest made into an interval.
//!
//! Deliberately not here: what an arm is made of, and which limit it must keep.

use std::io;

use serde::Serialize;

use crate::cpu::{CpuSnapshot, Foreign};
use crate::handicap::HandicapKind;
use crate::stats::{Interval, Side, interval, order_of_pair};

/// Why an arm has no figure.
#[derive(Debug, thiserror::Error)]
pub enum ArmError {
    #[error("{arm}: {what}")]
    Failed { arm: String, what: String },
    #[error("CPU accounting cannot be read: {0}")]
    Cpu(#[from] io::Error),
}

/// One turn of an arm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Turn {
    /// What the ratio is made of, in the benchmark's unit.
    pub value: f64,
    pub operations: u64,
    /// Why this turn must not count, beside foreign CPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub void: Option<&'static str>,
}

/// One side of a comparison: some processes that can be made to run, measured, and made to rest.
pub trait Arm {
    /// For people.
    fn name(&self) -> String;
    /// Its processes; all others are foreign while it runs.
    fn pids(&self) -> Vec<u32>;
    /// Lets its processes run.
    fn wake(&mut self) -> Result<(), ArmError> {
        Ok(())
    }
    /// Takes its processes off the CPU, where the other arm's turn would feel them.
    fn rest(&mut self) -> Result<(), ArmError> {
        Ok(())
    }
    /// One turn, with extra work per operation where asked for.
    fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError>;
}

/// How much is measured.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Pairs that must be left.
    pub pairs: usize,
    /// Pairs that are run at most; what is discarded is not made up for without end.
    pub pairs_max: usize,
    /// Extra work in our arm.
    pub handicap: HandicapKind,
    pub seed: u64,
    /// Share of the machine that others may use in a turn that counts.
    pub foreign_max: f64,
}

/// A pair as it went.
#[derive(Debug, Clone, Serialize)]
pub struct Pair {
    pub ours: Turn,
    pub peer: Turn,
    pub ratio: f64,
    pub foreign: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discarded: Option<String>,
}

/// All pairs of one comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Paired {
    /// `None` when too few pairs were left.
    pub interval: Option<Interval>,
    pub discarded: usize,
    pub pairs: Vec<Pair>,
}

impl Paired {
    fn of_kept(&self, of: impl Fn(&Pair) -> f64) -> f64 {
        let values: Vec<f64> = self.pairs.iter().filter(|pair| pair.discarded.is_none()).map(of).collect();
        crate::stats::median(&values).unwrap_or(f64::NAN)
    }

    /// Median value of our arm, over pairs that count.
    pub fn ours(&self) -> f64 {
        self.of_kept(|pair| pair.ours.value)
    }

    /// Median value of the peer, over pairs that count.
    pub fn peer(&self) -> f64 {
        self.of_kept(|pair| pair.peer.value)
    }
}

fn one_turn(arm: &mut dyn Arm, handicap: HandicapKind) -> Result<(Turn, Foreign), ArmError> {
    arm.wake()?;
    let mut own = arm.pids();
    own.push(std::process::id());
    let before = CpuSnapshot::take()?;
    let turn = arm.turn(handicap);
    let after = CpuSnapshot::take()?;
    arm.rest()?;
    Ok((turn?, before.foreign_until(&after, &own)))
}

fn verdict(turns: [(&Turn, &Foreign); 2], foreign_max: f64) -> Option<String> {
    turns.into_iter().find_map(|(turn, foreign)| {
        if let Some(reason) = turn.void {
            return Some(reason.to_owned());
        }
        foreign
            .is_above(foreign_max)
            .then(|| format!("foreign CPU {:.1} %, stolen {:.1} %", foreign.share * 100.0, foreign.stolen_share * 100.0))
    })
}

/// Runs pairs until enough are left or the plan's limit is reached; each is shown as it comes.
pub fn measure(ours: &mut dyn Arm, peer: &mut dyn Arm, plan: &Plan, shown: &mut dyn FnMut(&Pair)) -> Result<Paired, ArmError> {
    let mut pairs: Vec<Pair> = Vec::new();
    let mut kept = 0;
    while kept < plan.pairs && pairs.len() < plan.pairs_max {
        let mut of_ours = None;
        let mut of_peer = None;
        for side in order_of_pair(pairs.len()) {
            match side {
                Side::Ours => of_ours = Some(one_turn(ours, plan.handicap)?),
                Side::Peer => of_peer = Some(one_turn(peer, HandicapKind::None)?),
            }
        }
        let (Some(of_ours), Some(of_peer)) = (of_ours, of_peer) else { unreachable!("both sides have a turn in each pair") };
        let discarded = verdict([(&of_ours.0, &of_ours.1), (&of_peer.0, &of_peer.1)], plan.foreign_max);
        kept += usize::from(discarded.is_none());
        let pair = Pair {
            ratio: of_ours.0.value / of_peer.0.value,
            ours: of_ours.0,
            peer: of_peer.0,
            foreign: of_ours.1.share.max(of_peer.1.share),
            discarded,
        };
        shown(&pair);
        pairs.push(pair);
    }
    let ratios: Vec<f64> = pairs.iter().filter(|pair| pair.discarded.is_none()).map(|pair| pair.ratio).collect();
    let interval = if ratios.len() < plan.pairs { None } else { interval(&ratios, plan.seed) };
    Ok(Paired { interval, discarded: pairs.len() - kept, pairs })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives its values in turn; a handicap costs it a tenth per nanosecond of spin.
    struct Scripted {
        values: Vec<f64>,
        turns: usize,
        void_turn: Option<usize>,
        is_awake: bool,
    }

    fn scripted(values: &[f64]) -> Scripted {
        Scripted { values: values.to_vec(), turns: 0, void_turn: None, is_awake: false }
    }

    impl Arm for Scripted {
        fn name(&self) -> String {
            "scripted".to_owned()
        }
        fn pids(&self) -> Vec<u32> {
            Vec::new()
        }
        fn wake(&mut self) -> Result<(), ArmError> {
            assert!(!self.is_awake);
            self.is_awake = true;
            Ok(())
        }
        fn rest(&mut self) -> Result<(), ArmError> {
            self.is_awake = false;
            Ok(())
        }
        fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError> {
            assert!(self.is_awake);
            let value = self.values[self.turns % self.values.len()];
            let void = (self.void_turn == Some(self.turns)).then_some("undrained grew");
            self.turns += 1;
            let cost = if let HandicapKind::Spin(nanos) = handicap { 1.0 - nanos as f64 / 10.0 } else { 1.0 };
            Ok(Turn { value: value * cost, operations: 1, void })
        }
    }

    const PLAN: Plan = Plan { pairs: 5, pairs_max: 40, handicap: HandicapKind::None, seed: 1, foreign_max: 100.0 };

    #[test]
    fn machine_that_changes_speed_between_pairs_leaves_the_ratio_alone() {
        let mut ours = scripted(&[90.0, 45.0]);
        let mut peer = scripted(&[100.0, 50.0]);
        let paired = measure(&mut ours, &mut peer, &PLAN, &mut |_| ()).unwrap();
        let found = paired.interval.unwrap();
        assert!((found.median - 0.9).abs() < 1e-9 && (found.high - found.low).abs() < 1e-9, "{found:?}");
    }

    #[test]
    fn void_turn_discards_its_pair_and_another_is_run() {
        let mut ours = scripted(&[1.0]);
        ours.void_turn = Some(1);
        let mut seen = 0;
        let paired = measure(&mut ours, &mut scripted(&[1.0]), &PLAN, &mut |_| seen += 1).unwrap();
        assert!(paired.discarded >= 1);
        assert_eq!(paired.pairs[1].discarded.as_deref(), Some("undrained grew"));
        assert_eq!(seen, paired.pairs.len());
        assert_eq!(paired.interval.unwrap().pairs, 5);
    }

    #[test]
    fn pair_with_others_on_the_cpu_is_discarded() {
        // Nothing is own here, so this very process is foreign.
        let plan = Plan { foreign_max: -1.0, pairs_max: 4, ..PLAN };
        let paired = measure(&mut scripted(&[1.0]), &mut scripted(&[1.0]), &plan, &mut |_| ()).unwrap();
        assert!(paired.pairs.iter().all(|pair| pair.discarded.as_ref().is_some_and(|why| why.contains("foreign CPU"))));
        assert_eq!(paired.interval, None);
    }

    #[test]
    fn too_few_pairs_left_give_no_figure() {
        let plan = Plan { pairs: 5, pairs_max: 4, ..PLAN };
        let paired = measure(&mut scripted(&[1.0]), &mut scripted(&[1.0]), &plan, &mut |_| ()).unwrap();
        assert_eq!((paired.interval, paired.pairs.len()), (None, 4));
    }

    #[test]
    fn handicap_reaches_our_arm_alone() {
        let plan = Plan { handicap: HandicapKind::Spin(5), ..PLAN };
        let paired = measure(&mut scripted(&[10.0]), &mut scripted(&[10.0]), &plan, &mut |_| ()).unwrap();
        assert_eq!((paired.ours(), paired.peer()), (5.0, 10.0));
    }
}
