//! `penstock volume …`

use std::time::Duration;

use penstock_api::http::{
    ExportBody, ExportView, ReplicaView, TransferBody, UnexportBody, VolumeCreateBody, VolumeResizeBody, VolumeView, path,
};
use penstock_api::rpc::{BlockSize, Door, ErrorCode, GroupPart};

use crate::args::{Doors, Replicas, Volume, Wait};
use crate::client::{self, Client};
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::pool;
use crate::replica;
use crate::wait::until_settled;

/// A volume is named by its name or id; anything else would change the path that is asked for.
pub fn checked(volume: &str) -> Result<&str, Failure> {
    client::checked::<penstock_api::VolumeName, penstock_api::VolumeId>(volume, "volume", "see `penstock volume ls`")
}

pub fn find(client: &Client, volume: &str) -> Result<Option<VolumeView>, Failure> {
    match client.get(&path::volume(volume)) {
        Ok(view) => Ok(Some(view)),
        Err(Failure::Refused(error)) if error.code == ErrorCode::NotFound => Ok(None),
        Err(other) => Err(other),
    }
}

/// One volume, or all.
pub fn some(client: &Client, volume: Option<String>) -> Result<Vec<VolumeView>, Failure> {
    match volume {
        Some(volume) => Ok(vec![client.get(&path::volume(checked(&volume)?))?]),
        None => client.get(path::VOLUMES),
    }
}

fn settle(client: &Client, volume: &str, wait: Wait) -> Result<Option<VolumeView>, Failure> {
    let look = || Ok(find(client, volume)?.map(|view| (view.clone(), view.progress)));
    until_settled(&format!("volume {volume}"), Duration::from_secs(wait.timeout), look)
}

fn settle_door(client: &Client, volume: &str, at: &ExportView, wait: Wait) -> Result<Option<ExportView>, Failure> {
    let look = || {
        let exports = find(client, volume)?.map(|view| view.exports).unwrap_or_default();
        let found = exports.into_iter().find(|export| export.node_id == at.node_id && export.door == at.door);
        Ok(found.map(|export| (export.clone(), export.progress)))
    };
    until_settled(&format!("export {} of volume {volume}", at.door), Duration::from_secs(wait.timeout), look)
}

pub fn run(client: &Client, form: Form, command: Volume) -> Result<(), Failure> {
    match command {
        Volume::Create { name, size, sized, replicas, block_size, from, drive, wait } => {
            let size = size.or(sized);
            let block_size = block_size.map(|bytes| if bytes == "512" { BlockSize::B512 } else { BlockSize::B4096 });
            let drive_ids = drive.iter().map(|drive| pool::resolve(client, drive)).collect::<Result<_, _>>()?;
            let log_only = replicas.map_or(0, |replicas| replicas.log_only);
            let replicas = replicas.map(|Replicas { with_data, .. }| with_data);
            let body = VolumeCreateBody { name, size, block_size, replicas, log_only, drive_ids, from };
            let made: VolumeView = client.send("POST", path::VOLUMES, &body)?.json()?;
            let view = settle(client, &made.volume_id.to_string(), wait)?;
            let on: Vec<&str> = made.replicas.iter().map(|replica| replica.node.as_str()).collect();
            let on = if on.len() > 1 { format!(" on {}", on.join(", ")) } else { String::new() };
            let as_what = made.origin.as_ref().map(|origin| format!(" as {}@{}", origin.volume, origin.snapshot)).unwrap_or_default();
            output::show(form, &view, |_| format!("created volume {}{as_what} of {}{on}, id {}", made.name, made.size, made.volume_id))
        }
        Volume::Ls => {
            let volumes: Vec<VolumeView> = client.get(path::VOLUMES)?;
            output::show(form, &volumes, |volumes| table(volumes))
        }
        Volume::Show { volume } => {
            let view: VolumeView = client.get(&path::volume(checked(&volume)?))?;
            output::show(form, &view, facts)
        }
        Volume::Resize { volume, size, allow_shrink, wait } => {
            let body = VolumeResizeBody { size, allow_shrink };
            client.send("PATCH", &path::volume(checked(&volume)?), &body)?;
            let view = settle(client, &volume, wait)?;
            output::show(form, &view, |_| format!("volume {volume} has {size} now"))
        }
        Volume::Rm { volume, force, wait } => {
            // By id from here on: another volume may take the name as soon as it is free.
            let view: VolumeView = client.get(&path::volume(checked(&volume)?))?;
            let id = view.volume_id.to_string();
            client.delete(&path::volume(&id), force)?;
            settle(client, &id, wait)?;
            output::show(form, &serde_json::json!({"removed": view.volume_id}), |_| format!("removed volume {}", view.name))
        }
        Volume::Transfer { volume, to } => {
            let view: VolumeView = client.send("POST", &path::transfer(checked(&volume)?), &TransferBody { to: to.clone() })?.json()?;
            let leads =
                |replica: &ReplicaView| replica.observed.as_ref().is_some_and(|seen| seen.group.as_ref().is_some_and(|group| group.serves));
            // The one before may not have been looked at since: of two the later term counts.
            let there = view.replicas.iter().filter(|replica| replica.reachable && leads(replica));
            let leader = there.max_by_key(|replica| replica.term);
            match leader {
                Some(leader) if leader.node == to || leader.node_id.to_string() == to => output::show(form, &view, |view| {
                    format!("volume {} is led by {} now, term {}", view.name, leader.node, leader.term.unwrap_or(0))
                }),
                _ => Err(Failure::Unfinished {
                    what: format!("the transfer of volume {volume} to {to}"),
                    reason: "begun: it does not lead yet".to_owned(),
                }),
            }
        }
        Volume::Export { volume, doors, node, wait } => export(client, form, checked(&volume)?, &doors, node, wait),
        Volume::Unexport { volume, doors, node, force, wait } => unexport(client, form, checked(&volume)?, &doors, node, (force, wait)),
    }
}

