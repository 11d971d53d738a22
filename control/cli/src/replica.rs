//! `penstock replica ls`.

use penstock_api::VolumeName;
use penstock_api::http::{ReplicaView, VolumeView, path};
use serde::Serialize;

use crate::args::Replica;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::volume;

/// A replica beside the name of its volume.
#[derive(Serialize)]
struct Named {
    volume: VolumeName,
    #[serde(flatten)]
    replica: ReplicaView,
}

pub fn run(client: &Client, form: Form, command: Replica) -> Result<(), Failure> {
    let Replica::Ls { volume } = command;
    let volumes: Vec<VolumeView> = match volume {
        Some(volume) => vec![client.get(&path::volume(volume::checked(&volume)?))?],
        None => client.get(path::VOLUMES)?,
    };
    let of = |volume: VolumeView| volume.replicas.into_iter().map(move |replica| Named { volume: volume.name.clone(), replica });
    let rows: Vec<Named> = volumes.into_iter().flat_map(of).collect();
    output::show(form, &rows, |rows| {
        if rows.is_empty() {
            return "there are no volumes; create one, for example: penstock volume create db-0 --size 4GiB --replicas 3".to_owned();
        }
        let line = |row: &Named| [vec![row.volume.to_string()], columns(&row.replica)].concat();
        let header = [vec!["VOLUME"], HEADER.to_vec()].concat();
        output::table(&header, &RIGHT.map(|column| column + 1), rows.iter().map(line).collect())
    })
}

const HEADER: [&str; 8] = ["MEMBER", "NODE", "ROLE", "TERM", "APPLIED", "LAG", "DRIVE", "STATE"];
const RIGHT: [usize; 4] = [0, 3, 4, 5];

/// The replicas of one volume.
pub fn table(replicas: &[ReplicaView]) -> String {
    output::table(&HEADER, &RIGHT, replicas.iter().map(columns).collect())
}

fn columns(replica: &ReplicaView) -> Vec<String> {
    // What a node that is away said last is not what stands now.
    let fresh = |text: Option<String>| output::or_dash(text.filter(|_| replica.reachable));
    vec![
        replica.member.to_string(),
        replica.node.clone(),
        fresh(Some(replica.part.map_or("single", |part| part.word()).to_owned())),
        fresh(replica.term.map(|term| term.to_string())),
        fresh(replica.applied.map(|applied| applied.to_string())),
        fresh(replica.lag.map(|lag| lag.to_string())),
        replica.drive_id.to_string(),
        output::progress(&replica.progress),
    ]
}
