//! `penstock node show`, `penstock id new`.

use penstock_api::http::{IdsBody, IdsView, NodeView, path};

use crate::args::{IdCommand, Node};
use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Form};

pub fn run(client: &Client, form: Form, command: Node) -> Result<(), Failure> {
    match command {
        Node::Show => {
            let view: NodeView = client.get(path::NODE)?;
            output::show(form, &view, facts)
        }
    }
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
        ("cluster", output::or_dash(view.cluster_id.map(|id| id.to_string()))),
        ("node", output::or_dash(view.node_id.map(|id| id.to_string()))),
        ("control", format!("{}, pid {}, up {} s", view.control_version, view.control_pid, view.control_uptime_s)),
    ];
    match (&view.unreachable_reason, view.reachable) {
        (Some(reason), false) => rows.push(("penstockd", format!("away: {reason}"))),
        (_, reachable) => rows.push(("penstockd", if reachable { "there" } else { "away" }.to_owned())),
    }
    if let Some(node) = &view.node {
        rows.extend([
            ("version", format!("{}, pid {}, up {} s", node.version, node.pid, node.uptime_s)),
            ("spdk", format!("{} ({})", node.spdk.version, node.spdk.tree)),
            ("poll", format!("{:?}, {}", node.poll, if node.no_huge { "no hugepages" } else { "hugepages" }).to_lowercase()),
            ("drives", node.drives.to_string()),
            ("volumes", node.volumes.to_string()),
        ]);
        for core in &node.cores {
            let line = format!("{}: {:.0} % busy, {} stores, {} volumes", core.core, core.busy_fraction * 100.0, core.stores, core.volumes);
            rows.push(("core", line));
        }
    }
    rows.push(("agreed", if view.settled { "yes, desired and observed agree" } else { "no" }.to_owned()));
    view.unsettled.iter().for_each(|line| rows.push(("", line.clone())));
    output::facts(rows)
}
