//! The one owner of control's state: what is desired, what was last seen of each node, what was refused.
//!
//! Wishes are judged and committed one at a time; memory follows the disk, never the other way round. If a commit
//! fails, nobody knows what the disk holds, so the process ends and the next one reads it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use penstock_api::http::ApiError;
use penstock_api::id::{ClusterTag, Id, Incarnation, NodeNumber};
use penstock_api::rpc::{self, DriveInfo, ErrorCode, NodeInfo, VolumeInfo};
use penstock_api::{NodeId, NodeName, VolumeId};
use penstock_model::change::Judged;
use penstock_model::issuer::{Exhausted, Identity, Issuer, Mark, Residence, Take, residence};
use penstock_model::progress::{Look, NodeLook};
use penstock_model::retry::{Millis, Refusals};
use penstock_model::{Desired, DesiredNode, Observed, Record, Subject, enroll};
use tokio::sync::{Notify, watch};

use crate::home;
use crate::metrics::Counters;
use crate::node::NodeClient;
use crate::store::{EmbeddedStore, Store, StoreError, Stored, Write};

/// More than an election or a node's start takes on a machine that is busy.
const SOON: Duration = Duration::from_secs(5);

/// One whole look at a node.
#[derive(Debug)]
pub struct Seen {
    pub node: NodeInfo,
    pub drives: Vec<DriveInfo>,
    pub volumes: Vec<VolumeInfo>,
    pub observed: Observed,
}

impl Seen {
    pub fn volume(&self, id: VolumeId) -> Option<&VolumeInfo> {
        self.volumes.iter().find(|volume| volume.volume_id == id)
    }
}

/// What is known of one node that this control was told how to reach.
#[derive(Default)]
pub struct NodeState {
    /// The last look, kept while the node is away.
    pub seen: Option<Arc<Seen>>,
    /// Why the last look failed, if it did.
    pub away: Option<String>,
    /// Looks that have ended, and what was begun after them.
    pub rounds: u64,
    pub refusals: Refusals,
}

impl NodeState {
    /// The last look, unless the node is away.
    pub fn present(&self) -> Option<&Arc<Seen>> {
        self.seen.as_ref().filter(|_| self.away.is_none())
    }
}

#[derive(Default)]
pub struct State {
    pub desired: Desired,
    pub nodes: BTreeMap<NodeName, NodeState>,
}

impl State {
    /// The id that a name has, once it has one.
    pub fn node_id(&self, name: &NodeName) -> Option<NodeId> {
        self.desired.find_node(name.as_str()).map(|(id, _)| id)
    }

    pub fn node(&self, id: NodeId) -> Option<&NodeState> {
        self.nodes.get(&self.desired.nodes.get(&id).filter(|node| !node.gone)?.name)
    }

    pub fn look(&self) -> Look<'_> {
        let each = self.nodes.iter().filter_map(|(name, node)| {
            let observed = node.present().map(|seen| &seen.observed);
            Some((self.node_id(name)?, NodeLook { observed, refusals: &node.refusals }))
        });
        Look { desired: &self.desired, nodes: each.collect() }
    }

    /// The nodes that are there.
    pub fn observed(&self) -> BTreeMap<NodeId, &Observed> {
        self.look().nodes.into_iter().filter_map(|(id, node)| Some((id, node.observed?))).collect()
    }
}

/// A node that this control was told how to reach.
pub struct NodeHandle {
    pub named: DesiredNode,
    pub client: NodeClient,
    /// Something is to be done there.
    wake: Notify,
}

impl NodeHandle {
    pub fn new(named: DesiredNode, client: NodeClient) -> Self {
        Self { named, client, wake: Notify::new() }
    }

    pub fn name(&self) -> &NodeName {
        &self.named.name
    }

    pub async fn woken(&self) {
        self.wake.notified().await;
    }
}

