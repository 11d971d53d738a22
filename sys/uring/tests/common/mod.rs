//! What the tests of this crate share: temporary drives, and one request at a time.
#![allow(dead_code, reason = "each test binary uses its own part")]

use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use penstock_uring::{AlignedBuf, ByteOffset, Done, FileIndex, IoFault, OpenOpts, Ring, RingOpts, Token, UringFile};

pub type TestRing = Ring<AlignedBuf, Rc<AlignedBuf>>;
pub type TestDone = Done<AlignedBuf, Rc<AlignedBuf>>;

pub const BLOCK: usize = 4096;
/// Far longer than any request takes; a test that waits this long has failed.
pub const LONG: Duration = Duration::from_secs(60);

/// A directory on a real file system: under the build's own, as /tmp may be memory.
pub fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

pub fn sized(size: u64) -> OpenOpts {
    OpenOpts { size: Some(size), ..OpenOpts::default() }
}

pub fn create(dir: &Path, size: u64) -> Arc<UringFile> {
    UringFile::open(dir.join("drive"), &sized(size)).unwrap()
}

pub fn ring_over(file: Arc<UringFile>) -> (TestRing, FileIndex) {
    let mut ring = Ring::new(RingOpts { depth: 64, ..RingOpts::default() }).unwrap();
    let index = ring.attach(file);
    (ring, index)
}

pub fn block(byte: u8, blocks: usize) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(blocks * BLOCK);
    buf.fill(byte);
    buf
}

/// Submits what is queued and waits until `count` requests are back.
pub fn finish(ring: &mut TestRing, count: usize) -> Vec<TestDone> {
    let mut done = Vec::new();
    while done.len() < count {
        assert!(ring.wait(LONG).unwrap(), "{} of {count} requests came back", done.len());
        ring.reap(count, |d| done.push(d));
        ring.submit().unwrap();
    }
    done
}

pub fn write(ring: &mut TestRing, file: FileIndex, at: u64, buf: AlignedBuf) -> Result<u32, IoFault> {
    ring.submit_writev(Token(0), file, ByteOffset(at), Rc::new(buf)).unwrap();
    finish(ring, 1).remove(0).result
}

pub fn read(ring: &mut TestRing, file: FileIndex, at: u64, len: usize) -> Vec<u8> {
    ring.submit_readv(Token(0), file, ByteOffset(at), AlignedBuf::zeroed(len)).unwrap();
    let done = finish(ring, 1).remove(0);
    assert_eq!(done.result, Ok(len as u32));
    match done.what {
        penstock_uring::Finished::Read(buf) => buf.to_vec(),
        other => panic!("a read came back as {other:?}"),
    }
}

pub fn sync(ring: &mut TestRing, file: FileIndex) -> Result<u32, IoFault> {
    ring.submit_fsync(Token(0), file).unwrap();
    finish(ring, 1).remove(0).result
}

pub fn discard(ring: &mut TestRing, file: FileIndex, at: u64, len: u64) -> Result<u32, IoFault> {
    ring.submit_discard(Token(0), file, ByteOffset(at), len).unwrap();
    finish(ring, 1).remove(0).result
}
