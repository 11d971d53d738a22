//! Network namespaces, one a node and one for the client, on one bridge: so that a node can be cut off without anybody being told.
//!
//! Only root can make them. Node N is at 10.77.0.N, the client at 10.77.0.100; nothing of it is seen from elsewhere, and all goes when dropped.

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::process::Command;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const BRIDGE: &str = "bridge0";
const CLIENT: u8 = 100;

/// The namespaces.
pub struct Spaces {
    prefix: String,
    made: Vec<String>,
}

fn ip(arguments: &[&str]) -> io::Result<()> {
    let output = Command::new("ip").args(arguments).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim())))
}

/// Takes the calling thread into a namespace.
pub fn enter(door: &File) -> io::Result<()> {
    Ok(move_into_link_name_space(door.as_fd(), Some(LinkNameSpaceType::Network))?)
}

pub fn address(at: usize) -> IpAddr {
    Ipv4Addr::new(10, 77, 0, at as u8 + 1).into()
}

impl Spaces {
    /// # Errors
    /// Where they cannot be made, as for whoever is not root.
    pub fn new(nodes: usize) -> io::Result<Self> {
        let mut spaces = Self { prefix: format!("penstock-ratio-{}", std::process::id()), made: Vec::new() };
        let host = spaces.add("host")?;
        ip(&["-n", &host, "link", "add", BRIDGE, "type", "bridge"])?;
        ip(&["-n", &host, "addr", "add", &format!("10.77.0.{CLIENT}/24"), "dev", BRIDGE])?;
        ip(&["-n", &host, "link", "set", BRIDGE, "up"])?;
        for at in 0..nodes {
            let (space, port) = (spaces.add(&at.to_string())?, format!("node{at}"));
            ip(&["-n", &space, "link", "add", "eth0", "type", "veth", "peer", "name", &port, "netns", &host])?;
            ip(&["-n", &space, "addr", "add", &format!("{}/24", address(at)), "dev", "eth0"])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
            ip(&["-n", &host, "link", "set", &port, "master", BRIDGE, "up"])?;
        }
        Ok(spaces)
    }

    fn name(&self, what: &str) -> String {
        format!("{}-{what}", self.prefix)
    }

    fn add(&mut self, what: &str) -> io::Result<String> {
        let name = self.name(what);
        ip(&["netns", "add", &name])?;
        self.made.push(name.clone());
        ip(&["-n", &name, "link", "set", "lo", "up"])?;
        Ok(name)
    }

    /// The namespace that a node is to run in.
    pub fn of_node(&self, at: usize) -> String {
        self.name(&at.to_string())
    }

    /// The way into the client's, for [`enter`].
    pub fn door(&self) -> io::Result<File> {
        File::open(format!("/run/netns/{}", self.name("host")))
    }

    /// From here on nothing reaches the node or comes from it, without an error for anybody (`true`); or all does again.
    pub fn cut(&self, at: usize, is_cut: bool) -> io::Result<()> {
        let (host, port) = (self.name("host"), format!("node{at}"));
        let rest: &[&str] = if is_cut { &["nomaster"] } else { &["master", BRIDGE] };
        ip(&[&["-n", &host, "link", "set", &port][..], rest].concat())
    }
}

impl Drop for Spaces {
    fn drop(&mut self) {
        for name in &self.made {
            let _ = ip(&["netns", "del", name]);
        }
    }
}