pub struct Control {
    store: Arc<dyn Store>,
    pub nodes: Vec<NodeHandle>,
    pub counters: Counters,
    state: Mutex<State>,
    /// Held from judging a wish to its commit. Absent until the cluster is founded or adopted.
    issuer: tokio::sync::Mutex<Option<Issuer>>,
    /// Counts rounds of the reconcilers.
    rounds: watch::Sender<u64>,
    fatal: watch::Sender<Option<String>>,
    started: Instant,
    pub wait: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("the state directory {dir}: {source}")]
    Dir { dir: String, source: std::io::Error },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(
        "the state directory {dir} is a copy: it was made on machine \"{recorded}\" as file {recorded_inode}, and lies on machine \
         \"{found}\" as file {found_inode}. If the original is gone, start once with --restored. If it is not, start with an empty \
         state directory: two controls that issue the same ids destroy each other's data"
    )]
    Copied { dir: String, recorded: String, recorded_inode: u64, found: String, found_inode: u64 },
    #[error("no random numbers: {0}")]
    Random(getrandom::Error),
    #[error("all incarnations of this node are used: give the node a new number")]
    Incarnations,
}

impl Control {
    /// Opens the state directory and everything that needs no node. `nodes` have distinct names.
    pub fn open(dir: &std::path::Path, restored: bool, nodes: Vec<NodeHandle>, wait: Duration) -> Result<Self, OpenError> {
        let io = |source| OpenError::Dir { dir: dir.display().to_string(), source };
        home::make_dir(dir).map_err(io)?;
        let store = EmbeddedStore::open(&home::store_path(dir))?;
        let Stored { home: recorded, mark, mut desired } = store.load()?;
        let found = home::found(dir).map_err(io)?;
        match residence(recorded.as_ref(), &found) {
            Residence::Same => {}
            Residence::New => store.commit(&[Write::Home(found)])?,
            Residence::Copied { recorded, found } if !restored => {
                return Err(OpenError::Copied {
                    dir: dir.display().to_string(),
                    recorded: recorded.machine,
                    recorded_inode: recorded.inode,
                    found: found.machine,
                    found_inode: found.inode,
                });
            }
            Residence::Copied { .. } => {
                let mut writes = vec![Write::Home(found)];
                if let Some(identity) = &mut desired.identity {
                    // The mark may be ahead of the identity: go on from where ids were really issued.
                    *identity = Issuer::open(*identity, mark).identity();
                    let mut skip = [0u8];
                    getrandom::fill(&mut skip).map_err(OpenError::Random)?;
                    *identity = identity.restored(skip[0]).ok_or(OpenError::Incarnations)?;
                    writes.push(Write::Record(Record::Identity(*identity)));
                }
                store.commit(&writes)?;
                tracing::warn!(identity = ?desired.identity, "the state was restored from a copy: new incarnation");
            }
        }
        let renamed = renamed(&desired, &nodes);
        if !renamed.is_empty() {
            store.commit(&renamed.iter().cloned().map(Write::Record).collect::<Vec<_>>())?;
            desired.apply(&renamed);
        }
        let issuer = desired.identity.map(|identity| Issuer::open(identity, mark));
        let states = nodes.iter().map(|node| (node.name().clone(), NodeState::default())).collect();
        Ok(Self {
            store: Arc::new(store),
            nodes,
            counters: Counters::default(),
            state: Mutex::new(State { desired, nodes: states }),
            issuer: tokio::sync::Mutex::new(issuer),
            rounds: watch::channel(0).0,
            fatal: watch::channel(None).0,
            started: Instant::now(),
            wait,
        })
    }

