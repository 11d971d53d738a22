//! What a volume says of itself while it is used: the space it takes and what of it only the oplog holds.

use std::time::Duration;

use penstock::guest::wait::wait_for;
use penstock::process::house::House;
use penstock_api::rpc::{Drain, DrainParams};

const BLOCK: u64 = 4096;
const EXTENT: u64 = 64 << 10;

fn usage(house: &House) -> (u64, u64) {
    let volume = house.volume("v").unwrap();
    (volume.allocated_bytes.bytes(), volume.undrained_bytes.bytes())
}

fn drain(house: &House) {
    house.rpc::<Drain>(&DrainParams::default()).unwrap();
}

#[test]
fn volume_shows_the_space_that_it_takes_through_a_kill_and_a_discard() {
    let mut house = House::new().unwrap();
    house.add_drive("d0", "96MiB", "--oplog 8MiB");
    let mut line = house.add_volume("v", "8MiB", 4096).connect().unwrap();
    assert_eq!(usage(&house), (0, 0));
    for block in 0..20 {
        line.write(block * BLOCK, &[7; BLOCK as usize]).unwrap();
    }
    // The idle drain may have begun meanwhile: a block is in the one place or in the other.
    let (allocated, undrained) = usage(&house);
    assert!(undrained == 20 * BLOCK || allocated > 0, "{allocated} allocated, {undrained} undrained");
    drain(&house);
    assert_eq!(usage(&house), (2 * EXTENT, 0));
    house.kill_node().unwrap();
    house.start_node().unwrap();
    let mut line = house.wait_for_door("v").unwrap().connect().unwrap();
    assert_eq!(usage(&house), (2 * EXTENT, 0), "told by the checkpoint");
    assert_eq!(line.try_discard(0, 16 * BLOCK as usize).unwrap(), Ok(()));
    drain(&house);
    assert_eq!(usage(&house), (EXTENT, 0));
    assert_eq!(line.read(16 * BLOCK, BLOCK as usize).unwrap(), [7; BLOCK as usize]);
    // Control shows what it saw last, which is a little while ago.
    wait_for("control to see the discard", Duration::from_secs(10), || Ok(house.did("volume show v").out.contains("64 KiB").then_some(())))
        .unwrap();
    assert!(house.did("volume ls").out.contains("64 KiB"), "{}", house.did("volume ls").out);
    let metrics = house.http("GET", "/metrics", b"").unwrap().text();
    let line = metrics.lines().find(|line| line.starts_with("penstock_volume_allocated_bytes{")).expect("a gauge of the volume");
    assert_eq!(line.rsplit(' ').next().and_then(|value| value.parse().ok()), Some(EXTENT as f64), "{line}");
}
