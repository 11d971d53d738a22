//! Several penstockd that are each other's peers, one replica of one volume on each, driven by their own calls. A control may take them up later
//! ([`Fleet::begin_control`]).
//!
//! On loopback, or, where links are to be cut, each in a network namespace that the caller made (scripts/chaos.sh): node N is in namespace
//! `PREFIX-N` at 10.77.0.N, and whoever runs this is in one that reaches them all. Not here: loads and what they judge ([`super::paths`]).

use super::cluster::write_key;
use super::control::Control;
use super::house::{LIMIT, TcpDoor, start_answering, try_rpc};
use super::program::{built, words};
use super::turn::Turn;
use super::{Result, failed};
use crate::guest::rpc::call_json;
use crate::guest::target::{Daemon, free_port, signal};
use crate::guest::wait::wait_for;
use penstock_api::id::{ClusterTag, Id, IdParts, Incarnation, NodeNumber, Sequence};
use penstock_api::rpc::{
    BlockSize, ControllerRange, Door, DriveAdd, DriveAddParams, DriveClearFence, DriveClearFenceParams, DriveList, DriveState, Empty,
    ExportAdd, ExportAddParams, GroupInfo, GroupMember, GroupMembers, GroupTransfer, GroupTransferParams, MemberCreate, MemberCreateParams,
    MemberRole, Method, NodeClaim, NodeClaimParams, PeerAddress, PeersSet, PeersSetParams, RpcError, Scrub, ScrubAction, ScrubParams,
    VolumeInfo, VolumeList, VolumeState,
};
use penstock_api::{ByteSize, ClusterId, DriveId, NodeId, ReplicaId, SegmentId, VolumeId};
use serde_json::json;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How a fleet is built.
#[derive(Debug, Clone)]
pub struct Plan {
    pub nodes: usize,
    pub drive: &'static str,
    pub oplog: ByteSize,
    pub volume: ByteSize,
    pub block: BlockSize,
    /// Namespaces' common prefix; links cannot be cut without.
    pub namespaces: Option<String>,
    /// Memory of each node in MiB.
    pub memory: u32,
    /// The node whose drive is memory behind SPDK's delay, gone with its process: see [`Fleet::delay`].
    pub delayed: Option<usize>,
    /// A node that spins: SPDK's own vfio-user initiator reaches no other.
    pub spins: Option<usize>,
}

impl Default for Plan {
    fn default() -> Self {
        let (oplog, volume) = (ByteSize::mib(16), ByteSize::mib(32));
        Plan { nodes: 3, drive: "256MiB", oplog, volume, block: BlockSize::B512, namespaces: None, memory: 512, delayed: None, spins: None }
    }
}

struct Node {
    daemon: Daemon,
    id: NodeId,
    door: SocketAddr,
    peer: SocketAddr,
    root: PathBuf,
}

pub struct Fleet {
    nodes: Vec<Node>,
    plan: Plan,
    control: Option<Control>,
    // After the daemons: they write there.
    dir: tempfile::TempDir,
    _turn: Turn,
}

fn cluster() -> ClusterTag {
    ClusterTag::new(0x66_6c65_6574).expect("48 bits")
}

fn id(sequence: u64) -> Id {
    let (node, sequence) = (NodeNumber::new(0).expect("12 bits"), Sequence::new(sequence).expect("48 bits"));
    Id::from_parts(IdParts { cluster: cluster(), node, incarnation: Incarnation::FIRST, sequence })
}

const DELAYED: &str = "Delayed";
/// As SPDK names what it delays.
const LATENCIES: [&str; 4] = ["p99_read", "p99_write", "avg_read", "avg_write"];

/// What control knows the volume as.
pub const VOLUME_NAME: &str = "fleet";
/// The volume of [`Fleet::make_filler`].
pub const FILLER: &str = "filler";
const VOLUME: u64 = 1;
const SEGMENT: u64 = 2;
const REPLICAS: u64 = 10;
const DRIVES: u64 = 20;

impl Fleet {
    pub fn volume_id() -> VolumeId {
        VolumeId(id(VOLUME))
    }

