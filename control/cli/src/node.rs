//! `penstock node …`, `penstock id new`.

use std::time::{Duration, Instant};

use penstock_api::http::{IdsBody, IdsView, NodeRemovedView, NodeView, path};

use crate::args::{IdCommand, Node};
use crate::client::{self, Client};
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::replica;

pub fn run(client: &Client, form: Form, command: Node) -> Result<(), Failure> {
    match command {
        Node::Ls => {
            let views: Vec<NodeView> = client.get(path::NODES)?;
            output::show(form, &views, |views| table(views))
        }
        Node::Show { node } => {
            let at = node.as_deref().map(checked).transpose()?.map_or_else(|| path::NODE.to_owned(), path::node);
            let view: NodeView = client.get(&at)?;
            output::show(form, &view, facts)
        }
        Node::Rm { node, force, wait } => {
            let removed: NodeRemovedView = client.delete(&path::node(checked(&node)?), force)?.json()?;
            // One limit for all of them.
            let until = Instant::now() + Duration::from_secs(wait.timeout);
            for volume in &removed.replaced {
                replica::until_changed(client, volume.as_str(), until.saturating_duration_since(Instant::now()))?;
            }
            output::show(form, &removed, |removed| match removed.replaced.len() {
                0 => format!("removed node {}", removed.name),
                count => format!("removed node {}, and replaced its replicas of {count} volumes", removed.name),
            })
        }
    }
}

/// A node is named by its name or id; anything else would change the path that is asked for.
fn checked(node: &str) -> Result<&str, Failure> {
    client::checked::<penstock_api::NodeName, penstock_api::NodeId>(node, "node", "see `penstock node ls`")
}

/// `there`, or why not.
fn state(view: &NodeView) -> String {
    match (&view.unreachable_reason, view.reachable) {
        (_, true) => "there".to_owned(),
        (Some(reason), false) => format!("away: {reason}"),
        (None, false) => "away".to_owned(),
    }
}

/// Nodes that it hears, of those that it knows; what one that is away said last is no answer.
fn peers(view: &NodeView) -> String {
    if !view.reachable {
        return "-".to_owned();
    }
    let known = view.node.as_ref().map(|node| node.peers.as_slice()).unwrap_or_default();
    match known.len() {
        0 => "-".to_owned(),
        count => format!("{} of {count}", known.iter().filter(|peer| peer.connected).count()),
    }
}

fn table(views: &[NodeView]) -> String {
    let row = |view: &NodeView| {
        let node = view.node.as_ref();
        let agreed = if view.settled { "yes".to_owned() } else { format!("no: {} things", view.unsettled.len().max(1)) };
        vec![
            view.name.to_string(),
            output::or_dash(view.node_id.map(|id| id.to_string())),
            output::or_dash(view.peer_address.map(|at| at.to_string())),
            output::or_dash(view.nvmf_address.map(|at| at.to_string())),
            output::or_dash(node.map(|node| node.drives.to_string())),
            output::or_dash(node.map(|node| node.volumes.to_string())),
            peers(view),
            agreed,
            state(view),
        ]
    };
    let header = ["NODE", "ID", "PEER", "NVMF", "DRIVES", "VOLUMES", "CONNECTED", "AGREED", "STATE"];
    output::table(&header, &[4, 5], views.iter().map(row).collect())
}

pub fn run_id(client: &Client, form: Form, command: IdCommand) -> Result<(), Failure> {
    match command {
        IdCommand::New { count } => {
            let view: IdsView = client.send("POST", path::IDS, &IdsBody { count })?.json()?;
            output::show(form, &view, |view| view.ids.iter().map(|id| format!("{id}\n")).collect())
        }
    }
}

fn facts(view: &NodeView) -> String {
    let mut rows = vec![
        ("name", view.name.to_string()),
        ("cluster", output::or_dash(view.cluster_id.map(|id| id.to_string()))),
        ("node", output::or_dash(view.node_id.map(|id| id.to_string()))),
        ("control", format!("{}, pid {}, up {} s", view.control_version, view.control_pid, view.control_uptime_s)),
    ];
    rows.push(("penstockd", state(view)));
    for (what, at) in [("peer address", view.peer_address), ("nvmf address", view.nvmf_address)] {
        rows.extend(at.map(|at| (what, at.to_string())));
    }
    if let Some(node) = &view.node {
        rows.extend([
            ("version", format!("{}, pid {}, up {} s", node.version, node.pid, node.uptime_s)),
            ("spdk", format!("{} ({})", node.spdk.version, node.spdk.tree)),
            ("poll", format!("{:?}, {}", node.poll, if node.no_huge { "no hugepages" } else { "hugepages" }).to_lowercase()),
            ("drives", node.drives.to_string()),
            ("volumes", node.volumes.to_string()),
        ]);
        for peer in &node.peers {
            let why = peer.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
            let state = if peer.connected { "connected".to_owned() } else { format!("not connected{why}") };
            rows.push(("other node", format!("{} at {}, {state}", peer.node_id, peer.address)));
        }
        for core in &node.cores {
            let line = format!("{}: {:.0} % busy, {} stores, {} volumes", core.core, core.busy_fraction * 100.0, core.stores, core.volumes);
            rows.push(("core", line));
        }
    }
    rows.push(("agreed", if view.settled { "yes, desired and observed agree" } else { "no" }.to_owned()));
    view.unsettled.iter().for_each(|line| rows.push(("", line.clone())));
    output::facts(rows)
}
