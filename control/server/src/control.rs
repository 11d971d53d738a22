//! The one owner of control's state: what is desired, what was last seen, what was refused.
//!
//! Wishes are judged and committed one at a time; memory follows the disk, never the other way round. If a commit
//! fails, nobody knows what the disk holds, so the process ends and the next one reads it.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use penstock_api::http::ApiError;
use penstock_api::id::{ClusterTag, Id, Incarnation, NodeNumber};
use penstock_api::rpc::{self, DriveInfo, ErrorCode, NodeInfo, VolumeInfo};
use penstock_model::change::Judged;
use penstock_model::issuer::{Exhausted, Identity, Issuer, Mark, Residence, Take, residence};
use penstock_model::progress::Look;
use penstock_model::retry::{Millis, Refusals};
use penstock_model::{Desired, Observed, Record, Subject};
use tokio::sync::{Notify, watch};

use crate::home;
use crate::metrics::Counters;
use crate::node::NodeClient;
use crate::store::{EmbeddedStore, Store, StoreError, Stored, Write};

/// One whole look at the node.
#[derive(Debug)]
pub struct Seen {
    pub node: NodeInfo,
    pub drives: Vec<DriveInfo>,
    pub volumes: Vec<VolumeInfo>,
    pub observed: Observed,
}

#[derive(Default)]
pub struct State {
    pub desired: Desired,
    /// The last look, kept while the node is away.
    pub seen: Option<Arc<Seen>>,
    /// Why the last look failed, if it did.
    pub away: Option<String>,
    pub refusals: Refusals,
}

impl State {
    /// The last look, unless the node is away.
    pub fn present(&self) -> Option<&Arc<Seen>> {
        self.seen.as_ref().filter(|_| self.away.is_none())
    }

    pub fn look(&self) -> Look<'_> {
        Look { desired: &self.desired, observed: self.present().map(|seen| &seen.observed), refusals: &self.refusals }
    }
}

pub struct Control {
    store: Arc<dyn Store>,
    pub node: NodeClient,
    pub counters: Counters,
    state: Mutex<State>,
    /// Held from judging a wish to its commit. Absent until the cluster is founded or adopted.
    issuer: tokio::sync::Mutex<Option<Issuer>>,
    /// Something is to be done.
    wake: Notify,
    /// Counts rounds of the reconciler.
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
    /// Opens the state directory and everything that needs no node.
    pub fn open(dir: &std::path::Path, restored: bool, node: NodeClient, wait: Duration) -> Result<Self, OpenError> {
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
        let issuer = desired.identity.map(|identity| Issuer::open(identity, mark));
        Ok(Self {
            store: Arc::new(store),
            node,
            counters: Counters::default(),
            state: Mutex::new(State { desired, ..State::default() }),
            issuer: tokio::sync::Mutex::new(issuer),
            wake: Notify::new(),
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
        self.wake.notify_one();
    }

    pub async fn woken(&self) {
        self.wake.notified().await;
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
        {
            let mut state = self.state();
            state.desired.apply(&records);
            subjects.iter().for_each(|subject| state.refusals.forget(subject));
        }
        self.wake();
        Ok(records)
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

    /// A new cluster, unless the node has one already.
    async fn found(&self) -> Result<Identity, ApiError> {
        // Asked now: a control that lost its state must not take a node that holds volumes for a new one.
        let node = self.node.call::<rpc::NodeGet>(&rpc::Empty {}).await.map_err(|error| {
            ApiError::new(ErrorCode::NotReady, format!("a new cluster begins with its node, and {error}"))
                .with_hint("start penstockd first, or point penstock-control at its socket with --node-socket")
        })?;
        if let Some(cluster) = node.cluster_id {
            let message = format!("the node belongs to cluster {cluster} already, and this control knows nothing of it");
            return Err(ApiError::new(ErrorCode::Conflict, message).with_hint("`penstock pool import` takes up what its drives hold"));
        }
        let mut tag = [0u8; 8];
        let random = getrandom::fill(&mut tag[2..]);
        random.map_err(|error| ApiError::new(ErrorCode::Internal, format!("no random numbers: {error}")))?;
        let cluster = ClusterTag::new(u64::from_be_bytes(tag)).expect("six bytes are 48 bits");
        let node = NodeNumber::new(1).expect("1 is a node number");
        let identity = Identity { cluster, node, incarnation: Incarnation::FIRST };
        self.commit(vec![Write::Record(Record::Identity(identity))]).await?;
        self.state().desired.apply(&[Record::Identity(identity)]);
        tracing::info!(cluster = %identity.cluster_id(), node = %identity.node_id(), "founded a cluster");
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
        self.commit(vec![Write::Record(Record::Identity(identity)), Write::Mark(mark)]).await?;
        self.state().desired.apply(&[Record::Identity(identity)]);
        *writer = Some(Issuer::open(identity, Some(mark)));
        tracing::info!(cluster = %identity.cluster_id(), node = %identity.node_id(), "adopted a cluster");
        Ok(identity)
    }

    /// Looks whether the node holds ids that this state cannot have issued, and goes on under a new incarnation.
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
