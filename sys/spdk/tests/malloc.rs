//! An app without hugepages, a malloc device, and what the bdev client promises. SPDK runs once per process, so one test.

use spdk_rs::Errno;
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{self, Bdev, BdevChannel, Done};
use spdk_rs::dma::{DmaBuf, DmaPool};
use spdk_rs::thread::{Activity, Poller, ThreadHandle, app_thread};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

const BLOCKS: u64 = 256;

struct Steps {
    channel: RefCell<Option<BdevChannel<DmaBuf>>>,
    bdev: RefCell<Option<Bdev>>,
    seen: Arc<AtomicU32>,
    timer: RefCell<Option<Poller>>,
}

fn pattern() -> DmaBuf {
    let mut buffer = DmaBuf::zeroed(8192).expect("memory");
    for (at, byte) in buffer.iter_mut().enumerate() {
        *byte = (at % 251) as u8;
    }
    buffer
}

fn on_done(steps: &Rc<Steps>, done: Done<DmaBuf>) {
    assert_eq!(done.result, Ok(()), "token {}", done.token);
    let channel = steps.channel.borrow();
    let channel = channel.as_ref().expect("open until the last step");
    match done.token {
        1 => {
            assert_eq!(channel.in_flight(), 0, "the slot is free again before the completion is told");
            let buffer = done.memory.expect("a write gives its memory back");
            assert_eq!(buffer[..], pattern()[..]);
            let refused = channel.read(buffer, 3, 3, 9).expect_err("two blocks of memory for three blocks");
            assert_eq!(refused.errno, Errno::INVAL);
            channel.read(DmaBuf::zeroed(8192).expect("memory"), 3, 2, 2).expect("room");
        }
        2 => {
            assert_eq!(done.memory.expect("read memory")[..], pattern()[..]);
            channel.unmap(3, 1, 3).expect("malloc unmaps");
        }
        3 => channel.read(DmaBuf::zeroed(8192).expect("memory"), 3, 2, 4).expect("room"),
        4 => {
            let buffer = done.memory.expect("read memory");
            assert!(buffer[..4096].iter().all(|byte| *byte == 0));
            assert_eq!(buffer[4096..], pattern()[4096..]);
            channel.flush(0, BLOCKS, 5).expect("malloc flushes");
        }
        5 => {
            assert_eq!(channel.submitted(), 5);
            steps.seen.store(5, Ordering::SeqCst);
            // The channel cannot be dropped under our own borrow; a message comes after this completion.
            let steps = Parcel(steps.clone());
            app_thread().expect("running").send(move || finish(steps)).expect("running");
        }
        other => panic!("token {other} was never given"),
    }
}

/// Moves an Rc from the app thread to the app thread.
struct Parcel(Rc<Steps>);
// SAFETY: sent by the app thread to itself.
unsafe impl Send for Parcel {}

fn finish(Parcel(steps): Parcel) {
    steps.channel.take();
    steps.bdev.take();
    let ticks = Rc::new(Cell::new(0));
    let again = steps.clone();
    let timer = Poller::timed("three_ticks", 1000, move || {
        ticks.set(ticks.get() + 1);
        if ticks.get() == 3 {
            // From inside its own closure.
            again.timer.take();
            bdev::delete_malloc("m0", |outcome| {
                assert_eq!(outcome, Ok(()));
                app::stop(0);
            });
        }
        Activity::Busy
    });
    *steps.timer.borrow_mut() = Some(timer.expect("on an SPDK thread"));
}

#[test]
fn malloc_device_written_read_back_and_unmapped_over_the_client() {
    let seen = Arc::new(AtomicU32::new(0));
    let seen_inside = seen.clone();
    let lines = Arc::new(AtomicU32::new(0));
    let lines_inside = lines.clone();
    // By default on ordinary memory, which every machine has; with the variable set, on hugepages that are reserved and mounted.
    let app = App::new("spdk_rs_malloc").memory_mib(512).no_pci();
    let app = if std::env::var_os("PENSTOCK_TEST_HUGEPAGES").is_some() { app } else { app.no_hugepages() };
    let outcome = app
        .log(move |line| {
            lines_inside.fetch_add(1, Ordering::SeqCst);
            println!("{:?} {}", line.level, line.text);
        })
        .run(move || {
            assert!(app_thread().is_some_and(|thread| thread.is_current()));
            assert_eq!(app::cores().len(), 1);
            assert!(app::ticks_hz() > 0);

            bdev::create_malloc("m0", [7; 16], BLOCKS, 4096).expect("created");
            assert_eq!(bdev::create_malloc("m0", [8; 16], BLOCKS, 4096), Err(Errno::EXIST));
            assert_eq!(Bdev::open("nosuch", true, |_| ()).map(|_| ()), Err(Errno::NODEV));
            assert_eq!(bdev::names(), ["m0"]);
            let device = Bdev::open("m0", true, |_| ()).expect("opened");
            let geometry = device.geometry();
            assert_eq!((geometry.block_count, geometry.block_size, geometry.uuid), (BLOCKS, 4096, [7; 16]));
            assert!(geometry.can_flush && geometry.can_unmap && geometry.can_write_zeroes && !geometry.can_nvme_admin);

            let pool = DmaPool::new(2, 8192).expect("pool");
            let (a, b) = (pool.take().expect("first"), pool.take().expect("second"));
            assert!(pool.take().is_none(), "a pool of two has no third");
            let shared = a.share();
            let part = shared.slice(4096..8192);
            drop(shared);
            assert_eq!(pool.free_count(), 0, "a part still holds the slab");
            assert!(part.try_unshare().is_ok(), "the last holder may write again");
            drop(b);
            assert_eq!(pool.free_count(), 2);

            let steps =
                Rc::new(Steps { channel: RefCell::default(), bdev: RefCell::default(), seen: seen_inside, timer: RefCell::default() });
            let completions = steps.clone();
            let channel = device.channel(1, move |done| on_done(&completions, done)).expect("channel");
            channel.write(pattern(), 3, 2, 1).expect("submitted");
            let refused = channel.write(pattern(), 3, 2, 2).expect_err("the only slot is taken");
            assert!(refused.is_transient() && refused.memory.is_some());
            *steps.channel.borrow_mut() = Some(channel);
            *steps.bdev.borrow_mut() = Some(device);
            assert!(ThreadHandle::current().is_some());
        });
    outcome.expect("started and stopped cleanly");
    assert_eq!(seen.load(Ordering::SeqCst), 5);
    assert!(lines.load(Ordering::SeqCst) > 0, "SPDK's log came through the hook");
    assert!(app_thread().expect("was there").send(|| ()).is_err(), "a stopped app takes no messages");
}
