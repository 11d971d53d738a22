//! A device in Rust over vfio-user, with SPDK's own NVMe driver as the guest in a second process (on one reactor they would
//! wait for each other).

mod ram;

use ram::{BLOCK, Ram};
use spdk_rs::Errno;
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{Bdev, BdevChannel, Done};
use spdk_rs::dma::DmaBuf;
use spdk_rs::module::{self, DeviceParams, FrontEnd, Registered};
use spdk_rs::nvme::{self, NvmeAddress};
use spdk_rs::nvmf::{AnaState, Listen, NamespaceOptions, Subsystem, SubsystemOptions, Target, Transport, TransportOptions};
use spdk_rs::thread::app_thread;
use std::cell::RefCell;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const DIRECTORY: &str = "PENSTOCK_TEST_VFIO_USER_DIRECTORY";

thread_local! {
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
    static SUBSYSTEM: RefCell<Option<Subsystem>> = const { RefCell::new(None) };
    static IO: RefCell<Option<(Bdev, BdevChannel<DmaBuf>)>> = const { RefCell::new(None) };
}

fn on_guest_done(done: Done<DmaBuf>) {
    assert_eq!(done.result, Ok(()));
    match done.token {
        1 => IO.with_borrow(|io| {
            let (_, channel) = io.as_ref().expect("open");
            channel.read(DmaBuf::zeroed(BLOCK).expect("memory"), 3, 1, 2).expect("room");
        }),
        _ => {
            assert!(done.memory.expect("back")[..].iter().all(|b| *b == 0x66));
            // Dropped later than this completion, which borrows the channel.
            app_thread()
                .expect("running")
                .send(|| {
                    IO.take();
                    nvme::detach("guest", |outcome| {
                        assert_eq!(outcome, Ok(()));
                        assert_eq!(spdk_rs::bdev::names(), Vec::<String>::new());
                        app::stop(0);
                    });
                })
                .expect("running");
        }
    }
}

/// The guest's process: attaches, writes a block, reads it back, leaves.
#[test]
#[ignore = "the guest's half; the other test runs it in a process of its own"]
fn guest() {
    let directory = std::env::var(DIRECTORY).expect("set by the other test");
    let app = App::new("spdk_rs_guest").no_hugepages().memory_mib(512).no_pci().core_mask("0x2");
    app.run(move || {
        nvme::enable_flush().expect("before any attach");
        nvme::detach("guest", |outcome| assert_eq!(outcome, Err(Errno::NODEV)));
        nvme::attach(&NvmeAddress::VfioUser("/nowhere".into()), "other", |outcome| assert!(outcome.is_err()));
        nvme::attach(&NvmeAddress::VfioUser(directory), "guest", |outcome| {
            assert_eq!(outcome.expect("attached"), ["guestn1"]);
            assert_eq!(nvme::enable_flush(), Err(Errno::new(1)), "too late once there is a drive (EPERM)");
            let bdev = Bdev::open("guestn1", true, |_| ()).expect("opened");
            assert_eq!(bdev.geometry().block_count, 64);
            let channel = bdev.channel(2, on_guest_done).expect("channel");
            let mut buffer = DmaBuf::zeroed(BLOCK).expect("memory");
            buffer.fill(0x66);
            channel.write(buffer, 3, 1, 1).expect("room");
            IO.set(Some((bdev, channel)));
        });
    })
    .expect("started and stopped cleanly");
}

struct Guest(Child);