    /// Starts the nodes, makes them peers and puts one replica of the volume, with its door, on each.
    pub fn new(plan: Plan) -> Result<Self> {
        let turn = Turn::wait()?;
        let dir = tempfile::Builder::new().prefix("penstock-fleet-").tempdir_in("/var/tmp");
        let dir = dir.map_err(|e| failed("temporary directory", e.to_string()))?;
        let key = dir.path().join("cluster.key");
        write_key(&key)?;
        let mut nodes = Vec::new();
        for at in 0..plan.nodes {
            nodes.push(node(&plan, dir.path(), &key, at)?);
        }
        let mut fleet = Fleet { nodes, plan, control: None, dir, _turn: turn };
        for at in 0..fleet.nodes.len() {
            fleet.start(at)?;
        }
        fleet.assemble().map_err(|e| failed(e.to_string(), fleet.last_words()))?;
        Ok(fleet)
    }

    fn assemble(&self) -> Result<()> {
        let peers: Vec<_> = self.nodes.iter().map(|node| PeerAddress { node_id: node.id, address: node.peer }).collect();
        let member = |at: usize| GroupMember {
            member: at as u64 + 1,
            role: MemberRole::Voter,
            replica_id: ReplicaId(id(REPLICAS + at as u64)),
            node_id: self.nodes[at].id,
        };
        let members = GroupMembers { next: self.nodes.len() as u64 + 1, list: (0..self.nodes.len()).map(member).collect() };
        for (at, node) in self.nodes.iter().enumerate() {
            let (cluster_id, node_id, drive_id) = (ClusterId::of(cluster()), node.id, DriveId(id(DRIVES + at as u64)));
            self.call::<NodeClaim>(at, &NodeClaimParams { cluster_id, node_id })?;
            self.call::<PeersSet>(at, &PeersSetParams { peers: peers.clone() })?;
            let spec =
                if self.plan.delayed == Some(at) { self.make_delayed(at)? } else { format!("{}?size={}", self.spec(at), self.plan.drive) };
            let spec = spec.parse().map_err(|e| failed(spec, format!("{e}")))?;
            let oplog_bytes = Some(self.plan.oplog);
            let drive =
                DriveAddParams { spec, drive_id, cluster_id, node_id, stores: Some(1), oplog_bytes, force: false, open_only: false };
            self.call::<DriveAdd>(at, &drive)?;
            let replica = MemberCreateParams {
                volume_id: Self::volume_id(),
                segment_id: SegmentId(id(SEGMENT)),
                replica_id: members.list[at].replica_id,
                name: VOLUME_NAME.parse().map_err(|e| failed("volume name", format!("{e}")))?,
                size_bytes: self.plan.volume,
                block_size: self.plan.block,
                drive_id,
                origin: None,
                members: members.clone(),
            };
            self.call::<MemberCreate>(at, &replica)?;
            let door = Door::Nvmf { address: node.door.ip(), port: node.door.port(), nqn: None };
            // As control deals them out.
            let first = 1 + 4094 * at as u16;
            let controllers = Some(ControllerRange { first, last: first + 4093 });
            self.call::<ExportAdd>(at, &ExportAddParams { volume_id: Self::volume_id(), door, controllers })?;
        }
        Ok(())
    }

    /// Starts a control of which nodes are named n1, n2 and so on, and lets it take up what they have: all of them must be there.
    pub fn begin_control(&mut self) -> Result<()> {
        let each = (1..).zip(&self.nodes).map(|(at, node): (usize, &Node)| {
            format!("n{at}={},peer={},nvmf={}", node.root.join("run/penstockd.sock").display(), node.peer, node.door)
        });
        let mut control = Control::new(self.dir.path(), each)?;
        control.start()?;
        control.run("pool import")?;
        let taken = control.volume(VOLUME_NAME)?.replicas.len();
        if taken != self.nodes.len() {
            return Err(failed("the import", format!("{taken} replicas of {}", self.nodes.len())));
        }
        self.control = Some(control);
        Ok(())
    }

    /// The control that [`Self::begin_control`] began.
    pub fn control(&self) -> &Control {
        self.control.as_ref().expect("it was begun")
    }

    /// What a node's drive is for the command penstock.
    pub fn spec(&self, at: usize) -> String {
        format!("file:{}", self.image(at).display())
    }

    /// A new volume on a node's drive alone that is larger than the drive, and its door.
    pub fn make_filler(&self, at: usize) -> Result<TcpDoor> {
        let (drive, size) = (self.volume(at)?.drive_id, self.plan.drive);
        self.control().run(&format!("volume create {FILLER} {size} --drive {drive}"))?;
        self.control().run(&format!("volume export {FILLER} --nvmf"))?;
        let nqn = self.control().volume(FILLER)?.exports.into_iter().find_map(|export| export.observed?.nqn);
        let nqn = nqn.ok_or_else(|| failed(FILLER, "it has no door"))?.to_string();
        Ok(TcpDoor { address: self.nodes[at].door, nqn })
    }

