//! Stores that panicked, as the app thread knows them: recorded off the drive, shown, and left alone at each start until an operator
//! clears them. How one is caught is the core's part.

use std::rc::Rc;

use penstock_api::DriveId;
use penstock_api::rpc::DriveState;
use penstock_engine::FenceReason;

use super::Node;
use super::drives::Drive;
use crate::core::DriveKey;
use crate::state::{QuarantineEntry, fence_text};

impl Node {
    pub(super) fn on_quarantined(self: &Rc<Self>, key: DriveKey, store: u32, panic: String) {
        let Some(id) = self.drive_of_key(key) else { return };
        tracing::error!(drive = %id, store, panic, "a store panicked: it is quarantined, the others go on");
        let at_s = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let entry = QuarantineEntry { drive_id: id, store, panic: panic.clone(), at_s };
        let kept = self.remember(|state| {
            state.quarantines.retain(|q| (q.drive_id, q.store) != (id, store));
            state.quarantines.push(entry);
        });
        if let Err(error) = kept {
            tracing::error!(drive = %id, store, %error, "the quarantine could not be recorded: the next start runs this store again");
        }
        if let Some(place) = self.drives.borrow_mut().get_mut(&id).and_then(|drive| drive.stores.get_mut(store as usize)) {
            place.quarantined = Some(panic);
        }
        // One that is gone stays missing, whatever its stores do while they end.
        if self.drives.borrow().get(&id).is_some_and(|drive| drive.state != DriveState::Missing) {
            self.on_store_settled(id);
        }
    }

    /// The state of an open drive, by what stands against it.
    pub(super) fn judge_drive(&self, id: DriveId) {
        let fence = self.state.borrow().fence(id);
        if let Some(drive) = self.drives.borrow_mut().get_mut(&id) {
            drive.judge(fence);
        }
    }
}

impl Drive {
    fn judge(&mut self, fence: Option<FenceReason>) {
        let fallen: Vec<String> = self
            .stores
            .iter()
            .enumerate()
            .filter_map(|(no, place)| place.quarantined.as_ref().map(|panic| format!("store {no} fell: {panic}")))
            .collect();
        (self.state, self.reason) = match (fallen.is_empty(), fence) {
            (true, None) => (DriveState::Serving, None),
            (true, Some(reason)) => {
                let why = format!("{}; clear the fence when the drive is known to be good", fence_text(reason));
                (DriveState::Fenced, Some(why))
            }
            (false, fence) => {
                let mut why = fallen.join("; ");
                if let Some(reason) = fence {
                    why.push_str(&format!("; and the drive is fenced: {}", fence_text(reason)));
                }
                why.push_str("; report it, and clear the fence to run the store again");
                (DriveState::Quarantined, Some(why))
            }
        };
    }
}
