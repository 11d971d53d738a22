//! Route (c): a program inside a guest drives QEMU's NVMe controller over a drive that records writes and flushes; every
//! state that a power cut could have left is rebuilt and judged.

use penstock::guest::acks::{Acknowledged, BLOCK};
use penstock::guest::image::{ImageSpec, Overlay};
use penstock::guest::inside::{GuestPrograms, Inside, Marks, record};
use penstock::guest::logged_drive::{JOURNAL_DEVICE, LoggedDrive, NVME_ADDRESS, bind_uio};
use penstock::guest::machine::{Machine, MachineSpec};
use penstock::guest::replay::{Replay, Unflushed, cuts};
use penstock::guest::writelog::WriteLog;
use std::path::Path;
use std::time::Duration;

const AGENT: &str = env!("CARGO_BIN_EXE_penstock-guest-agent");
const WRITER: &str = env!("CARGO_BIN_EXE_penstock-guest-writer");
const BLOCKS: u64 = 2048;

/// Runs the marked workload on the guest's own NVMe driver and pulls the plug at its end.
fn record_raw(name: &str, promise: &str) -> (tempfile::TempDir, LoggedDrive) {
    let image = ImageSpec::storage_host().unwrap().build().unwrap();
    let mut overlay = Overlay::with_agent(Path::new(AGENT)).unwrap();
    overlay.program(Path::new(WRITER), "writer").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let drive = LoggedDrive::create(dir.path(), 64 << 20).unwrap();
    let spec = MachineSpec {
        name,
        image: &image,
        overlay: &overlay,
        memory_mib: 768,
        cpus: 1,
        hugepages: 0,
        network: false,
        devices: drive.devices(),
    };
    let mut machine = Machine::boot(&spec).unwrap();
    assert_eq!(machine.read("/sys/block/nvme0n1/queue/write_cache").unwrap(), "write back", "the drive has a volatile cache");
    let script = format!("writer /dev/nvme0n1 {JOURNAL_DEVICE} {BLOCKS} 4 100 1 {promise}");
    println!("{}", machine.shell(&script, Duration::from_secs(60)).unwrap().trim());
    machine.cut_power();
    (dir, drive)
}

/// Cuts of the log at which an acknowledged write is missing when all unflushed writes are.
fn losing_cuts(log: &WriteLog, drive: &LoggedDrive) -> (usize, usize, usize) {
    let mut replay = Replay::new(log, drive.journal_begins());
    let mut acks = Acknowledged::new(log, drive.journal_begins());
    let places = cuts(log, 200, 7);
    let mut losing = 0;
    for cut in &places {
        replay.advance_to(*cut).unwrap();
        acks.advance_to(*cut).unwrap();
        // a raw drive promises no atomic 4 KiB, so only images without torn writes are judged here
        for unflushed in [Unflushed::Lost, Unflushed::Kept] {
            let media = replay.crash(unflushed).unwrap();
            let verdict = acks.judge(BLOCKS, |b| Ok(media.read(b.0 * BLOCK as u64, BLOCK))).unwrap();
            assert_eq!(verdict.damaged, []);
            if !verdict.is_good() {
                losing += 1;
                break;
            }
        }
    }
    (places.len(), losing, acks.records())
}

#[test]
fn recorded_drive_with_a_writer_that_flushes_loses_nothing_at_any_cut() {
    let (_dir, drive) = record_raw("nvme-sync", "sync");
    let log = drive.read_log().unwrap();
    let (judged, losing, acks) = losing_cuts(&log, &drive);
    println!("{} entries, {} flushes, {acks} ack records; {judged} cuts judged, {losing} lose", log.entries.len(), log.flushes());
    assert_eq!(acks, 400, "every acknowledgement was recorded");
    assert!(log.flushes() >= 100, "the writer's flushes reached the drive");
    assert_eq!(losing, 0);
}

