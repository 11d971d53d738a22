//! `ratio N`: benchmark N against its SPDK peer, side by side in one run.
//!
//! A shared machine flips between two speeds for seconds at a time, so arms alternate within seconds and the figure is a
//! ratio. Each comparison has a limit that its whole 95 % interval must keep, and a negative control: the same comparison
//! with extra work in our arm, which must miss that limit. Void pairs are shown and counted, and nothing is run again
//! until it passes.
//!
//! To add a benchmark: a module that sets up its arms and calls [`Bench::compare`], and a line in [`run`].

mod agents;
mod appends;
mod arms;
mod bdevs;
mod client;
mod cluster;
mod doors;
mod failover;
mod lab;
mod own;
mod pairs;
mod process;
mod replicas;
mod scaling;
mod spaces;

use std::path::PathBuf;

use serde::Serialize;

use crate::cpu::FOREIGN_MAX;
use crate::handicap::HandicapKind;
use crate::stats::{Interval, Limit};

pub use agents::AgentError;
pub use arms::Metric;
pub use lab::{Lab, LabError};
pub use pairs::{Arm, ArmError, Pair, Paired, Plan};
pub use process::ProcessError;

/// Why a benchmark gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum RatioError {
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error(transparent)]
    Rpc(#[from] crate::rpc::RpcError),
    #[error(transparent)]
    Arm(#[from] ArmError),
    #[error("setting up our arm: {0}")]
    Volume(String),
    #[error("there is no benchmark {0} yet: 1 to 4 and 6 to 9 are there")]
    Unknown(u32),
    #[error("benchmark {0} needs {1} CPUs, this machine has {2}: one polling thread each, or the arms disturb themselves")]
    Cpus(u32, usize, usize),
}

/// How to run.
#[derive(Debug, Clone)]
pub struct RatioOptions {
    /// Pairs that must be left in each comparison.
    pub pairs: usize,
    /// Pairs of the negative control.
    pub control_pairs: usize,
    /// Only comparisons whose name holds this.
    pub only: Option<String>,
    pub is_without_control: bool,
    /// Where large files go.
    pub scratch: Option<PathBuf>,
    /// Hugepages for all processes; the vhost comparison runs only with them.
    pub hugepages: bool,
    pub seed: u64,
    /// Share of the machine that others may use in a turn that counts. Above [`FOREIGN_MAX`] figures are for orientation and
    /// nothing passes.
    pub foreign_max: f64,
}

/// What is asked of a comparison.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Gate {
    pub pass: Limit,
    pub goal: Limit,
}

impl Gate {
    pub const fn at_least(pass: f64, goal: f64) -> Self {
        Self { pass: Limit::AtLeast(pass), goal: Limit::AtLeast(goal) }
    }

    pub const fn at_most(pass: f64, goal: f64) -> Self {
        Self { pass: Limit::AtMost(pass), goal: Limit::AtMost(goal) }
    }
}

/// How a negative control is made.
#[derive(Debug, Clone, Copy)]
pub enum Control {
    /// A spin sized from what was measured, so that our arm ends 15 % on the wrong side of its limit: a limit that does not
    /// notice that would notice nothing.
    Spin,
    /// A spin that alone lasts as long as the limit and 15 % allow for all: where another core bounds our arm, a shorter one would hide in the waiting.
    SpinOut,
    /// None: the comparison is one itself.
    None,
    /// This, whatever was measured.
    Fixed(HandicapKind),
}

/// How a negative control went.
#[derive(Debug, Clone, Serialize)]
pub struct ControlOutcome {
    pub handicap: String,
    pub interval: Option<Interval>,
    /// True when the limit was missed, as it must be.
    pub is_caught: bool,
}

/// One comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    pub benchmark: u32,
    pub name: String,
    pub ours: String,
    pub peer: String,
    pub unit: &'static str,
    pub gate: Gate,
    pub ours_value: f64,
    pub peer_value: f64,
    pub paired: Paired,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub control: Option<ControlOutcome>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// True when pairs were kept that the rules discard.
    pub is_for_orientation: bool,
}

impl Outcome {
    /// True when the whole interval keeps the limit.
    pub fn is_within(&self) -> bool {
        self.paired.interval.is_some_and(|interval| self.gate.pass.met_by(&interval))
    }

