//! Benchmarks 1, 2 and 3: a 4 KiB write to three replicas, beside SPDK's raid1 with the same layout. What it costs, how long it takes, and how much
//! longer when one of the replicas is slow.

use std::rc::Rc;

use super::arms::Metric;
use super::cluster::{Cluster, ClusterArm, Figure, REPLICAS};
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::handicap::HandicapKind;
use crate::units::Nanos;

/// What stands for a drive with power-loss protection.
const MEDIA: Nanos = Nanos(15_000);
/// What stands for one that is failing.
const SLOW: Nanos = Nanos(5_000_000);
/// Writes a second while one replica is slow: far below what either arm does, so that what is seen is latency and not a queue.
const RATE: f64 = 2_000.0;
/// Room for all that wait meanwhile.
const DEPTH: u32 = 64;
/// Two seconds: 40 samples above the 99th percentile.
const TAIL_TURN: Nanos = Nanos(2_000_000_000);

const LAYOUT: &str = "core 1: load, and leader or raid1; core 0: both others, which sleep between events; three processes in each arm; durability: volatile memory";

/// Benchmark 1.
pub fn cost(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let name = "cost of a 4 KiB random write, QD32";
    if !bench.wants(name) {
        return Ok(());
    }
    let metric = Metric::CyclesPerOperation.available();
    let instead = if metric == Metric::CyclesPerOperation { "" } else { "; CPU TIME IN PLACE OF CYCLES: this machine shows no counters" };
    let arm = |name: &str, cluster: Cluster| ClusterArm {
        name: name.to_owned(),
        cluster: Rc::new(cluster),
        depth: 32,
        rate: None,
        // Counters see the whole turn.
        duration: Nanos(2 * TURN.0),
        warmup: Nanos(0),
        figure: Figure::Cost(metric),
        late: [Nanos(0); REPLICAS],
        least: 0.0,
    };
    let mut ours = arm("three replicas", Cluster::ours(bench, Nanos(0))?);
    super::Arm::rest(&mut ours)?;
    let mut peer = arm("raid1 over NVMe/TCP", Cluster::raid(bench, Nanos(0))?);
    let question = Question {
        name: name.to_owned(),
        unit: metric.unit(),
        gate: Gate::at_most(1.3, 0.8),
        control: Control::SpinOut,
        note: Some(format!(
            "{LAYOUT}, acknowledged when in the oplogs of two; every turn writes three times the oplog and drains it on all three{instead}"
        )),
    };
    bench.compare(question, &mut ours, &mut peer)
}

fn late(name: &str, cluster: &Rc<Cluster>, late: [Nanos; REPLICAS]) -> ClusterArm {
    ClusterArm {
        name: name.to_owned(),
        cluster: cluster.clone(),
        depth: 1,
        rate: None,
        duration: TURN,
        warmup: TURN_WARMUP,
        figure: Figure::MedianLess(MEDIA),
        late,
        least: 0.0,
    }
}

/// Benchmark 2.
pub fn latency(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let name = "QD1 write latency less media, p50";
    if !bench.wants(name) {
        return Ok(());
    }
    let mut ours = late("three replicas", &Rc::new(Cluster::ours(bench, MEDIA)?), [MEDIA; REPLICAS]);
    super::Arm::rest(&mut ours)?;
    let mut peer = late("raid1 over NVMe/TCP", &Rc::new(Cluster::raid(bench, MEDIA)?), [MEDIA; REPLICAS]);
    let question = Question {
        name: name.to_owned(),
        unit: "ns",
        gate: Gate::at_most(1.3, 0.9),
        control: Control::Spin,
        note: Some(format!("{LAYOUT} that answers after 15 µs; 4 KiB random")),
    };
    bench.compare(question, &mut ours, &mut peer)
}

/// Makes the processes of an arm.
type Open = fn(&Bench<'_>, Nanos) -> Result<Cluster, RatioError>;

/// Benchmark 3.
pub fn tail(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let slow = [MEDIA, SLOW, MEDIA];
    let note = format!(
        "{LAYOUT} that answers after 15 µs, one of the remote ones after 5 ms; 4 KiB random, {RATE} a second, open loop, from the intended start"
    );
    let cases: [(&str, Open, Gate, Control, f64); 2] = [
        // What waits for all of its replicas must show the slow one, or the layout hides it and our figure proves nothing.
        ("p99 of raid1, one of three 5 ms slow", Cluster::raid, Gate::at_least(2.0, 2.0), Control::None, SLOW.0 as f64),
        ("p99 of ours, one of three 5 ms slow", Cluster::ours, Gate::at_most(1.3, 1.05), Control::Fixed(HandicapKind::Sleep(SLOW.0)), 0.0),
    ];
    for (name, open, gate, control, least) in cases {
        if !bench.wants(name) {
            continue;
        }
        let cluster = Rc::new(open(bench, MEDIA)?);
        let arm = |name: &str, delays, least| ClusterArm {
            depth: DEPTH,
            rate: Some(RATE),
            duration: TAIL_TURN,
            figure: Figure::P99,
            least,
            ..late(name, &cluster, delays)
        };
        let (mut with, mut without) = (arm("one slow", slow, least), arm("none slow", [MEDIA; REPLICAS], 0.0));
        let question = Question { name: name.to_owned(), unit: "ns", gate, control, note: Some(note.clone()) };
        bench.compare(question, &mut with, &mut without)?;
    }
    Ok(())
}
