//! Route (a): a guest's own Linux nvme-tcp initiator, through user networking.

use penstock::guest::image::{ImageSpec, Overlay};
use penstock::guest::machine::{Machine, MachineSpec};
use penstock::guest::scenario::{Load, check_identity, connect_nvmf, filesystem_survives_kills};
use penstock::guest::spdk_target::SpdkTarget;
use penstock::guest::target::{DoorKind, Target};
use std::path::Path;

const AGENT: &str = env!("CARGO_BIN_EXE_penstock-guest-agent");
const VOLUME: u64 = 512 << 20;

fn kill_under_load(name: &str, target: &mut dyn Target, load: Load) {
    let image = ImageSpec::storage_host().unwrap().build().unwrap();
    let overlay = Overlay::with_agent(Path::new(AGENT)).unwrap();
    target.start().unwrap();
    let spec =
        MachineSpec { name, image: &image, overlay: &overlay, memory_mib: 768, cpus: 1, hugepages: 0, network: true, devices: Vec::new() };
    let mut machine = Machine::boot(&spec).unwrap();
    let device = connect_nvmf(&mut machine, &target.door()).unwrap();
    check_identity(&mut machine, &device, target.identity()).unwrap();
    let report = filesystem_survives_kills(&mut machine, target, &device, load).unwrap();
    println!("{report:?}");
    machine.power_off().unwrap();
}

#[test]
fn spdk_target_killed_under_a_guests_nvme_tcp_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = SpdkTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-spdk", &mut target, Load::SMOKE);
}
