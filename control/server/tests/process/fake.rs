//! A node that is only JSON-RPC: media that survive, and what is open, which does not. It can be killed, slowed,
//! told to refuse, and asked to report every call before and after its effect. Several that share their [`Groups`] are a cluster: a
//! group is led by whoever was asked first, and by another once that one is killed.

use std::collections::BTreeMap;
use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use penstock_api::rpc::*;
use penstock_api::{API_VERSION, ByteSize, ClusterId, DriveId, NodeId, VolumeId};

/// Who leads each volume's group, in which term, and the size that its log says.
pub type Groups = Arc<Mutex<BTreeMap<VolumeId, (NodeId, u64, ByteSize)>>>;

use serde_json::{Value, json};

#[derive(Clone, Debug, Default)]
pub struct Medium {
    pub label: Option<DriveLabel>,
    pub foreign: Option<&'static str>,
    pub no_barrier: bool,
    pub volumes: BTreeMap<VolumeId, VolumeInfo>,
}

#[derive(Default)]
pub struct Inner {
    /// By place; survive the process.
    pub media: BTreeMap<String, Medium>,
    pub incarnation: u64,
    pub claim: Option<(ClusterId, NodeId)>,
    pub peers: Vec<PeerAddress>,
    pub groups: Groups,
    pub open: BTreeMap<DriveId, DriveInfo>,
    pub exports: BTreeMap<VolumeId, Vec<ExportInfo>>,
    pub controllers: BTreeMap<VolumeId, ControllerRange>,
    pub connected: BTreeMap<VolumeId, Vec<String>>,
    /// Refuse this method that many times.
    pub refuse: BTreeMap<&'static str, (u32, RpcError)>,
    /// Say that this method was done, that many times, and do nothing.
    pub pretend: BTreeMap<&'static str, (u32, Value)>,
    pub slow: Duration,
    /// Answer this method so much later than it takes effect.
    pub late: BTreeMap<&'static str, Duration>,
    /// So many looks at its volumes show a group that was recovered as standing still.
    pub standstill: u32,
    pub calls: BTreeMap<String, u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    Before,
    After,
}

type Hook = Box<dyn FnMut(&str, Stage) + Send>;

#[derive(Clone)]
pub struct FakeNode {
    pub inner: Arc<Mutex<Inner>>,
    socket: PathBuf,
    streams: Arc<Mutex<Vec<UnixStream>>>,
    hook: Arc<Mutex<Option<Hook>>>,
    running: Arc<Mutex<Option<Arc<std::sync::atomic::AtomicBool>>>>,
}

impl FakeNode {
    pub fn start(socket: &Path) -> Self {
        Self::start_in(socket, Groups::default())
    }

    pub fn start_in(socket: &Path, groups: Groups) -> Self {
        let node = Self {
            inner: Arc::new(Mutex::new(Inner { groups, ..Inner::default() })),
            socket: socket.to_owned(),
            streams: Arc::default(),
            hook: Arc::default(),
            running: Arc::default(),
        };
        node.run();
        node
    }

    pub fn set_hook(&self, hook: impl FnMut(&str, Stage) + Send + 'static) {
        *self.hook.lock().unwrap() = Some(Box::new(hook));
    }

