//! Route (a): a guest's own Linux nvme-tcp initiator, through user networking.

use penstock::guest::image::{ImageSpec, Overlay};
use penstock::guest::initiator::Namespace;
use penstock::guest::machine::{Machine, MachineSpec};
use penstock::guest::penstock_target::PenstockTarget;
use penstock::guest::scenario::{HOST, Load, check_identity, connect_nvmf, filesystem_survives_kills};
use penstock::guest::spdk_target::SpdkTarget;
use penstock::guest::target::{Door, DoorKind, Target};
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
    let device = connect_nvmf(&mut machine, &target.door(), HOST).unwrap();
    check_identity(&mut machine, &device, target.identity()).unwrap();
    let report = filesystem_survives_kills(&mut machine, target, &device, load).unwrap();
    println!("{report:?}");
    machine.power_off().unwrap();
}

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_target_killed_under_a_guests_nvme_tcp_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = SpdkTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-spdk", &mut target, Load::SMOKE);
}

#[test]
fn penstockd_killed_under_a_guests_nvme_tcp_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-penstock", &mut target, Load::SMOKE);
}

#[test]
#[ignore = "several minutes of emulation; run by make test-guest"]
fn penstockd_killed_six_times_under_a_guests_nvme_tcp_loses_nothing_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-penstock-full", &mut target, Load::FULL);
}

#[test]
fn own_initiator_reads_back_what_it_wrote_to_spdks_target_and_after_its_kill() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = SpdkTarget::new(dir.path(), DoorKind::NvmfTcp, 64 << 20).unwrap();
    target.start().unwrap();
    let connect = |target: &SpdkTarget| {
        let Door::NvmfTcp { port, nqn } = target.door() else { panic!("asked for NVMe/TCP") };
        Namespace::connect(([127, 0, 0, 1], port).into(), &nqn).unwrap()
    };
    let mut namespace = connect(&target);
    assert_eq!((namespace.size(), namespace.block_bytes()), (64 << 20, 512));
    let bytes: Vec<u8> = (0..4096u32).map(|i| (i * 7) as u8).collect();
    namespace.write(1 << 20, &bytes).unwrap();
    assert_eq!(namespace.read((1 << 20) - 512, 200 * 1024).unwrap()[512..4608], bytes);
    let past_the_end = namespace.read(64 << 20, 512).unwrap_err();
    assert!(past_the_end.to_string().contains("code type 0, code 0x80"), "LBA out of range: {past_the_end}");
    target.kill().unwrap();
    assert!(namespace.read(0, 512).is_err(), "the target is gone");
    target.start().unwrap();
    assert_eq!(connect(&target).read(1 << 20, 4096).unwrap(), bytes);
}

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_target_killed_six_times_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = SpdkTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-spdk-full", &mut target, Load::FULL);
}
