//! Benchmark 6: what a volume costs over the bare device, in process, beside SPDK's `passthru` over the same kind of device.
//!
//! Both arms live in one agent: the same load generator, the same core, the same media; they differ in the bdev alone.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::json;

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, Metric, SharedAgent};
use super::volume::{self, AgentNode, DriveAsk, Undrained};
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::{LaneAsk, TurnAsk};
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::workload::{Access, Mix, Workload};

const CORE: u32 = 1;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DEVICE_BYTES: u64 = 1280 * MIB;
/// Holds 100 k blocks of 4 KiB (400 MiB) undrained with room to spare.
const OPLOG_BYTES: u64 = 512 * MIB;
const VOLUME_BYTES: u64 = 400 * MIB;
/// Blocks that lie undrained when reads over them are measured.
const UNDRAINED_BLOCKS: u64 = 100_000;

fn workload(mix: Mix, access: Access, block: u64, seed: u64) -> Workload {
    Workload {
        seed,
        block_size: ByteCount(block),
        mix,
        access,
        depth: 32,
        range_offset: ByteOffset(0),
        // The same working set in both arms: the volume's size.
        range_length: Some(ByteCount(VOLUME_BYTES)),
    }
}

struct Setup {
    agent: SharedAgent,
    volume: String,
    seed: u64,
}

