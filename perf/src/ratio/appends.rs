//! Benchmark 4: how much of a device's sequential bandwidth the oplog turns into acknowledged writes, one replica.
//!
//! Ours: random writes of 64 KiB and 4 KiB at depth 64 to a volume, in process. Peer: stock bdevperf writing 128 KiB in
//! sequence to a device of the same kind. One polling core each, the same one; the arm whose turn it is not is stopped.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Value, json};

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, AgentNode, BdevperfArm, Metric, SharedAgent, Upkeep};
use super::process::ArmProcess;
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::{LaneAsk, TurnAsk};
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::volume::{self, DriveAsk};
use crate::workload::{Access, Mix, Workload};

const CORE: u32 = 1;
const MIB: u64 = 1 << 20;
/// The device of either arm.
const DEVICE_BYTES: u64 = 1024 * MIB;
const BLOCK: u64 = 4096;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Media {
    Malloc,
    Uring,
}

impl Media {
    fn name(self) -> &'static str {
        match self {
            Self::Malloc => "malloc",
            Self::Uring => "uring",
        }
    }

    fn durability(self) -> &'static str {
        match self {
            Self::Malloc => "durability: volatile malloc, no barrier in either arm",
            // A flush reaches the file, so that we send it whatever the operator declares. The peer cannot: bdev_uring has none.
            Self::Uring => "durability: we flush the file after each batch before it is acknowledged, the peer never",
        }
    }

    fn oplog_bytes(self) -> u64 {
        match self {
            Self::Malloc => 256 * MIB,
            // A disk writes three times this within a turn; it does not do so with a memory-sized log.
            Self::Uring => 128 * MIB,
        }
    }

    /// Written over and over: an eighth of the oplog, so that most writes are overwritten in the log and what is measured is
    /// appending. What is left is still drained within each turn. (Benchmark 6 measures writes with their whole drain.)
    fn volume_bytes(self) -> u64 {
        self.oplog_bytes() / 8
    }

    /// Seconds of a turn.
    fn seconds(self) -> u32 {
        match self {
            Self::Malloc => 1,
            Self::Uring => 2,
        }
    }

    /// The call that makes the device.
    fn create(self, bench: &Bench<'_>, owner: &str) -> Result<(&'static str, Value), RatioError> {
        Ok(match self {
            Self::Malloc => ("bdev_malloc_create", json!({"name": "Media", "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK})),
            Self::Uring => {
                let file = bench.lab.full_file(&format!("{owner}.img"), DEVICE_BYTES)?;
                ("bdev_uring_create", json!({"name": "Media", "filename": file, "block_size": BLOCK}))
            }
        })
    }
}

fn gate(media: Media, block: u64) -> Gate {
    match (media, block) {
        (Media::Malloc, 4096) => Gate::at_least(0.5, 0.70),
        (Media::Malloc, _) => Gate::at_least(0.75, 0.85),
        (Media::Uring, 4096) => Gate::at_least(0.8, 0.93),
        (Media::Uring, _) => Gate::at_least(0.9, 0.97),
    }
}

fn workload(block: u64, seed: u64) -> Workload {
    Workload {
        seed,
        block_size: ByteCount(block),
        mix: Mix::WRITE,
        access: Access::Random,
        depth: 64,
        range_offset: ByteOffset(0),
        range_length: None,
    }
}

/// Allocates the whole volume, so that turns measure the steady state and not first writes.
fn fill(agent: &SharedAgent, bdev: &str, bytes: u64, seed: u64) -> Result<(), RatioError> {
    let ask = TurnAsk {
        lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: CORE }],
        workload: Workload { access: Access::Sequential, ..workload(65536, seed) },
        warmup: Nanos(0),
        duration: None,
        operations: Some(bytes / 65536),
        rate: None,
        handicap: "none".to_owned(),
    };
    agent.borrow_mut().turn(&ask)?;
    Ok(())
}

