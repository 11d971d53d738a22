//! What a run says in the end: as text, as JSON, and as `.hgrm` (the percentile format of HdrHistogram's plotter).
//!
//! Times are microseconds wherever people read them, and the field names say so. The HTML page is in [`crate::html`].

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

use crate::pace::Pace;
use crate::paths::PathsReport;
use crate::sample::Sample;
use crate::session::BadBlocks;
use crate::units::{ByteCount, Nanos};
use crate::verify::VerifyReport;
use crate::workload::{OpKind, Workload};

/// Latencies in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyUs {
    pub min: f64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub p9999: f64,
    pub max: f64,
}

impl LatencyUs {
    pub fn of(histogram: &Histogram<u64>) -> Self {
        let at = |quantile| histogram.value_at_quantile(quantile) as f64 / 1e3;
        Self {
            min: if histogram.is_empty() { 0.0 } else { histogram.min() as f64 / 1e3 },
            mean: histogram.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p999: at(0.999),
            p9999: at(0.9999),
            max: histogram.max() as f64 / 1e3,
        }
    }
}

/// One kind of operation, or all of them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KindReport {
    pub operations: u64,
    pub bytes: u64,
    pub errors: u64,
    pub iops: f64,
    pub mib_per_s: f64,
    pub latency_us: LatencyUs,
}

/// One second or so of the run.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TimelinePoint {
    /// Seconds since the measurement began, at the end of the window.
    pub at_s: f64,
    pub iops: f64,
    pub mib_per_s: f64,
    pub p99_us: f64,
}

/// A whole run.
#[derive(Serialize)]
pub struct Report {
    pub tool: &'static str,
    pub version: &'static str,
    pub target: String,
    pub device_bytes: ByteCount,
    pub device_block_bytes: u32,
    pub workload: Workload,
    pub pace: Pace,
    pub duration_s: f64,
    pub total: KindReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read: Option<KindReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub write: Option<KindReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trim: Option<KindReport>,
    /// The longest time without any completion while something was outstanding.
    pub longest_gap_ms: f64,
    pub longest_gap_at_s: f64,
    pub resubmitted: u64,
    pub held_back: u64,
    pub overdue: u64,
    pub verified_blocks_in_run: u64,
    pub bad_in_run: BadBlocks,
    pub errors: std::collections::BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub verify: Option<VerifyReport>,
    /// Of a load over several paths.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub paths: Option<PathsReport>,
    pub timeline: Vec<TimelinePoint>,
    #[serde(skip)]
    pub histogram: Histogram<u64>,
}

/// What a report is about, beside the figures.
pub struct Subject {
    pub target: String,
    pub device: ByteCount,
    pub unit: u32,
    pub workload: Workload,
    pub pace: Pace,
}

fn kind_report(operations: u64, bytes: u64, errors: u64, histogram: &Histogram<u64>, span: Nanos) -> KindReport {
    let secs = span.as_secs_f64();
    let per_s = |amount: f64| if secs > 0.0 { amount / secs } else { 0.0 };
    KindReport {
        operations,
        bytes,
        errors,
        iops: per_s(operations as f64),
        mib_per_s: per_s(bytes as f64 / (1 << 20) as f64),
        latency_us: LatencyUs::of(histogram),
    }
}

impl Report {
    pub fn new(subject: Subject, sample: &Sample, timeline: Vec<TimelinePoint>, bad: BadBlocks) -> Self {
        let of = |kind: OpKind| {
            let kind = sample.kind(kind);
            (kind.operations + kind.errors > 0).then(|| kind_report(kind.operations, kind.bytes, kind.errors, &kind.latency, sample.span()))
        };
        let histogram = sample.latency();
        Self {
            tool: "penstock-perf",
            version: env!("CARGO_PKG_VERSION"),
            target: subject.target,
            device_bytes: subject.device,
            device_block_bytes: subject.unit,
            workload: subject.workload,
            pace: subject.pace,
            duration_s: sample.span().as_secs_f64(),
            total: kind_report(sample.operations(), sample.bytes(), sample.errors(), &histogram, sample.span()),
            read: of(OpKind::Read),
            write: of(OpKind::Write),
            trim: of(OpKind::Trim),
            longest_gap_ms: sample.longest_gap.0 as f64 / 1e6,
            longest_gap_at_s: sample.longest_gap_at.since(sample.from).as_secs_f64(),
            resubmitted: sample.resubmitted,
            held_back: sample.held_back,
            overdue: sample.overdue,
            verified_blocks_in_run: sample.verified_blocks,
            bad_in_run: bad,
            errors: sample.error_texts.clone(),
            verify: None,
            paths: None,
            timeline,
            histogram,
        }
    }

