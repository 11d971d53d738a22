//! A device in Rust, used through the bdev client of the same process: every answer and every rule of its life.

mod ram;

use ram::{BLOCK, Ram};
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{Bdev, BdevChannel, BdevEvent};
use spdk_rs::dma::DmaBuf;
use spdk_rs::module::{self, DeviceParams, FrontEnd, Registered};
use spdk_rs::thread::{self, Core};
use spdk_rs::{Errno, NvmeStatus};
use std::cell::RefCell;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

thread_local! {
    // The app thread's and the second thread's own, each on its core.
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
    static BDEV: RefCell<Option<Bdev>> = const { RefCell::new(None) };
    static CHANNEL: RefCell<Option<BdevChannel<DmaBuf>>> = const { RefCell::new(None) };
}

fn params(name: &str) -> DeviceParams {
    DeviceParams {
        name: name.into(),
        product: "Penstock test".into(),
        uuid: [3; 16],
        block_count: 64,
        block_size: BLOCK as u32,
        nvme_nsid: 0,
        compare_and_write_blocks: 1,
        front_end: FrontEnd::Other,
    }
}

fn filled(byte: u8) -> DmaBuf {
    let mut buffer = DmaBuf::zeroed(BLOCK).expect("memory");
    buffer.fill(byte);
    buffer
}

struct World {
    ram: Arc<Ram>,
    events: Mutex<Vec<BdevEvent>>,
    finished: AtomicU32,
}

fn with_channel(f: impl FnOnce(&BdevChannel<DmaBuf>)) {
    CHANNEL.with_borrow(|channel| f(channel.as_ref().expect("open")));
}

/// Runs on the second thread: a chain of I/O, one at a time.
fn on_done(world: &Arc<World>, bdev: &Bdev, token: u64, result: Result<(), NvmeStatus>, memory: Option<DmaBuf>) {
    match token {
        1 => {
            assert_eq!(result, Ok(()));
            assert!(thread::reactor_ticks(Core(1)).is_some_and(|ticks| ticks.busy > 0 && ticks.idle > 0));
            assert_eq!(thread::reactor_ticks(Core(9)), None);
            with_channel(|c| c.read(DmaBuf::zeroed(BLOCK).expect("memory"), 5, 1, 2).expect("room"));
        }
        2 => {
            assert_eq!(result, Ok(()));
            assert!(memory.expect("back")[..].iter().all(|b| *b == 0xab));
            let mut forget = filled(0);
            forget[..6].copy_from_slice(b"forget");
            with_channel(|c| c.write(forget, 6, 1, 3).expect("room"));
        }
        3 => {
            assert_eq!(result, Err(NvmeStatus::INTERNAL_DEVICE_ERROR), "an I/O that was dropped fails, and does not hang");
            assert_eq!(world.ram.dropped.load(Ordering::SeqCst), 1);
            with_channel(|c| {
                let refused = c.read(filled(0), 64, 1, 4).expect_err("past the end");
                assert_eq!(refused.errno, Errno::INVAL);
                assert_eq!(c.flush(0, 1, 4), Err(Errno::NOTSUP), "the device takes no flush");
                c.write_zeroes(5, 1, 4).expect("room");
            });
        }
        4 => {
            assert_eq!(result, Ok(()));
            // Grow, while open: on the app thread.
            let (world, bdev) = (world.clone(), bdev.clone());
            let grow = move || {
                REGISTERED.with_borrow(|registered| {
                    let registered = registered.as_ref().expect("registered");
                    world.ram.bytes.lock().expect("no panics").resize(128 * BLOCK, 0);
                    assert_eq!(registered.resize(128), Ok(()));
                    assert_eq!(registered.resize(32), Err(Errno::BUSY));
                });
                assert_eq!(bdev.geometry().block_count, 128);
                thread::ThreadHandle::send(&SECOND.lock().expect("no panics").clone().expect("spawned"), || {
                    with_channel(|c| c.write(filled(1), 100, 1, 5).expect("beyond the old end"));
                })
                .expect("running");
            };
            thread::app_thread().expect("running").send(grow).expect("running");
        }
        5 => {
            assert_eq!(result, Ok(()));
            assert_eq!(world.ram.channels.load(Ordering::SeqCst), 1);
            let world = world.clone();
            // Unregister with the channel still open: it must wait for us.
            let unregister = move || {
                let registered = REGISTERED.take().expect("registered");
                registered.unregister(move |outcome| {
                    assert_eq!(outcome, Ok(()));
                    assert_eq!(world.ram.channels.load(Ordering::SeqCst), 0, "all channels went before the device");
                    let events = world.events.lock().expect("no panics").clone();
                    assert_eq!(events.last(), Some(&BdevEvent::Removed));
                    assert!(events.contains(&BdevEvent::Resized));
                    world.finished.fetch_add(1, Ordering::SeqCst);
                    app::stop(0);
                });
            };
            thread::app_thread().expect("running").send(unregister).expect("running");
        }
        other => panic!("token {other} was never given"),
    }
}

static SECOND: Mutex<Option<thread::ThreadHandle>> = Mutex::new(None);

#[test]
fn device_in_rust_answers_resizes_and_leaves_in_order() {
    let world = Arc::new(World { ram: Ram::new(64, false), events: Mutex::default(), finished: AtomicU32::new(0) });
    let inside = world.clone();
    App::new("spdk_rs_device")
        .no_hugepages()
        .memory_mib(512)
        .no_pci()
        .core_mask("0x3")
        .log(|line| println!("{:?} {}", line.level, line.text))
        .run(move || {
            let world = inside;
            assert_eq!(app::cores(), [Core(0), Core(1)]);
            let registered = module::register(&params("ram0"), world.ram.clone()).expect("registered");
            assert_eq!(module::register(&params("ram0"), world.ram.clone()).map(|_| ()), Err(Errno::EXIST));
            let odd = DeviceParams { block_size: 1000, ..params("odd") };
            assert_eq!(module::register(&odd, world.ram.clone()).map(|_| ()), Err(Errno::INVAL));
            REGISTERED.set(Some(registered));
            assert_eq!(thread::spawn("nowhere", Core(7), || ()).map(|_| ()), Err(Errno::INVAL));

            let second = thread::spawn("second", Core(1), move || {
                assert_eq!(thread::current_core(), Some(Core(1)));
                let events = world.clone();
                let bdev = Bdev::open("ram0", true, move |event| {
                    events.events.lock().expect("no panics").push(event);
                    if event == BdevEvent::Removed {
                        let here = thread::ThreadHandle::current().expect("one of ours");
                        here.send(|| {
                            CHANNEL.take();
                            BDEV.take();
                            thread::exit_current();
                        })
                        .expect("running");
                    }
                })
                .expect("opened");
                assert_eq!(bdev.module_name(), "penstock");
                assert_eq!(bdev.product_name(), "Penstock test");
                let channel = bdev
                    .channel(4, move |done| {
                        let bdev = BDEV.with_borrow(|b| b.clone()).expect("open");
                        on_done(&world, &bdev, done.token, done.result, done.memory);
                    })
                    .expect("channel");
                channel.write(filled(0xab), 5, 1, 1).expect("submitted");
                CHANNEL.set(Some(channel));
                BDEV.set(Some(bdev));
            })
            .expect("core 1 is ours");
            *SECOND.lock().expect("no panics") = Some(second);
        })
        .expect("started and stopped cleanly");
    assert_eq!(world.finished.load(Ordering::SeqCst), 1);
    // Ours, and that of the refused registrations' is gone: SPDK let go of every reference.
    assert_eq!(Arc::strong_count(&world.ram), 1);
}