impl Guest {
    fn start(directory: &Path) -> Guest {
        let child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "guest", "--ignored", "--nocapture"])
            .env(DIRECTORY, directory)
            .stdin(Stdio::null())
            .spawn();
        Guest(child.expect("started"))
    }

    fn wait(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(40);
        loop {
            if let Some(status) = self.0.try_wait().expect("ours") {
                return status.success();
            }
            assert!(Instant::now() < deadline, "the guest is not done within 40 s");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Gone already when all went well.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn finish(code: i32) {
    let subsystem = SUBSYSTEM.take().expect("made");
    let subsystem = Rc::new(RefCell::new(Some(subsystem)));
    let stopped = subsystem.clone();
    let held = subsystem.borrow();
    held.as_ref().expect("just put").stop(move |outcome| {
        assert_eq!(outcome, Ok(()));
        stopped.take().expect("still there").destroy(move |outcome| {
            assert_eq!(outcome, Ok(()));
            REGISTERED.take().expect("registered").unregister(move |outcome| {
                assert_eq!(outcome, Ok(()));
                app::stop(code);
            });
        });
    });
}

#[test]
fn vfio_user_guest_in_another_process_writes_and_reads_a_rust_device() {
    let directory = std::env::temp_dir().join(format!("spdk-rs-vfio-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let listen = Listen::VfioUser { directory: directory.display().to_string() };
    let ram = Ram::new(64, true);
    let serving = Arc::new(AtomicBool::new(false));
    let (up, place) = (serving.clone(), directory.clone());
    let director = std::thread::spawn(move || {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !up.load(Ordering::SeqCst) {
            assert!(Instant::now() < deadline, "not serving within 30 s");
            std::thread::sleep(Duration::from_millis(10));
        }
        let outcome = std::panic::catch_unwind(|| Guest::start(&place).wait());
        let good = *outcome.as_ref().unwrap_or(&false);
        app_thread().expect("running").send(move || finish(i32::from(!good))).expect("running");
        assert!(good, "the guest failed: {outcome:?}");
    });
    let device = ram.clone();
    let outcome =
        App::new("spdk_rs_vfio").no_hugepages().memory_mib(512).no_pci().log(|line| println!("{:?} {}", line.level, line.text)).run(
            move || {
                let params = DeviceParams {
                    name: "ram0".into(),
                    product: "Penstock test".into(),
                    uuid: [6; 16],
                    block_count: 64,
                    block_size: BLOCK as u32,
                    nvme_nsid: 1,
                    compare_and_write_blocks: 1,
                    front_end: FrontEnd::NvmfVfioUser,
                };
                REGISTERED.set(Some(module::register(&params, device).expect("registered")));
                let target = Target::get().expect("nvmf_tgt");
                target.add_transport(Transport::VfioUser, &TransportOptions::default(), move |outcome| {
                    assert_eq!(outcome, Ok(()));
                    target.listen(&listen).expect("listening");
                    let options = SubsystemOptions {
                        nqn: "nqn.2026-11.test.penstock:vfio".into(),
                        serial_number: "PSTEST".into(),
                        model_number: "Penstock test".into(),
                        namespaces_max: 1,
                        passthrough: true,
                        allow_any_host: true,
                        ana_reporting: false,
                        cntlid_range: (1, 10),
                    };
                    let subsystem = target.create_subsystem(&options).expect("made");
                    let namespace = NamespaceOptions { bdev: "ram0".into(), nsid: 1, nguid: [6; 16], uuid: [6; 16], ana_group: 1 };
                    assert_eq!(subsystem.add_namespace(&namespace), Ok(1));
                    SUBSYSTEM.set(Some(subsystem));
                    SUBSYSTEM.with_borrow(|subsystem| {
                        let subsystem = subsystem.as_ref().expect("just put");
                        subsystem.add_listener(&listen, AnaState::Optimized, move |outcome| {
                            assert_eq!(outcome, Ok(()));
                            app_thread()
                                .expect("running")
                                .send(move || {
                                    SUBSYSTEM.with_borrow(|subsystem| {
                                        let start = subsystem.as_ref().expect("made");
                                        start.start(move |outcome| {
                                            assert_eq!(outcome, Ok(()));
                                            serving.store(true, Ordering::SeqCst);
                                        });
                                    });
                                })
                                .expect("running");
                        });
                    });
                });
            },
        );
    director.join().expect("the director saw what it should");
    outcome.expect("started and stopped cleanly");
    assert_eq!(ram.bytes.lock().expect("no panics")[3 * BLOCK..4 * BLOCK], [0x66; BLOCK]);
    assert!(ram.opcodes.lock().expect("no panics").contains(&0x01), "commands came raw");
    std::fs::remove_dir_all(&directory).expect("removed");
}