    /// What a process start does: everything open is gone, the media are as they were.
    pub fn run(&self) {
        let _ = std::fs::remove_file(&self.socket);
        let listener = UnixListener::bind(&self.socket).unwrap();
        let alive = Arc::new(std::sync::atomic::AtomicBool::new(true));
        *self.running.lock().unwrap() = Some(Arc::clone(&alive));
        {
            let mut inner = self.inner.lock().unwrap();
            inner.incarnation += 1;
            inner.claim = None;
            inner.peers.clear();
            inner.open.clear();
            inner.exports.clear();
            inner.connected.clear();
            inner.media.retain(|place, _| !place.starts_with("malloc:"));
        }
        let node = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { return };
                if !alive.load(std::sync::atomic::Ordering::SeqCst) {
                    return;
                }
                node.streams.lock().unwrap().push(stream.try_clone().unwrap());
                let node = node.clone();
                std::thread::spawn(move || node.serve(stream));
            }
        });
    }

    /// As kill -9: connections end, nobody listens.
    pub fn kill(&self) {
        if let Some(alive) = self.running.lock().unwrap().take() {
            alive.store(false, std::sync::atomic::Ordering::SeqCst);
            let _ = UnixStream::connect(&self.socket); // wakes the listener, which then ends
        }
        let _ = std::fs::remove_file(&self.socket);
        {
            let inner = self.inner.lock().unwrap();
            let me = inner.claim.map(|claim| claim.1);
            inner.groups.lock().unwrap().retain(|_, (leader, ..)| Some(*leader) != me);
        }
        for stream in self.streams.lock().unwrap().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn tell(&self, method: &str, stage: Stage) {
        if let Some(hook) = &mut *self.hook.lock().unwrap() {
            hook(method, stage);
        }
    }

    fn serve(&self, stream: UnixStream) {
        let mut out = stream.try_clone().unwrap();
        for request in serde_json::Deserializer::from_reader(stream).into_iter::<Request>() {
            let Ok(request) = request else { return };
            let slow = self.inner.lock().unwrap().slow;
            std::thread::sleep(slow);
            self.tell(&request.method, Stage::Before);
            let answer = self.inner.lock().unwrap().call(&request.method, request.params);
            self.tell(&request.method, Stage::After);
            let late = self.inner.lock().unwrap().late.get(request.method.as_str()).copied();
            std::thread::sleep(late.unwrap_or_default());
            let response = match answer {
                Ok(result) => json!({"jsonrpc": "2.0", "id": request.id, "result": result}),
                Err(error) => json!({"jsonrpc": "2.0", "id": request.id, "error": error}),
            };
            if out.write_all(&serde_json::to_vec(&response).unwrap()).is_err() {
                return;
            }
        }
    }
}

fn refuse<T>(code: ErrorCode, message: impl Into<String>) -> Result<T, RpcError> {
    Err(RpcError::new(code, message))
}

fn answer<M: Method>(params: Option<Value>, act: impl FnOnce(M::Params) -> Result<M::Result, RpcError>) -> Result<Value, RpcError> {
    act(decode_params::<M>(params)?).map(|result| serde_json::to_value(result).unwrap())
}