#[test]
fn recorded_drive_with_a_writer_that_never_flushes_is_caught() {
    let (_dir, drive) = record_raw("nvme-nosync", "nosync");
    let log = drive.read_log().unwrap();
    let (judged, losing, acks) = losing_cuts(&log, &drive);
    println!("{} entries, {} flushes, {acks} ack records; {judged} cuts judged, {losing} lose", log.entries.len(), log.flushes());
    assert_eq!(acks, 400);
    assert!(losing * 10 > judged * 9, "{losing} of {judged} cuts lose; without flushes nearly all must");
}

#[test]
fn spdk_inside_a_guest_drives_the_nvme_controller_through_uio() {
    let spdk = penstock::guest::spdk_target::spdk_dir().unwrap();
    let image = ImageSpec::data_plane().unwrap().build().unwrap();
    let mut overlay = Overlay::with_agent(Path::new(AGENT)).unwrap();
    overlay.program(&spdk.join("build/bin/spdk_nvme_identify"), "identify").unwrap();
    overlay.program(&spdk.join("build/bin/spdk_nvme_perf"), "perf").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let drive = LoggedDrive::create(dir.path(), 64 << 20).unwrap();
    let spec = MachineSpec {
        name: "nvme-spdk",
        image: &image,
        overlay: &overlay,
        memory_mib: 1536,
        cpus: 2,
        hugepages: 256,
        network: false,
        devices: drive.devices(),
    };
    let mut machine = Machine::boot(&spec).unwrap();
    bind_uio(&mut machine).unwrap();
    let limit = Duration::from_secs(60);
    let said = machine.shell(&format!("identify -r 'trtype:PCIe traddr:{NVME_ADDRESS}'"), limit).unwrap();
    assert!(said.contains("Serial Number:                         recorded"), "{said}");
    assert!(said.lines().any(|l| l.starts_with("Volatile Write Cache:") && l.ends_with("Present")), "{said}");
    let perf = format!("perf -q 16 -o 4096 -w randwrite -t 2 -c 1 -r 'trtype:PCIe traddr:{NVME_ADDRESS}'");
    println!("{}", machine.shell(&perf, limit).unwrap());
    machine.power_off().unwrap();
    let log = drive.read_log().unwrap();
    assert!(log.entries.len() > 100, "perf's writes are in the log: {}", log.entries.len());
}

/// SPDK's target inside the guest over the same drive, fdatasync after every write.
fn record_spdk_target(name: &str, enable_flush: bool) -> (tempfile::TempDir, LoggedDrive) {
    let programs = GuestPrograms { agent: Path::new(AGENT), writer: Path::new(WRITER) };
    let marks = Marks { blocks: BLOCKS, threads: 4, writes_per_thread: 100, seed: 1, sync: true };
    let dir = tempfile::tempdir().unwrap();
    let drive = record(name, programs, &Inside::SpdkTarget { enable_flush }, 64 << 20, marks, dir.path()).unwrap();
    (dir, drive)
}

#[test]
#[ignore = "two minutes of emulation; run by make test-guest"]
fn spdk_target_in_a_guest_told_to_flush_loses_nothing_at_any_cut() {
    let (_dir, drive) = record_spdk_target("nvme-spdk-flush", true);
    let log = drive.read_log().unwrap();
    let (judged, losing, acks) = losing_cuts(&log, &drive);
    println!("{} entries, {} flushes, {acks} ack records; {judged} cuts judged, {losing} lose", log.entries.len(), log.flushes());
    assert_eq!((acks, losing), (400, 0));
}

#[test]
#[ignore = "two minutes of emulation; run by make test-guest"]
fn spdk_target_in_a_guest_that_answers_flushes_unsent_is_caught() {
    let (_dir, drive) = record_spdk_target("nvme-spdk-unsent", false);
    let log = drive.read_log().unwrap();
    let (judged, losing, acks) = losing_cuts(&log, &drive);
    println!("{} entries, {} flushes, {acks} ack records; {judged} cuts judged, {losing} lose", log.entries.len(), log.flushes());
    assert_eq!((acks, log.flushes()), (400, 0));
    assert!(losing * 10 > judged * 9, "{losing} of {judged} cuts lose; nearly all must");
}
