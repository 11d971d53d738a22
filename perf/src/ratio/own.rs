//! Benchmark 0, of the tool itself: is the same arm against itself 1, and does our load generator cost what bdevperf costs?
//!
//! A ratio with a slow generator in both arms would flatter whatever is measured with it. Not one of the project's limits;
//! run it when a figure looks odd.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::json;

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, BdevperfArm, Metric, SharedAgent};
use super::process::ArmProcess;
use super::{Arm, Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::LaneAsk;
use crate::units::{ByteCount, ByteOffset};
use crate::workload::{Access, Mix, Workload};

const CORE: u32 = 1;
const BLOCKS: u64 = 1 << 16;
const BLOCK: u64 = 4096;

fn arm(agent: &SharedAgent, bdev: &str, metric: Metric, seed: u64) -> AgentArm {
    AgentArm {
        name: format!("our generator on {bdev}"),
        agent: agent.clone(),
        lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: CORE }],
        workload: Workload {
            seed,
            block_size: ByteCount(BLOCK),
            mix: Mix::READ,
            access: Access::Random,
            depth: 32,
            range_offset: ByteOffset(0),
            range_length: None,
        },
        warmup: TURN_WARMUP,
        duration: TURN,
        metric,
        target: None,
        upkeep: None,
        node: None,
    }
}

fn bdevperf(bench: &Bench<'_>, metric: Metric) -> Result<BdevperfArm, RatioError> {
    let create = json!({"method": "bdev_null_create", "params": {"name": "Null", "num_blocks": BLOCKS, "block_size": BLOCK}});
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": [create]}]});
    let (path, socket) = (bench.lab.path("bdevperf.json"), bench.lab.path("bdevperf.sock"));
    std::fs::write(&path, config.to_string()).map_err(|source| super::LabError::Io { path: path.clone(), source })?;
    let mut arguments: Vec<String> =
        ["-z", "-q", "32", "-o", "4096", "-w", "randread", "-t", "1", "-m", "0x2", "--disable-cpumask-locks", "-s", "1024", "-r"]
            .map(str::to_owned)
            .to_vec();
    arguments.extend([socket.display().to_string(), "-c".to_owned(), path.display().to_string(), "--no-huge".to_owned()]);
    let program = bench.lab.peer("build/examples/bdevperf")?;
    let mut process = ArmProcess::start(&program, &arguments, &bench.lab.path("bdevperf.log"))?;
    let rpc = process.rpc(&socket)?;
    Ok(BdevperfArm { name: "bdevperf on Null".to_owned(), process, rpc, seconds: 1, metric })
}

pub fn run(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let options = AgentOptions { cores: vec![CORE], mem_mib: 1024, hugepages: false, node: None, ..AgentOptions::default() };
    let program = bench.lab.program("penstock-perf")?;
    let mut agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
    agent.rpc("bdev_null_create", &json!({"name": "Null", "num_blocks": BLOCKS, "block_size": BLOCK}))?;
    let agent: SharedAgent = Rc::new(RefCell::new(agent));
    let seed = bench.options.seed;
    if bench.wants("same arm twice") {
        let question = Question {
            name: "same arm twice, null read IOPS".to_owned(),
            unit: Metric::OperationsPerSecond.unit(),
            gate: Gate::at_least(0.97, 0.99),
            control: Control::Spin,
            note: None,
        };
        let (mut ours, mut peer) =
            (arm(&agent, "Null", Metric::OperationsPerSecond, seed), arm(&agent, "Null", Metric::OperationsPerSecond, seed));
        bench.compare(question, &mut ours, &mut peer)?;
    }
    for (name, metric, gate) in [
        ("generator instructions per null read", Metric::InstructionsPerOperation, Gate::at_most(2.0, 1.2)),
        ("generator cycles per null read", Metric::CyclesPerOperation, Gate::at_most(2.0, 1.2)),
    ] {
        if !bench.wants(name) {
            continue;
        }
        let metric = metric.available();
        let mut peer = bdevperf(bench, metric)?;
        peer.rest()?;
        agent.borrow().wake()?;
        let question = Question { name: name.to_owned(), unit: metric.unit(), gate, control: Control::Spin, note: None };
        bench.compare(question, &mut arm(&agent, "Null", metric, seed), &mut peer)?;
    }
    Ok(())
}
