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

/// How an attempt tells what came of it, and what follows a rest.
pub type Told = Box<dyn FnOnce(Result<(), Errno>)>;
pub type Then = Box<dyn FnOnce()>;

/// Attempts something until it succeeds, with a rest after each failure; `done` after that, and never before.
pub fn persist(attempt: Rc<dyn Fn(Told)>, rest: Rc<dyn Fn(Errno, Then)>, done: Then) {
    let again = (attempt.clone(), rest);
    attempt(Box::new(move |result| match result {
        Ok(()) => done(),
        Err(errno) => {
            let (attempt, rest) = again;
            rest.clone()(errno, Box::new(move || persist(attempt, rest, done)));
        }
    }));
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

    /// Ends the associations of a subsystem; `done` when nothing that was sent on them is read any more, or with an error where one goes on.
    pub fn end_hosts(&self, nqn: &Nqn, done: impl FnOnce(Result<(), Errno>) + 'static) {
        match self.nvmf.find_subsystem(nqn.as_str()) {
            Some(subsystem) => subsystem.disconnect_all(done),
            None => done(Ok(())),
        }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn what_fails_is_attempted_again_after_a_rest_and_done_only_once_it_succeeded() {
        let log = Rc::new(RefCell::new(Vec::new()));
        let outcomes = RefCell::new(vec![Ok(()), Err(Errno::NOMEM), Err(Errno::AGAIN)]);
        let rests: Rc<RefCell<Vec<Then>>> = Rc::default();
        let (seen, resting, ended) = (log.clone(), rests.clone(), log.clone());
        let attempt: Rc<dyn Fn(Told)> =
            Rc::new(move |told| told(outcomes.borrow_mut().pop().expect("no attempt after one that succeeded")));
        let rest: Rc<dyn Fn(Errno, Then)> = Rc::new(move |errno, then| {
            seen.borrow_mut().push(format!("{errno:?}"));
            resting.borrow_mut().push(then);
        });
        persist(attempt, rest, Box::new(move || ended.borrow_mut().push("done".to_owned())));
        for left in [2, 1] {
            assert_eq!(log.borrow().len(), 3 - left, "the fence stands while it rests");
            let then = rests.borrow_mut().pop().expect("it rests");
            then();
        }
        assert_eq!(*log.borrow(), [format!("{:?}", Errno::AGAIN), format!("{:?}", Errno::NOMEM), "done".to_owned()]);
        assert!(rests.borrow().is_empty());
    }
}
