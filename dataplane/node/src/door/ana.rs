//! What NVMe hosts with several paths are told of this node's: optimized while the volume is served here, inaccessible while it is not.
//!
//! A change is pause, set, resume, one after the other for each subsystem; of what is wanted meanwhile the last counts. Only for volumes
//! of several replicas: the others have one path. Not here: who serves, which the group decides.

use std::rc::Rc;

use penstock_api::Nqn;
use spdk_rs::Errno;
use spdk_rs::nvmf::{AnaState, Listen};

use super::Target;

/// How one subsystem's paths are, and are to be.
#[derive(Debug)]
pub struct Path {
    listen: Listen,
    shown: bool,
    wanted: bool,
    /// A change is under way.
    changing: bool,
}

pub fn state(serves: bool) -> AnaState {
    if serves { AnaState::Optimized } else { AnaState::Inaccessible }
}

impl Target {
    /// A subsystem with several paths shows this from the start.
    pub(super) fn begin_path(&self, nqn: &Nqn, listen: Listen, serves: bool) {
        let path = Path { listen, shown: serves, wanted: serves, changing: false };
        self.paths.borrow_mut().insert(nqn.as_str().to_owned(), path);
    }

    pub(super) fn end_path(&self, nqn: &Nqn) {
        self.paths.borrow_mut().remove(nqn.as_str());
    }

    /// Tells hosts whether the volume is served here; nothing for a subsystem with one path.
    pub fn want_path(self: &Rc<Self>, nqn: &Nqn, serves: bool) {
        if let Some(path) = self.paths.borrow_mut().get_mut(nqn.as_str()) {
            path.wanted = serves;
        }
        self.change_path(nqn.as_str().to_owned());
    }

    /// Ends the associations of a subsystem; `done` when nothing that was sent on them is read any more.
    pub fn end_hosts(&self, nqn: &Nqn, done: impl FnOnce() + 'static) {
        let Some(subsystem) = self.nvmf.find_subsystem(nqn.as_str()) else { return done() };
        let nqn = nqn.clone();
        subsystem.disconnect_all(move |result| {
            if let Err(errno) = result {
                tracing::warn!(%nqn, %errno, "hosts of a volume that another node leads now are not all gone");
            }
            done();
        });
    }

    fn change_path(self: &Rc<Self>, nqn: String) {
        let (listen, wanted) = {
            let mut paths = self.paths.borrow_mut();
            let Some(path) = paths.get_mut(&nqn).filter(|path| !path.changing && path.shown != path.wanted) else { return };
            path.changing = true;
            (path.listen.clone(), path.wanted)
        };
        let (this, name) = (self.clone(), nqn.clone());
        let done = move |result: Result<(), Errno>| {
            {
                let mut paths = this.paths.borrow_mut();
                let Some(path) = paths.get_mut(&nqn) else { return };
                path.changing = false;
                match result {
                    Ok(()) => path.shown = wanted,
                    // Hosts that go by what they were told last find path errors here, and try the others.
                    Err(errno) => return tracing::warn!(%nqn, %errno, wanted, "hosts cannot be told whether this path serves"),
                }
            }
            tracing::debug!(%nqn, serves = wanted, "hosts are told whether this path serves");
            this.change_path(nqn);
        };
        self.set_path(name, listen, wanted, done);
    }

    fn set_path(&self, nqn: String, listen: Listen, serves: bool, done: impl FnOnce(Result<(), Errno>) + 'static) {
        let nvmf = self.nvmf;
        let Some(subsystem) = nvmf.find_subsystem(&nqn) else { return done(Err(Errno::NODEV)) };
        subsystem.pause(move |paused| {
            let Some(subsystem) = nvmf.find_subsystem(&nqn).filter(|_| paused.is_ok()) else {
                return done(Err(paused.err().unwrap_or(Errno::NODEV)));
            };
            subsystem.set_ana_state(&listen, state(serves), 0, move |set| match nvmf.find_subsystem(&nqn) {
                Some(subsystem) => subsystem.resume(move |resumed| done(set.and(resumed))),
                None => done(Err(Errno::NODEV)),
            });
        });
    }
}
