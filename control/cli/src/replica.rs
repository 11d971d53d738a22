//! `penstock replica …`

use std::time::Duration;

use penstock_api::VolumeName;
use penstock_api::http::{Progress, ReplicaMoveBody, ReplicaRecoverBody, ReplicaReplaceBody, ReplicaView, VolumeView, path};
use penstock_api::rpc::GroupPart;
use serde::Serialize;

use crate::args::{Replica, Wait};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::pool;
use crate::recover;
use crate::volume;
use crate::wait::until_settled;

/// A replica beside the name of its volume.
#[derive(Serialize)]
struct Named {
    volume: VolumeName,
    #[serde(flatten)]
    replica: ReplicaView,
}

pub fn run(client: &Client, form: Form, command: Replica) -> Result<(), Failure> {
    match command {
        Replica::Ls { volume } => list(client, form, volume),
        Replica::Move { volume, from, to, drive, wait } => {
            let drive_id = drive.map(|drive| pool::resolve(client, &drive)).transpose()?;
            let body = ReplicaMoveBody { from: from.clone(), to: to.clone(), drive_id };
            let view = change(client, &volume, "move", &body, wait)?;
            output::show(form, &view, |_| format!("the replica of volume {volume} on {from} has moved to {to}"))
        }
        Replica::Replace { volume, node, on, drive, wait } => {
            let drive_id = drive.map(|drive| pool::resolve(client, &drive)).transpose()?;
            let view = change(client, &volume, "replace", &ReplicaReplaceBody { node: node.clone(), on, drive_id }, wait)?;
            output::show(form, &view, |_| format!("the replica of volume {volume} on {node} is replaced"))
        }
        Replica::GiveUp { volume, wait } => {
            let view = change(client, &volume, "give-up", &serde_json::json!({}), wait)?;
            output::show(form, &view, |_| format!("volume {volume} keeps the replicas that it had"))
        }
        Replica::Recover { volume, on: node, force, regardless } => {
            recover::run(client, form, &volume, &ReplicaRecoverBody { node, force, regardless })
        }
    }
}

/// Asks for it, and waits until no replica of the volume is on its way any more.
fn change(client: &Client, volume: &str, what: &str, body: &impl Serialize, wait: Wait) -> Result<Option<VolumeView>, Failure> {
    let begun: VolumeView = client.send("POST", &path::replicas(volume::checked(volume)?, what), body)?.json()?;
    until_changed(client, begun.name.as_str(), Duration::from_secs(wait.timeout))
}

/// Waits until no replica of a volume is on its way any more.
pub fn until_changed(client: &Client, volume: &str, limit: Duration) -> Result<Option<VolumeView>, Failure> {
    let look = || {
        let progress = |view: &VolumeView| view.change.as_ref().map_or(Progress::Settled, |change| change.progress.clone());
        Ok(volume::find(client, volume)?.map(|view| (view.clone(), progress(&view))))
    };
    until_settled(&format!("the change of volume {volume}"), limit, look)
}

fn list(client: &Client, form: Form, volume: Option<String>) -> Result<(), Failure> {
    let volumes = volume::some(client, volume)?;
    let of = |volume: VolumeView| volume.replicas.into_iter().map(move |replica| Named { volume: volume.name.clone(), replica });
    let rows: Vec<Named> = volumes.into_iter().flat_map(of).collect();
    output::show(form, &rows, |rows| {
        if rows.is_empty() {
            return "there are no volumes; create one, for example: penstock volume create db-0 --size 4GiB --replicas 3".to_owned();
        }
        let line = |row: &Named| [vec![row.volume.to_string()], columns(&row.replica)].concat();
        let header = [vec!["VOLUME"], HEADER.to_vec()].concat();
        output::table(&header, &RIGHT.map(|column| column + 1), rows.iter().map(line).collect())
            + &output::hints(rows.iter().map(|row| &row.replica.progress))
    })
}

const HEADER: [&str; 10] = ["MEMBER", "NODE", "ROLE", "TERM", "APPLIED", "LAG", "REBUILT", "TO COPY", "DRIVE", "STATE"];
const RIGHT: [usize; 6] = [0, 3, 4, 5, 6, 7];

/// The replicas of one volume.
pub fn table(replicas: &[ReplicaView]) -> String {
    output::table(&HEADER, &RIGHT, replicas.iter().map(columns).collect())
}

fn role(replica: &ReplicaView) -> &'static str {
    match replica.part {
        // It follows for good, and that it leads for a moment or asks the others is worth to be seen.
        Some(GroupPart::Follower) if replica.log_only => "log-only",
        Some(part) => part.word(),
        None => "single",
    }
}

fn columns(replica: &ReplicaView) -> Vec<String> {
    // What a node that is away said last is not what stands now.
    let fresh = |text: Option<String>| output::or_dash(text.filter(|_| replica.reachable));
    vec![
        replica.member.to_string(),
        replica.node.clone(),
        fresh(replica.observed.as_ref().map(|_| role(replica).to_owned())),
        fresh(replica.term.map(|term| term.to_string())),
        fresh(replica.applied.map(|applied| applied.to_string())),
        fresh(replica.lag.map(|lag| lag.to_string())),
        fresh(replica.rebuilt_percent.map(|percent| format!("{percent} %"))),
        fresh(replica.blocks_to_copy.map(|blocks| blocks.to_string())),
        replica.drive_id.to_string(),
        output::progress(&replica.progress),
    ]
}
