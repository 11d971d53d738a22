//! The loop that brings a node to what is desired: look, plan, do, look again. Each node has its own; what they share is what is desired.
//!
//! Steps run beside each other, one per subject. A subject whose step is still under way when a look begins is left
//! out of that round, so no plan is ever made from a look that is older than the last thing done about it.
//! A refusal counts only when the next look shows the run of the node's process that the step was planned for: one that restarted in
//! between refuses what it has not opened yet, which says nothing about the wish.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use penstock_api::rpc::{self, RpcError};
use penstock_model::reconcile::Plan;
use penstock_model::{LocalStep, NodeStep, Observed, Step, Subject, reconcile};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::control::{Control, NodeHandle, NodeState, Seen, State};
use crate::node::{CallError, NodeClient};

/// Steps under way at once; a node serves them one after another anyway.
const STEPS_MAX: usize = 16;
/// Looks are never closer than this when nothing happens, whatever is due.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// A look that fails is tried again after so long.
const AWAY_RETRY: Duration = Duration::from_millis(250);

struct Done {
    step: NodeStep,
    /// Of the node's process, when it was planned.
    incarnation: u64,
    result: Result<(), CallError>,
}

pub struct Reconciler {
    control: Arc<Control>,
    /// Which of control's nodes.
    at: usize,
    period: Duration,
    under_way: BTreeSet<Subject>,
    tasks: JoinSet<Done>,
    /// Refusals since the last look.
    refused: Vec<(NodeStep, u64, RpcError)>,
    /// Steps done since the last look: if it wants one of them again, doing it had no effect.
    done: Vec<(NodeStep, u64)>,
}

impl Reconciler {
    pub fn new(control: Arc<Control>, at: usize, period: Duration) -> Self {
        Self { control, at, period, under_way: BTreeSet::new(), tasks: JoinSet::new(), refused: Vec::new(), done: Vec::new() }
    }

    fn node(&self) -> &NodeHandle {
        &self.control.nodes[self.at]
    }

