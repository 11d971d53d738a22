//! Several nodes under one control on loopback: what people have, driven by the command penstock alone. For nodes driven by their own calls,
//! or over links that can be cut, see [`super::fleet`].

use super::control::Control;
use super::house::{Commands, LIMIT, TcpDoor, start_answering};
use super::perf;
use super::program::{Outcome, Running, built, words};
use super::turn::Turn;
use super::{Result, failed};
use crate::guest::target::{Daemon, free_port};
use crate::guest::wait::wait_for;
use penstock_api::http::{ReplicaView, VolumeView};
use penstock_api::rpc::GroupPart;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// Memory of each node in MiB: three of them are on a small machine together.
const MEMORY: u32 = 512;

struct Node {
    daemon: Daemon,
    root: PathBuf,
    peer: u16,
    door: u16,
}

/// The volume of [`Cluster::with_volume`].
pub const VOLUME: &str = "v";

/// Nodes are named n1, n2 and so on, and counted from 1 here too.
pub struct Cluster {
    // Ended first, then the directory goes, then another test has its turn.
    nodes: Vec<Node>,
    control: Control,
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
        let each = (1..).zip(&nodes).map(|(at, node): (usize, &Node)| {
            let socket = node.root.join("run/penstockd.sock");
            format!("n{at}={},peer=127.0.0.1:{},nvmf=127.0.0.1:{}", socket.display(), node.peer, node.door)
        });
        let control = Control::new(dir.path(), each)?;
        let mut cluster = Cluster { nodes, control, dir, _turn: turn };
        for at in 1..=count {
            cluster.start(at)?;
        }
        cluster.control.start()?;
        for at in 1..=count {
            let image = cluster.path(&format!("n{at}.img"));
            cluster.did(&format!("pool add file:{}?size={drive} --node n{at} --oplog 128MiB", image.display()));
        }
        Ok(cluster)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// As [`Self::new`] with drives of half a GiB, and with a volume [`VOLUME`] of three replicas that has doors and a leader.
    pub fn with_volume(count: usize, size: &str) -> Result<Self> {
        Self::with_volume_of(count, size, "3")
    }

    /// The same of other replicas, as the command penstock takes them.
    pub fn with_volume_of(count: usize, size: &str, replicas: &str) -> Result<Self> {
        let cluster = Cluster::new(count, "512MiB")?;
        cluster.did(&format!("volume create {VOLUME} --size {size} --replicas {replicas}"));
        cluster.did(&format!("volume export {VOLUME} --nvmf"));
        cluster.wait_for_leader_but(VOLUME, 0)?;
        cluster.settle(VOLUME)?;
        Ok(cluster)
    }

    /// Starts a node and waits until it answers calls, which is before its drive is open.
    pub fn start(&mut self, at: usize) -> Result<()> {
        let node = &mut self.nodes[at - 1];
        start_answering(&mut node.daemon, &node.root.join("run/penstockd.sock"))
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
        self.control.start().map_err(|e| failed(e.to_string(), self.last_words()))
    }

    pub fn commands(&self) -> Commands {
        self.control.commands()
    }

    /// Runs the command penstock, which has to succeed.
    #[track_caller]
    pub fn did(&self, command: &str) -> Outcome {
        self.control.run(command).unwrap_or_else(|e| panic!("{e}\n{}", self.last_words()))
    }

    /// Runs the command penstock, which has to refuse, and to say `why`.
    #[track_caller]
    pub fn refused(&self, command: &str, why: &str) {
        let outcome = self.commands().run(command).unwrap_or_else(|e| panic!("penstock {command}: {e}"));
        assert!(outcome.code == Some(1) && outcome.err.contains(why), "penstock {command}: {}", outcome.said());
    }

    pub fn volume(&self, name: &str) -> Result<VolumeView> {
        self.control.volume(name)
    }

    /// The nodes that have a replica of a volume, in order.
    pub fn nodes_of(&self, name: &str) -> Result<Vec<usize>> {
        nodes_of(&self.volume(name)?)
    }

    /// Those of them whose replica has the volume's data.
    pub fn data_nodes_of(&self, name: &str) -> Result<Vec<usize>> {
        let mut volume = self.volume(name)?;
        volume.replicas.retain(|replica| !replica.log_only);
        nodes_of(&volume)
    }

    /// The node whose replica leads, as control sees it.
    pub fn leader(&self, name: &str) -> Option<usize> {
        let volume = self.volume(name).ok()?;
        let leads = |replica: &&ReplicaView| replica.reachable && replica.part == Some(GroupPart::Leader);
        number(&volume.replicas.iter().filter(leads).max_by_key(|replica| replica.term)?.node).ok()
    }

    /// Writes that a replica of a node that is there has carried out for hosts: of the one that has most.
    pub fn answered(&self, name: &str) -> Result<u64> {
        let volume = self.volume(name)?;
        let there = volume.replicas.iter().filter(|replica| replica.reachable).filter_map(|replica| replica.observed.as_ref());
        Ok(there.map(|seen| seen.counters.writes).max().unwrap_or(0))
    }

