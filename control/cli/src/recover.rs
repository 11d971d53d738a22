//! `penstock replica recover`: what would be lost, and the receipt of what was.

use penstock_api::http::{LeftView, RecoveryView, ReplicaRecoverBody, path};
use penstock_api::rpc::{LogPoint, RecoveryReceipt};

use crate::client::Client;
use crate::failure::Failure;
use crate::output::{self, Form};
use crate::volume;

pub fn run(client: &Client, form: Form, volume: &str, body: &ReplicaRecoverBody) -> Result<(), Failure> {
    let view: RecoveryView = client.send("POST", &path::replicas(volume::checked(volume)?, "recover"), body)?.json()?;
    output::show(form, &view, |view| match &view.receipt {
        Some(receipt) => receipt_text(view, receipt),
        None => plan_text(view, body.regardless),
    })
}

fn others(view: &RecoveryView) -> impl Iterator<Item = &LeftView> {
    view.replicas.iter().filter(|replica| replica.node_id != view.node_id)
}

fn plan_text(view: &RecoveryView, regardless: bool) -> String {
    let number = |number: Option<u64>| output::or_dash(number.map(|number| number.to_string()));
    let line = |replica: &LeftView| {
        let state = match (&replica.reason, replica.node_id == view.node_id) {
            (None, true) => "goes on alone".to_owned(),
            (Some(reason), true) => format!("goes on alone, though {reason}"),
            (None, false) => "cut off".to_owned(),
            (Some(reason), false) => format!("cut off: {reason}"),
        };
        let part = output::or_dash(replica.part.map(|part| part.word().to_owned()));
        vec![replica.member.to_string(), replica.node.clone(), part, number(replica.last), number(replica.committed), state]
    };
    let table =
        output::table(&["MEMBER", "NODE", "PART", "LAST", "COMMITTED", "STATE"], &[0, 3, 4], view.replicas.iter().map(line).collect());
    let (name, node) = (&view.name, &view.node);
    if view.done {
        return format!("{table}\nvolume {name} goes on with the replica on {node} alone already; --force shows the receipt again");
    }
    let more = if regardless { " --regardless" } else { "" };
    format!(
        "{table}
Writes that were acknowledged by the others and are not in the log of {node} would be lost, and it is not known whether there are any.
The others would never take part again, also when they come back: only for replicas that are lost for good.
They must not be started where they cannot reach {node}.

nothing has been done; to do it: penstock replica recover {name} --on {node}{more} --force"
    )
}

fn receipt_text(view: &RecoveryView, receipt: &RecoveryReceipt) -> String {
    let point = |at: &LogPoint| format!("entry {} of term {}", at.index, at.term);
    let mut rows = vec![
        ("volume", format!("{}, id {}", view.name, view.volume_id)),
        ("goes on", format!("the replica on {}, member {}, alone", view.node, receipt.member)),
        ("kept", format!("its log, up to {}", point(&receipt.last))),
        ("not lost", format!("anything up to entry {}, which counted as far as it knew", receipt.committed)),
        ("may be lost", format!("what the others acknowledged after entry {}", receipt.last.index)),
    ];
    if let Some(at) = &receipt.acknowledged {
        rows.push(("may be lost", format!("what it acknowledged itself, as far as {}, and cannot read any more", point(at))));
    }
    if let Some(index) = receipt.whole_as_of {
        rows.push(("damaged", format!("its content was being copied from another, and was whole as of entry {index} alone")));
    }
    if let Some(why) = &receipt.stopped {
        rows.push(("in question", format!("it had stopped before: {why}")));
    }
    let cut: Vec<String> = others(view).map(|replica| format!("{} (member {})", replica.node, replica.member)).collect();
    rows.push(("cut off", format!("{}, also when they come back", cut.join(", "))));
    if !receipt.heard.is_empty() {
        let heard: Vec<String> = receipt.heard.iter().map(u64::to_string).collect();
        rows.push(("answered", format!("of those, member {}: too few for a quorum", heard.join(", "))));
    }
    let next: String = others(view).map(|replica| format!("  penstock replica replace {} {}\n", view.name, replica.node)).collect();
    format!("{}\nnext, one after the other (--on NODE where its node is lost too):\n{next}", output::facts(rows))
}