    /// A blank drive takes the place of a node's, of which nothing is left.
    pub fn renew_drive(&self, at: usize) -> Result<()> {
        let (spec, Plan { drive, oplog, .. }) = (self.spec(at), &self.plan);
        self.control().run(&format!("pool rm {spec} --force"))?;
        self.control().run(&format!("pool add {spec}?size={drive} --node n{} --stores 1 --oplog {}", at + 1, oplog.0)).map(drop)
    }

    /// Reads a node's drive through, and answers how many blocks were bad.
    pub fn scrub(&self, at: usize) -> Result<u64> {
        let drive_id = self.volume(at)?.drive_id;
        let scrub = |action| self.call::<Scrub>(at, &ScrubParams { drive_id, action });
        scrub(ScrubAction::Start)?;
        wait_for("the end of a scrub", LIMIT, || {
            Ok(Some(scrub(ScrubAction::Status)?).filter(|scrub| !scrub.running).map(|scrub| scrub.blocks_bad))
        })
    }

    /// Makes the drive that can be delayed, and answers its spec.
    fn make_delayed(&self, at: usize) -> Result<String> {
        let bytes: ByteSize = self.plan.drive.parse().map_err(|e| failed(self.plan.drive, format!("{e}")))?;
        let name = "Memory";
        self.spdk(at, "bdev_malloc_create", json!({"name": name, "num_blocks": bytes.0 / 4096, "block_size": 4096}))?;
        let kinds = LATENCIES.map(|kind| (format!("{kind}_latency"), json!(0)));
        let mut delay = serde_json::Map::from_iter(kinds);
        delay.extend([("base_bdev_name".into(), json!(name)), ("name".into(), json!(DELAYED))]);
        self.spdk(at, "bdev_delay_create", delay.into())?;
        Ok(format!("bdev:{DELAYED}?power_safe=true"))
    }

    /// The drive of [`Plan::delayed`] answers so much later from here on.
    pub fn delay(&self, by: Duration) -> Result<()> {
        let at = self.plan.delayed.ok_or_else(|| failed("a delay", "no node's drive can be delayed"))?;
        LATENCIES.into_iter().try_for_each(|kind| {
            let params = json!({"delay_bdev_name": DELAYED, "latency_type": kind, "latency_us": by.as_micros() as u64});
            self.spdk(at, "bdev_delay_update_latency", params)
        })
    }

    /// Calls a method of SPDK's own.
    fn spdk(&self, at: usize, method: &str, params: serde_json::Value) -> Result<()> {
        call_json(&self.nodes[at].root.join("run/penstockd.sock"), method, params, LIMIT).map(drop)
    }

    fn call<M: Method>(&self, at: usize, params: &M::Params) -> Result<M::Result> {
        self.rpc::<M>(at, params).map_err(|e| failed(format!("{} at node {}", M::NAME, at + 1), e.to_string()))
    }

    pub fn rpc<M: Method>(&self, at: usize, params: &M::Params) -> std::result::Result<M::Result, RpcError> {
        try_rpc::<M>(&self.nodes[at].root.join("run/penstockd.sock"), params)
    }

    /// Opens one more door of the volume at a node; where it is.
    pub fn open(&self, at: usize, door: Door) -> Result<String> {
        let export = ExportAddParams { volume_id: Self::volume_id(), door, controllers: None };
        Ok(self.call::<ExportAdd>(at, &export)?.address)
    }

    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// The file that is a node's drive.
    pub fn image(&self, at: usize) -> PathBuf {
        self.nodes[at].root.join("drive.img")
    }

    /// Where a node listens for its peers.
    pub fn peer_address(&self, at: usize) -> SocketAddr {
        self.nodes[at].peer
    }

