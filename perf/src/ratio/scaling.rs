//! Benchmark 8: two volumes on two cores against one on one, as a share of how SPDK's own devices scale in the same run.
//!
//! Nothing is shared between cores on our I/O path, so what is missing from 1 is sharing that crept in. The negative control
//! is exactly that: additions to one atomic that both cores use.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::json;

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, AgentNode, Metric, ScalingArm, SharedAgent, Upkeep};
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::{LaneAsk, TurnAsk};
use crate::handicap::HandicapKind;
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::volume::{self, DriveAsk};
use crate::workload::{Access, Mix, Workload};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DEVICE_BYTES: u64 = 640 * MIB;
const OPLOG_BYTES: u64 = 128 * MIB;
const VOLUME_BYTES: u64 = 256 * MIB;

fn workload(mix: Mix, access: Access, block: u64, seed: u64) -> Workload {
    Workload {
        seed,
        block_size: ByteCount(block),
        mix,
        access,
        depth: 32,
        range_offset: ByteOffset(0),
        range_length: Some(ByteCount(VOLUME_BYTES)),
    }
}

/// A device per core, named so in the agent, and the volume on it.
struct CoreVolume {
    core: u32,
    drive: u64,
    bdev: String,
}

fn bare(bench: &Bench<'_>) -> Result<SharedAgent, RatioError> {
    let options =
        AgentOptions { cores: vec![0, 1], mem_mib: 2560, hugepages: bench.options.hugepages, node: None, ..AgentOptions::default() };
    let mut agent = Agent::start(&bench.lab.program("penstock-perf")?, &options, &bench.lab.path("bare.log"))?;
    for core in [0, 1] {
        for (method, kind) in [("bdev_malloc_create", "Malloc"), ("bdev_null_create", "Null")] {
            let params = json!({"name": format!("{kind}{core}"), "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK});
            agent.rpc(method, &params)?;
        }
    }
    Ok(Rc::new(RefCell::new(agent)))
}

fn open(bench: &Bench<'_>) -> Result<(SharedAgent, Vec<CoreVolume>), RatioError> {
    let options = AgentOptions {
        cores: vec![0, 1],
        mem_mib: 3072,
        hugepages: bench.options.hugepages,
        node: Some(bench.lab.subdirectory("node")?),
        ..AgentOptions::default()
    };
    let program = bench.lab.program("penstock-perf")?;
    let mut agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
    for core in [0, 1] {
        let name = format!("Ours{core}");
        agent.rpc("bdev_malloc_create", &json!({"name": name, "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
    }
    let agent: SharedAgent = Rc::new(RefCell::new(agent));
    let mut node = AgentNode(agent.clone());
    let mut volumes: Vec<CoreVolume> = Vec::new();
    let made: Result<(), String> = (|| {
        volume::claim(&mut node)?;
        for number in [0, 1] {
            let spec = format!("bdev:Ours{number}?power_safe=true");
            volume::add_drive(&mut node, &DriveAsk { number, spec: &spec, stores: 1, oplog_bytes: OPLOG_BYTES })?;
            let core = volume::create(&mut node, number, number, VOLUME_BYTES)?;
            volumes.push(CoreVolume { core, drive: number, bdev: volume::local_bdev(&mut node, number)? });
        }
        Ok(())
    })();
    made.map_err(RatioError::Volume)?;
    if volumes[0].core == volumes[1].core {
        let text = format!("both volumes live on core {}; the node was to put one on each", volumes[0].core);
        return Err(RatioError::Volume(text));
    }
    volumes.sort_by_key(|volume| volume.core);
    Ok((agent, volumes))
}

pub fn run(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let cases = [("Null", Mix::READ), ("Malloc", Mix::READ), ("Malloc", Mix::WRITE)];
    let name = |peer: &str, mix: Mix| {
        format!("scaling to 2 cores, {}, peer {}", if mix == Mix::READ { "read" } else { "write" }, peer.to_lowercase())
    };
    if !cases.iter().any(|(peer, mix)| bench.wants(&name(peer, *mix))) {
        return Ok(());
    }
    let (agent, volumes) = open(bench)?;
    let seed = bench.options.seed;
    let fill = |agent: &SharedAgent, bdev: &str, core: u32| {
        agent.borrow_mut().turn(&TurnAsk {
            lanes: vec![LaneAsk { bdev: bdev.to_owned(), core }],
            workload: workload(Mix::WRITE, Access::Sequential, 65536, seed),
            warmup: Nanos(0),
            duration: None,
            operations: Some(VOLUME_BYTES / 65536),
            rate: None,
            handicap: "none".to_owned(),
        })
    };
    for volume in &volumes {
        fill(&agent, &volume.bdev, volume.core)?;
        volume::drain(&mut AgentNode(agent.clone()), volume.drive).map_err(RatioError::Volume)?;
    }
    agent.borrow().rest()?;
    let stock = bare(bench)?;
    for volume in &volumes {
        fill(&stock, &format!("Malloc{}", volume.core), volume.core)?;
    }
    for (peer_name, mix) in cases {
        if !bench.wants(&name(peer_name, mix)) {
            continue;
        }
        let arm = |agent: &SharedAgent, lanes: Vec<LaneAsk>, name: &str, drives: Vec<u64>| AgentArm {
            name: name.to_owned(),
            agent: agent.clone(),
            lanes,
            workload: workload(mix, Access::Random, BLOCK, seed),
            warmup: TURN_WARMUP,
            duration: TURN,
            metric: Metric::OperationsPerSecond,
            target: None,
            upkeep: (mix == Mix::WRITE && !drives.is_empty()).then_some(Upkeep::Drain { drives, least_bytes: 3 * OPLOG_BYTES }),
            node: None,
        };
        let lane = |volume: &CoreVolume| LaneAsk { bdev: volume.bdev.clone(), core: volume.core };
        let device = |volume: &CoreVolume| LaneAsk { bdev: format!("{peer_name}{}", volume.core), core: volume.core };
        let mut ours = ScalingArm {
            one: arm(&agent, vec![lane(&volumes[1])], "1 volume", vec![volumes[1].drive]),
            two: arm(
                &agent,
                volumes.iter().map(lane).collect(),
                "2 volumes on 2 cores / 1 on 1",
                volumes.iter().map(|volume| volume.drive).collect(),
            ),
            turns: 0,
        };
        let mut peer = ScalingArm {
            one: arm(&stock, vec![device(&volumes[1])], "1 device", Vec::new()),
            two: arm(&stock, volumes.iter().map(device).collect(), &format!("2 {} / 1", peer_name.to_lowercase()), Vec::new()),
            turns: 0,
        };
        let question = Question {
            name: name(peer_name, mix),
            unit: "× one core",
            gate: Gate::at_least(0.95, 0.99),
            control: Control::Fixed(HandicapKind::Atomic(8)),
            note: Some("4 KiB random, QD32 a core; in process".to_owned()),
        };
        bench.compare(question, &mut ours, &mut peer)?;
    }
    Ok(())
}
