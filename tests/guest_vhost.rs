//! Route (b): a guest's virtio-blk driver over vhost-user-blk; QEMU reconnects when the target dies.

use penstock::guest::penstock_target::PenstockTarget;
use penstock::guest::scenario::{Load, kill_under_load};
use penstock::guest::spdk_target::SpdkTarget;
use penstock::guest::target::DoorKind;

const AGENT: &str = env!("CARGO_BIN_EXE_penstock-guest-agent");
const VOLUME: u64 = 512 << 20;

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_target_killed_under_a_guests_virtio_blk_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = SpdkTarget::new(dir.path(), DoorKind::VhostUserBlk, VOLUME).unwrap();
    kill_under_load("vhost-spdk", AGENT, &mut target, Load::SMOKE);
}

#[test]
fn penstockd_killed_under_a_guests_virtio_blk_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::VhostUserBlk, VOLUME).unwrap();
    kill_under_load("vhost-penstock", AGENT, &mut target, Load::SMOKE);
}

#[test]
#[ignore = "several minutes of emulation; run by make test-guest"]
fn penstockd_killed_six_times_under_a_guests_virtio_blk_loses_nothing_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::VhostUserBlk, VOLUME).unwrap();
    kill_under_load("vhost-penstock-full", AGENT, &mut target, Load::FULL);
}
