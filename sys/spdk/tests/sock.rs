//! Two ends of a connection on one core: bytes in order, memory back, ends seen. And one that nobody answers.

use spdk_rs::Errno;
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{IoMemory, Ranges};
use spdk_rs::dma::DmaBuf;
use spdk_rs::sock::{Connection, Listener, SockEvent, SockGroup};
use spdk_rs::thread::{Activity, Poller};
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const WRITES: u64 = 64;
const LEN: usize = 16 * 1024;
const DEPTH: usize = 8;

fn byte_at(position: usize) -> u8 {
    (position % 253) as u8
}

fn piece(index: u64) -> DmaBuf {
    let mut buffer = DmaBuf::zeroed(LEN).expect("memory");
    for (at, byte) in buffer.iter_mut().enumerate() {
        *byte = byte_at(index as usize * LEN + at);
    }
    buffer
}

#[derive(Default)]
struct World {
    client: RefCell<Option<Connection<DmaBuf>>>,
    server: RefCell<Option<Connection<DmaBuf>>>,
    refused: RefCell<Option<Connection<DmaBuf>>>,
    connected: Cell<bool>,
    refusal: Cell<Option<Errno>>,
    written: Cell<u64>,
    next: Cell<u64>,
    received: Cell<usize>,
    aborted: Cell<u64>,
    ended: Cell<bool>,
    poller: RefCell<Option<Poller>>,
}

fn on_client(world: &World, event: SockEvent<DmaBuf>) {
    match event {
        SockEvent::Connected(outcome) => {
            assert_eq!(outcome, Ok(()));
            world.connected.set(true);
        }
        SockEvent::Written { token, result: Ok(()), memory } => {
            assert_eq!(token, world.written.get(), "writes are done in order");
            assert_eq!(memory[..], piece(token)[..]);
            world.written.set(token + 1);
        }
        SockEvent::Written { memory, .. } => {
            assert_eq!(memory.len(), LEN, "memory comes back from a write that failed, too");
            world.aborted.set(world.aborted.get() + 1);
        }
        SockEvent::Readable => (),
    }
}

fn on_server(world: &World, event: SockEvent<DmaBuf>) {
    let SockEvent::Readable = event else { panic!("{event:?}") };
    let mut bytes = [0; 5000];
    loop {
        let server = world.server.borrow();
        let Some(server) = server.as_ref() else { return };
        match server.read(&mut bytes) {
            Ok(0) => return world.ended.set(true),
            Ok(len) => {
                let start = world.received.get();
                assert!(bytes[..len].iter().enumerate().all(|(at, byte)| *byte == byte_at(start + at)));
                world.received.set(start + len);
            }
            Err(Errno::AGAIN) => return,
            Err(errno) => panic!("{errno}"),
        }
    }
}

/// Nothing to send.
struct Nothing;
// SAFETY: no ranges.
unsafe impl IoMemory for Nothing {
    fn ranges(&self, _out: &mut Ranges<'_>) {}
}

fn turn(world: &World, deadline: Instant, finished: &AtomicU32) {
    assert!(Instant::now() < deadline, "not done within 30 s: {} bytes received", world.received.get());
    if world.connected.get() && world.next.get() < WRITES {
        let client = world.client.borrow();
        let client = client.as_ref().expect("open");
        assert!(client.is_connected());
        while world.next.get() < WRITES {
            match client.write(piece(world.next.get()), world.next.get()) {
                Ok(()) => world.next.set(world.next.get() + 1),
                Err(refused) => {
                    assert_eq!((refused.errno, refused.memory.len()), (Errno::AGAIN, LEN));
                    assert_eq!(client.queued(), DEPTH);
                    break;
                }
            }
        }
    }
    if world.written.get() == WRITES && world.received.get() == WRITES as usize * LEN && !world.ended.get() {
        if world.aborted.get() == 0 {
            // Three more that never leave: the connection goes at once, and they come back.
            let client = world.client.take();
            let client_ref = client.as_ref().expect("open");
            for _ in 0..3 {
                client_ref.write(piece(0), 0).expect("room");
            }
            drop(client);
            assert_eq!(world.aborted.get(), 3);
        }
        return;
    }
    if world.ended.get() && world.refusal.get().is_some() {
        world.server.take();
        world.refused.take();
        finished.store(1, Ordering::SeqCst);
        world.poller.take();
        app::stop(0);
    }
}

#[test]
fn connection_carries_bytes_in_order_and_gives_all_memory_back() {
    let finished = Arc::new(AtomicU32::new(0));
    let done = finished.clone();
    // Nobody listens there once this is dropped.
    let closed_port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let outcome =
        App::new("spdk_rs_sock").no_hugepages().memory_mib(512).no_pci().log(|line| println!("{:?} {}", line.level, line.text)).run(
            move || {
                let world = Rc::new(World::default());
                let group = SockGroup::new().expect("group");
                let listener = Listener::bind(([127, 0, 0, 1], 0).into()).expect("listening");
                let port = listener.port().expect("known");
                assert_ne!(port, 0);

                let events = world.clone();
                let client =
                    Connection::connect(&group, ([127, 0, 0, 1], port).into(), 5000, DEPTH, move |event| on_client(&events, event));
                *world.client.borrow_mut() = Some(client.expect("started"));
                let events = world.clone();
                let refused = Connection::connect(&group, closed_port, 5000, 1, move |event| match event {
                    SockEvent::Connected(outcome) => events.refusal.set(outcome.err()),
                    other => panic!("{other:?}"),
                });
                match refused {
                    Ok(connection) => *world.refused.borrow_mut() = Some(connection),
                    Err(errno) => world.refusal.set(Some(errno)),
                }
                // There is no route to a broadcast address: refused at once, and what the closure holds is let go of once.
                let held = Rc::new(());
                let inside = held.clone();
                let nowhere = Connection::<DmaBuf>::connect(&group, ([255, 255, 255, 255], 1).into(), 5000, 1, move |_| {
                    assert!(Rc::strong_count(&inside) > 1);
                });
                assert!(nowhere.is_err());
                assert_eq!(Rc::strong_count(&held), 1);
                let nothing = Connection::<Nothing>::connect(&group, ([127, 0, 0, 1], port).into(), 5000, 1, |_| ()).expect("started");
                assert_eq!(nothing.write(Nothing, 0).expect_err("no ranges").errno, Errno::INVAL);
                drop(nothing);

                let deadline = Instant::now() + Duration::from_secs(30);
                let inside = world.clone();
                let poller = Poller::busy("sock", move || {
                    if inside.server.borrow().is_none() && !inside.ended.get() {
                        let events = inside.clone();
                        let accepted = listener.accept(&group, 1, move |event| on_server(&events, event)).expect("accepts");
                        *inside.server.borrow_mut() = accepted;
                    }
                    group.poll().expect("polled");
                    turn(&inside, deadline, &done);
                    Activity::Busy
                });
                *world.poller.borrow_mut() = Some(poller.expect("poller"));
            },
        );
    outcome.expect("started and stopped cleanly");
    assert_eq!(finished.load(Ordering::SeqCst), 1);
}
