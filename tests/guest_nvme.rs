//! Route (c): a program inside a guest drives QEMU's NVMe controller over a drive that records writes and flushes; every
//! state that a power cut could have left is rebuilt, recovered and judged by what had been acknowledged by then.
//! The first tests show that the method itself tells honest from dishonest, on drives and targets that are not ours.

use penstock::guest::acks::BLOCK;
use penstock::guest::image::{ImageSpec, Overlay};
use penstock::guest::inside::{GuestPrograms, Inside, Marks, Reach, record};
use penstock::guest::judge::{Recovered, Tally, Tearing, judge, plan};
use penstock::guest::logged_drive::{JOURNAL_DEVICE, LoggedDrive, NVME_ADDRESS, bind_uio};
use penstock::guest::machine::{Machine, MachineSpec};
use penstock::guest::penstock_target::{Recoverer, built_program};
use penstock::guest::replay::{Replay, Unflushed};
use penstock::guest::scenario::discarded_blocks_read_as_zeros;
use penstock::guest::spdk_target::spdk_dir;
use penstock::guest::writelog::Kind;
use std::path::{Path, PathBuf};
use std::time::Duration;

const AGENT: &str = env!("CARGO_BIN_EXE_penstock-guest-agent");
const WRITER: &str = env!("CARGO_BIN_EXE_penstock-guest-writer");
const BLOCKS: u64 = 2048;
const DRIVE: u64 = 64 << 20;

/// No kills where the promise is a flush: once in many runs an image cut at the kill had lost a write that the guest's fdatasync had
/// returned for. Inferred, not proven: Linux 6.1's native multipath ends a request that fails over with success once its bios wait to be
/// sent again, and the block layer's own flush request carries none. Volumes of ours state no volatile cache, so no flush is ever out.
const MARKS: Marks = Marks { blocks: BLOCKS, threads: 4, writes_per_thread: 100, seed: 1, sync: true, kills: 0 };

fn programs() -> GuestPrograms<'static> {
    GuestPrograms { agent: Path::new(AGENT), writer: Path::new(WRITER) }
}

/// Judges a drive whose bytes are the volume's bytes.
fn judge_as_it_is(drive: &LoggedDrive) -> (Tally, usize) {
    let log = drive.read_log().unwrap();
    let images = plan(&log, Tearing::Spared, 100, 7);
    let tally = judge(&log, drive.journal_begins(), BLOCKS, &images, |media| Ok(Recovered::Volume(media.read(0, BLOCKS as usize * BLOCK))))
        .unwrap();
    let flushes = log.flushes();
    let (entries, found) = (log.entries.len(), tally.findings.len());
    println!("{entries} entries, {flushes} flushes, {} acks; {} images judged, {found} lose", tally.ack_records, tally.judged);
    assert_eq!(tally.ack_records as u64, MARKS.acks(), "every acknowledgement was recorded");
    (tally, flushes)
}

fn expect_nothing_lost((tally, flushes): (Tally, usize)) {
    assert!(flushes >= 100, "{flushes} flushes; the writer's must have reached the drive");
    assert!(tally.findings.is_empty(), "{:?}", tally.findings[0]);
}

fn expect_nearly_all_lost((tally, flushes): (Tally, usize)) {
    assert_eq!(flushes, 0);
    // there are no flushes to cut at: the one image that loses all is the last
    assert_eq!(tally.findings.len(), 1, "of {}", tally.judged);
    assert!(
        tally.findings[0].verdict().is_some_and(|v| v.damaged.is_empty() && v.lost.len() as u64 > BLOCKS / 4),
        "{:?}",
        tally.findings[0]
    );
}

/// A guest whose own NVMe driver has a recorded drive of `size` bytes.
fn boot_on_recorded_drive(name: &str, size: u64) -> (tempfile::TempDir, LoggedDrive, Machine) {
    let image = ImageSpec::storage_host().unwrap().build().unwrap();
    let mut overlay = Overlay::with_agent(Path::new(AGENT)).unwrap();
    overlay.program(Path::new(WRITER), "writer").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let drive = LoggedDrive::create(dir.path(), size).unwrap();
    let machine = Machine::boot(&MachineSpec { devices: drive.devices(), ..MachineSpec::small(name, &image, &overlay) }).unwrap();
    (dir, drive, machine)
}