    pub fn is_passed(&self) -> bool {
        self.is_within() && !self.is_for_orientation
    }

    pub fn is_goal(&self) -> bool {
        !self.is_for_orientation && self.paired.interval.is_some_and(|interval| self.gate.goal.met_by(&interval))
    }

    /// True when the limit is kept and the negative control, where there is one, missed it.
    pub fn is_good(&self) -> bool {
        self.is_passed() && self.control.as_ref().is_none_or(|control| control.is_caught)
    }
}

/// What a comparison is called and asked.
pub struct Question {
    pub name: String,
    pub unit: &'static str,
    pub gate: Gate,
    pub control: Control,
    /// Durability mode and whatever else the figure hangs on.
    pub note: Option<String>,
}

/// A benchmark under way.
pub struct Bench<'a> {
    pub number: u32,
    pub options: &'a RatioOptions,
    pub lab: &'a Lab,
    outcomes: Vec<Outcome>,
}

impl Bench<'_> {
    /// True when a comparison is to be run at all; setting one up costs seconds.
    pub fn wants(&self, name: &str) -> bool {
        self.options.only.as_deref().is_none_or(|only| name.contains(only))
    }

    /// Runs a comparison and its control, and shows both as they go.
    pub fn compare(&mut self, question: Question, ours: &mut dyn Arm, peer: &mut dyn Arm) -> Result<(), RatioError> {
        self.compare_under(question, self.options.pairs, Some(self.options.foreign_max), ours, peer)
    }

    /// The same against a constant, with so many pairs at most. What others use of the machine can only worsen our side of it: no pair is discarded for that.
    pub fn compare_to_constant(
        &mut self,
        question: Question,
        pairs_max: usize,
        ours: &mut dyn Arm,
        peer: &mut dyn Arm,
    ) -> Result<(), RatioError> {
        self.compare_under(question, self.options.pairs.min(pairs_max), None, ours, peer)
    }

    /// Says more about the comparison that was run last, known only then.
    pub fn annotate(&mut self, note: String) {
        if let Some(outcome) = self.outcomes.last_mut() {
            outcome.note = Some(note);
        }
    }

    fn compare_under(
        &mut self,
        question: Question,
        pairs: usize,
        foreign_max: Option<f64>,
        ours: &mut dyn Arm,
        peer: &mut dyn Arm,
    ) -> Result<(), RatioError> {
        // The peer may be what rests first: whoever polls now would disturb the other's turn.
        ours.rest()?;
        peer.rest()?;
        eprintln!("\n[{}] {}: {} / {}", self.number, question.name, ours.name(), peer.name());
        let plan = Plan {
            pairs,
            pairs_max: pairs * 4,
            handicap: HandicapKind::None,
            seed: self.options.seed,
            foreign_max: foreign_max.unwrap_or(f64::INFINITY),
        };
        let unit = question.unit;
        let paired = pairs::measure(ours, peer, &plan, &mut |pair| show_pair(pair, unit))?;
        let mut outcome = Outcome {
            benchmark: self.number,
            name: question.name,
            ours: ours.name(),
            peer: peer.name(),
            unit,
            gate: question.gate,
            ours_value: paired.ours(),
            peer_value: paired.peer(),
            paired,
            control: None,
            note: question.note,
            is_for_orientation: foreign_max.is_some_and(|most| most > FOREIGN_MAX),
        };
        let handicap = match question.control {
            Control::None => None,
            Control::Fixed(kind) => Some(kind),
            Control::Spin => Some(spin_to_fail(&outcome)),
            Control::SpinOut => Some(spin_alone(&outcome)),
        };
        if let Some(handicap) = handicap.filter(|_| !self.options.is_without_control && outcome.is_within()) {
            let plan = Plan { pairs: self.options.control_pairs, pairs_max: self.options.control_pairs * 4, handicap, ..plan };
            eprintln!("    negative control, {handicap} per operation in our arm:");
            let paired = pairs::measure(ours, peer, &plan, &mut |pair| show_pair(pair, unit))?;
            let is_caught = paired.interval.is_some_and(|interval| !outcome.gate.pass.met_by(&interval));
            outcome.control = Some(ControlOutcome { handicap: handicap.to_string(), interval: paired.interval, is_caught });
        }
        self.outcomes.push(outcome);
        Ok(())
    }
}