impl Inner {
    fn call(&mut self, method: &str, params: Option<Value>) -> Result<Value, RpcError> {
        *self.calls.entry(method.to_owned()).or_default() += 1;
        if let Some((left, error)) = self.refuse.get_mut(method)
            && *left > 0
        {
            *left -= 1;
            return Err(error.clone());
        }
        if let Some((left, result)) = self.pretend.get_mut(method)
            && *left > 0
        {
            *left -= 1;
            return Ok(result.clone());
        }
        match method {
            NodeGet::NAME => answer::<NodeGet>(params, |_| Ok(self.info())),
            NodeClaim::NAME => answer::<NodeClaim>(params, |p| self.claim(p)),
            DriveProbe::NAME => answer::<DriveProbe>(params, |p| Ok(self.probe(&p))),
            DriveAdd::NAME => answer::<DriveAdd>(params, |p| self.drive_add(p)),
            DriveRemove::NAME => answer::<DriveRemove>(params, |p| self.drive_remove(p)),
            DriveList::NAME => answer::<DriveList>(params, |_| Ok(self.open.values().cloned().collect())),
            DriveClearFence::NAME => answer::<DriveClearFence>(params, |p| match self.open.get_mut(&p.drive_id) {
                Some(drive) => {
                    (drive.state, drive.reason) = (DriveState::Serving, None);
                    Ok(Empty {})
                }
                None => refuse(ErrorCode::NotFound, "no such drive"),
            }),
            VolumeList::NAME => answer::<VolumeList>(params, |_| {
                let volumes = self.volumes();
                self.standstill = self.standstill.saturating_sub(1);
                Ok(volumes)
            }),
            VolumeCreate::NAME => answer::<VolumeCreate>(params, |p| self.volume_create(p)),
            MemberCreate::NAME => answer::<MemberCreate>(params, |p| self.member_create(p)),
            GroupTransfer::NAME => answer::<GroupTransfer>(params, |p| self.transfer(p)),
            GroupRecover::NAME => answer::<GroupRecover>(params, |p| self.recover(p)),
            PeersSet::NAME => answer::<PeersSet>(params, |p| {
                self.peers = p.peers;
                Ok(Empty {})
            }),
            VolumeDelete::NAME => answer::<VolumeDelete>(params, |p| self.volume_delete(p)),
            VolumeResize::NAME => answer::<VolumeResize>(params, |p| self.volume_resize(p)),
            SnapshotCreate::NAME => answer::<SnapshotCreate>(params, |p| self.snapshot_create(p)),
            SnapshotDelete::NAME => answer::<SnapshotDelete>(params, |p| {
                let Some(volume) = self.volume(p.volume_id) else { return refuse(ErrorCode::NotFound, "no such volume") };
                volume.snapshots.retain(|snapshot| snapshot.snapshot_id != p.snapshot_id);
                Ok(Empty {})
            }),
            ExportAdd::NAME => answer::<ExportAdd>(params, |p| self.export_add(p)),
            ExportRemove::NAME => answer::<ExportRemove>(params, |p| self.export_remove(p)),
            Drain::NAME => answer::<Drain>(params, |_| Ok(DrainInfo { drained_bytes: ByteSize::mib(1), ms: 3 })),
            Scrub::NAME => answer::<Scrub>(params, |p| {
                let running = p.action == ScrubAction::Start;
                Ok(ScrubInfo {
                    drive_id: p.drive_id,
                    running,
                    extents_done: 0,
                    extents_total: 16,
                    blocks_verified: 0,
                    blocks_bad: 0,
                    passes: 0,
                    volumes_bad: vec![],
                })
            }),
            MetricsGet::NAME => answer::<MetricsGet>(params, |_| {
                let points = MetricPoints::Counter(vec![CounterPoint { labels: Labels::new(), value: 42 }]);
                let family = MetricFamily { name: "penstock_fake_calls".to_owned(), help: "Calls".to_owned(), points };
                Ok(MetricsInfo { incarnation: self.incarnation, families: vec![family] })
            }),
            other => Err(RpcError { code: -32601, message: format!("no method {other}"), data: None }),
        }
    }

    fn info(&self) -> NodeInfo {
        NodeInfo {
            cluster_id: self.claim.map(|claim| claim.0),
            node_id: self.claim.map(|claim| claim.1),
            version: "0.0.0-fake".to_owned(),
            api: API_VERSION,
            pid: std::process::id(),
            uptime_s: 1,
            incarnation: self.incarnation,
            cores: vec![CoreInfo { core: 0, busy_fraction: 0.25, stores: 1, volumes: 1 }],
            poll: PollMode::Adaptive,
            no_huge: true,
            spdk: SpdkInfo { version: "none".to_owned(), tree: "none".to_owned() },
            drives: self.open.len() as u32,
            volumes: self.volumes().len() as u32,
            peer_address: None,
            peers: self
                .peers
                .iter()
                .map(|peer| PeerInfo {
                    node_id: peer.node_id,
                    address: peer.address,
                    connected: true,
                    reason: None,
                    incarnation: Some(1),
                    connections: 1,
                    queued_bytes: 0,
                    counters: PeerCounters::default(),
                })
                .collect(),
        }
    }

    fn claim(&mut self, p: NodeClaimParams) -> Result<NodeInfo, RpcError> {
        match self.claim {
            Some(claim) if claim != (p.cluster_id, p.node_id) => refuse(ErrorCode::Conflict, "claimed by another cluster"),
            _ => {
                self.claim = Some((p.cluster_id, p.node_id));
                Ok(self.info())
            }
        }
    }

