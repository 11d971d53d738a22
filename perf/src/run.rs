//! `run` and `verify`: one load, or one pass over what a journal promises, from attach to report.
//!
//! Deliberately not here: arguments and files (main.rs), and comparing arms (ratio).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, bounded};
use spdk_rs::app;
use spdk_rs::bdev::{Bdev, Geometry};
use spdk_rs::thread::Core;

use crate::expect::{Expectations, Initial, TrimReads};
use crate::handicap::{Handicap, HandicapKind};
use crate::host::{Host, HostError};
use crate::journal::{Header, JournalError, JournalWriter, Replay};
use crate::lane::{self, LaneSetup, Notice, Order};
use crate::live::LiveLine;
use crate::load::Load;
use crate::pace::Pace;
use crate::paths::{Paths, PathsError, PathsOptions};
use crate::report::{Report, Subject, TimelinePoint};
use crate::sample::Sample;
use crate::session::{Ending, Session, Verifier};
use crate::target::{Reconnect, Target};
use crate::units::{ByteCount, Generation, Nanos};
use crate::verify::{Promises, VerifyPass, VerifyReport};
use crate::workload::{Workload, WorkloadError};

/// How often a lane sends its figures.
const WINDOW: Nanos = Nanos(250_000_000);
/// Largest piece of a verify pass, and pieces at a time.
const VERIFY_READ: ByteCount = ByteCount(128 << 10);
const VERIFY_DEPTH: u32 = 16;
/// A verify pass without any completion for this long gives up.
const VERIFY_SILENCE_MAX: Nanos = Nanos(60_000_000_000);

/// What is kept of a run so that it can be checked.
#[derive(Debug, Clone)]
pub struct VerifyOptions {
    pub journal: Option<PathBuf>,
    /// Go on with an existing journal.
    pub is_resumed: bool,
    pub initial: Initial,
    pub trim_reads: TrimReads,
    /// Read every touched block back when the load has ended.
    pub final_pass: bool,
}

/// One run.
#[derive(Debug, Clone)]
pub struct RunOptions {
    pub target: Target,
    pub reconnect: Reconnect,
    pub workload: Workload,
    pub pace: Pace,
    pub ending: Ending,
    /// The target counts as dead after this long without a completion while I/O is outstanding.
    pub dead_after: Option<Nanos>,
    pub verify: Option<VerifyOptions>,
    pub handicap: HandicapKind,
    /// Block size of malloc and null targets.
    pub block_bytes: u32,
    pub is_quiet: bool,
}

/// Why a run did not come to a report.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Workload(#[from] WorkloadError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Paths(#[from] PathsError),
    #[error("the load did not start: {0}")]
    Lane(String),
    #[error("{path}: the journal's verify unit is {journal} bytes, the target's block {target}; it is about another device")]
    Unit { path: PathBuf, journal: u32, target: u32 },
    #[error("the load's thread ended without a word; SPDK's log above says why")]
    Vanished,
}

/// How a run ended, beside its report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Whole,
    /// Ctrl-C.
    Interrupted,
    /// No completion for longer than was allowed.
    TargetDead,
}

/// A load from its start to its end; shows it and gathers its windows.
struct Driven<L> {
    load: L,
    total: Sample,
    timeline: Vec<TimelinePoint>,
    end: End,
}

struct DriveOptions<'a> {
    label: &'a str,
    io_bytes: usize,
    depth: u32,
    dead_after: Option<Nanos>,
    handicap: HandicapKind,
    is_quiet: bool,
    interrupted: &'a AtomicBool,
}

/// Where a load goes, once it is attached.
enum Device {
    /// Through SPDK.
    Bdev { bdev: Bdev, geometry: Geometry },
    /// Over several paths, by sockets.
    Paths(Box<Paths>),
}

/// Bytes of a logical block, and how many there are.
#[derive(Clone, Copy)]
struct Blocks {
    size: u32,
    count: u64,
}

impl Blocks {
    fn bytes(self) -> ByteCount {
        ByteCount(self.count * u64::from(self.size))
    }
}

