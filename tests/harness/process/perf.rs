//! penstock-perf against a door of a house: loads with a journal, and the judgement of a journal.

use super::house::TcpDoor;
use super::program::{self, Outcome, Running, built};
use super::{Result, failed};
use serde_json::Value;
use std::path::Path;
use std::time::Duration;

/// Start of SPDK, the load of a few seconds, and reading all back, on a busy machine.
const LIMIT: Duration = Duration::from_secs(120);

/// What a load is aimed at, as penstock-perf is told.
#[derive(Debug, Clone)]
pub struct PerfTarget(pub String);

impl PerfTarget {
    pub fn nvmf(port: u16, nqn: &str) -> Self {
        PerfTarget(format!("nvmf:tcp:127.0.0.1:{port}:{nqn}"))
    }
}

/// Starts `penstock-perf run` with a journal; `more` are further flags.
pub fn start_run(target: &PerfTarget, journal: &Path, more: &str) -> Result<Running> {
    let mut arguments = program::words("run --quiet --mem-mib 512 --initial zero --target");
    arguments.push(target.0.clone());
    arguments.extend(["--journal".to_owned(), journal.display().to_string()]);
    arguments.extend(program::words(more));
    program::start(&built("penstock-perf")?, &arguments, &[])
}

/// As [`start_run`], over all of a volume's doors: the load goes on while one of them is served.
pub fn start_run_over(doors: &[TcpDoor], journal: &Path, more: &str) -> Result<Running> {
    start_run(&doors[0].perf_target(), journal, &format!("{} {more}", paths(doors)))
}

fn paths(doors: &[TcpDoor]) -> String {
    doors.iter().map(|door| format!("--path {} ", door.address)).collect()
}

/// Longer than any test: what of [`LASTING`] is wanted ends by [`stop`].
pub const LASTING: &str = "--duration 3600s --no-final-pass";

/// Ends a run that has lasted long enough: what is outstanding is finished.
pub fn stop(mut running: Running) -> Result<Outcome> {
    running.interrupt()?;
    finish(running)
}

/// The end of a run that was started.
pub fn finish(running: Running) -> Result<Outcome> {
    running.wait(LIMIT)
}

/// `penstock-perf verify`: whether all was good, and its report.
pub fn verify(target: &PerfTarget, journal: &Path) -> Result<(bool, Value)> {
    verify_with(target, journal, "")
}

/// The same over all of a volume's doors.
pub fn verify_over(doors: &[TcpDoor], journal: &Path) -> Result<(bool, Value)> {
    verify_with(&doors[0].perf_target(), journal, &paths(doors))
}

fn verify_with(target: &PerfTarget, journal: &Path, more: &str) -> Result<(bool, Value)> {
    let mut arguments = program::words(&format!("verify --quiet --mem-mib 512 --json - {more} --target"));
    arguments.push(target.0.clone());
    arguments.extend(["--journal".to_owned(), journal.display().to_string()]);
    let outcome = program::run(&built("penstock-perf")?, &arguments, LIMIT)?;
    let report = serde_json::from_str(&outcome.out);
    match (outcome.code, report) {
        (Some(0), Ok(report)) => Ok((true, report)),
        (Some(1), Ok(report)) => Ok((false, report)),
        _ => Err(failed("penstock-perf verify", format!("{:?}: {}", outcome.code, outcome.said()))),
    }
}