impl Setup {
    fn open(bench: &Bench<'_>) -> Result<Self, RatioError> {
        let options = AgentOptions {
            cores: vec![CORE],
            mem_mib: 4608,
            hugepages: bench.options.hugepages,
            node: Some(bench.lab.subdirectory("node")?),
        };
        let program = bench.lab.program("penstock-perf")?;
        let mut agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
        for name in ["Ours", "Bare"] {
            agent.rpc("bdev_malloc_create", &json!({"name": name, "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
        }
        agent.rpc("bdev_null_create", &json!({"name": "Null", "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
        for (base, name) in [("Bare", "PassMalloc"), ("Null", "PassNull")] {
            agent.rpc("bdev_passthru_create", &json!({"base_bdev_name": base, "name": name}))?;
        }
        let agent: SharedAgent = Rc::new(RefCell::new(agent));
        let mut node = AgentNode(agent.clone());
        let volume = (|| {
            volume::claim(&mut node)?;
            let ask = DriveAsk { number: 1, spec: "bdev:Ours?power_safe=true", stores: 1, oplog_bytes: OPLOG_BYTES };
            volume::add_drive(&mut node, &ask)?;
            volume::create(&mut node, 1, 1, VOLUME_BYTES)?;
            volume::local_bdev(&mut node, 1)
        })()
        .map_err(RatioError::Volume)?;
        let setup = Self { agent, volume, seed: bench.options.seed };
        // Every block of either device is written once, so that reads find data and no arm reads what was never touched.
        setup.write(&setup.volume, Access::Sequential, 65536, VOLUME_BYTES / 65536)?;
        setup.write("PassMalloc", Access::Sequential, 65536, VOLUME_BYTES / 65536)?;
        setup.drain()?;
        Ok(setup)
    }

    fn write(&self, bdev: &str, access: Access, block: u64, operations: u64) -> Result<(), RatioError> {
        let ask = TurnAsk {
            lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: CORE }],
            workload: workload(Mix::WRITE, access, block, self.seed),
            warmup: Nanos(0),
            duration: None,
            operations: Some(operations),
            handicap: "none".to_owned(),
        };
        self.agent.borrow_mut().turn(&ask)?;
        Ok(())
    }

    fn drain(&self) -> Result<(), RatioError> {
        volume::drain(&mut AgentNode(self.agent.clone()), 1).map_err(RatioError::Volume)
    }

    fn arm(&self, bdev: &str, name: &str, mix: Mix, metric: Metric) -> AgentArm {
        AgentArm {
            name: name.to_owned(),
            agent: self.agent.clone(),
            lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: CORE }],
            workload: workload(mix, Access::Random, BLOCK, self.seed),
            warmup: TURN_WARMUP,
            duration: TURN,
            metric,
            target: None,
            undrained: None,
        }
    }
}

struct Case {
    name: &'static str,
    peer: &'static str,
    mix: Mix,
    metric: Metric,
    gate: Gate,
    note: &'static str,
}

const READ_INSTRUCTIONS: &str = "read instructions, over malloc";
const READ_INSTRUCTIONS_NULL: &str = "read instructions, peer over null";
const READS: &str = "read IOPS";
const READS_UNDRAINED: &str = "read IOPS over 100 k undrained blocks";
const WRITES: &str = "write IOPS";

const CASES: [Case; 5] = [
    Case {
        name: READ_INSTRUCTIONS,
        peer: "PassMalloc",
        mix: Mix::READ,
        metric: Metric::InstructionsPerOperation,
        gate: Gate::at_most(2.5, 1.5),
        note: "4 KiB random read QD32, checksums verified by the volume, all drained; in process, one core",
    },
    Case {
        name: READ_INSTRUCTIONS_NULL,
        peer: "PassNull",
        mix: Mix::READ,
        metric: Metric::InstructionsPerOperation,
        gate: Gate::at_most(2.5, 1.5),
        note: "as above, but the peer's device moves no data at all",
    },
    Case {
        name: READS,
        peer: "PassMalloc",
        mix: Mix::READ,
        metric: Metric::OperationsPerSecond,
        gate: Gate::at_least(0.85, 0.95),
        note: "4 KiB random read QD32, all drained",
    },
    Case {
        name: READS_UNDRAINED,
        peer: "PassMalloc",
        mix: Mix::READ,
        metric: Metric::OperationsPerSecond,
        gate: Gate::at_least(0.7, 0.85),
        note: "4 KiB random read QD32 over the index of undrained writes; undrained at the start of the first turn and of the last are shown above",
    },
    Case {
        name: WRITES,
        peer: "PassMalloc",
        mix: Mix::WRITE,
        metric: Metric::OperationsPerSecond,
        gate: Gate::at_least(0.5, 0.6),
        note: "4 KiB random write QD32; durability: volatile malloc, acknowledged when in the oplog; drain included",
    },
];

pub fn run(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    if !CASES.iter().any(|case| bench.wants(case.name)) {
        return Ok(());
    }
    let setup = Setup::open(bench)?;
    for case in &CASES {
        if !bench.wants(case.name) {
            continue;
        }
        setup.agent.borrow().wake()?;
        let metric = case.metric.available();
        let instead = if metric == case.metric { "" } else { "; CPU TIME IN PLACE OF INSTRUCTIONS: this machine shows no counters" };
        let mut ours = setup.arm(&setup.volume, "volume over malloc", case.mix, metric);
        let mut peer = setup.arm(case.peer, case.peer, case.mix, metric);
        let level = || Undrained { drive: 1, oplog_bytes: OPLOG_BYTES, rpc: None };
        match case.name {
            READS_UNDRAINED => {
                setup.write(&setup.volume, Access::Random, BLOCK, UNDRAINED_BLOCKS)?;
                show_undrained(&setup, level())?;
            }
            WRITES => {
                // Three times the oplog, so that turns find the steady state.
                setup.write(&setup.volume, Access::Random, BLOCK, 3 * OPLOG_BYTES / BLOCK)?;
                ours.undrained = Some(level());
            }
            _ => setup.drain()?,
        }
        let question = Question {
            name: case.name.to_owned(),
            unit: metric.unit(),
            gate: case.gate,
            control: Control::Spin,
            note: Some(format!("{}{instead}", case.note)),
        };
        bench.compare(question, &mut ours, &mut peer)?;
        if case.name == READS_UNDRAINED {
            setup.agent.borrow().wake()?;
            show_undrained(&setup, level())?;
        }
    }
    Ok(())
}

fn show_undrained(setup: &Setup, mut level: Undrained) -> Result<(), RatioError> {
    let bytes = level.bytes(&setup.agent).map_err(RatioError::Volume)?;
    eprintln!("    undrained: {} blocks", bytes / BLOCK);
    Ok(())
}
