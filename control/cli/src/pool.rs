//! `penstock pool …`, `drain`, `scrub`.

use std::time::Duration;

use penstock_api::http::{DrainBody, DriveAddBody, DriveView, ImportBody, ImportReport, ScrubBody, path};
use penstock_api::rpc::{DrainInfo, Empty, ScrubInfo};
use penstock_api::{ByteSize, DriveId, DriveSpec};

use crate::args::{Pool, ScrubWord};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::wait::until_settled;

/// An id as it is, or the drive at the place that a spec names.
pub fn resolve(client: &Client, text: &str) -> Result<DriveId, Failure> {
    if let Ok(id) = text.parse::<DriveId>() {
        return Ok(id);
    }
    let usage = |message: String| Failure::Usage { message, hint: "name a drive by its id or spec, see `penstock pool ls`".to_owned() };
    let spec: DriveSpec =
        without_size(text).parse().map_err(|error| usage(format!("\"{text}\" is neither an id nor a drive spec: {error}")))?;
    let drives: Vec<DriveView> = client.get(path::DRIVES)?;
    let found: Vec<&DriveView> = drives.iter().filter(|drive| drive.spec.place() == spec.place()).collect();
    match found.as_slice() {
        [drive] => Ok(drive.drive_id),
        [] => Err(usage(format!("no drive of the pool is at {}", spec.place()))),
        several => {
            let on: Vec<String> = several.iter().map(|drive| format!("{} on {}", drive.drive_id, drive.node)).collect();
            Err(usage(format!("{} drives of the pool are at {}: {}", several.len(), spec.place(), on.join(", "))))
        }
    }
}

/// To name a malloc drive its size is not needed; the grammar wants one.
fn without_size(text: &str) -> String {
    if text.starts_with("malloc:") && !text.contains("size=") {
        return format!("{text}{}size=1", if text.contains('?') { '&' } else { '?' });
    }
    text.to_owned()
}

fn find(client: &Client, id: DriveId) -> Result<Option<DriveView>, Failure> {
    let drives: Vec<DriveView> = client.get(path::DRIVES)?;
    Ok(drives.into_iter().find(|drive| drive.drive_id == id))
}

pub fn run(client: &Client, form: Form, command: Pool) -> Result<(), Failure> {
    match command {
        Pool::Add { spec, node, stores, oplog, volatile, force, wait } => {
            let body = DriveAddBody { spec, node, volatile, stores, oplog_bytes: oplog, force };
            let drive: DriveView = client.send("POST", path::DRIVES, &body)?.json()?;
            let id = drive.drive_id;
            let look = || Ok(find(client, id)?.map(|drive| (drive.clone(), drive.progress)));
            let drive = until_settled(&format!("drive {id}"), Duration::from_secs(wait.timeout), look)?;
            output::show(form, &drive, |_| format!("added drive {id}"))
        }
        Pool::Ls => {
            let drives: Vec<DriveView> = client.get(path::DRIVES)?;
            output::show(form, &drives, |drives| table(drives))
        }
        Pool::Rm { drive, force, wait } => {
            let id = resolve(client, &drive)?;
            client.delete(&path::drive(id), force)?;
            let look = || Ok(find(client, id)?.map(|drive| ((), drive.progress)));
            until_settled(&format!("drive {id}"), Duration::from_secs(wait.timeout), look)?;
            output::show(form, &serde_json::json!({"removed": id}), |_| format!("removed drive {id}; nothing on it was erased"))
        }
        Pool::Import { specs, node, no_exports } => {
            let report: ImportReport = client.send("POST", path::IMPORT, &ImportBody { specs, node, exports: !no_exports })?.json()?;
            output::show(form, &report, imported)
        }
        Pool::ClearFence { drive } => {
            let id = resolve(client, &drive)?;
            client.send("POST", &path::clear_fence(id), &Empty {})?;
            output::show(form, &serde_json::json!({"cleared": id}), |_| format!("cleared the fence of drive {id}"))
        }
    }
}

fn imported(report: &ImportReport) -> String {
    let names: Vec<&str> = report.volumes.iter().map(|name| name.as_str()).collect();
    let mut text = format!(
        "imported {} drives, {} volumes and {} exports; {} were known\ncluster {}, node {}\n",
        report.drives.len(),
        report.volumes.len(),
        report.exports,
        report.known,
        report.cluster_id,
        report.node_id
    );
    if !names.is_empty() {
        text.push_str(&format!("volumes: {}\n", names.join(", ")));
    }
    report.renamed.iter().for_each(|renamed| text.push_str(&format!("renamed: {renamed}\n")));
    text
}

fn table(drives: &[DriveView]) -> String {
    if drives.is_empty() {
        return "the pool has no drive; add one, for example: penstock pool add 'file:/var/lib/penstock/d0.img?size=10GiB'".to_owned();
    }
    let row = |drive: &DriveView| {
        let seen = drive.observed.as_ref();
        let (total, free) = seen.map_or((0, 0), |seen| {
            seen.stores.iter().fold((0, 0), |(total, free), store| (total + store.extents_total, free + store.extents_free))
        });
        let undrained: u64 = seen.map_or(0, |seen| seen.stores.iter().map(|store| store.undrained_bytes.0).sum());
        let extent = 64 * 1024;
        vec![
            drive.drive_id.to_string(),
            drive.node.clone(),
            drive.spec.to_string(),
            output::or_dash(seen.map(|seen| seen.size.rounded())),
            output::or_dash(seen.map(|_| ByteSize((total - free.min(total)).saturating_mul(extent)).rounded())),
            output::or_dash(seen.map(|_| ByteSize(undrained).rounded())),
            drive.volumes.len().to_string(),
            output::progress(&drive.progress),
        ]
    };
    let header = ["DRIVE", "NODE", "SPEC", "SIZE", "USED", "UNDRAINED", "VOLUMES", "STATE"];
    output::table(&header, &[3, 4, 5, 6], drives.iter().map(row).collect()) + &output::hints(drives.iter().map(|drive| &drive.progress))
}

pub fn drain(client: &Client, form: Form, drive: Option<&str>) -> Result<(), Failure> {
    let drive_id = drive.map(|drive| resolve(client, drive)).transpose()?;
    let info: DrainInfo = client.send("POST", path::DRAIN, &DrainBody { drive_id })?.json()?;
    output::show(form, &info, |info| format!("drained {} in {} ms", info.drained_bytes.rounded(), info.ms))
}

pub fn scrub(client: &Client, form: Form, drive: &str, action: ScrubWord) -> Result<(), Failure> {
    let id = resolve(client, drive)?;
    let info: ScrubInfo = client.send("POST", &path::scrub(id), &ScrubBody { action: action.into() })?.json()?;
    output::show(form, &info, |info| {
        output::facts(vec![
            ("drive", info.drive_id.to_string()),
            ("running", info.running.to_string()),
            ("extents", format!("{} of {}", info.extents_done, info.extents_total)),
            ("blocks verified", info.blocks_verified.to_string()),
            ("blocks bad", info.blocks_bad.to_string()),
            ("passes", info.passes.to_string()),
            ("volumes with bad blocks", output::or_dash(Some(join(&info.volumes_bad)).filter(|text| !text.is_empty()))),
        ])
    })
}

fn join(ids: &[impl ToString]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
