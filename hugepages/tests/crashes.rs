//! Whatever is changed is taken back: in full runs, after a death of the process at any step of making or unmaking,
//! with a torn journal, and beside changes of others.

mod machine;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Once;

use machine::{BLANK, Death, Died, FakeKernel, IN_UIO, build, pci, snapshot};
use penstock_hugepages::change::Change;
use penstock_hugepages::journal::{Journal, make_all, unmake_all};
use penstock_hugepages::kernel::Kernel;
use penstock_hugepages::plan::{self, DriverChoice};
use penstock_hugepages::size::Bytes;
use penstock_hugepages::{Outcome, Problem};
use proptest::prelude::*;

fn journal_path(root: &Path) -> PathBuf {
    root.join("run/journal")
}

/// Everything that can be changed, in one go: pages on two nodes, directories, a mount, two drives.
fn make_everything(kernel: &mut FakeKernel, root: &Path) -> Outcome<()> {
    let mut changes = plan::reserve(kernel, Bytes(64 << 20), None, &[])?;
    changes.extend(plan::mount(kernel, "/mnt/huge/pages", None)?);
    changes.extend(plan::bind(kernel, &[pci(BLANK), pci(IN_UIO)], DriverChoice::VfioPci, &[])?);
    assert_eq!(changes.len(), 2 + 3 + 2, "{changes:?}");
    let mut journal = Journal::open(&journal_path(root), kernel)?;
    make_all(kernel, &mut journal, &changes, |_| {})
}

fn undo(kernel: &mut FakeKernel, root: &Path) -> Outcome<usize> {
    let mut journal = Journal::open(&journal_path(root), kernel)?;
    let standing = journal.standing();
    unmake_all(kernel, &mut journal, standing, |_| {})
}

/// Runs `what`; true if the process died in it, and else all went well.
fn died(what: impl FnOnce() -> Result<(), Problem>) -> bool {
    // A death is not worth a backtrace; every other panic is.
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let loud = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !info.payload().is::<Died>() {
                loud(info);
            }
        }));
    });
    match catch_unwind(AssertUnwindSafe(what)) {
        Ok(outcome) => {
            outcome.unwrap();
            false
        }
        Err(payload) if payload.is::<Died>() => true,
        Err(payload) => std::panic::resume_unwind(payload),
    }
}

#[test]
fn everything_made_is_as_wanted_and_undo_brings_back_what_was() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let before = snapshot(root.path());
    let mut kernel = FakeKernel::at(root.path());
    make_everything(&mut kernel, root.path()).unwrap();

    for node in 0..2 {
        let dir = format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB");
        assert_eq!(kernel.read(&format!("{dir}/free_hugepages")).unwrap(), "32\n");
        assert_eq!(kernel.read(&format!("{dir}/nr_hugepages")).unwrap(), "33\n", "the page in use stays so");
    }
    assert!(kernel.read("/proc/self/mounts").unwrap().contains("/mnt/huge/pages hugetlbfs"));
    for address in [BLANK, IN_UIO] {
        assert_eq!(kernel.link(&format!("/sys/bus/pci/devices/{address}/driver")).as_deref(), Some("vfio-pci"));
    }
    let again = plan::reserve(&kernel, Bytes(64 << 20), None, &[]).unwrap();
    assert_eq!(again, [], "asked again, nothing is to be done");
    assert_eq!(plan::mount(&kernel, "/mnt/huge/pages/", None).unwrap(), []);
    assert_eq!(plan::bind(&kernel, &[pci(BLANK)], DriverChoice::Auto, &[]).unwrap(), []);

    assert_eq!(undo(&mut kernel, root.path()).unwrap(), 7);
    assert_eq!(snapshot(root.path()), before);
    assert_eq!(fs::metadata(journal_path(root.path())).unwrap().len(), 0, "an undone journal is empty");
    assert_eq!(undo(&mut kernel, root.path()).unwrap(), 0);
}

#[test]
fn death_at_any_step_of_making_is_undone() {
    let mut deaths = 0;
    for step in 0.. {
        let mut died_here = false;
        for after in [false, true] {
            let root = tempfile::tempdir().unwrap();
            build(root.path());
            let before = snapshot(root.path());
            let mut kernel = FakeKernel::at(root.path());
            kernel.death = Some(Death { step, after });
            died_here = died(|| make_everything(&mut kernel, root.path()));
            undo(&mut FakeKernel::at(root.path()), root.path()).unwrap();
            assert_eq!(snapshot(root.path()), before, "died at step {step}, after it took effect: {after}");
        }
        if !died_here {
            break;
        }
        deaths += 1;
    }
    // 2 pools, 2 directories, a mount, and two drives of 3 steps each.
    assert_eq!(deaths, 11);
}