    /// True when no operation failed and every check passed.
    pub fn is_good(&self) -> bool {
        self.total.errors == 0 && self.bad_in_run.count == 0 && self.verify.as_ref().is_none_or(VerifyReport::is_good)
    }

    /// One line on what was run.
    pub fn headline(&self) -> String {
        let workload = &self.workload;
        let pace = match self.pace {
            Pace::Closed => "closed loop".to_owned(),
            Pace::Fixed(rate) => format!("open loop, {rate:.0}/s"),
            Pace::Poisson(rate) => format!("open loop, {rate:.0}/s (Poisson)"),
        };
        let access = match workload.access {
            crate::workload::Access::Random => "random".to_owned(),
            crate::workload::Access::Sequential => "sequential".to_owned(),
            crate::workload::Access::Zipf(theta) => format!("zipf {theta}"),
        };
        let mix = OpKind::ALL
            .iter()
            .zip([workload.mix.read, workload.mix.write, workload.mix.trim])
            .filter(|(_, share)| *share > 0)
            .map(|(kind, share)| if share == 100 { kind.name().to_owned() } else { format!("{share} % {}", kind.name()) })
            .collect::<Vec<_>>()
            .join(" ");
        format!("{} {access} {mix}, depth {}, {pace}, seed {:#x}", workload.block_size, workload.depth, workload.seed)
    }

    /// For a terminal.
    pub fn text(&self) -> String {
        let mut out = String::new();
        let _ = writeln!(out, "{}  ({}, block {} B)", self.target, self.device_bytes, self.device_block_bytes);
        let _ = writeln!(out, "{}, {:.2} s", self.headline(), self.duration_s);
        let _ = writeln!(
            out,
            "\n{:<7}{:>12}{:>12}{:>12}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "", "operations", "IOPS", "MiB/s", "mean µs", "p50", "p99", "p99.9", "p99.99", "max"
        );
        let kinds = [("read", &self.read), ("write", &self.write), ("trim", &self.trim)];
        let mut rows: Vec<(&str, &KindReport)> = kinds.iter().filter_map(|(name, kind)| Some((*name, kind.as_ref()?))).collect();
        if rows.len() != 1 {
            rows.push(("all", &self.total));
        }
        for (name, kind) in rows {
            let lat = &kind.latency_us;
            let _ = writeln!(
                out,
                "{name:<7}{:>12}{:>12.0}{:>12.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}{:>10.1}",
                kind.operations, kind.iops, kind.mib_per_s, lat.mean, lat.p50, lat.p99, lat.p999, lat.p9999, lat.max
            );
        }
        let _ = writeln!(out, "\nlongest gap between completions {:.1} ms, at {:.2} s", self.longest_gap_ms, self.longest_gap_at_s);
        if let Some(paths) = &self.paths {
            let _ = writeln!(
                out,
                "{} changes of path; given again: {} that a path refused, {} that were under way when it ended, {} when it fell silent",
                paths.switches, paths.refused, paths.cut, paths.silent
            );
        }
        for (amount, text) in [
            (self.resubmitted, "operations found the target's queue full and were tried again"),
            (self.held_back, "times an operation waited for an overlapping one"),
            (self.overdue, "operations were due and not started at the end: the target is slower than the rate asked for"),
        ] {
            if amount > 0 {
                let _ = writeln!(out, "{amount} {text}");
            }
        }
        for (text, count) in &self.errors {
            let _ = writeln!(out, "failed {count} × {text}");
        }
        if self.verified_blocks_in_run > 0 {
            let _ = writeln!(out, "read back in the run: {} blocks, {} bad", self.verified_blocks_in_run, self.bad_in_run.count);
        }
        out.push_str(&bad_text(&self.bad_in_run));
        if let Some(verify) = &self.verify {
            out.push_str(&verify_text(verify));
        }
        out
    }

    /// HdrHistogram's percentile distribution, values in microseconds.
    pub fn hgrm(&self) -> String {
        let mut out = format!("{:>12} {:>14} {:>10} {:>14}\n\n", "Value", "Percentile", "TotalCount", "1/(1-Percentile)");
        for step in self.histogram.iter_quantiles(5) {
            let quantile = step.quantile_iterated_to();
            let value = step.value_iterated_to() as f64 / 1e3;
            let total: u64 = self.histogram.count_between(0, step.value_iterated_to());
            let _ = if quantile < 1.0 {
                writeln!(out, "{value:>12.3} {quantile:>14.12} {total:>10} {:>14.2}", 1.0 / (1.0 - quantile))
            } else {
                writeln!(out, "{value:>12.3} {quantile:>14.12} {total:>10}")
            };
        }
        let (mean, deviation) = (self.histogram.mean() / 1e3, self.histogram.stdev() / 1e3);
        let _ = writeln!(out, "#[Mean    = {mean:>12.3}, StdDeviation   = {deviation:>12.3}]");
        let (max, total) = (self.histogram.max() as f64 / 1e3, self.histogram.len());
        let _ = writeln!(out, "#[Max     = {max:>12.3}, Total count    = {total:>12}]");
        let _ = writeln!(out, "#[Buckets = {:>12}, SubBuckets     = {:>12}]", self.histogram.buckets(), 2048);
        out
    }
}

