//! Exports of the node: doors opened and closed at run time, remembered, and opened again when their volume comes back.

use std::rc::Rc;

use penstock_api::rpc::{ControllerRange, Door, DriveState, Empty, ErrorCode, ExportAddParams, ExportInfo, ExportRemoveParams, RpcError};
use penstock_api::{DriveId, VolumeId};

use super::volumes::no_volume;
use super::{Answer, Node, fail};
use crate::door::{ALL_CONTROLLERS, Export, ExportError};
use crate::state::ExportEntry;

/// A door of a volume: being opened while `export` is absent.
pub(super) struct OpenExport {
    pub door: Door,
    controllers: Option<ControllerRange>,
    pub export: Option<Export>,
    waiters: Vec<Answer<ExportInfo>>,
}

impl OpenExport {
    pub fn info(&self) -> ExportInfo {
        let opened = self.export.as_ref().map(|e| e.opened.clone());
        ExportInfo {
            door: self.door.clone(),
            address: opened.as_ref().map(|o| o.address.clone()).unwrap_or_default(),
            nqn: opened.and_then(|o| o.nqn),
            connected_hosts: self.export.as_ref().map(Export::connected_hosts).unwrap_or_default(),
        }
    }
}

/// What a person is told of a door that did not open: which it was, and whose move is next.
fn of_export(error: &ExportError, door: &Door) -> RpcError {
    let message = format!("{door}: {error}");
    match error {
        // The name is taken, by another volume's door or by another of this volume.
        ExportError::Spdk { errno: spdk_rs::Errno::EXIST, .. } => {
            fail(ErrorCode::Conflict, message, "give this door an NQN or a name of its own")
        }
        ExportError::Spdk { hint, .. } => fail(ErrorCode::Internal, message, *hint),
        ExportError::Directory { .. } => fail(ErrorCode::Internal, message, "check the run directory"),
        ExportError::Nqn(_) => fail(ErrorCode::Invalid, message, "give the door an NQN"),
    }
}

impl Node {
    pub(super) fn export_add(self: &Rc<Self>, params: ExportAddParams, answer: Answer<ExportInfo>) {
        let ExportAddParams { volume_id: id, door, controllers } = params;
        if self.stop.is_stopping() {
            return answer(Err(fail(ErrorCode::NotReady, "penstockd is stopping", "try again when it runs again")));
        }
        let is_range = |range: &ControllerRange| (1..=range.last).contains(&range.first) && range.last <= ALL_CONTROLLERS.last;
        if let Some(ControllerRange { first, last }) = controllers.filter(|range| !is_range(range)) {
            let message = format!("controller ids {first} to {last} are not a range within 1 to {}", ALL_CONTROLLERS.last);
            return answer(Err(fail(ErrorCode::Invalid, message, "name a first and a last that is not below it")));
        }
        let Some(target) = self.target.borrow().clone() else {
            return answer(Err(fail(ErrorCode::NotReady, "the front doors are not open yet", "try again in a moment")));
        };
        let face = {
            let mut volumes = self.volumes.borrow_mut();
            let Some(volume) = volumes.get_mut(&id) else { return answer(Err(no_volume(id))) };
            if volume.deleting {
                return answer(Err(fail(ErrorCode::NotReady, format!("volume {id} is being deleted"), "export another")));
            }
            let state = self.drives.borrow().get(&volume.drive).map(|d| d.state);
            if !matches!(state, Some(DriveState::Serving | DriveState::Fenced | DriveState::Quarantined)) {
                return answer(Err(fail(
                    ErrorCode::NotReady,
                    format!("volume {id} does not serve yet"),
                    "try again when its drive is open",
                )));
            }
            if let Some(open) = volume.exports.iter_mut().find(|e| e.door == door) {
                match open.export {
                    Some(_) => return answer(Ok(open.info())),
                    None => return open.waiters.push(answer),
                }
            }
            volume.exports.push(OpenExport { door: door.clone(), controllers, export: None, waiters: vec![answer] });
            volume.face(id, controllers)
        };
        let node = self.clone();
        let asked = door.clone();
        target.add(&face, &door, move |result| node.on_export(id, &asked, result));
    }