    /// Never held across an await or a disk write.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no panic while held")
    }

    pub fn uptime(&self) -> Duration {
        self.started.elapsed()
    }

    /// The steady clock that refusals count by.
    pub fn now(&self) -> Millis {
        Millis(u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    pub fn wake(&self) {
        self.nodes.iter().for_each(|node| node.wake.notify_one());
    }

    /// The node that is meant: by name or id, or the only one.
    pub fn handle(&self, name_or_id: Option<&str>) -> Result<&NodeHandle, ApiError> {
        let names = || self.nodes.iter().map(|node| node.name().to_string()).collect::<Vec<_>>().join(", ");
        let Some(text) = name_or_id else {
            return match self.nodes.as_slice() {
                [only] => Ok(only),
                _ => {
                    let message = format!("there are {} nodes, and none is named", self.nodes.len());
                    Err(ApiError::new(ErrorCode::Invalid, message).with_hint(format!("say which with --node: {}", names())))
                }
            };
        };
        let name = text
            .parse::<NodeId>()
            .ok()
            .and_then(|id| self.state().desired.nodes.get(&id).filter(|node| !node.gone).map(|node| node.name.clone()));
        let is_meant = |node: &&NodeHandle| name.as_ref().map_or(node.name().as_str() == text, |name| node.name() == name);
        self.nodes.iter().find(is_meant).ok_or_else(|| {
            let shown: String = text.chars().take(64).collect();
            ApiError::new(ErrorCode::NotFound, format!("there is no node {shown}")).with_hint(format!("there are: {}", names()))
        })
    }

    /// How to reach the node of that id.
    pub fn client(&self, id: NodeId) -> Result<&NodeClient, ApiError> {
        self.handle(Some(&id.to_string())).map(|node| &node.client)
    }

    /// The node's id, given to it now if it has none yet.
    pub async fn enroll(&self, node: &NodeHandle, shown: Option<NodeId>) -> Result<NodeId, ApiError> {
        let mut found = None;
        self.change(&[], |state| {
            let (id, records) = enroll(&state.desired, &node.named, shown)?;
            found = Some(id);
            Ok(records)
        })
        .await?;
        Ok(found.expect("judged, so found"))
    }

    pub fn round_done(&self) {
        self.rounds.send_modify(|rounds| *rounds += 1);
    }

    /// Ends when the store has failed, with why.
    pub async fn fatal(&self) -> String {
        let mut fatal = self.fatal.subscribe();
        let reason = fatal.wait_for(Option::is_some).await.map(|reason| reason.clone());
        reason.ok().flatten().unwrap_or_default()
    }

    async fn commit(&self, writes: Vec<Write>) -> Result<(), ApiError> {
        let broken = |reason: String| {
            self.fatal.send_replace(Some(reason.clone()));
            ApiError::new(ErrorCode::Internal, format!("control's store failed: {reason}"))
                .with_hint("penstock-control ends now and must be started again; whether this was done shows then")
        };
        if let Some(reason) = self.fatal.borrow().clone() {
            return Err(broken(reason));
        }
        let store = Arc::clone(&self.store);
        let committed = tokio::task::spawn_blocking(move || store.commit(&writes)).await;
        match committed {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(broken(error.to_string())),
            Err(panicked) => Err(broken(panicked.to_string())),
        }
    }

    /// Judges a wish against the present state, makes it durable, and wakes the reconciler. `subjects` are what it
    /// is about: refusals of old wishes about them do not count any more.
    pub async fn change(&self, subjects: &[Subject], judge: impl FnOnce(&State) -> Judged) -> Result<Vec<Record>, ApiError> {
        let _writer = self.issuer.lock().await;
        let records = judge(&self.state())?;
        if !records.is_empty() {
            self.commit(records.iter().cloned().map(Write::Record).collect()).await?;
        }
        self.state().desired.apply(&records);
        self.forget(subjects);
        Ok(records)
    }

    /// Refusals of old wishes about these do not count any more.
    pub fn forget(&self, subjects: &[Subject]) {
        for node in self.state().nodes.values_mut() {
            subjects.iter().for_each(|subject| node.refusals.forget(subject));
        }
        self.wake();
    }

    /// Issues ids, founding the cluster if there is none yet.
    pub async fn ids(&self, count: u32) -> Result<Vec<Id>, ApiError> {
        let exhausted =
            |what: Exhausted| ApiError::new(ErrorCode::Capacity, format!("all ids are issued: {what:?} of this node are used up"));
        let mut writer = self.issuer.lock().await;
        let issuer = match &mut *writer {
            Some(issuer) => issuer,
            None => {
                let identity = self.found().await?;
                writer.insert(Issuer::open(identity, None))
            }
        };
        loop {
            match issuer.take(count).map_err(exhausted)? {
                Take::Issued(ids) => return Ok(ids),
                Take::Reserve(mark) => {
                    self.commit(vec![Write::Mark(mark)]).await?;
                    issuer.on_durable(mark);
                }
            }
        }
    }

    pub async fn id(&self) -> Result<Id, ApiError> {
        Ok(self.ids(1).await?.remove(0))
    }

    /// A new cluster of all nodes, unless one of them has one already.
    async fn found(&self) -> Result<Identity, ApiError> {
        // Asked now: a control that lost its state must not take a node that holds volumes for a new one.
        let mut answered = false;
        let mut away = None;
        for node in &self.nodes {
            match node.client.call::<rpc::NodeGet>(&rpc::Empty {}).await {
                Ok(info) => {
                    answered = true;
                    if let Some(cluster) = info.cluster_id {
                        let message =
                            format!("node {} belongs to cluster {cluster} already, and this control knows nothing of it", node.name());
                        let error = ApiError::new(ErrorCode::Conflict, message);
                        return Err(error.with_hint("`penstock pool import` takes up what its drives hold"));
                    }
                }
                Err(error) => away = Some(error),
            }
        }
        if let (false, Some(error)) = (answered, away) {
            let error = ApiError::new(ErrorCode::NotReady, format!("a new cluster begins with its nodes, and {error}"));
            return Err(error.with_hint("start penstockd first, or point penstock-control at its socket with --node"));
        }
        let mut tag = [0u8; 8];
        let random = getrandom::fill(&mut tag[2..]);
        random.map_err(|error| ApiError::new(ErrorCode::Internal, format!("no random numbers: {error}")))?;
        let cluster = ClusterTag::new(u64::from_be_bytes(tag)).expect("six bytes are 48 bits");
        let node = NodeNumber::new(1).expect("1 is a node number");
        let identity = Identity { cluster, node, incarnation: Incarnation::FIRST };
        let mut desired = self.state().desired.clone();
        let mut records = vec![Record::Identity(identity)];
        desired.apply(&records);
        for node in &self.nodes {
            let (_, numbered) = enroll(&desired, &node.named, None)?;
            desired.apply(&numbered);
            records.extend(numbered);
        }
        self.commit(records.iter().cloned().map(Write::Record).collect()).await?;
        self.state().desired.apply(&records);
        tracing::info!(cluster = %identity.cluster_id(), nodes = self.nodes.len(), "founded a cluster");
        Ok(identity)
    }

    /// Takes the identity that drives name, when this control has none of its own that matters.
    pub async fn adopt(&self, judge: impl FnOnce(&Desired) -> Result<Option<Identity>, ApiError>) -> Result<Identity, ApiError> {
        let mut writer = self.issuer.lock().await;
        let found = judge(&self.state().desired)?;
        let Some(identity) = found else {
            return Ok(self.state().desired.identity.expect("known already, so it is there"));
        };
        // The state that issued this node's ids before is lost, and not all of them lie on drives: skip ahead.
        let mut skip = [0u8];
        let random = getrandom::fill(&mut skip);
        random.map_err(|error| ApiError::new(ErrorCode::Internal, format!("no random numbers: {error}")))?;
        let identity =
            identity.restored(skip[0]).ok_or_else(|| ApiError::new(ErrorCode::Capacity, "all incarnations of this node are used"))?;
        // No mark of a former identity may be read as one of the new: they are replaced together.
        let high_water = penstock_api::id::Sequence::new(1).expect("1 is a sequence");
        let mark = Mark { incarnation: identity.incarnation, high_water };
        // Nor may a number of the former one's nodes.
        let forgotten = self.state().desired.nodes.keys().map(|id| Record::DropNode(*id)).collect::<Vec<_>>();
        let records: Vec<Record> = forgotten.into_iter().chain([Record::Identity(identity)]).collect();
        self.commit(records.iter().cloned().map(Write::Record).chain([Write::Mark(mark)]).collect()).await?;
        self.state().desired.apply(&records);
        *writer = Some(Issuer::open(identity, Some(mark)));
        tracing::info!(cluster = %identity.cluster_id(), node = %identity.node_id(), "adopted a cluster");
        Ok(identity)
    }

    /// Looks whether a node holds ids that this state cannot have issued, and goes on under a new incarnation.
    pub async fn on_seen_ids(&self, observed: &Observed) -> Result<(), ApiError> {
        let mut writer = self.issuer.lock().await;
        let Some(issuer) = &mut *writer else { return Ok(()) };
        for id in observed.ids() {
            let seen = issuer.on_seen(id).map_err(|_| ApiError::new(ErrorCode::Capacity, "all incarnations of this node are used"))?;
            if let Some(mark) = seen {
                tracing::warn!(%id, incarnation = mark.incarnation.get(), "this state is older than what the node holds: new incarnation");
                self.commit(vec![Write::Mark(mark)]).await?;
                issuer.on_durable(mark);
            }
        }
        Ok(())
    }

    /// Waits while a volume's group elects a leader, for wishes that a leader has to carry out. Not while too few are there for it.
    pub async fn elected(&self, id: VolumeId) {
        self.wait_for(SOON, |state| (!state.look().is_electing(id)).then_some(())).await;
    }

    /// Waits while what is asked for can't be judged, since a node that has just started has not been looked at.
    pub async fn judged<T>(&self, judge: impl Fn(&State) -> Result<T, ApiError>) -> Result<T, ApiError> {
        let is_judged = |state: &State| Some(judge(state)).filter(|judged| !matches!(judged, Err(e) if e.code == ErrorCode::NotReady));
        match self.wait_for(SOON, is_judged).await {
            Some(judged) => judged,
            None => judge(&self.state()),
        }
    }

    /// Waits until `look` has an answer, looking after each round of the reconciler; `None` when `limit` has passed.
    pub async fn wait_for<T>(&self, limit: Duration, mut look: impl FnMut(&State) -> Option<T>) -> Option<T> {
        let mut rounds = self.rounds.subscribe();
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            rounds.mark_unchanged();
            if let Some(answer) = look(&self.state()) {
                return Some(answer);
            }
            match tokio::time::timeout_at(deadline, rounds.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return look(&self.state()),
            }
        }
    }
}

/// What a start under other flags records: the first node of a state from before nodes had names, a node that has another name now, and
/// addresses that changed. Names that are new altogether get their number when they are needed.
fn renamed(desired: &Desired, nodes: &[NodeHandle]) -> Vec<Record> {
    let Some(identity) = desired.identity else { return vec![] };
    let is_known = |node: &&NodeHandle| desired.find_node(node.name().as_str()).is_some();
    let mut records: Vec<Record> = Vec::new();
    for node in nodes.iter().filter(is_known) {
        // A node that is known is never refused without a look at it.
        records.extend(enroll(desired, &node.named, None).map(|(_, records)| records).unwrap_or_default());
    }
    let mut fresh = nodes.iter().filter(|node| !is_known(node));
    let mut orphans = desired.nodes.iter().filter(|(_, known)| !known.gone && nodes.iter().all(|node| *node.name() != known.name));
    match (fresh.next(), fresh.next(), orphans.next(), orphans.next()) {
        (Some(node), _, None, _) if desired.nodes.is_empty() => records.push(Record::PutNode(identity.node_id(), node.named.clone())),
        (Some(node), None, Some((id, _)), None) => records.push(Record::PutNode(*id, node.named.clone())),
        _ => {}
    }
    records
}
