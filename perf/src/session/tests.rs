//! Sessions over a device that is made of memory.

use super::*;
use crate::expect::{Initial, TrimReads};
use crate::fake::FakeDevice;
use crate::journal::{Header, Replay};
use crate::units::ByteOffset;
use crate::verify::{Promises, VerifyPass};
use crate::workload::{Access, Mix};
use std::sync::Arc;

const DEVICE: usize = 256 * 4096;
const SEED: u64 = 21;

fn workload(mix: Mix, depth: u32) -> Workload {
    Workload {
        seed: SEED,
        block_size: ByteCount(4096),
        mix,
        access: Access::Random,
        depth,
        range_offset: ByteOffset(0),
        range_length: None,
    }
}

fn ending(operations: u64) -> Ending {
    Ending { warmup: Nanos(0), duration: None, operations: Some(operations), stop_on_error: true }
}

fn verifier(journal: Option<JournalWriter>) -> Verifier {
    let expectations = Expectations::new(Initial::Zero, TrimReads::Zero);
    Verifier { seed: SEED, unit: 512, expectations, newest: Generation(0), journal }
}

fn session(workload: &Workload, pace: Pace, ending: Ending, verifier: Option<Verifier>) -> Session {
    Session::new(workload, pace, ending, verifier, ByteCount(DEVICE as u64), 512).unwrap()
}

const MIXED: Mix = Mix { read: 40, write: 50, trim: 10 };

#[test]
fn closed_loop_keeps_its_depth_and_counts_every_operation() {
    let mut device = FakeDevice::new(DEVICE);
    let mut load = session(&workload(Mix::READ, 8), Pace::Closed, ending(1_000), None);
    device.drive(&mut load);
    let sample = load.finish().last_window;
    assert_eq!(sample.operations(), 1_000);
    // 8 at a time, 10 µs each: 1,000 take 1.25 ms.
    assert!((1_000_000..1_500_000).contains(&sample.span().0), "{:?}", sample.span());
    assert!(sample.latency().max() < 12_000);
}

#[test]
fn open_loop_over_a_stall_charges_the_stall_to_every_start_it_delayed() {
    // 10,000 a second for 100 ms; the device is silent from 20 to 60 ms. Depth 4 hides all but 4 of the waiting
    // operations from a closed loop; the open loop must see some 400 late ones.
    let stall = Some((Nanos(20_000_000), Nanos(60_000_000)));
    let late = |pace| {
        let mut device = FakeDevice { stall, ..FakeDevice::new(DEVICE) };
        let end = Ending { duration: Some(Nanos(100_000_000)), operations: None, ..ending(0) };
        let mut load = session(&workload(Mix::READ, 4), pace, end, None);
        device.drive(&mut load);
        let histogram = load.finish().last_window.latency();
        histogram.len() - histogram.count_between(0, 1_000_000)
    };
    assert!((300..=450).contains(&late(Pace::Fixed(10_000.0))), "{}", late(Pace::Fixed(10_000.0)));
    assert!(late(Pace::Closed) <= 4);
}

#[test]
fn stall_shows_as_the_longest_gap() {
    let stall = Some((Nanos(20_000_000), Nanos(60_000_000)));
    let mut device = FakeDevice { stall, ..FakeDevice::new(DEVICE) };
    let end = Ending { duration: Some(Nanos(100_000_000)), operations: None, ..ending(0) };
    let mut load = session(&workload(Mix::WRITE, 4), Pace::Closed, end, None);
    device.drive(&mut load);
    let gap = load.finish().last_window.longest_gap;
    assert!((39_900_000..=40_100_000).contains(&gap.0), "{gap}");
}

#[test]
fn warmup_is_not_counted() {
    let mut device = FakeDevice::new(DEVICE);
    let end = Ending { warmup: Nanos(5_000_000), duration: Some(Nanos(5_000_000)), operations: None, ..ending(0) };
    let mut load = session(&workload(Mix::READ, 1), Pace::Closed, end, None);
    device.drive(&mut load);
    let sample = load.finish().last_window;
    assert!((440..=510).contains(&sample.operations()), "{}", sample.operations());
    assert!(device.completed > 900);
}

#[test]
fn verified_run_over_a_sound_device_finds_nothing() {
    let mut device = FakeDevice::new(DEVICE);
    let mut load = session(&workload(MIXED, 16), Pace::Closed, ending(20_000), Some(verifier(None)));
    device.drive(&mut load);
    let finished = load.finish();
    assert_eq!(finished.bad.count, 0, "{:?}", finished.bad.listed);
    assert!(finished.last_window.verified_blocks > 30_000);
    assert!(finished.last_window.held_back > 0, "overlaps never happened, so the test shows nothing about them");
}

