//! Opening drives: creation, locks, refusals, and (as root, where loop devices are) block devices and full file systems.

mod common;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use common::{BLOCK, block, create, discard, read, ring_over, scratch, sized, sync, write};
use penstock_uring::{Barrier, ByteOffset, Errno, FileKind, IoFault, OpenError, OpenOpts, Token, UringFile};

const MIB: u64 = 1 << 20;

#[test]
fn absent_file_needs_a_size() {
    let dir = scratch();
    let err = UringFile::open(dir.path().join("no"), &OpenOpts::default()).unwrap_err();
    assert!(matches!(err, OpenError::Absent { .. }));
    assert!(err.to_string().contains("?size=10GiB"), "{err}");
    let err = UringFile::open(dir.path().join("no/where"), &sized(MIB)).unwrap_err();
    assert!(matches!(err, OpenError::Os { errno: Errno(libc::ENOENT), .. }), "{err}");
}

#[test]
fn file_that_is_not_there_yet_is_foretold_by_its_directory() {
    let dir = scratch();
    let foretold = UringFile::prospect(dir.path().join("drive")).unwrap();
    let drive = create(dir.path(), MIB);
    assert_eq!(foretold, (drive.barrier().clone(), drive.is_volatile()));
    if Path::new("/dev/shm").is_dir() {
        assert!(UringFile::prospect("/dev/shm/no-such-drive").unwrap().1, "a tmpfs forgets");
    }
    let err = UringFile::prospect(dir.path().join("no/where")).unwrap_err();
    assert!(err.to_string().contains("Make its directory first"), "{err}");
}

#[test]
fn created_file_is_what_it_says() {
    let dir = scratch();
    let drive = create(dir.path(), 3 * MIB);
    assert_eq!((drive.size(), drive.kind(), drive.read_only()), (3 * MIB, FileKind::Regular, false));
    assert!(drive.block_size() >= 512 && drive.block_size().is_power_of_two());
    assert!(drive.memory_align() <= 4096);
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(drive.path()).unwrap().permissions());
    assert_eq!(mode & 0o777, 0o600, "a drive is nobody else's business");
}

#[test]
fn size_that_differs_from_the_file_is_refused_with_both() {
    let dir = scratch();
    drop(create(dir.path(), MIB));
    let err = UringFile::open(dir.path().join("drive"), &sized(2 * MIB)).unwrap_err();
    assert!(matches!(err, OpenError::SizeDiffers { found, wanted, .. } if (found, wanted) == (MIB, 2 * MIB)), "{err}");
    drop(UringFile::open(dir.path().join("drive"), &sized(MIB)).unwrap());
}

#[test]
fn impossible_sizes_are_refused_and_leave_no_file() {
    let dir = scratch();
    for size in [0, 4095, 4097, u64::MAX - 4095] {
        let err = UringFile::open(dir.path().join("drive"), &sized(size)).unwrap_err();
        assert!(matches!(err, OpenError::BadSize { .. }), "{size}: {err}");
    }
    let err = UringFile::open(dir.path().join("drive"), &sized(1 << 60)).unwrap_err();
    assert!(matches!(err, OpenError::NoSpace { wanted, .. } if wanted == 1 << 60), "{err}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn file_left_empty_by_a_crash_while_creating_is_filled() {
    let dir = scratch();
    std::fs::write(dir.path().join("drive"), b"").unwrap();
    let err = UringFile::open(dir.path().join("drive"), &OpenOpts::default()).unwrap_err();
    assert!(matches!(err, OpenError::BadSize { size: 0, .. }), "{err}");
    assert_eq!(create(dir.path(), MIB).size(), MIB);
}

#[test]
fn drive_in_use_names_the_process_that_has_it() {
    let dir = scratch();
    let drive = create(dir.path(), MIB);
    let err = UringFile::open(drive.path(), &impatient()).unwrap_err();
    assert!(matches!(err, OpenError::InUse { .. }));
    assert!(err.to_string().contains(&format!("by process {}", std::process::id())), "{err}");
    let err = UringFile::open(drive.path(), &OpenOpts { read_only: true, ..impatient() }).unwrap_err();
    assert!(matches!(err, OpenError::InUse { .. }), "looking is refused as well: {err}");
    let path = drive.path().to_path_buf();
    drop(drive);
    UringFile::open(path, &OpenOpts::default()).unwrap();
}

fn impatient() -> OpenOpts {
    OpenOpts { lock_wait: Duration::ZERO, ..OpenOpts::default() }
}

const CHILD: &str = "PENSTOCK_URING_TEST_DRIVE";

#[test]
fn drive_of_a_process_killed_under_load_can_be_opened_at_once() {
    if let Some(path) = std::env::var_os(CHILD) {
        let (mut ring, file) = ring_over(UringFile::open(path, &OpenOpts::default()).unwrap());
        println!("ready");
        loop {
            for n in 0..64 {
                let _ = ring.submit_writev(Token(n), file, ByteOffset(n * 65536), Rc::new(block(1, 16)));
            }
            ring.wait(common::LONG).unwrap();
            ring.reap(64, |done| assert_eq!(done.result, Ok(65536)));
        }
    }
    let dir = scratch();
    drop(create(dir.path(), 4 * MIB));
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "drive_of_a_process_killed_under_load_can_be_opened_at_once", "--nocapture"])
            .env(CHILD, dir.path().join("drive"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let ready = BufReader::new(child.stdout.take().unwrap()).lines().any(|line| line.unwrap().contains("ready"));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(ready);
        drop(UringFile::open(dir.path().join("drive"), &OpenOpts::default()).unwrap());
    }
}

