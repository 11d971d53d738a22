//! The store in one file, by redb, with two-phase commit: without it a double crash can undo a durable commit.
//!
//! Tables: `meta` (format, home, mark, identity), `nodes`, `drives`, `volumes`; keys are ids as 128-bit numbers, values JSON. A store of
//! format 1, from before there were several nodes, or 2, from before replicas changed, is turned into one of this format when it is opened (`migrate`).

use std::path::Path;

use penstock_api::{DriveId, Id, NodeId, VolumeId};
use penstock_model::{Identity, Record};
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Serialize, de::DeserializeOwned};

use super::{Store, StoreError, Stored, Write, migrate};

/// Written into every store. A change of what the records mean raises it.
pub const FORMAT: u32 = 3;

const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const NODES: TableDefinition<u128, &[u8]> = TableDefinition::new("nodes");
const DRIVES: TableDefinition<u128, &[u8]> = TableDefinition::new("drives");
const VOLUMES: TableDefinition<u128, &[u8]> = TableDefinition::new("volumes");

pub struct EmbeddedStore {
    database: Database,
}

fn failed(error: impl std::fmt::Display) -> StoreError {
    StoreError::Failed(error.to_string())
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>, StoreError> {
    serde_json::to_vec(value).map_err(failed)
}

fn decode<T: DeserializeOwned>(what: impl FnOnce() -> String, bytes: &[u8]) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Damaged { what: what(), reason: error.to_string() })
}

impl EmbeddedStore {
    /// Opens or makes the file.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let database = Database::create(path).map_err(|error| match error {
            DatabaseError::DatabaseAlreadyOpen => StoreError::InUse,
            other => StoreError::Damaged { what: format!("file {}", path.display()), reason: other.to_string() },
        })?;
        let store = Self { database };
        store.check_format()?;
        Ok(store)
    }

    fn check_format(&self) -> Result<(), StoreError> {
        let mut transaction = self.database.begin_write().map_err(failed)?;
        transaction.set_two_phase_commit(true);
        {
            transaction.open_table(NODES).map_err(failed)?;
            let mut drives = transaction.open_table(DRIVES).map_err(failed)?;
            let mut volumes = transaction.open_table(VOLUMES).map_err(failed)?;
            let mut meta = transaction.open_table(META).map_err(failed)?;
            let found = meta.get("format").map_err(failed)?.map(|value| value.value().to_vec());
            match found {
                None => drop(meta.insert("format", encode(&FORMAT)?.as_slice()).map_err(failed)?),
                Some(found) if found == encode(&FORMAT)? => return Ok(()),
                Some(found) if found == encode(&1)? || found == encode(&2)? => {
                    if found == encode(&1)? {
                        let identity = meta.get("identity").map_err(failed)?.map(|value| value.value().to_vec());
                        let node_id = match identity {
                            Some(bytes) => Some(decode::<Identity>(|| "identity".to_owned(), &bytes)?.node_id()),
                            None => None,
                        };
                        turn(&mut drives, "drive", |row| migrate::drive(row, node_id))?;
                        turn(&mut volumes, "volume", |row| migrate::volume(row, node_id))?;
                    }
                    turn(&mut volumes, "volume", migrate::replicas)?;
                    meta.insert("format", encode(&FORMAT)?.as_slice()).map_err(failed)?;
                }
                Some(found) => {
                    let found = String::from_utf8_lossy(&found).into_owned();
                    return Err(StoreError::Format { found, expected: FORMAT });
                }
            }
        }
        transaction.commit().map_err(failed)
    }
}

/// Puts every row into another form.
fn turn(
    table: &mut redb::Table<'_, u128, &[u8]>,
    what: &str,
    row: impl Fn(serde_json::Value) -> Result<serde_json::Value, String>,
) -> Result<(), StoreError> {
    let mut rows = Vec::new();
    for entry in table.iter().map_err(failed)? {
        let (key, value) = entry.map_err(failed)?;
        rows.push((key.value(), value.value().to_vec()));
    }
    for (key, bytes) in rows {
        let name = || format!("{what} {key:x} of an older format");
        let turned = row(decode(name, &bytes)?).map_err(|reason| StoreError::Damaged { what: name(), reason })?;
        table.insert(key, encode(&turned)?.as_slice()).map_err(failed)?;
    }
    Ok(())
}