    /// Waits until a node leads that is not `other` (0: any).
    pub fn wait_for_leader_but(&self, name: &str, other: usize) -> Result<usize> {
        let found = wait_for("another leader", LIMIT, || Ok(self.leader(name).filter(|leader| *leader != other)));
        found.map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Waits until control sees that these nodes are away.
    pub fn wait_until_away(&self, nodes: &[usize]) -> Result<()> {
        let are_away = || Ok(nodes.iter().all(|at| self.control.nodes().is_ok_and(|seen| !seen[at - 1].reachable)).then_some(()));
        wait_for("control to see who is away", LIMIT, are_away).map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Waits until a node that is there shows its replica in this part.
    pub fn wait_for_part(&self, name: &str, at: usize, part: GroupPart) -> Result<()> {
        let node = format!("n{at}");
        let shows = |replica: &ReplicaView| replica.node == node && replica.reachable && replica.part == Some(part);
        let shown = wait_for(&format!("the replica on {node}: {}", part.word()), LIMIT, || {
            Ok(self.volume(name)?.replicas.iter().any(shows).then_some(()))
        });
        shown.map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Waits until all replicas are well and have applied the same, and desired and observed agree on all nodes.
    pub fn settle(&self, name: &str) -> Result<()> {
        self.settle_nodes(name, &(1..=self.nodes.len()).collect::<Vec<_>>())
    }

    fn settle_nodes(&self, name: &str, those: &[usize]) -> Result<()> {
        let mut last = String::new();
        let settled = wait_for("all replicas to be equal", LIMIT, || {
            let volume = self.volume(name)?;
            let nodes = self.control.nodes()?;
            last = format!("{:?}\n{:?}", volume.replicas, nodes.iter().map(|node| &node.unsettled).collect::<Vec<_>>());
            let applied: Vec<_> = volume.replicas.iter().map(|replica| replica.applied).collect();
            let are_equal = applied.iter().all(|one| one.is_some() && *one == applied[0]);
            let are_well = volume.replicas.iter().all(|replica| replica.reachable && replica.progress.is_settled());
            Ok((are_equal && are_well && those.iter().all(|at| nodes[at - 1].settled)).then_some(()))
        });
        settled.map_err(|e| failed(e.to_string(), format!("{last}\n{}", self.last_words())))
    }

    /// Waits until the replicas are on these nodes, none is on its way, and they are as [`Self::settle`] says.
    pub fn settle_on(&self, name: &str, nodes: &[usize]) -> Result<()> {
        self.arrive_on(name, nodes)?;
        self.settle(name)
    }

    /// The same though other nodes are not there.
    pub fn settle_among(&self, name: &str, nodes: &[usize]) -> Result<()> {
        self.arrive_on(name, nodes)?;
        self.settle_nodes(name, nodes)
    }

    /// Waits until the replicas are on these nodes, and none is on its way.
    pub fn arrive_on(&self, name: &str, nodes: &[usize]) -> Result<()> {
        let mut last = String::new();
        let arrived = wait_for("the replicas to be where they are to be", LIMIT, || {
            let volume = self.volume(name)?;
            last = format!("{:?} {:?}", volume.change, volume.replicas);
            Ok((volume.change.is_none() && nodes_of(&volume)? == nodes).then_some(()))
        });
        arrived.map_err(|e| failed(e.to_string(), format!("{last}\n{}", self.last_words())))
    }

    /// Lets the replica on a node lead.
    pub fn transfer(&self, name: &str, to: usize) -> Result<()> {
        // Refused for a moment, as long as the leader has not heard that a member is whole.
        let led = wait_for("the transfer", LIMIT, || {
            Ok((self.commands().run(&format!("volume transfer {name} --to n{to}"))?.code == Some(0)).then_some(()))
        });
        led.map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// Waits for a load that has no path to a replica's new node, which may come to lead when the machine is busy: leadership is asked back.
    pub fn finish_while_led_by(&self, name: &str, at: usize, running: Running) -> Outcome {
        std::thread::scope(|scope| {
            let load = scope.spawn(|| perf::finish(running));
            while !load.is_finished() {
                let _ = self.commands().run(&format!("volume transfer {name} --to n{at}"));
                std::thread::sleep(std::time::Duration::from_millis(500));
            }
            load.join().expect("it waits alone").unwrap()
        })
    }

    /// Reads what a load's journal promises from each replica with data in turn, which has to lead for it.
    ///
    /// # Errors
    /// What is not as the journal says.
    pub fn verify(&self, name: &str, journal: &Path) -> Result<()> {
        let doors = self.doors(name)?;
        for at in self.data_nodes_of(name)? {
            self.transfer(name, at)?;
            let (is_good, report) = perf::verify_over(&doors[at - 1..at], journal)?;
            println!("n{at}: {report}");
            if !is_good {
                return Err(failed(format!("volume {name} on n{at}"), format!("{report:#}")));
            }
        }
        Ok(())
    }

    /// The doors of some nodes.
    pub fn doors_on(&self, name: &str, nodes: &[usize]) -> Result<Vec<TcpDoor>> {
        let doors = self.doors(name)?;
        Ok(nodes.iter().map(|at| doors[at - 1].clone()).collect())
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
        each.chain([self.control.last_words()]).collect()
    }
}

/// A node's number by its name.
fn number(name: &str) -> Result<usize> {
    let number = name.strip_prefix('n').and_then(|number| number.parse().ok());
    number.ok_or_else(|| failed("a node", format!("{name} is none of ours")))
}

fn nodes_of(volume: &VolumeView) -> Result<Vec<usize>> {
    let mut nodes = volume.replicas.iter().map(|replica| number(&replica.node)).collect::<Result<Vec<_>>>()?;
    nodes.sort_unstable();
    Ok(nodes)
}

/// A key of the right length; that nobody can guess it does not matter on loopback.
pub(super) fn write_key(path: &Path) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let written = file.and_then(|mut file| file.write_all("5a".repeat(32).as_bytes()));
    written.map_err(|e| failed(path.display().to_string(), e.to_string()))
}

fn node(root: PathBuf, key: &Path, at: usize) -> Result<Node> {
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
        for (log, name) in logs.chain([(self.control.log().to_owned(), "control.log".to_owned())]) {
            let _ = std::fs::copy(log, keep.join(name));
        }
        eprintln!("logs are kept in {}\n{}", keep.display(), self.last_words());
    }
}
