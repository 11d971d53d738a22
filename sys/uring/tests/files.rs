//! Drives that are regular files: I/O, barriers, refusals, sleeping, and against a plain model.

mod common;

use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;

use common::{BLOCK, LONG, block, create, discard, finish, read, ring_over, scratch, sync, write};
use penstock_uring::{AlignedBuf, ByteOffset, Either, FileDiscard, Finished, IoFault, OpenOpts, Refusal, Ring, RingOpts, Token, UringFile};
use proptest::prelude::*;

const MIB: u64 = 1 << 20;

#[test]
fn written_blocks_read_back_after_a_barrier_and_a_reopen() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    assert_eq!(write(&mut ring, file, 8192, block(7, 2)), Ok(8192));
    assert_eq!(sync(&mut ring, file), Ok(0));
    drop(ring);
    let reopened = UringFile::open(dir.path().join("drive"), &OpenOpts::default()).unwrap();
    assert_eq!(reopened.size(), MIB);
    let (mut ring, file) = ring_over(reopened);
    let all = read(&mut ring, file, 0, MIB as usize);
    assert!(all[..8192].iter().all(|&b| b == 0));
    assert!(all[8192..16384].iter().all(|&b| b == 7));
    assert!(all[16384..].iter().all(|&b| b == 0));
}

#[test]
fn slices_of_several_owners_land_in_order() {
    let dir = scratch();
    type Payload = Vec<Either<AlignedBuf, Rc<AlignedBuf>>>;
    let mut ring: Ring<[AlignedBuf; 3], (AlignedBuf, Payload)> = Ring::new(RingOpts::default()).unwrap();
    let file = ring.attach(create(dir.path(), MIB));
    let shared = Rc::new(block(3, 1));
    let batch = (block(1, 1), vec![Either::A(block(2, 1)), Either::B(shared.clone())]);
    ring.submit_writev(Token(1), file, ByteOffset(4096), batch).unwrap();
    assert!(ring.wait(LONG).unwrap());
    ring.reap(1, |done| {
        assert_eq!(done.result, Ok(3 * BLOCK as u32));
        assert!(matches!(done.what, Finished::Write((_, payload)) if payload.len() == 2));
    });
    assert_eq!(Rc::strong_count(&shared), 1, "the batch came back and was dropped");
    let bufs = [AlignedBuf::zeroed(BLOCK), AlignedBuf::zeroed(BLOCK), AlignedBuf::zeroed(BLOCK)];
    ring.submit_readv(Token(2), file, ByteOffset(4096), bufs).unwrap();
    assert!(ring.wait(LONG).unwrap());
    let reaped = ring.reap(1, |done| {
        let Finished::Read(bufs) = done.what else { panic!("a read") };
        assert_eq!(bufs.map(|b| (b[0], b[BLOCK - 1])), [(1, 1), (2, 2), (3, 3)]);
    });
    assert_eq!(reaped, 1);
}

#[test]
fn turn_of_many_requests_costs_one_syscall_and_reaping_none() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    for n in 0..32u8 {
        let at = ByteOffset(u64::from(n) * BLOCK as u64);
        ring.submit_writev(Token(u64::from(n)), file, at, Rc::new(block(n, 1))).unwrap();
    }
    assert_eq!((ring.queued(), ring.in_flight(), ring.room()), (32, 32, 32));
    assert_eq!(ring.submit().unwrap(), 0);
    assert_eq!(ring.submit().unwrap(), 0);
    assert_eq!(ring.counters().submit_syscalls, 1);
    let mut tokens: Vec<u64> = finish(&mut ring, 32).into_iter().map(|d| d.token.0).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..32).collect::<Vec<_>>());
    assert_eq!(ring.counters().submit_syscalls, 1);
    assert_eq!((ring.counters().requests, ring.counters().completions), (32, 32));
}

#[test]
fn reap_hands_out_no_more_than_its_budget() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    for n in 0..4 {
        ring.submit_fsync(Token(n), file).unwrap();
    }
    let mut seen = 0;
    while seen < 4 {
        assert!(ring.wait(LONG).unwrap());
        let handed = ring.reap(1, |_| seen += 1);
        assert_eq!(handed, 1);
    }
    assert_eq!(ring.reap(1, |_| unreachable!()), 0);
}

