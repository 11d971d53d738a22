//! What one seed of a fleet will do, drawn before it starts: how many nodes, their drives and clocks, the volumes and their hosts, and which faults
//! may strike. Each seed has only some faults on: some bugs hide behind others' faults. Not here: when a fault strikes (`strike`).

use penstock_engine::Limits;
use penstock_engine::replica::Timing;

use crate::drive::Kind;
use crate::plan::DrivePlan;
use crate::rng::Rng;

/// Members come back from their drives: until the engine's recovery knows them, nodes do not die.
pub const RECOVERS: bool = true;

/// A group of faults that a seed has or has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Strike {
    Kill,
    /// Two nodes at once.
    KillPair,
    PowerCut,
    PowerCutOfAll,
    Isolate,
    OneWay,
    Deaf,
    /// Two halves that reach each other through one node alone.
    Bridge,
    /// Two halves that do not reach each other.
    Split,
    Pause,
    /// A pause of which the clock knows nothing, as when a machine is stopped.
    Freeze,
    /// The clock jumps ahead.
    Leap,
    SlowDrive,
    SlowLink,
    Transfer,
    /// A leader is cut off while its followers restart.
    CutOff,
    /// Frames of long ago come again.
    Replay,
    /// A drive is lost, and a blank one takes its place.
    Wipe,
    /// A drive is put back from an older copy of it.
    PutBack,
}

pub const STRIKES: [Strike; 19] = [
    Strike::Kill,
    Strike::KillPair,
    Strike::PowerCut,
    Strike::PowerCutOfAll,
    Strike::Isolate,
    Strike::OneWay,
    Strike::Deaf,
    Strike::Bridge,
    Strike::Split,
    Strike::Pause,
    Strike::Freeze,
    Strike::Leap,
    Strike::SlowDrive,
    Strike::SlowLink,
    Strike::Transfer,
    Strike::CutOff,
    Strike::Replay,
    Strike::Wipe,
    Strike::PutBack,
];

/// Decay of what lies at rest, and drives that fail a command. Rates are "one in n" turns of a node, 0 for never.
#[derive(Clone, Debug, Default)]
pub struct Decay {
    pub rot_one_in: u32,
    pub lost_write_one_in: u32,
    pub misdirected_one_in: u32,
    pub latent_one_in: u32,
    /// One write or flush of one node's drive fails, after about this many of its commands.
    pub write_fails_after: Option<u64>,
    pub flush_fails_after: Option<u64>,
    /// The newest promised record rots at a power cut, at fewer members than a quorum at a time.
    pub newest: bool,
}

impl Decay {
    pub fn rots(&self) -> bool {
        self.rot_one_in + self.lost_write_one_in + self.misdirected_one_in + self.latent_one_in > 0
    }
}

#[derive(Clone, Debug)]
pub struct Habits {
    pub queue_depth: u32,
    pub hot_blocks: u64,
    pub read_percent: u32,
    pub zero_percent: u32,
    pub compare_percent: u32,
    pub sub_block_percent: u32,
    pub multi_percent: u32,
    pub big_percent: u32,
    pub guest_percent: u32,
    pub meddle_percent: u32,
    /// Commands that go to a node that was not heard to lead.
    pub astray_percent: u32,
    /// What was not acknowledged is sent again elsewhere.
    pub again_percent: u32,
    /// Microseconds between two thoughts, at most.
    pub think_us: u64,
    /// How long a host waits before it tries another path.
    pub patience_us: u64,
    pub volume_blocks: (u64, u64),
    /// Hosts ask nothing for this long now and then: groups fall asleep.
    pub naps: bool,
    /// Volumes change size meanwhile.
    pub resizes: bool,
    /// Snapshots come and go.
    pub snapshots: bool,
    /// Clones are made of them.
    pub clones: bool,
    /// Drives are scrubbed meanwhile, and what members have is compared.
    pub scrubs: bool,
}

#[derive(Clone, Debug)]
pub struct Plan {
    pub nodes: usize,
    pub drives: Vec<DrivePlan>,
    /// Volumes with three replicas (or five), and volumes of one node.
    pub groups: usize,
    pub singles: usize,
    /// One member of each group keeps the log alone.
    pub log_only: bool,
    pub timing: Timing,
    /// Clocks run at these thousandths of real time.
    pub rates: (u64, u64),
    pub loss: u32,
    pub double: u32,
    pub late: u32,
    pub flip_one_in: u32,
    /// Who was not heard of is not sent anything.
    pub strict: bool,
    pub strikes: Vec<Strike>,
    /// Microseconds between two strikes, on average.
    pub every_us: u64,
    pub decay: Decay,
    pub habits: Habits,
    pub limits: Limits,
    pub memory_blocks: u64,
    pub alloc_fail_one_in: u32,
    /// A promise is checked against the drive's durable state once in so many.
    pub probe_one_in: u32,
    pub storm_us: u64,
}

