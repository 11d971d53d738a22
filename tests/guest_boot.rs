//! The guest harness itself: a guest boots, runs commands side by side, and its failures reach the host.
//! Not here: storage; see `guest_nvmf.rs`, `guest_vhost.rs`, `guest_nvme.rs`.

use penstock::guest::image::{ImageSpec, Overlay};
use penstock::guest::machine::{Machine, MachineSpec};
use std::path::Path;
use std::time::Duration;

#[test]
fn guest_booted_runs_commands_side_by_side_and_reports_status_output_and_overtime() {
    let image = ImageSpec::storage_host().unwrap().build().unwrap();
    let overlay = Overlay::with_agent(Path::new(env!("CARGO_BIN_EXE_penstock-guest-agent"))).unwrap();
    let spec = MachineSpec { hugepages: 8, network: true, ..MachineSpec::small("boot", &image, &overlay) };
    let mut machine = Machine::boot(&spec).unwrap();
    let limit = Duration::from_secs(30);

    // a job that can only end because a later one runs beside it
    let waiting = machine.start("until [ -e /tmp/go ]; do sleep 0.1; done; echo went", limit).unwrap();
    assert!(!machine.ended(&waiting));
    machine.shell("touch /tmp/go", limit).unwrap();
    let outcome = machine.finish(waiting).unwrap();
    assert_eq!((outcome.status, outcome.out.as_str()), (Some(0), "went\n"));

    let outcome = machine.run("echo to-out; echo to-err >&2; exit 3", limit).unwrap();
    assert_eq!((outcome.status, outcome.out.trim(), outcome.err.trim()), (Some(3), "to-out", "to-err"));
    let err = machine.shell("echo why >&2; exit 4", limit).unwrap_err().to_string();
    assert!(err.contains("exit status 4") && err.contains("why"), "{err}");
    assert_eq!(machine.run("sleep 1000", Duration::from_millis(100)).unwrap().status, None, "killed at its limit");

    assert!(machine.shell("fio --version", limit).unwrap().starts_with("fio-"));
    assert_eq!(machine.read("/proc/sys/vm/nr_hugepages").unwrap(), "8");
    assert!(machine.shell("cat /sys/class/net/eth0/operstate /proc/modules", limit).unwrap().contains("nvme_tcp"));
    machine.power_off().unwrap();
}
