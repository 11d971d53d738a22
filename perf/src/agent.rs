//! `penstock-perf agent`: a load generator that stays up and takes its orders as JSON lines, for arms that share one process.
//!
//! Starting SPDK takes a second or two; arms must alternate within seconds. So the ratio command starts an agent once,
//! shapes it with RPC calls, and gives it a turn at a time. Requests come on standard input, one line each; each has one line
//! of answer on standard output. Deliberately not here: deciding anything about a benchmark.

use std::io::{BufRead, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded, unbounded};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use spdk_rs::thread::Core;

use crate::handicap::{Handicap, HandicapKind};
use crate::host::Host;
use crate::lane::{self, LaneSetup, Notice};
use crate::pace::Pace;
use crate::sample::Sample;
use crate::session::{Ending, Session};
use crate::units::{ByteCount, Nanos};
use crate::workload::Workload;

/// What may be asked.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "snake_case")]
pub enum Ask {
    /// A JSON-RPC call to SPDK in the agent.
    Rpc { method: String, params: Value },
    /// One turn of load on some lanes at once.
    Turn(TurnAsk),
    /// A device in memory that answers after `delay`, or another delay for it.
    Memory { name: String, bytes: u64, delay: Nanos },
}

/// One turn.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TurnAsk {
    pub lanes: Vec<LaneAsk>,
    pub workload: Workload,
    pub warmup: Nanos,
    pub duration: Option<Nanos>,
    pub operations: Option<u64>,
    /// Operations a second, started at equal gaps whatever the device does; `None`: as many as go.
    #[serde(default)]
    pub rate: Option<f64>,
    /// As [`HandicapKind`] prints.
    pub handicap: String,
}

/// One lane of a turn.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LaneAsk {
    pub bdev: String,
    pub core: u32,
}

/// What a turn gave, over all lanes.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TurnAnswer {
    pub operations: u64,
    pub bytes: u64,
    pub errors: u64,
    pub first_error: Option<String>,
    /// Sum of the lanes' operations a second.
    pub iops: f64,
    pub bytes_per_s: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

/// Longest time that a turn may take beyond what was asked.
const TURN_GRACE: Duration = Duration::from_secs(60);
/// Lanes send no windows within a turn.
const NO_WINDOW: Nanos = Nanos(3_600_000_000_000);

/// Serves until standard input ends.
pub fn serve(host: &mut Host, input: impl BufRead, mut output: impl Write) -> std::io::Result<()> {
    for line in input.lines() {
        let answer = match serde_json::from_str::<Ask>(&line?) {
            Err(error) => Err(format!("not understood: {error}")),
            Ok(Ask::Rpc { method, params }) => host.call(&method, &params).map_err(|error| error.to_string()),
            Ok(Ask::Turn(ask)) => turn(host, &ask).map(|answer| json!(answer)),
            Ok(Ask::Memory { name, bytes, delay }) => {
                host.memory(&name, bytes, delay).map(|()| Value::Null).map_err(|error| error.to_string())
            }
        };
        let line = match answer {
            Ok(answer) => json!({"ok": answer}),
            Err(text) => json!({"error": text}),
        };
        writeln!(output, "{line}")?;
        output.flush()?;
    }
    Ok(())
}