impl Store for EmbeddedStore {
    fn load(&self) -> Result<Stored, StoreError> {
        let transaction = self.database.begin_read().map_err(failed)?;
        let mut stored = Stored::default();
        let meta = transaction.open_table(META).map_err(failed)?;
        if let Some(value) = meta.get("home").map_err(failed)? {
            stored.home = Some(decode(|| "home".to_owned(), value.value())?);
        }
        if let Some(value) = meta.get("mark").map_err(failed)? {
            stored.mark = Some(decode(|| "mark".to_owned(), value.value())?);
        }
        if let Some(value) = meta.get("identity").map_err(failed)? {
            stored.desired.identity = Some(decode(|| "identity".to_owned(), value.value())?);
        }
        let id = |key: u128| Id::from_u128(key).map_err(|e| StoreError::Damaged { what: format!("key {key:x}"), reason: e.to_string() });
        for row in transaction.open_table(NODES).map_err(failed)?.iter().map_err(failed)? {
            let (key, value) = row.map_err(failed)?;
            let id = id(key.value())?;
            stored.desired.nodes.insert(NodeId(id), decode(|| format!("node {id}"), value.value())?);
        }
        for row in transaction.open_table(DRIVES).map_err(failed)?.iter().map_err(failed)? {
            let (key, value) = row.map_err(failed)?;
            let id = id(key.value())?;
            stored.desired.drives.insert(DriveId(id), decode(|| format!("drive {id}"), value.value())?);
        }
        for row in transaction.open_table(VOLUMES).map_err(failed)?.iter().map_err(failed)? {
            let (key, value) = row.map_err(failed)?;
            let id = id(key.value())?;
            stored.desired.volumes.insert(VolumeId(id), decode(|| format!("volume {id}"), value.value())?);
        }
        Ok(stored)
    }

    fn commit(&self, writes: &[Write]) -> Result<(), StoreError> {
        let mut transaction = self.database.begin_write().map_err(failed)?;
        transaction.set_two_phase_commit(true);
        {
            let mut meta = transaction.open_table(META).map_err(failed)?;
            let mut nodes = transaction.open_table(NODES).map_err(failed)?;
            let mut drives = transaction.open_table(DRIVES).map_err(failed)?;
            let mut volumes = transaction.open_table(VOLUMES).map_err(failed)?;
            for write in writes {
                match write {
                    Write::Home(home) => drop(meta.insert("home", encode(home)?.as_slice()).map_err(failed)?),
                    Write::Mark(mark) => drop(meta.insert("mark", encode(mark)?.as_slice()).map_err(failed)?),
                    Write::Record(Record::Identity(identity)) => {
                        drop(meta.insert("identity", encode(identity)?.as_slice()).map_err(failed)?);
                    }
                    Write::Record(Record::PutNode(id, node)) => {
                        drop(nodes.insert(id.0.to_u128(), encode(node)?.as_slice()).map_err(failed)?);
                    }
                    Write::Record(Record::DropNode(id)) => drop(nodes.remove(id.0.to_u128()).map_err(failed)?),
                    Write::Record(Record::PutDrive(id, drive)) => {
                        drop(drives.insert(id.0.to_u128(), encode(drive)?.as_slice()).map_err(failed)?);
                    }
                    Write::Record(Record::DropDrive(id)) => drop(drives.remove(id.0.to_u128()).map_err(failed)?),
                    Write::Record(Record::PutVolume(id, volume)) => {
                        drop(volumes.insert(id.0.to_u128(), encode(volume)?.as_slice()).map_err(failed)?);
                    }
                    Write::Record(Record::DropVolume(id)) => drop(volumes.remove(id.0.to_u128()).map_err(failed)?),
                }
            }
        }
        transaction.commit().map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::id::{Incarnation, Sequence};
    use penstock_model::desired::{DesiredDrive, Phase};
    use penstock_model::issuer::{Home, Mark};

    fn drive() -> (DriveId, DesiredDrive) {
        let id = DriveId("0194a5c1-b2d3-8001-8000-000000000001".parse().unwrap());
        let (spec, node_id) = ("file:/a?size=1GiB".parse().unwrap(), NodeId("0194a5c1-b2d3-8001-8000-000000000000".parse().unwrap()));
        (
            id,
            DesiredDrive {
                node_id,
                spec,
                phase: Phase::Present,
                volatile: false,
                stores: None,
                oplog_bytes: None,
                force: false,
                made: true,
            },
        )
    }

    #[test]
    fn store_reopened_holds_what_was_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        let (id, drive) = drive();
        let mark = Mark { incarnation: Incarnation::FIRST, high_water: Sequence::new(1024).unwrap() };
        let home = Home { machine: "m".to_owned(), inode: 1 };
        {
            let store = EmbeddedStore::open(&path).unwrap();
            let writes = [Write::Home(home.clone()), Write::Mark(mark), Write::Record(Record::PutDrive(id, drive.clone()))];
            store.commit(&writes).unwrap();
            assert!(matches!(EmbeddedStore::open(&path), Err(StoreError::InUse)));
        }
        let store = EmbeddedStore::open(&path).unwrap();
        let stored = store.load().unwrap();
        assert_eq!((stored.home, stored.mark), (Some(home), Some(mark)));
        assert_eq!(stored.desired.drives, [(id, drive)].into());
        store.commit(&[Write::Record(Record::DropDrive(id))]).unwrap();
        assert!(store.load().unwrap().desired.drives.is_empty());
    }