    fn on_export(self: &Rc<Self>, id: VolumeId, door: &Door, result: Result<Export, ExportError>) {
        let mut controllers = None;
        let (waiters, outcome, stray) = {
            let mut volumes = self.volumes.borrow_mut();
            let exports = volumes.get_mut(&id).map(|v| &mut v.exports);
            let at = exports.as_ref().and_then(|exports| exports.iter().position(|e| e.door == *door));
            match (exports, at, result) {
                (Some(exports), Some(at), Ok(export)) => {
                    let open = &mut exports[at];
                    open.export = Some(export);
                    controllers = open.controllers;
                    (std::mem::take(&mut open.waiters), Ok(open.info()), None)
                }
                (Some(exports), Some(at), Err(error)) => {
                    let open = exports.remove(at);
                    tracing::warn!(volume = %id, %door, %error, "a door does not open");
                    (open.waiters, Err(of_export(&error, door)), None)
                }
                // The volume went while its door was being opened.
                (_, _, Ok(export)) => (Vec::new(), Err(no_volume(id)), Some(export)),
                (_, _, Err(_)) => return,
            }
        };
        if let Some(export) = stray {
            if let Some(target) = self.target.borrow().clone() {
                target.remove(export, |_| ());
            }
            return;
        }
        if let Ok(info) = &outcome {
            tracing::info!(volume = %id, %door, address = info.address, "a door is open");
            // Its part in the group may be another since the door was asked for.
            self.show_serving(id);
            let entry = ExportEntry { volume_id: id, door: door.clone(), controllers };
            let volatile = self.volumes.borrow().get(&id).and_then(|v| self.drives.borrow().get(&v.drive).map(|d| d.volatile));
            if volatile == Some(false) {
                let kept = self.remember(move |state| {
                    state.exports.retain(|e| e.volume_id != id || e.door != entry.door);
                    state.exports.push(entry);
                });
                if let Err(error) = kept {
                    tracing::warn!(%error, "the door will not open by itself after a restart");
                }
            }
        }
        for waiter in waiters {
            waiter(outcome.clone());
        }
    }

    pub(super) fn export_remove(self: &Rc<Self>, params: ExportRemoveParams, answer: Answer<Empty>) {
        let ExportRemoveParams { volume_id: id, door, force } = params;
        let asked = door.clone();
        let taken = {
            let mut volumes = self.volumes.borrow_mut();
            let exports = volumes.get_mut(&id).map(|v| &mut v.exports);
            match exports {
                None => None,
                Some(exports) => match exports.iter().position(|e| e.door == door) {
                    None => None,
                    Some(at) if exports[at].export.is_none() => {
                        return answer(Err(fail(ErrorCode::NotReady, format!("{door} is being opened"), "try again in a moment")));
                    }
                    Some(at) => {
                        let hosts = exports[at].info().connected_hosts;
                        if !hosts.is_empty() && !force {
                            let message = format!("{} hosts are connected through {door}: {}", hosts.len(), hosts.join(", "));
                            return answer(Err(fail(ErrorCode::Busy, message, "disconnect them, or unexport with force")));
                        }
                        Some(exports.remove(at))
                    }
                },
            }
        };
        if let Err(error) = self.remember(move |state| state.exports.retain(|e| e.volume_id != id || e.door != asked)) {
            tracing::warn!(%error, "the door may open again after a restart");
        }
        let Some(export) = taken.and_then(|open| open.export) else { return answer(Ok(Empty {})) };
        let Some(target) = self.target.borrow().clone() else { return answer(Ok(Empty {})) };
        target.remove(export, move |result| {
            tracing::info!(volume = %id, %door, "a door is closed");
            answer(result.map(|()| Empty {}).map_err(|e| of_export(&e, &door)));
        });
    }

    /// Closes all doors of these volumes; `then` when the last is closed. Remembered doors stay remembered.
    pub(super) fn close_exports_of(self: &Rc<Self>, volumes: Vec<VolumeId>, then: impl FnOnce(&Rc<Node>) + 'static) {
        let mut closing = Vec::new();
        for id in volumes {
            if let Some(volume) = self.volumes.borrow_mut().get_mut(&id) {
                closing.extend(volume.exports.drain(..).filter_map(|open| open.export));
            }
        }
        let target = self.target.borrow().clone();
        let (Some(target), false) = (target, closing.is_empty()) else { return then(self) };
        let left = Rc::new(std::cell::Cell::new(closing.len()));
        let then = Rc::new(std::cell::RefCell::new(Some(then)));
        for export in closing {
            let (node, left, then) = (self.clone(), left.clone(), then.clone());
            target.remove(export, move |result| {
                if let Err(error) = result {
                    tracing::warn!(%error, "a door did not close cleanly");
                }
                left.set(left.get() - 1);
                let last = if left.get() == 0 { then.borrow_mut().take() } else { None };
                if let Some(then) = last {
                    then(&node);
                }
            });
        }
    }

    /// Opens the doors that volumes of a drive had in this node's last life.
    pub(super) fn restore_exports(self: &Rc<Self>, drive: DriveId) {
        let wanted: Vec<ExportEntry> = {
            let volumes = self.volumes.borrow();
            let state = self.state.borrow();
            state.get().exports.iter().filter(|e| volumes.get(&e.volume_id).is_some_and(|v| v.drive == drive)).cloned().collect()
        };
        for entry in wanted {
            let (id, door) = (entry.volume_id, entry.door.clone());
            let params = ExportAddParams { volume_id: id, door, controllers: entry.controllers };
            self.export_add(
                params,
                Box::new(move |result| {
                    if let Err(error) = result {
                        tracing::warn!(volume = %id, door = %entry.door, %error, "a door of the last run does not open");
                    }
                }),
            );
        }
    }
}
