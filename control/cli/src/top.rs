//! `penstock top`: rates between two looks, latencies since the volume was opened.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use penstock_api::http::{NodeView, VolumeView, path};
use penstock_api::rpc::LatencyInfo;
use penstock_api::{ByteSize, ReplicaId, VolumeId, VolumeName};
use serde::Serialize;

use crate::args::Top;
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Form};

struct Sample {
    at: Instant,
    nodes: Vec<NodeView>,
    volumes: Vec<VolumeView>,
}

#[derive(Debug, PartialEq, Serialize)]
struct Rates {
    volume_id: VolumeId,
    name: VolumeName,
    read_iops: f64,
    write_iops: f64,
    read_bytes_per_s: f64,
    write_bytes_per_s: f64,
    read_latency: LatencyInfo,
    write_latency: LatencyInfo,
    undrained_bytes: ByteSize,
    hosts: u32,
}

fn sample(client: &Client) -> Result<Sample, Failure> {
    let nodes = client.get(path::NODES)?;
    let volumes = client.get(path::VOLUMES)?;
    Ok(Sample { at: Instant::now(), nodes, volumes })
}

/// Counters begin anew when the node restarts, and are another's when another replica leads: then nothing is known of the time between, and
/// the rate is 0.
fn rates(before: &[VolumeView], now: &[VolumeView], seconds: f64) -> Vec<Rates> {
    let old: BTreeMap<ReplicaId, _> =
        before.iter().filter_map(|volume| volume.observed.as_ref()).map(|seen| (seen.replica_id, seen.counters)).collect();
    let rate = |volume: &VolumeView| {
        let seen = volume.observed.as_ref()?;
        let (counters, last) = (seen.counters, old.get(&seen.replica_id).copied().unwrap_or(seen.counters));
        let per_s = |now: u64, last: u64| now.saturating_sub(last) as f64 / seconds.max(0.001);
        Some(Rates {
            volume_id: volume.volume_id,
            name: volume.name.clone(),
            read_iops: per_s(counters.reads, last.reads),
            write_iops: per_s(counters.writes, last.writes),
            read_bytes_per_s: per_s(counters.read_bytes, last.read_bytes),
            write_bytes_per_s: per_s(counters.write_bytes, last.write_bytes),
            read_latency: seen.latency.read,
            write_latency: seen.latency.write,
            undrained_bytes: seen.undrained_bytes,
            hosts: seen.connections,
        })
    };
    now.iter().filter_map(rate).collect()
}

fn screen(nodes: &[NodeView], rates: &[Rates]) -> String {
    let mut text = String::new();
    for (node, seen) in nodes.iter().filter_map(|node| Some((node, node.node.as_ref()?))) {
        let cores: Vec<String> = seen.cores.iter().map(|core| format!("{}: {:.0} %", core.core, core.busy_fraction * 100.0)).collect();
        let away = if node.reachable { "" } else { "  (penstockd is away, this is the last look)" };
        text.push_str(&format!("{}  up {} s  cores {}{away}\n", node.name, seen.uptime_s, cores.join("  ")));
    }
    text.push('\n');
    let per_s = |bytes: f64| format!("{}/s", ByteSize(bytes as u64).rounded());
    let row = |rates: &Rates| {
        vec![
            rates.name.to_string(),
            format!("{:.0}", rates.read_iops),
            format!("{:.0}", rates.write_iops),
            per_s(rates.read_bytes_per_s),
            per_s(rates.write_bytes_per_s),
            format!("{}/{}", rates.read_latency.p50_us, rates.read_latency.p99_us),
            format!("{}/{}", rates.write_latency.p50_us, rates.write_latency.p99_us),
            rates.undrained_bytes.rounded(),
            rates.hosts.to_string(),
        ]
    };
    let header = ["NAME", "R IOPS", "W IOPS", "READ", "WRITE", "R p50/p99 µs", "W p50/p99 µs", "UNDRAINED", "HOSTS"];
    text + &output::table(&header, &[1, 2, 3, 4, 5, 6, 7, 8], rates.iter().map(row).collect())
}

pub fn run(client: &Client, form: Form, options: &Top) -> Result<(), Failure> {
    let mut before = sample(client)?;
    // Clearing the screen makes sense only where there is one.
    let clear = form == Form::Table && !options.once && std::io::stdout().is_terminal();
    loop {
        std::thread::sleep(Duration::from_secs_f64(options.interval));
        let now = sample(client)?;
        let rates = rates(&before.volumes, &now.volumes, (now.at - before.at).as_secs_f64());
        match form {
            Form::Json if !options.once => {
                // One line per look, for programs that read along.
                output::emit(&serde_json::to_string(&rates).map_err(|error| Failure::Garbled(error.to_string()))?)?;
            }
            _ => output::show(form, &rates, |rates| format!("{}{}", if clear { "\x1b[H\x1b[2J" } else { "" }, screen(&now.nodes, rates)))?,
        }
        if options.once {
            return Ok(());
        }
        before = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::http::Progress;
    use penstock_api::rpc::{BlockSize, VolumeCounters, VolumeInfo, VolumeLatency, VolumeState};

    fn volume(writes: u64) -> VolumeView {
        let id = |n: u128| penstock_api::Id::from_u128(0x0194_a5c1_b2d3_8001_8000_0000_0000_0000 + n).unwrap();
        let (volume_id, segment_id, replica_id) = (VolumeId(id(1)), penstock_api::SegmentId(id(2)), penstock_api::ReplicaId(id(3)));
        let (name, drive_id): (VolumeName, _) = ("v".parse().unwrap(), penstock_api::DriveId(id(4)));
        let observed = VolumeInfo {
            volume_id,
            segment_id,
            replica_id,
            name: name.clone(),
            size_bytes: ByteSize::gib(1),
            block_size: BlockSize::B4096,
            drive_id,
            origin: None,
            core: 0,
            state: VolumeState::Serving,
            reason: None,
            allocated_bytes: ByteSize(0),
            undrained_bytes: ByteSize(0),
            exports: vec![],
            snapshots: vec![],
            connections: 0,
            counters: VolumeCounters { writes, write_bytes: writes * 4096, ..VolumeCounters::default() },
            latency: VolumeLatency::default(),
            group: None,
        };
        VolumeView {
            volume_id,
            segment_id,
            name,
            size: ByteSize::gib(1),
            origin: None,
            block_size: BlockSize::B4096,
            progress: Progress::Settled,
            replicas: vec![],
            spare: None,
            change: None,
            exports: vec![],
            snapshots: vec![],
            observed: Some(observed),
        }
    }

    #[test]
    fn rates_are_differences_and_zero_across_a_restart() {
        let rate = |before: u64, now: u64| rates(&[volume(before)], &[volume(now)], 2.0)[0].write_iops;
        assert_eq!(rate(100, 300), 100.0);
        assert_eq!(rate(300, 10), 0.0);
        assert_eq!(rates(&[], &[volume(5)], 1.0)[0].write_iops, 0.0, "new since the last look");
    }
}
