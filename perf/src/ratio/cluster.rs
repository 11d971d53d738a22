//! Three replicas on two cores, ours and SPDK's: what benchmarks 1, 2 and 3 are made of.
//!
//! The same layout for both: three processes of this program. On core 1, polling, the one that has the load and a replica: ours leads the group and opens
//! the volume for its own process, SPDK's has the raid1. On core 0 the two others with a replica each; they sleep between events, since of two processes on one core
//! one may poll at most. What the remote ones run is penstockd's node, or SPDK's own NVMe/TCP target. Media are memory, for all alike ([`crate::memory`]): over
//! SPDK's malloc a process that is to sleep spins.

use std::cell::RefCell;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::rc::Rc;
use std::time::Instant;

use serde_json::{Value, json};

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentNode, Metric, SharedAgent, Spent};
use super::pairs::{Arm, ArmError, Turn};
use super::{Bench, LabError, RatioError};
use crate::agent::{LaneAsk, TurnAnswer, TurnAsk};
use crate::group;
use crate::handicap::HandicapKind;
use crate::target::{Reconnect, Target, bdev_name};
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::workload::{Access, Mix, Workload};

pub const REPLICAS: usize = 3;
const LOAD_CORE: u32 = 1;
const REMOTE_CORE: u32 = 0;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DEVICE_BYTES: u64 = 512 * MIB;
const OPLOG_BYTES: u64 = 32 * MIB;
const VOLUME_BYTES: u64 = 128 * MIB;
/// What a turn writes at least, where it is to bear the cost of draining.
const LEAST_BYTES: u64 = 3 * OPLOG_BYTES;
/// The third replica may be so far behind at a turn's end.
const LAG_MAX: f64 = 4.0 * (1 << 20) as f64;
/// Memory of a process, beside its device.
const MEM_MIB: u32 = 1024;
/// How a write ends that came to a member which does not lead, as the load tells it.
const ELSEWHERE: &str = "NVMe status 3/0x02";
/// Names of devices.
const MEDIA: &str = "Media";
const RAID: &str = "Raid";

/// Processes that are one arm, or two that differ in a delay.
pub struct Cluster {
    /// First the one that has the load.
    agents: Vec<SharedAgent>,
    bdev: String,
    is_ours: bool,
    seed: u64,
}

fn free_address() -> Result<SocketAddr, RatioError> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    listener.and_then(|listener| listener.local_addr()).map_err(|error| RatioError::Volume(format!("no free port on loopback: {error}")))
}

fn start(bench: &Bench<'_>, who: &str, at: usize, options: AgentOptions, late: Nanos) -> Result<SharedAgent, RatioError> {
    let options = AgentOptions {
        cores: vec![if at == 0 { LOAD_CORE } else { REMOTE_CORE }],
        mem_mib: MEM_MIB,
        hugepages: bench.options.hugepages,
        sleeps: at != 0,
        ..options
    };
    let program = bench.lab.program("penstock-perf")?;
    let mut agent = Agent::start(&program, &options, &bench.lab.path(&format!("{who}{at}.log")))?;
    // The raid holds what the volume holds; our drive has room for a log beside it.
    let bytes = if options.node.is_some() { DEVICE_BYTES } else { VOLUME_BYTES };
    agent.memory(MEDIA, bytes, late)?;
    Ok(Rc::new(RefCell::new(agent)))
}

impl Cluster {
    /// Our three nodes. `late`: what each drive takes before it answers.
    pub fn ours(bench: &Bench<'_>, late: Nanos) -> Result<Self, RatioError> {
        let key = bench.lab.path("cluster.key");
        let io = |source| LabError::Io { path: key.clone(), source };
        std::fs::write(&key, "5a".repeat(32)).map_err(io)?;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
        let listens = (0..REPLICAS).map(|_| free_address()).collect::<Result<Vec<_>, _>>()?;
        let mut agents = Vec::new();
        for (at, listen) in listens.iter().enumerate() {
            let node = Some(bench.lab.subdirectory(&format!("node{at}"))?);
            let options = AgentOptions { node, peers: Some((*listen, key.clone())), ..AgentOptions::default() };
            agents.push(start(bench, "ours", at, options, late)?);
        }
        let mut cluster = Self { agents, bdev: String::new(), is_ours: true, seed: bench.options.seed };
        let mut nodes = cluster.nodes();
        let spec = format!("bdev:{MEDIA}?power_safe=true");
        let made = (|| {
            for (at, node) in nodes.iter_mut().enumerate() {
                group::join(node, at, &listens)?;
            }
            for (at, node) in nodes.iter_mut().enumerate() {
                group::create_member(node, at, REPLICAS, &spec, OPLOG_BYTES, VOLUME_BYTES)?;
            }
            group::lead(&mut nodes, 0)?;
            group::local_bdev(&mut nodes[0])
        })();
        cluster.bdev = made.map_err(RatioError::Volume)?;
        cluster.fill()?;
        Ok(cluster)
    }

