//! Which node is which: names that an operator gives, and the ids that nodes are claimed under.
//!
//! A name gets an id when it is first needed: the one that the node itself shows, or the next number of the cluster. A node
//! that shows another id than its name has is taken for what it shows as long as nothing is desired on the old one.

use penstock_api::NodeId;
use penstock_api::http::ApiError;
use penstock_api::id::{ClusterTag, NodeNumber};
use penstock_api::rpc::ErrorCode;

use crate::desired::{Desired, DesiredNode, Record};

fn number(id: NodeId) -> NodeNumber {
    id.0.parts().node
}

fn next_id(desired: &Desired, cluster: ClusterTag, first: NodeNumber) -> Result<NodeId, ApiError> {
    let used = desired.nodes.keys().chain(desired.drives.values().map(|drive| &drive.node_id)).map(|id| number(*id)).max();
    let next = match used {
        None => Some(first),
        Some(used) => used.max(first).next(),
    };
    let full = || ApiError::new(ErrorCode::Capacity, format!("all {} numbers of nodes are used", penstock_api::id::NODE_MAX));
    next.map(|next| NodeId::of(cluster, next)).ok_or_else(full)
}

/// The node's id, and what must be recorded first. `shown` is the id under which the node itself was claimed, if it was.
pub fn enroll(desired: &Desired, node: &DesiredNode, shown: Option<NodeId>) -> Result<(NodeId, Vec<Record>), ApiError> {
    let Some(identity) = &desired.identity else {
        return Err(
            ApiError::new(ErrorCode::NotReady, "there is no cluster yet").with_hint("add a drive first, see `penstock pool add --help`")
        );
    };
    let known = desired.find_node(node.name.as_str()).map(|(id, known)| (id, known.clone()));
    let holder = shown.and_then(|id| desired.nodes.get(&id)).filter(|holder| !holder.gone && holder.name != node.name);
    if let (Some(shown), Some(holder)) = (shown, holder) {
        let message = format!("the node that answers as {} was claimed as {shown}, which is node {}", node.name, holder.name);
        return Err(ApiError::new(ErrorCode::Conflict, message).with_hint("check the sockets that penstock-control was given with --node"));
    }
    let put = |id| vec![Record::PutNode(id, node.clone())];
    match (known, shown) {
        (Some((id, known)), shown) if shown.is_none_or(|shown| shown == id) => Ok((id, if known == *node { vec![] } else { put(id) })),
        (Some((id, _)), Some(shown)) => {
            if desired.drives.values().any(|drive| drive.node_id == id) {
                let message = format!("node {} is {id} here, and says that it is {shown}", node.name);
                return Err(
                    ApiError::new(ErrorCode::Conflict, message).with_hint("check the sockets that penstock-control was given with --node")
                );
            }
            Ok((shown, [vec![Record::DropNode(id)], put(shown)].concat()))
        }
        (Some((id, _)), None) => Ok((id, vec![])),
        (None, Some(shown)) => Ok((shown, put(shown))),
        (None, None) => {
            let id = next_id(desired, identity.cluster, identity.node)?;
            Ok((id, put(id)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::issuer::Identity;
    use penstock_api::id::Incarnation;

    fn desired() -> Desired {
        let identity =
            Identity { cluster: ClusterTag::new(7).unwrap(), node: NodeNumber::new(1).unwrap(), incarnation: Incarnation::FIRST };
        Desired { identity: Some(identity), ..Desired::default() }
    }

    fn node(name: &str) -> DesiredNode {
        DesiredNode { name: name.parse().unwrap(), peer: None, nvmf: None, gone: false }
    }

    fn id(n: u16) -> NodeId {
        NodeId::of(ClusterTag::new(7).unwrap(), NodeNumber::new(n).unwrap())
    }

    fn take(desired: &mut Desired, name: &str, shown: Option<u16>) -> Result<NodeId, String> {
        let (found, records) = enroll(desired, &node(name), shown.map(id)).map_err(|error| error.message)?;
        desired.apply(&records);
        Ok(found)
    }

    #[test]
    fn names_get_the_id_shown_or_the_next_and_keep_it() {
        let mut desired = desired();
        for (name, shown, expected) in
            [("a", None, 1), ("b", None, 2), ("a", None, 1), ("c", Some(9), 9), ("d", None, 10), ("d", Some(4), 4), ("d", None, 4)]
        {
            assert_eq!(take(&mut desired, name, shown), Ok(id(expected)), "{name} {shown:?}");
        }
        let names: Vec<String> = desired.nodes.values().map(|node| node.name.to_string()).collect();
        assert_eq!(names, ["a", "b", "d", "c"]);
    }

    #[test]
    fn node_that_is_another_refused() {
        let mut desired = desired();
        take(&mut desired, "a", None).unwrap();
        assert!(take(&mut desired, "b", Some(1)).unwrap_err().contains("which is node a"));
        let spec = "file:/a?size=1GiB".parse().unwrap();
        let drive = crate::import::drive_as_found(id(1), &spec, false);
        desired.apply(&[Record::PutDrive(penstock_api::DriveId(id(1).0), drive)]);
        assert!(take(&mut desired, "a", Some(3)).unwrap_err().contains("says that it is"));
    }

    #[test]
    fn addresses_that_changed_are_recorded() {
        let mut desired = desired();
        take(&mut desired, "a", None).unwrap();
        let moved = DesiredNode { peer: Some("127.0.0.1:9".parse().unwrap()), ..node("a") };
        let (_, records) = enroll(&desired, &moved, None).unwrap();
        assert_eq!(records, [Record::PutNode(id(1), moved)]);
    }
}