fn usage(message: String) -> Failure {
    Failure::Usage { message, hint: "say which door: --nvmf[=ADDR:PORT], --vhost[=NAME] or --vfio-user[=NAME]".to_owned() }
}

fn export(client: &Client, form: Form, volume: &str, flags: &Doors, node: Option<String>, wait: Wait) -> Result<(), Failure> {
    let doors = flags.doors().map_err(usage)?;
    if doors.is_empty() {
        return Err(usage("no door is named".to_owned()));
    }
    let mut views = Vec::new();
    for door in doors {
        let begun: Vec<ExportView> = client.send("POST", &path::export(volume), &ExportBody { door, node: node.clone() })?.json()?;
        for export in &begun {
            views.extend(settle_door(client, volume, export, wait)?);
        }
    }
    output::show(form, &views, |views| {
        let are_several = views.iter().any(|view| view.node_id != views[0].node_id);
        let on = |view: &ExportView| if are_several { format!(" on {}", view.node) } else { String::new() };
        let line = |view: &ExportView| match &view.observed {
            Some(seen) => {
                let nqn = seen.nqn.as_ref().map(|nqn| format!(" as {nqn}")).unwrap_or_default();
                format!("exported volume {volume}{} over {} at {}{nqn}\n", on(view), view.door.kind_word(), seen.address)
            }
            None => format!("exported volume {volume}{} over {}\n", on(view), view.door),
        };
        views.iter().map(line).collect()
    })
}

fn same_kind(a: &Door, b: &Door) -> bool {
    std::mem::discriminant(a) == std::mem::discriminant(b)
}

/// The open doors that the flags mean. One that was opened under a name of its own is also meant by its kind alone,
/// if it is the only one of that kind.
fn meant(volume: &str, open: &[Door], flags: &Doors) -> Result<Vec<Door>, Failure> {
    if flags.is_empty() {
        return Ok(open.to_vec());
    }
    let named = flags.doors().map_err(usage)?;
    let pick = |door: &Door| {
        if open.contains(door) {
            return Ok(vec![door.clone()]);
        }
        let bare = match door {
            Door::Nvmf { address, port, nqn: None } => {
                let at = std::net::SocketAddr::new(*address, *port);
                let same_place =
                    |open: &&Door| matches!(open, Door::Nvmf { address: a, port: p, .. } if std::net::SocketAddr::new(*a, *p) == at);
                if let Some(found) = open.iter().find(same_place) {
                    return Ok(vec![found.clone()]);
                }
                at.to_string() == crate::args::NVMF_ANYWHERE
            }
            Door::Vhost { name } | Door::VfioUser { name } => name.is_none(),
            Door::Nvmf { .. } | Door::Local => false,
        };
        let alike: Vec<&Door> = open.iter().filter(|open| same_kind(open, door)).collect();
        match (bare, alike.as_slice()) {
            (true, [only]) => Ok(vec![(*only).clone()]),
            // One for each node of a volume with several replicas.
            (true, [_, ..]) if matches!(door, Door::Nvmf { .. }) => Ok(alike.into_iter().cloned().collect()),
            _ => {
                let shown: Vec<String> = open.iter().map(Door::to_string).collect();
                let has = if shown.is_empty() { "no door".to_owned() } else { shown.join(", ") };
                Err(Failure::Usage { message: format!("volume {volume} has no door {door}"), hint: format!("it has {has}") })
            }
        }
    };
    let each: Vec<Vec<Door>> = named.iter().map(pick).collect::<Result<_, _>>()?;
    Ok(each.concat())
}

