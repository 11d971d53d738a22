//! The process that serves a volume to a guest, as scenarios see it: started, killed with SIGKILL, started again.
//! Two kinds exist: SPDK's own target ([`super::spdk_target`]), which shows that the harness is right, and penstockd
//! ([`super::penstock_target`]), which is what is tested. Not here: what a guest does with the volume.

use super::wait::wait_for;
use super::{At, GuestError, Result};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// Which front door a guest uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DoorKind {
    NvmfTcp,
    VhostUserBlk,
}

/// Where the volume is found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Door {
    NvmfTcp { port: u16, nqn: String },
    VhostUserBlk { socket: PathBuf },
}

/// What the volume tells a host about itself, as Linux shows it in sysfs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// `queue/write_cache`: "write through" is the promise that acknowledged means durable.
    pub write_cache: &'static str,
    pub logical_block_size: u32,
    pub discard: bool,
    pub write_zeroes: bool,
}

pub trait Target {
    /// Starts the process and returns when its door is open. Also after [`Target::kill`]: same door, same volume.
    fn start(&mut self) -> Result<()>;
    /// SIGKILL; returns when the process is gone.
    fn kill(&mut self) -> Result<()>;
    fn door(&self) -> Door;
    /// Every path to the volume, where it has several.
    fn doors(&self) -> Vec<Door> {
        vec![self.door()]
    }
    fn identity(&self) -> Identity;
    /// Asked again and again while the guest works and nothing was struck: what serves only as long as it is seen to is seen to here.
    fn attend(&mut self) -> Result<()> {
        Ok(())
    }
    /// What only the target can see is as it should be. Asked when the guest has written all that it will and let go of the volume.
    fn audit(&mut self) -> Result<()> {
        Ok(())
    }
}

/// A child process that can be killed and started again; its output is appended to one file.
pub struct Daemon {
    program: PathBuf,
    arguments: Vec<String>,
    output: PathBuf,
    child: Option<Child>,
}

impl Daemon {
    pub fn new(program: PathBuf, arguments: Vec<String>, output: PathBuf) -> Self {
        Daemon { program, arguments, output, child: None }
    }

    /// What it is started with the next time.
    pub fn arguments(&mut self) -> &mut Vec<String> {
        &mut self.arguments
    }

    pub fn start(&mut self) -> Result<()> {
        assert!(self.child.is_none(), "{} runs already", self.program.display());
        let log = std::fs::File::options().create(true).append(true).open(&self.output).at("open", &self.output)?;
        let for_errors = log.try_clone().at("open", &self.output)?;
        let child = dying_with_us(&self.program)
            .args(&self.arguments)
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(for_errors)
            .spawn()
            .at("start", &self.program)?;
        self.child = Some(child);
        Ok(())
    }

    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().at("kill", &self.program)?;
            child.wait().at("wait for", &self.program)?;
        }
        Ok(())
    }

    /// Asks it to end with SIGTERM.
    pub fn terminate(&mut self) -> Result<()> {
        let id = self.id().ok_or_else(|| GuestError::failed(self.program.display().to_string(), "does not run"))?;
        signal("-TERM", id)
    }

    /// Waits until it has ended by itself; it can be started again then.
    pub fn wait_ended(&mut self, limit: Duration) -> Result<ExitStatus> {
        let name = self.program.display().to_string();
        let child = self.child.as_mut().ok_or_else(|| GuestError::failed(name.clone(), "does not run"))?;
        let program = &self.program;
        let status = wait_for(&format!("the end of {name}"), limit, || child.try_wait().at("look at", program))?;
        self.child = None;
        Ok(status)
    }

    /// Process id, while it was not found ended.
    pub fn id(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// An error if the process has ended by itself.
    pub fn expect_alive(&mut self) -> Result<()> {
        let ended = match &mut self.child {
            Some(child) => child.try_wait().at("look at", &self.program)?.map(|status| status.to_string()),
            None => Some("never started".to_owned()),
        };
        match ended {
            None => Ok(()),
            Some(how) => Err(GuestError::failed(format!("{}", self.program.display()), format!("ended: {how}"))),
        }
    }

    pub fn last_words(&self) -> String {
        let text = std::fs::read(&self.output).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// Sends a signal by way of the program kill: signals are unsafe code.
pub fn signal(which: &str, id: u32) -> Result<()> {
    let kill = Path::new("kill");
    let status = Command::new(kill).arg(which).arg(id.to_string()).status().at("run", kill)?;
    if status.success() { Ok(()) } else { Err(GuestError::failed(format!("kill {which} {id}"), status.to_string())) }
}

/// A command for `program` that the kernel kills when the test dies, however it dies: a test run that is cut short must
/// leave no poller behind. By way of util-linux's setpriv, which executes the program in its own place; without setpriv
/// the program runs all the same.
pub fn dying_with_us(program: &Path) -> Command {
    let setpriv = Path::new("/usr/bin/setpriv");
    if !setpriv.is_file() {
        return Command::new(program);
    }
    let mut command = Command::new(setpriv);
    command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill(); // gone already is what is wanted
    }
}

/// A TCP port of loopback that was free a moment ago, and that nobody else of this process was given. Whoever listens there may be killed and come
/// back: so it is none of those that the kernel takes for connections, which begin at 32768.
pub fn free_port() -> Result<u16> {
    const FIRST: u32 = 20_000;
    const COUNT: u32 = 12_000;
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    // Other test programs begin elsewhere.
    let begin = std::process::id().wrapping_mul(97);
    for _ in 0..COUNT {
        let port = (FIRST + begin.wrapping_add(GIVEN.fetch_add(1, Ordering::Relaxed)) % COUNT) as u16;
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return Ok(port);
        }
    }
    Err(GuestError::failed("a free port", format!("none of {COUNT} from {FIRST} on")))
}