    fn probe(&self, p: &DriveProbeParams) -> DriveProbeInfo {
        let medium = self.media.get(&p.spec.place());
        let content = match medium {
            Some(Medium { foreign: Some(what), .. }) => DriveContent::Foreign { what: (*what).to_owned(), at: ByteSize(1080) },
            Some(Medium { label: Some(label), .. }) => DriveContent::Ours { label: *label },
            _ => DriveContent::Blank,
        };
        let missing = medium.is_some_and(|medium| medium.no_barrier);
        let barrier = if missing { Barrier::Missing } else { Barrier::Flush };
        DriveProbeInfo { size: ByteSize::gib(1), content, barrier, volatile: p.spec.is_volatile() }
    }

    fn drive_add(&mut self, p: DriveAddParams) -> Result<DriveInfo, RpcError> {
        if self.claim != Some((p.cluster_id, p.node_id)) {
            return refuse(ErrorCode::Conflict, "not claimed by this cluster");
        }
        let medium = self.media.entry(p.spec.place()).or_default();
        if medium.foreign.is_some() && !p.force {
            return refuse(ErrorCode::ForeignData, "foreign");
        }
        match &mut medium.label {
            Some(label) if label.drive_id == p.drive_id => label.incarnation += 1,
            Some(_) if !p.force => return refuse(ErrorCode::Conflict, "carries another label"),
            None if p.open_only => return refuse(ErrorCode::NotFound, "blank"),
            _ => {
                let label = DriveLabel { cluster_id: p.cluster_id, node_id: p.node_id, drive_id: p.drive_id, incarnation: 1 };
                *medium = Medium { label: Some(label), ..Medium::default() };
            }
        }
        let store = StoreInfo {
            quarantined: None,
            store: 0,
            core: 0,
            oplog_bytes: p.oplog_bytes.unwrap_or(ByteSize::mib(64)),
            oplog_used: ByteSize(0),
            undrained_bytes: ByteSize(0),
            extents_total: 16384,
            extents_free: 16000,
            recovery: Some(RecoveryInfo::default()),
        };
        let drive = DriveInfo {
            drive_id: p.drive_id,
            volatile: p.spec.is_volatile(),
            spec: p.spec,
            size: ByteSize::gib(1),
            state: DriveState::Serving,
            reason: None,
            incarnation: medium.label.expect("labelled above").incarnation,
            barrier: Barrier::Flush,
            stores: vec![store],
            counters: DriveCounters::default(),
        };
        self.open.insert(p.drive_id, drive.clone());
        Ok(drive)
    }

    fn medium_of(&mut self, id: DriveId) -> Option<&mut Medium> {
        let place = self.open.get(&id)?.spec.place();
        self.media.get_mut(&place)
    }

    fn drive_remove(&mut self, p: DriveRemoveParams) -> Result<Empty, RpcError> {
        let Some(medium) = self.medium_of(p.drive_id) else { return Ok(Empty {}) };
        if !medium.volumes.is_empty() && !p.force {
            return refuse(ErrorCode::Busy, "volumes live on it");
        }
        let gone: Vec<VolumeId> = medium.volumes.keys().copied().collect();
        for id in gone {
            self.exports.remove(&id);
        }
        self.open.remove(&p.drive_id);
        Ok(Empty {})
    }

