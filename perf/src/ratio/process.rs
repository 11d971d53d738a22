//! Processes of an arm: started with their output in a file, put to rest with SIGSTOP, killed when dropped.
//!
//! SPDK's processes poll, so an arm that waits for its turn would take half of its core from the one whose turn it is.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::rpc::{RpcClient, RpcError};

/// Longest start of an SPDK process.
const START_LIMIT: Duration = Duration::from_secs(30);

/// Why a process of an arm does not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    #[error("{program} cannot be started: {source}")]
    Start { program: PathBuf, source: io::Error },
    #[error("{program} did not answer on its RPC socket: {source}. Its output ends:\n{tail}")]
    NotUp { program: PathBuf, source: RpcError, tail: String },
    #[error("signal to process {pid}: {source}")]
    Signal { pid: u32, source: io::Error },
}

/// A process that is ended with us.
pub struct ArmProcess {
    child: Child,
    program: PathBuf,
    log: PathBuf,
}

/// The last lines of a file, for error messages.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

impl ArmProcess {
    /// Starts a program with its output in `log`.
    pub fn start(program: &Path, arguments: &[String], log: &Path) -> Result<Self, ProcessError> {
        let fail = |source| ProcessError::Start { program: program.to_owned(), source };
        let output = File::create(log).map_err(fail)?;
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().map_err(fail)?)
            .stderr(output)
            .spawn()
            .map_err(fail)?;
        Ok(Self { child, program: program.to_owned(), log: log.to_owned() })
    }

    /// Waits until it answers on its JSON-RPC socket.
    pub fn rpc(&mut self, socket: &Path) -> Result<RpcClient, ProcessError> {
        let deadline = Instant::now() + START_LIMIT;
        loop {
            let ended = self.child.try_wait().ok().flatten().is_some();
            match RpcClient::connect(socket) {
                Ok(client) => return Ok(client),
                Err(source) if ended || Instant::now() >= deadline => {
                    return Err(ProcessError::NotUp { program: self.program.clone(), source, tail: self.tail() });
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The end of what it printed.
    pub fn tail(&self) -> String {
        tail(&self.log, 15)
    }

    fn signal(&self, signal: Signal) -> Result<(), ProcessError> {
        signal_process(self.pid(), signal)
    }

    /// Off the CPU, until [`Self::wake`].
    pub fn rest(&self) -> Result<(), ProcessError> {
        self.signal(Signal::STOP)
    }

    pub fn wake(&self) -> Result<(), ProcessError> {
        self.signal(Signal::CONT)
    }
}

impl Drop for ArmProcess {
    fn drop(&mut self) {
        // SIGKILL reaches stopped processes too; a clean end could wait for I/O for ever.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal to a process of ours.
pub fn signal_process(pid: u32, signal: Signal) -> Result<(), ProcessError> {
    let fail = |source| ProcessError::Signal { pid, source };
    let target = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let target = target.ok_or_else(|| fail(io::ErrorKind::InvalidInput.into()))?;
    kill_process(target, signal).map_err(|errno| fail(errno.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state_of(pid: u32) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit(')').next().unwrap().trim().chars().next().unwrap()
    }

    fn wait_for(pid: u32, states: &str) -> bool {
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if states.contains(state_of(pid)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }

    #[test]
    fn process_rests_wakes_and_ends_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let process = ArmProcess::start(Path::new("/bin/sleep"), &["60".to_owned()], &log).unwrap();
        let pid = process.pid();
        process.rest().unwrap();
        assert!(wait_for(pid, "T"));
        process.wake().unwrap();
        assert!(wait_for(pid, "SR"));
        drop(process);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn process_that_ends_at_once_shows_what_it_said() {
        let dir = tempfile::tempdir().unwrap();
        let arguments = ["-c".to_owned(), "echo no such core; exit 3".to_owned()];
        let mut process = ArmProcess::start(Path::new("/bin/sh"), &arguments, &dir.path().join("log")).unwrap();
        let error = process.rpc(&dir.path().join("rpc.sock")).err().unwrap();
        assert!(error.to_string().contains("no such core"), "{error}");
    }

    #[test]
    fn program_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = ArmProcess::start(Path::new("/nonexistent/bdevperf"), &[], &dir.path().join("log")).err().unwrap();
        assert!(error.to_string().contains("/nonexistent/bdevperf"));
    }
}