fn turn(host: &mut Host, ask: &TurnAsk) -> Result<TurnAnswer, String> {
    let kind: HandicapKind = ask.handicap.parse().map_err(|error: crate::handicap::HandicapError| error.to_string())?;
    let shared = Arc::new(AtomicU64::new(0));
    let (notices_tx, notices) = unbounded();
    // Kept until the turn ends: lanes look at their orders.
    let mut keep = Vec::new();
    for (index, lane_ask) in ask.lanes.iter().enumerate() {
        let (bdev, geometry) = host.open(&lane_ask.bdev, ask.workload.mix.read < 100).map_err(|error| error.to_string())?;
        let device = ByteCount(geometry.block_count * u64::from(geometry.block_size));
        let workload = Workload { seed: ask.workload.seed.wrapping_add(index as u64), ..ask.workload.clone() };
        let ending = Ending { warmup: ask.warmup, duration: ask.duration, operations: ask.operations, stop_on_error: true };
        let load = Session::new(&workload, ask.rate.map_or(Pace::Closed, Pace::Fixed), ending, None, device, geometry.block_size)
            .map_err(|error| format!("{}: {error}", lane_ask.bdev))?;
        let (orders, orders_rx) = bounded(1);
        let (spare, spare_rx) = bounded(1);
        keep.push((orders, spare));
        let setup = LaneSetup {
            bdev,
            core: Core(lane_ask.core),
            load,
            io_bytes: workload.block_size.0 as usize,
            depth: workload.depth,
            window: NO_WINDOW,
            handicap: Handicap::new(kind, shared.clone()),
            is_clock_coarse: true,
        };
        lane::start(setup, orders_rx, notices_tx.clone(), spare_rx).map_err(|errno| format!("lane {index}: {errno}"))?;
    }
    drop(notices_tx);
    let limit = ask.duration.map_or(TURN_GRACE, |duration| Duration::from_nanos(duration.0 + ask.warmup.0) + TURN_GRACE);
    let mut answer = TurnAnswer::default();
    let mut total = Sample::default();
    for _ in &ask.lanes {
        match notices.recv_timeout(limit) {
            Ok(Notice::Finished(load)) => add_lane(&mut answer, &mut total, &load.finish().last_window),
            Ok(Notice::Failed(text)) => return Err(text),
            Ok(Notice::Window { .. }) => return Err("a lane sent a window within its turn".to_owned()),
            Err(RecvTimeoutError::Timeout) => return Err(format!("the turn did not end within {} s", limit.as_secs())),
            Err(RecvTimeoutError::Disconnected) => return Err("a lane ended without a word".to_owned()),
        }
    }
    await_lanes_gone(host)?;
    let latency = total.latency();
    answer.p50_us = latency.value_at_quantile(0.5) as f64 / 1e3;
    answer.p99_us = latency.value_at_quantile(0.99) as f64 / 1e3;
    Ok(answer)
}

/// A lane's thread leaves over the next turns of its reactor. Whoever asked may stop this process once it has the answer, and SPDK
/// counts the time stopped against a thread that is leaving, and in the end forces it out.
fn await_lanes_gone(host: &mut Host) -> Result<(), String> {
    let deadline = Instant::now() + TURN_GRACE;
    loop {
        let stats = host.call("thread_get_stats", &Value::Null).map_err(|error| error.to_string())?;
        let threads = stats["threads"].as_array().cloned().unwrap_or_default();
        if !threads.iter().any(|thread| thread["name"].as_str().is_some_and(|name| name.starts_with(lane::THREAD_NAME))) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(format!("a lane's thread is still there {} s after its turn", TURN_GRACE.as_secs()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn add_lane(answer: &mut TurnAnswer, total: &mut Sample, sample: &Sample) {
    answer.operations += sample.operations();
    answer.bytes += sample.bytes();
    answer.errors += sample.errors();
    answer.iops += sample.iops();
    answer.bytes_per_s += sample.bandwidth();
    if let (None, Some(text)) = (&answer.first_error, sample.error_texts.keys().next()) {
        answer.first_error = Some(text.clone());
    }
    total.add(sample);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::ByteOffset;
    use crate::workload::{Access, Mix};

    #[test]
    fn ask_written_reads_back_equal() {
        let workload = Workload {
            seed: 1,
            block_size: ByteCount(4096),
            mix: Mix::READ,
            access: Access::Zipf(1.1),
            depth: 32,
            range_offset: ByteOffset(0),
            range_length: None,
        };
        let ask = Ask::Turn(TurnAsk {
            lanes: vec![LaneAsk { bdev: "M0".into(), core: 1 }],
            workload,
            warmup: Nanos(1),
            duration: Some(Nanos(2)),
            operations: None,
            rate: None,
            handicap: "none".into(),
        });
        let text = serde_json::to_string(&ask).unwrap();
        let back: Ask = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&back).unwrap(), text);
        assert!(!text.contains('\n'));
    }

    #[test]
    fn lanes_are_summed_by_rate() {
        let mut sample = Sample { from: Nanos(0), until: Nanos(1_000_000_000), ..Sample::default() };
        sample.kind_mut(crate::workload::OpKind::Read).done(4096, Nanos(5_000));
        let (mut answer, mut total) = (TurnAnswer::default(), Sample::default());
        add_lane(&mut answer, &mut total, &sample);
        add_lane(&mut answer, &mut total, &sample);
        assert_eq!((answer.operations, answer.iops.round()), (2, 2.0));
    }
}
