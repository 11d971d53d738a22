//! The arms that benchmarks are made of: an agent's load on some device, stock bdevperf, and the scaling of either.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::agents::Agent;
use super::pairs::{Arm, ArmError, Turn};
use super::process::ArmProcess;
use crate::agent::{LaneAsk, TurnAnswer, TurnAsk};
use crate::counters::{Counters, CountersError, Counts, cpu_nanos};
use crate::handicap::HandicapKind;
use crate::rpc::RpcClient;
use crate::units::Nanos;
use crate::volume::{self, Node};
use crate::workload::Workload;

/// The node in an agent's process.
pub struct AgentNode(pub SharedAgent);

impl Node for AgentNode {
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, String> {
        self.0.borrow_mut().rpc(method, params).map_err(|error| error.to_string())
    }
}

/// What a turn's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Metric {
    OperationsPerSecond,
    BytesPerSecond,
    InstructionsPerOperation,
    CyclesPerOperation,
    /// What is left where the machine shows no counters: CPU time of all the arm's processes, user and kernel.
    CpuNanosPerOperation,
}

impl Metric {
    /// This metric, or CPU time where it needs counters that the machine does not show.
    pub fn available(self) -> Self {
        if matches!(self, Self::InstructionsPerOperation | Self::CyclesPerOperation) && !crate::counters::are_available() {
            Self::CpuNanosPerOperation
        } else {
            self
        }
    }

    pub fn unit(self) -> &'static str {
        match self {
            Self::OperationsPerSecond => "IOPS",
            Self::BytesPerSecond => "MiB/s",
            Self::InstructionsPerOperation => "instructions/op",
            Self::CyclesPerOperation => "cycles/op",
            Self::CpuNanosPerOperation => "CPU ns/op",
        }
    }

    /// True where less is better.
    pub fn is_cost(self) -> bool {
        matches!(self, Self::InstructionsPerOperation | Self::CyclesPerOperation | Self::CpuNanosPerOperation)
    }

    /// Runs `work` and counts what the processes spent in it.
    pub(super) fn count<R>(self, pids: &[u32], work: impl FnOnce() -> Result<R, String>) -> Result<(R, Spent), String> {
        let text = |error: CountersError| error.to_string();
        match self {
            Self::OperationsPerSecond | Self::BytesPerSecond => Ok((work()?, Spent::default())),
            Self::CpuNanosPerOperation => {
                let nanos = || cpu_nanos(pids).map_err(|error| format!("CPU time of {pids:?}: {error}"));
                let before = nanos()?;
                let result = work()?;
                Ok((result, Spent { cpu_nanos: nanos()? - before, ..Spent::default() }))
            }
            Self::InstructionsPerOperation | Self::CyclesPerOperation => {
                let mut counters = Counters::attach(pids).map_err(text)?;
                counters.start().map_err(text)?;
                let result = work()?;
                let Counts { cycles, instructions } = counters.stop().map_err(text)?;
                Ok((result, Spent { cycles, instructions, cpu_nanos: 0 }))
            }
        }
    }

    pub(super) fn of(self, operations: u64, iops: f64, bytes_per_s: f64, spent: Spent) -> f64 {
        let per_operation = |count: u64| count as f64 / operations.max(1) as f64;
        match self {
            Self::OperationsPerSecond => iops,
            Self::BytesPerSecond => bytes_per_s / f64::from(1 << 20),
            Self::InstructionsPerOperation => per_operation(spent.instructions),
            Self::CyclesPerOperation => per_operation(spent.cycles),
            Self::CpuNanosPerOperation => per_operation(spent.cpu_nanos),
        }
    }
}

/// What an arm's processes spent in a turn.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Spent {
    cycles: u64,
    instructions: u64,
    cpu_nanos: u64,
}

fn failed(arm: &str) -> impl Fn(String) -> ArmError + '_ {
    move |what| ArmError::Failed { arm: arm.to_owned(), what }
}

/// Shared by the arms of one comparison.
pub type SharedAgent = Rc<RefCell<Agent>>;
/// A target that is awake only in its arm's turns.
pub type SharedProcess = Rc<ArmProcess>;

/// What a turn over a volume owes, beside its load.
pub enum Upkeep {
    /// Write arms begin with everything drained, write at least `least_bytes`, and drain it all within their measured time: nothing
    /// is put off into somebody else's turn.
    Drain { drives: Vec<u64>, least_bytes: u64 },
    /// Read arms over undrained blocks: `fill` is written where fewer lie undrained, and most of them must still do so in the end.
    Undrained { drive: u64, blocks: u64, fill: TurnAsk },
}