#[test]
fn file_system_without_direct_io_is_refused_by_name() {
    let err = UringFile::open("/proc/self/comm", &OpenOpts::default()).unwrap_err();
    assert!(matches!(&err, OpenError::NoDirectIo { fs, .. } if fs == "proc"), "{err}");
    assert!(err.to_string().contains("Use a file on ext4 or xfs"), "{err}");
}

#[test]
fn what_is_no_drive_is_refused() {
    let dir = scratch();
    for (path, found) in [(dir.path(), "a directory"), (Path::new("/dev/null"), "a character device")] {
        let err = UringFile::open(path, &OpenOpts::default()).unwrap_err();
        assert!(err.to_string().contains(found), "{err}");
    }
}

/// A loop device over a file, detached on drop.
struct Loop(PathBuf);

impl Loop {
    /// `None`, said aloud, where this can't be: not root, no loop devices.
    fn over(image: &Path) -> Option<Self> {
        let out = Command::new("losetup").args(["--find", "--show"]).arg(image).output();
        match out {
            Ok(out) if out.status.success() => Some(Self(String::from_utf8(out.stdout).unwrap().trim().into())),
            other => {
                eprintln!("skipped: no loop device here ({other:?})");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn image(dir: &Path, size: u64) -> PathBuf {
    let path = dir.join("image");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    path
}

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|out| out.status.success())
}

/// Flushes that a device has completed (the kernel's Documentation/block/stat.rst); `None` if it has no cache to flush.
fn flushes(device: &Path) -> Option<u64> {
    let sys = Path::new("/sys/block").join(device.file_name().unwrap());
    if std::fs::read_to_string(sys.join("queue/write_cache")).unwrap().trim() != "write back" {
        return None;
    }
    let stat = std::fs::read_to_string(sys.join("stat")).unwrap();
    Some(stat.split_ascii_whitespace().nth(15).unwrap().parse().unwrap())
}

#[test]
fn block_device_serves_and_is_exclusive() {
    let dir = scratch();
    let Some(device) = Loop::over(&image(dir.path(), 4 * MIB)) else { return };
    let drive = UringFile::open(&device.0, &OpenOpts::default()).unwrap();
    assert_eq!((drive.kind(), drive.size(), drive.block_size()), (FileKind::BlockDevice, 4 * MIB, 512));
    assert!(matches!(drive.barrier(), Barrier::Flush | Barrier::NotNeeded), "{:?}", drive.barrier());
    let err = UringFile::open(&device.0, &impatient()).unwrap_err();
    assert!(matches!(err, OpenError::InUse { .. }), "{err}");
    assert!(!run(Command::new("mount").arg(&device.0).arg(dir.path())), "the kernel keeps others off too");

    let (mut ring, file) = ring_over(drive);
    assert_eq!(write(&mut ring, file, 512, penstock_uring::AlignedBuf::copy_of(&[9; 512])), Ok(512));
    assert_eq!(write(&mut ring, file, MIB, block(7, 16)), Ok(65536));
    let flushes_before = flushes(&device.0);
    assert_eq!(sync(&mut ring, file), Ok(0));
    if let Some(before) = flushes_before {
        assert!(flushes(&device.0).unwrap() > before, "the barrier reached the device");
    }
    assert_eq!(read(&mut ring, file, 0, BLOCK)[512..1024], [9; 512]);
    match discard(&mut ring, file, MIB, 32768) {
        Ok(0) => {
            let got = read(&mut ring, file, MIB, 65536);
            assert!(got[..32768].iter().all(|&b| b == 0) && got[32768..].iter().all(|&b| b == 7));
        }
        other => assert!(matches!(other, Err(IoFault::Os(e)) if e.is_unsupported()), "{other:?}"),
    }
}

#[test]
fn mounted_block_device_is_refused_and_a_full_file_system_is_an_error() {
    let dir = scratch();
    let Some(device) = Loop::over(&image(dir.path(), 8 * MIB)) else { return };
    let mount_point = dir.path().join("mnt");
    std::fs::create_dir(&mount_point).unwrap();
    let mounted = run(Command::new("mkfs.ext4").args(["-q", "-O", "^has_journal"]).arg(&device.0))
        && run(Command::new("mount").arg(&device.0).arg(&mount_point));
    if !mounted {
        eprintln!("skipped: can't make and mount a small ext4 here");
        return;
    }
    let _unmount = Mounted(mount_point.clone());
    let err = UringFile::open(&device.0, &impatient()).unwrap_err();
    assert!(err.to_string().contains("mounted"), "{err}");

    let err = UringFile::open(mount_point.join("large"), &sized(64 * MIB)).unwrap_err();
    assert!(matches!(&err, OpenError::NoSpace { wanted, free, fs, .. } if *wanted == 64 * MIB && *free < 8 * MIB && fs == "ext4"), "{err}");
    assert!(!mount_point.join("large").exists(), "nothing is left behind");

    // A thin file (made elsewhere) larger than what is free: writing it must fail as what it is.
    let thin = mount_point.join("thin");
    std::fs::File::create(&thin).unwrap().set_len(64 * MIB).unwrap();
    let (mut ring, file) = ring_over(UringFile::open(&thin, &OpenOpts::default()).unwrap());
    let fault = (0..64).find_map(|n| write(&mut ring, file, n * MIB, block(1, 256)).err()).expect("it can't all fit");
    // A write that met the end midway is continued first, and then fails like the others.
    assert!(matches!(fault, IoFault::Os(e) if e.is_no_space()), "{fault}");
    assert_eq!(read(&mut ring, file, 0, BLOCK), vec![1; BLOCK], "what fitted stays readable");
}
