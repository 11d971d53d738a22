//! Tests that need the inside: requests that never complete. Tests over real files and devices are in `tests/`.

use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use crate::{AlignedBuf, ByteOffset, Finished, Ring, RingOpts, Token, UringFile};

/// A pipe: reading it completes when somebody writes to the other end, and never before.
fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: room for two descriptors.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: both just made and owned by nobody else.
    unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

const CHILD: &str = "PENSTOCK_URING_TEST_CHILD";

#[test]
fn ring_dropped_over_a_stuck_request_aborts() {
    if std::env::var_os(CHILD).is_some() {
        let (reader, _writer) = pipe();
        let mut ring: Ring<AlignedBuf, AlignedBuf> = Ring::new(RingOpts { depth: 1, drop_wait: Duration::from_millis(50) }).unwrap();
        let file = ring.attach(UringFile::for_test(reader));
        ring.submit_readv(Token(1), file, ByteOffset(0), AlignedBuf::zeroed(512)).unwrap();
        ring.submit().unwrap();
        drop(ring);
        unreachable!("the request can't have completed");
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tests::ring_dropped_over_a_stuck_request_aborts", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    assert_eq!(child.status.signal(), Some(libc::SIGABRT), "{child:?}");
    let said = String::from_utf8_lossy(&child.stderr).into_owned();
    assert!(said.contains("still holds 1 requests 50 ms after"), "{said}");
}

#[test]
fn ring_waiting_on_a_stuck_request_times_out_and_still_owns_the_buffer() {
    let (reader, writer) = pipe();
    let mut ring: Ring<AlignedBuf, AlignedBuf> = Ring::new(RingOpts::default()).unwrap();
    let file = ring.attach(UringFile::for_test(reader));
    ring.submit_readv(Token(7), file, ByteOffset(0), AlignedBuf::zeroed(512)).unwrap();
    assert!(!ring.wait(Duration::from_millis(20)).unwrap());
    assert_eq!((ring.in_flight(), ring.queued()), (1, 0));
    assert!(ring.detach(file).is_none(), "a file with requests stays");

    let bytes = [0xabu8; 512];
    // SAFETY: an open descriptor and 512 bytes to read from.
    let wrote = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), bytes.as_ptr().cast(), 512) };
    assert_eq!(wrote, 512);
    assert!(ring.wait(Duration::from_secs(10)).unwrap());
    let mut got = Vec::new();
    assert_eq!(ring.reap(8, |done| got.push(done)), 1);
    assert_eq!((got[0].token, got[0].result), (Token(7), Ok(512)));
    assert!(matches!(&got[0].what, Finished::Read(buf) if buf[..] == bytes));
    assert!(ring.detach(file).is_some());
}

#[test]
fn transfer_that_stops_early_goes_on_where_it_stopped() {
    let (reader, writer) = pipe();
    let mut ring: Ring<[AlignedBuf; 2], Rc<AlignedBuf>> = Ring::new(RingOpts::default()).unwrap();
    let file = ring.attach(UringFile::for_test(reader));
    let bufs = [AlignedBuf::zeroed(1024), AlignedBuf::zeroed(1024)];
    ring.submit_readv(Token(1), file, ByteOffset(0), bufs).unwrap();
    ring.submit().unwrap();
    let send = |byte: u8, len: usize| {
        let bytes = vec![byte; len];
        // SAFETY: an open descriptor and `len` bytes to read from.
        let wrote = unsafe { libc::write(std::os::fd::AsRawFd::as_raw_fd(&writer), bytes.as_ptr().cast(), len) };
        assert_eq!(wrote, len as isize);
    };
    // A pipe hands out what it has: 1536 bytes first, so the request stops in the middle of the second slice.
    send(1, 1536);
    assert!(ring.wait(Duration::from_secs(10)).unwrap());
    assert_eq!(ring.reap(8, |_| panic!("not complete yet")), 0);
    assert_eq!((ring.counters().continued_transfers, ring.queued(), ring.in_flight()), (1, 1, 1));
    ring.submit().unwrap();
    send(2, 512);
    assert!(ring.wait(Duration::from_secs(10)).unwrap());
    let mut got = None;
    assert_eq!(ring.reap(8, |done| got = Some(done)), 1);
    let done = got.unwrap();
    assert_eq!(done.result, Ok(2048));
    let Finished::Read([a, b]) = done.what else { panic!("a read") };
    assert!(a.iter().all(|&x| x == 1));
    assert!(b[..512].iter().all(|&x| x == 1) && b[512..].iter().all(|&x| x == 2));
}
