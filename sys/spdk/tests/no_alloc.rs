//! The I/O path of the layer allocates nothing: client, device in Rust, pool and poller, counted.

mod ram;

use ram::{BLOCK, Ram};
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{Bdev, BdevChannel};
use spdk_rs::dma::{DmaPool, PoolBuf};
use spdk_rs::module::{self, DeviceParams, FrontEnd, Registered};
use spdk_rs::thread::{Activity, Poller, Waker, app_thread};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static IO: RefCell<Option<(Bdev, BdevChannel<PoolBuf>)>> = const { RefCell::new(None) };
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
    static POLLER: RefCell<Option<(Poller, Waker)>> = const { RefCell::new(None) };
}

struct Counting;
// SAFETY: hands everything on to the system's allocator; the counter allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const WARM_UP: u64 = 64;
const COUNTED: u64 = 2000;

/// Writes and reads in turn; the second and later rounds find every list at its size.
fn submit(pool: &DmaPool, round: u64) {
    IO.with_borrow(|io| {
        let (_, channel) = io.as_ref().expect("open");
        let buffer = pool.take().expect("the last one came back");
        let outcome = if round.is_multiple_of(2) { channel.write(buffer, 3, 1, round) } else { channel.read(buffer, 3, 1, round) };
        outcome.expect("room");
    });
}

fn finish() {
    IO.take();
    POLLER.take();
    REGISTERED.take().expect("registered").unregister(|outcome| {
        assert_eq!(outcome, Ok(()));
        app::stop(0);
    });
}

#[test]
fn io_path_after_warm_up_allocates_nothing() {
    let allocations = Arc::new(AtomicU64::new(u64::MAX));
    let counted = allocations.clone();
    let app = App::new("spdk_rs_no_alloc").no_hugepages().memory_mib(512).no_pci();
    let outcome = app.run(move || {
        let params = DeviceParams {
            name: "ram0".into(),
            product: "Penstock test".into(),
            uuid: [2; 16],
            block_count: 16,
            block_size: BLOCK as u32,
            nvme_nsid: 0,
            compare_and_write_blocks: 1,
            front_end: FrontEnd::Other,
        };
        REGISTERED.set(Some(module::register(&params, Ram::new(16, false)).expect("registered")));
        let bdev = Bdev::open("ram0", true, |_| ()).expect("opened");
        let pool = DmaPool::new(1, BLOCK).expect("pool");
        let again = pool.clone();
        let completed = Rc::new(Cell::new(0u64));
        let seen = completed.clone();
        let channel = bdev
            .channel(1, move |done| {
                assert_eq!(done.result, Ok(()));
                drop(done.memory);
                completed.set(done.token + 1);
            })
            .expect("channel");
        IO.set(Some((bdev, channel)));

        // The poller keeps one I/O going, as a core's loop does.
        let started = Cell::new(0u64);
        let before = Cell::new(0u64);
        let poller = Poller::event_driven("loop", move || {
            if seen.get() < started.get() {
                return Activity::Idle;
            }
            if started.get() == WARM_UP {
                before.set(ALLOCATIONS.get());
            }
            if started.get() == WARM_UP + COUNTED {
                counted.store(ALLOCATIONS.get() - before.get(), Ordering::SeqCst);
                app_thread().expect("running").send(finish).expect("running");
            } else if started.get() < WARM_UP + COUNTED {
                submit(&again, started.get());
                POLLER.with_borrow(|poller| poller.as_ref().expect("registered").1.wake());
            }
            started.set(started.get() + 1);
            Activity::Busy
        });
        POLLER.set(Some(poller.expect("poller")));
    });
    outcome.expect("started and stopped cleanly");
    assert_eq!(allocations.load(Ordering::SeqCst), 0, "allocations in {COUNTED} I/Os");
}
