//! penstockd over a file, as the target of a scenario; and the few calls that make a running penstockd serve a volume,
//! wherever it runs. Not here: penstock-control. A lone penstockd must come back serving by itself, which every
//! [`Target::start`] after the first shows.

use super::acks::BLOCK;
use super::initiator::Namespace;
use super::judge::Recovered;
use super::rpc::{HostLine, Line, call};
use super::target::{Daemon, Door, DoorKind, Identity, Target, free_port};
use super::wait::wait_for;
use super::{At, GuestError, Result};
use penstock_api::id::{ClusterTag, Id, IdParts, Incarnation, NodeNumber, Sequence};
use penstock_api::rpc::{
    BlockSize, Door as ApiDoor, DriveAdd, DriveAddParams, DriveList, DriveRemove, DriveRemoveParams, DriveState, Empty, ExportAdd,
    ExportAddParams, ExportInfo, ExportRemove, ExportRemoveParams, NodeClaim, NodeClaimParams, NodeGet, VolumeCreate, VolumeCreateParams,
    VolumeList, VolumeState,
};
use penstock_api::{ByteSize, ClusterId, DriveId, NodeId, ReplicaId, SegmentId, VolumeId};
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LIMIT: Duration = Duration::from_secs(60);

/// Ids of the one cluster, node, drive and volume that guest tests have.
#[derive(Debug, Clone, Copy)]
pub struct TestIds {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub drive: DriveId,
    pub volume: VolumeId,
    pub segment: SegmentId,
    pub replica: ReplicaId,
}

impl TestIds {
    pub fn new() -> Self {
        let cluster = ClusterTag::new(0x0067_7565_7374).expect("48 bits");
        let node = NodeNumber::new(1).expect("12 bits");
        let id = |sequence| {
            let sequence = Sequence::new(sequence).expect("48 bits");
            Id::from_parts(IdParts { cluster, node, incarnation: Incarnation::FIRST, sequence })
        };
        TestIds {
            cluster: ClusterId::of(cluster),
            node: NodeId::of(cluster, node),
            drive: DriveId(id(1)),
            volume: VolumeId(id(2)),
            segment: SegmentId(id(3)),
            replica: ReplicaId(id(4)),
        }
    }
}

impl Default for TestIds {
    fn default() -> Self {
        Self::new()
    }
}

/// The program `name` beside the test's own executable, or in `$PENSTOCK_BIN_DIR`.
pub fn built_program(name: &str) -> Result<PathBuf> {
    let dir = match std::env::var_os("PENSTOCK_BIN_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => {
            let own = std::env::current_exe().at("find", Path::new("the test's own executable"))?;
            // target/release/deps/test-hash
            own.ancestors().nth(2).unwrap_or(Path::new("/")).to_owned()
        }
    };
    let program = dir.join(name);
    if program.is_file() {
        Ok(program)
    } else {
        let remedy = "build the workspace with cargo build --release, or set PENSTOCK_BIN_DIR".into();
        Err(GuestError::Missing { what: format!("{name} in {}", dir.display()), remedy })
    }
}

/// Waits until penstockd answers at all.
pub fn wait_for_node(line: &mut dyn Line, limit: Duration) -> Result<()> {
    let mut last = String::new();
    let answered = wait_for("penstockd to answer", limit, || match call::<NodeGet>(line, &Empty {}) {
        Ok(_) => Ok(Some(())),
        Err(why) => {
            last = why.to_string();
            Ok(None)
        }
    });
    answered.map_err(|e| GuestError::failed(e.to_string(), last))
}

/// Claims the node and adds `spec` as its drive; formats a blank one unless `open_only`.
pub fn add_drive(line: &mut dyn Line, spec: &str, open_only: bool) -> Result<()> {
    let ids = TestIds::new();
    call::<NodeClaim>(line, &NodeClaimParams { cluster_id: ids.cluster, node_id: ids.node })?;
    let spec = spec.parse().map_err(|e| GuestError::failed(format!("drive {spec}"), format!("{e}")))?;
    let params = DriveAddParams {
        spec,
        drive_id: ids.drive,
        cluster_id: ids.cluster,
        node_id: ids.node,
        stores: None,
        oplog_bytes: Some(OPLOG),
        force: false,
        open_only,
    };
    call::<DriveAdd>(line, &params).map(drop)
}

/// Small, so that a test goes round it.
const OPLOG: ByteSize = ByteSize::mib(8);

