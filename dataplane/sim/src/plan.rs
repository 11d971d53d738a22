//! What one seed will do, drawn before it starts: the drives, the volumes, the hosts' habits, and which faults may strike.
//!
//! Each seed has only some faults on ("swarm"): some bugs hide behind others' faults. Not here: when a fault strikes.

use penstock_engine::Limits;

use crate::drive::Kind;
use crate::rng::Rng;

/// What the next death waits for, besides its turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Occasion {
    #[default]
    None,
    /// A barrier is out.
    Flush,
    /// A write outside the log is out: extents, map pages, directories.
    Extents,
    Superblock,
}

#[derive(Clone, Debug)]
pub struct DrivePlan {
    pub kind: Kind,
    /// What a failed flush forgot is gone when the next life begins, not only when the power goes.
    pub resets: bool,
    pub stores: usize,
    pub ring_blocks: u64,
    pub extents: u64,
    /// Microseconds of a usual command, least and most.
    pub latency_us: (u64, u64),
}

/// What kind of load the hosts are. Rare states of a store need a load that goes there: drawn, not hoped for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Load {
    /// Most commands meet on a few blocks.
    Hot,
    /// Volumes are written from end to end, until nothing fits: the last extents come and go.
    Fill,
    /// Writes go all over large volumes, with pauses: checkpoints of many pages, in several rounds of commands.
    Sprawl,
    /// Large writes faster than a slow drain: the log goes round while it is drained.
    Flood,
}

/// Which faults may strike. Rates are "one in n", 0 for never.
#[derive(Clone, Debug, Default)]
pub struct FaultPlan {
    /// Node deaths in the safety phase.
    pub crashes: u64,
    /// Share of them that take the drives' caches too.
    pub power_percent: u32,
    /// Share of recoveries that are cut off by another death.
    pub nested_percent: u32,
    pub occasion: Occasion,
    pub rot_one_in: u32,
    pub lost_write_one_in: u32,
    pub misdirected_one_in: u32,
    pub latent_one_in: u32,
    pub read_error_one_in: u32,
    pub slow_one_in: u32,
    pub alloc_fail_one_in: u32,
    /// Rot, lost and misdirected writes also strike superblocks, maps, directories and headers.
    pub metadata: bool,
    /// One write or flush of a drive fails, after about this many commands.
    pub write_fails_after: Option<u64>,
    pub flush_fails_after: Option<u64>,
    /// An operator clears fences while the hosts go on, and the node lives and dies on.
    pub operator: bool,
}

impl FaultPlan {
    /// Whether any fault destroys data that lay on the media.
    pub fn destroys(&self) -> bool {
        self.rot_one_in + self.lost_write_one_in + self.misdirected_one_in + self.latent_one_in + self.read_error_one_in > 0
    }
}

#[derive(Clone, Debug)]
pub struct HostPlan {
    pub volumes_per_store: usize,
    pub queue_depth: u32,
    /// Blocks that most commands go to.
    pub hot_blocks: u64,
    pub read_percent: u32,
    pub zero_percent: u32,
    pub compare_percent: u32,
    pub flush_percent: u32,
    /// Share of commands that are not whole aligned blocks, on volumes of 512-byte blocks.
    pub sub_block_percent: u32,
    pub multi_percent: u32,
    pub big_percent: u32,
    pub bad_percent: u32,
    pub guest_percent: u32,
    pub meddle_percent: u32,
    pub load: Load,
    /// A host takes a long pause once in so many thoughts.
    pub pause_one_in: u64,
    /// Volumes are made, resized and deleted meanwhile.
    pub orders: bool,
    /// One order in so many thoughts of a host.
    pub order_one_in: u32,
    /// A volume is kept as it is once in so many thoughts of its host; 0 for never.
    pub snapshot_one_in: u32,
    pub scrub: bool,
    /// Commands in all, over all volumes.
    pub commands: u64,
    pub volume_blocks: (u64, u64),
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub drives: Vec<DrivePlan>,
    pub faults: FaultPlan,
    pub host: HostPlan,
    pub limits: Limits,
    pub memory_blocks: u64,
    /// A promise is checked against the drive's durable state once in so many.
    pub probe_one_in: u32,
    /// What a power cut would leave is looked at as a superblock is written, once in so many.
    pub checkpoint_probe_one_in: u32,
    /// Damaged copies of the drive that are opened at each crash and at the end.
    pub malformed: u32,
}