    #[test]
    fn store_of_another_format_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        {
            let store = EmbeddedStore::open(&path).unwrap();
            let transaction = store.database.begin_write().unwrap();
            transaction.open_table(META).unwrap().insert("format", b"9".as_slice()).unwrap();
            transaction.commit().unwrap();
        }
        let error = EmbeddedStore::open(&path).err().unwrap().to_string();
        assert!(error.contains("format 9") && error.contains("reads 3"), "{error}");
    }

    #[test]
    fn store_of_garbage_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        std::fs::write(&path, b"not a store at all, and certainly nothing to overwrite").unwrap();
        assert!(EmbeddedStore::open(&path).is_err());
        assert!(std::fs::read(&path).unwrap().starts_with(b"not a store"));
    }

    /// The rows as a penstock-control of format 1 wrote them.
    #[test]
    fn store_of_format_1_is_read_as_one_node_with_volumes_of_one_replica() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        let (drive_id, volume_id) = (0x0194_a5c1_b2d3_8001_8000_0000_0000_0001_u128, 0x0194_a5c1_b2d3_8001_8000_0000_0000_0002_u128);
        {
            let database = Database::create(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            {
                let mut meta = transaction.open_table(META).unwrap();
                meta.insert("format", b"1".as_slice()).unwrap();
                let identity = serde_json::json!({"cluster": 0x0194_a5c1_b2d3_u64, "node": 1, "incarnation": 0});
                meta.insert("identity", encode(&identity).unwrap().as_slice()).unwrap();
                let drive = serde_json::json!({"spec": "file:/a?size=1GiB", "phase": "present", "volatile": false, "stores": null,
                    "oplog_bytes": null, "force": false, "made": true});
                transaction.open_table(DRIVES).unwrap().insert(drive_id, encode(&drive).unwrap().as_slice()).unwrap();
                let volume = serde_json::json!({"name": "db", "segment_id": "0194a5c1-b2d3-8001-8000-000000000003",
                    "replica_id": "0194a5c1-b2d3-8001-8000-000000000004", "size": 4096, "allow_shrink": false, "block_size": 4096,
                    "drive_id": "0194a5c1-b2d3-8001-8000-000000000001", "phase": {"removing": {"force": true}}, "made": true,
                    "doors": [{"door": {"kind": "vhost"}, "phase": "present"}]});
                transaction.open_table(VOLUMES).unwrap().insert(volume_id, encode(&volume).unwrap().as_slice()).unwrap();
            }
            transaction.commit().unwrap();
        }
        for _ in 0..2 {
            let stored = EmbeddedStore::open(&path).unwrap().load().unwrap();
            let node_id = stored.desired.identity.unwrap().node_id();
            assert_eq!(stored.desired.drives.values().next().unwrap().node_id, node_id);
            let volume = stored.desired.volumes.values().next().unwrap();
            assert_eq!((volume.replicas.len(), volume.group.as_ref(), volume.phase), (1, None, Phase::Removing { force: true }));
            let replica = &volume.replicas[0];
            assert_eq!((replica.member, replica.node_id, replica.drive_id.0.to_u128(), replica.made), (1, node_id, drive_id, true));
            assert_eq!((volume.doors.len(), volume.doors[0].node_id), (1, node_id));
        }
    }
    /// The rows as a penstock-control of format 2 wrote them.
    #[test]
    fn store_of_format_2_is_read_and_its_replicas_keep_their_controller_ids() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.redb");
        let replica = |member: u64| {
            serde_json::json!({"member": member, "replica_id": format!("0194a5c1-b2d3-8001-8000-00000000000{member}"),
                "node_id": format!("0194a5c1-b2d3-800{member}-8000-000000000000"), "drive_id": "0194a5c1-b2d3-8001-8000-000000000009", "made": true})
        };
        {
            let database = Database::create(&path).unwrap();
            let transaction = database.begin_write().unwrap();
            {
                transaction.open_table(META).unwrap().insert("format", b"2".as_slice()).unwrap();
                let volume = serde_json::json!({"name": "db", "segment_id": "0194a5c1-b2d3-8001-8000-000000000007", "size": 4096,
                    "allow_shrink": false, "block_size": 4096, "replicas": [replica(1), replica(2)], "group": {"first": {"next": 3, "list": []},
                    "first_size": 4096}, "phase": "present", "doors": []});
                let key = 0x0194_a5c1_b2d3_8001_8000_0000_0000_0008_u128;
                transaction.open_table(VOLUMES).unwrap().insert(key, encode(&volume).unwrap().as_slice()).unwrap();
            }
            transaction.commit().unwrap();
        }
        for _ in 0..2 {
            let stored = EmbeddedStore::open(&path).unwrap().load().unwrap();
            let volume = stored.desired.volumes.values().next().unwrap();
            let shares: Vec<_> = volume.replicas.iter().map(|replica| (replica.member, replica.share, replica.left)).collect();
            assert_eq!((shares, volume.change.as_ref()), (vec![(1, 0, false), (2, 1, false)], None));
        }
    }
}
