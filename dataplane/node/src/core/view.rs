//! What a core shows of itself when it is asked: counts, stores, volumes. Never per command.

use penstock_api::rpc::{VolumeCounters, VolumeLatency};
use penstock_engine::{MemberView, ReplicaUsage, SnapshotView, StoreView};

use super::Core;
use super::port::{CoreIndex, VolumeSlot};
use super::shard::DriveKey;
use super::volume::OpClass;
use crate::disk::DiskCounters;
use crate::memory::MemoryCounters;
use crate::peer::PeerView;

/// Counts of one core since it started.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct CoreCounters {
    pub turns: u64,
    pub busy_turns: u64,
    pub host_commands: u64,
    pub disk_completions: u64,
    pub ticks: u64,
    pub orders: u64,
    pub refused_at_door: u64,
    /// Ticks of the CPU's counter spent in turns that did something.
    pub busy_ticks: u64,
}

/// A shard as it shows itself.
#[derive(Clone, Debug)]
pub struct ShardView {
    pub drive: DriveKey,
    pub store_no: u32,
    pub view: StoreView,
    pub recovery_ms: Option<u64>,
    pub disk: DiskCounters,
}

/// A volume as its core shows it.
#[derive(Clone, Debug)]
pub struct VolumeView {
    pub slot: VolumeSlot,
    pub usage: ReplicaUsage,
    pub counters: VolumeCounters,
    pub latency: VolumeLatency,
    pub held: u32,
    pub read_buckets: (Vec<u64>, f64),
    pub write_buckets: (Vec<u64>, f64),
    /// Oldest first.
    pub snapshots: Vec<SnapshotView>,
    /// What a clone stands on.
    pub origin: Option<(penstock_wire::VolumeId, penstock_wire::SegmentId, penstock_wire::SnapshotId)>,
    /// Of a volume of several replicas.
    pub member: Option<MemberView>,
}

/// A core as it shows itself.
#[derive(Clone, Debug)]
pub struct CoreView {
    pub index: CoreIndex,
    pub core: u32,
    pub busy_fraction: f64,
    pub counters: CoreCounters,
    pub memory: MemoryCounters,
    pub memory_bytes: u64,
    pub shards: Vec<ShardView>,
    pub volumes: Vec<VolumeView>,
    pub peers: Vec<PeerView>,
}

/// Bounds of the latency histograms in metrics, in microseconds.
pub const LATENCY_BOUNDS_US: [u64; 14] = [10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 50_000, 100_000, 1_000_000, 10_000_000];

impl Core {
    /// Share of its time that the reactor worked, loop and doors together, over the last second or more.
    fn busy_fraction(&mut self) -> f64 {
        let now = spdk_rs::app::ticks();
        let (at, busy_before, fraction) = self.looked;
        if now - at < self.hz {
            return fraction;
        }
        let core = spdk_rs::thread::current_core();
        // A reactor in interrupt mode does not count all that it does; the loop's own turns it always counts itself.
        let busy = core.and_then(spdk_rs::thread::reactor_ticks).map_or(0, |ticks| ticks.busy).max(self.counters.busy_ticks);
        let fraction = (busy.saturating_sub(busy_before) as f64 / (now - at) as f64).min(1.0);
        self.looked = (now, busy, fraction);
        fraction
    }

    pub fn view(&mut self) -> CoreView {
        let busy_fraction = self.busy_fraction();
        let shards = self.shards.iter().flatten().map(|shard| ShardView {
            drive: shard.drive,
            store_no: shard.store_no,
            view: shard.store.view(),
            recovery_ms: shard.recovery_ms,
            disk: self.disks.counters(shard.disk),
        });
        let volumes = self.volumes.iter().enumerate().filter(|(_, v)| !v.gone).map(|(at, v)| VolumeView {
            slot: VolumeSlot(at as u32),
            usage: self.shards[v.shard].as_ref().map(|shard| shard.store.usage(v.replica)).unwrap_or_default(),
            snapshots: self.shards[v.shard].as_ref().map(|shard| shard.store.snapshots(v.replica)).unwrap_or_default(),
            origin: self.shards[v.shard].as_ref().and_then(|shard| shard.store.origin(v.replica)),
            counters: v.counters,
            latency: v.latency(),
            held: v.held,
            read_buckets: v.latency_buckets(OpClass::Read, &LATENCY_BOUNDS_US),
            write_buckets: v.latency_buckets(OpClass::Write, &LATENCY_BOUNDS_US),
            member: self.shards[v.shard].as_ref().and_then(|shard| shard.store.member_view(v.replica)),
        });
        CoreView {
            index: self.index,
            core: spdk_rs::thread::current_core().map_or(0, |core| core.0),
            busy_fraction,
            counters: self.counters,
            memory: self.memory.counters,
            memory_bytes: self.memory.taken_bytes() as u64,
            shards: shards.collect(),
            volumes: volumes.collect(),
            peers: self.peer_end.views(),
        }
    }
}