/// The spin that puts our arm 15 % beyond its limit, from its own rate.
fn spin_to_fail(outcome: &Outcome) -> HandicapKind {
    let Some(interval) = outcome.paired.interval else { return HandicapKind::Spin(1_000) };
    match outcome.gate.pass {
        // A rate: time per operation must grow by median / (0.85 × limit).
        Limit::AtLeast(limit) => {
            let per_operation = match outcome.unit {
                "MiB/s" => 1e9 / (outcome.ours_value * f64::from(1 << 20)) * outcome.operation_bytes(),
                _ => 1e9 / outcome.ours_value,
            };
            HandicapKind::Spin((per_operation * (interval.median / (limit * 0.85) - 1.0)).max(100.0) as u64)
        }
        // A cost: about one instruction or more per nanosecond of spinning, so twice what is missing is ample.
        Limit::AtMost(limit) => {
            let missing = (limit * 1.15 - interval.median) * outcome.peer_value;
            HandicapKind::Spin((missing * 2.0).max(200.0) as u64)
        }
    }
}

/// The spin that by itself takes what the limit and 15 % allow: of a cost, at least a unit a nanosecond.
fn spin_alone(outcome: &Outcome) -> HandicapKind {
    let Limit::AtMost(limit) = outcome.gate.pass else { return spin_to_fail(outcome) };
    HandicapKind::Spin((limit * 1.15 * outcome.peer_value).max(200.0) as u64)
}

impl Outcome {
    /// Mean bytes of our operations, from any turn that counts.
    fn operation_bytes(&self) -> f64 {
        // A turn of rate r MiB/s and n operations lasts a second: see `TURN`.
        let kept = self.paired.pairs.iter().find(|pair| pair.discarded.is_none());
        kept.map_or(4096.0, |pair| pair.ours.value * f64::from(1 << 20) * TURN.as_secs_f64() / pair.ours.operations.max(1) as f64)
    }
}

/// Length of one turn. bdevperf counts in whole seconds.
pub const TURN: crate::units::Nanos = crate::units::Nanos(1_000_000_000);
/// What a turn leaves out at its start.
pub const TURN_WARMUP: crate::units::Nanos = crate::units::Nanos(100_000_000);

fn show_pair(pair: &Pair, unit: &str) {
    let discarded = pair.discarded.as_ref().map(|why| format!("  discarded: {why}")).unwrap_or_default();
    eprintln!(
        "    {:>12.1} / {:>12.1} {unit} = {:.3}   foreign CPU {:.2} %{discarded}",
        pair.ours.value,
        pair.peer.value,
        pair.ratio,
        pair.foreign * 100.0
    );
}

fn shown_value(value: f64) -> String {
    if value.is_nan() { "–".to_owned() } else { format!("{value:.1}") }
}

/// All outcomes as a table.
pub fn table(outcomes: &[Outcome]) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<3}{:<40}{:>14}{:>14} {:<16}{:>7}{:>16}{:>8}{:>8}{:>6}{:>6}{:>10}  control",
        "#", "comparison", "ours", "peer", "unit", "ratio", "95 % interval", "pass", "goal", "pass?", "goal?", "discarded"
    );
    for outcome in outcomes {
        let (median, range) = match &outcome.paired.interval {
            Some(interval) => (format!("{:.3}", interval.median), format!("{:.3}–{:.3}", interval.low, interval.high)),
            None => ("–".to_owned(), "too few pairs".to_owned()),
        };
        let control = match &outcome.control {
            None => "–".to_owned(),
            Some(control) => {
                let median = control.interval.map_or("–".to_owned(), |interval| format!("{:.3}", interval.median));
                let caught = if control.is_caught { "fails, as it must" } else { "PASSES: the limit notices nothing" };
                format!("{} → {median} {caught}", control.handicap)
            }
        };
        let word = |is_met: bool| if is_met { "yes" } else { "NO" };
        let _ = writeln!(
            out,
            "{:<3}{:<40}{:>14}{:>14} {:<16}{:>7}{:>16}{:>8}{:>8}{:>6}{:>6}{:>10}  {control}",
            outcome.benchmark,
            outcome.name,
            shown_value(outcome.ours_value),
            shown_value(outcome.peer_value),
            outcome.unit,
            median,
            range,
            outcome.gate.pass.to_string(),
            outcome.gate.goal.to_string(),
            word(outcome.is_passed()),
            word(outcome.is_goal()),
            format!("{} of {}", outcome.paired.discarded, outcome.paired.pairs.len()),
        );
        if let Some(note) = &outcome.note {
            let _ = writeln!(out, "   {note}");
        }
        if outcome.is_for_orientation {
            let _ = writeln!(out, "   FOR ORIENTATION: pairs were kept that the rules discard, so nothing passes");
        }
    }
    out
}

