//! The command itself: over a machine made of files, and (where `PENSTOCK_TEST_REAL_MACHINE=1` allows it, as root) over
//! the real one.

mod machine;

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use machine::{BLANK, build, snapshot};

fn run(root: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_penstock-hugepages")).arg("--root").arg(root).args(args).output().unwrap()
}

#[track_caller]
fn says(out: &Output, success: bool, parts: &[&str]) {
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert_eq!(out.status.success(), success, "{text}");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
}

fn tree() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    root
}

#[test]
fn status_shows_the_machine_in_text_and_json() {
    let root = tree();
    says(&run(root.path(), &["status"]), true, &["0     2MiB   3      2", "0000:00:04.0  nvme", "free to bind", "/srv", "none of ours"]);
    let json: serde_json::Value = serde_json::from_slice(&run(root.path(), &["status", "-o", "json"]).stdout).unwrap();
    assert_eq!(json["pools"].as_array().unwrap().len(), 4);
    assert_eq!(json["drives"][0]["pci"], BLANK);
    assert_eq!(json["drives"][0]["state"], "free");
    assert_eq!(json["drives"][1]["state"], "taken");
    assert_eq!(json["drives"][1]["because"].as_array().unwrap().len(), 2);
    assert_eq!(json["iommu"], true);
}

#[test]
fn plan_and_dry_runs_change_nothing() {
    let root = tree();
    let before = snapshot(root.path());
    let plan = run(root.path(), &["plan", "--memory", "64MiB", "--node", "1", "--mount", "/mnt/huge", "--drive", "all"]);
    let expected = [
        "would change  node 1: 3 -> 33 hugepages of 2MiB",
        "would change  mount hugetlbfs with pages of 2MiB at /mnt/huge",
        "would change  drive 0000:00:04.0: nvme -> vfio-pci",
        "in the way    drive 0000:00:05.0 is left alone",
        "run           penstock-hugepages reserve 64MiB --node 1",
        "run           penstock-hugepages bind 0000:00:04.0",
    ];
    says(&plan, true, &expected);
    let json = run(root.path(), &["plan", "--drive", BLANK, "-o", "json"]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
    assert_eq!(json["changes"][0]["to"]["driver"], "vfio-pci");
    says(&run(root.path(), &["reserve", "64MiB", "--dry-run"]), true, &["would change: node 0: 3 -> 33"]);
    says(&run(root.path(), &["bind", BLANK, "--dry-run"]), true, &["would change: drive 0000:00:04.0"]);
    says(&run(root.path(), &["mount", "/mnt", "--dry-run"]), true, &["would change: mount"]);
    says(&run(root.path(), &["undo"]), true, &["nothing to undo"]);
    assert_eq!(snapshot(root.path()), before);
    assert!(!root.path().join("run").exists());
}

#[test]
fn change_that_the_machine_does_not_take_fails_with_advice_and_is_taken_back() {
    // Plain files take numbers, but bind nothing: just the page pools play along here.
    let root = tree();
    let before = snapshot(root.path());
    says(&run(root.path(), &["reserve", "64MiB"]), true, &["node 0: 3 -> 33", "node 1: 3 -> 33"]);
    says(&run(root.path(), &["status"]), true, &["undo takes them back"]);
    says(&run(root.path(), &["mount", "/mnt"]), false, &["mounting hugetlbfs at /mnt", "taking back"]);
    says(&run(root.path(), &["undo", "--dry-run"]), true, &["would undo: node 1", "would undo: node 0"]);
    says(&run(root.path(), &["undo"]), true, &["undone: node 1", "undone: node 0"]);
    assert_eq!(snapshot(root.path()), before);
}

#[test]
fn words_that_are_wrong_say_what_would_be_right() {
    let root = tree();
    says(&run(root.path(), &["reserve", "64MB"]), false, &["write MiB"]);
    says(&run(root.path(), &["bind", "nvme0"]), false, &["0000:00:04.0"]);
    says(&run(root.path(), &["bind", "0000:00:05.0"]), false, &["left alone", "next:", "--force"]);
    says(&run(root.path(), &["--help"]), true, &["Examples:", "Nothing of this survives a reboot"]);
}

#[test]
fn real_machine_reserves_mounts_and_is_as_before() {
    if std::env::var("PENSTOCK_TEST_REAL_MACHINE").as_deref() != Ok("1") {
        eprintln!("skipped: set PENSTOCK_TEST_REAL_MACHINE=1, as root, to reserve 64 MiB for a moment");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let journal = dir.path().join("journal");
    let mount = dir.path().join("huge/pages");
    let numbers = || {
        let pool = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB";
        ["nr_hugepages", "free_hugepages"].map(|n| fs::read_to_string(format!("{pool}/{n}")).unwrap())
    };
    let run = |args: &[&str]| run(Path::new("/"), &[&["--journal", journal.to_str().unwrap()], args].concat());
    let before = numbers();
    let mounts_before = fs::read_to_string("/proc/self/mounts").unwrap();
    // Whatever fails below, it is undone before the test ends.
    let outcome = std::panic::catch_unwind(|| {
        says(&run(&["reserve", "64MiB", "--node", "0"]), true, &["node 0"]);
        says(&run(&["mount", mount.to_str().unwrap()]), true, &["mount hugetlbfs"]);
        assert!(numbers()[1].trim().parse::<u64>().unwrap() >= 32);
        assert!(fs::read_to_string("/proc/self/mounts").unwrap().contains(mount.to_str().unwrap()));
        says(&run(&["mount", mount.to_str().unwrap()]), true, &["nothing to do"]);
        let json: serde_json::Value = serde_json::from_slice(&run(&["status", "-o", "json"]).stdout).unwrap();
        assert_eq!(json["changes"].as_array().unwrap().len(), 4, "{json}");
    });
    says(&run(&["undo"]), true, &["undone: mount"]);
    outcome.unwrap();
    assert_eq!(numbers(), before);
    assert_eq!(fs::read_to_string("/proc/self/mounts").unwrap(), mounts_before);
    assert!(!dir.path().join("huge").exists());
}
