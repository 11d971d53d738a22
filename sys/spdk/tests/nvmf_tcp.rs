//! A passthrough subsystem on a device in Rust over NVMe/TCP on loopback, with SPDK's own initiator in the same process, driven
//! over JSON-RPC: raw commands, identity, Identify data, ANA, and an orderly end.

mod ram;

use ram::{BLOCK, Ram};
use serde::{Deserialize, Serialize};
use spdk_rs::app::{self, App};
use spdk_rs::bdev::{Bdev, BdevChannel, NvmeQueue};
use spdk_rs::dma::DmaBuf;
use spdk_rs::module::{self, DeviceParams, FrontEnd, Registered};
use spdk_rs::nvmf::{
    AnaState, IDENTIFY_DLFEAT, IDENTIFY_VWC, Identify, Listen, NamespaceOptions, Subsystem, SubsystemOptions, Target, Transport,
    TransportOptions,
};
use spdk_rs::rpc::{self, Reply, RpcError};
use spdk_rs::vhost::ControllerOptions;
use spdk_rs::{Errno, NvmeStatus};
use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

const NQN: &str = "nqn.2026-11.test.penstock:ram";
const NGUID: [u8; 16] = *b"penstock-nguid-1";
static IDENTIFIED: AtomicU32 = AtomicU32::new(0);

