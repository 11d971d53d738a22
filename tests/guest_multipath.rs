//! A guest's own Linux with native NVMe multipath: a path to each of three nodes, of which the one that leads dies again and again.

use penstock::guest::scenario::{Load, filesystem_survives_kills, guest_at, target_killed_under_a_guest};
use penstock::guest::target::{Door, Identity, Target};
use penstock::process::fleet_target::{FleetTarget, Strike};
use std::path::Path;
use std::time::Duration;

const AGENT: &str = env!("CARGO_BIN_EXE_penstock-guest-agent");
const VOLUME: u64 = 512 << 20;

fn leaders_struck_under_load(name: &str, strikes: &[Strike], load: Load) {
    let mut target = FleetTarget::new(VOLUME, strikes).unwrap();
    let report = target_killed_under_a_guest(name, Path::new(AGENT), &mut target, load);
    let report = report.unwrap_or_else(|e| panic!("{e}\n{}", target.explain()));
    println!("{report:?}");
    let struck = target.struck();
    for (strike, node, term) in struck {
        println!("{strike:?} of node {}, which led term {term}", node + 1);
    }
    assert_eq!(struck.len() as u32, load.kills);
    assert!(struck.is_sorted_by(|before, after| before.2 < after.2), "each strike hit a leader of a new term");
}

#[test]
fn leader_killed_under_a_multipath_guest_costs_it_nothing_smoke() {
    leaders_struck_under_load("multipath", &[Strike::Kill], Load::SMOKE);
}

#[test]
#[ignore = "several minutes of emulation; run by make test-guest"]
fn leaders_struck_ten_times_under_a_multipath_guest_cost_it_nothing_full() {
    use Strike::{Kill, Pause};
    // The fifth stops without a word: its connections stay, and only the guest's keep-alive tells.
    let strikes = [Kill, Kill, Kill, Kill, Pause, Kill, Kill, Kill, Kill, Kill];
    leaders_struck_under_load("multipath-full", &strikes, Load::MULTIPATH);
}

/// The same fleet with one path, to the node that leads until it is struck, and stays away then.
struct OnePath {
    fleet: FleetTarget,
    leader: usize,
    door: Door,
}

impl Target for OnePath {
    fn start(&mut self) -> penstock::guest::Result<()> {
        Ok(())
    }

    fn kill(&mut self) -> penstock::guest::Result<()> {
        self.fleet.kill()
    }

    fn door(&self) -> Door {
        self.door.clone()
    }

    fn identity(&self) -> Identity {
        self.fleet.identity()
    }

    /// On a busy machine another node may come to lead, to which the guest has no path.
    fn attend(&mut self) -> penstock::guest::Result<()> {
        self.fleet.lead_from(self.leader)
    }
}

#[test]
#[ignore = "shows that the check bites; run by make test-guest"]
fn leader_killed_under_a_guest_with_a_path_to_it_alone_is_seen_as_errors() {
    let mut fleet = FleetTarget::new(VOLUME, &[Strike::Kill]).unwrap();
    fleet.start().unwrap();
    let (leader, door) = fleet.leader().unwrap();
    let mut target = OnePath { fleet, leader, door };
    let (mut machine, device) = guest_at(&target.doors(), "one-path", Path::new(AGENT)).unwrap();
    let short = "for path in /sys/class/nvme/nvme*; do echo 3 > $path/ctrl_loss_tmo; done";
    machine.shell(short, Duration::from_secs(20)).unwrap();
    let seen = filesystem_survives_kills(&mut machine, &mut target, &device, Load::SMOKE).unwrap_err().to_string();
    assert!(seen.contains("in the guest, `cd /mnt && fio") && seen.contains("exit status"), "another error than fio's: {seen}");
}
