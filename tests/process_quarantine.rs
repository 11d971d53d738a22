//! A store that panics takes nothing with it: its hosts are told, the node's other stores go on, and it stays quarantined through
//! restarts until an operator clears it. The fall is seeded: a build with feature `canary`, told to fall over block 13.

use penstock::guest::initiator::{Namespace, Refusal};
use penstock::guest::wait::wait_for;
use penstock::process::house::{House, LIMIT, Plan};
use penstock_api::rpc::{DriveInfo, DriveState, VolumeState};

const BLOCK: u64 = 4096;
const FALLS_AT: u64 = 13 * BLOCK;
const INTERNAL_ERROR: Refusal = Refusal { code_type: 0, code: 0x06 };

fn drive(house: &House, spec: &str) -> DriveInfo {
    house.drives().unwrap().into_iter().find(|drive| drive.spec.to_string().starts_with(spec)).expect("the drive is shown")
}

fn connect(house: &House, volume: &str) -> Namespace {
    let export = wait_for("a door", LIMIT, || Ok(house.volume(volume)?.exports.into_iter().find(|export| !export.address.is_empty())));
    let export = export.unwrap();
    Namespace::connect(export.address.parse().unwrap(), export.nqn.unwrap().as_str()).unwrap()
}

#[test]
#[ignore = "needs a build with feature canary; run by make test-guest"]
fn store_that_panics_is_quarantined_through_restarts_and_the_others_serve() {
    let program = std::env::var_os("PENSTOCK_CANARY_PENSTOCKD").expect("PENSTOCK_CANARY_PENSTOCKD names a build with feature canary");
    let flags = vec!["--canary".to_owned(), "panic-on-write".to_owned()];
    let mut house = House::with(Plan { program: Some(program.into()), flags, ..Plan::default() }).unwrap();
    let first = format!("file:{}", house.add_drive("d0", "96MiB", "--oplog 8MiB").display());
    let second = format!("file:{}", house.path("d1.img").display());
    house.did(&format!("volume create falls 8MiB --drive {}", drive(&house, &first).drive_id));
    house.did(&format!("pool add {second}?size=96MiB --oplog 8MiB"));
    house.did(&format!("volume create stands 8MiB --drive {}", drive(&house, &second).drive_id));
    for volume in ["falls", "stands"] {
        house.did(&format!("volume export {volume} --nvmf=127.0.0.1:{}", house.port()));
    }
    let (mut falls, mut stands) = (connect(&house, "falls"), connect(&house, "stands"));
    falls.write(0, &[1; BLOCK as usize]).unwrap();
    stands.write(0, &[2; BLOCK as usize]).unwrap();

    assert_eq!(falls.try_write(FALLS_AT, &[3; BLOCK as usize]).unwrap(), Err(INTERNAL_ERROR), "the write that it fell over");
    assert_eq!(falls.try_read(0, BLOCK as usize).unwrap(), Err(INTERNAL_ERROR));
    assert_eq!(falls.try_discard(0, BLOCK as usize).unwrap(), Err(INTERNAL_ERROR));
    stands.write(BLOCK, &[4; BLOCK as usize]).unwrap();
    assert_eq!(stands.read(0, BLOCK as usize).unwrap(), [2; BLOCK as usize]);
    let shown = drive(&house, &first);
    assert_eq!(shown.state, DriveState::Quarantined, "{shown:?}");
    assert!(shown.reason.as_ref().is_some_and(|why| why.contains("a seeded fall over block 13")), "{:?}", shown.reason);
    assert_eq!(drive(&house, &second).state, DriveState::Serving);
    assert_eq!(house.volume("falls").unwrap().state, VolumeState::Unavailable);
    assert!(house.did("pool ls").out.contains("a seeded fall over block 13"));
    let refused = house.refused(&format!("volume create more 4MiB --drive {}", shown.drive_id));
    assert!(refused.contains("quarantined"), "{refused}");

    // Through a kill and through an orderly end; with and without the fault, which nobody knows yet.
    for round in 0..2 {
        if round == 0 {
            house.kill_node().unwrap()
        } else {
            assert_eq!(house.stop_node().unwrap().code(), Some(0))
        }
        let kept = std::fs::read_to_string(house.path("state/node.toml")).unwrap();
        assert!(kept.contains("[[quarantines]]"), "{kept}");
        house.start_node().unwrap();
        let open = || Ok(Some(drive(&house, &first)).filter(|drive| drive.state != DriveState::Opening));
        let shown = wait_for("the drive to be open", LIMIT, open).unwrap();
        assert_eq!(shown.state, DriveState::Quarantined, "round {round}: {shown:?}");
        let mut stands = connect(&house, "stands");
        assert_eq!(stands.read(BLOCK, BLOCK as usize).unwrap(), [4; BLOCK as usize]);
        stands.write(2 * BLOCK, &[5; BLOCK as usize]).unwrap();
    }

    // Cleared with the fault still there: the store falls over its log, and is quarantined again. Nothing else moves.
    house.did(&format!("pool clear-fence {}", shown.drive_id));
    let again = wait_for("the next fall", LIMIT, || Ok(Some(drive(&house, &first)).filter(|drive| drive.state == DriveState::Quarantined)));
    assert!(again.unwrap().reason.is_some_and(|why| why.contains("a seeded fall over block 13")));
    assert_eq!(connect(&house, "stands").read(0, BLOCK as usize).unwrap(), [2; BLOCK as usize]);

    // Cleared under a penstockd that is mended: all that was written is there.
    house.stop_node().unwrap();
    house.node().arguments().retain(|argument| argument != "--canary" && argument != "panic-on-write");
    house.start_node().unwrap();
    house.did(&format!("pool clear-fence {}", shown.drive_id));
    house.settle().unwrap();
    assert_eq!(drive(&house, &first).state, DriveState::Serving);
    let mut falls = connect(&house, "falls");
    assert_eq!(falls.read(0, BLOCK as usize).unwrap(), [1; BLOCK as usize]);
    assert_eq!(falls.read(FALLS_AT, BLOCK as usize).unwrap(), [3; BLOCK as usize], "it was durable when its store fell");
    falls.write(FALLS_AT, &[6; BLOCK as usize]).unwrap();
    assert!(!std::fs::read_to_string(house.path("state/node.toml")).unwrap().contains("quarantines"));
}