#[test]
fn death_at_any_step_of_undoing_is_undone_by_the_next_undo() {
    for step in 0.. {
        let root = tempfile::tempdir().unwrap();
        build(root.path());
        let before = snapshot(root.path());
        make_everything(&mut FakeKernel::at(root.path()), root.path()).unwrap();
        let mut kernel = FakeKernel::at(root.path());
        kernel.death = Some(Death { step, after: step % 2 == 0 });
        let died_here = died(|| undo(&mut kernel, root.path()).map(|_| ()));
        undo(&mut FakeKernel::at(root.path()), root.path()).unwrap();
        assert_eq!(snapshot(root.path()), before, "died at step {step}");
        if !died_here {
            assert!(step > 10);
            break;
        }
    }
}

#[test]
fn journal_torn_anywhere_is_still_a_journal() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    make_everything(&mut FakeKernel::at(root.path()), root.path()).unwrap();
    let whole = fs::read(journal_path(root.path())).unwrap();
    let kernel = FakeKernel::at(root.path());
    let torn = root.path().join("run/torn");
    for len in 0..=whole.len() {
        fs::write(&torn, &whole[..len]).unwrap();
        let lines = whole[..len].iter().filter(|&&b| b == b'\n').count();
        let mut journal = Journal::open(&torn, &kernel).unwrap();
        assert_eq!(journal.standing().len(), lines.saturating_sub(1), "cut at {len}");
        // And it goes on from there.
        journal.intend(&Change::Directory { path: "/x".into() }).unwrap();
        drop(journal);
        assert_eq!(Journal::peek(&torn, &kernel).unwrap().len(), lines.saturating_sub(1) + 1, "cut at {len}");
    }
}

#[test]
fn journal_of_another_boot_is_void() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let mut kernel = FakeKernel::at(root.path());
    make_everything(&mut kernel, root.path()).unwrap();
    fs::write(root.path().join("proc/sys/kernel/random/boot_id"), "boot-2\n").unwrap();
    let after_boot = snapshot(root.path());
    assert_eq!(Journal::peek(&journal_path(root.path()), &kernel).unwrap(), []);
    assert_eq!(undo(&mut kernel, root.path()).unwrap(), 0);
    assert_eq!(snapshot(root.path()), after_boot);
}

#[test]
fn journal_that_is_not_understood_is_refused_and_left_alone() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let kernel = FakeKernel::at(root.path());
    fs::create_dir(root.path().join("run")).unwrap();
    for text in ["hello\n", "{\"journal\":{\"version\":2,\"boot_id\":\"boot-1\"}}\n"] {
        fs::write(journal_path(root.path()), text).unwrap();
        let problem = Journal::open(&journal_path(root.path()), &kernel).unwrap_err();
        assert!(problem.what.contains("journal"), "{problem}");
        assert_eq!(fs::read_to_string(journal_path(root.path())).unwrap(), text);
    }
}

#[test]
fn two_runs_at_once_are_refused() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let kernel = FakeKernel::at(root.path());
    let first = Journal::open(&journal_path(root.path()), &kernel).unwrap();
    let problem = Journal::open(&journal_path(root.path()), &kernel).unwrap_err();
    assert!(problem.what.contains("another penstock-hugepages"), "{problem}");
    drop(first);
    Journal::open(&journal_path(root.path()), &kernel).unwrap();
}

#[test]
fn change_that_fails_takes_its_run_back() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let before = snapshot(root.path());

    let mut kernel = FakeKernel::at(root.path());
    kernel.page_limit = 20;
    let problem = make_everything(&mut kernel, root.path()).unwrap_err();
    assert!(problem.what.contains("gave only 20 of 33"), "{problem}");
    assert!(problem.next.contains("compact_memory"), "{problem}");
    assert_eq!(snapshot(root.path()), before);

    let mut kernel = FakeKernel::at(root.path());
    kernel.stubborn_driver = Some("vfio-pci");
    let problem = make_everything(&mut kernel, root.path()).unwrap_err();
    assert!(problem.what.contains("vfio-pci did not take drive 0000:00:04.0"), "{problem}");
    assert_eq!(snapshot(root.path()), before);
    assert_eq!(Journal::peek(&journal_path(root.path()), &kernel).unwrap(), []);
}