    /// SPDK's raid1 over its own malloc and two more over NVMe/TCP.
    pub fn raid(bench: &Bench<'_>, late: Nanos) -> Result<Self, RatioError> {
        let mut agents = Vec::new();
        for at in 0..REPLICAS {
            agents.push(start(bench, "raid", at, AgentOptions::default(), late)?);
        }
        let mut legs = vec![MEDIA.to_owned()];
        for at in 1..REPLICAS {
            let target = serve(&agents[at], at, MEDIA)?;
            legs.push(attach(&agents[0], &target, &format!("Leg{at}"))?);
        }
        let raid = json!({"name": RAID, "raid_level": "raid1", "base_bdevs": legs});
        agents[0].borrow_mut().rpc("bdev_raid_create", &raid)?;
        let cluster = Self { agents, bdev: RAID.to_owned(), is_ours: false, seed: bench.options.seed };
        cluster.fill()?;
        Ok(cluster)
    }

    fn nodes(&self) -> Vec<AgentNode> {
        self.agents.iter().map(|agent| AgentNode(agent.clone())).collect()
    }

    fn ask(&self, workload: Workload) -> TurnAsk {
        TurnAsk {
            lanes: vec![LaneAsk { bdev: self.bdev.clone(), core: LOAD_CORE }],
            workload,
            warmup: Nanos(0),
            duration: None,
            operations: None,
            rate: None,
            handicap: "none".to_owned(),
        }
    }

    /// Writes every block once.
    fn fill(&self) -> Result<(), RatioError> {
        const PIECE: u64 = 64 << 10;
        let workload = Workload { block_size: ByteCount(PIECE), access: Access::Sequential, ..workload(self.seed, 8) };
        let ask = TurnAsk { operations: Some(VOLUME_BYTES / PIECE), ..self.ask(workload) };
        self.agents[0].borrow_mut().turn(&ask)?;
        self.drain().map_err(RatioError::Volume)
    }

    /// Nothing is left of what was written but on the media.
    fn drain(&self) -> Result<(), String> {
        if !self.is_ours {
            return Ok(());
        }
        let mut nodes = self.nodes();
        group::await_equal(&mut nodes)?;
        nodes.iter_mut().enumerate().try_for_each(|(at, node)| group::drain(node, at))
    }

    /// The load's process leads, and all replicas are equal: sleep has cost nobody anything that a turn would pay.
    fn settle(&self) -> Result<(), String> {
        if !self.is_ours {
            return Ok(());
        }
        let mut nodes = self.nodes();
        group::lead(&mut nodes, 0)?;
        group::await_equal(&mut nodes)
    }

    /// Entries that the slowest replica has not got yet, and the leader's newest.
    fn lag(&self) -> Result<(u64, u64), String> {
        let mut nodes = self.nodes();
        // The leader last, so that it cannot look behind.
        let mut least = u64::MAX;
        for node in &mut nodes[1..] {
            least = least.min(group::standing(node)?.last);
        }
        let newest = group::standing(&mut nodes[0])?.last;
        Ok((newest.saturating_sub(least), newest))
    }
}

fn workload(seed: u64, depth: u32) -> Workload {
    Workload {
        seed,
        block_size: ByteCount(BLOCK),
        mix: Mix::WRITE,
        access: Access::Random,
        depth,
        range_offset: ByteOffset(0),
        range_length: Some(ByteCount(VOLUME_BYTES)),
    }
}

/// SPDK's target over a process's device, set up as our own doors are.
fn serve(agent: &SharedAgent, at: usize, device: &str) -> Result<Target, RatioError> {
    let (mut agent, port) = (agent.borrow_mut(), free_address()?.port());
    let nqn = format!("nqn.2026-11.io.penstock:bench:leg{at}");
    agent.rpc("nvmf_create_transport", &json!({"trtype": "TCP", "in_capsule_data_size": 8192}))?;
    agent.rpc("nvmf_create_subsystem", &json!({"nqn": nqn, "allow_any_host": true, "serial_number": format!("LEG{at}")}))?;
    agent.rpc("nvmf_subsystem_add_ns", &json!({"nqn": nqn, "namespace": {"bdev_name": device}}))?;
    let listen = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
    agent.rpc("nvmf_subsystem_add_listener", &json!({"nqn": nqn, "listen_address": listen}))?;
    Ok(Target::NvmfTcp { address: "127.0.0.1".to_owned(), port, nqn })
}

fn attach(agent: &SharedAgent, target: &Target, name: &str) -> Result<String, RatioError> {
    let mut agent = agent.borrow_mut();
    let mut last = Value::Null;
    for mut call in target.attach_calls(name, Reconnect { keep_trying_s: 60, delay_s: 1, fail_io_after_s: 0 }, BLOCK as u32) {
        if call.method == "bdev_nvme_set_options" {
            // The arm rests for longer than a keep-alive would allow.
            call.params["keep_alive_timeout_ms"] = json!(3_600_000);
            // They can be set only before the first controller; later ones find them set.
            let _ = agent.rpc(call.method, &call.params);
            continue;
        }
        last = agent.rpc(call.method, &call.params)?;
    }
    bdev_name(&last).ok_or_else(|| RatioError::Volume(format!("attaching {target} answered {last}")))
}

