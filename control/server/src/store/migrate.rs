//! Rows of older formats in the form of this one, as JSON: the types of old formats are not kept.
//!
//! Format 1 knew one node: its drives and doors were that node's, and a volume had one replica whose fields were its own. In format 2 replicas did not
//! change: which share of the controller ids each has followed from its number.

use penstock_api::NodeId;
use serde_json::{Map, Value, json};

fn object(row: Value) -> Result<Map<String, Value>, String> {
    match row {
        Value::Object(map) => Ok(map),
        _ => Err("it is not an object".to_owned()),
    }
}

/// Rows that say where something is come only after a cluster was founded.
fn node(node_id: Option<NodeId>) -> Result<Value, String> {
    node_id.map(|id| json!(id)).ok_or_else(|| "the store has no identity".to_owned())
}

pub fn drive(row: Value, node_id: Option<NodeId>) -> Result<Value, String> {
    let mut row = object(row)?;
    row.insert("node_id".to_owned(), node(node_id)?);
    Ok(row.into())
}

pub fn volume(row: Value, node_id: Option<NodeId>) -> Result<Value, String> {
    let (mut row, node) = (object(row)?, node(node_id)?);
    let mut replica = Map::new();
    for field in ["replica_id", "drive_id", "made"] {
        replica.insert(field.to_owned(), row.remove(field).ok_or_else(|| format!("{field} is missing"))?);
    }
    replica.insert("member".to_owned(), json!(1));
    replica.insert("node_id".to_owned(), node.clone());
    row.insert("replicas".to_owned(), json!([replica]));
    row.insert("group".to_owned(), Value::Null);
    for door in row.get_mut("doors").and_then(Value::as_array_mut).into_iter().flatten() {
        let door = door.as_object_mut().ok_or("a door is not an object")?;
        door.insert("node_id".to_owned(), node.clone());
    }
    Ok(row.into())
}

/// A volume of format 2.
pub fn replicas(row: Value) -> Result<Value, String> {
    let mut row = object(row)?;
    for replica in row.get_mut("replicas").and_then(Value::as_array_mut).ok_or("replicas are missing")? {
        let replica = replica.as_object_mut().ok_or("a replica is not an object")?;
        let member = replica.get("member").and_then(Value::as_u64).filter(|member| *member > 0).ok_or("a replica has no number")?;
        let share = (member - 1) % u64::from(penstock_model::desired::REPLICAS_MAX);
        replica.extend([("share".to_owned(), json!(share)), ("joins".to_owned(), Value::Null), ("left".to_owned(), json!(false))]);
    }
    row.insert("change".to_owned(), Value::Null);
    Ok(row.into())
}
