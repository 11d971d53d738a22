//! Coming up again after a restart, and going down: SIGTERM answers what is held, drains, closes the doors and leaves.
//!
//! A second signal leaves at once (the handler itself does that). Not here: what a store does when it stops.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use penstock_api::rpc::DriveAddParams;
use penstock_api::{DriveId, DriveSpec, VolumeId};
use spdk_rs::thread::{Activity, Poller};

use super::drives::Gate;
use super::{Later, Node, Replier};
use crate::label::{self, Found};
use crate::state::DriveEntry;

#[derive(Default)]
pub(super) struct StopState {
    stopping: Cell<bool>,
    /// What is due at which time.
    timers: RefCell<Vec<(Instant, Later)>>,
}

impl StopState {
    pub fn is_stopping(&self) -> bool {
        self.stopping.get()
    }
}

/// Set by the first SIGTERM or SIGINT; the second ends the process.
static SIGNALLED: std::sync::OnceLock<Arc<AtomicBool>> = std::sync::OnceLock::new();

/// Exit code of a process that was told twice to leave.
const EXIT_AT_ONCE: i32 = 130;

/// Takes SIGTERM and SIGINT. Before SPDK starts.
///
/// # Errors
/// When the handlers cannot be set.
pub fn take_signals() -> std::io::Result<()> {
    let flag = SIGNALLED.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGTERM, signal_hook::consts::SIGINT] {
        // In this order: the first signal finds the flag unset and sets it, the second finds it set and leaves.
        signal_hook::flag::register_conditional_shutdown(signal, EXIT_AT_ONCE, flag.clone())?;
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(())
}

/// How long hosts are kept out while drives of the last run are opened.
const RESTORE_BOUND: Duration = Duration::from_secs(10);

/// How often signals and timers are looked at.
const WATCH_US: u64 = 50_000;

impl Node {
    pub(super) fn watch_signals(self: &Rc<Self>) {
        let poller = Poller::timed("penstock_watch", WATCH_US, || {
            let Some(node) = super::current() else { return Activity::Idle };
            if SIGNALLED.get().is_some_and(|flag| flag.load(Ordering::Relaxed)) && !node.stop.stopping.get() {
                node.stop("a signal");
            }
            node.run_timers();
            Activity::Idle
        });
        match poller {
            Ok(poller) => self.pollers.borrow_mut().push(poller),
            Err(errno) => tracing::error!(%errno, "signals are not watched: stop penstockd by a signal twice"),
        }
    }

    /// Calls `then` when the time has passed.
    pub(super) fn after(&self, delay: Duration, then: impl FnOnce(&Rc<Node>) + 'static) {
        self.stop.timers.borrow_mut().push((Instant::now() + delay, Box::new(then)));
    }

    fn run_timers(self: &Rc<Self>) {
        let now = Instant::now();
        loop {
            let due = {
                let mut timers = self.stop.timers.borrow_mut();
                timers.iter().position(|(at, _)| *at <= now).map(|at| timers.swap_remove(at).1)
            };
            match due {
                Some(due) => due(self),
                None => return,
            }
        }
    }

    /// Answers what is held, drains, closes, leaves; at the bound it leaves as it is, which loses nothing acknowledged.
    pub(crate) fn stop(self: &Rc<Self>, why: &str) {
        if self.stop.stopping.replace(true) {
            return;
        }
        tracing::info!(why, timeout_s = self.config.stop_timeout_s, "penstockd stops");
        self.after(Duration::from_secs(u64::from(self.config.stop_timeout_s)), |_| {
            tracing::warn!("stopping takes too long: leaving as it is. Recovery reads the rest from the oplog");
            spdk_rs::app::exit_now(0);
        });
        // Stores first: they answer held commands, so that no door has to wait for one.
        let drives: Vec<DriveId> = self.drives.borrow().keys().copied().collect();
        let left = Rc::new(Cell::new(drives.len() + 1));
        let step = move |node: &Rc<Node>| {
            left.set(left.get() - 1);
            if left.get() == 0 {
                let volumes: Vec<VolumeId> = node.volumes.borrow().keys().copied().collect();
                node.close_exports_of(volumes, |node| node.end());
            }
        };
        for id in drives {
            let step = step.clone();
            self.quiet_drive(id, step);
        }
        step(self);
    }

    fn end(self: &Rc<Self>) {
        let drives: Vec<DriveId> = self.drives.borrow().keys().copied().collect();
        let left = Rc::new(Cell::new(drives.len() + 1));
        let step = move |node: &Rc<Node>| {
            left.set(left.get() - 1);
            if left.get() == 0 {
                node.end_cores();
            }
        };
        for id in drives {
            self.release_drive(id, step.clone());
        }
        step(self);
    }

