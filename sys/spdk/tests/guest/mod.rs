//! The guest's end of a vhost-user-blk socket: just enough of a virtio driver to hold a request and then be gone.
//!
//! Formats: vhost-user protocol (QEMU's documentation), virtio 1.2 sections 2.7 (split rings) and 5.2 (block device).

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

const MEMORY: usize = 4 << 20;
/// What the guest calls its memory in messages; any number will do.
const USER_BASE: u64 = 0x7000_0000_0000;
const RING: u16 = 8;
const AVAIL: usize = 0x1000;
const USED: usize = 0x2000;
const HEADER: usize = 0x3000;
const STATUS: usize = 0x4000;
pub const DATA: usize = 0x10000;
pub const READ: u32 = 0;
pub const WRITE: u32 = 1;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_ADDR: u32 = 9;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const VIRTIO_F_VERSION_1: u64 = 1 << 32;

/// The guest's memory, shared with the target.
pub struct Memory {
    base: *mut u8,
    file: OwnedFd,
}

// SAFETY: the mapping is the process's; all access goes through raw copies.
unsafe impl Send for Memory {}

impl Memory {
    fn new() -> Memory {
        // SAFETY: a static name.
        let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0, "memfd");
        // SAFETY: just made.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // SAFETY: sizes and maps our own file.
        let base = unsafe {
            assert_eq!(libc::ftruncate(fd, MEMORY as i64), 0);
            libc::mmap(std::ptr::null_mut(), MEMORY, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED, fd, 0)
        };
        assert_ne!(base, libc::MAP_FAILED);
        Memory { base: base.cast(), file }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= MEMORY);
        // SAFETY: inside the mapping; the target may look at the same time, as with any guest.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    pub fn read<const N: usize>(&self, at: usize) -> [u8; N] {
        assert!(at + N <= MEMORY);
        let mut bytes = [0; N];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(self.base.add(at).cast_const(), bytes.as_mut_ptr(), N) };
        bytes
    }

    pub fn status(&self) -> u8 {
        self.read::<1>(STATUS)[0]
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`, once.
        unsafe { libc::munmap(self.base.cast(), MEMORY) };
    }
}

pub struct Guest {
    stream: UnixStream,
    pub memory: Memory,
    submitted: u16,
    _events: Vec<OwnedFd>,
}

fn eventfd() -> OwnedFd {
    // SAFETY: no pointers.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    assert!(fd >= 0);
    // SAFETY: just made.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

/// One message, with at most one descriptor beside it.
fn send(stream: &UnixStream, request: u32, payload: &[u8], fd: Option<RawFd>) {
    let mut bytes = Vec::new();
    for word in [request, 1, payload.len() as u32] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.extend_from_slice(payload);
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut control = [0u64; 4];
    // SAFETY: all zeroes is a valid msghdr; the pointers below outlive the call, and the control buffer has room for one fd.
    unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        if let Some(fd) = fd {
            message.msg_control = control.as_mut_ptr().cast();
            message.msg_controllen = libc::CMSG_SPACE(4) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
            libc::CMSG_DATA(header).cast::<RawFd>().write_unaligned(fd);
        }
        assert_eq!(libc::sendmsg(stream.as_raw_fd(), &raw const message, 0), bytes.len() as isize);
    }
}

fn words(words: &[u32], longs: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).chain(longs.iter().flat_map(|l| l.to_le_bytes())).collect()
}

impl Guest {
    /// Connects, shares memory and starts queue 0.
    pub fn connect(socket: &Path) -> Guest {
        use std::io::Read;
        let mut stream = UnixStream::connect(socket).expect("the controller listens");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("set");
        let memory = Memory::new();
        send(&stream, SET_OWNER, &[], None);
        send(&stream, GET_FEATURES, &[], None);
        let mut answer = [0; 20];
        stream.read_exact(&mut answer).expect("features");
        let features = u64::from_le_bytes(answer[12..].try_into().expect("eight bytes"));
        assert_ne!(features & VIRTIO_F_VERSION_1, 0);
        send(&stream, SET_FEATURES, &VIRTIO_F_VERSION_1.to_le_bytes(), None);
        let region = words(&[1, 0], &[0, MEMORY as u64, USER_BASE, 0]);
        send(&stream, SET_MEM_TABLE, &region, Some(memory.file.as_raw_fd()));
        send(&stream, SET_VRING_NUM, &words(&[0, u32::from(RING)], &[]), None);
        send(&stream, SET_VRING_BASE, &words(&[0, 0], &[]), None);
        let rings = [USER_BASE, USER_BASE + USED as u64, USER_BASE + AVAIL as u64, 0];
        send(&stream, SET_VRING_ADDR, &words(&[0, 0], &rings), None);
        let (call, kick) = (eventfd(), eventfd());
        send(&stream, SET_VRING_CALL, &0u64.to_le_bytes(), Some(call.as_raw_fd()));
        send(&stream, SET_VRING_KICK, &0u64.to_le_bytes(), Some(kick.as_raw_fd()));
        Guest { stream, memory, submitted: 0, _events: vec![call, kick] }
    }

    /// Puts a request for `len` bytes at [`DATA`] on the ring. The target polls it.
    pub fn submit(&mut self, kind: u32, sector: u64, len: u32) {
        self.memory.write(HEADER, &words(&[kind, 0], &[sector]));
        self.memory.write(STATUS, &[0xff]);
        let (next, device_writes) = (1u16, 2u16);
        let data_flags = next | if kind == READ { device_writes } else { 0 };
        for (at, address, len, flags, chain) in
            [(0, HEADER, 16u32, next, 1u16), (1, DATA, len, data_flags, 2), (2, STATUS, 1, device_writes, 0)]
        {
            let mut descriptor = words(&[], &[address as u64]);
            descriptor.extend_from_slice(&len.to_le_bytes());
            descriptor.extend_from_slice(&flags.to_le_bytes());
            descriptor.extend_from_slice(&chain.to_le_bytes());
            self.memory.write(at * 16, &descriptor);
        }
        let slot = AVAIL + 4 + usize::from(self.submitted % RING) * 2;
        self.memory.write(slot, &0u16.to_le_bytes());
        fence(Ordering::SeqCst);
        self.submitted += 1;
        self.memory.write(AVAIL + 2, &self.submitted.to_le_bytes());
    }

    /// Waits until everything submitted is answered, and returns the last status byte.
    pub fn wait(&self) -> u8 {
        let deadline = Instant::now() + Duration::from_secs(10);
        while u16::from_le_bytes(self.memory.read(USED + 2)) != self.submitted {
            assert!(Instant::now() < deadline, "no answer within 10 s");
            std::thread::sleep(Duration::from_millis(1));
        }
        fence(Ordering::SeqCst);
        self.memory.status()
    }

    /// Dies: the socket closes without a word. The memory stays ours to look at.
    pub fn vanish(self) -> Memory {
        drop(self.stream);
        self.memory
    }
}
