//! One node and its control on this host: penstockd, penstock-control and the command penstock, with sockets, state, logs
//! and drives in one temporary directory. Logs of a test that failed are kept. Not here: what volumes hold ([`super::ledger`]).

use super::http::{self, Answer};
use super::perf::PerfTarget;
use super::program::{self, Outcome, built};
use super::turn::Turn;
use super::{Result, failed};
use crate::guest::initiator::Namespace;
use crate::guest::rpc::ask_json;
use crate::guest::target::{Daemon, free_port};
use crate::guest::wait::wait_for;
use penstock_api::http::NodeView;
use penstock_api::rpc::{
    DriveInfo, DriveList, DriveState, Empty, Method, NodeGet, Response, RpcError, VolumeInfo, VolumeList, VolumeState, decode_response,
};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

/// Far more than anything takes, on a machine that is busy with other things too.
pub const LIMIT: Duration = Duration::from_secs(60);
/// More than the longest that the command penstock waits by itself, so that it is the one that says what did not happen.
const COMMAND_LIMIT: Duration = Duration::from_secs(180);

/// How a house is built.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Another penstockd than the one that was built beside the tests.
    pub program: Option<PathBuf>,
    /// As penstockd's `--cores` takes them.
    pub cores: &'static str,
    pub poll: &'static str,
    /// Further flags of penstockd.
    pub flags: Vec<String>,
    /// Without it penstockd is alone.
    pub control: bool,
    /// How often control looks at the node; by default its own default is too slow for tests.
    pub period_ms: u32,
    /// Started with file size limits that can be lowered later, and without dying of reaching one.
    pub survives_file_limit: bool,
}

impl Default for Plan {
    fn default() -> Self {
        Plan { program: None, cores: "0", poll: "adaptive", flags: Vec::new(), control: true, period_ms: 100, survives_file_limit: false }
    }
}

/// A volume's NVMe/TCP door.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpDoor {
    pub address: SocketAddr,
    pub nqn: String,
}

impl TcpDoor {
    pub fn connect(&self) -> Result<Namespace> {
        Namespace::connect(self.address, &self.nqn)
    }

    pub fn perf_target(&self) -> PerfTarget {
        PerfTarget::nvmf(self.address.port(), &self.nqn)
    }
}

/// The command penstock, pointed at one control.
#[derive(Debug, Clone)]
pub struct Commands {
    api: String,
}

impl Commands {
    /// Of the control that listens at `socket`.
    pub fn at(socket: &Path) -> Self {
        Commands { api: format!("unix:{}", socket.display()) }
    }

    pub fn run(&self, command: &str) -> Result<Outcome> {
        let mut arguments = vec!["--api".to_owned(), self.api.clone()];
        arguments.extend(program::words(command));
        program::run(&built("penstock")?, &arguments, COMMAND_LIMIT)
    }
}

pub struct House {
    // Ended first, then the directory goes, then another test has its turn.
    node: Daemon,
    control: Option<Daemon>,
    dir: tempfile::TempDir,
    port: u16,
    _turn: Turn,
}

impl House {
    /// Builds and starts one with control over a single core that sleeps when idle.
    pub fn new() -> Result<Self> {
        Self::with(Plan::default())
    }

