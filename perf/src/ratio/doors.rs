//! Benchmark 7: IOPS through each front door, beside the stock SPDK target serving the same kind of device the same way.
//!
//! The target, ours or stock, runs on core 0; the load on core 1, through SPDK's own initiators. The target whose turn it
//! is not is stopped.

use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;

use serde_json::{Value, json};

use super::agents::{Agent, AgentOptions};
use super::arms::{AgentArm, Metric, SharedAgent, SharedProcess, Upkeep};
use super::process::ArmProcess;
use super::{Bench, Control, Gate, Question, RatioError, TURN, TURN_WARMUP};
use crate::agent::{LaneAsk, TurnAsk};
use crate::rpc::RpcClient;
use crate::target::{Reconnect, Target, bdev_name};
use crate::units::{ByteCount, ByteOffset, Nanos};
use crate::volume::{self, DriveAsk, Node};
use crate::workload::{Access, Mix, Workload};

const TARGET_CORE: &str = "0x1";
const LOAD_CORE: u32 = 1;
/// Memory of the load's process.
const LOAD_MIB: u32 = 768;
const MIB: u64 = 1 << 20;
const BLOCK: u64 = 4096;
const DEVICE_BYTES: u64 = 960 * MIB;
/// Three times the volume, so that overwrites are absorbed in the log: what is compared is doors, not drains.
const OPLOG_BYTES: u64 = 384 * MIB;
const VOLUME_BYTES: u64 = 128 * MIB;
/// Three times the oplog.
const LEAST_BYTES: u64 = 3 * OPLOG_BYTES;
const NQN: &str = "nqn.2026-11.io.penstock:bench:";

#[derive(Clone, Copy, PartialEq, Eq)]
enum Route {
    Tcp,
    VfioUser,
    Vhost,
}

impl Route {
    const ALL: [Self; 3] = [Self::Tcp, Self::VfioUser, Self::Vhost];

    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "NVMe/TCP",
            Self::VfioUser => "vfio-user",
            Self::Vhost => "vhost-user-blk",
        }
    }

    /// Seconds of a turn. Writes are void that do not come to [`LEAST_BYTES`], and over TCP those take more than one.
    fn seconds(self, mix: Mix) -> u64 {
        match (self, mix == Mix::WRITE) {
            (_, false) => 1,
            (Self::Tcp, true) => 3,
            (_, true) => 2,
        }
    }

    fn gate(self) -> Gate {
        match self {
            Self::Tcp => Gate::at_least(0.9, 0.97),
            Self::VfioUser => Gate::at_least(0.8, 0.90),
            Self::Vhost => Gate::at_least(0.8, 0.92),
        }
    }
}

/// A target process with its control connection, and how it is reached on each route.
struct TargetProcess {
    process: SharedProcess,
    rpc: RpcClient,
    socket: PathBuf,
}

fn call(rpc: &mut RpcClient, method: &str, params: &Value) -> Result<Value, RatioError> {
    Ok(rpc.call(method, params, std::time::Duration::from_secs(60))?)
}

fn stock(bench: &Bench<'_>) -> Result<TargetProcess, RatioError> {
    let socket = bench.lab.path("stock.sock");
    let directory = bench.lab.subdirectory("stock")?;
    let mut arguments = vec![
        "-m".to_owned(),
        TARGET_CORE.to_owned(),
        "--disable-cpumask-locks".to_owned(),
        "-s".to_owned(),
        "2048".to_owned(),
        "-r".to_owned(),
        socket.display().to_string(),
        "-S".to_owned(),
        directory.display().to_string(),
    ];
    if !bench.options.hugepages {
        arguments.push("--no-huge".to_owned());
    }
    let program = bench.lab.peer("build/bin/spdk_tgt")?;
    let mut process = ArmProcess::start(&program, &arguments, &bench.lab.path("stock.log"))?;
    let mut rpc = process.rpc(&socket)?;
    for name in ["Tcp", "VfioUser", "Vhost"] {
        call(&mut rpc, "bdev_malloc_create", &json!({"name": name, "num_blocks": VOLUME_BYTES / BLOCK, "block_size": BLOCK}))?;
    }
    // The transport as our own target sets it up, so that the arms differ in the device and what serves it alone.
    call(&mut rpc, "nvmf_create_transport", &json!({"trtype": "TCP", "in_capsule_data_size": 8192}))?;
    call(&mut rpc, "nvmf_create_transport", &json!({"trtype": "VFIOUSER"}))?;
    Ok(TargetProcess { process: Rc::new(process), rpc, socket })
}