impl Plan {
    pub fn draw(seed: u64) -> Plan {
        let rng = &mut Rng::new(seed ^ 0x706c_616e);
        let load = match rng.below(100) {
            0..18 => Load::Fill,
            18..30 => Load::Sprawl,
            30..40 => Load::Flood,
            _ => Load::Hot,
        };
        let (fill, sprawl, flood) = (load == Load::Fill, load == Load::Sprawl, load == Load::Flood);
        let two_drives = rng.percent(15);
        let drives = (0..if two_drives { 2 } else { 1 })
            .map(|_| DrivePlan {
                kind: if rng.percent(75) { Kind::Volatile } else { Kind::PowerSafe },
                resets: rng.percent(30),
                stores: if rng.percent(15) { 2 } else { 1 },
                ring_blocks: rng.pick(&[2048, 2048, 2048, 2563, 4096]),
                extents: match load {
                    Load::Fill => rng.pick(&[128, 128, 160]),
                    Load::Hot => rng.pick(&[128, 128, 160, 256, 512]),
                    Load::Sprawl | Load::Flood => 512,
                },
                latency_us: rng.pick(&[(5, 20), (20, 200), (20, 2000), (100, 400)]),
            })
            .collect();
        let some = |rng: &mut Rng, percent: u32, of: &[u32]| if rng.percent(percent) { rng.pick(of) } else { 0 };
        let decay = rng.percent(45);
        let d = |rng: &mut Rng, percent: u32, of: &[u32]| if decay { some(rng, percent, of) } else { 0 };
        let occasion = rng.pick(&[Occasion::None, Occasion::Flush, Occasion::Extents, Occasion::Superblock]);
        let faults = FaultPlan {
            // An occasion needs deaths to meet it.
            crashes: if fill || sprawl || occasion == Occasion::Superblock { rng.within(1, 5) } else { rng.pick(&[0, 1, 1, 2, 3, 5]) },
            power_percent: rng.pick(&[0, 50, 80, 100]),
            nested_percent: rng.pick(&[0, 30, 60]),
            occasion,
            rot_one_in: d(rng, 70, &[40, 150]),
            lost_write_one_in: d(rng, 40, &[80, 200]),
            misdirected_one_in: d(rng, 40, &[80, 200]),
            latent_one_in: d(rng, 40, &[80, 200]),
            read_error_one_in: d(rng, 30, &[50, 400]),
            slow_one_in: some(rng, 25, &[50, 500]),
            alloc_fail_one_in: some(rng, 40, &[3, 20, 200]),
            metadata: rng.percent(30),
            write_fails_after: rng.percent(12).then(|| rng.within(1, 1500)),
            flush_fails_after: rng.percent(35).then(|| rng.within(1, 400)),
            operator: rng.percent(60),
        };
        let host = HostPlan {
            volumes_per_store: rng.pick(&[1, 1, 2, 3]),
            queue_depth: if flood { rng.pick(&[16, 64]) } else { rng.pick(&[1, 2, 4, 16, 64]) },
            hot_blocks: if sprawl { 500 } else { rng.pick(&[4, 16, 64, 300]) },
            read_percent: if sprawl || flood { 10 } else { rng.pick(&[10, 30, 60]) },
            zero_percent: rng.pick(&[0, 5, 20]),
            compare_percent: rng.pick(&[0, 5, 20]),
            flush_percent: 2,
            sub_block_percent: rng.pick(&[0, 30, 70]),
            multi_percent: rng.pick(&[5, 20, 40]),
            big_percent: if fill || flood { 30 } else { rng.pick(&[0, 1, 2]) },
            bad_percent: rng.pick(&[0, 2]),
            guest_percent: rng.pick(&[0, 50, 100]),
            meddle_percent: rng.pick(&[0, 10]),
            load,
            pause_one_in: if sprawl { 40 } else { 200 },
            orders: rng.percent(if fill { 80 } else { 50 }),
            // A full store whose volumes come and go, and that dies meanwhile, lives off its last extents.
            order_one_in: if fill { rng.pick(&[10, 40]) } else { 120 },
            snapshot_one_in: rng.pick(&[0, 0, 10, 40]),
            scrub: rng.percent(30),
            commands: match load {
                Load::Fill | Load::Flood => rng.within(150, 600),
                Load::Sprawl => rng.within(600, 1600),
                Load::Hot => rng.within(200, 1600),
            },
            volume_blocks: match load {
                Load::Fill => (1500, 6000),
                Load::Flood => (1000, 3000),
                Load::Sprawl => (30_000, 60_000),
                Load::Hot => rng.pick(&[(16, 200), (64, 2000), (2000, 20000)]),
            },
        };
        let limits = Limits {
            batches_out: rng.pick(&[1, 2, 4, 8]),
            batch_blocks: rng.pick(&[1, 8, 64, 256]),
            drain_slice: if flood { rng.pick(&[1, 4]) } else { rng.pick(&[1, 4, 64]) },
            idle_ms: if sprawl { 5 } else { rng.pick(&[5, 20, 100]) },
            ..Limits::default()
        };
        Plan {
            drives,
            faults,
            host,
            limits,
            memory_blocks: rng.pick(&[1200, 2500, 8000]),
            probe_one_in: if sprawl { 20 } else { rng.pick(&[60, 150]) },
            checkpoint_probe_one_in: if sprawl { 3 } else { 20 },
            malformed: rng.pick(&[0, 0, 2]),
        }
    }
}