#[test]
fn full_ring_hands_the_buffer_back_and_takes_it_later() {
    let dir = scratch();
    let mut ring: common::TestRing = Ring::new(RingOpts { depth: 2, ..RingOpts::default() }).unwrap();
    let file = ring.attach(create(dir.path(), MIB));
    ring.submit_writev(Token(1), file, ByteOffset(0), Rc::new(block(1, 1))).unwrap();
    ring.submit_fsync(Token(2), file).unwrap();
    let refused = ring.submit_writev(Token(3), file, ByteOffset(4096), Rc::new(block(9, 1))).unwrap_err();
    assert_eq!(refused.why, Refusal::Full { depth: 2 });
    assert_eq!(refused.buf[0], 9);
    assert_eq!(ring.submit_fsync(Token(4), file), Err(Refusal::Full { depth: 2 }));
    assert_eq!(ring.submit_discard(Token(5), file, ByteOffset(0), 4096), Err(Refusal::Full { depth: 2 }));
    finish(&mut ring, 2);
    ring.submit_writev(Token(3), file, ByteOffset(4096), refused.buf).unwrap();
    assert_eq!(finish(&mut ring, 1)[0].result, Ok(4096));
    assert_eq!(ring.counters().refusals, 3);
}

#[test]
fn requests_outside_of_the_drive_are_refused_and_the_file_stays_as_it_is() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    for (at, blocks) in [(MIB, 1), (MIB - 4096, 2), (u64::MAX - 4095, 1)] {
        let refused = ring.submit_writev(Token(0), file, ByteOffset(at), Rc::new(block(1, blocks))).unwrap_err();
        let len = (blocks * BLOCK) as u64;
        assert_eq!(refused.why, Refusal::OutOfRange { offset: ByteOffset(at), len, size: MIB });
        assert!(ring.submit_readv(Token(0), file, ByteOffset(at), block(0, blocks)).is_err());
        assert!(ring.submit_discard(Token(0), file, ByteOffset(at), len).is_err());
    }
    assert_eq!((ring.in_flight(), ring.queued()), (0, 0));
    assert_eq!(std::fs::metadata(dir.path().join("drive")).unwrap().len(), MIB);
}

#[test]
fn torn_sizes_offsets_and_addresses_are_refused() {
    let dir = scratch();
    let drive = create(dir.path(), MIB);
    let (block_size, align) = (drive.block_size(), drive.memory_align());
    let (mut ring, file) = ring_over(drive);
    let torn = |len| Rc::new(AlignedBuf::zeroed(len));
    let why = |r: Result<(), penstock_uring::Refused<Rc<AlignedBuf>>>| r.unwrap_err().why;
    let half = u64::from(block_size / 2);
    assert_eq!(why(ring.submit_writev(Token(0), file, ByteOffset(half), torn(4096))), Refusal::Misaligned { value: half, block_size });
    assert_eq!(why(ring.submit_writev(Token(0), file, ByteOffset(0), torn(4095))), Refusal::Misaligned { value: 4095, block_size });
    assert_eq!(ring.submit_discard(Token(0), file, ByteOffset(0), 0), Err(Refusal::Empty));
    assert_eq!(ring.submit_discard(Token(0), file, ByteOffset(0), 100), Err(Refusal::Misaligned { value: 100, block_size }));

    // A slice that starts one byte into a buffer.
    let mut owner = AlignedBuf::zeroed(2 * BLOCK);
    let inside = std::ptr::NonNull::new(owner.as_mut_ptr()).unwrap();
    let mut raw: Ring<penstock_uring::NoBuf, penstock_uring::RawSlice> = Ring::new(RingOpts::default()).unwrap();
    let file = raw.attach(ring.file(file).unwrap().clone());
    // SAFETY: one block within `owner`, which outlives the ring's hold (the request is refused).
    let slice = unsafe { penstock_uring::RawSlice::new(inside.add(1), BLOCK) };
    let refused = raw.submit_writev(Token(0), file, ByteOffset(0), slice).unwrap_err();
    assert_eq!(refused.why, Refusal::MisalignedMemory { address: inside.as_ptr() as usize + 1, align });
}

#[test]
fn request_of_too_many_slices_is_refused() {
    let dir = scratch();
    let mut ring: Ring<penstock_uring::NoBuf, Vec<Rc<AlignedBuf>>> = Ring::new(RingOpts::default()).unwrap();
    let file = ring.attach(create(dir.path(), 8 * MIB));
    // The same block again and again: no two neighbours touch in memory.
    let one = Rc::new(block(5, 1));
    let refused = ring.submit_writev(Token(0), file, ByteOffset(0), vec![one.clone(); 1025]).unwrap_err();
    assert_eq!(refused.why, Refusal::TooManySlices { slices: 1025, limit: 1024 });
    ring.submit_writev(Token(0), file, ByteOffset(0), vec![one; 1024]).unwrap();
    assert!(ring.wait(LONG).unwrap());
    assert_eq!(ring.reap(1, |done| assert_eq!(done.result, Ok(1024 * 4096))), 1);
}