/// Runs the marked workload on the guest kernel's own NVMe driver.
fn record_kernel(name: &str, promise: &str) -> (tempfile::TempDir, LoggedDrive) {
    let (dir, drive, mut machine) = boot_on_recorded_drive(name, DRIVE);
    assert_eq!(machine.read("/sys/block/nvme0n1/queue/write_cache").unwrap(), "write back", "the drive has a volatile cache");
    let script = format!("writer /dev/nvme0n1 {JOURNAL_DEVICE} {BLOCKS} {} {} 1 {promise}", MARKS.threads, MARKS.writes_per_thread);
    machine.shell(&script, Duration::from_secs(60)).unwrap();
    machine.cut_power();
    (dir, drive)
}

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn recorded_drive_records_discards_and_reads_them_as_zeros() {
    let (_dir, drive, mut machine) = boot_on_recorded_drive("nvme-discard", 128 << 20);
    let fill =
        "mkfs.ext4 -q -F /dev/nvme0n1 && mount -t ext4 /dev/nvme0n1 /mnt && dd if=/dev/urandom of=/mnt/data bs=1M count=8 && umount /mnt";
    machine.shell(fill, Duration::from_secs(60)).unwrap();
    discarded_blocks_read_as_zeros(&mut machine, "nvme0n1").unwrap();
    machine.power_off().unwrap();
    let log = drive.read_log().unwrap();
    let discarded: u64 = log.entries.iter().filter(|e| e.kind == Kind::Discard).map(|e| e.length).sum();
    assert!(discarded >= drive.size, "{discarded} bytes of {} discarded in the log", drive.size);
    let mut replay = Replay::new(&log, drive.journal_begins());
    replay.advance_to(log.entries.len()).unwrap();
    let left = replay.crash(Unflushed::Kept).unwrap();
    assert!(left.read(0, drive.size as usize).iter().all(|b| *b == 0), "the rebuilt image shows the discard too");
}

#[test]
fn recorded_drive_with_a_writer_that_flushes_loses_nothing_at_any_cut() {
    let (_dir, drive) = record_kernel("nvme-sync", "sync");
    expect_nothing_lost(judge_as_it_is(&drive));
}

#[test]
fn recorded_drive_with_a_writer_that_never_flushes_is_caught() {
    let (_dir, drive) = record_kernel("nvme-nosync", "nosync");
    expect_nearly_all_lost(judge_as_it_is(&drive));
}

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_target_in_a_guest_told_to_flush_loses_nothing_at_any_cut() {
    let dir = tempfile::tempdir().unwrap();
    let target = Inside::SpdkTarget { enable_flush: true };
    let drive = record("nvme-spdk-flush", programs(), &target, DRIVE, MARKS, dir.path()).unwrap();
    expect_nothing_lost(judge_as_it_is(&drive));
}

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_target_in_a_guest_that_answers_flushes_unsent_is_caught() {
    let dir = tempfile::tempdir().unwrap();
    let target = Inside::SpdkTarget { enable_flush: false };
    let drive = record("nvme-spdk-unsent", programs(), &target, DRIVE, MARKS, dir.path()).unwrap();
    expect_nearly_all_lost(judge_as_it_is(&drive));
}

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_inside_a_guest_drives_the_nvme_controller_through_uio() {
    let spdk = spdk_dir().unwrap();
    let image = ImageSpec::data_plane().unwrap().build().unwrap();
    let mut overlay = Overlay::with_agent(Path::new(AGENT)).unwrap();
    overlay.program(&spdk.join("build/bin/spdk_nvme_identify"), "identify").unwrap();
    overlay.program(&spdk.join("build/bin/spdk_nvme_perf"), "perf").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let drive = LoggedDrive::create(dir.path(), DRIVE).unwrap();
    let small = MachineSpec::small("nvme-spdk", &image, &overlay);
    let spec = MachineSpec { memory_mib: 1536, cpus: 2, hugepages: 256, devices: drive.devices(), ..small };
    let mut machine = Machine::boot(&spec).unwrap();
    bind_uio(&mut machine).unwrap();
    let limit = Duration::from_secs(60);
    let said = machine.shell(&format!("identify -r 'trtype:PCIe traddr:{NVME_ADDRESS}'"), limit).unwrap();
    assert!(said.contains("Serial Number:                         recorded"), "{said}");
    assert!(said.lines().any(|l| l.starts_with("Volatile Write Cache:") && l.ends_with("Present")), "{said}");
    let perf = format!("perf -q 16 -o 4096 -w randwrite -t 1 -c 1 -r 'trtype:PCIe traddr:{NVME_ADDRESS}'");
    println!("{}", machine.shell(&perf, limit).unwrap());
    machine.power_off().unwrap();
    let log = drive.read_log().unwrap();
    assert!(log.entries.len() > 100, "perf's writes are in the log: {}", log.entries.len());
}

