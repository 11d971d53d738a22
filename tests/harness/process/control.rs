//! penstock-control over several penstockd, and the command penstock that asks it. Not here: the nodes ([`super::cluster`], [`super::fleet`]).

use super::house::{Commands, LIMIT};
use super::program::{Outcome, built, words};
use super::{Result, failed, http};
use crate::guest::target::Daemon;
use crate::guest::wait::wait_for;
use penstock_api::http::{NodeView, VolumeView};
use serde::de::DeserializeOwned;
use std::path::{Path, PathBuf};

pub struct Control {
    daemon: Daemon,
    socket: PathBuf,
    log: PathBuf,
}

impl Control {
    /// With its files in `dir`, of nodes that `--node` says so of.
    pub fn new(dir: &Path, nodes: impl Iterator<Item = String>) -> Result<Self> {
        let (socket, log) = (dir.join("control.sock"), dir.join("control.log"));
        let mut flags = words(&format!("--state-dir {} --listen unix:{} --period-ms 100", dir.join("control").display(), socket.display()));
        nodes.for_each(|node| flags.extend(["--node".to_owned(), node]));
        Ok(Control { daemon: Daemon::new(built("penstock-control")?, flags, log.clone()), socket, log })
    }

    /// Starts it and waits until it sees all nodes.
    pub fn start(&mut self) -> Result<()> {
        self.daemon.start()?;
        let seen = wait_for("control to see all nodes", LIMIT, || {
            self.daemon.expect_alive()?;
            Ok(self.nodes().is_ok_and(|nodes| nodes.iter().all(|node| node.reachable)).then_some(()))
        });
        seen.map_err(|e| failed(e.to_string(), self.last_words()))
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill()
    }

    pub fn commands(&self) -> Commands {
        Commands::at(&self.socket)
    }

    /// Runs the command penstock, which has to succeed.
    pub fn run(&self, command: &str) -> Result<Outcome> {
        let outcome = self.commands().run(command)?;
        if outcome.code == Some(0) { Ok(outcome) } else { Err(failed(format!("penstock {command}"), outcome.said())) }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        let answer = http::request(&self.socket, "GET", path, b"", LIMIT)?;
        serde_json::from_slice(&answer.body).map_err(|e| failed(format!("GET {path}"), format!("{e}: {}", answer.text())))
    }

    pub fn volume(&self, name: &str) -> Result<VolumeView> {
        self.get(&format!("/v1/volumes/{name}"))
    }

    pub fn nodes(&self) -> Result<Vec<NodeView>> {
        self.get("/v1/nodes")
    }

    pub fn log(&self) -> &Path {
        &self.log
    }

    pub fn last_words(&self) -> String {
        format!("--- control ---\n{}\n", self.daemon.last_words())
    }
}