impl Device {
    fn blocks(&self) -> Blocks {
        match self {
            Self::Bdev { geometry, .. } => Blocks { size: geometry.block_size, count: geometry.block_count },
            Self::Paths(paths) => {
                let (size, count) = paths.geometry();
                Blocks { size, count }
            }
        }
    }

    fn drive<L: Load + Send + 'static>(&mut self, load: L, options: &DriveOptions<'_>) -> Result<Driven<L>, RunError> {
        match self {
            Self::Bdev { bdev, .. } => drive(bdev.clone(), load, options),
            Self::Paths(paths) => drive_over(paths, load, options),
        }
    }
}

/// As [`drive`], on this thread.
fn drive_over<L: Load>(paths: &mut Paths, mut load: L, options: &DriveOptions<'_>) -> Result<Driven<L>, RunError> {
    let mut live = LiveLine::new(options.label, options.is_quiet);
    let (mut total, mut timeline, mut end) = (Sample::default(), Vec::new(), End::Whole);
    let mut switches = 0;
    paths.drive(&mut load, WINDOW, |sample, silence, at, load| {
        live.window(sample, silence, load.is_draining());
        if at.switches != switches {
            switches = at.switches;
            live.say(&format!("on path {}", at.address));
        }
        add_window(&mut total, &mut timeline, sample);
        if options.dead_after.is_some_and(|limit| silence > limit) && end != End::TargetDead {
            end = End::TargetDead;
            live.say(&format!("no completion for {silence}: the target counts as dead"));
            load.abandon(at.now);
        }
        if options.interrupted.swap(false, Ordering::SeqCst) {
            live.say("stopping");
            // Once: finish what is outstanding. Twice: do not even wait for that.
            if end == End::Interrupted {
                load.abandon(at.now)
            } else {
                load.stop(at.now)
            }
            end = End::Interrupted;
        }
    })?;
    live.close();
    Ok(Driven { load, total, timeline, end })
}