#[test]
fn earlier_runs_stand_when_a_later_one_fails() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let before = snapshot(root.path());
    let mut kernel = FakeKernel::at(root.path());
    let first = plan::reserve(&kernel, Bytes(16 << 20), None, &[1]).unwrap();
    let run = |kernel: &mut FakeKernel, changes: &[Change]| {
        let mut journal = Journal::open(&journal_path(root.path()), kernel)?;
        make_all(kernel, &mut journal, changes, |_| {})
    };
    run(&mut kernel, &first).unwrap();
    let between = snapshot(root.path());
    kernel.page_limit = 10;
    let second = plan::reserve(&kernel, Bytes(64 << 20), None, &[]).unwrap();
    run(&mut kernel, &second).unwrap_err();
    assert_eq!(snapshot(root.path()), between);
    assert_eq!(undo(&mut kernel, root.path()).unwrap(), 1);
    assert_eq!(snapshot(root.path()), before);
}

#[test]
fn what_others_changed_meanwhile_stays() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let mut kernel = FakeKernel::at(root.path());
    make_everything(&mut kernel, root.path()).unwrap();
    // Ten more pages by somebody else, a file beside our mount point, and a drive pulled out.
    let pool = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB";
    kernel.write(&format!("{pool}/nr_hugepages"), "43\n").unwrap();
    fs::write(root.path().join("mnt/huge/theirs"), "x").unwrap();
    fs::remove_dir_all(root.path().join("sys/bus/pci/devices").join(IN_UIO)).unwrap();
    assert_eq!(undo(&mut kernel, root.path()).unwrap(), 7);
    assert_eq!(kernel.read(&format!("{pool}/nr_hugepages")).unwrap(), "13\n", "3 before, 10 of theirs");
    assert!(root.path().join("mnt/huge/theirs").exists());
    assert!(!root.path().join("mnt/huge/pages").exists());
}

#[test]
fn pages_in_use_are_named_and_undone_later() {
    let root = tempfile::tempdir().unwrap();
    build(root.path());
    let before = snapshot(root.path());
    let mut kernel = FakeKernel::at(root.path());
    make_everything(&mut kernel, root.path()).unwrap();
    let free = root.path().join("sys/devices/system/node/node1/hugepages/hugepages-2048kB/free_hugepages");
    fs::write(&free, "5\n").unwrap();
    let problem = undo(&mut kernel, root.path()).unwrap_err();
    assert!(problem.what.contains("node 1 still has 28 hugepages instead of 3"), "{problem}");
    assert_eq!(Journal::peek(&journal_path(root.path()), &kernel).unwrap().len(), 1, "the others are undone");
    fs::write(&free, "27\n").unwrap();
    assert_eq!(undo(&mut kernel, root.path()).unwrap(), 1);
    assert_eq!(snapshot(root.path()), before);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_a_journal_or_an_error(text in prop::collection::vec(any::<u8>(), 0..400)) {
        let root = tempfile::tempdir().unwrap();
        build(root.path());
        fs::create_dir(root.path().join("run")).unwrap();
        fs::write(journal_path(root.path()), &text).unwrap();
        let _ = Journal::peek(&journal_path(root.path()), &FakeKernel::at(root.path()));
    }

    /// Deaths in making and in undoing, any number of them, end where it began.
    #[test]
    fn any_deaths_end_where_it_began(deaths in prop::collection::vec((0u32..12, any::<bool>()), 1..5)) {
        let root = tempfile::tempdir().unwrap();
        build(root.path());
        let before = snapshot(root.path());
        for (n, (step, after)) in deaths.into_iter().enumerate() {
            let mut kernel = FakeKernel::at(root.path());
            kernel.death = Some(Death { step, after });
            if n == 0 {
                died(|| make_everything(&mut kernel, root.path()));
            } else {
                died(|| undo(&mut kernel, root.path()).map(|_| ()));
            }
        }
        undo(&mut FakeKernel::at(root.path()), root.path()).unwrap();
        prop_assert_eq!(snapshot(root.path()), before);
    }
}
