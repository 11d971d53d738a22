//! A volume as its home core counts it: commands, bytes, errors, latency. Not here: its data, which are the store's.

use hdrhistogram::Histogram;
use penstock_api::rpc::{LatencyInfo, VolumeCounters, VolumeLatency};
use penstock_engine::{HostOp, ReplicaNo, Span, Standing};
use penstock_wire::ReplicaShape;

/// What a command was, for counting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpClass {
    Read,
    Write,
    Zero,
    Flush,
    /// Of its reservations.
    Reserve,
}

impl OpClass {
    pub fn of(op: HostOp) -> (Self, u64) {
        match op {
            HostOp::Read(Span { len, .. }) | HostOp::ReadSnapshot(_, Span { len, .. }) => (Self::Read, len),
            HostOp::Write(Span { len, .. }) | HostOp::CompareWrite(Span { len, .. }) => (Self::Write, len),
            HostOp::Zero(_) => (Self::Zero, 0),
            HostOp::Flush => (Self::Flush, 0),
            HostOp::Reserve(_) => (Self::Reserve, 0),
        }
    }
}

/// Longest latency that is told apart, in microseconds: a minute.
const LATENCY_MAX_US: u64 = 60_000_000;

pub struct CoreVolume {
    pub shard: usize,
    pub replica: ReplicaNo,
    pub shape: ReplicaShape,
    pub gone: bool,
    pub counters: VolumeCounters,
    read_us: Histogram<u64>,
    write_us: Histogram<u64>,
    /// Commands that have not been answered.
    pub held: u32,
    /// Of a group: as its member told it last.
    pub standing: Option<Standing>,
    /// Of a group: it was served here since another node led it last.
    was_served: bool,
    /// Commands may come that their hosts have given up here and given again elsewhere: none is taken.
    pub is_barred: bool,
}

impl CoreVolume {
    pub fn new(shard: usize, replica: ReplicaNo, shape: ReplicaShape) -> Self {
        let histogram = || Histogram::new_with_bounds(1, LATENCY_MAX_US, 2).expect("constant bounds are valid");
        Self {
            shard,
            replica,
            shape,
            gone: false,
            counters: VolumeCounters::default(),
            read_us: histogram(),
            write_us: histogram(),
            held: 0,
            standing: None,
            was_served: false,
            is_barred: false,
        }
    }

    /// Its part in its group changed. True: another node leads what was served here, and it is barred from now on. A command that lies unread on
    /// an old connection would else take effect when this node leads again, long after its host has gone on without it.
    pub fn stand(&mut self, serves: bool, other_leads: bool) -> bool {
        let bars = other_leads && self.was_served;
        self.is_barred |= bars;
        self.was_served = serves || self.was_served && !bars;
        bars
    }

    /// One command was answered.
    pub fn record(&mut self, class: OpClass, bytes: u64, us: u64, ok: bool) {
        let counters = &mut self.counters;
        counters.errors += u64::from(!ok);
        match class {
            OpClass::Read => {
                counters.reads += 1;
                counters.read_bytes += bytes;
                self.read_us.saturating_record(us.max(1));
            }
            OpClass::Write => {
                counters.writes += 1;
                counters.write_bytes += bytes;
                self.write_us.saturating_record(us.max(1));
            }
            // Discards and write-zeroes are one thing from here on down.
            OpClass::Zero => counters.discards += 1,
            OpClass::Flush => counters.flushes += 1,
            // The stores count them.
            OpClass::Reserve => {}
        }
    }

    pub fn latency(&self) -> VolumeLatency {
        let info = |h: &Histogram<u64>| LatencyInfo {
            p50_us: h.value_at_quantile(0.5),
            p99_us: h.value_at_quantile(0.99),
            p999_us: h.value_at_quantile(0.999),
            max_us: h.max(),
        };
        VolumeLatency { read: info(&self.read_us), write: info(&self.write_us) }
    }

    /// Counts per bound in microseconds, then above; and the sum. For metrics.
    pub fn latency_buckets(&self, class: OpClass, bounds_us: &[u64]) -> (Vec<u64>, f64) {
        let histogram = if class == OpClass::Read { &self.read_us } else { &self.write_us };
        let mut counts = Vec::with_capacity(bounds_us.len() + 1);
        let mut below = 0;
        for &bound in bounds_us {
            let upto = histogram.count_between(0, bound);
            counts.push(upto - below);
            below = upto;
        }
        counts.push(histogram.len() - below);
        (counts, histogram.mean() * histogram.len() as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_wire::{ReplicaId, SegmentId, VolumeId};

    fn volume() -> CoreVolume {
        let shape = ReplicaShape {
            volume: VolumeId([1; 16]),
            segment: SegmentId([2; 16]),
            replica: ReplicaId([3; 16]),
            segment_no: 0,
            blocks: 1,
            logical_block: 512,
            name: "v".to_owned(),
        };
        CoreVolume::new(0, ReplicaNo(1), shape)
    }

    #[test]
    fn volume_is_barred_once_another_leads_what_was_served_here() {
        let mut volume = volume();
        assert!(!volume.stand(false, true), "it was never served here");
        assert!(!volume.stand(true, false));
        assert!(!volume.stand(false, false), "nobody else has led: nothing was given elsewhere");
        assert!(!volume.stand(true, false) && !volume.is_barred);
        assert!(!volume.stand(false, false));
        assert!(volume.stand(false, true) && volume.is_barred);
        assert!(!volume.stand(false, true), "once");
        assert!(!volume.stand(true, false) && volume.is_barred, "until hosts are gone, also when it is served here again");
    }

    #[test]
    fn commands_are_counted_by_class_and_latency_by_bucket() {
        let mut volume = volume();
        volume.record(OpClass::Read, 4096, 10, true);
        volume.record(OpClass::Read, 4096, 2000, false);
        volume.record(OpClass::Write, 512, 0, true);
        volume.record(OpClass::Flush, 0, 5, true);
        assert_eq!((volume.counters.reads, volume.counters.read_bytes, volume.counters.errors), (2, 8192, 1));
        assert_eq!(volume.latency().write.max_us, 1, "less than a microsecond counts as one");
        let (counts, sum) = volume.latency_buckets(OpClass::Read, &[16, 128]);
        assert_eq!(counts, [1, 0, 1]);
        assert!((2000.0..2050.0).contains(&sum), "{sum}");
    }
}