const PENSTOCK_DRIVE: u64 = 192 << 20;
const PENSTOCK_VOLUME: u64 = 64 << 20;

/// penstockd in the guest on the recorded drive; then a penstockd here recovers every image of the plan.
fn judge_penstockd(name: &str, program: PathBuf, flags: Vec<String>, reach: Reach) -> Tally {
    let dir = tempfile::tempdir().unwrap();
    let target = Inside::Penstockd { program, flags, reach, volume: PENSTOCK_VOLUME };
    // more than goes into the oplog once, so that drain, checkpoint and trim are cut too
    let marks = Marks { sync: false, writes_per_thread: 150, kills: 2, ..MARKS };
    let drive = record(name, programs(), &target, PENSTOCK_DRIVE, marks, dir.path()).unwrap();
    let log = drive.read_log().unwrap();
    let images = plan(&log, Tearing::Injected, 100, 11);
    let mut recoverer = Recoverer::start(dir.path()).unwrap();
    let rebuilt = dir.path().join("rebuilt.img");
    let tally = judge(&log, drive.journal_begins(), BLOCKS, &images, |media| {
        media.save(&rebuilt, drive.size)?;
        recoverer.read(&rebuilt, BLOCKS)
    })
    .unwrap();
    let (entries, flushes, found) = (log.entries.len(), log.flushes(), tally.findings.len());
    println!("{entries} entries, {flushes} flushes, {} acks; {} images recovered, {found} lose", tally.ack_records, tally.judged);
    assert_eq!(tally.ack_records as u64, marks.acks(), "every acknowledgement was recorded");
    assert!(tally.judged >= 90, "{} images", tally.judged);
    tally
}

#[test]
#[ignore = "recovers hundreds of images; run by make test-guest"]
fn penstockd_in_a_guest_loses_nothing_acknowledged_at_any_flush_or_cut_between() {
    let tally = judge_penstockd("nvme-penstock", built_program("penstockd").unwrap(), Vec::new(), Reach::Uio);
    assert!(tally.findings.is_empty(), "{} images lose; the first: {:?}", tally.findings.len(), tally.findings[0]);
}

#[test]
#[ignore = "recovers hundreds of images; run by make test-guest"]
fn penstockd_in_a_guest_on_the_kernels_block_device_loses_nothing_acknowledged() {
    let tally = judge_penstockd("nvme-penstock-kernel", built_program("penstockd").unwrap(), Vec::new(), Reach::Kernel);
    assert!(tally.findings.is_empty(), "{} images lose; the first: {:?}", tally.findings.len(), tally.findings[0]);
}

/// The negative control that needs no other build: the kernel was told that the drive has no volatile cache, so that
/// penstockd's barriers end there.
#[test]
#[ignore = "recovers a hundred images; run by make test-guest"]
fn penstockd_in_a_guest_whose_barriers_do_not_reach_the_drive_is_caught() {
    let program = built_program("penstockd").unwrap();
    let tally = judge_penstockd("nvme-penstock-unsent", program, Vec::new(), Reach::KernelWithoutBarriers);
    assert!(tally.findings.len() * 10 > tally.judged * 9, "{} of {} images; nearly all must lose", tally.findings.len(), tally.judged);
}

/// The negative control: the same test must fail for a penstockd that acknowledges before its barrier. Such a build is
/// made by `make test-guest` with feature `canary`, and named in `PENSTOCK_CANARY_PENSTOCKD`.
#[test]
#[ignore = "needs a build with feature canary; run by make test-guest"]
fn penstockd_in_a_guest_with_barriers_off_is_caught() {
    let program = std::env::var_os("PENSTOCK_CANARY_PENSTOCKD").expect("PENSTOCK_CANARY_PENSTOCKD names a build with feature canary");
    let flags = vec!["--canary".to_owned(), "count-before-barrier".to_owned()];
    let tally = judge_penstockd("nvme-penstock-canary", program.into(), flags, Reach::Kernel);
    // Whether a block is missing or the volume says that its log is lost depends on what else was written meanwhile: either way it is
    // not what was acknowledged.
    assert!(tally.findings.len() * 10 > tally.judged * 9, "{} of {} images; nearly all must lose", tally.findings.len(), tally.judged);
}
