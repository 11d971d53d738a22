//! Benchmark 6: what a volume costs over the bare device, in process, beside SPDK's `passthru` over the same kind of device.
//!
//! Each arm is one agent: the same load generator, the same core, the same kind of media; they differ in the bdev alone.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::json;

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, AgentNode, Metric, SharedAgent, Upkeep};
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::{LaneAsk, TurnAsk};
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::volume::{self, DriveAsk};
use crate::workload::{Access, Mix, Workload};

const CORE: u32 = 1;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DEVICE_BYTES: u64 = 768 * MIB;
const LARGE_DEVICE_BYTES: u64 = 2560 * MIB;
const OPLOG_BYTES: u64 = 128 * MIB;
/// Holds the whole volume undrained in less than 3/8 of itself: above that the node drains in earnest.
const LARGE_OPLOG_BYTES: u64 = 1152 * MIB;
/// Long enough to write three times that.
const WRITE_TURN: Nanos = Nanos(3 * TURN.0);
const VOLUME_BYTES: u64 = 400 * MIB;
/// Blocks that lie undrained when reads over them are measured.
const UNDRAINED_BLOCKS: u64 = 100_000;
/// Reads with so few writes among them that they count as reads, and that keep the volume from falling idle and draining.
const READ_99: Mix = Mix { read: 99, write: 1, trim: 0 };

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
    /// A node with a volume of either oplog size.
    agent: SharedAgent,
    volume: String,
    large_volume: String,
    /// Bare devices, in a process without a node: even an idle one would cost the peer a little of each turn of the loop.
    bare: SharedAgent,
    seed: u64,
}

impl Setup {
    fn open(bench: &Bench<'_>) -> Result<Self, RatioError> {
        let directory = bench.lab.subdirectory("node")?;
        let options = AgentOptions {
            cores: vec![CORE],
            mem_mib: 4864,
            hugepages: bench.options.hugepages,
            node: Some(directory),
            ..AgentOptions::default()
        };
        let program = bench.lab.program("penstock-perf")?;
        let mut agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
        for (name, bytes) in [("Ours", DEVICE_BYTES), ("Large", LARGE_DEVICE_BYTES)] {
            agent.rpc("bdev_malloc_create", &json!({"name": name, "num_blocks": bytes / BLOCK, "block_size": BLOCK}))?;
        }
        let agent: SharedAgent = Rc::new(RefCell::new(agent));
        let mut node = AgentNode(agent.clone());
        let mut volumes = (|| {
            volume::claim(&mut node)?;
            let drives = [(1, "bdev:Ours?power_safe=true", OPLOG_BYTES), (2, "bdev:Large?power_safe=true", LARGE_OPLOG_BYTES)];
            drives
                .map(|(number, spec, oplog_bytes)| {
                    volume::add_drive(&mut node, &DriveAsk { number, spec, stores: 1, oplog_bytes })?;
                    volume::create(&mut node, number, number, VOLUME_BYTES)?;
                    volume::local_bdev(&mut node, number)
                })
                .into_iter()
                .collect::<Result<Vec<String>, String>>()
        })()
        .map_err(RatioError::Volume)?;
        let (large_volume, volume) = (volumes.pop().unwrap_or_default(), volumes.pop().unwrap_or_default());
        let setup = Self { agent, volume, large_volume, bare: bare(bench)?, seed: bench.options.seed };
        // Every block is written once, so that reads find data and no arm reads what was never touched.
        for (agent, bdev) in [(&setup.agent, &*setup.volume), (&setup.agent, &setup.large_volume), (&setup.bare, "PassMalloc")] {
            agent.borrow_mut().turn(&setup.fill(bdev))?;
        }
        for drive in [1, 2] {
            volume::drain(&mut node, drive).map_err(RatioError::Volume)?;
        }
        setup.agent.borrow().rest()?;
        setup.bare.borrow().rest()?;
        Ok(setup)
    }

