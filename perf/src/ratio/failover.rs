//! Benchmark 9: how long a host waits for an acknowledgement when the leader is lost, in election timeouts, and whether all that was acknowledged is there.
//!
//! Three penstockd with their defaults but for sleeping between events (there are two cores), drives in files, a client over NVMe/TCP with a path to each
//! ([`super::client`]). The leader is killed, or stopped, or cut off without a word; then all is made whole, and everything acknowledged is read back.

use std::cell::RefCell;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::{Client, Way};
use super::pairs::{Arm, ArmError, Turn};
use super::process::ArmProcess;
use super::spaces::{self, Spaces};
use super::{Bench, Control, Gate, LabError, Question, RatioError};
use crate::group;
use crate::handicap::HandicapKind;
use crate::rpc::RpcClient;
use crate::volume::{self, Node as _};

const NODES: usize = 3;
const MIB: u64 = 1 << 20;
/// Half of it holds all that is written while a node is away, so that it catches up from the log.
const OPLOG_BYTES: u64 = 256 * MIB;
const VOLUME_BYTES: u64 = 32 * MIB;
const MEM_MIB: u32 = 512;
/// The rule: median of ten.
const TIMES_MAX: usize = 10;
/// Acknowledgements before the leader falls, and after it.
const ACKS: u64 = 100;
/// The leader stays away for so long at least: longer than the gap may be.
const AWAY: Duration = Duration::from_millis(1200);
const LIMIT: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Kill,
    Stop,
    Cut,
}

impl Fault {
    fn name(self) -> &'static str {
        match self {
            Self::Kill => "gap, leader killed (SIGKILL)",
            Self::Stop => "gap, leader stopped (SIGSTOP)",
            Self::Cut => "gap, leader black-holed",
        }
    }
}

struct Node {
    /// `None`: killed.
    process: Option<ArmProcess>,
    rpc: Option<RpcClient>,
    program: PathBuf,
    arguments: Vec<String>,
    root: PathBuf,
    door: SocketAddr,
}

struct Fleet {
    nodes: Vec<Node>,
    client: Option<Client>,
    verified: u64,
    // After the processes: they live there.
    spaces: Option<Spaces>,
}

fn free_port() -> Result<u16, RatioError> {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0));
    let port = listener.and_then(|listener| listener.local_addr()).map(|address| address.port());
    port.map_err(|error| RatioError::Volume(format!("no free port on loopback: {error}")))
}

impl Node {
    fn start(&mut self) -> Result<(), String> {
        let text = |error: super::ProcessError| error.to_string();
        let mut process = ArmProcess::start(&self.program, &self.arguments, &self.root.join("log")).map_err(text)?;
        self.rpc = Some(process.rpc(&self.root.join("run/penstockd.sock")).map_err(text)?);
        self.process = Some(process);
        Ok(())
    }

    fn live(&self) -> Result<&ArmProcess, String> {
        self.process.as_ref().ok_or_else(|| "the node does not run".to_owned())
    }
}

impl volume::Node for &mut Node {
    fn call(&mut self, method: &str, params: &Value) -> Result<Value, String> {
        let rpc = self.rpc.as_mut().ok_or("the node does not run")?;
        volume::Node::call(rpc, method, params)
    }
}