    fn end_cores(self: &Rc<Self>) {
        let cores = self.cores.borrow().clone();
        // SPDK stops when every core has said that its loop is gone, however long that takes it.
        let ended = Gate::new(cores.len() + 1, |node| {
            node.pollers.borrow_mut().clear();
            super::NODE.with_borrow_mut(Option::take);
            tracing::info!("penstockd has stopped");
            spdk_rs::app::stop(0);
        });
        let app = spdk_rs::thread::app_thread().expect("on the app thread");
        for core in &cores {
            let gate = ended.clone();
            let (token, _) = self.continue_with(move |node, ()| gate.pass(node));
            let replier = Replier::new(token, app.clone());
            let sent = core.thread.send(move || {
                crate::core::end();
                replier.reply(());
                spdk_rs::thread::exit_current();
            });
            if sent.is_err() {
                tracing::debug!(core = core.core, "a core had ended already");
                ended.pass(self);
            }
        }
        ended.pass(self);
    }

    /// Opens the drives of the config and of the last run.
    pub(super) fn restore(self: &Rc<Self>) {
        let state = self.state.borrow().get().clone();
        let named: Vec<DriveSpec> = self.config.drives.clone();
        let known: Vec<DriveEntry> = state.drives;
        let only_known = known.iter().filter(|entry| !named.iter().any(|spec| spec.place() == entry.spec.place())).cloned();
        let mut wanted: Vec<DriveSpec> = only_known.map(|entry| entry.spec).collect();
        wanted.extend(named);
        let left = Rc::new(Cell::new(wanted.len() + 1));
        let step = move |node: &Rc<Node>| {
            left.set(left.get() - 1);
            if left.get() == 0 {
                node.let_hosts_in();
                node.drain_and_exit_if_asked();
            }
        };
        // One drive that takes long must not keep the others' hosts out.
        self.after(RESTORE_BOUND, |node| node.let_hosts_in());
        for spec in wanted {
            self.restore_drive(spec, step.clone());
        }
        step(self);
    }

    /// A drive is opened by what its label says; a blank one is not ours to format.
    fn restore_drive(self: &Rc<Self>, spec: DriveSpec, then: impl FnOnce(&Rc<Node>) + 'static) {
        let remembered =
            self.state.borrow().get().drives.iter().find(|entry| entry.spec.place() == spec.place()).map(|entry| entry.drive_id);
        let shown = spec.clone();
        self.drive_look(spec.clone(), move |node, found| {
            let label = match found {
                Ok(Found::Ours(label)) => label::ids(&label),
                Ok(Found::Blank) => {
                    tracing::warn!(spec = %shown, "the drive is blank: add it with `penstock pool add`");
                    Err(super::fail(penstock_api::rpc::ErrorCode::NotFound, "the drive is blank", "add it"))
                }
                Ok(Found::Foreign { what, at }) => {
                    tracing::error!(spec = %shown, what, at, "the drive is not Penstock's: it is left alone");
                    Err(super::fail(penstock_api::rpc::ErrorCode::ForeignData, "the drive is not Penstock's", "name another"))
                }
                Err(error) => {
                    tracing::error!(spec = %shown, %error, "the drive does not open");
                    Err(error)
                }
            };
            let label = match label {
                Ok(label) => label,
                Err(error) => {
                    if let Some(id) = remembered {
                        node.show_missing(id, shown, error.message);
                    }
                    return then(node);
                }
            };
            let params = DriveAddParams {
                spec: shown,
                drive_id: label.drive_id,
                cluster_id: label.cluster_id,
                node_id: label.node_id,
                stores: None,
                oplog_bytes: None,
                force: false,
                open_only: true,
            };
            let node_again = node.clone();
            node.drive_add(
                params,
                Box::new(move |result| {
                    if let Err(error) = result {
                        tracing::error!(%error, "a drive of the last run does not open");
                    }
                    then(&node_again);
                }),
            );
        });
    }

    fn drain_and_exit_if_asked(self: &Rc<Self>) {
        if !self.config.exit_after_drain {
            return;
        }
        self.drain(
            penstock_api::rpc::DrainParams::default(),
            Box::new(|result| {
                match result {
                    Ok(info) => tracing::info!(bytes = info.drained_bytes.bytes(), ms = info.ms, "all is drained"),
                    Err(error) => tracing::error!(%error, "not all is drained"),
                }
                if let Some(node) = super::current() {
                    node.stop("--exit-after-drain");
                }
            }),
        );
    }
}
