//! What a node costs that has nothing to do: processor time, from the kernel's own accounts.

use penstock::guest::initiator::Namespace;
use penstock::guest::target::{Daemon, free_port};
use penstock::guest::wait::wait_for;
use penstock::process::house::{House, LIMIT, Plan, try_rpc};
use penstock::process::program::{built, words};
use penstock::process::usage::processor_time;
use penstock_api::id::Id;
use penstock_api::rpc::{
    BlockSize, Door, DriveAdd, DriveAddParams, DriveState, Empty, ExportAdd, ExportAddParams, NodeGet, VolumeCreate, VolumeCreateParams,
};
use penstock_api::{ByteSize, ClusterId, DriveId, NodeId, ReplicaId, SegmentId, VolumeId};
use std::time::{Duration, Instant};

/// Share of one core that a penstockd used over `span`, in percent.
fn percent_over(node: &mut Daemon, span: Duration) -> f64 {
    let pid = node.id().expect("penstockd runs");
    let (from, before) = (Instant::now(), processor_time(pid).unwrap());
    std::thread::sleep(span);
    let used = processor_time(pid).unwrap() - before;
    100.0 * used.as_secs_f64() / from.elapsed().as_secs_f64()
}

fn serving(poll: &'static str) -> (House, Namespace) {
    let house = House::with(Plan { poll, period_ms: 1000, ..Plan::default() }).unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "8MiB", 4096);
    house.did("volume export v --vhost");
    let mut line = door.connect().unwrap();
    line.write(0, &[1; 4096]).unwrap();
    (house, line)
}

#[test]
fn adaptive_node_with_open_doors_and_a_quiet_host_sleeps() {
    let (mut house, mut line) = serving("adaptive");
    // What was written is drained first.
    std::thread::sleep(Duration::from_secs(1));
    let percent = percent_over(house.node(), Duration::from_secs(5));
    println!("{percent:.2} % of a core");
    // Two percent is what it is to be; the same program took 2.2 to 2.6 on cores that others had slowed to half.
    assert!(percent < 4.0, "an idle node used {percent:.2} % of a core");
    assert_eq!(line.read(0, 4096).unwrap(), vec![1; 4096], "asleep is not dead");
}

/// The measurement can fail: a node that spins is seen to.
#[test]
fn busy_node_is_measured_as_busy() {
    let (mut house, _line) = serving("busy");
    let percent = percent_over(house.node(), Duration::from_secs(1));
    println!("{percent:.0} % of a core");
    // All that it gets beside others on a busy machine, and still far more than an idle one may use.
    assert!(percent > 5.0, "a node that polls without sleep used {percent:.2} % of a core");
}

/// A drive over vfio-user raises no events, as one that is bound to uio_pci_generic: the node looks at it every so often, and sleeps in
/// between. The drive is another penstockd's volume; that one polls, since in interrupt mode it cannot offer what SPDK's driver maps.
#[test]
fn adaptive_node_on_a_drive_without_events_sleeps() {
    let house = House::with(Plan { poll: "busy", cores: "1", ..Plan::default() }).unwrap();
    house.add_drive("d0", "256MiB", "--oplog 16MiB");
    house.did("volume create beneath 128MiB");
    house.did("volume export beneath --vfio-user");
    let directory = house.volume("beneath").unwrap().exports[0].address.clone();

    let root = house.path("second");
    std::fs::create_dir(&root).unwrap();
    let root = root.display();
    let flags = format!("--run-dir {root}/run --state-dir {root}/state --no-huge --cores 0 --poll adaptive");
    let mut node = Daemon::new(built("penstockd").unwrap(), words(&flags), house.path("second/log"));
    node.start().unwrap();
    let socket = house.path("second/run/penstockd.sock");
    wait_for("the second penstockd", LIMIT, || Ok(try_rpc::<NodeGet>(&socket, &Empty {}).ok())).unwrap();
    let id = |n: u32| format!("0194a5c1-b2d3-8001-8000-{n:012}").parse::<Id>().unwrap();
    let (cluster_id, node_id) = (ClusterId("0194a5c1-b2d3-8000-8000-000000000000".parse().unwrap()), NodeId(id(0)));
    let drive_id = DriveId(id(1));
    let drive = DriveAddParams {
        spec: format!("vfio-user:{directory}").parse().unwrap(),
        drive_id,
        cluster_id,
        node_id,
        stores: None,
        oplog_bytes: Some(ByteSize::mib(8)),
        force: false,
        open_only: false,
    };
    let added = try_rpc::<DriveAdd>(&socket, &drive).unwrap_or_else(|e| panic!("{e}: {}", node.last_words()));
    assert_eq!(added.state, DriveState::Serving);
    let (volume_id, name) = (VolumeId(id(2)), "v".parse().unwrap());
    let (segment_id, replica_id, block_size) = (SegmentId(id(3)), ReplicaId(id(4)), BlockSize::B4096);
    let volume =
        VolumeCreateParams { volume_id, segment_id, replica_id, name, size_bytes: ByteSize::mib(8), block_size, drive_id, origin: None };
    try_rpc::<VolumeCreate>(&socket, &volume).unwrap();
    let door = Door::Nvmf { address: "127.0.0.1".parse().unwrap(), port: free_port().unwrap(), nqn: None };
    let export = try_rpc::<ExportAdd>(&socket, &ExportAddParams { volume_id, door, controllers: None }).unwrap();
    let mut line = Namespace::connect(export.address.parse().unwrap(), export.nqn.unwrap().as_str()).unwrap();
    let began = Instant::now();
    for block in 0..100 {
        line.write(block * 4096, &[block as u8; 4096]).unwrap();
    }
    println!("{} us a write, each with its flush", began.elapsed().as_micros() / 100);
    std::thread::sleep(Duration::from_secs(2));
    let percent = percent_over(&mut node, Duration::from_secs(5));
    println!("{percent:.2} % of a core");
    assert!(percent < 10.0, "an idle node that looks at its drive every so often used {percent:.2} % of a core");
    for block in 0..100 {
        assert_eq!(line.read(block * 4096, 4096).unwrap(), [block as u8; 4096], "asleep is not dead");
    }
    drop(line);
    node.terminate().unwrap();
    assert_eq!(node.wait_ended(LIMIT).unwrap().code(), Some(0), "{}", node.last_words());
}
