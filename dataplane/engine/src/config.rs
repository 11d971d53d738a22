//! What a store is opened with, and what it shows of itself.

use crate::port::{LayerNo, ReplicaNo, Standing};
use crate::replica;
use penstock_wire::label::Geometry;
use penstock_wire::layer::SnapshotShape;
use penstock_wire::peer::{MemberNo, Members};
use penstock_wire::{DecodeError, Generation, Incarnation, Index, NodeId, ReplicaShape, SegmentId};
use thiserror::Error;

/// What makes the drive's completed writes durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Barrier {
    /// A flush command, shown to reach the drive.
    Flush,
    /// Nothing: the drive has no volatile cache, or its operator declared it power-safe, or its loss is accepted.
    NotNeeded,
}

/// Why a store takes no more writes. Kept off the drive by the node, until an operator clears it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FenceReason {
    LogWriteFailed,
    FlushFailed,
    DrainWriteFailed,
    CheckpointWriteFailed,
    /// Batches of the log cannot be read in either copy: which blocks they wrote is unknown.
    LogLost,
    /// Another store of the same drive was fenced, or the drive went away.
    Drive,
}

/// Why recovery cannot go on. Nothing was written.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum OpenError {
    #[error(
        "none of the superblock's four copies is readable (last: {0}); the store cannot be opened. If the drive was meant to be blank, add it anew with force"
    )]
    NoSuperblock(DecodeError),
    #[error(
        "the superblock is of drive life {found}; the drive's label says {expected}. Parts of two drives are mixed: restore the whole drive or add it anew"
    )]
    OtherLife { found: Incarnation, expected: Incarnation },
    #[error("both copies of checkpoint {checkpoint}'s directory are unreadable ({error}); the store cannot be opened")]
    DirectoryLost { checkpoint: u64, error: DecodeError },
    #[error("the drive failed a read while the store was opened, at block {0} of the store")]
    ReadFailed(u64),
    #[error("the drive failed a write or barrier while the store was opened")]
    WriteFailed,
    #[error("the log needs more memory than the loop could give while the store was opened")]
    NoMemory,
}

/// Seeded bugs. Each stands for one that somebody shipped; the simulator proves that it would see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Canary {
    CountBeforeBarrier,
    AckEarly,
    TornIsCorruption,
    RotIsTear,
    TrimPastCheckpoint,
    ReuseSlotEarly,
    MergeAgainstApplied,
    ApplyWithoutSpace,
    ForgetFence,
    SkipReadVerify,
    FreeBufEarly,
    DrainUnverified,
    CheckpointBeforeFlush,
    TrustTail,
    /// A discard clears what the live layer has of a block, so that a frozen layer's shows again.
    DiscardClears,
    /// A write overwrites an undrained block although a snapshot's marker lies between them.
    AbsorbAcrossMarker,
    /// A member whose drive was wiped is believed: another replica under its number.
    VoteWhenWiped,
    /// A member whose drive was put back from an older copy is believed.
    VoteWhenRestored,
    /// Who was removed, or given up, is not told.
    ForgetRemoved,
    /// An extent that a merge frees is taken again before a checkpoint knows of the merge.
    ReuseMergedEarly,
    /// A copied extent overwrites what entries newer than it wrote.
    CopyOverNewer,
    /// A member that is asked for a block with a certain checksum gives whatever it has, and whoever asked takes it.
    RepairOlder,
    /// A rebuild copies the live layer, and none that snapshots froze.
    CopyLiveAlone,
    /// A clone's member is made before what it stands on is covered by a checkpoint.
    CloneUnsaved,
    /// A snapshot is removed although a clone stands on it.
    RemoveUnderClone,
    /// What lies in a removed layer that is not merged yet is left out of copies of the one above.
    CopyUnmerged,
    /// What a leader had taken in and not proposed when it lost its term is proposed under the next one that it leads.
    StampNewTerm,
    /// Every entry of an append is taken to have its payload at the append's first block.
    StageFirstPayload,
    /// A ballot counts when it is durable, without a later record that says so.
    SkipSeal,
    /// A copied extent is said to be as of the last entry in its giver's log when it is sent, and not of the last one applied when it was looked up.
    CopyAsOfNow,
    /// What a member may have acknowledged and does not have is forgotten by its next restart.
    ForgetDoubt,
    /// A log-only member trims what it has applied, whatever the others have.
    TrimLogOnly,
    /// A leader does not ask whether the others have room for what it proposes.
    CountOwnSpaceAlone,
    /// What a member has is never compared with what others have.
    CompareNothing,
    /// Falls over a write to [`Canary::FALLS_AT`], when it is applied and when it is redone: for whoever catches falls. Not among
    /// [`Canary::ALL`], which are for checks to find.
    PanicOnWrite,
}