/// What a turn's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Figure {
    /// What an operation costs all processes, with the draining of what it wrote.
    Cost(Metric),
    /// Median latency in nanoseconds, less what the media take.
    MedianLess(Nanos),
    /// 99th percentile in nanoseconds.
    P99,
}

/// A load on a cluster.
pub struct ClusterArm {
    pub name: String,
    pub cluster: Rc<Cluster>,
    pub depth: u32,
    pub rate: Option<f64>,
    pub duration: Nanos,
    pub warmup: Nanos,
    pub figure: Figure,
    /// What each process's media take before they answer.
    pub late: [Nanos; REPLICAS],
    /// A turn below this does not count: the cluster did not show what it was asked to.
    pub least: f64,
}

impl ClusterArm {
    /// `late`: with another delay of all replicas but the load's own, where one is given.
    fn set_delays(&self, late: Option<Nanos>) -> Result<(), String> {
        let delays = self.late.iter().enumerate().map(|(at, own)| late.filter(|_| at != 0).unwrap_or(*own));
        let set = |(agent, late): (&SharedAgent, Nanos)| agent.borrow_mut().memory(MEDIA, 0, late).map_err(|error| error.to_string());
        self.cluster.agents.iter().zip(delays).try_for_each(set)
    }

    fn measure(&self, ask: &TurnAsk) -> Result<Turn, String> {
        let load = || self.cluster.agents[0].borrow_mut().turn(ask).map_err(|error| error.to_string());
        let before = if self.cluster.is_ours { self.cluster.lag()?.1 } else { 0 };
        let mut lag = (0, 0);
        let mut work = || -> Result<TurnAnswer, String> {
            let answer = load()?;
            if self.cluster.is_ours {
                lag = self.cluster.lag()?;
            }
            if matches!(self.figure, Figure::Cost(_)) {
                self.cluster.drain()?;
            }
            Ok(answer)
        };
        let began = Instant::now();
        let done = match self.figure {
            Figure::Cost(metric) => metric.count(&self.pids(), &mut work),
            _ => work().map(|answer| (answer, Spent::default())),
        };
        let (answer, spent) = match done {
            // A leader that others keep from the CPU for an election timeout leads no more: no figure, and no reason to end either.
            Err(text) if self.cluster.is_ours && text.contains(ELSEWHERE) => {
                return Ok(Turn { value: f64::NAN, operations: 0, void: Some("the leader changed") });
            }
            done => done?,
        };
        let span = began.elapsed().as_secs_f64();
        if answer.operations == 0 {
            return Ok(Turn { value: f64::NAN, operations: 0, void: Some("no operation completed in its turn") });
        }
        let value = match self.figure {
            Figure::Cost(metric) => metric.of(answer.operations, answer.operations as f64 / span, answer.bytes as f64 / span, spent),
            Figure::MedianLess(media) => answer.p50_us * 1e3 - media.0 as f64,
            Figure::P99 => answer.p99_us * 1e3,
        };
        let entry_bytes = answer.bytes as f64 / lag.1.saturating_sub(before).max(1) as f64;
        let void = if self.cluster.is_ours && matches!(self.figure, Figure::Cost(_)) && answer.bytes < LEAST_BYTES {
            Some("wrote less than three times the oplog")
        } else if lag.0 as f64 * entry_bytes > LAG_MAX {
            Some("a replica lagged by more than 4 MiB")
        } else if value < self.least {
            Some("the slow replica did not show")
        } else {
            None
        };
        Ok(Turn { value, operations: answer.operations, void })
    }
}

impl Arm for ClusterArm {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn pids(&self) -> Vec<u32> {
        self.cluster.agents.iter().map(|agent| agent.borrow().pid()).collect()
    }

    fn wake(&mut self) -> Result<(), ArmError> {
        let fail = |error: super::ProcessError| ArmError::Failed { arm: self.name.clone(), what: error.to_string() };
        self.cluster.agents.iter().try_for_each(|agent| agent.borrow().wake().map_err(fail))
    }

    fn rest(&mut self) -> Result<(), ArmError> {
        let fail = |error: super::ProcessError| ArmError::Failed { arm: self.name.clone(), what: error.to_string() };
        self.cluster.agents.iter().try_for_each(|agent| agent.borrow().rest().map_err(fail))
    }

    fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError> {
        let fail = |what| ArmError::Failed { arm: self.name.clone(), what };
        // Sleep is of the media: what is put off at all other replicas no quorum can hide.
        let (late, handicap) = match handicap {
            HandicapKind::Sleep(nanos) => (Some(Nanos(nanos)), HandicapKind::None),
            other => (None, other),
        };
        self.set_delays(late).and_then(|()| self.cluster.settle()).map_err(fail)?;
        let workload = workload(self.cluster.seed, self.depth);
        let ask = TurnAsk {
            warmup: self.warmup,
            duration: Some(self.duration),
            rate: self.rate,
            handicap: handicap.to_string(),
            ..self.cluster.ask(workload)
        };
        self.measure(&ask).map_err(fail)
    }
}
