//! Interrupt mode: reactors sleep until an event, and our pollers run when woken and only then.

mod ram;

use ram::{BLOCK, Ram};
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{Bdev, BdevChannel, Done};
use spdk_rs::dma::DmaBuf;
use spdk_rs::module::{self, DeviceParams, FrontEnd, Registered};
use spdk_rs::thread::{self, Activity, Core, FdEvent, Poller, Waker, app_thread};
use std::cell::{Cell, RefCell};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

thread_local! {
    static KEEP: RefCell<Vec<Poller>> = const { RefCell::new(Vec::new()) };
    static FD: RefCell<Option<FdEvent>> = const { RefCell::new(None) };
    static IO: RefCell<Option<(Bdev, BdevChannel<DmaBuf>)>> = const { RefCell::new(None) };
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
}

#[derive(Debug, PartialEq)]
enum Seen {
    Ready,
    Turn(u32),
    Bytes(Vec<u8>),
    Timer,
    Io,
}

/// The director leaves while the reactors still turn: what comes after it is nobody's.
fn tell(director: &mpsc::Sender<Seen>, seen: Seen) {
    let _ = director.send(seen);
}

/// Threads' own SPDK objects go before the app does.
fn clean_up() {
    KEEP.take();
    FD.take();
    IO.take();
}

fn on_second_core(turns: Arc<AtomicU32>, wakers: mpsc::Sender<Waker>, seen: mpsc::Sender<Seen>, pipe: UnixStream) {
    let told = seen.clone();
    let (poller, waker) = Poller::event_driven("turns", move || {
        let turn = turns.fetch_add(1, Ordering::SeqCst) + 1;
        tell(&told, Seen::Turn(turn));
        // Every third turn claims to have more.
        if turn.is_multiple_of(3) { Activity::Again } else { Activity::Busy }
    })
    .expect("poller");
    wakers.send(waker).expect("watched");
    let told = seen.clone();
    let fd = pipe.as_raw_fd();
    let event = FdEvent::register("pipe", fd, move || {
        let mut bytes = vec![0; 64];
        let len = (&pipe).read(&mut bytes).expect("readable");
        if len == 0 {
            return Activity::Idle; // the director is done and closed its end
        }
        bytes.truncate(len);
        tell(&told, Seen::Bytes(bytes));
        Activity::Busy
    });
    FD.set(Some(event.expect("interrupt mode")));
    let fired = Rc::new(Cell::new(false));
    let told = seen.clone();
    let timer = Poller::timed("once", 2000, move || {
        if !fired.replace(true) {
            tell(&told, Seen::Timer);
        }
        Activity::Busy
    });
    KEEP.with_borrow_mut(|keep| keep.extend([poller, timer.expect("timer")]));

    let bdev = Bdev::open("ram0", true, |_| ()).expect("opened");
    let told = seen.clone();
    let channel = bdev.channel(1, move |done: Done<DmaBuf>| {
        assert_eq!(done.result, Ok(()));
        tell(&told, Seen::Io);
    });
    let channel = channel.expect("channel");
    channel.write(DmaBuf::zeroed(BLOCK).expect("memory"), 0, 1, 0).expect("room");
    IO.set(Some((bdev, channel)));
    seen.send(Seen::Ready).expect("watched");
}

fn direct(wakers: &mpsc::Receiver<Waker>, seen: &mpsc::Receiver<Seen>, turns: &AtomicU32, mut pipe: UnixStream) {
    let next = || seen.recv_timeout(Duration::from_secs(20)).expect("within 20 s");
    let waker = wakers.recv_timeout(Duration::from_secs(20)).expect("within 20 s");
    let mut first: Vec<Seen> = (0..4).map(|_| next()).collect();
    for what in [Seen::Ready, Seen::Turn(1), Seen::Timer, Seen::Io] {
        let at = first.iter().position(|s| *s == what).unwrap_or_else(|| panic!("{what:?} not in {first:?}"));
        first.remove(at);
    }

    waker.wake();
    assert_eq!(next(), Seen::Turn(2));
    // The third turn says Again, so a fourth comes unasked.
    waker.wake();
    assert_eq!(next(), Seen::Turn(3));
    assert_eq!(next(), Seen::Turn(4));
    pipe.write_all(b"hello").expect("sent");
    assert_eq!(next(), Seen::Bytes(b"hello".to_vec()));
    // Events on the same core went by meanwhile, and a polling reactor would have turned thousands of times.
    assert_eq!(turns.load(Ordering::SeqCst), 4);

    // A wake is never lost, however it races with the turn before it.
    for round in 0..2000u32 {
        let before = turns.load(Ordering::SeqCst);
        waker.wake();
        loop {
            match next() {
                Seen::Turn(turn) if turn > before => break,
                Seen::Turn(_) => (),
                other => panic!("round {round}: {other:?}"),
            }
        }
    }
}

#[test]
fn interrupt_mode_runs_pollers_when_woken_and_only_then() {
    let (seen, watch) = mpsc::channel();
    let (wakers, take) = mpsc::channel();
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let turns = Arc::new(AtomicU32::new(0));
    let ram = Ram::new(16, false);
    let counted = turns.clone();
    let director = std::thread::spawn(move || {
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| direct(&take, &watch, &counted, ours)));
        let failed = outcome.is_err();
        let finish = move || {
            if failed {
                return app::stop(1);
            }
            REGISTERED.take().expect("registered").unregister(|outcome| {
                assert_eq!(outcome, Ok(()));
                app::stop(0);
            });
        };
        let second = SECOND.get().expect("spawned").clone();
        let clean = move || {
            clean_up();
            app_thread().expect("running").send(finish).expect("running");
            thread::exit_current();
        };
        second.send(clean).expect("running");
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    });
    let outcome = App::new("spdk_rs_interrupt")
        .no_hugepages()
        .memory_mib(512)
        .no_pci()
        .core_mask("0x3")
        .interrupt_mode(true)
        .log(|line| println!("{:?} {}", line.level, line.text))
        .run(move || {
            assert!(thread::interrupt_mode());
            let params = DeviceParams {
                name: "ram0".into(),
                product: "Penstock test".into(),
                uuid: [4; 16],
                block_count: 16,
                block_size: BLOCK as u32,
                nvme_nsid: 0,
                compare_and_write_blocks: 1,
                front_end: FrontEnd::Other,
            };
            REGISTERED.set(Some(module::register(&params, ram).expect("registered")));
            let second = thread::spawn("second", Core(1), move || on_second_core(turns, wakers, seen, theirs));
            SECOND.set(second.expect("core 1 is ours")).expect("once");
        });
    director.join().expect("the director saw what it should");
    outcome.expect("started and stopped cleanly");
}

static SECOND: std::sync::OnceLock<thread::ThreadHandle> = std::sync::OnceLock::new();