    fn volumes(&self) -> Vec<VolumeInfo> {
        let media = self.open.values().filter_map(|drive| self.media.get(&drive.spec.place()));
        let with_exports = |volume: &VolumeInfo| {
            let mut volume = volume.clone();
            volume.exports = self.exports.get(&volume.volume_id).cloned().unwrap_or_default();
            volume.connections = self.connected.get(&volume.volume_id).map_or(0, |hosts| hosts.len() as u32);
            if let (Some(group), Some((_, me))) = (&mut volume.group, self.claim) {
                let mut groups = self.groups.lock().unwrap();
                let (leader, term, size) = *groups.entry(volume.volume_id).or_insert((me, group.term + 1, volume.size_bytes));
                let stands_still = self.standstill > 0 && group.members.list.len() == 1;
                group.serves = leader == me && !stands_still;
                group.part = match group.serves {
                    true => GroupPart::Leader,
                    false if stands_still => GroupPart::Stopped,
                    false => GroupPart::Follower,
                };
                (group.leader, group.term, volume.size_bytes) = (Some(leader), term, size);
            }
            volume
        };
        media.flat_map(|medium| medium.volumes.values().map(with_exports)).collect()
    }

    fn volume_create(&mut self, p: VolumeCreateParams) -> Result<VolumeInfo, RpcError> {
        if p.size_bytes > ByteSize::gib(1000) {
            return Err(RpcError::new(ErrorCode::Capacity, "no such space").with_hint("ask for less"));
        }
        let volume = VolumeInfo {
            volume_id: p.volume_id,
            segment_id: p.segment_id,
            replica_id: p.replica_id,
            name: p.name,
            size_bytes: p.size_bytes,
            block_size: p.block_size,
            drive_id: p.drive_id,
            origin: p.origin,
            core: 0,
            state: VolumeState::Serving,
            reason: None,
            allocated_bytes: ByteSize(0),
            undrained_bytes: ByteSize(0),
            exports: vec![],
            snapshots: vec![],
            connections: 0,
            counters: VolumeCounters::default(),
            latency: VolumeLatency::default(),
            group: None,
        };
        let Some(medium) = self.medium_of(p.drive_id) else { return refuse(ErrorCode::NotFound, "no such drive") };
        match medium.volumes.get(&p.volume_id) {
            Some(there) if there.segment_id == p.segment_id && there.size_bytes == p.size_bytes => {}
            Some(_) => return refuse(ErrorCode::Conflict, "the id exists with other properties"),
            None => drop(medium.volumes.insert(p.volume_id, volume.clone())),
        }
        Ok(volume)
    }

    fn member_create(&mut self, p: MemberCreateParams) -> Result<VolumeInfo, RpcError> {
        let Some(me) = p.own().filter(|member| Some(member.node_id) == self.claim.map(|claim| claim.1)) else {
            return refuse(ErrorCode::Invalid, "no member is on this node");
        };
        let (volume_id, applied) = (p.volume_id, 7 - me.member);
        let group = GroupInfo { last: 7, persisted: 7, committed: 7, applied, ..GroupInfo::newborn(me.member, p.members.clone()) };
        self.volume_create(p.volume())?;
        let volume = self.volume(volume_id).expect("just made");
        volume.group = Some(group);
        Ok(volume.clone())
    }

    fn transfer(&mut self, p: GroupTransferParams) -> Result<Empty, RpcError> {
        let me = self.claim.map(|claim| claim.1);
        match self.groups.lock().unwrap().get_mut(&p.volume_id) {
            Some((leader, term, _)) if Some(*leader) == me => {
                (*leader, *term) = (p.to, *term + 1);
                Ok(Empty {})
            }
            _ => refuse(ErrorCode::NotReady, "this node does not lead"),
        }
    }

    fn recover(&mut self, p: GroupRecoverParams) -> Result<RecoveryReceipt, RpcError> {
        let (groups, me) = (Arc::clone(&self.groups), self.claim.map(|claim| claim.1));
        let Some(group) = self.volume(p.volume_id).and_then(|volume| volume.group.as_mut()) else {
            return refuse(ErrorCode::NotFound, "no such group");
        };
        group.members.list.retain(|member| Some(member.node_id) == me);
        groups.lock().unwrap().remove(&p.volume_id); // it leads when it is looked at
        let last = LogPoint { term: group.term, index: group.last };
        Ok(RecoveryReceipt {
            member: group.member,
            members: group.members.clone(),
            heard: vec![],
            term: group.term,
            new_term: group.term + 1,
            last,
            committed: group.committed,
            acknowledged: None,
            whole_as_of: None,
            stopped: None,
        })
    }

