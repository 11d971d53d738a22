//! `penstock snapshot …`

use std::time::Duration;

use penstock_api::VolumeName;
use penstock_api::http::{SnapshotCreateBody, SnapshotView, VolumeView, path};
use serde::Serialize;

use crate::args::{Snapshot, Wait};
use crate::client::{self, Client};
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::volume;
use crate::wait::until_settled;

/// A snapshot beside the name of its volume.
#[derive(Serialize)]
struct Named {
    volume: VolumeName,
    #[serde(flatten)]
    snapshot: SnapshotView,
}

pub fn run(client: &Client, form: Form, command: Snapshot) -> Result<(), Failure> {
    match command {
        Snapshot::Create { volume, name, wait } => {
            let body = SnapshotCreateBody { name };
            let taken: SnapshotView = client.send("POST", &path::snapshots(volume::checked(&volume)?), &body)?.json()?;
            let view = settle(client, &volume, &taken.snapshot_id.to_string(), wait)?;
            output::show(form, &view, |_| format!("took snapshot {} of volume {volume}, id {}", taken.name, taken.snapshot_id))
        }
        Snapshot::Ls { volume } => list(client, form, volume),
        Snapshot::Rm { volume, name, wait } => {
            client.delete(&path::snapshot(volume::checked(&volume)?, checked(&name)?), false)?;
            settle(client, &volume, &name, wait)?;
            output::show(form, &serde_json::json!({"removed": name}), |_| format!("removed snapshot {name} of volume {volume}"))
        }
    }
}

fn checked(snapshot: &str) -> Result<&str, Failure> {
    client::checked::<VolumeName, penstock_api::SnapshotId>(snapshot, "snapshot", "see `penstock snapshot ls`")
}

fn settle(client: &Client, volume: &str, name_or_id: &str, wait: Wait) -> Result<Option<SnapshotView>, Failure> {
    let look = || {
        let known: Vec<SnapshotView> = client.get(&path::snapshots(volume))?;
        let is_meant = |known: &SnapshotView| known.name.as_str() == name_or_id || known.snapshot_id.to_string() == name_or_id;
        Ok(known.into_iter().find(is_meant).map(|known| (known.clone(), known.progress)))
    };
    until_settled(&format!("snapshot {name_or_id} of volume {volume}"), Duration::from_secs(wait.timeout), look)
}

fn list(client: &Client, form: Form, volume: Option<String>) -> Result<(), Failure> {
    let volumes: Vec<VolumeView> = volume::some(client, volume)?;
    let of = |volume: VolumeView| volume.snapshots.into_iter().map(move |snapshot| Named { volume: volume.name.clone(), snapshot });
    let rows: Vec<Named> = volumes.into_iter().flat_map(of).collect();
    output::show(form, &rows, |rows| {
        if rows.is_empty() {
            return "there are no snapshots; take one, for example: penstock snapshot create db-0 monday".to_owned();
        }
        let line = |row: &Named| {
            let seen = row.snapshot.observed.as_ref();
            vec![
                row.volume.to_string(),
                row.snapshot.name.to_string(),
                output::or_dash(seen.map(|seen| seen.size_bytes.rounded())),
                output::or_dash(seen.map(|seen| seen.allocated_bytes.rounded())),
                row.snapshot.clones.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
                row.snapshot.snapshot_id.to_string(),
                output::progress(&row.snapshot.progress),
            ]
        };
        output::table(&["VOLUME", "NAME", "SIZE", "ALLOCATED", "CLONES", "ID", "STATE"], &[2, 3], rows.iter().map(line).collect())
            + &output::hints(rows.iter().map(|row| &row.snapshot.progress))
    })
}
