//! What a load measured: counts, latencies and gaps, taken from the polled loop a window at a time and summed outside.
//!
//! A window is swapped for an empty one, never copied or merged in the loop: merging histograms there would be a stall
//! of its own making. Deliberately not here: how it is shown (see [`crate::report`]).

use std::collections::BTreeMap;

use hdrhistogram::Histogram;

use crate::units::Nanos;
use crate::workload::OpKind;

/// Longest latency that is told apart; longer ones count as this long.
pub const LATENCY_MAX: Nanos = Nanos(3_600_000_000_000);

/// One kind of operation in one window.
pub struct KindSample {
    pub operations: u64,
    pub bytes: u64,
    pub errors: u64,
    /// Nanoseconds, three significant digits.
    pub latency: Histogram<u64>,
}

impl Default for KindSample {
    fn default() -> Self {
        Self {
            operations: 0,
            bytes: 0,
            errors: 0,
            latency: Histogram::new_with_bounds(1, LATENCY_MAX.0, 3).expect("constant bounds are valid"),
        }
    }
}

impl KindSample {
    pub fn done(&mut self, bytes: u64, latency: Nanos) {
        self.operations += 1;
        self.bytes += bytes;
        self.latency.saturating_record(latency.0.max(1));
    }

    fn clear(&mut self) {
        self.operations = 0;
        self.bytes = 0;
        self.errors = 0;
        self.latency.reset();
    }

    fn add(&mut self, other: &Self) {
        self.operations += other.operations;
        self.bytes += other.bytes;
        self.errors += other.errors;
        self.latency.add(&other.latency).expect("all samples have the same bounds");
    }
}

/// One window of a load.
#[derive(Default)]
pub struct Sample {
    pub from: Nanos,
    pub until: Nanos,
    pub kinds: [KindSample; 3],
    /// The longest time without a completion while something was outstanding, and when it ended.
    pub longest_gap: Nanos,
    pub longest_gap_at: Nanos,
    /// Operations that were refused by the target's queue and tried again.
    pub resubmitted: u64,
    /// Times an operation waited for an overlapping one (verified runs alone).
    pub held_back: u64,
    /// Operations due and not started: an open loop faster than its target.
    pub overdue: u64,
    /// Verify units read back and compared in the run.
    pub verified_blocks: u64,
    /// Status texts of failed operations.
    pub error_texts: BTreeMap<String, u64>,
}

impl Sample {
    pub fn kind(&self, kind: OpKind) -> &KindSample {
        &self.kinds[kind as usize]
    }

    pub fn kind_mut(&mut self, kind: OpKind) -> &mut KindSample {
        &mut self.kinds[kind as usize]
    }

    pub fn operations(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.operations).sum()
    }

    pub fn bytes(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.bytes).sum()
    }

    pub fn errors(&self) -> u64 {
        self.kinds.iter().map(|kind| kind.errors).sum()
    }

    pub fn span(&self) -> Nanos {
        self.until.since(self.from)
    }

    /// Operations a second over the window; 0 for an empty one.
    pub fn iops(&self) -> f64 {
        if self.span().0 == 0 { 0.0 } else { self.operations() as f64 / self.span().as_secs_f64() }
    }

    /// Bytes a second over the window.
    pub fn bandwidth(&self) -> f64 {
        if self.span().0 == 0 { 0.0 } else { self.bytes() as f64 / self.span().as_secs_f64() }
    }

    /// Latencies of all kinds together.
    pub fn latency(&self) -> Histogram<u64> {
        let mut all = self.kinds[0].latency.clone();
        for kind in &self.kinds[1..] {
            all.add(&kind.latency).expect("all samples have the same bounds");
        }
        all
    }

    pub fn gap(&mut self, gap: Nanos, at: Nanos) {
        if gap > self.longest_gap {
            self.longest_gap = gap;
            self.longest_gap_at = at;
        }
    }

    /// Empties it for use as the next window; keeps its memory.
    pub fn clear(&mut self) {
        self.kinds.iter_mut().for_each(KindSample::clear);
        self.from = Nanos(0);
        self.until = Nanos(0);
        self.longest_gap = Nanos(0);
        self.longest_gap_at = Nanos(0);
        self.resubmitted = 0;
        self.held_back = 0;
        self.overdue = 0;
        self.verified_blocks = 0;
        self.error_texts.clear();
    }

    /// Adds a window that follows this one, or ran beside it on another core.
    pub fn add(&mut self, other: &Self) {
        if self.span().0 == 0 {
            self.from = other.from;
        } else if other.span().0 > 0 {
            self.from = self.from.min(other.from);
        }
        self.until = self.until.max(other.until);
        for (kind, other) in self.kinds.iter_mut().zip(&other.kinds) {
            kind.add(other);
        }
        self.gap(other.longest_gap, other.longest_gap_at);
        self.resubmitted += other.resubmitted;
        self.held_back += other.held_back;
        self.overdue = other.overdue;
        self.verified_blocks += other.verified_blocks;
        for (text, count) in &other.error_texts {
            *self.error_texts.entry(text.clone()).or_insert(0) += count;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(from: u64, until: u64, operations: u64) -> Sample {
        let mut sample = Sample { from: Nanos(from), until: Nanos(until), ..Sample::default() };
        for index in 0..operations {
            sample.kind_mut(OpKind::Read).done(4096, Nanos(1_000 + index));
        }
        sample
    }

    #[test]
    fn windows_summed_span_from_first_to_last() {
        let mut total = Sample::default();
        total.add(&window(1_000_000_000, 2_000_000_000, 10));
        let mut second = window(2_000_000_000, 3_000_000_000, 30);
        second.gap(Nanos(5), Nanos(2_500_000_000));
        second.error_texts.insert("late".into(), 2);
        total.add(&second);
        assert_eq!((total.span(), total.operations()), (Nanos(2_000_000_000), 40));
        assert!((total.iops() - 20.0).abs() < 1e-9);
        assert_eq!((total.longest_gap, total.error_texts["late"]), (Nanos(5), 2));
        assert_eq!(total.latency().len(), 40);
    }

    #[test]
    fn window_cleared_is_as_new() {
        let mut sample = window(1, 2, 3);
        sample.clear();
        assert_eq!((sample.operations(), sample.latency().len(), sample.iops()), (0, 0, 0.0));
    }

    #[test]
    fn latency_beyond_the_greatest_counts_as_the_greatest() {
        let mut sample = Sample::default();
        sample.kind_mut(OpKind::Write).done(1, Nanos(u64::MAX));
        assert!(sample.latency().max() >= LATENCY_MAX.0);
    }
}