#[test]
fn read_only_drive_refuses_writes_barriers_and_discards() {
    let dir = scratch();
    drop(create(dir.path(), MIB));
    let opts = OpenOpts { read_only: true, ..OpenOpts::default() };
    let (mut ring, file) = ring_over(UringFile::open(dir.path().join("drive"), &opts).unwrap());
    let refused = ring.submit_writev(Token(0), file, ByteOffset(0), Rc::new(block(1, 1))).unwrap_err();
    assert_eq!(refused.why, Refusal::ReadOnly);
    assert_eq!(ring.submit_fsync(Token(0), file), Err(Refusal::ReadOnly));
    assert_eq!(ring.submit_discard(Token(0), file, ByteOffset(0), 4096), Err(Refusal::ReadOnly));
    assert_eq!(read(&mut ring, file, 0, BLOCK), vec![0; BLOCK]);
}

#[test]
fn detached_file_is_never_reached_by_its_old_index() {
    let (a, b) = (scratch(), scratch());
    let (mut ring, old) = ring_over(create(a.path(), MIB));
    assert!(ring.detach(old).is_some());
    assert!(ring.detach(old).is_none());
    let new = ring.attach(create(b.path(), MIB));
    assert_eq!(ring.submit_fsync(Token(0), old), Err(Refusal::NotAttached));
    assert!(ring.submit_writev(Token(0), old, ByteOffset(0), Rc::new(block(1, 1))).is_err());
    assert_eq!(sync(&mut ring, new), Ok(0));
    drop(UringFile::open(a.path().join("drive"), &OpenOpts::default()).expect("detaching let go of the lock"));
}

#[test]
fn file_cut_short_beneath_us_is_an_error_not_a_short_success() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    let outside = std::fs::OpenOptions::new().write(true).open(dir.path().join("drive")).unwrap();
    outside.set_len(MIB / 2).unwrap();
    ring.submit_readv(Token(1), file, ByteOffset(0), AlignedBuf::zeroed(MIB as usize)).unwrap();
    let done = finish(&mut ring, 1).remove(0);
    assert_eq!(done.result, Err(IoFault::Short { want: MIB as u32, got: MIB as u32 / 2 }));
    assert!(matches!(done.what, Finished::Read(_)), "the buffer comes back all the same");
}

#[test]
fn discarded_blocks_read_as_zeros_and_keep_their_space_unless_told() {
    use std::os::unix::fs::MetadataExt;
    for (mode, keeps) in [(FileDiscard::KeepSpace, true), (FileDiscard::Release, false)] {
        let dir = scratch();
        let opts = OpenOpts { size: Some(MIB), discard: mode, ..OpenOpts::default() };
        let (mut ring, file) = ring_over(UringFile::open(dir.path().join("drive"), &opts).unwrap());
        let space = || std::fs::metadata(dir.path().join("drive")).unwrap().blocks() * 512;
        assert!(space() >= MIB, "space is reserved at creation");
        assert_eq!(write(&mut ring, file, 0, block(7, 256)), Ok(MIB as u32));
        assert_eq!(sync(&mut ring, file), Ok(0));
        assert_eq!(discard(&mut ring, file, 4096, MIB / 2), Ok(0));
        let all = read(&mut ring, file, 0, MIB as usize);
        let end = 4096 + MIB as usize / 2;
        assert!(all[..4096].iter().all(|&b| b == 7) && all[end..].iter().all(|&b| b == 7), "{mode:?}");
        assert!(all[4096..end].iter().all(|&b| b == 0), "{mode:?}");
        assert_eq!(space() >= MIB, keeps, "{mode:?} leaves {} bytes", space());
    }
}

#[test]
fn sleeper_is_woken_by_a_completion_and_by_nothing_else() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    let event = ring.event_fd().unwrap().as_raw_fd();
    let readable = |millis: i32| {
        let mut poll = libc::pollfd { fd: event, events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, counted as one.
        (unsafe { libc::poll(&mut poll, 1, millis) }) == 1
    };
    assert!(!readable(0));
    ring.submit_writev(Token(0), file, ByteOffset(0), Rc::new(block(1, 1))).unwrap();
    assert!(!readable(20), "what is only queued wakes nobody");
    ring.submit().unwrap();
    assert!(readable(60_000));
    ring.clear_event();
    assert!(!readable(0));
    assert_eq!(ring.reap(8, |done| assert_eq!(done.result, Ok(4096))), 1);

    ring.wake_on_completion(false);
    assert_eq!(sync(&mut ring, file), Ok(0));
    assert!(!readable(0), "signals are off while polling");
    ring.wake_on_completion(true);
    ring.submit_fsync(Token(0), file).unwrap();
    ring.submit().unwrap();
    assert!(readable(60_000));
}

