//! Several nodes under one control on loopback: what people have, driven by the command penstock alone. For nodes driven by their own calls,
//! or over links that can be cut, see [`super::fleet`].

use super::house::{Commands, LIMIT, TcpDoor, try_rpc};
use super::program::{Outcome, built, words};
use super::turn::Turn;
use super::{Result, failed, http};
use crate::guest::target::{Daemon, free_port};
use crate::guest::wait::wait_for;
use penstock_api::http::{NodeView, ReplicaView, VolumeView};
use penstock_api::rpc::{Empty, GroupPart, NodeGet};
use serde::de::DeserializeOwned;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Memory of each node in MiB: three of them are on a small machine together.
const MEMORY: u32 = 512;

struct Node {
    daemon: Daemon,
    root: PathBuf,
    peer: u16,
    door: u16,
}

/// Nodes are named n1, n2 and so on, and counted from 1 here too.
pub struct Cluster {
    // Ended first, then the directory goes, then another test has its turn.
    nodes: Vec<Node>,
    control: Daemon,
    dir: tempfile::TempDir,
    _turn: Turn,
}

impl Cluster {
    /// Starts so many nodes and their control; each gets a drive `NAME.img` of `drive` bytes, a quarter GiB at the least. Their oplogs keep what a
    /// node misses in some seconds.
    pub fn new(count: usize, drive: &str) -> Result<Self> {
        let turn = Turn::wait()?;
        let dir = tempfile::Builder::new().prefix("penstock-cluster-").tempdir_in("/var/tmp");
        let dir = dir.map_err(|e| failed("temporary directory", e.to_string()))?;
        let key = dir.path().join("cluster.key");
        write_key(&key)?;
        let mut nodes = Vec::new();
        for at in 1..=count {
            nodes.push(node(dir.path().join(format!("n{at}")), &key, at)?);
        }
        let root = dir.path().display();
        let mut flags = words(&format!("--state-dir {root}/control --listen unix:{root}/control.sock --period-ms 100"));
        for (at, node) in (1..).zip(&nodes) {
            let socket = node.root.join("run/penstockd.sock");
            let (peer, door) = (node.peer, node.door);
            flags.extend(["--node".into(), format!("n{at}={},peer=127.0.0.1:{peer},nvmf=127.0.0.1:{door}", socket.display())]);
        }
        let control = Daemon::new(built("penstock-control")?, flags, dir.path().join("control.log"));
        let mut cluster = Cluster { nodes, control, dir, _turn: turn };
        for at in 1..=count {
            cluster.start(at)?;
        }
        cluster.start_control()?;
        for at in 1..=count {
            let image = cluster.path(&format!("n{at}.img"));
            cluster.did(&format!("pool add file:{}?size={drive} --node n{at} --oplog 128MiB", image.display()));
        }
        Ok(cluster)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a node and waits until it answers calls, which is before its drive is open.
    pub fn start(&mut self, at: usize) -> Result<()> {
        let node = &mut self.nodes[at - 1];
        let socket = node.root.join("run/penstockd.sock");
        node.daemon.start()?;
        let daemon = &mut node.daemon;
        let answered = wait_for("penstockd to answer", LIMIT, || {
            daemon.expect_alive()?;
            Ok(try_rpc::<NodeGet>(&socket, &Empty {}).is_ok().then_some(()))
        });
        answered.map_err(|e| failed(e.to_string(), daemon.last_words()))
    }

    /// kill -9.
    pub fn kill(&mut self, at: usize) -> Result<()> {
        self.nodes[at - 1].daemon.kill()
    }

    pub fn kill_control(&mut self) -> Result<()> {
        self.control.kill()
    }

    /// Starts control and waits until it sees all nodes.
    pub fn start_control(&mut self) -> Result<()> {
        self.control.start()?;
        wait_for("control to see all nodes", LIMIT, || {
            self.control.expect_alive()?;
            Ok(self.get::<Vec<NodeView>>("/v1/nodes").is_ok_and(|nodes| nodes.iter().all(|node| node.reachable)).then_some(()))
        })
        .map_err(|e| failed(e.to_string(), self.last_words()))
    }

    pub fn commands(&self) -> Commands {
        Commands::at(&self.path("control.sock"))
    }

    /// Runs the command penstock, which has to succeed.
    #[track_caller]
    pub fn did(&self, command: &str) -> Outcome {
        let outcome = self.commands().run(command).unwrap_or_else(|e| panic!("penstock {command}: {e}"));
        if outcome.code == Some(0) { outcome } else { outcome.expect_ok(&format!("penstock {command}\n{}", self.last_words())) }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let answer = http::request(&self.path("control.sock"), "GET", path, b"", LIMIT)?;
        serde_json::from_slice(&answer.body).map_err(|e| failed(format!("GET {path}"), format!("{e}: {}", answer.text())))
    }

    pub fn volume(&self, name: &str) -> Result<VolumeView> {
        self.get(&format!("/v1/volumes/{name}"))
    }

    /// The node whose replica leads, as control sees it.
    pub fn leader(&self, name: &str) -> Option<usize> {
        let volume = self.volume(name).ok()?;
        let leads = |replica: &&ReplicaView| replica.reachable && replica.part == Some(GroupPart::Leader);
        let leader = volume.replicas.iter().filter(leads).max_by_key(|replica| replica.term)?;
        leader.node.strip_prefix('n')?.parse().ok()
    }

    /// Waits until a node leads that is not `other` (0: any).
    pub fn wait_for_leader_but(&self, name: &str, other: usize) -> Result<usize> {
        let found = wait_for("another leader", LIMIT, || Ok(self.leader(name).filter(|leader| *leader != other)));
        found.map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Waits until all replicas are well and have applied the same, and desired and observed agree on all nodes.
    pub fn settle(&self, name: &str) -> Result<()> {
        let mut last = String::new();
        let settled = wait_for("all replicas to be equal", LIMIT, || {
            let volume = self.volume(name)?;
            let nodes: Vec<NodeView> = self.get("/v1/nodes")?;
            last = format!("{:?}\n{:?}", volume.replicas, nodes.iter().map(|node| &node.unsettled).collect::<Vec<_>>());
            let applied: Vec<_> = volume.replicas.iter().map(|replica| replica.applied).collect();
            let are_equal = applied.iter().all(|one| one.is_some() && *one == applied[0]);
            let are_well = volume.replicas.iter().all(|replica| replica.reachable && replica.progress.is_settled());
            Ok((are_equal && are_well && nodes.iter().all(|node| node.settled)).then_some(()))
        });
        settled.map_err(|e| failed(e.to_string(), format!("{last}\n{}", self.last_words())))
    }

    /// The volume's NVMe/TCP doors, in the order of the nodes.
    pub fn doors(&self, name: &str) -> Result<Vec<TcpDoor>> {
        let volume = self.volume(name)?;
        let nqn = volume.exports.iter().find_map(|export| export.observed.as_ref()?.nqn.clone());
        let nqn = nqn.ok_or_else(|| failed(format!("volume {name}"), format!("no door is open: {:?}", volume.exports)))?;
        let door = |node: &Node| TcpDoor { address: SocketAddr::from(([127, 0, 0, 1], node.door)), nqn: nqn.to_string() };
        Ok(self.nodes.iter().map(door).collect())
    }

    pub fn last_words(&self) -> String {
        let each = self.nodes.iter().zip(1..).map(|(node, at)| format!("--- n{at} ---\n{}\n", node.daemon.last_words()));
        each.chain([format!("--- control ---\n{}\n", self.control.last_words())]).collect()
    }
}

/// A key of the right length; that nobody can guess it does not matter on loopback.
fn write_key(path: &std::path::Path) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all("5a".repeat(32).as_bytes()));
    written.map_err(|e| failed(path.display().to_string(), e.to_string()))
}