fn bdevperf(bench: &Bench<'_>, media: Media) -> Result<BdevperfArm, RatioError> {
    let (method, params) = media.create(bench, "peer")?;
    let config = json!({"subsystems": [{"subsystem": "bdev", "config": [{"method": method, "params": params}]}]});
    let (path, socket) = (bench.lab.path("bdevperf.json"), bench.lab.path("bdevperf.sock"));
    let io = |source| super::LabError::Io { path: path.clone(), source };
    std::fs::write(&path, config.to_string()).map_err(io)?;
    let mut arguments: Vec<String> =
        ["-z", "-q", "64", "-o", "131072", "-w", "write", "-t", "1", "-m", "0x2", "--disable-cpumask-locks", "-s", "3072", "-r"]
            .map(str::to_owned)
            .to_vec();
    arguments.extend([socket.display().to_string(), "-c".to_owned(), path.display().to_string()]);
    if !bench.options.hugepages {
        arguments.push("--no-huge".to_owned());
    }
    let program = bench.lab.peer("build/examples/bdevperf")?;
    let mut process = ArmProcess::start(&program, &arguments, &bench.lab.path("bdevperf.log"))?;
    let rpc = process.rpc(&socket)?;
    Ok(BdevperfArm {
        name: format!("bdevperf 128 KiB sequential write, {}", media.name()),
        process,
        rpc,
        seconds: media.seconds(),
        metric: Metric::BytesPerSecond,
    })
}

pub fn run(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    for media in [Media::Malloc, Media::Uring] {
        let name = |block: u64| format!("append {} KiB, {}", block >> 10, media.name());
        if ![65536, 4096].iter().any(|block| bench.wants(&name(*block))) {
            continue;
        }
        let options = AgentOptions {
            cores: vec![CORE],
            mem_mib: 3072,
            hugepages: bench.options.hugepages,
            node: Some(bench.lab.subdirectory(&format!("node-{}", media.name()))?),
            ..AgentOptions::default()
        };
        let program = bench.lab.program("penstock-perf")?;
        let agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
        let agent: SharedAgent = Rc::new(RefCell::new(agent));
        let spec = match media {
            Media::Malloc => {
                let (method, params) = media.create(bench, "ours")?;
                agent.borrow_mut().rpc(method, &params)?;
                "bdev:Media?power_safe=true".to_owned()
            }
            // Our own io_uring adapter beside SPDK's, each over a file of its own on the same file system.
            Media::Uring => format!("file:{}", bench.lab.full_file("ours.img", DEVICE_BYTES)?.display()),
        };
        let mut node = AgentNode(agent.clone());
        let bdev = (|| {
            volume::claim(&mut node)?;
            volume::add_drive(&mut node, &DriveAsk { number: 1, spec: &spec, stores: 1, oplog_bytes: media.oplog_bytes() })?;
            volume::create(&mut node, 1, 1, media.volume_bytes())?;
            volume::local_bdev(&mut node, 1)
        })()
        .map_err(RatioError::Volume)?;
        fill(&agent, &bdev, media.volume_bytes(), bench.options.seed)?;
        agent.borrow().rest()?;
        let mut peer = bdevperf(bench, media)?;
        super::Arm::rest(&mut peer)?;
        for block in [65536, 4096] {
            if !bench.wants(&name(block)) {
                continue;
            }
            agent.borrow().wake()?;
            let mut ours = AgentArm {
                name: format!("volume, {} KiB random write QD64", block >> 10),
                agent: agent.clone(),
                lanes: vec![LaneAsk { bdev: bdev.clone(), core: CORE }],
                workload: workload(block, bench.options.seed),
                warmup: TURN_WARMUP,
                duration: Nanos(TURN.0 * u64::from(media.seconds())),
                metric: Metric::BytesPerSecond,
                target: None,
                upkeep: Some(Upkeep::Drain { drives: vec![1], least_bytes: 3 * media.oplog_bytes() }),
                node: None,
            };
            let question = Question {
                name: name(block),
                unit: Metric::BytesPerSecond.unit(),
                gate: gate(media, block),
                control: Control::Spin,
                note: Some(format!(
                    "{}; writes within an eighth of the oplog's size, so that the log absorbs most of them; each turn writes three times the oplog and drains what is left; in process, one core",
                    media.durability()
                )),
            };
            bench.compare(question, &mut ours, &mut peer)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Limit;

    #[test]
    fn gates_are_those_of_the_table() {
        assert_eq!(gate(Media::Malloc, 65536).pass, Limit::AtLeast(0.75));
        assert_eq!(gate(Media::Malloc, 4096).pass, Limit::AtLeast(0.5));
        assert_eq!(gate(Media::Uring, 65536).goal, Limit::AtLeast(0.97));
        assert_eq!(gate(Media::Uring, 4096).goal, Limit::AtLeast(0.93));
    }
}