#[test]
fn dropped_ring_first_finishes_what_it_holds() {
    let dir = scratch();
    let bufs: Vec<_> = (0..64u8).map(|n| Rc::new(block(n + 1, 4))).collect();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    for (n, buf) in bufs.iter().enumerate() {
        ring.submit_writev(Token(0), file, ByteOffset((n * 4 * BLOCK) as u64), buf.clone()).unwrap();
    }
    drop(ring);
    assert!(bufs.iter().all(|b| Rc::strong_count(b) == 1), "every buffer was let go");
    let reopened = UringFile::open(dir.path().join("drive"), &OpenOpts::default()).expect("and so was the lock");
    let (mut ring, file) = ring_over(reopened);
    let all = read(&mut ring, file, 0, MIB as usize);
    for (n, piece) in all.chunks(4 * BLOCK).enumerate() {
        assert!(piece.iter().all(|&b| b == n as u8 + 1), "piece {n}");
    }
}

#[test]
fn callback_that_panics_loses_its_own_completion_only() {
    let dir = scratch();
    let (mut ring, file) = ring_over(create(dir.path(), MIB));
    for n in 0..3 {
        ring.submit_fsync(Token(n), file).unwrap();
    }
    assert!(ring.wait(LONG).unwrap());
    let panicked = catch_unwind(AssertUnwindSafe(|| ring.reap(8, |_| panic!("a bug upstairs"))));
    assert!(panicked.is_err());
    assert_eq!(finish(&mut ring, 2).len(), 2);
    assert_eq!((ring.in_flight(), ring.room()), (0, 64));
}

#[test]
fn ring_of_an_impossible_depth_is_refused() {
    for depth in [0, 4097] {
        let opts = RingOpts { depth, ..RingOpts::default() };
        let err = Ring::<AlignedBuf, AlignedBuf>::new(opts).err().unwrap();
        assert!(err.to_string().contains("it takes 1 to 4096"), "{err}");
    }
}

#[test]
fn two_rings_on_two_threads_share_one_drive() {
    let dir = scratch();
    let drive = create(dir.path(), MIB);
    std::thread::scope(|threads| {
        for half in 0..2u64 {
            let drive = drive.clone();
            threads.spawn(move || {
                let (mut ring, file) = ring_over(drive);
                for n in 0..32 {
                    let at = half * MIB / 2 + n * BLOCK as u64;
                    assert_eq!(write(&mut ring, file, at, block(half as u8 + 1, 1)), Ok(4096));
                }
                assert_eq!(sync(&mut ring, file), Ok(0));
            });
        }
    });
    let (mut ring, file) = ring_over(drive);
    assert_eq!(read(&mut ring, file, 31 * BLOCK as u64, BLOCK), vec![1; BLOCK]);
    assert_eq!(read(&mut ring, file, MIB / 2, BLOCK), vec![2; BLOCK]);
}

#[derive(Clone, Debug)]
enum Op {
    Write { at: usize, blocks: usize, byte: u8 },
    Discard { at: usize, blocks: usize },
    Read { at: usize, blocks: usize },
    Sync,
}

const DRIVE_BLOCKS: usize = 64;

fn op() -> impl Strategy<Value = Op> {
    let range = (0..DRIVE_BLOCKS).prop_flat_map(|at| (Just(at), 1..=(DRIVE_BLOCKS - at)));
    prop_oneof![
        4 => (range.clone(), any::<u8>()).prop_map(|((at, blocks), byte)| Op::Write { at, blocks, byte }),
        1 => range.clone().prop_map(|(at, blocks)| Op::Discard { at, blocks }),
        3 => range.prop_map(|(at, blocks)| Op::Read { at, blocks }),
        1 => Just(Op::Sync),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    /// One request after another against a plain array of bytes.
    #[test]
    fn drive_behaves_like_an_array_of_bytes(ops in prop::collection::vec(op(), 1..24)) {
        let dir = scratch();
        let (mut ring, file) = ring_over(create(dir.path(), (DRIVE_BLOCKS * BLOCK) as u64));
        let mut model = vec![0u8; DRIVE_BLOCKS * BLOCK];
        for op in ops {
            match op {
                Op::Write { at, blocks, byte } => {
                    let len = (blocks * BLOCK) as u32;
                    prop_assert_eq!(write(&mut ring, file, (at * BLOCK) as u64, block(byte, blocks)), Ok(len));
                    model[at * BLOCK..][..blocks * BLOCK].fill(byte);
                }
                Op::Discard { at, blocks } => {
                    prop_assert_eq!(discard(&mut ring, file, (at * BLOCK) as u64, (blocks * BLOCK) as u64), Ok(0));
                    model[at * BLOCK..][..blocks * BLOCK].fill(0);
                }
                Op::Read { at, blocks } => {
                    let got = read(&mut ring, file, (at * BLOCK) as u64, blocks * BLOCK);
                    prop_assert!(got == model[at * BLOCK..][..blocks * BLOCK]);
                }
                Op::Sync => prop_assert_eq!(sync(&mut ring, file), Ok(0)),
            }
        }
        prop_assert!(read(&mut ring, file, 0, model.len()) == model);
    }
}
