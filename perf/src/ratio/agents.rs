//! The other end of [`crate::agent`]: an agent process started, shaped and given its turns.

use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use crossbeam_channel::{Receiver, unbounded};
use rustix::process::Signal;
use serde_json::Value;

use super::process::{ProcessError, signal_process, tail};
use crate::agent::{Ask, TurnAnswer, TurnAsk};
use crate::units::Nanos;

/// Longest wait for any answer: a turn takes seconds, a fill a minute.
const ANSWER_LIMIT: Duration = Duration::from_secs(180);

/// Why an agent did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    #[error(transparent)]
    Process(#[from] ProcessError),
    #[error("the load agent did not answer; its output ends:\n{0}")]
    Silent(String),
    #[error("{asked}: {text}")]
    Refused { asked: String, text: String },
}

/// How an agent is started.
#[derive(Debug, Clone, Default)]
pub struct AgentOptions {
    /// Its cores, first the one that calls are answered on.
    pub cores: Vec<u32>,
    pub mem_mib: u32,
    pub hugepages: bool,
    /// Run a node in the agent's process, for volumes without a front door; its sockets and state go here.
    pub node: Option<PathBuf>,
    /// Where other nodes reach that node, and the file with the key that they share.
    pub peers: Option<(SocketAddr, PathBuf)>,
    /// Sleep between events in place of polling: of several processes on one core one may poll at most.
    pub sleeps: bool,
}

/// An agent process.
pub struct Agent {
    child: Child,
    asks: ChildStdin,
    answers: Receiver<String>,
    log: std::path::PathBuf,
}

impl Agent {
    /// Starts one with its log in `log`; returns when SPDK is up in it.
    pub fn start(program: &Path, options: &AgentOptions, log: &Path) -> Result<Self, AgentError> {
        let fail = |source| ProcessError::Start { program: program.to_owned(), source };
        let cores = options.cores.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let mut command = Command::new(program);
        command.args(["agent", "--cores", &cores, "--mem-mib", &options.mem_mib.to_string()]);
        if options.hugepages {
            command.arg("--hugepages");
        }
        if let Some(directory) = &options.node {
            command.arg("--node").arg(directory);
        }
        if let Some((listen, key)) = &options.peers {
            command.args(["--peer-listen", &listen.to_string()]).arg("--cluster-key-file").arg(key);
        }
        if options.sleeps {
            command.arg("--sleep");
        }
        let errors = std::fs::File::create(log).map_err(fail)?;
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(errors).spawn().map_err(fail)?;
        let asks = child.stdin.take().expect("piped");
        let output = child.stdout.take().expect("piped");
        let (tx, answers) = unbounded();
        std::thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                // SPDK and DPDK print to standard output too; answers are JSON objects.
                if line.starts_with('{') && tx.send(line).is_err() {
                    break;
                }
            }
        });
        let mut agent = Self { child, asks, answers, log: log.to_owned() };
        agent.rpc("spdk_get_version", &Value::Null)?; // up and answering
        Ok(agent)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn ask(&mut self, ask: &Ask, asked: &str) -> Result<Value, AgentError> {
        let line = serde_json::to_string(ask).expect("asks have an encoding");
        let silent = |agent: &Self| AgentError::Silent(tail(&agent.log, 15));
        if writeln!(self.asks, "{line}").and_then(|()| self.asks.flush()).is_err() {
            return Err(silent(self));
        }
        let answer = self.answers.recv_timeout(ANSWER_LIMIT).map_err(|_| silent(self))?;
        let answer: Value = serde_json::from_str(&answer).map_err(|_| silent(self))?;
        match answer.get("error") {
            Some(text) => Err(AgentError::Refused { asked: asked.to_owned(), text: text.as_str().unwrap_or("no reason given").to_owned() }),
            None => Ok(answer["ok"].clone()),
        }
    }

    /// A JSON-RPC call to SPDK in the agent.
    pub fn rpc(&mut self, method: &str, params: &Value) -> Result<Value, AgentError> {
        self.ask(&Ask::Rpc { method: method.to_owned(), params: params.clone() }, method)
    }

    /// A device in memory that answers after `delay`; another delay for it, if there is one.
    pub fn memory(&mut self, name: &str, bytes: u64, delay: Nanos) -> Result<(), AgentError> {
        self.ask(&Ask::Memory { name: name.to_owned(), bytes, delay }, "memory").map(drop)
    }

    /// One turn of load. Failed operations are an error: no ratio is made of those.
    pub fn turn(&mut self, turn: &TurnAsk) -> Result<TurnAnswer, AgentError> {
        let answer = self.ask(&Ask::Turn(turn.clone()), "turn")?;
        let answer: TurnAnswer =
            serde_json::from_value(answer).map_err(|error| AgentError::Refused { asked: "turn".to_owned(), text: error.to_string() })?;
        match &answer.first_error {
            Some(text) => Err(AgentError::Refused { asked: "turn".to_owned(), text: format!("{} × {text}", answer.errors) }),
            None => Ok(answer),
        }
    }

    pub fn rest(&self) -> Result<(), ProcessError> {
        signal_process(self.pid(), Signal::STOP)
    }

    pub fn wake(&self) -> Result<(), ProcessError> {
        signal_process(self.pid(), Signal::CONT)
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