fn retry<T>(what: &str, mut probe: impl FnMut() -> Result<Option<T>, String>) -> Result<T, String> {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        if Instant::now() >= deadline {
            return Err(format!("{what}: not within {} s", LIMIT.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Fleet {
    fn open(bench: &Bench<'_>) -> Result<Self, RatioError> {
        let spaces = Spaces::new(NODES);
        if let Err(error) = &spaces {
            eprintln!("\n[9] no network namespaces here (they want root): {error}");
        }
        let spaces = spaces.ok();
        let key = bench.lab.path("cluster.key");
        let io = |source| LabError::Io { path: key.clone(), source };
        std::fs::write(&key, "5a".repeat(32)).map_err(io)?;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).map_err(io)?;
        let mut nodes = Vec::new();
        let mut listens = Vec::new();
        for at in 0..NODES {
            let root = bench.lab.subdirectory(&format!("n{at}"))?;
            let (door, listen) = match &spaces {
                Some(_) => (SocketAddr::new(spaces::address(at), 4420), SocketAddr::new(spaces::address(at), 7700)),
                None => {
                    let loopback = IpAddr::V4(Ipv4Addr::LOCALHOST);
                    (SocketAddr::new(loopback, free_port()?), SocketAddr::new(loopback, free_port()?))
                }
            };
            let shown = root.display();
            let flags = format!(
                "--run-dir {shown}/run --state-dir {shown}/state --no-huge --mem-mib {MEM_MIB} --cores {} --poll adaptive --peer-listen {listen} --cluster-key-file {}",
                at % 2,
                key.display()
            );
            let own = bench.lab.program("penstockd")?;
            let mut arguments: Vec<String> = flags.split(' ').map(str::to_owned).collect();
            let program = match &spaces {
                None => own,
                Some(spaces) => {
                    // It executes the program in its own place, so that the process is penstockd.
                    let command = ["netns".to_owned(), "exec".to_owned(), spaces.of_node(at), own.display().to_string()];
                    arguments = command.into_iter().chain(arguments).collect();
                    "ip".into()
                }
            };
            listens.push(listen);
            nodes.push(Node { process: None, rpc: None, program, arguments, root, door });
        }
        let mut fleet = Self { nodes, client: None, verified: 0, spaces };
        fleet.assemble(&listens).map_err(RatioError::Volume)?;
        Ok(fleet)
    }

    fn assemble(&mut self, listens: &[SocketAddr]) -> Result<(), String> {
        let mut ways = Vec::new();
        for (at, node) in self.nodes.iter_mut().enumerate() {
            node.start()?;
            group::join(&mut &mut *node, at, listens)?;
        }
        for (at, node) in self.nodes.iter_mut().enumerate() {
            let spec = format!("file:{}?size=640MiB", node.root.join("drive.img").display());
            group::create_member(&mut &mut *node, at, NODES, &spec, OPLOG_BYTES, VOLUME_BYTES)?;
            let (first, last) = (1 + 1000 * at, 1000 * (at + 1));
            let door = json!({"kind": "nvmf", "address": node.door.ip(), "port": node.door.port()});
            let params = json!({"volume_id": group::volume_id(), "door": door, "controllers": {"first": first, "last": last}});
            let opened = (&mut *node).call("penstock_export_add", &params)?;
            let nqn = opened["nqn"].as_str().ok_or_else(|| format!("no nqn in {opened}"))?.to_owned();
            ways.push(Way { address: node.door, nqn });
        }
        self.client = Some(Client::new(ways));
        self.settle().map(drop)
    }

    fn calls(&mut self) -> Vec<&mut Node> {
        self.nodes.iter_mut().collect()
    }

    /// Waits until somebody leads and all have carried out the same; who leads.
    fn settle(&mut self) -> Result<usize, String> {
        let mut nodes = self.calls();
        let leader = retry("a leader that serves", || {
            for (at, node) in nodes.iter_mut().enumerate() {
                // A node that is only starting refuses the question.
                if group::standing(node).is_ok_and(|standing| standing.serves) {
                    return Ok(Some(at));
                }
            }
            Ok(None)
        })?;
        group::await_equal(&mut nodes)?;
        Ok(leader)
    }

    fn strike(&mut self, fault: Fault, at: usize) -> Result<(), String> {
        let node = &mut self.nodes[at];
        match (fault, &self.spaces) {
            (Fault::Kill, _) => {
                node.rpc = None;
                drop(node.process.take());
                Ok(())
            }
            (Fault::Stop, _) => node.live()?.rest().map_err(|error| error.to_string()),
            (Fault::Cut, Some(spaces)) => spaces.cut(at, true).map_err(|error| error.to_string()),
            (Fault::Cut, None) => Err("no network namespaces".to_owned()),
        }
    }

    fn heal(&mut self, fault: Fault, at: usize) -> Result<(), String> {
        match (fault, &self.spaces) {
            (Fault::Kill, _) => self.nodes[at].start(),
            (Fault::Stop, _) => self.nodes[at].live()?.wake().map_err(|error| error.to_string()),
            (Fault::Cut, Some(spaces)) => spaces.cut(at, false).map_err(|error| error.to_string()),
            (Fault::Cut, None) => Ok(()),
        }
    }

    /// Lets the leader fall under a client that writes; gives the client's longest wait. `others_still`: the others stand still for so long at
    /// the same time.
    fn fall(&mut self, fault: Fault, others_still: Duration) -> Result<(Duration, u64), String> {
        let leader = self.settle()?;
        let mut client = self.client.take().expect("made with the fleet");
        let (stop, acks) = (AtomicBool::new(false), AtomicU64::new(0));
        let count = || acks.load(Ordering::Relaxed);
        // Opened here: the thread can borrow no namespaces beside the fleet.
        let space = self.spaces.as_ref().map(Spaces::door).transpose().map_err(|error| error.to_string())?;
        let (client, gap, struck) = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let entered = space.as_ref().map_or(Ok(()), spaces::enter).map_err(|error| error.to_string());
                let gap = entered.and_then(|()| client.write_until(&stop, &acks));
                stop.store(true, Ordering::Relaxed);
                (client, gap)
            });
            let more = |than: u64| retry("acknowledgements", || Ok((count() >= than + ACKS || stop.load(Ordering::Relaxed)).then_some(())));
            let struck = (|| {
                more(0)?;
                self.strike(fault, leader)?;
                if !others_still.is_zero() {
                    let others = || self.nodes.iter().enumerate().filter(|(at, _)| *at != leader).map(|(_, node)| node);
                    others().try_for_each(|node| node.live()?.rest().map_err(|error| error.to_string()))?;
                    std::thread::sleep(others_still);
                    others().try_for_each(|node| node.live()?.wake().map_err(|error| error.to_string()))?;
                }
                std::thread::sleep(AWAY);
                more(count())
            })();
            stop.store(true, Ordering::Relaxed);
            let (client, gap) = writer.join().expect("the writer does not panic");
            (client, gap, struck)
        });
        self.client = Some(client);
        struck?;
        let gap = gap?;
        self.heal(fault, leader)?;
        self.settle()?;
        self.verify()?;
        Ok((gap, count()))
    }

    fn verify(&mut self) -> Result<(), String> {
        let mut client = self.client.take().expect("made with the fleet");
        let space = self.spaces.as_ref().map(Spaces::door).transpose().map_err(|error| error.to_string())?;
        let (client, found) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let entered = space.as_ref().map_or(Ok(()), spaces::enter).map_err(|error| error.to_string());
                let found = entered.and_then(|()| client.verify());
                (client, found)
            });
            reader.join().expect("the reader does not panic")
        });
        self.client = Some(client);
        let (good, lost) = found?;
        self.verified += good;
        if lost > 0 { Err(format!("acknowledged writes lost: {lost} of {}", good + lost)) } else { Ok(()) }
    }

    fn pids(&self) -> Vec<u32> {
        self.nodes.iter().filter_map(|node| Some(node.process.as_ref()?.pid())).collect()
    }

    fn last_words(&self) -> String {
        self.nodes
            .iter()
            .enumerate()
            .map(|(at, node)| format!("--- node {at} ---\n{}\n", super::process::tail(&node.root.join("log"), 15)))
            .collect()
    }
}

