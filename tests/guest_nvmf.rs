//! Route (a): a guest's own Linux nvme-tcp initiator, through user networking.

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::guest::penstock_target::{PenstockTarget, TestIds};
use penstock::guest::scenario::{Load, kill_under_load};
use penstock::guest::spdk_target::SpdkTarget;
use penstock::guest::target::{Door, DoorKind, Target};

const AGENT: &str = env!("CARGO_BIN_EXE_penstock-guest-agent");
const VOLUME: u64 = 512 << 20;

#[test]
#[ignore = "shows that the harness is right, not that Penstock is; run by make test-guest"]
fn spdk_target_killed_under_a_guests_nvme_tcp_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = SpdkTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-spdk", AGENT, &mut target, Load::SMOKE);
}

#[test]
fn penstockd_killed_under_a_guests_nvme_tcp_loses_nothing_smoke() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-penstock", AGENT, &mut target, Load::SMOKE);
}

#[test]
fn penstockd_volume_identifies_itself_honestly_and_refuses_bad_commands_by_the_right_status() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    target.start().unwrap();
    let Door::NvmfTcp { port, nqn } = target.door() else { panic!("asked for NVMe/TCP") };
    let mut namespace = Namespace::connect(([127, 0, 0, 1], port).into(), &nqn).unwrap();
    assert_eq!((namespace.size(), namespace.block_bytes()), (VOLUME, 4096));
    let identified = namespace.identify().unwrap();
    assert!(!identified.volatile_write_cache, "acknowledged is durable");
    assert_eq!(identified.discarded_reads, 1, "discarded blocks read as zeros");
    const DISCARD_AND_ZEROES: u16 = 1 << 2 | 1 << 3;
    const EMULATED: u16 = 1 << 8; // Copy
    assert_eq!(identified.optional_commands & DISCARD_AND_ZEROES, DISCARD_AND_ZEROES);
    assert_eq!(identified.optional_commands & EMULATED, 0);
    assert_eq!(identified.nguid, TestIds::new().volume.to_bytes(), "the NGUID is the volume id");

    let blocks = VOLUME / 4096;
    let entry = |opcode: u8, first: u64, count: u16| {
        let mut entry = [0; 64];
        entry[0] = opcode;
        entry[4] = 1;
        entry[40..48].copy_from_slice(&first.to_le_bytes());
        entry[48..50].copy_from_slice(&(count - 1).to_le_bytes());
        entry
    };
    let refusal = |code| Some(Refusal { code_type: 0, code });
    const WRITE_ZEROES: u8 = 8;
    for (what, command, expected) in [
        ("zeroes at the end", entry(WRITE_ZEROES, blocks - 1, 1), None),
        ("zeroes past the end", entry(WRITE_ZEROES, blocks - 1, 2), refusal(0x80)),
        ("zeroes far beyond", entry(WRITE_ZEROES, u64::MAX, 1), refusal(0x80)),
        ("an unknown opcode", entry(0x7d, 0, 1), refusal(0x01)),
        ("flush", entry(0, 0, 1), None),
    ] {
        assert_eq!(namespace.command(command).unwrap(), expected, "{what}");
    }
    let mut elsewhere = entry(WRITE_ZEROES, 0, 1);
    elsewhere[4] = 2;
    assert_eq!(namespace.command(elsewhere).unwrap(), refusal(0x0b), "another namespace");
    namespace.write(0, &[7; 4096]).unwrap();
    assert_eq!(namespace.read(0, 4096).unwrap(), [7; 4096], "the connection lives on");
}

#[test]
#[ignore = "several minutes of emulation; run by make test-guest"]
fn penstockd_killed_six_times_under_a_guests_nvme_tcp_loses_nothing_full() {
    let dir = tempfile::tempdir().unwrap();
    let mut target = PenstockTarget::new(dir.path(), DoorKind::NvmfTcp, VOLUME).unwrap();
    kill_under_load("nvmf-penstock-full", AGENT, &mut target, Load::FULL);
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
    let identified = namespace.identify().unwrap();
    assert!(identified.volatile_write_cache, "SPDK's target says so of any bdev: {identified:?}");
    let mut unknown = [0; 64];
    unknown[0] = 0x7d;
    unknown[4] = 1;
    assert_eq!(namespace.command(unknown).unwrap(), Some(Refusal { code_type: 0, code: 1 }), "invalid opcode");
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
