//! vhost-user-blk with a guest that dies while an I/O is held: our patch keeps its memory until the I/O is answered.
//!
//! The guest is a small vhost-user client on a thread, which closes its socket as a killed QEMU would.

mod guest;

use guest::Guest;
use spdk_rs::app::{self, App};
use spdk_rs::module::{self, Device, DeviceParams, FrontEnd, HostIo, IoKind, Registered};
use spdk_rs::thread::{Activity, Poller, app_thread};
use spdk_rs::vhost::{self, ControllerOptions};
use spdk_rs::{Errno, Status};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const HELD_BLOCK: u64 = 9;
/// A block in virtio's sectors.
const SECTORS: u64 = BLOCK as u64 / 512;

/// Serves memory; a read of one block is held until released.
struct Holding {
    bytes: Mutex<Vec<u8>>,
    held: AtomicU32,
    release: AtomicBool,
    answered: AtomicU32,
}

struct HoldingChannel {
    device: Arc<Holding>,
    waiting: Rc<RefCell<Vec<HostIo>>>,
    _poller: Poller,
}

impl Device for Holding {
    type Channel = HoldingChannel;

    fn supports(&self, kind: IoKind) -> bool {
        matches!(kind, IoKind::Read | IoKind::Write)
    }

    fn open_channel(self: &Arc<Self>) -> Option<HoldingChannel> {
        let waiting: Rc<RefCell<Vec<HostIo>>> = Rc::default();
        let (device, list) = (self.clone(), waiting.clone());
        let poller = Poller::timed("release", 1000, move || {
            if !device.release.load(Ordering::SeqCst) {
                return Activity::Idle;
            }
            for mut io in list.take() {
                // Writes into the memory of a guest that died long ago.
                io.copy_in(0, &[0xee; BLOCK]);
                io.complete(Status::Success);
                device.answered.fetch_add(1, Ordering::SeqCst);
            }
            Activity::Busy
        })
        .ok()?;
        Some(HoldingChannel { device: self.clone(), waiting, _poller: poller })
    }

    fn submit(channel: &HoldingChannel, mut io: HostIo) {
        assert!(!io.payload_is_private(), "a guest's memory is its own");
        if io.kind() == IoKind::Read && io.offset_blocks() == HELD_BLOCK {
            channel.waiting.borrow_mut().push(io);
            channel.device.held.fetch_add(1, Ordering::SeqCst);
            return;
        }
        let mut bytes = channel.device.bytes.lock().expect("no panics");
        let start = io.offset_blocks() as usize * BLOCK;
        let place = &mut bytes[start..start + io.payload_len()];
        match io.kind() {
            IoKind::Read => io.copy_in(0, place),
            _ => io.copy_out(0, place),
        }
        drop(bytes);
        io.complete(Status::Success);
    }
}

/// Ends the app when the thread that drives it fails, or the test would hang instead of failing: SPDK waits for held I/O.
struct StopOnPanic(Arc<Holding>);

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.release.store(true, Ordering::SeqCst);
            app::stop(1);
        }
    }
}