fn stock_door(bench: &Bench<'_>, target: &mut TargetProcess, route: Route, port: u16) -> Result<Target, RatioError> {
    let rpc = &mut target.rpc;
    let nqn = format!("{NQN}{port}");
    let subsystem = |rpc: &mut RpcClient, bdev: &str, listen: Value| -> Result<(), RatioError> {
        call(rpc, "nvmf_create_subsystem", &json!({"nqn": nqn, "allow_any_host": true, "serial_number": "BENCH"}))?;
        call(rpc, "nvmf_subsystem_add_ns", &json!({"nqn": nqn, "namespace": {"bdev_name": bdev}}))?;
        call(rpc, "nvmf_subsystem_add_listener", &json!({"nqn": nqn, "listen_address": listen}))?;
        Ok(())
    };
    match route {
        Route::Tcp => {
            let listen = json!({"trtype": "TCP", "adrfam": "IPv4", "traddr": "127.0.0.1", "trsvcid": port.to_string()});
            subsystem(rpc, "Tcp", listen)?;
            Ok(Target::NvmfTcp { address: "127.0.0.1".to_owned(), port, nqn })
        }
        Route::VfioUser => {
            let directory = bench.lab.subdirectory("stock/vfio")?;
            subsystem(rpc, "VfioUser", json!({"trtype": "VFIOUSER", "traddr": directory, "trsvcid": "0"}))?;
            Ok(Target::VfioUser { directory })
        }
        Route::Vhost => {
            let params = json!({"ctrlr": "v0", "dev_name": "Vhost", "cpumask": TARGET_CORE});
            call(rpc, "vhost_create_blk_controller", &params)?;
            Ok(Target::Vhost { socket: bench.lab.path("stock/v0") })
        }
    }
}

fn penstockd(bench: &Bench<'_>) -> Result<TargetProcess, RatioError> {
    let directory = bench.lab.subdirectory("ours")?;
    let mut arguments: Vec<String> = vec![
        "--run-dir".to_owned(),
        directory.display().to_string(),
        "--state-dir".to_owned(),
        bench.lab.subdirectory("ours-state")?.display().to_string(),
        "--cores".to_owned(),
        TARGET_CORE.to_owned(),
        "--poll".to_owned(),
        "busy".to_owned(),
        "--mem-mib".to_owned(),
        "4096".to_owned(),
    ];
    if !bench.options.hugepages {
        arguments.push("--no-huge".to_owned());
    }
    let program = bench.lab.program("penstockd")?;
    let socket = directory.join("penstockd.sock");
    let mut process = ArmProcess::start(&program, &arguments, &bench.lab.path("ours.log"))?;
    let mut rpc = process.rpc(&socket)?;
    let node: &mut dyn Node = &mut rpc;
    (|| {
        volume::claim(node)?;
        for (number, _) in Route::ALL.iter().enumerate() {
            let number = number as u64;
            let name = format!("Media{number}");
            node.call("bdev_malloc_create", &json!({"name": name, "num_blocks": DEVICE_BYTES / BLOCK, "block_size": BLOCK}))?;
            let spec = format!("bdev:{name}?power_safe=true");
            volume::add_drive(node, &DriveAsk { number, spec: &spec, stores: 1, oplog_bytes: OPLOG_BYTES })?;
            volume::create(node, number, number, VOLUME_BYTES)?;
        }
        Ok(())
    })()
    .map_err(RatioError::Volume)?;
    Ok(TargetProcess { process: Rc::new(process), rpc, socket })
}

fn our_door(target: &mut TargetProcess, route: Route, port: u16) -> Result<Target, RatioError> {
    let number = route as u64;
    let door = match route {
        Route::Tcp => json!({"kind": "nvmf", "address": "127.0.0.1", "port": port}),
        Route::VfioUser => json!({"kind": "vfio_user"}),
        Route::Vhost => json!({"kind": "vhost"}),
    };
    let opened = volume::export(&mut target.rpc, number, &door).map_err(RatioError::Volume)?;
    let text = |field: &str| {
        let text = opened[field].as_str().map(str::to_owned);
        text.ok_or_else(|| RatioError::Volume(format!("no {field} in {opened}")))
    };
    Ok(match route {
        Route::Tcp => Target::NvmfTcp { address: "127.0.0.1".to_owned(), port, nqn: text("nqn")? },
        Route::VfioUser => Target::VfioUser { directory: text("address")?.into() },
        Route::Vhost => Target::Vhost { socket: text("address")?.into() },
    })
}

fn workload(mix: Mix, access: Access, block: u64, seed: u64) -> Workload {
    Workload {
        seed,
        block_size: ByteCount(block),
        mix,
        access,
        depth: 32,
        range_offset: ByteOffset(0),
        range_length: Some(ByteCount(VOLUME_BYTES)),
    }
}

fn attach(agent: &SharedAgent, target: &Target, name: &str) -> Result<String, RatioError> {
    let reconnect = Reconnect { keep_trying_s: 60, delay_s: 1, fail_io_after_s: 0 };
    let mut last = Value::Null;
    for call in target.attach_calls(name, reconnect, BLOCK as u32) {
        // Options can be set only before the first controller; later ones find them set.
        match agent.borrow_mut().rpc(call.method, &call.params) {
            Err(_) if call.method == "bdev_nvme_set_options" => {}
            answer => last = answer?,
        }
    }
    bdev_name(&last).ok_or_else(|| RatioError::Volume(format!("attaching {target} answered {last}")))
}