fn bad_text(bad: &BadBlocks) -> String {
    let mut out = String::new();
    for bad in &bad.listed {
        let _ = writeln!(out, "  BAD block {}: {:?}", bad.block.0, bad.fault);
    }
    if bad.count > bad.listed.len() as u64 {
        let _ = writeln!(out, "  … and {} more", bad.count - bad.listed.len() as u64);
    }
    out
}

/// A verify pass for a terminal.
pub fn verify_text(verify: &VerifyReport) -> String {
    let mut out = format!("verified {} blocks: {} hold what was acknowledged last", verify.blocks, verify.acknowledged);
    let doubt = verify.in_doubt_old + verify.in_doubt_new;
    if doubt > 0 {
        let _ = write!(out, ", {doubt} were in doubt ({} old, {} new)", verify.in_doubt_old, verify.in_doubt_new);
    }
    if verify.after_journal > 0 {
        let _ = write!(out, ", {} are newer than the journal's end", verify.after_journal);
    }
    let _ = writeln!(out, ", {} bad, {} unreadable", verify.bad.count, verify.unreadable);
    if let Some(error) = &verify.first_read_error {
        let _ = writeln!(out, "  first read error: {error}");
    }
    out.push_str(&bad_text(&verify.bad));
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::expect::Fault;
    use crate::units::{BlockIndex, ByteOffset, Generation};
    use crate::workload::{Access, Mix};

    pub(crate) fn report() -> Report {
        let mut sample = Sample { from: Nanos(0), until: Nanos(2_000_000_000), ..Sample::default() };
        for index in 1..=10_000u64 {
            sample.kind_mut(OpKind::Write).done(4096, Nanos(index * 1_000));
        }
        sample.gap(Nanos(7_000_000), Nanos(1_500_000_000));
        let workload = Workload {
            seed: 0x2a,
            block_size: ByteCount(4096),
            mix: Mix::WRITE,
            access: Access::Random,
            depth: 32,
            range_offset: ByteOffset(0),
            range_length: None,
        };
        let subject = Subject { target: "bdev:<Malloc0>".into(), device: ByteCount(1 << 30), unit: 512, workload, pace: Pace::Closed };
        let timeline = vec![
            TimelinePoint { at_s: 1.0, iops: 5_000.0, mib_per_s: 19.5, p99_us: 9_000.0 },
            TimelinePoint { at_s: 2.0, iops: 5_200.0, mib_per_s: 20.3, p99_us: 9_900.0 },
        ];
        Report::new(subject, &sample, timeline, BadBlocks::default())
    }

    #[test]
    fn report_as_text_shows_rate_latency_and_gap() {
        let text = report().text();
        for part in ["5000", "4KiB random write, depth 32, closed loop, seed 0x2a", "longest gap between completions 7.0 ms, at 1.50 s"] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
        assert!(!text.contains("\nall"), "one kind alone needs no sum");
    }

    #[test]
    fn report_as_json_has_units_in_its_names_and_no_histogram() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["write"]["latency_us"]["p50"].as_f64().unwrap().round(), 5_001.0);
        assert_eq!(json["total"]["operations"], 10_000);
        assert!(json.get("histogram").is_none() && json.get("read").is_none());
    }

    #[test]
    fn hgrm_rises_to_the_whole_count_and_ends_with_the_maximum() {
        let hgrm = report().hgrm();
        let rows: Vec<Vec<f64>> = hgrm
            .lines()
            .skip(2)
            .filter(|line| !line.starts_with('#'))
            .map(|line| line.split_whitespace().map(|word| word.parse().unwrap()).collect())
            .collect();
        assert!(rows.windows(2).all(|pair| pair[0][0] <= pair[1][0] && pair[0][1] <= pair[1][1]));
        let last = rows.last().unwrap();
        assert_eq!((last[1], last[2]), (1.0, 10_000.0));
        assert!((last[0] - 10_000.0).abs() < 10.0);
        assert!(hgrm.contains("#[Max"));
    }

    #[test]
    fn report_with_a_bad_block_or_an_error_is_not_good() {
        assert!(report().is_good());
        let mut bad = report();
        bad.bad_in_run.add(BlockIndex(77), Fault::Lost { expected: Generation(3), found: None });
        assert!(!bad.is_good());
        assert!(bad.text().contains("BAD block 77"));
        let mut unread = report();
        unread.verify = Some(VerifyReport { unreadable: 1, ..VerifyReport::default() });
        assert!(!unread.is_good());
    }
}