    /// Writes every block once.
    fn fill(&self, bdev: &str) -> TurnAsk {
        TurnAsk {
            lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: CORE }],
            workload: workload(Mix::WRITE, Access::Sequential, 65536, self.seed),
            warmup: Nanos(0),
            duration: None,
            operations: Some(VOLUME_BYTES / 65536),
            rate: None,
            handicap: "none".to_owned(),
        }
    }

    fn arm(&self, agent: &SharedAgent, bdev: &str, name: &str, mix: Mix, metric: Metric) -> AgentArm {
        AgentArm {
            name: name.to_owned(),
            agent: agent.clone(),
            lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: CORE }],
            workload: workload(mix, Access::Random, BLOCK, self.seed),
            warmup: TURN_WARMUP,
            duration: TURN,
            metric,
            target: None,
            upkeep: None,
            node: None,
        }
    }
}

fn bare(bench: &Bench<'_>) -> Result<SharedAgent, RatioError> {
    let options =
        AgentOptions { cores: vec![CORE], mem_mib: 2048, hugepages: bench.options.hugepages, node: None, ..AgentOptions::default() };
    let mut agent = Agent::start(&bench.lab.program("penstock-perf")?, &options, &bench.lab.path("bare.log"))?;
    agent.rpc("bdev_malloc_create", &json!({"name": "Bare", "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
    agent.rpc("bdev_null_create", &json!({"name": "Null", "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
    for (base, name) in [("Bare", "PassMalloc"), ("Null", "PassNull")] {
        agent.rpc("bdev_passthru_create", &json!({"base_bdev_name": base, "name": name}))?;
    }
    Ok(Rc::new(RefCell::new(agent)))
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
        mix: READ_99,
        metric: Metric::OperationsPerSecond,
        gate: Gate::at_least(0.7, 0.85),
        note: "4 KiB random QD32, 99 % read and 1 % write in both arms (an idle volume would drain); volume wholly undrained at each turn's start",
    },
    Case {
        name: WRITES,
        peer: "PassMalloc",
        mix: Mix::WRITE,
        metric: Metric::OperationsPerSecond,
        gate: Gate::at_least(0.5, 0.6),
        note: "4 KiB random write QD32; durability: volatile malloc, acknowledged when in the oplog; working set a third of the oplog, so that overwrites are absorbed there; every turn writes three times the oplog and drains what is left",
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
        let metric = case.metric.available();
        if case.name == READ_INSTRUCTIONS_NULL && metric != case.metric {
            // In time, a device that moves no data is no measure of one that does; in instructions, a copy is few.
            eprintln!("\n[6] {}: not run; this machine shows no instruction counter", case.name);
            continue;
        }
        let instead = if metric == case.metric { "" } else { "; CPU TIME IN PLACE OF INSTRUCTIONS: this machine shows no counters" };
        let bdev = if matches!(case.name, READS_UNDRAINED | WRITES) { &setup.large_volume } else { &setup.volume };
        let mut ours = setup.arm(&setup.agent, bdev, "volume over malloc", case.mix, metric);
        let mut peer = setup.arm(&setup.bare, case.peer, case.peer, case.mix, metric);
        ours.upkeep = match case.name {
            READS_UNDRAINED => Some(Upkeep::Undrained { drive: 2, blocks: UNDRAINED_BLOCKS, fill: setup.fill(bdev) }),
            WRITES => Some(Upkeep::Drain { drives: vec![2], least_bytes: 3 * LARGE_OPLOG_BYTES }),
            _ => None,
        };
        if case.name == WRITES {
            // A turn is void that does not come to that much.
            (ours.duration, peer.duration) = (WRITE_TURN, WRITE_TURN);
        }
        let question = Question {
            name: case.name.to_owned(),
            unit: metric.unit(),
            gate: case.gate,
            control: Control::Spin,
            note: Some(format!("{}{instead}", case.note)),
        };
        bench.compare(question, &mut ours, &mut peer)?;
    }
    Ok(())
}