fn unexport(
    client: &Client,
    form: Form,
    volume: &str,
    flags: &Doors,
    node: Option<String>,
    (force, wait): (bool, Wait),
) -> Result<(), Failure> {
    let view: VolumeView = client.get(&path::volume(volume))?;
    let is_there = |export: &&ExportView| node.as_ref().is_none_or(|node| export.node == *node || export.node_id.to_string() == *node);
    let exports: Vec<&ExportView> = view.exports.iter().filter(is_there).collect();
    // A door that is open on several nodes is one wish.
    let mut open: Vec<Door> = exports.iter().map(|export| export.door.clone()).collect();
    open.sort();
    open.dedup();
    let doors = meant(volume, &open, flags)?;
    for door in &doors {
        client.send("POST", &path::unexport(volume), &UnexportBody { door: door.clone(), node: node.clone(), force })?;
        for export in exports.iter().filter(|export| export.door == *door) {
            settle_door(client, volume, export, wait)?;
        }
    }
    output::show(form, &doors, |doors| match doors.as_slice() {
        [] => format!("volume {volume} has no door"),
        doors => doors.iter().map(|door| format!("closed {door} of volume {volume}\n")).collect(),
    })
}

fn table(volumes: &[VolumeView]) -> String {
    if volumes.is_empty() {
        return "there are no volumes; create one, for example: penstock volume create db-0 4GiB".to_owned();
    }
    let row = |volume: &VolumeView| {
        let seen = volume.observed.as_ref();
        let doors: Vec<String> = volume.exports.iter().map(|export| export.door.to_string()).collect();
        vec![
            volume.name.to_string(),
            volume.size.rounded(),
            output::or_dash(seen.map(|seen| seen.allocated_bytes.rounded())),
            volume.block_size.to_string(),
            count(&volume.replicas),
            output::or_dash(leader(volume)),
            output::or_dash(Some(doors.join(" ")).filter(|doors| !doors.is_empty())),
            output::or_dash(seen.map(|seen| seen.connections.to_string())),
            output::progress(&volume.progress),
        ]
    };
    let header = ["NAME", "SIZE", "ALLOCATED", "BLOCK", "REPLICAS", "LEADER", "EXPORTS", "HOSTS", "STATE"];
    output::table(&header, &[1, 2, 3, 4, 7], volumes.iter().map(row).collect())
        + &output::hints(volumes.iter().map(|volume| &volume.progress))
}

/// The node of the replica that leads, as far as the nodes that are there say.
fn leader(volume: &VolumeView) -> Option<String> {
    let leads = |replica: &&ReplicaView| replica.reachable && replica.part == Some(GroupPart::Leader);
    volume.replicas.iter().filter(leads).max_by_key(|replica| replica.term).map(|replica| replica.node.clone())
}

/// As `--replicas` takes it.
fn count(replicas: &[ReplicaView]) -> String {
    let log_only = replicas.iter().filter(|replica| replica.log_only).count();
    let with_data = replicas.len() - log_only;
    if log_only == 0 { with_data.to_string() } else { format!("{with_data}+log") }
}

/// What is left of the redundancy.
fn spare(volume: &VolumeView) -> String {
    match volume.spare {
        Some(0) => "none more: with one less the volume waits".to_owned(),
        Some(more) => format!("any {more} more"),
        None => "nobody leads: most replicas have to be there".to_owned(),
    }
}