    pub fn node_id(&self, at: usize) -> NodeId {
        self.nodes[at].id
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a node and waits until it answers calls, which is before its drive is open.
    pub fn start(&mut self, at: usize) -> Result<()> {
        let node = &mut self.nodes[at];
        start_answering(&mut node.daemon, &node.root.join("run/penstockd.sock"))
    }

    pub fn is_up(&self, at: usize) -> bool {
        self.nodes[at].daemon.id().is_some()
    }

    pub fn kill(&mut self, at: usize) -> Result<()> {
        self.nodes[at].daemon.kill()
    }

    /// SIGTERM, and it has to end well.
    pub fn stop(&mut self, at: usize) -> Result<()> {
        let daemon = &mut self.nodes[at].daemon;
        daemon.terminate()?;
        let status = daemon.wait_ended(LIMIT)?;
        if status.success() { Ok(()) } else { Err(failed(format!("node {} stopped: {status}", at + 1), daemon.last_words())) }
    }

    /// SIGSTOP (`true`) or SIGCONT.
    pub fn pause(&self, at: usize, still: bool) -> Result<()> {
        let Some(pid) = self.nodes[at].daemon.id() else { return Ok(()) };
        signal(if still { "-STOP" } else { "-CONT" }, pid)
    }

    pub fn can_cut(&self) -> bool {
        self.plan.namespaces.is_some()
    }

    /// What `from` sends to `to` goes nowhere from here on (`true`), or arrives again.
    pub fn cut(&self, from: usize, to: usize, still: bool) -> Result<()> {
        let prefix = self.plan.namespaces.as_ref().ok_or_else(|| failed("a cut link", "the nodes share one network"))?;
        let (space, route) = (format!("{prefix}-{}", from + 1), format!("{}/32", self.nodes[to].peer.ip()));
        run("ip", &["-n", &space, "route", if still { "replace" } else { "del" }, "blackhole", &route])
    }

    /// What a node sends crawls from here on (`true`), to whomever: some hundred blocks a second, and what waits longer than a third of one is lost.
    pub fn slow_link(&self, at: usize, slow: bool) -> Result<()> {
        let prefix = self.plan.namespaces.as_ref().ok_or_else(|| failed("a slow link", "the nodes share one network"))?;
        let space = format!("{prefix}-{}", at + 1);
        let queue = format!("netns exec {space} tc qdisc {} dev eth0 root", if slow { "replace" } else { "del" });
        let rate = if slow { " tbf rate 4mbit burst 64kb latency 300ms" } else { "" };
        let arguments = words(&(queue + rate));
        run("ip", &arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A node's drive refuses every write but to its first 4 MiB from here on (`true`), or takes them again.
    pub fn refuse_writes(&self, at: usize, refused: bool) -> Result<()> {
        let Some(pid) = self.nodes[at].daemon.id() else { return Ok(()) };
        let limit = if refused { "--fsize=4194304:" } else { "--fsize=unlimited:" };
        run("prlimit", &["--pid", &pid.to_string(), limit])
    }

    /// The drive of a node is well again, says an operator: whether it had been fenced. Waits until its member is back.
    pub fn clear_fence(&self, at: usize) -> Result<bool> {
        let drives = self.call::<DriveList>(at, &Empty {})?;
        let Some(fenced) = drives.iter().find(|drive| drive.state == DriveState::Fenced) else { return Ok(false) };
        self.call::<DriveClearFence>(at, &DriveClearFenceParams { drive_id: fenced.drive_id })?;
        let back = wait_for("the member on a drive that was fenced", LIMIT, || Ok(self.group(at).map(drop)));
        back.map_err(|e| failed(e.to_string(), self.last_words()))?;
        Ok(true)
    }

    pub fn volume(&self, at: usize) -> Result<VolumeInfo> {
        let volumes = self.call::<VolumeList>(at, &Empty {})?;
        volumes.into_iter().find(|volume| volume.volume_id == Self::volume_id()).ok_or_else(|| failed("volume", "not there (yet)"))
    }

    /// How a node's member stands; `None` where the node does not answer or the volume is not open.
    pub fn group(&self, at: usize) -> Option<GroupInfo> {
        self.is_up(at).then(|| self.volume(at).ok()).flatten().filter(|volume| volume.state == VolumeState::Serving)?.group
    }

    pub fn leader(&self) -> Option<usize> {
        self.leader_among(0..self.len())
    }

    /// The same without asking the others, of whom one that is paused would not answer.
    pub fn leader_among(&self, mut nodes: impl Iterator<Item = usize>) -> Option<usize> {
        nodes.find(|at| self.group(*at).is_some_and(|group| group.serves))
    }

    pub fn wait_for_leader(&self) -> Result<usize> {
        wait_for("a leader that serves", LIMIT, || Ok(self.leader())).map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Waits until every member has applied what the leader has, and it is the same entry.
    pub fn wait_until_equal(&self) -> Result<()> {
        let mut last = Vec::new();
        let equal = wait_for("all members to have applied the same", LIMIT, || {
            last = (0..self.len()).map(|at| self.group(at).map(|group| (group.part, group.term, group.last, group.applied))).collect();
            let first = last[0];
            Ok(last.iter().all(|one| one.is_some_and(|one| first.is_some_and(|first| one.3 == first.3 && one.2 == one.3))).then_some(()))
        });
        equal.map_err(|e| failed(e.to_string(), format!("{last:?}\n{}", self.last_words())))
    }

    /// Makes the member of a node lead.
    pub fn transfer(&self, to: usize) -> Result<()> {
        wait_for("the transfer", LIMIT, || {
            let Some(leader) = self.leader() else { return Ok(None) };
            if leader == to {
                return Ok(Some(()));
            }
            // Refused while the leader changes: asked again.
            let _ = self.ask_transfer(leader, to);
            Ok(None)
        })
        .map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Asks the member of `leader` once to hand over to that of `to`.
    pub fn ask_transfer(&self, leader: usize, to: usize) -> std::result::Result<(), RpcError> {
        self.rpc::<GroupTransfer>(leader, &GroupTransferParams { volume_id: Self::volume_id(), to: self.nodes[to].id }).map(drop)
    }

    /// The volume's doors, one a node.
    pub fn doors(&self) -> Vec<TcpDoor> {
        let nqn = |at: usize| self.volume(at).ok()?.exports.iter().find_map(|export| export.nqn.clone());
        let nqn = (0..self.len()).find_map(nqn).expect("a volume with a door has a name").to_string();
        self.nodes.iter().map(|node| TcpDoor { address: node.door, nqn: nqn.clone() }).collect()
    }

    pub fn last_words(&self) -> String {
        let each = self.nodes.iter().enumerate().map(|(at, node)| format!("--- node {} ---\n{}\n", at + 1, node.daemon.last_words()));
        each.chain(self.control.as_ref().map(Control::last_words)).collect()
    }
}

fn node(plan: &Plan, dir: &Path, key: &Path, at: usize) -> Result<Node> {
    let root = dir.join(format!("node{}", at + 1));
    std::fs::create_dir(&root).map_err(|e| failed(root.display().to_string(), e.to_string()))?;
    let number = at as u8 + 1;
    let (door, peer) = match &plan.namespaces {
        Some(_) => {
            let ip = IpAddr::V4(Ipv4Addr::new(10, 77, 0, number));
            (SocketAddr::new(ip, 4420), SocketAddr::new(ip, 7700))
        }
        None => {
            let ip = IpAddr::V4(Ipv4Addr::LOCALHOST);
            (SocketAddr::new(ip, free_port()?), SocketAddr::new(ip, free_port()?))
        }
    };
    let shown = root.display();
    let flags = format!(
        "--run-dir {shown}/run --state-dir {shown}/state --no-huge --mem-mib {} --cores {} --poll {} --peer-listen {peer} --cluster-key-file {}",
        plan.memory,
        at % 2,
        if plan.spins == Some(at) { "busy" } else { "adaptive" },
        key.display()
    );
    // The signal of a file limit (see `refuse_writes`) ends a process unless it is ignored, and exec hands that on.
    let ignoring = ["-c", "trap '' XFSZ; exec \"$0\" \"$@\""].map(str::to_owned);
    let (mut program, flags) = (PathBuf::from("/bin/sh"), words(&flags));
    let mut arguments: Vec<_> = ignoring.into_iter().chain([built("penstockd")?.display().to_string()]).chain(flags).collect();
    if let Some(prefix) = &plan.namespaces {
        // It executes the program in its own place, so that the process is penstockd.
        let command = ["netns".into(), "exec".into(), format!("{prefix}-{number}"), program.display().to_string()];
        arguments = command.into_iter().chain(arguments).collect();
        program = "/usr/sbin/ip".into();
    }
    let id = NodeId::of(cluster(), NodeNumber::new(u16::from(number)).expect("12 bits"));
    Ok(Node { daemon: Daemon::new(program, arguments, root.join("log")), id, door, peer, root })
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().map_err(|e| failed(program, e.to_string()))?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() { Ok(()) } else { Err(failed(format!("{program} {}", arguments.join(" ")), said)) }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for node in &mut self.nodes {
            let _ = node.daemon.kill();
        }
        if std::thread::panicking() {
            let keep = std::env::temp_dir().join(format!("penstock-fleet-logs-{}", std::process::id()));
            let _ = std::fs::create_dir_all(&keep);
            for (at, node) in self.nodes.iter().enumerate() {
                let _ = std::fs::copy(node.root.join("log"), keep.join(format!("node{}.log", at + 1)));
            }
            if let Some(control) = &self.control {
                let _ = std::fs::copy(control.log(), keep.join("control.log"));
            }
            eprintln!("logs are kept in {}\n{}", keep.display(), self.last_words());
        }
    }
}