fn node(root: PathBuf, key: &std::path::Path, at: usize) -> Result<Node> {
    std::fs::create_dir(&root).map_err(|e| failed(root.display().to_string(), e.to_string()))?;
    let (peer, door) = (free_port()?, free_port()?);
    let shown = root.display();
    let flags = format!(
        "--run-dir {shown}/run --state-dir {shown}/state --no-huge --mem-mib {MEMORY} --cores {} --poll adaptive \
         --peer-listen 127.0.0.1:{peer} --cluster-key-file {}",
        at % 2,
        key.display()
    );
    Ok(Node { daemon: Daemon::new(built("penstockd")?, words(&flags), root.join("log")), root, peer, door })
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let _ = self.control.kill();
        for node in &mut self.nodes {
            let _ = node.daemon.kill();
        }
        if !std::thread::panicking() {
            return;
        }
        let keep = std::env::temp_dir().join(format!("penstock-cluster-logs-{}", std::process::id()));
        let _ = std::fs::create_dir_all(&keep);
        let logs = self.nodes.iter().zip(1..).map(|(node, at)| (node.root.join("log"), format!("n{at}.log")));
        for (log, name) in logs.chain([(self.path("control.log"), "control.log".to_owned())]) {
            let _ = std::fs::copy(log, keep.join(name));
        }
        eprintln!("logs are kept in {}\n{}", keep.display(), self.last_words());
    }
}