/// Runs benchmark `number`.
pub fn run(number: u32, options: &RatioOptions) -> Result<Vec<Outcome>, RatioError> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    if cpus < 2 {
        return Err(RatioError::Cpus(number, 2, cpus));
    }
    let lab = Lab::open(options.scratch.as_deref())?;
    let mut bench = Bench { number, options, lab: &lab, outcomes: Vec::new() };
    match number {
        0 => own::run(&mut bench)?,
        1 => replicas::cost(&mut bench)?,
        2 => replicas::latency(&mut bench)?,
        3 => replicas::tail(&mut bench)?,
        4 => appends::run(&mut bench)?,
        6 => bdevs::run(&mut bench)?,
        7 => doors::run(&mut bench)?,
        8 => scaling::run(&mut bench)?,
        9 => failover::run(&mut bench)?,
        other => return Err(RatioError::Unknown(other)),
    }
    Ok(bench.outcomes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ratio::pairs::Turn;

    fn outcome(low: f64, median: f64, high: f64, gate: Gate) -> Outcome {
        let turn = Turn { value: 400_000.0, operations: 400_000, void: None };
        let pair = Pair { ours: turn, peer: turn, ratio: 1.0, foreign: 0.0, discarded: None };
        Outcome {
            benchmark: 6,
            name: "read IOPS".into(),
            ours: "volume".into(),
            peer: "passthru".into(),
            unit: "IOPS",
            gate,
            ours_value: 400_000.0,
            peer_value: 420_000.0,
            paired: Paired { interval: Some(Interval { low, median, high, pairs: 9 }), discarded: 2, pairs: vec![pair; 11] },
            control: None,
            note: None,
            is_for_orientation: false,
        }
    }

    #[test]
    fn outcome_passes_only_with_its_whole_interval_and_a_caught_control() {
        let mut good = outcome(0.9, 0.95, 0.99, Gate::at_least(0.85, 0.95));
        assert!(good.is_passed() && !good.is_goal() && good.is_good());
        good.control = Some(ControlOutcome { handicap: "spin:900".into(), interval: None, is_caught: false });
        assert!(!good.is_good());
        assert!(!outcome(0.84, 0.95, 0.99, Gate::at_least(0.85, 0.95)).is_passed());
        let mut loose = outcome(0.9, 0.95, 0.99, Gate::at_least(0.85, 0.95));
        loose.is_for_orientation = true;
        assert!(loose.is_within() && !loose.is_good());
        let mut too_few = outcome(0.9, 0.95, 0.99, Gate::at_least(0.85, 0.95));
        too_few.paired.interval = None;
        assert!(!too_few.is_good());
    }

    #[test]
    fn spin_of_a_rate_control_puts_our_arm_below_its_limit() {
        let passed = outcome(0.94, 0.95, 0.96, Gate::at_least(0.85, 0.95));
        let HandicapKind::Spin(nanos) = spin_to_fail(&passed) else { panic!("not a spin") };
        // 2,500 ns an operation at 0.95 of the peer.
        let slowed = 2_500.0 / (2_500.0 + nanos as f64) * 0.95;
        assert!((0.70..0.75).contains(&slowed), "{slowed}");
    }

    #[test]
    fn table_shows_interval_limits_discards_and_control() {
        let mut shown = outcome(0.9, 0.95, 0.99, Gate::at_least(0.85, 0.95));
        shown.control = Some(ControlOutcome {
            handicap: "spin:900".into(),
            interval: Some(Interval { low: 0.7, median: 0.72, high: 0.74, pairs: 5 }),
            is_caught: true,
        });
        let text = table(&[shown]);
        for part in ["0.950", "0.900–0.990", "≥ 0.85", "2 of 11", "spin:900 → 0.720 fails, as it must"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}
