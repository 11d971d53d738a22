//! What a node costs that has nothing to do: processor time, from the kernel's own accounts.

use penstock::process::house::{House, Plan};
use penstock::process::usage::processor_time;
use std::time::{Duration, Instant};

/// Share of one core that the node used over `span`, in percent.
fn percent_over(house: &mut House, span: Duration) -> f64 {
    let pid = house.node().id().expect("penstockd runs");
    let (from, before) = (Instant::now(), processor_time(pid).unwrap());
    std::thread::sleep(span);
    let used = processor_time(pid).unwrap() - before;
    100.0 * used.as_secs_f64() / from.elapsed().as_secs_f64()
}

fn serving(poll: &'static str) -> (House, penstock::guest::initiator::Namespace) {
    let house = House::with(Plan { poll, period_ms: 1000, ..Plan::default() }).unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    let door = house.add_volume("v", "8MiB", 4096);
    house.did("volume export v --vhost");
    let mut line = door.connect().unwrap();
    line.write(0, &[1; 4096]).unwrap();
    (house, line)
}

#[test]
fn adaptive_node_with_open_doors_and_a_quiet_host_idles_below_two_percent() {
    let (mut house, mut line) = serving("adaptive");
    // What was written is drained first.
    std::thread::sleep(Duration::from_secs(1));
    let percent = percent_over(&mut house, Duration::from_secs(5));
    println!("{percent:.2} % of a core");
    assert!(percent < 2.0, "an idle node used {percent:.2} % of a core");
    assert_eq!(line.read(0, 4096).unwrap(), vec![1; 4096], "asleep is not dead");
}

/// The measurement can fail: a node that spins is seen to.
#[test]
fn busy_node_is_measured_as_busy() {
    let (mut house, _line) = serving("busy");
    let percent = percent_over(&mut house, Duration::from_secs(1));
    println!("{percent:.0} % of a core");
    assert!(percent > 20.0, "a node that polls without sleep used {percent:.2} % of a core");
}