fn facts(volume: &VolumeView) -> String {
    let mut rows = vec![
        ("name", volume.name.to_string()),
        ("id", volume.volume_id.to_string()),
        ("state", output::progress(&volume.progress)),
        ("size", format!("{} ({} bytes)", volume.size.rounded(), volume.size.bytes())),
        ("block size", volume.block_size.to_string()),
        ("segment", volume.segment_id.to_string()),
    ];
    let are_several = volume.replicas.len() > 1;
    match volume.replicas.as_slice() {
        [only] => {
            rows.extend([("node", only.node.clone()), ("drive", only.drive_id.to_string()), ("replica", only.replica_id.to_string())])
        }
        several => rows.extend([("replicas", count(several)), ("leader", output::or_dash(leader(volume))), ("may be lost", spare(volume))]),
    }
    for export in &volume.exports {
        let seen = export.observed.as_ref();
        let at = seen.map(|seen| {
            let nqn = seen.nqn.as_ref().map(|nqn| format!(", {nqn}")).unwrap_or_default();
            format!(" at {}{nqn}, {} hosts", seen.address, seen.connected_hosts.len())
        });
        let on = if are_several { format!("{}: ", export.node) } else { String::new() };
        rows.push(("export", format!("{on}{}{} ({})", export.door, at.unwrap_or_default(), output::progress(&export.progress))));
    }
    if let Some(origin) = &volume.origin {
        rows.push(("clone of", format!("{}@{}", origin.volume, origin.snapshot)));
    }
    if !volume.snapshots.is_empty() {
        rows.push(("snapshots", volume.snapshots.len().to_string()));
    }
    if let Some(seen) = &volume.observed {
        let (counters, latency) = (&seen.counters, &seen.latency);
        rows.extend([
            ("core", seen.core.to_string()),
            ("allocated", seen.allocated_bytes.rounded()),
            ("undrained", seen.undrained_bytes.rounded()),
            ("hosts", seen.connections.to_string()),
            ("reads", format!("{}, {} bytes", counters.reads, counters.read_bytes)),
            ("writes", format!("{}, {} bytes", counters.writes, counters.write_bytes)),
            ("errors", counters.errors.to_string()),
            ("read latency", latency_line(&latency.read)),
            ("write latency", latency_line(&latency.write)),
        ]);
    }
    let table = if are_several { format!("\n{}", replica::table(&volume.replicas)) } else { String::new() };
    let doors = volume.exports.iter().map(|export| &export.progress);
    let each = [&volume.progress].into_iter().chain(doors).chain(volume.replicas.iter().map(|replica| &replica.progress));
    output::facts(rows) + &table + &output::hints(each)
}

fn latency_line(latency: &penstock_api::rpc::LatencyInfo) -> String {
    format!("p50 {} µs, p99 {} µs, p99.9 {} µs, max {} µs", latency.p50_us, latency.p99_us, latency.p999_us, latency.max_us)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nvmf(port: u16) -> Door {
        Door::Nvmf { address: [127, 0, 0, 1].into(), port, nqn: None }
    }

    #[test]
    fn unexport_flags_mean_open_doors() {
        let named = Door::Vhost { name: Some("x".parse().unwrap()) };
        let open = [nvmf(4421), named.clone()];
        let flags = |nvmf: Option<&str>, vhost: Option<&str>| Doors {
            nvmf: nvmf.map(|at| at.parse().unwrap()),
            vhost: vhost.map(str::to_owned),
            ..Doors::default()
        };
        assert_eq!(meant("v", &open, &flags(None, None)).unwrap(), open);
        assert_eq!(meant("v", &open, &flags(Some("127.0.0.1:4421"), None)).unwrap(), [nvmf(4421)]);
        assert_eq!(meant("v", &open, &flags(Some("0.0.0.0:0"), None)).unwrap(), [nvmf(4421)], "the only one of its kind");
        assert_eq!(meant("v", &open, &flags(None, Some(""))).unwrap(), [named]);
        let failure = meant("v", &open, &flags(Some("127.0.0.1:9"), None)).unwrap_err();
        assert_eq!(failure.code(), 2);
        let each = [nvmf(1), nvmf(2)];
        assert_eq!(meant("v", &each, &flags(Some("0.0.0.0:0"), None)).unwrap(), each, "one on each node");
        assert!(meant("v", &each, &flags(Some("127.0.0.1:4420"), None)).is_err());
    }

    #[test]
    fn volume_argument_never_changes_the_path() {
        assert!(checked("db-0").is_ok());
        for bad in ["", "a/b", "../node", "a?force=true", "a b"] {
            assert!(checked(bad).is_err(), "{bad}");
        }
    }
}