    fn volume(&mut self, id: VolumeId) -> Option<&mut VolumeInfo> {
        let places: Vec<String> = self.open.values().map(|drive| drive.spec.place()).collect();
        let place = places.into_iter().find(|place| self.media[place].volumes.contains_key(&id))?;
        self.media.get_mut(&place)?.volumes.get_mut(&id)
    }

    fn volume_delete(&mut self, p: VolumeDeleteParams) -> Result<Empty, RpcError> {
        if self.exports.get(&p.volume_id).is_some_and(|exports| !exports.is_empty()) && !p.force {
            return refuse(ErrorCode::Busy, "exported");
        }
        self.exports.remove(&p.volume_id);
        self.media.values_mut().for_each(|medium| drop(medium.volumes.remove(&p.volume_id)));
        Ok(Empty {})
    }

    fn volume_resize(&mut self, p: VolumeResizeParams) -> Result<VolumeInfo, RpcError> {
        let (groups, me) = (Arc::clone(&self.groups), self.claim.map(|claim| claim.1));
        let Some(volume) = self.volume(p.volume_id) else { return refuse(ErrorCode::NotFound, "no such volume") };
        if volume.group.is_some() {
            return match groups.lock().unwrap().get_mut(&p.volume_id) {
                Some((leader, _, size)) if Some(*leader) == me => {
                    *size = p.size_bytes;
                    Ok(volume.clone())
                }
                _ => refuse(ErrorCode::NotReady, "this node does not lead"),
            };
        }
        if p.size_bytes < volume.size_bytes && !p.allow_shrink {
            return refuse(ErrorCode::Invalid, "smaller");
        }
        if p.size_bytes > ByteSize::gib(1000) {
            return refuse(ErrorCode::Capacity, "no such space");
        }
        volume.size_bytes = p.size_bytes;
        Ok(volume.clone())
    }

    fn snapshot_create(&mut self, p: SnapshotCreateParams) -> Result<Empty, RpcError> {
        let Some(volume) = self.volume(p.volume_id) else { return refuse(ErrorCode::NotFound, "no such volume") };
        if volume.snapshots.iter().all(|snapshot| snapshot.snapshot_id != p.snapshot_id) {
            let (index, size_bytes) = (volume.snapshots.len() as u64, volume.size_bytes);
            let (snapshot_id, name, allocated_bytes) = (p.snapshot_id, p.name, ByteSize(0));
            volume.snapshots.push(SnapshotInfo { snapshot_id, name, index, size_bytes, allocated_bytes });
        }
        Ok(Empty {})
    }

    fn export_add(&mut self, p: ExportAddParams) -> Result<ExportInfo, RpcError> {
        if self.volume(p.volume_id).is_none() {
            return refuse(ErrorCode::NotFound, "no such volume");
        }
        let export = ExportInfo {
            address: p.door.to_string(),
            door: p.door,
            nqn: Some(format!("nqn.2026-11.io.penstock:{}", p.volume_id).parse().unwrap()),
            connected_hosts: vec![],
        };
        if let Some(range) = p.controllers {
            self.controllers.insert(p.volume_id, range);
        }
        let exports = self.exports.entry(p.volume_id).or_default();
        if !exports.iter().any(|there| there.door == export.door) {
            exports.push(export.clone());
        }
        Ok(export)
    }

    fn export_remove(&mut self, p: ExportRemoveParams) -> Result<Empty, RpcError> {
        if self.connected.get(&p.volume_id).is_some_and(|hosts| !hosts.is_empty()) && !p.force {
            return Err(RpcError::new(ErrorCode::Busy, "hosts are connected").with_hint("disconnect them"));
        }
        if let Some(exports) = self.exports.get_mut(&p.volume_id) {
            exports.retain(|export| export.door != p.door);
        }
        Ok(Empty {})
    }
}