pub fn create_volume(line: &mut dyn Line, size: u64) -> Result<()> {
    let ids = TestIds::new();
    let params = VolumeCreateParams {
        volume_id: ids.volume,
        segment_id: ids.segment,
        replica_id: ids.replica,
        name: "guest".parse().map_err(|e| GuestError::failed("volume name", format!("{e}")))?,
        size_bytes: ByteSize(size),
        block_size: BlockSize::B4096,
        drive_id: ids.drive,
        origin: None,
    };
    call::<VolumeCreate>(line, &params).map(drop)
}

/// Opens a door to the volume; `port` is for NVMe/TCP.
pub fn export(line: &mut dyn Line, kind: DoorKind, port: u16) -> Result<()> {
    let door = match kind {
        DoorKind::NvmfTcp => ApiDoor::Nvmf { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port, nqn: None },
        DoorKind::VhostUserBlk => ApiDoor::Vhost { name: None },
    };
    call::<ExportAdd>(line, &ExportAddParams { volume_id: TestIds::new().volume, door, controllers: None }).map(drop)
}

/// Waits until the drive's recovery has brought the volume back; an error as soon as it is over without one.
pub fn wait_for_volume(line: &mut dyn Line, limit: Duration) -> Result<()> {
    wait_for("the volume to be recovered", limit, || {
        // in this order: what a drive that has done opening holds is listed
        let drives = call::<DriveList>(line, &Empty {})?;
        let volumes = call::<VolumeList>(line, &Empty {})?;
        if volumes.iter().any(|v| v.state == VolumeState::Serving) {
            return Ok(Some(()));
        }
        let opening = drives.iter().any(|d| d.state == DriveState::Opening) || volumes.iter().any(|v| v.state == VolumeState::Opening);
        if opening { Ok(None) } else { Err(GuestError::failed("recovery", format!("no volume serves: {drives:?} {volumes:?}"))) }
    })
}

/// Waits until the volume serves through a door, and answers which.
pub fn wait_for_door(line: &mut dyn Line, limit: Duration) -> Result<Door> {
    let mut last = String::new();
    let found = wait_for("the volume to serve through its door", limit, || match call::<VolumeList>(line, &Empty {}) {
        Ok(volumes) => {
            last = format!("{volumes:?}");
            let serving = volumes.into_iter().find(|v| v.state == VolumeState::Serving);
            Ok(serving.and_then(|v| v.exports.into_iter().find(is_open)))
        }
        Err(why) => {
            last = why.to_string();
            Ok(None)
        }
    });
    found.map_err(|e| GuestError::failed(e.to_string(), last)).and_then(|export| door_of(&export))
}

/// A door that is listed and not open yet has neither address nor NQN.
fn is_open(export: &ExportInfo) -> bool {
    !export.address.is_empty() && (export.nqn.is_some() || !matches!(export.door, ApiDoor::Nvmf { .. }))
}

fn door_of(export: &ExportInfo) -> Result<Door> {
    match &export.door {
        ApiDoor::Nvmf { port, .. } => {
            let nqn = export.nqn.as_ref().ok_or_else(|| GuestError::failed("export", "an NVMe/TCP door without an NQN"))?;
            Ok(Door::NvmfTcp { port: *port, nqn: nqn.to_string() })
        }
        ApiDoor::Vhost { .. } => Ok(Door::VhostUserBlk { socket: PathBuf::from(&export.address) }),
        ApiDoor::VfioUser { .. } | ApiDoor::Local => Err(GuestError::failed("export", "a door that no guest here uses")),
    }
}

/// Flags of a penstockd of its own below `dir`; `poll` is busy or adaptive.
pub fn flags(dir: &str, poll: &str) -> Vec<String> {
    let flags = format!("--run-dir {dir}/run --state-dir {dir}/state --cores 0 --poll {poll}");
    flags.split(' ').map(str::to_owned).collect()
}

/// A penstockd process of this host, without drives until it is given some.
pub struct PenstockNode {
    daemon: Daemon,
    line: HostLine,
}

impl PenstockNode {
    /// Sockets, state and log go to `dir`. Does not start.
    pub fn new(dir: &Path) -> Result<Self> {
        let mut arguments = flags(&dir.display().to_string(), "adaptive");
        arguments.push("--no-huge".into());
        let daemon = Daemon::new(built_program("penstockd")?, arguments, dir.join("penstockd.log"));
        Ok(PenstockNode { daemon, line: HostLine { socket: dir.join("run/penstockd.sock") } })
    }

    /// Starts it and waits until it answers.
    pub fn start(&mut self) -> Result<()> {
        self.daemon.start()?;
        let PenstockNode { daemon, line } = self;
        let mut last = String::new();
        let answered = wait_for("penstockd to answer", LIMIT, || {
            daemon.expect_alive()?;
            match call::<NodeGet>(line, &Empty {}) {
                Ok(_) => Ok(Some(())),
                Err(why) => {
                    last = why.to_string(); // the socket of a killed predecessor refuses at first
                    Ok(None)
                }
            }
        });
        answered.map_err(|e| self.explain(GuestError::failed(e.to_string(), last)))
    }

    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    pub fn expect_alive(&mut self) -> Result<()> {
        self.daemon.expect_alive()
    }