/// The client's longest wait, in milliseconds. The fleet never rests: there is nobody whose turn it would disturb.
struct GapArm {
    fleet: Rc<RefCell<Fleet>>,
    fault: Fault,
}

impl Arm for GapArm {
    fn name(&self) -> String {
        "longest wait for an acknowledgement".to_owned()
    }

    fn pids(&self) -> Vec<u32> {
        self.fleet.borrow().pids()
    }

    fn turn(&mut self, handicap: HandicapKind) -> Result<Turn, ArmError> {
        let others_still = match handicap {
            HandicapKind::Sleep(nanos) => Duration::from_nanos(nanos),
            _ => Duration::ZERO,
        };
        let mut fleet = self.fleet.borrow_mut();
        let fallen = fleet.fall(self.fault, others_still);
        let (gap, operations) = fallen
            .map_err(|what| ArmError::Failed { arm: self.fault.name().to_owned(), what: format!("{what}\n{}", fleet.last_words()) })?;
        Ok(Turn { value: gap.as_secs_f64() * 1e3, operations, void: None })
    }
}

/// What it is held against.
struct TimeoutArm {
    fleet: Rc<RefCell<Fleet>>,
    ms: f64,
}

impl Arm for TimeoutArm {
    fn name(&self) -> String {
        "election timeout".to_owned()
    }

    fn pids(&self) -> Vec<u32> {
        self.fleet.borrow().pids()
    }

    fn turn(&mut self, _handicap: HandicapKind) -> Result<Turn, ArmError> {
        Ok(Turn { value: self.ms, operations: 1, void: None })
    }
}

pub fn run(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let faults: Vec<Fault> = [Fault::Kill, Fault::Stop, Fault::Cut].into_iter().filter(|fault| bench.wants(fault.name())).collect();
    if faults.is_empty() {
        return Ok(());
    }
    let timeout = penstock_node::config::election_timeout();
    let fleet = Rc::new(RefCell::new(Fleet::open(bench)?));
    let has_spaces = fleet.borrow().spaces.is_some();
    for fault in faults {
        if fault == Fault::Cut && !has_spaces {
            eprintln!("\n[9] {}: not run without network namespaces", fault.name());
            continue;
        }
        let verified = fleet.borrow().verified;
        let gate = Gate::at_most(3.0, 1.7);
        let question = Question {
            name: fault.name().to_owned(),
            unit: "ms",
            gate,
            // The others stand still for so long that no election could make up for it: a gap that is not seen then is never seen.
            control: Control::Fixed(HandicapKind::Sleep((timeout.as_nanos() as f64 * 3.0 * 1.15) as u64)),
            note: None,
        };
        let mut ours = GapArm { fleet: fleet.clone(), fault };
        let mut peer = TimeoutArm { fleet: fleet.clone(), ms: timeout.as_secs_f64() * 1e3 };
        bench.compare_to_constant(question, TIMES_MAX, &mut ours, &mut peer)?;
        let verified = fleet.borrow().verified - verified;
        let network = if has_spaces { "a network namespace each" } else { "one loopback" };
        bench.annotate(format!(
            "acknowledged writes lost: 0; {verified} blocks read back; 4 KiB writes one at a time over NVMe/TCP with a path to each of three penstockd that sleep between events, {network}; durability: files, flushed; election timeout: the least, a member's own is up to 1.6 times that"
        ));
    }
    Ok(())
}