    fn of<'a>(&self, state: &'a mut State) -> &'a mut NodeState {
        state.nodes.entry(self.node().name().clone()).or_default()
    }

    /// Runs until dropped; every state it can be dropped in is one that a crash could leave.
    pub async fn run(mut self) {
        loop {
            let next = self.round().await;
            tokio::select! {
                () = self.control.nodes[self.at].woken() => {}
                Some(done) = self.tasks.join_next(), if !self.tasks.is_empty() => self.on_done(done),
                () = sleep_until(next) => {}
            }
            while let Some(done) = self.tasks.try_join_next() {
                self.on_done(done);
            }
        }
    }

    fn on_done(&mut self, done: Result<Done, tokio::task::JoinError>) {
        let Done { step, incarnation, result } = match done {
            Ok(done) => done,
            // A step that panicked is a bug that must show, not a node that seems slow.
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        };
        let subject = step.subject();
        self.under_way.remove(&subject);
        let word = step.word();
        self.control.counters.step(word, result.is_ok());
        match result {
            Ok(()) => {
                tracing::info!(node = %self.node().name(), step = word, ?subject, "done");
                self.done.push((step, incarnation));
            }
            Err(error) => {
                let error = error.into_rpc();
                tracing::warn!(node = %self.node().name(), step = word, ?subject, code = error.code, "refused: {}", error.message);
                self.refused.push((step, incarnation, error));
            }
        }
    }

    /// One look, one plan, its steps begun. Answers when to look again at the latest.
    async fn round(&mut self) -> Instant {
        let started = Instant::now();
        let look = look(self.node()).await;
        self.control.counters.round(look.is_ok());
        let next = match look {
            Ok(seen) => {
                self.on_look(Arc::new(seen)).await;
                let due = self.of(&mut self.control.state()).refusals.next_due(|subject| !self.under_way.contains(subject));
                let due = due.map(|due| Duration::from_millis(due.0.saturating_sub(self.control.now().0)).max(PAUSE_MIN));
                started + due.map_or(self.period, |due| due.min(self.period))
            }
            Err(reason) => {
                let mut state = self.control.state();
                let node = self.of(&mut state);
                if node.away.as_ref() != Some(&reason) {
                    tracing::warn!(node = %self.node().name(), "the node is away: {reason}");
                }
                node.away = Some(reason);
                Instant::now() + AWAY_RETRY.min(self.period)
            }
        };
        self.of(&mut self.control.state()).rounds += 1;
        self.control.round_done();
        next
    }

    async fn on_look(&mut self, seen: Arc<Seen>) {
        if let Err(error) = self.control.on_seen_ids(&seen.observed).await {
            tracing::error!("{error}");
            return;
        }
        let plan = {
            let mut state = self.control.state();
            let state = &mut *state;
            let name = self.control.nodes[self.at].name();
            let node = state.nodes.entry(name.clone()).or_default();
            let before = node.seen.as_ref().map(|before| before.node.incarnation);
            if node.away.take().is_some() || before.is_none() {
                tracing::info!(node = %name, pid = seen.node.pid, incarnation = seen.node.incarnation, "the node is there");
            }
            if before.is_some_and(|before| before != seen.node.incarnation) {
                tracing::warn!(node = %name, pid = seen.node.pid, "the node has restarted");
                node.refusals.forget_all();
            }
            let now = self.control.now();
            node.seen = Some(Arc::clone(&seen));
            // A name that has no id yet has nothing to do either.
            let id = state.desired.find_node(name.as_str()).map(|(id, _)| id);
            let plan = id.map(|id| reconcile(&state.desired, id, &seen.observed)).unwrap_or_default();
            for (step, incarnation, error) in self.refused.drain(..) {
                // Of a wish that another took the place of while the step was under way, it says nothing about that one.
                if incarnation == seen.node.incarnation && plan.steps.contains(&Step::Node(step.clone())) {
                    node.refusals.on_refused(step.subject(), step.word(), error, now);
                }
            }
            for (step, incarnation) in self.done.drain(..) {
                let is_wanted = plan.steps.contains(&Step::Node(step.clone()));
                if is_wanted && incarnation == seen.node.incarnation {
                    let message = format!("the node said that it did \"{}\", and it does not show", step.word());
                    let error = RpcError::new(rpc::ErrorCode::NotReady, message);
                    node.refusals.on_refused(step.subject(), step.word(), error, now);
                } else if !is_wanted {
                    node.refusals.on_done(&step.subject());
                }
            }
            let wanted: BTreeSet<Subject> = plan.steps.iter().map(Step::subject).collect();
            let under_way = &self.under_way;
            node.refusals.retain(|subject| wanted.contains(subject) || under_way.contains(subject));
            plan
        };
        self.begin(plan, seen.node.incarnation).await;
    }

    async fn begin(&mut self, plan: Plan, incarnation: u64) {
        let mut local = false;
        // Judged before this round's own steps begin: a subject has several local steps, then a node step, in one round.
        let busy = self.under_way.clone();
        for step in plan.steps.into_iter().filter(|step| !busy.contains(&step.subject())) {
            match step {
                Step::Local(step) => local |= self.do_local(&step).await,
                Step::Node(step) => {
                    let subject = step.subject();
                    let free = self.tasks.len() < STEPS_MAX && !self.under_way.contains(&subject);
                    let now = self.control.now();
                    if free && self.of(&mut self.control.state()).refusals.may_try(&subject, now) {
                        self.under_way.insert(subject);
                        let (control, at) = (Arc::clone(&self.control), self.at);
                        self.tasks.spawn(async move {
                            let result = carry_out(&control.nodes[at], &step).await;
                            Done { step, incarnation, result }
                        });
                    }
                }
            }
        }
        if local {
            // What was recorded may allow more.
            self.control.wake();
        }
    }

    /// Whether it changed anything.
    async fn do_local(&self, step: &LocalStep) -> bool {
        match self.control.change(&[], |state| Ok(step.records(&state.desired))).await {
            Ok(records) if records.is_empty() => false,
            Ok(_) => {
                tracing::info!(?step, "recorded");
                true
            }
            Err(error) => {
                tracing::error!(?step, "not recorded: {error}");
                false
            }
        }
    }
}