    pub fn line(&mut self) -> &mut HostLine {
        &mut self.line
    }

    /// Adds what penstockd logged last.
    pub fn explain(&self, error: GuestError) -> GuestError {
        GuestError::failed(error.to_string(), format!("\n--- penstockd said ---\n{}", self.daemon.last_words()))
    }
}

/// A penstockd on this host with one file drive and one volume.
pub struct PenstockTarget {
    node: PenstockNode,
    drive: String,
    kind: DoorKind,
    volume_size: u64,
    door: Option<Door>,
}

impl PenstockTarget {
    /// Everything goes to `dir`; the drive is created with room for the volume. Does not start.
    pub fn new(dir: &Path, kind: DoorKind, volume_size: u64) -> Result<Self> {
        let drive = format!("file:{}?size={}MiB", dir.join("drive.img").display(), ((volume_size * 3 / 2) >> 20) + 64);
        Ok(PenstockTarget { node: PenstockNode::new(dir)?, drive, kind, volume_size, door: None })
    }

    fn serve(&mut self) -> Result<()> {
        let line = self.node.line();
        if self.door.is_none() {
            add_drive(line, &self.drive, false)?;
            create_volume(line, self.volume_size)?;
            let port = if self.kind == DoorKind::NvmfTcp { free_port()? } else { 0 };
            export(line, self.kind, port)?;
        }
        self.door = Some(wait_for_door(line, LIMIT)?);
        Ok(())
    }
}

impl Target for PenstockTarget {
    fn start(&mut self) -> Result<()> {
        self.node.start()?;
        self.serve().map_err(|e| self.node.explain(e))
    }

    fn kill(&mut self) -> Result<()> {
        self.node.kill()
    }

    fn door(&self) -> Door {
        self.door.clone().expect("a target has its door once it was started")
    }

    fn identity(&self) -> Identity {
        Identity { write_cache: "write through", logical_block_size: 4096, discard: true, write_zeroes: true }
    }
}

/// One penstockd that is given rebuilt drive images one after another, and shows what it recovered from each.
pub struct Recoverer {
    node: PenstockNode,
    port: u16,
}

impl Recoverer {
    pub fn start(dir: &Path) -> Result<Self> {
        let mut node = PenstockNode::new(dir)?;
        node.start()?;
        Ok(Recoverer { node, port: free_port()? })
    }

    /// Has the image opened, reads `blocks` blocks of 4 KiB from the start of the volume, and lets the image go.
    /// An error only if penstockd itself is gone; what it says no to is [`Recovered::Refused`].
    pub fn read(&mut self, image: &Path, blocks: u64) -> Result<Recovered> {
        let opened = self.try_read(image, blocks);
        let detached = self.detach();
        match (opened, detached) {
            (Ok(bytes), Ok(())) => Ok(Recovered::Volume(bytes)),
            (Ok(_), Err(e)) => Err(self.node.explain(e)),
            (Err(why), _) => {
                self.node.expect_alive().map_err(|e| self.node.explain(e))?;
                Ok(Recovered::Refused(why.to_string()))
            }
        }
    }

    /// Lets go of volume and drive, if there are any.
    fn detach(&mut self) -> Result<()> {
        let ids = TestIds::new();
        let line = self.node.line();
        let door = ApiDoor::Nvmf { address: IpAddr::V4(Ipv4Addr::LOCALHOST), port: self.port, nqn: None };
        call::<ExportRemove>(line, &ExportRemoveParams { volume_id: ids.volume, door, force: true })?;
        call::<DriveRemove>(line, &DriveRemoveParams { drive_id: ids.drive, force: true }).map(drop)
    }

    fn try_read(&mut self, image: &Path, blocks: u64) -> Result<Vec<u8>> {
        let port = self.port;
        let line = self.node.line();
        add_drive(line, &format!("file:{}", image.display()), true)?;
        wait_for_volume(line, LIMIT)?;
        export(line, DoorKind::NvmfTcp, port)?;
        let Door::NvmfTcp { port, nqn } = wait_for_door(line, LIMIT)? else {
            return Err(GuestError::failed("the door of a recovered volume", "not NVMe/TCP, as was asked"));
        };
        Namespace::connect(([127, 0, 0, 1], port).into(), &nqn)?.read(0, blocks as usize * BLOCK)
    }
}