thread_local! {
    static REGISTERED: RefCell<Option<Registered>> = const { RefCell::new(None) };
    static SUBSYSTEM: RefCell<Option<Rc<Subsystem>>> = const { RefCell::new(None) };
    static INITIATOR: RefCell<Option<(Bdev, BdevChannel<DmaBuf>)>> = const { RefCell::new(None) };
    static WAITING: RefCell<Option<Reply<IoOutcome>>> = const { RefCell::new(None) };
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct IoRequest {
    kind: String,
    block: u64,
    byte: u8,
}

#[derive(Serialize)]
struct IoOutcome {
    sct: u8,
    sc: u8,
    first: u8,
    /// Identify data's byte that matters, where asked for.
    vwc: u8,
    dlfeat: u8,
}

fn on_io(request: IoRequest, reply: Reply<IoOutcome>) {
    if INITIATOR.with_borrow(Option::is_none) {
        let bdev = Bdev::open("hostn1", true, |_| ()).expect("attached");
        assert_eq!(bdev.geometry().block_size, BLOCK as u32);
        let channel = bdev
            .channel(4, |done| {
                let status = done.result.err().unwrap_or(NvmeStatus::OK);
                let memory: Option<DmaBuf> = done.memory;
                let byte = |at: usize| memory.as_ref().map_or(0, |m| m[at]);
                let outcome =
                    IoOutcome { sct: status.sct, sc: status.sc, first: byte(0), vwc: byte(IDENTIFY_VWC), dlfeat: byte(IDENTIFY_DLFEAT) };
                WAITING.take().expect("one at a time").ok(outcome);
            })
            .expect("channel");
        INITIATOR.set(Some((bdev, channel)));
    }
    INITIATOR.with_borrow(|initiator| {
        let (_, channel) = initiator.as_ref().expect("open");
        let mut buffer = DmaBuf::zeroed(BLOCK).expect("memory");
        buffer.fill(request.byte);
        let mut command = [0u8; 64];
        let hosts = SUBSYSTEM.with_borrow(|s| s.as_ref().expect("made").hosts());
        let submitted = match request.kind.as_str() {
            "read" => channel.read(buffer, request.block, 1, 0).map_err(|r| r.errno),
            "write" => channel.write(buffer, request.block, 1, 0).map_err(|r| r.errno),
            "identify_controller" | "identify_namespace" => {
                command[0] = 0x06;
                command[40] = u8::from(request.kind == "identify_controller");
                if command[40] == 0 {
                    command[4] = 1;
                }
                channel.nvme(NvmeQueue::Admin, &command, Some(buffer), 0).map_err(|r| r.errno)
            }
            "reservation_report" => {
                command[0] = 0x0e;
                command[40] = 15; // dwords, from 0
                channel.nvme(NvmeQueue::Io, &command, Some(buffer), 0).map_err(|r| r.errno)
            }
            other => return reply.err(RpcError::invalid_params(format!("no such kind: {other}")).with_data(hosts.into())),
        };
        match submitted {
            Ok(()) => WAITING.set(Some(reply)),
            Err(errno) => reply.err(errno.into()),
        }
    });
}

/// Pause, change, resume: how ANA changes while hosts write.
fn on_ana((optimized, port): (bool, u16), reply: Reply<()>) {
    let subsystem = SUBSYSTEM.with_borrow(|s| s.clone()).expect("made");
    let state = if optimized { AnaState::Optimized } else { AnaState::Inaccessible };
    let (set, resume) = (subsystem.clone(), subsystem.clone());
    subsystem.pause(move |outcome| {
        assert_eq!(outcome, Ok(()));
        set.set_ana_state(&listen(port), state, 0, move |outcome| {
            assert_eq!(outcome, Ok(()));
            resume.resume(move |outcome| reply.send(outcome.map_err(RpcError::from)));
        });
    });
}

fn on_finish(_: (), reply: Reply<()>) {
    INITIATOR.take();
    let subsystem = SUBSYSTEM.take().expect("made");
    let keep = subsystem.clone();
    subsystem.stop(move |outcome| {
        assert_eq!(outcome, Ok(()));
        let Ok(subsystem) = Rc::try_unwrap(keep) else { panic!("nobody else holds it") };
        subsystem.destroy(|outcome| {
            assert_eq!(outcome, Ok(()));
            REGISTERED.take().expect("registered").unregister(|outcome| {
                assert_eq!(outcome, Ok(()));
                reply.ok(());
                app::stop(0);
            });
        });
    });
}

fn listen(port: u16) -> Listen {
    Listen::Tcp { address: [127, 0, 0, 1].into(), port }
}

/// One request over SPDK's socket; the answer's result or error.
fn call(socket: &Path, method: &str, params: serde_json::Value) -> Result<serde_json::Value, serde_json::Value> {
    let mut stream = UnixStream::connect(socket).expect("the server listens");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("set");
    let request = serde_json::json!({ "jsonrpc": "2.0", "id": 1, "method": method, "params": params });
    stream.write_all(request.to_string().as_bytes()).expect("sent");
    let mut text = Vec::new();
    loop {
        let mut part = [0; 4096];
        let len = stream.read(&mut part).expect("an answer within 20 s");
        assert!(len > 0, "closed without an answer");
        text.extend_from_slice(&part[..len]);
        if let Ok(answer) = serde_json::from_slice::<serde_json::Value>(&text) {
            return if answer["error"].is_null() { Ok(answer["result"].clone()) } else { Err(answer["error"].clone()) };
        }
    }
}

fn io(socket: &Path, kind: &str, block: u64, byte: u8) -> serde_json::Value {
    call(socket, "test_io", serde_json::json!({ "kind": kind, "block": block, "byte": byte })).expect("answered")
}

fn drive(socket: &Path, port: u16, ram: &Ram) {
    let attach = serde_json::json!({
        "name": "host", "trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1",
        "trsvcid": port.to_string(), "subnqn": NQN, "hostnqn": "nqn.2026-11.test.penstock:host"
    });
    assert_eq!(call(socket, "bdev_nvme_attach_controller", attach).expect("attached"), serde_json::json!(["hostn1"]));
    assert!(IDENTIFIED.load(Ordering::SeqCst) >= 2, "controller and namespace were identified through the hook");

    assert_eq!(io(socket, "write", 7, 0x5a)["sc"], 0);
    assert_eq!(io(socket, "read", 7, 0)["first"], 0x5a);
    assert_eq!(ram.bytes.lock().expect("no panics")[7 * BLOCK], 0x5a);
    let controller = io(socket, "identify_controller", 0, 0xff);
    assert_eq!(controller["vwc"].as_u64().expect("a byte") & 1, 0, "no volatile write cache is claimed: {controller}");
    assert_eq!(io(socket, "identify_namespace", 0, 0xff)["dlfeat"], 1);
    // Reservations come raw: this device knows none and says so itself.
    let report = io(socket, "reservation_report", 0, 0);
    assert_eq!((report["sct"].as_u64(), report["sc"].as_u64()), (Some(0), Some(1)));
    let opcodes = ram.opcodes.lock().expect("no panics").clone();
    assert!(opcodes.contains(&0x01) && opcodes.contains(&0x02) && opcodes.contains(&0x0e), "{opcodes:02x?}");
    let reports = opcodes.iter().filter(|opcode| **opcode == 0x0e).count();
    assert_eq!(reports, 1, "told not to retry, the initiator does not");
    assert!(ram.hosts.lock().expect("no panics").iter().all(|host| host == "nqn.2026-11.test.penstock:host"));

    let typo = call(socket, "test_io", serde_json::json!({ "kind": "read" })).expect_err("fields are missing");
    assert_eq!(typo["code"], RpcError::INVALID_PARAMS);
    let unknown = call(socket, "test_io", serde_json::json!({ "kind": "fly", "block": 0, "byte": 0 })).expect_err("no such kind");
    assert!(unknown["message"].as_str().is_some_and(|m| m.contains("fly")), "{unknown}");
    assert_eq!(unknown["data"], serde_json::json!(["nqn.2026-11.test.penstock:host"]), "error data arrive: {unknown}");
    let silent = call(socket, "test_silent", serde_json::Value::Null).expect_err("it drops its reply");
    assert_eq!(silent["code"], RpcError::INTERNAL);

    call(socket, "test_ana", serde_json::json!([false, port])).expect("inaccessible");
    call(socket, "test_ana", serde_json::json!([true, port])).expect("optimized again");
    assert_eq!(io(socket, "read", 7, 0)["first"], 0x5a);

    // The initiator's bdev is open in this process: finishing lets go of it, then the controller goes.
    call(socket, "test_finish", serde_json::Value::Null).expect("finished");
}

/// Ends the app when the thread that drives it fails, or the test would hang instead of failing.
struct StopOnPanic;

impl Drop for StopOnPanic {
    fn drop(&mut self) {
        if std::thread::panicking() {
            app::stop(1);
        }
    }
}

#[test]
fn passthrough_subsystem_on_a_rust_device_serves_tcp_with_identity_and_honest_identify() {
    let dir = std::env::temp_dir().join(format!("spdk-rs-nvmf-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a directory");
    let socket = dir.join("rpc.sock");
    // Taken and given back: nobody else on this machine hurries to take it.
    let port = std::net::TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port").port();
    let ram = Ram::new(64, true);
    let (ready, when_ready) = mpsc::channel::<()>();
    let (client_ram, client_socket) = (ram.clone(), socket.clone());
    let client = std::thread::spawn(move || {
        let _stop = StopOnPanic;
        when_ready.recv_timeout(Duration::from_secs(30)).expect("served within 30 s");
        drive(&client_socket, port, &client_ram);
    });
    let device = ram.clone();
    rpc::register("test_io", on_io).expect("registered");
    rpc::register("test_ana", on_ana).expect("registered");
    rpc::register("test_finish", on_finish).expect("registered");
    rpc::register("test_silent", |(): (), _reply: Reply<()>| ()).expect("registered");
    let outcome = App::new("spdk_rs_nvmf")
        .no_hugepages()
        .memory_mib(512)
        .no_pci()
        .rpc_socket(&socket)
        .log(|line| println!("{:?} {}", line.level, line.text))
        .run(move || {
            spdk_rs::nvmf::set_identify_hook(|mut identify| {
                spdk_rs::nvmf::honest_identify(&mut identify);
                IDENTIFIED.fetch_add(1, Ordering::SeqCst);
                if let Identify::Controller { association, .. } = identify {
                    assert!((10..=20).contains(&association.cntlid) && association.queue == 0);
                    assert_eq!(association.subsystem_nqn, NQN);
                }
            })
            .expect("the first hook");
            let params = DeviceParams {
                name: "ram0".into(),
                product: "Penstock test".into(),
                uuid: [9; 16],
                block_count: 64,
                block_size: BLOCK as u32,
                nvme_nsid: 1,
                compare_and_write_blocks: 1,
                front_end: FrontEnd::NvmfNetwork,
            };
            REGISTERED.set(Some(module::register(&params, device).expect("registered")));
            let foreign = ControllerOptions { name: "vm0".into(), bdev: "ram0".into(), core_mask: None, readonly: false };
            for opened in [Bdev::open("ram0", true, |_| ()).map(|_| ()), spdk_rs::vhost::create(&foreign)] {
                assert_eq!(opened, Err(Errno::new(1)), "a device for NVMe-oF opens for nobody else (EPERM)");
            }
            let target = Target::get().expect("nvmf_tgt");
            let options = TransportOptions { mask_copy: true, shared_buffers: 128, ..TransportOptions::default() };
            target.add_transport(Transport::Tcp, &options, move |outcome| {
                assert_eq!(outcome, Ok(()));
                target.add_transport(Transport::Tcp, &TransportOptions::default(), |outcome| {
                    assert_eq!(outcome, Err(Errno::EXIST));
                });
                target.listen(&listen(port)).expect("listening");
                let options = SubsystemOptions {
                    nqn: NQN.into(),
                    serial_number: "PSTEST".into(),
                    model_number: "Penstock test".into(),
                    namespaces_max: 1,
                    passthrough: true,
                    allow_any_host: true,
                    ana_reporting: true,
                    cntlid_range: (10, 20),
                };
                let subsystem = Rc::new(target.create_subsystem(&options).expect("made"));
                assert_eq!(target.create_subsystem(&options).map(|_| ()), Err(Errno::EXIST));
                let mut namespace = NamespaceOptions { bdev: "nosuch".into(), nsid: 1, nguid: NGUID, uuid: [9; 16], ana_group: 1 };
                assert_eq!(subsystem.add_namespace(&namespace), Err(Errno::INVAL));
                namespace.bdev = "ram0".into();
                assert_eq!(subsystem.add_namespace(&namespace), Ok(1));
                SUBSYSTEM.set(Some(subsystem.clone()));
                let start = subsystem.clone();
                subsystem.add_listener(&listen(port), AnaState::Optimized, move |outcome| {
                    assert_eq!(outcome, Ok(()));
                    start.start(move |outcome| {
                        assert_eq!(outcome, Ok(()));
                        ready.send(()).expect("the client waits");
                    });
                });
            });
        });
    client.join().expect("the client saw what it should");
    outcome.expect("started and stopped cleanly");
    std::fs::remove_dir_all(&dir).expect("removed");
}