fn wait_for(what: &str, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !ready() {
        assert!(Instant::now() < deadline, "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

thread_local! {
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
    static RETRY: RefCell<Option<Poller>> = const { RefCell::new(None) };
}

/// The session ends on SPDK's own threads; until then the controller is busy.
fn finish() {
    let mut turns_left = 10_000;
    let retry = Poller::timed("remove", 1000, move || {
        turns_left -= 1;
        match vhost::remove("vm0") {
            Err(Errno::BUSY) => assert!(turns_left > 0, "the session did not end"),
            outcome => {
                assert_eq!(outcome, Ok(()));
                RETRY.take();
                REGISTERED.take().expect("registered").unregister(|outcome| {
                    assert_eq!(outcome, Ok(()));
                    app::stop(0);
                });
            }
        }
        Activity::Busy
    });
    RETRY.set(Some(retry.expect("on the app thread")));
}

#[test]
fn guest_gone_with_a_read_held_past_the_timeout_leaves_the_target_whole() {
    let dir: PathBuf = std::env::temp_dir().join(format!("spdk-rs-vhost-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let device = Arc::new(Holding {
        bytes: Mutex::new(vec![0; 64 * BLOCK]),
        held: AtomicU32::new(0),
        release: AtomicBool::new(false),
        answered: AtomicU32::new(0),
    });
    let serving = Arc::new(AtomicBool::new(false));
    let kept = Arc::new(AtomicBool::new(false));

    let (watched, up, seen, socket) = (device.clone(), serving.clone(), kept.clone(), dir.join("vm0"));
    let director = std::thread::spawn(move || {
        let _stop = StopOnPanic(watched.clone());
        wait_for("the controller", || up.load(Ordering::SeqCst));
        let mut guest = Guest::connect(&socket);
        guest.memory.write(guest::DATA, &[0x77; BLOCK]);
        guest.submit(guest::WRITE, 3 * SECTORS, BLOCK as u32);
        assert_eq!(guest.wait(), 0, "written");
        assert!(watched.bytes.lock().expect("no panics")[3 * BLOCK..4 * BLOCK].iter().all(|b| *b == 0x77));
        guest.memory.write(guest::DATA, &[0; BLOCK]);
        guest.submit(guest::READ, 3 * SECTORS, BLOCK as u32);
        assert_eq!(guest.wait(), 0, "read");
        assert_eq!(guest.memory.read::<BLOCK>(guest::DATA), [0x77; BLOCK]);

        guest.submit(guest::READ, HELD_BLOCK * SECTORS, BLOCK as u32);
        assert_eq!(vhost::sessions("vm0"), Ok(1));
        assert_eq!(vhost::sessions("nosuch"), Err(Errno::NODEV));
        wait_for("the held read", || watched.held.load(Ordering::SeqCst) == 1);
        let memory = guest.vanish();
        // Unpatched, SPDK gives up after 4 s and unmaps; patched, it says that it waits on.
        wait_for("SPDK's word that it keeps the memory", || seen.load(Ordering::SeqCst));
        assert_eq!(memory.status(), 0xff, "not answered yet");
        watched.release.store(true, Ordering::SeqCst);
        wait_for("the held read's answer", || watched.answered.load(Ordering::SeqCst) == 1);
        wait_for("its status in the guest's memory", || memory.status() == 0);
        assert_eq!(memory.read::<BLOCK>(guest::DATA), [0xee; BLOCK], "the late data landed where it was mapped all along");
        app_thread().expect("running").send(finish).expect("running");
    });

    let (inside, up, seen, sockets) = (device.clone(), serving, kept, dir.clone());
    let outcome = App::new("spdk_rs_vhost")
        .no_hugepages()
        .memory_mib(512)
        .no_pci()
        .log(move |line| {
            println!("{:?} {}", line.level, line.text);
            if line.text.contains("keeping the guest's memory mapped") {
                seen.store(true, Ordering::SeqCst);
            }
        })
        .run(move || {
            let params = DeviceParams {
                name: "hold0".into(),
                product: "Penstock test".into(),
                uuid: [5; 16],
                block_count: 64,
                block_size: BLOCK as u32,
                nvme_nsid: 0,
                compare_and_write_blocks: 1,
                front_end: FrontEnd::Other,
            };
            REGISTERED.set(Some(module::register(&params, inside).expect("registered")));
            vhost::set_socket_directory(&format!("{}/", sockets.display())).expect("set");
            let mut options =
                ControllerOptions { name: "vm0".into(), bdev: "nosuch".into(), core_mask: Some("0x1".into()), readonly: false };
            assert_eq!(vhost::create(&options), Err(Errno::NODEV));
            options.bdev = "hold0".into();
            assert_eq!(vhost::create(&options), Ok(()));
            assert_eq!(vhost::create(&options), Err(Errno::EXIST));
            assert_eq!(vhost::remove("nosuch"), Err(Errno::NODEV));
            up.store(true, Ordering::SeqCst);
        });
    director.join().expect("the director saw what it should");
    outcome.expect("started and stopped cleanly");
    std::fs::remove_dir_all(&dir).expect("removed");
}