/// Writes every block once.
fn fill(agent: &SharedAgent, bdev: &str, seed: u64) -> Result<(), RatioError> {
    agent.borrow_mut().turn(&TurnAsk {
        lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: LOAD_CORE }],
        workload: workload(Mix::WRITE, Access::Sequential, 65536, seed),
        warmup: Nanos(0),
        duration: None,
        operations: Some(VOLUME_BYTES / 65536),
        rate: None,
        handicap: "none".to_owned(),
    })?;
    Ok(())
}

/// True where so much hugepage memory is free and mounted.
fn hugepages_ready(mib: u32) -> bool {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let field = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let free_kib = field("HugePages_Free:").unwrap_or(0) * field("Hugepagesize:").unwrap_or(0);
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap_or_default();
    free_kib >= u64::from(mib) << 10 && mounts.lines().any(|line| line.split_whitespace().nth(2) == Some("hugetlbfs"))
}

fn name(route: Route, mix: Mix) -> String {
    format!("{} 4 KiB random {} QD32", route.name(), if mix == Mix::READ { "read" } else { "write" })
}

fn free_port() -> Result<u16, RatioError> {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0));
    let port = listener.and_then(|listener| listener.local_addr()).map(|address| address.port());
    port.map_err(|error| RatioError::Volume(format!("no free port on loopback: {error}")))
}

pub fn run(bench: &mut Bench<'_>) -> Result<(), RatioError> {
    let mixes = [Mix::READ, Mix::WRITE];
    let wanted: Vec<Route> = Route::ALL.into_iter().filter(|route| mixes.iter().any(|mix| bench.wants(&name(*route, *mix)))).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut theirs = stock(bench)?;
    let mut own = penstockd(bench)?;
    for route in wanted {
        let hugepages = bench.options.hugepages || (route == Route::Vhost && hugepages_ready(LOAD_MIB));
        if route == Route::Vhost && !hugepages {
            eprintln!(
                "\n[7] {}: not run. SPDK's vhost initiator shares its memory as hugepage files: reserve and mount {LOAD_MIB} MiB of them (penstock-hugepages reserve, mount)",
                route.name()
            );
            continue;
        }
        own.process.wake()?;
        theirs.process.wake()?;
        let options = AgentOptions { cores: vec![LOAD_CORE], mem_mib: LOAD_MIB, hugepages, node: None, ..AgentOptions::default() };
        let program = bench.lab.program("penstock-perf")?;
        let agent = Agent::start(&program, &options, &bench.lab.path("agent.log"))?;
        let agent: SharedAgent = Rc::new(RefCell::new(agent));
        let our_target = our_door(&mut own, route, free_port()?)?;
        let their_target = stock_door(bench, &mut theirs, route, free_port()?)?;
        let our_bdev = attach(&agent, &our_target, "Ours")?;
        let their_bdev = attach(&agent, &their_target, "Stock")?;
        let seed = bench.options.seed;
        for bdev in [&our_bdev, &their_bdev] {
            fill(&agent, bdev, seed)?;
        }
        for mix in mixes {
            if !bench.wants(&name(route, mix)) {
                continue;
            }
            agent.borrow().wake()?;
            own.process.wake()?;
            volume::drain(&mut own.rpc, route as u64).map_err(RatioError::Volume)?;
            let arm = |who: &str, bdev: &str, process: &SharedProcess| AgentArm {
                name: format!("{who} over {}", route.name()),
                agent: agent.clone(),
                lanes: vec![LaneAsk { bdev: bdev.to_owned(), core: LOAD_CORE }],
                workload: workload(mix, Access::Random, BLOCK, seed),
                warmup: TURN_WARMUP,
                duration: Nanos(TURN.0 * route.seconds(mix)),
                metric: Metric::OperationsPerSecond,
                target: Some(process.clone()),
                upkeep: None,
                node: None,
            };
            let mut ours = arm("penstockd", &our_bdev, &own.process);
            if mix == Mix::WRITE {
                ours.upkeep = Some(Upkeep::Drain { drives: vec![route as u64], least_bytes: LEAST_BYTES });
                ours.node = Some(RpcClient::connect(&own.socket)?);
            }
            let mut peer = arm("spdk_tgt", &their_bdev, &theirs.process);
            let question = Question {
                name: name(route, mix),
                unit: Metric::OperationsPerSecond.unit(),
                gate: route.gate(),
                control: Control::Spin,
                note: Some("target on core 0, load on core 1; durability: volatile malloc, acknowledged when in the oplog; working set a third of the oplog; every write turn writes three times the oplog and drains what is left".to_owned()),
            };
            bench.compare(question, &mut ours, &mut peer)?;
        }
    }
    Ok(())
}