/// A whole look at a node, all of it from one run of its process.
async fn look(node: &NodeHandle) -> Result<Seen, String> {
    let node = &node.client;
    let text = |error: CallError| error.to_string();
    let before = node.call::<rpc::NodeGet>(&rpc::Empty {}).await.map_err(text)?;
    // Drives first: a volume that is absent from a drive that served before the list was made is not on it.
    let drives = node.call::<rpc::DriveList>(&rpc::Empty {}).await.map_err(text)?;
    let volumes = node.call::<rpc::VolumeList>(&rpc::Empty {}).await.map_err(text)?;
    let info = node.call::<rpc::NodeGet>(&rpc::Empty {}).await.map_err(text)?;
    if before.incarnation != info.incarnation {
        return Err("the node restarted while it was looked at".to_owned());
    }
    if info.api != penstock_api::API_VERSION {
        return Err(format!("the node speaks version {} of the interface, this control {}", info.api, penstock_api::API_VERSION));
    }
    let observed = Observed::new(&info, &drives, &volumes);
    Ok(Seen { node: info, drives, volumes, observed })
}

async fn carry_out(node: &NodeHandle, step: &NodeStep) -> Result<(), CallError> {
    let node = &node.client;
    match step {
        NodeStep::Claim(params) => node.call::<rpc::NodeClaim>(params).await.map(drop),
        NodeStep::SetPeers(params) => node.call::<rpc::PeersSet>(params).await.map(drop),
        NodeStep::CreateMember(params) => node.call::<rpc::MemberCreate>(params).await.map(drop),
        NodeStep::AddDrive(params) => {
            if params.open_only {
                check_label(node, params).await?;
            }
            node.call::<rpc::DriveAdd>(params).await.map(drop)
        }
        NodeStep::RemoveDrive(params) => node.call::<rpc::DriveRemove>(params).await.map(drop),
        NodeStep::CreateVolume(params) => node.call::<rpc::VolumeCreate>(params).await.map(drop),
        NodeStep::ResizeVolume(params) => node.call::<rpc::VolumeResize>(params).await.map(drop),
        NodeStep::DeleteVolume(params) => node.call::<rpc::VolumeDelete>(params).await.map(drop),
        NodeStep::AddExport(params) => node.call::<rpc::ExportAdd>(params).await.map(drop),
        NodeStep::RemoveExport(params) => node.call::<rpc::ExportRemove>(params).await.map(drop),
        NodeStep::ChangeMembers(params) => node.call::<rpc::GroupChange>(params).await.map(drop),
        NodeStep::StepAside(params) => node.call::<rpc::GroupTransfer>(params).await.map(drop),
        NodeStep::TakeSnapshot(params) => node.call::<rpc::SnapshotCreate>(params).await.map(drop),
        NodeStep::RemoveSnapshot(params) => node.call::<rpc::SnapshotDelete>(params).await.map(drop),
    }
}

/// A drive that held data is opened only if it is still the same one. The node checks it too, by `open_only`; a
/// person is told here what lies there instead.
async fn check_label(node: &NodeClient, params: &rpc::DriveAddParams) -> Result<(), CallError> {
    let probe = node.call::<rpc::DriveProbe>(&rpc::DriveProbeParams { spec: params.spec.clone() }).await?;
    let found = match probe.content {
        rpc::DriveContent::Ours { label } if label.drive_id == params.drive_id => return Ok(()),
        rpc::DriveContent::Ours { label } => format!("drive {} of cluster {}", label.drive_id, label.cluster_id),
        rpc::DriveContent::Blank => "a blank drive".to_owned(),
        rpc::DriveContent::Foreign { what, .. } => what,
    };
    let message = format!("{} should be drive {} and is {found}: it is left alone", params.spec, params.drive_id);
    let error = RpcError::new(rpc::ErrorCode::Conflict, message);
    Err(error.with_hint("bring the drive back, or give it up with `penstock pool rm --force`, which loses the volumes on it").into())
}