impl Canary {
    /// Volume block over which [`Canary::PanicOnWrite`] falls.
    pub const FALLS_AT: u64 = 13;

    pub const ALL: [Canary; 33] = [
        Canary::CountBeforeBarrier,
        Canary::AckEarly,
        Canary::TornIsCorruption,
        Canary::RotIsTear,
        Canary::TrimPastCheckpoint,
        Canary::ReuseSlotEarly,
        Canary::MergeAgainstApplied,
        Canary::ApplyWithoutSpace,
        Canary::ForgetFence,
        Canary::SkipReadVerify,
        Canary::FreeBufEarly,
        Canary::DrainUnverified,
        Canary::CheckpointBeforeFlush,
        Canary::TrustTail,
        Canary::VoteWhenWiped,
        Canary::VoteWhenRestored,
        Canary::ForgetRemoved,
        Canary::CopyOverNewer,
        Canary::RepairOlder,
        Canary::StampNewTerm,
        Canary::StageFirstPayload,
        Canary::SkipSeal,
        Canary::CopyAsOfNow,
        Canary::ForgetDoubt,
        Canary::TrimLogOnly,
        Canary::DiscardClears,
        Canary::AbsorbAcrossMarker,
        Canary::ReuseMergedEarly,
        Canary::CopyLiveAlone,
        Canary::CopyUnmerged,
        Canary::CloneUnsaved,
        Canary::RemoveUnderClone,
        Canary::CompareNothing,
    ];
}

/// Run-time limits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Log batches out at a time before small ones wait and gather more writes. Full ones go out up to [`BATCHES_OUT_MAX`], to keep
    /// the device busy.
    pub batches_out: u32,
    /// Payload blocks after which a batch takes no more writes (one larger write goes alone). Small enough that what was checksummed is
    /// still in the core's cache when it is copied or sent, large enough that a batch's own cost is spread.
    pub batch_blocks: u32,
    /// Extents that one slice of the drain moves.
    pub drain_slice: u32,
    /// No host write for this long: drain and seal in the background.
    pub idle_ms: u64,
    /// Extents that scrub reads in one tick.
    pub scrub_per_tick: u32,
    /// Extents being read at a time for members that are rebuilt from here.
    pub copies_out: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { batches_out: 4, batch_blocks: 128, drain_slice: 64, idle_ms: 500, scrub_per_tick: 8, copies_out: 8 }
    }
}

/// Most batches that may be out: recovery's look-ahead is sized by it.
pub const BATCHES_OUT_MAX: u32 = 16;

/// What a store's groups are opened with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Replication {
    /// The node that the store is on: tells which member of a group is its own.
    pub node: NodeId,
    pub timing: replica::Timing,
    /// Drawn anew for this opening: nobody had it before.
    pub life: Incarnation,
    /// The generation in which the node opened this store last, as it wrote it down off the drive. `None`: it knows nothing of it.
    pub witness: Option<Generation>,
    /// Always `None` outside the simulator; has no effect without feature `canary`.
    pub canary: Option<replica::Canary>,
}

impl Default for Replication {
    /// Elections after 200 to 320 ms, heartbeats every 50 ms, sleep after 5 s without anything to do, another leader after 1 s behind the
    /// others' drives, a round of proof for the reads of each turn.
    fn default() -> Self {
        let timing = replica::Timing { election: 20, heartbeat: 5, stride: 4, tick: 10, sleep: Some(500), aside: Some(100), lease: false };
        Self { node: NodeId::default(), timing, life: Incarnation::default(), witness: None, canary: None }
    }
}

/// What a store is opened with.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    pub geometry: Geometry,
    pub incarnation: Incarnation,
    /// Which store of the drive.
    pub store: u32,
    pub barrier: Barrier,
    /// A fence that was recorded in an earlier life and not cleared.
    pub fenced: Option<FenceReason>,
    /// The operator has accepted that batches of the log are lost ([`FenceReason::LogLost`]).
    pub accept_lost_log: bool,
    pub limits: Limits,
    pub replication: Replication,
    /// Always `None` outside the simulator; has no effect without feature `canary`.
    pub canary: Option<Canary>,
}

/// Where a store stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stage {
    Opening,
    /// See [`OpenError`].
    Failed,
    Serving,
    Fenced(FenceReason),
    Stopping,
    Stopped,
}

/// What recovery found.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RecoveryReport {
    /// How often the store was opened for writing, this time included unless it is fenced.
    pub generation: u64,
    pub batches: u64,
    pub entries: u64,
    /// Bytes of log that were read.
    pub bytes: u64,
    /// Batches above the last durable one that were torn or cut with it: never acknowledged.
    pub dropped_batches: u64,
    /// Headers read from their second copy.
    pub repaired_headers: u64,
    /// Blocks of durable batches that are bad: reads of them ask the other members, and are errors where there are none.
    pub lost_blocks: u64,
    /// Batches whose descriptors are gone too.
    pub lost_batches: u64,
    /// Batches that nothing proved durable, and that were written again.
    pub rewritten_batches: u64,
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// Counts since the store was opened. Blocks are 4 KiB.
        #[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub $name: u64,)+ }
        impl Counters {
            /// Every counter with its name, for metrics.
            pub fn rows(&self) -> impl Iterator<Item = (&'static str, u64)> {
                [$((stringify!($name), self.$name)),+].into_iter()
            }
        }
    };
}