#[test]
fn verified_run_over_a_device_that_drops_one_write_finds_it() {
    let mut device = FakeDevice { drop_write: Some(9), ..FakeDevice::new(DEVICE) };
    // Mostly reads: a block that is overwritten before it is read again hides what was lost.
    let read_mostly = Mix { read: 95, write: 5, trim: 0 };
    let mut load = session(&workload(read_mostly, 16), Pace::Closed, ending(20_000), Some(verifier(None)));
    device.drive(&mut load);
    let finished = load.finish();
    assert!(finished.bad.count > 0);
    assert!(matches!(finished.bad.listed[0].fault, Fault::Lost { .. } | Fault::Unexpected { .. }));
}

#[test]
fn failed_write_is_counted_and_leaves_its_blocks_in_doubt() {
    let mut device = FakeDevice { fail_write: Some(3), ..FakeDevice::new(DEVICE) };
    let end = Ending { stop_on_error: false, ..ending(2_000) };
    let mut load = session(&workload(Mix::WRITE, 4), Pace::Closed, end, Some(verifier(None)));
    device.drive(&mut load);
    let finished = load.finish();
    assert_eq!(finished.last_window.errors(), 1);
    assert_eq!(finished.last_window.error_texts["write: write fault"], 1);
    // Half of it landed: both halves are right, and so is a later overwrite.
    let kept = finished.verifier.unwrap();
    let promises = Promises { seed: SEED, unit: 512, expectations: Arc::new(kept.expectations), open_end: None };
    let mut pass = VerifyPass::new(promises, ByteCount(65536), 4);
    device.drive(&mut pass);
    assert!(pass.report().is_good());
}

#[test]
fn first_error_ends_a_run_that_stops_on_errors() {
    let mut device = FakeDevice { fail_write: Some(3), ..FakeDevice::new(DEVICE) };
    let mut load = session(&workload(Mix::WRITE, 4), Pace::Closed, ending(2_000), None);
    device.drive(&mut load);
    assert!(device.completed < 20);
    assert_eq!(load.finish().last_window.errors(), 1);
}

#[test]
fn full_queue_gives_operations_back_and_loses_none() {
    let mut device = FakeDevice { queue: 3, ..FakeDevice::new(DEVICE) };
    let mut load = session(&workload(MIXED, 16), Pace::Closed, ending(5_000), Some(verifier(None)));
    device.drive(&mut load);
    let finished = load.finish();
    assert_eq!(finished.last_window.operations(), 5_000);
    assert!(finished.last_window.resubmitted > 0);
    assert_eq!(finished.bad.count, 0);
}

#[test]
fn target_that_dies_leaves_a_journal_that_later_verifies() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("journal");
    let header = Header { seed: SEED, unit: 512, device: ByteCount(DEVICE as u64), initial: Initial::Zero, trim_reads: TrimReads::Zero };
    let journal = JournalWriter::create(&path, &header).unwrap();
    let mut device = FakeDevice { dies_after: Some(3_000), ..FakeDevice::new(DEVICE) };
    let mut load = session(&workload(MIXED, 16), Pace::Closed, ending(1 << 40), Some(verifier(Some(journal))));
    device.drive(&mut load);
    assert!(load.silence(device.now) > Nanos(1_000_000_000));
    load.abandon(device.now);
    let kept = load.finish().verifier.unwrap();
    kept.journal.unwrap().finish().unwrap();

    let replay = Replay::read(&path).unwrap();
    assert!(replay.is_clean && replay.in_doubt > 0 && replay.acknowledged > 1_000);
    let expectations = Arc::new(replay.expectations);
    let verify = |device: &mut FakeDevice| {
        device.dies_after = None;
        let promises = Promises { seed: SEED, unit: 512, expectations: expectations.clone(), open_end: None };
        let mut pass = VerifyPass::new(promises, ByteCount(65536), 4);
        device.drive(&mut pass);
        pass.report()
    };
    let mut revived = FakeDevice { bytes: device.bytes.clone(), ..FakeDevice::new(DEVICE) };
    let report = verify(&mut revived);
    assert!(report.is_good(), "{report:?}");
    assert!(report.in_doubt_old > 0);
    // The same check must be able to fail: one acknowledged block goes back to zeroes.
    let block = expectations.touched().into_iter().find(|block| {
        let at = block.0 as usize * 512;
        content::examine(&revived.bytes[at..at + 512], SEED, *block) != content::Found::Zero
    });
    let at = block.unwrap().0 as usize * 512;
    revived.bytes[at..at + 512].fill(0);
    assert_eq!(verify(&mut revived).bad.count, 1);
}