/// Load from an agent.
pub struct AgentArm {
    pub name: String,
    pub agent: SharedAgent,
    pub lanes: Vec<LaneAsk>,
    pub workload: Workload,
    pub warmup: Nanos,
    pub duration: Nanos,
    pub metric: Metric,
    /// The target, where it is a process of its own.
    pub target: Option<SharedProcess>,
    pub upkeep: Option<Upkeep>,
    /// The node of `target`; without one the node is in the agent.
    pub node: Option<RpcClient>,
}

impl AgentArm {
    fn ask(&self, handicap: HandicapKind) -> TurnAsk {
        // Counters see the whole turn, and drained bytes are those of the whole turn: then operations must be too.
        let is_whole = self.metric.is_cost() || matches!(self.upkeep, Some(Upkeep::Drain { .. }));
        TurnAsk {
            lanes: self.lanes.clone(),
            workload: self.workload.clone(),
            warmup: if is_whole { Nanos(0) } else { self.warmup },
            duration: Some(self.duration),
            operations: None,
            rate: None,
            handicap: handicap.to_string(),
        }
    }

    fn on_node<R>(&mut self, work: impl FnOnce(&mut dyn Node) -> R) -> R {
        match &mut self.node {
            Some(rpc) => work(rpc),
            None => work(&mut AgentNode(self.agent.clone())),
        }
    }

    fn drain(&mut self) -> Result<(), String> {
        let Some(Upkeep::Drain { drives, .. }) = &self.upkeep else { return Ok(()) };
        let drives = drives.clone();
        self.on_node(|node| drives.iter().try_for_each(|drive| volume::drain(node, *drive)))
    }

    fn undrained_blocks(&mut self, drive: u64) -> Result<u64, String> {
        self.on_node(|node| volume::undrained_bytes(node, drive)).map(|bytes| bytes / UNDRAINED_BLOCK)
    }

    /// What is owed before the load.
    fn before(&mut self) -> Result<(), String> {
        let Some(Upkeep::Undrained { drive, blocks, fill }) = &self.upkeep else { return self.drain() };
        let (drive, blocks, fill) = (*drive, *blocks, fill.clone());
        if self.undrained_blocks(drive)? < blocks {
            // From nothing, in one go: filling up what is left would press the log and set off its drain.
            self.on_node(|node| volume::drain(node, drive))?;
            self.agent.borrow_mut().turn(&fill).map_err(|error| error.to_string())?;
        }
        Ok(())
    }

    /// What is owed after it: seconds that count as measured, and why the turn is void.
    fn after(&mut self, answer: &TurnAnswer) -> Result<(f64, Option<&'static str>), String> {
        match &self.upkeep {
            None => Ok((0.0, None)),
            Some(Upkeep::Drain { least_bytes, .. }) => {
                let is_little = answer.bytes < *least_bytes;
                let started = Instant::now();
                self.drain()?;
                Ok((started.elapsed().as_secs_f64(), is_little.then_some("wrote less than three times the oplog")))
            }
            Some(Upkeep::Undrained { drive, blocks, .. }) => {
                let (drive, least) = (*drive, *blocks / 10 * 9);
                let void = self.undrained_blocks(drive)? < least;
                Ok((0.0, void.then_some("too few blocks lay undrained in the end")))
            }
        }
    }
}

/// Bytes of a block in a node's figures.
const UNDRAINED_BLOCK: u64 = 4096;

impl Arm for AgentArm {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn pids(&self) -> Vec<u32> {
        let target = self.target.as_ref().map(|target| target.pid());
        std::iter::once(self.agent.borrow().pid()).chain(target).collect()
    }

    fn wake(&mut self) -> Result<(), ArmError> {
        let fail = failed(&self.name);
        if let Some(target) = &self.target {
            target.wake().map_err(|error| fail(error.to_string()))?;
        }
        self.agent.borrow().wake().map_err(|error| fail(error.to_string()))
    }

    fn rest(&mut self) -> Result<(), ArmError> {
        let fail = failed(&self.name);
        self.agent.borrow().rest().map_err(|error| fail(error.to_string()))?;
        match &self.target {
            Some(target) => target.rest().map_err(|error| fail(error.to_string())),
            None => Ok(()),
        }
    }

    fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError> {
        let name = self.name.clone();
        let fail = failed(&name);
        self.before().map_err(&fail)?;
        let ask = self.ask(handicap);
        let work = || self.agent.borrow_mut().turn(&ask).map_err(|error| error.to_string());
        let (answer, spent): (TurnAnswer, Spent) = self.metric.count(&self.pids(), work).map_err(&fail)?;
        if answer.operations == 0 {
            return Ok(Turn { value: f64::NAN, operations: 0, void: Some("no operation completed in its turn") });
        }
        let (more_s, void) = self.after(&answer).map_err(&fail)?;
        // The rates are of the load's own window; what draining took comes on top.
        let load_s = answer.operations as f64 / answer.iops;
        let share = load_s / (load_s + more_s);
        Ok(Turn {
            value: self.metric.of(answer.operations, answer.iops * share, answer.bytes_per_s * share, spent),
            operations: answer.operations,
            void,
        })
    }
}

/// Stock bdevperf, waiting for orders (`-z`).
pub struct BdevperfArm {
    pub name: String,
    pub process: ArmProcess,
    pub rpc: RpcClient,
    pub seconds: u32,
    pub metric: Metric,
}

impl Arm for BdevperfArm {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn pids(&self) -> Vec<u32> {
        vec![self.process.pid()]
    }

    fn wake(&mut self) -> Result<(), ArmError> {
        self.process.wake().map_err(|error| failed(&self.name)(error.to_string()))
    }

    fn rest(&mut self) -> Result<(), ArmError> {
        self.process.rest().map_err(|error| failed(&self.name)(error.to_string()))
    }

    fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError> {
        let name = self.name.clone();
        let fail = failed(&name);
        if handicap != HandicapKind::None {
            return Err(fail("bdevperf takes no handicap; it is a peer".to_owned()));
        }
        let limit = Duration::from_secs(u64::from(self.seconds) + 30);
        let metric = self.metric;
        let pids = self.pids();
        let work = || {
            let answer = self.rpc.call("perform_tests", &json!({"time_in_sec": self.seconds}), limit);
            answer.map_err(|error| format!("{error}\n{}", self.process.tail()))
        };
        let (answer, spent) = metric.count(&pids, work).map_err(&fail)?;
        let results = answer["results"].as_array().cloned().unwrap_or_default();
        let sum = |field: &str| results.iter().filter_map(|job| job[field].as_f64()).sum::<f64>();
        let (iops, mib_per_s, runtime) = (sum("iops"), sum("mibps"), results.first().and_then(|job| job["runtime"].as_f64()));
        let operations = (iops * runtime.unwrap_or(0.0)) as u64;
        if operations == 0 || sum("io_failed") > 0.0 {
            return Err(fail(format!("it reported {answer}")));
        }
        let bytes_per_s = mib_per_s * f64::from(1 << 20);
        Ok(Turn { value: self.metric.of(operations, iops, bytes_per_s, spent), operations, void: None })
    }
}

/// How much more two lanes on two cores do than one lane on one core: the quotient of two turns.
pub struct ScalingArm {
    pub one: AgentArm,
    pub two: AgentArm,
    pub turns: usize,
}

impl Arm for ScalingArm {
    fn name(&self) -> String {
        self.two.name()
    }

    fn pids(&self) -> Vec<u32> {
        self.two.pids()
    }

    fn wake(&mut self) -> Result<(), ArmError> {
        self.two.wake()
    }

    fn rest(&mut self) -> Result<(), ArmError> {
        self.two.rest()
    }

    fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError> {
        // The order alternates here too, so that a drift in speed does not favour one of the two.
        self.turns += 1;
        let (one, two) = if self.turns.is_multiple_of(2) {
            let two = self.two.turn(handicap)?;
            (self.one.turn(handicap)?, two)
        } else {
            let one = self.one.turn(handicap)?;
            (one, self.two.turn(handicap)?)
        };
        Ok(Turn { value: two.value / one.value, operations: one.operations + two.operations, void: one.void.or(two.void) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metric_divides_costs_by_operations_and_passes_rates_through() {
        let counts = Spent { cycles: 3_000, instructions: 8_000, cpu_nanos: 400 };
        assert_eq!(Metric::InstructionsPerOperation.of(4, 1.0, 1.0, counts), 2_000.0);
        assert_eq!(Metric::CyclesPerOperation.of(4, 1.0, 1.0, counts), 750.0);
        assert_eq!(Metric::CpuNanosPerOperation.of(4, 1.0, 1.0, counts), 100.0);
        assert_eq!(Metric::OperationsPerSecond.of(4, 99.0, 1.0, counts), 99.0);
        assert_eq!(Metric::BytesPerSecond.of(4, 1.0, 3.0 * f64::from(1 << 20), counts), 3.0);
    }
}