    pub fn with(plan: Plan) -> Result<Self> {
        let turn = Turn::wait()?;
        let dir = tempfile::Builder::new().prefix("penstock-").tempdir().map_err(|e| failed("temporary directory", e.to_string()))?;
        let root = dir.path().display();
        let mut flags = program::words(&format!("--run-dir {root}/run --state-dir {root}/state --no-huge"));
        flags.extend(["--cores".into(), plan.cores.into(), "--poll".into(), plan.poll.into()]);
        flags.extend(plan.flags);
        let penstockd = plan.program.map_or_else(|| built("penstockd"), Ok)?;
        let log = dir.path().join("penstockd.log");
        let node = if plan.survives_file_limit {
            // The signal of a file limit ends a process unless it is ignored, and exec hands that on.
            let script = "trap '' XFSZ; exec \"$0\" \"$@\"".to_owned();
            let arguments = ["-c".to_owned(), script, penstockd.display().to_string()].into_iter().chain(flags).collect();
            Daemon::new("/bin/sh".into(), arguments, log)
        } else {
            Daemon::new(penstockd, flags, log)
        };
        let control = if plan.control {
            let flags = format!(
                "--state-dir {root}/control --node-socket {root}/run/penstockd.sock --listen unix:{root}/control.sock --period-ms {}",
                plan.period_ms
            );
            Some(Daemon::new(built("penstock-control")?, program::words(&flags), dir.path().join("control.log")))
        } else {
            None
        };
        let mut house = House { node, control, dir, port: free_port()?, _turn: turn };
        house.start_node()?;
        house.start_control()?;
        Ok(house)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn rpc_socket(&self) -> PathBuf {
        self.path("run/penstockd.sock")
    }

    pub fn api_socket(&self) -> PathBuf {
        self.path("control.sock")
    }

    pub fn node(&mut self) -> &mut Daemon {
        &mut self.node
    }

    /// Starts penstockd and waits until it answers.
    pub fn start_node(&mut self) -> Result<()> {
        let socket = self.rpc_socket();
        start_answering(&mut self.node, &socket)
    }

    /// Starts penstock-control, if the house has one, and waits until it answers.
    pub fn start_control(&mut self) -> Result<()> {
        let socket = self.api_socket();
        let Some(control) = &mut self.control else { return Ok(()) };
        control.start()?;
        let answered = wait_for("penstock-control to answer", LIMIT, || {
            control.expect_alive()?;
            let answer = http::request(&socket, "GET", "/healthz", b"", LIMIT);
            Ok(answer.is_ok_and(|answer| answer.status == 200).then_some(()))
        });
        answered.map_err(|e| failed(e.to_string(), format!("\n--- penstock-control said ---\n{}", control.last_words())))
    }

    pub fn kill_node(&mut self) -> Result<()> {
        self.node.kill()
    }

    pub fn kill_control(&mut self) -> Result<()> {
        self.control.as_mut().map_or(Ok(()), Daemon::kill)
    }

    /// SIGTERM to penstockd; answers how it ended.
    pub fn stop_node(&mut self) -> Result<ExitStatus> {
        self.node.terminate()?;
        self.node.wait_ended(LIMIT).map_err(|e| failed(e.to_string(), self.node.last_words()))
    }

    pub fn stop_control(&mut self) -> Result<ExitStatus> {
        let control = self.control.as_mut().ok_or_else(|| failed("penstock-control", "this house has none"))?;
        control.terminate()?;
        control.wait_ended(LIMIT)
    }

    /// Both processes run and answer.
    pub fn expect_alive(&mut self) -> Result<()> {
        self.node.expect_alive().map_err(|e| failed(e.to_string(), self.node.last_words()))?;
        let alive = self.rpc::<NodeGet>(&Empty {}).map(drop);
        alive.map_err(|e| failed(format!("penstockd: {e}"), self.node.last_words()))?;
        let Some(control) = &mut self.control else { return Ok(()) };
        control.expect_alive().map_err(|e| failed(e.to_string(), control.last_words()))?;
        http::request(&self.api_socket(), "GET", "/healthz", b"", LIMIT).map(drop)
    }

    /// Calls a method of penstockd.
    pub fn rpc<M: Method>(&self, params: &M::Params) -> std::result::Result<M::Result, RpcError> {
        try_rpc::<M>(&self.rpc_socket(), params)
    }

    /// The command penstock of this house, for threads that have it while the house is changed.
    pub fn commands(&self) -> Commands {
        Commands::at(&self.api_socket())
    }

    /// Runs the command penstock.
    pub fn cli(&self, command: &str) -> Result<Outcome> {
        self.commands().run(command)
    }

    /// Runs the command penstock, which has to succeed.
    #[track_caller]
    pub fn did(&self, command: &str) -> Outcome {
        let outcome = self.cli(command).unwrap_or_else(|e| panic!("penstock {command}: {e}"));
        let logs =
            || format!("penstock {command}\n--- penstockd ---\n{}\n--- control ---\n{}", self.node.last_words(), self.control_words());
        if outcome.code == Some(0) { outcome } else { outcome.expect_ok(&logs()) }
    }

    /// As [`Self::did`], with `-o json`.
    #[track_caller]
    pub fn asked(&self, command: &str) -> Value {
        let outcome = self.did(&format!("-o json {command}"));
        serde_json::from_str(&outcome.out).unwrap_or_else(|e| panic!("penstock -o json {command}: {e}: {}", outcome.out))
    }

    /// Runs the command penstock, which has to refuse, and answers what it said.
    #[track_caller]
    pub fn refused(&self, command: &str) -> String {
        let outcome = self.cli(command).unwrap_or_else(|e| panic!("penstock {command}: {e}"));
        assert_eq!(outcome.code, Some(1), "penstock {command} is to be refused: {}", outcome.said());
        outcome.err
    }

    fn control_words(&self) -> String {
        self.control.as_ref().map(Daemon::last_words).unwrap_or_default()
    }

    /// A request to control's API.
    pub fn http(&self, method: &str, path: &str, body: &[u8]) -> Result<Answer> {
        http::request(&self.api_socket(), method, path, body, LIMIT)
    }

    /// Waits until control sees what it desires.
    pub fn settle(&self) -> Result<()> {
        let mut last = String::new();
        let settled = wait_for("desired and observed to agree", LIMIT, || {
            let Ok(answer) = self.http("GET", "/v1/node", b"") else { return Ok(None) };
            last = answer.text();
            let view: NodeView = serde_json::from_slice(&answer.body).map_err(|e| failed("GET /v1/node", format!("{e}: {last}")))?;
            Ok((view.settled && view.reachable).then_some(()))
        });
        settled.map_err(|e| failed(e.to_string(), format!("{last}\n{}\n{}", self.control_words(), self.node.last_words())))
    }

    pub fn drives(&self) -> Result<Vec<DriveInfo>> {
        self.rpc::<DriveList>(&Empty {}).map_err(|e| failed("drives", e.to_string()))
    }

    /// What the node says of the drive at `path`, which is one of its.
    pub fn drive_at(&self, path: &Path) -> DriveInfo {
        let place = path.display().to_string();
        self.drives().unwrap().into_iter().find(|drive| drive.spec.to_string().contains(&place)).expect("the drive is listed")
    }

    /// The same, once it is open or given up.
    pub fn settled_drive(&self, path: &Path) -> DriveInfo {
        let settled = || Ok(Some(self.drive_at(path)).filter(|drive| drive.state != DriveState::Opening));
        wait_for("the drive to be open or given up", LIMIT, settled).unwrap()
    }

    pub fn volumes(&self) -> Result<Vec<VolumeInfo>> {
        self.rpc::<VolumeList>(&Empty {}).map_err(|e| failed("volumes", e.to_string()))
    }

    pub fn volume(&self, name: &str) -> Result<VolumeInfo> {
        let found = self.volumes()?.into_iter().find(|volume| volume.name.to_string() == name);
        found.ok_or_else(|| failed(format!("volume {name}"), "the node has none of that name"))
    }

    /// The port of this house's NVMe/TCP doors.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Adds a file drive `NAME.img`; `more` are further flags of `pool add`. Answers the image's path.
    #[track_caller]
    pub fn add_drive(&self, name: &str, size: &str, more: &str) -> PathBuf {
        let path = self.path(&format!("{name}.img"));
        self.did(&format!("pool add file:{}?size={size} {more}", path.display()));
        path
    }

    /// Creates a volume with blocks of `block` bytes and opens its NVMe/TCP door.
    #[track_caller]
    pub fn add_volume(&self, name: &str, size: &str, block: u32) -> TcpDoor {
        self.did(&format!("volume create {name} {size} --block-size {block}"));
        self.did(&format!("volume export {name} --nvmf=127.0.0.1:{}", self.port));
        self.wait_for_door(name).unwrap_or_else(|e| panic!("{e}"))
    }

    /// Waits until a volume serves through its NVMe/TCP door.
    pub fn wait_for_door(&self, name: &str) -> Result<TcpDoor> {
        let mut last = String::new();
        let found = wait_for(&format!("volume {name} to serve through its door"), LIMIT, || match self.volume(name) {
            Ok(volume) => {
                last = format!("{volume:?}");
                let nqn = volume.exports.iter().find_map(|export| export.nqn.clone().map(|nqn| (nqn, export.address.clone())));
                let serving = volume.state == VolumeState::Serving;
                let Some((nqn, address)) = nqn.filter(|_| serving) else { return Ok(None) };
                let address = address.parse().map_err(|e| failed(address, format!("{e}")))?;
                Ok(Some(TcpDoor { address, nqn: nqn.to_string() }))
            }
            Err(why) => {
                last = why.to_string();
                Ok(None)
            }
        });
        found.map_err(|e| failed(e.to_string(), format!("{last}\n{}", self.node.last_words())))
    }
}

/// Starts a penstockd and waits until it answers calls at `socket`, which is before its drives are open.
pub(super) fn start_answering(node: &mut Daemon, socket: &Path) -> Result<()> {
    node.start()?;
    let mut last = String::new();
    let answered = wait_for("penstockd to answer", LIMIT, || {
        node.expect_alive()?;
        match try_rpc::<NodeGet>(socket, &Empty {}) {
            Ok(_) => Ok(Some(())),
            Err(why) => {
                last = why.to_string(); // the socket of a killed predecessor refuses at first
                Ok(None)
            }
        }
    });
    answered.map_err(|e| failed(e.to_string(), format!("{last}\n--- penstockd said ---\n{}", node.last_words())))
}

/// Calls a method of the penstockd at `socket`.
pub fn try_rpc<M: Method>(socket: &Path, params: &M::Params) -> std::result::Result<M::Result, RpcError> {
    let broken = |why: String| RpcError { code: 0, message: why, data: None };
    let params = serde_json::to_value(params).map_err(|e| broken(e.to_string()))?;
    let answer = ask_json(socket, M::NAME, params, LIMIT).map_err(|e| broken(e.to_string()))?;
    let response: Response = serde_json::from_value(answer).map_err(|e| broken(e.to_string()))?;
    decode_response::<M>(response)
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = self.kill_control();
        let _ = self.kill_node();
        if !std::thread::panicking() {
            return;
        }
        let keep = std::env::temp_dir().join(format!("penstock-test-logs-{}", std::process::id()));
        let _ = std::fs::create_dir_all(&keep);
        for name in ["penstockd.log", "control.log"] {
            let kept = keep.join(format!("{}-{name}", self.port));
            if std::fs::copy(self.path(name), &kept).is_ok() {
                eprintln!("kept {}", kept.display());
            }
        }
        eprintln!("--- penstockd said last ---\n{}\n--- penstock-control ---\n{}", self.node.last_words(), self.control_words());
    }
}
