//! Files and block devices as drives, over io_uring.
//!
//! What it is for: a drive that is a regular file or a kernel block device, driven from a loop that never blocks.
//! SPDK's own adapters do not serve here: bdev_uring cannot flush and falls back from `O_DIRECT` silently, and
//! bdev_aio's flush blocks the reactor.
//!
//! * [`UringFile`] is an opened drive: `O_DIRECT` proven, size and block size known, locked against every other
//!   process. It is `Send + Sync`; all cores of a node share one.
//! * [`Ring`] is one core's ring. It takes requests for the files attached to it, sends them with one syscall per
//!   turn of the loop ([`Ring::submit`]), and hands completions back without any ([`Ring::reap`]).
//! * **Submission owns memory, completion gives it back.** A request takes its buffer by value; the ring keeps it
//!   until the kernel has answered; [`Done`] carries it home. Which types may be buffers is the business of
//!   [`StableBuf`] and [`StableBufMut`], the two unsafe traits of [`buf`].
//!
//! Deliberately not in it: SPDK (its buffer types implement the traits in `spdk-rs`), threads, retries of failed
//! requests, caching, and any knowledge of what the bytes mean. No allocation is made per request once the ring is
//! warm (`tests/no_alloc.rs`).
//!
//! Miri can't run io_uring; the tests run under AddressSanitizer instead, with the pinned compiler:
//! `RUSTC_BOOTSTRAP=1 RUSTFLAGS=-Zsanitizer=address cargo test --release --target x86_64-unknown-linux-gnu -p penstock-uring`
//!
//! ```
//! use penstock_uring::{AlignedBuf, ByteOffset, Finished, OpenOpts, Ring, RingOpts, Token, UringFile};
//! # let dir = tempfile::tempdir_in(".").unwrap();
//! # let path = dir.path().join("drive");
//! let drive = UringFile::open(&path, &OpenOpts { size: Some(1 << 20), ..OpenOpts::default() })?;
//! let mut ring: Ring<AlignedBuf, AlignedBuf> = Ring::new(RingOpts::default())?;
//! let file = ring.attach(drive);
//! ring.submit_writev(Token(1), file, ByteOffset(4096), AlignedBuf::copy_of(&[7; 4096]))?;
//! ring.submit()?;
//! assert!(ring.wait(std::time::Duration::from_secs(60))?); // a loop would sleep on `event_fd`, or poll
//! ring.reap(16, |done| {
//!     assert_eq!((done.token, done.result), (Token(1), Ok(4096)));
//!     assert!(matches!(done.what, Finished::Write(buf) if buf[0] == 7));
//! });
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod buf;
mod error;
mod file;
mod media;
mod ring;
mod slot;
#[cfg(test)]
mod tests;

pub use buf::{AlignedBuf, Either, NoBuf, RawSlice, SliceSink, StableBuf, StableBufMut};
pub use error::{Errno, IoFault, OpenError, Refusal, Refused};
pub use file::{FileDiscard, FileKind, OpenOpts, UringFile};
pub use media::Barrier;
pub use ring::{ByteOffset, Done, FileIndex, Finished, Ring, RingCounters, RingOpts, Token};