impl Plan {
    pub fn draw(seed: u64) -> Plan {
        let rng = &mut Rng::new(seed ^ 0x66_6c_65_65_74);
        let nodes = rng.pick(&[3, 3, 3, 3, 3, 3, 3, 5, 5, 7]);
        let fill = rng.percent(10);
        // Of their own, so that all else of a seed is as it was.
        let layered = !fill && Rng::new(seed ^ 0x6c_61_79_65_72).percent(30);
        let lease = rng.percent(40);
        let sleep = rng.percent(40).then_some(40);
        // Slow drives are slow for a second at most, and a leader has to find out before.
        let aside = Some(if seed.is_multiple_of(2) { 10 } else { 100 });
        let timing = Timing { election: 20, heartbeat: 5, stride: 4, tick: 10, sleep, aside, lease };
        let volatile = rng.percent(80);
        let drives = (0..nodes)
            .map(|_| DrivePlan {
                kind: if volatile || rng.percent(30) { Kind::Volatile } else { Kind::PowerSafe },
                resets: rng.percent(30),
                stores: 1,
                ring_blocks: rng.pick(&[2048, 8192, 8192, 12291]),
                extents: if fill { rng.pick(&[128, 128, 160]) } else { rng.pick(&[160, 256]) * if layered { 4 } else { 1 } },
                latency_us: rng.pick(&[(5, 20), (20, 200), (20, 2000), (100, 400)]),
            })
            .collect();
        let mut strikes: Vec<Strike> = STRIKES.into_iter().filter(|_| rng.percent(45)).collect();
        let loses = strikes.iter().any(|strike| matches!(strike, Strike::Wipe | Strike::PutBack));
        if lease {
            // A lease trusts clocks to run evenly.
            strikes.retain(|strike| !matches!(strike, Strike::Freeze | Strike::Leap));
        }
        let some = |rng: &mut Rng, percent: u32, of: &[u32]| if rng.percent(percent) { rng.pick(of) } else { 0 };
        if fill && rng.percent(50) {
            // Nobody goes away: then no member may be left without space.
            strikes.clear();
        }
        let rots = rng.percent(25);
        let mut decay = Decay {
            rot_one_in: if rots { some(rng, 80, &[1500, 5000]) } else { 0 },
            lost_write_one_in: if rots { some(rng, 40, &[3000, 10000]) } else { 0 },
            misdirected_one_in: if rots { some(rng, 40, &[3000, 10000]) } else { 0 },
            latent_one_in: if rots { some(rng, 40, &[3000, 10000]) } else { 0 },
            write_fails_after: rng.percent(8).then(|| rng.within(1, 600)),
            flush_fails_after: rng.percent(12).then(|| rng.within(1, 300)),
            newest: rng.percent(20),
        };
        let singles = if decay.newest || loses { 0 } else { rng.pick(&[0, 0, 1, 2]) };
        let habits = Habits {
            queue_depth: rng.pick(&[1, 2, 4, 16]),
            hot_blocks: rng.pick(&[2, 4, 16, 64]),
            read_percent: rng.pick(&[15, 40, 60]),
            zero_percent: rng.pick(&[0, 5, 15]),
            compare_percent: rng.pick(&[0, 5, 20]),
            sub_block_percent: rng.pick(&[0, 30, 70]),
            multi_percent: rng.pick(&[5, 20, 40]),
            big_percent: if fill { 12 } else { rng.pick(&[0, 0, 1]) },
            guest_percent: rng.pick(&[0, 50, 100]),
            meddle_percent: rng.pick(&[0, 10]),
            astray_percent: rng.pick(&[5, 15, 40]),
            again_percent: rng.pick(&[0, 50]),
            think_us: rng.pick(&[4_000, 15_000, 40_000]),
            patience_us: rng.pick(&[80_000, 300_000, 1_000_000]),
            volume_blocks: if fill { (600, 1800) } else { rng.pick(&[(16, 200), (64, 1200)]) },
            naps: sleep.is_some() && rng.percent(70),
            resizes: rng.percent(20),
            snapshots: layered,
            clones: layered && Rng::new(seed ^ 0x63_6c_6f_6e_65).percent(60),
            scrubs: Rng::new(seed ^ 0x73_63_72_75_62).percent(30),
        };
        let mut alloc = some(rng, 25, &[5, 20, 200]);
        let limits = Limits {
            batches_out: rng.pick(&[1, 2, 4, 8]),
            batch_blocks: rng.pick(&[1, 8, 64, 256]),
            drain_slice: rng.pick(&[1, 4, 64]),
            idle_ms: rng.pick(&[5, 20, 100]),
            ..Limits::default()
        };
        if !RECOVERS {
            strikes.retain(|strike| {
                !matches!(strike, Strike::Kill | Strike::KillPair | Strike::PowerCut | Strike::PowerCutOfAll | Strike::CutOff)
            });
            decay = Decay::default();
            alloc = 0;
        }
        Plan {
            nodes,
            drives,
            groups: if fill { 1 } else { rng.pick(&[1, 1, 2, 3]) },
            singles,
            log_only: nodes == 3 && !fill && Rng::new(seed ^ 0x6c_6f_67).percent(25),
            timing,
            rates: if lease { (970, 1030) } else { rng.pick(&[(1000, 1000), (800, 1250)]) },
            loss: rng.pick(&[0, 0, 1, 5, 15]),
            double: rng.pick(&[0, 2, 10]),
            late: rng.pick(&[0, 2, 8]),
            flip_one_in: rng.pick(&[0, 100, 400]),
            strict: rng.percent(50),
            strikes,
            every_us: rng.pick(&[150_000, 400_000, 900_000]),
            decay,
            habits,
            limits,
            memory_blocks: rng.pick(&[2500, 4000, 8000]),
            alloc_fail_one_in: alloc,
            probe_one_in: if RECOVERS { rng.pick(&[40, 150]) } else { u32::MAX },
            storm_us: rng.within(2_500_000, 6_000_000),
        }
    }
}
