//! Benchmark 8: two volumes on two cores against one on one, as a share of how SPDK's own devices scale in the same run.
//!
//! Nothing is shared between cores on our I/O path, so what is missing from 1 is sharing that crept in. The negative control
//! is exactly that: additions to one atomic that both cores use.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::json;

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, Metric, ScalingArm, SharedAgent};
use super::volume::{self, AgentNode, DriveAsk, Undrained};
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::{LaneAsk, TurnAsk};
use crate::handicap::HandicapKind;
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::workload::{Access, Mix, Workload};

const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DEVICE_BYTES: u64 = 768 * MIB;
const OPLOG_BYTES: u64 = 256 * MIB;
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
    bdev: String,
}

fn open(bench: &Bench<'_>) -> Result<(SharedAgent, Vec<CoreVolume>), RatioError> {
    let options =
        AgentOptions { cores: vec![0, 1], mem_mib: 5120, hugepages: bench.options.hugepages, node: Some(bench.lab.subdirectory("node")?) };
    let program = bench.lab.program("penstock-perf")?;
    let mut agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
    for core in [0, 1] {
        for name in [format!("Ours{core}"), format!("Malloc{core}")] {
            agent.rpc("bdev_malloc_create", &json!({"name": name, "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
        }
        let null = json!({"name": format!("Null{core}"), "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK});
        agent.rpc("bdev_null_create", &null)?;
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
            volumes.push(CoreVolume { core, bdev: volume::local_bdev(&mut node, number)? });
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
    let fill = |bdev: &str, core: u32, access: Access, block: u64, bytes: u64| {
        agent.borrow_mut().turn(&TurnAsk {
            lanes: vec![LaneAsk { bdev: bdev.to_owned(), core }],
            workload: workload(Mix::WRITE, access, block, seed),
            warmup: Nanos(0),
            duration: None,
            operations: Some(bytes / block),
            handicap: "none".to_owned(),
        })
    };
    for volume in &volumes {
        fill(&volume.bdev, volume.core, Access::Sequential, 65536, VOLUME_BYTES)?;
        fill(&format!("Malloc{}", volume.core), volume.core, Access::Sequential, 65536, VOLUME_BYTES)?;
    }
    for number in [0, 1] {
        volume::drain(&mut AgentNode(agent.clone()), number).map_err(RatioError::Volume)?;
    }
    for (peer_name, mix) in cases {
        if !bench.wants(&name(peer_name, mix)) {
            continue;
        }
        agent.borrow().wake()?;
        if mix == Mix::WRITE {
            for volume in &volumes {
                fill(&volume.bdev, volume.core, Access::Random, BLOCK, 3 * OPLOG_BYTES)?;
            }
        }
        let arm = |lanes: Vec<LaneAsk>, name: &str, is_volume: bool| AgentArm {
            name: name.to_owned(),
            agent: agent.clone(),
            lanes,
            workload: workload(mix, Access::Random, BLOCK, seed),
            warmup: TURN_WARMUP,
            duration: TURN,
            metric: Metric::OperationsPerSecond,
            target: None,
            undrained: (is_volume && mix == Mix::WRITE).then_some(Undrained { drive: 0, oplog_bytes: OPLOG_BYTES, rpc: None }),
        };
        let lane = |volume: &CoreVolume| LaneAsk { bdev: volume.bdev.clone(), core: volume.core };
        let bare = |volume: &CoreVolume| LaneAsk { bdev: format!("{peer_name}{}", volume.core), core: volume.core };
        let mut ours = ScalingArm {
            one: arm(vec![lane(&volumes[1])], "1 volume", true),
            two: arm(volumes.iter().map(lane).collect(), "2 volumes on 2 cores / 1 on 1", true),
            turns: 0,
        };
        let mut peer = ScalingArm {
            one: arm(vec![bare(&volumes[1])], "1 device", false),
            two: arm(volumes.iter().map(bare).collect(), &format!("2 {} / 1", peer_name.to_lowercase()), false),
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