counters! {
    host_reads, host_writes, host_zeros, host_flushes, host_compares, host_reserves, host_refused,
    /// Commands that reservations did not let through.
    host_conflicts,
    host_read_blocks, host_write_blocks,
    /// Host payload blocks that had to be copied (guest memory, unaligned).
    copied_blocks,
    /// Sub-block writes that read before they wrote.
    merges,
    /// Times a host write had to wait for room in the log.
    held_for_log,
    log_batches, log_seals, log_header_blocks, log_payload_blocks, log_flushes,
    reads_from_log, reads_from_extents, read_retries,
    drain_slices, drained_extents, drained_blocks,
    /// Blocks that were overwritten in the log before they were drained.
    absorbed_blocks,
    checkpoints, checkpoint_pages, page_loads,
    /// Times that a member handed leadership over for its slow drive.
    stepped_aside,
    /// Members that began to be rebuilt here, extents that were copied from others, and to others.
    rebuilds, copies_taken, copies_sent,
    corrupt_blocks, scrubbed_blocks,
    /// Bad blocks that another member had, of those how many were put back here, that nobody had, and that this store gave to others.
    fetched_blocks, repaired_blocks, unrepaired_blocks, fetches_answered,
    /// Extents that were compared with what other members have, those that were different here, and of these how many were copied anew. Of the rest no
    /// majority has one thing, or it has not come yet.
    compared_extents, differing_extents, mended_extents,
    disk_reads, disk_writes, disk_flushes,
}

/// A replica, as `StoreView` shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaView {
    pub no: ReplicaNo,
    pub shape: ReplicaShape,
    pub deleting: bool,
    pub usage: ReplicaUsage,
}

/// A snapshot of a replica.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotView {
    pub snapshot: SnapshotShape,
    /// What [`crate::HostOp::ReadSnapshot`] names it by.
    pub layer: LayerNo,
    /// Entry of its marker.
    pub at: Index,
    /// Size of the volume as of the marker.
    pub blocks: u64,
    /// Extents that were written between the marker before and this one.
    pub allocated_extents: u64,
}

/// What a replica takes of its store.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReplicaUsage {
    /// Extents (64 KiB) that are its own. Short of those on pages that a build before directory version 2 wrote and that were
    /// not used since.
    pub allocated_extents: u64,
    /// Of these, those that snapshots hold: what the live volume still shares with them among them.
    pub snapshot_extents: u64,
    /// Blocks (4 KiB) whose newest version is in the oplog alone.
    pub undrained_blocks: u64,
}

/// A member of a group, as [`crate::Store::members`] shows it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MemberView {
    pub no: ReplicaNo,
    pub segment: SegmentId,
    pub me: MemberNo,
    /// As of what is applied.
    pub members: Members,
    pub standing: Option<Standing>,
    /// Recovery found what it cannot judge, and the others are asked.
    pub doubtful: bool,
    /// The others believe its drive: before that it says nothing in its group.
    pub admitted: bool,
    /// Why it answers nothing any more, if so.
    pub stopped: Option<String>,
    /// What the group shows, where it speaks.
    pub group: Option<replica::GroupView>,
    pub applied: Index,
    /// The last entry that each member is known to have; empty where another leads.
    pub matched: Vec<(MemberNo, Index)>,
    /// How far its content is copied from another, where it is.
    pub rebuild: Option<RebuildView>,
}

/// How far a member is rebuilt, in extents of the volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RebuildView {
    pub done: u64,
    pub total: u64,
}

/// What a store shows of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StoreView {
    pub stage: Stage,
    pub ring_blocks: u64,
    /// Blocks of log that cannot be reused yet.
    pub ring_used: u64,
    /// Extents of volumes with blocks that are not drained.
    pub undrained_extents: u64,
    pub extents: u64,
    pub extents_free: u64,
    /// Pages of the map held in memory.
    pub pages_cached: u64,
    pub recovery: RecoveryReport,
    pub counters: Counters,
    /// Whether scrub is on, and the share of extents it has seen in this pass, in 1/1000.
    pub scrub_permille: Option<u32>,
    /// Host commands and orders not answered yet.
    pub held: u64,
    /// Device commands that are out.
    pub disk_out: u64,
    /// Nothing is out, held, waiting or worth doing in the background: no tick is needed until the next event.
    pub quiescent: bool,
}