fn drive<L: Load + Send + 'static>(bdev: Bdev, load: L, options: &DriveOptions<'_>) -> Result<Driven<L>, RunError> {
    let core: Core = *app::cores().last().ok_or(HostError::Stopping)?;
    let (orders, orders_rx) = bounded(8);
    let (notices_tx, notices) = crossbeam_channel::unbounded();
    let (spare, spare_rx) = bounded(4);
    let setup = LaneSetup {
        bdev,
        core,
        load,
        io_bytes: options.io_bytes,
        depth: options.depth,
        window: WINDOW,
        handicap: Handicap::new(options.handicap, Arc::new(AtomicU64::new(0))),
        is_clock_coarse: false,
    };
    lane::start(setup, orders_rx, notices_tx, spare_rx).map_err(|errno| RunError::Lane(errno.to_string()))?;
    let mut live = LiveLine::new(options.label, options.is_quiet);
    let mut driven_total = Sample::default();
    let mut timeline: Vec<TimelinePoint> = Vec::new();
    let mut end = End::Whole;
    loop {
        match notices.recv_timeout(Duration::from_millis(100)) {
            Ok(Notice::Window { sample, silence, is_draining }) => {
                live.window(&sample, silence, is_draining);
                add_window(&mut driven_total, &mut timeline, &sample);
                let _ = spare.try_send(*sample);
                if options.dead_after.is_some_and(|limit| silence > limit) && end != End::TargetDead {
                    end = End::TargetDead;
                    live.say(&format!("no completion for {silence}: the target counts as dead"));
                    let _ = orders.send(Order::Abandon);
                }
            }
            Ok(Notice::Finished(load)) => {
                live.close();
                return Ok(Driven { load: *load, total: driven_total, timeline, end });
            }
            Ok(Notice::Failed(text)) => return Err(RunError::Lane(text)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(RunError::Vanished),
        }
        if options.interrupted.swap(false, Ordering::SeqCst) {
            // Once: finish what is outstanding. Twice: do not even wait for that.
            let order = if end == End::Interrupted { Order::Abandon } else { Order::Stop };
            end = End::Interrupted;
            live.say("stopping");
            let _ = orders.send(order);
        }
    }
}

fn add_window(total: &mut Sample, timeline: &mut Vec<TimelinePoint>, window: &Sample) {
    total.add(window);
    if window.span().0 > 0 {
        timeline.push(TimelinePoint {
            at_s: window.until.since(total.from).as_secs_f64(),
            iops: window.iops(),
            mib_per_s: window.bandwidth() / f64::from(1 << 20),
            p99_us: window.latency().value_at_quantile(0.99) as f64 / 1e3,
        });
    }
}

/// What a run gives.
pub struct RunOutcome {
    pub report: Report,
    pub end: End,
}

fn verifier(options: &VerifyOptions, seed: u64, blocks: Blocks) -> Result<Verifier, RunError> {
    let fresh = Header { seed, unit: blocks.size, device: blocks.bytes(), initial: options.initial, trim_reads: options.trim_reads };
    let Some(path) = &options.journal else {
        let expectations = Expectations::new(options.initial, options.trim_reads);
        return Ok(Verifier { seed, unit: fresh.unit, expectations, newest: Generation(0), journal: None });
    };
    if !options.is_resumed {
        let journal = Some(JournalWriter::create(path, &fresh)?);
        let expectations = Expectations::new(options.initial, options.trim_reads);
        return Ok(Verifier { seed, unit: fresh.unit, expectations, newest: Generation(0), journal });
    }
    let replay = Replay::read(path)?;
    check_device(path, &replay.header, blocks)?;
    let journal = Some(JournalWriter::append(path, &replay)?);
    let header = replay.header;
    Ok(Verifier { seed: header.seed, unit: header.unit, expectations: replay.expectations, newest: replay.newest, journal })
}

fn check_device(path: &std::path::Path, header: &Header, blocks: Blocks) -> Result<(), RunError> {
    let target = blocks.bytes();
    if header.unit != blocks.size {
        return Err(RunError::Unit { path: path.to_owned(), journal: header.unit, target: blocks.size });
    }
    // A volume may have grown since; it must not have shrunk.
    if target < header.device {
        let (seed, journal) = (header.seed, header.device);
        return Err(JournalError::OtherDevice { path: path.to_owned(), seed, journal, target }.into());
    }
    Ok(())
}

/// Attaches, loads, and gives the report. On the steering thread.
pub fn run(host: &mut Host, options: &RunOptions, interrupted: &AtomicBool) -> Result<RunOutcome, RunError> {
    let name = host.attach(&options.target, "perf_target", options.reconnect, options.block_bytes)?;
    let is_writing = options.workload.mix.read < 100;
    let (bdev, geometry) = host.open(&name, is_writing)?;
    run_on(Device::Bdev { bdev, geometry }, options, interrupted)
}

/// The same over several paths, without SPDK.
pub fn run_over(paths: PathsOptions, options: &RunOptions, interrupted: &AtomicBool) -> Result<RunOutcome, RunError> {
    run_on(Device::Paths(Box::new(Paths::open(paths)?)), options, interrupted)
}

fn run_on(mut device: Device, options: &RunOptions, interrupted: &AtomicBool) -> Result<RunOutcome, RunError> {
    let blocks = device.blocks();
    let verifier = options.verify.as_ref().map(|verify| verifier(verify, options.workload.seed, blocks)).transpose()?;
    let session = Session::new(&options.workload, options.pace, options.ending.clone(), verifier, blocks.bytes(), blocks.size)?;
    let drive_options = DriveOptions {
        label: "load",
        io_bytes: options.workload.block_size.0 as usize,
        depth: options.workload.depth,
        dead_after: options.dead_after,
        handicap: options.handicap,
        is_quiet: options.is_quiet,
        interrupted,
    };
    let driven = device.drive(session, &drive_options)?;
    let (mut total, mut timeline, end) = (driven.total, driven.timeline, driven.end);
    let finished = driven.load.finish();
    add_window(&mut total, &mut timeline, &finished.last_window);
    let subject = Subject {
        target: options.target.to_string(),
        device: blocks.bytes(),
        unit: blocks.size,
        workload: options.workload.clone(),
        pace: options.pace,
    };
    let mut report = Report::new(subject, &total, timeline, finished.bad);
    if let Device::Paths(paths) = &device {
        report.paths = Some(paths.report().clone());
    }
    if let Some(error) = finished.failure {
        return Err(error.into());
    }
    if let (Some(mut kept), Some(verify)) = (finished.verifier, &options.verify) {
        if let Some(journal) = kept.journal.take() {
            journal.finish()?;
        }
        if verify.final_pass && end != End::TargetDead {
            let (seed, unit) = (kept.seed, kept.unit);
            let promises = Promises { seed, unit, expectations: Arc::new(kept.expectations), open_end: None };
            report.verify = Some(verify_pass(&mut device, promises, options.is_quiet, interrupted)?);
        }
    }
    Ok(RunOutcome { report, end })
}

fn verify_pass(device: &mut Device, promises: Promises, is_quiet: bool, interrupted: &AtomicBool) -> Result<VerifyReport, RunError> {
    let read = ByteCount(VERIFY_READ.0.max(u64::from(promises.unit)));
    let pass = VerifyPass::new(promises, read, VERIFY_DEPTH);
    let options = DriveOptions {
        label: "verify",
        io_bytes: read.0 as usize,
        depth: VERIFY_DEPTH,
        dead_after: Some(VERIFY_SILENCE_MAX),
        handicap: HandicapKind::None,
        is_quiet,
        interrupted,
    };
    Ok(device.drive(pass, &options)?.load.report())
}

/// What `verify` gives.
pub struct VerifyOutcome {
    pub report: VerifyReport,
    /// From the first attempt to connect to the first completed pass: the journal's facts are read before.
    pub span: Duration,
    pub acknowledged: u64,
    pub in_doubt: u64,
    pub is_clean: bool,
}

/// Attaches and compares the target with a journal.
pub fn verify(
    host: &mut Host,
    target: &Target,
    journal: &std::path::Path,
    block_bytes: u32,
    is_quiet: bool,
    interrupted: &AtomicBool,
) -> Result<VerifyOutcome, RunError> {
    let attach = || {
        let reconnect = Reconnect { keep_trying_s: 30, delay_s: 1, fail_io_after_s: 0 };
        let name = host.attach(target, "perf_target", reconnect, block_bytes)?;
        let (bdev, geometry) = host.open(&name, false)?;
        Ok(Device::Bdev { bdev, geometry })
    };
    verify_on(attach, journal, is_quiet, interrupted)
}

/// The same over several paths, without SPDK.
pub fn verify_over(
    paths: PathsOptions,
    journal: &std::path::Path,
    is_quiet: bool,
    interrupted: &AtomicBool,
) -> Result<VerifyOutcome, RunError> {
    verify_on(|| Ok(Device::Paths(Box::new(Paths::open(paths)?))), journal, is_quiet, interrupted)
}

fn verify_on(
    attach: impl FnOnce() -> Result<Device, RunError>,
    journal: &std::path::Path,
    is_quiet: bool,
    interrupted: &AtomicBool,
) -> Result<VerifyOutcome, RunError> {
    let replay = Replay::read(journal)?;
    let started = Instant::now();
    let mut device = attach()?;
    check_device(journal, &replay.header, device.blocks())?;
    let promises = Promises {
        seed: replay.header.seed,
        unit: replay.header.unit,
        expectations: Arc::new(replay.expectations),
        open_end: (!replay.is_clean).then_some(replay.newest),
    };
    let report = verify_pass(&mut device, promises, is_quiet, interrupted)?;
    Ok(VerifyOutcome {
        report,
        span: started.elapsed(),
        acknowledged: replay.acknowledged,
        in_doubt: replay.in_doubt,
        is_clean: replay.is_clean,
    })
}

/// Pieces that a verify pass has under way.
pub const VERIFY_PLACES: u32 = VERIFY_DEPTH;
