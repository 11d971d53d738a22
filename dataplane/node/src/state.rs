//! What the node remembers off its drives, in `<state-dir>/node.toml`: who it is, which drives and exports it had, its peers, and fences.
//!
//! A fence recorded here outlives the drive's silence about it: a drive that failed a flush is not trusted to store that.
//! Written as a whole: temporary file, fsync, rename, fsync of the directory. Blocking, a few kilobytes: for the app thread at
//! control events, never on the I/O path. Not here: desired state, which is control's.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use penstock_api::rpc::{ControllerRange, Door, PeerAddress};
use penstock_api::{ClusterId, DriveId, DriveSpec, NodeId, VolumeId};
use penstock_engine::FenceReason;
use penstock_wire::{Generation, Incarnation};
use serde::{Deserialize, Serialize};

const FILE: &str = "node.toml";
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeState {
    version: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_id: Option<ClusterId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_id: Option<NodeId>,
    #[serde(default)]
    pub drives: Vec<DriveEntry>,
    #[serde(default)]
    pub exports: Vec<ExportEntry>,
    #[serde(default)]
    pub fences: Vec<FenceEntry>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub quarantines: Vec<QuarantineEntry>,
    /// How often the stores of its drives were opened: what an older copy of a drive does not know.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub openings: Vec<OpeningEntry>,
    /// Other nodes, as control told them last.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerAddress>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveEntry {
    pub drive_id: DriveId,
    pub spec: DriveSpec,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportEntry {
    pub volume_id: VolumeId,
    pub door: Door,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub controllers: Option<ControllerRange>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FenceEntry {
    pub drive_id: DriveId,
    pub reason: FenceWord,
    /// Seconds since 1970, for people.
    pub at_s: u64,
}

/// A store that panicked, and is not run until an operator clears it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuarantineEntry {
    pub drive_id: DriveId,
    pub store: u32,
    /// What it said, and where in the code.
    pub panic: String,
    /// Seconds since 1970, for people.
    pub at_s: u64,
}

/// The newest opening of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OpeningEntry {
    pub drive_id: DriveId,
    pub store: u32,
    /// The life of the drive: drawn anew when it is formatted.
    pub incarnation: String,
    pub generation: u64,
}

/// [`FenceReason`] as a word in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FenceWord {
    LogWriteFailed,
    FlushFailed,
    DrainWriteFailed,
    CheckpointWriteFailed,
    LogLost,
    Drive,
}

impl From<FenceReason> for FenceWord {
    fn from(reason: FenceReason) -> Self {
        match reason {
            FenceReason::LogWriteFailed => Self::LogWriteFailed,
            FenceReason::FlushFailed => Self::FlushFailed,
            FenceReason::DrainWriteFailed => Self::DrainWriteFailed,
            FenceReason::CheckpointWriteFailed => Self::CheckpointWriteFailed,
            FenceReason::LogLost => Self::LogLost,
            FenceReason::Drive => Self::Drive,
        }
    }
}

impl From<FenceWord> for FenceReason {
    fn from(word: FenceWord) -> Self {
        match word {
            FenceWord::LogWriteFailed => Self::LogWriteFailed,
            FenceWord::FlushFailed => Self::FlushFailed,
            FenceWord::DrainWriteFailed => Self::DrainWriteFailed,
            FenceWord::CheckpointWriteFailed => Self::CheckpointWriteFailed,
            FenceWord::LogLost => Self::LogLost,
            FenceWord::Drive => Self::Drive,
        }
    }
}

/// Why a fence stands, for people.
pub fn fence_text(reason: FenceReason) -> &'static str {
    match reason {
        FenceReason::LogWriteFailed => "a write to its oplog failed",
        FenceReason::FlushFailed => "a flush failed",
        FenceReason::DrainWriteFailed => "a write to its extents failed",
        FenceReason::CheckpointWriteFailed => "a write of its map failed",
        FenceReason::LogLost => "part of its oplog cannot be read, so it is unknown which blocks are lost",
        FenceReason::Drive => "another store of the drive was fenced",
    }
}

impl Default for NodeState {
    fn default() -> Self {
        Self {
            version: VERSION,
            cluster_id: None,
            node_id: None,
            drives: Vec::new(),
            exports: Vec::new(),
            fences: Vec::new(),
            quarantines: Vec::new(),
            openings: Vec::new(),
            peers: Vec::new(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("cannot {doing} {}: {error}", path.display())]
    Io { doing: &'static str, path: PathBuf, error: std::io::Error },
    #[error("{} cannot be read: {why}. It is written by penstockd alone; if it is beyond repair move it away: drives keep their data, but fences recorded in it are forgotten", path.display())]
    Damaged { path: PathBuf, why: String },
}

/// The state and its file.
#[derive(Debug)]
pub struct StateFile {
    dir: PathBuf,
    state: NodeState,
}

impl StateFile {
    /// Reads the state, or starts a new one; the directory is made if it is absent.
    ///
    /// # Errors
    /// When the directory cannot be used or the file is damaged.
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        std::fs::create_dir_all(dir).map_err(|error| StateError::Io {
            doing: "create the state directory",
            path: dir.to_owned(),
            error,
        })?;
        let path = dir.join(FILE);
        let state = match std::fs::read_to_string(&path) {
            Ok(text) => Self::parse(&path, &text)?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => NodeState::default(),
            Err(error) => return Err(StateError::Io { doing: "read", path, error }),
        };
        Ok(Self { dir: dir.to_owned(), state })
    }

    fn parse(path: &Path, text: &str) -> Result<NodeState, StateError> {
        let damaged = |why: String| StateError::Damaged { path: path.to_owned(), why };
        let state: NodeState = toml::from_str(text).map_err(|e| damaged(e.to_string().trim().to_owned()))?;
        if state.version != VERSION {
            return Err(damaged(format!("it is of version {}, this penstockd reads version {VERSION}", state.version)));
        }
        Ok(state)
    }

    pub fn get(&self) -> &NodeState {
        &self.state
    }

    /// Changes the state; it is durable when this returns. On failure neither file nor memory has changed.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn change(&mut self, change: impl FnOnce(&mut NodeState)) -> Result<(), StateError> {
        let mut next = self.state.clone();
        change(&mut next);
        if next == self.state {
            return Ok(());
        }
        self.write(&next)?;
        self.state = next;
        Ok(())
    }

    /// The fence on a drive, if one stands.
    pub fn fence(&self, drive: DriveId) -> Option<FenceReason> {
        self.state.fences.iter().find(|f| f.drive_id == drive).map(|f| f.reason.into())
    }

    /// What a store of a drive said when it fell, if it is quarantined.
    pub fn quarantine(&self, drive: DriveId, store: u32) -> Option<&str> {
        self.state.quarantines.iter().find(|q| q.drive_id == drive && q.store == store).map(|q| q.panic.as_str())
    }

    /// The generation in which a store of a drive, in that life of it, was opened last.
    pub fn opened(&self, drive: DriveId, store: u32, life: Incarnation) -> Option<Generation> {
        let life = life.to_string();
        let entry = self.state.openings.iter().find(|it| it.drive_id == drive && it.store == store && it.incarnation == life);
        entry.map(|entry| Generation(entry.generation))
    }

    /// A store of a drive was opened. What is known of an earlier life of the drive goes.
    pub fn note_opened(&mut self, drive: DriveId, store: u32, life: Incarnation, generation: Generation) -> Result<(), StateError> {
        let newest = self.opened(drive, store, life).max(Some(generation)).unwrap_or(generation).0;
        self.change(|state| {
            state.openings.retain(|it| (it.drive_id, it.store) != (drive, store));
            state.openings.push(OpeningEntry { drive_id: drive, store, incarnation: life.to_string(), generation: newest });
        })
    }

    fn write(&self, state: &NodeState) -> Result<(), StateError> {
        let path = self.dir.join(FILE);
        let temporary = self.dir.join("node.toml.new");
        let io = |doing, path: &Path| {
            let path = path.to_owned();
            move |error| StateError::Io { doing, path, error }
        };
        let text = toml::to_string(state).expect("every state can be written as TOML");
        let mut file = File::create(&temporary).map_err(io("create", &temporary))?;
        file.write_all(b"# Written by penstockd; do not edit while it runs.\n").map_err(io("write", &temporary))?;
        file.write_all(text.as_bytes()).map_err(io("write", &temporary))?;
        file.sync_all().map_err(io("sync", &temporary))?;
        std::fs::rename(&temporary, &path).map_err(io("rename to", &path))?;
        let dir = File::open(&self.dir).map_err(io("open", &self.dir))?;
        dir.sync_all().map_err(io("sync", &self.dir))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::id::{ClusterTag, Id, IdParts, Incarnation, NodeNumber, Sequence};

    fn id(sequence: u64) -> Id {
        Id::from_parts(IdParts {
            cluster: ClusterTag::new(7).unwrap(),
            node: NodeNumber::new(1).unwrap(),
            incarnation: Incarnation::FIRST,
            sequence: Sequence::new(sequence).unwrap(),
        })
    }

    fn fill(state: &mut NodeState) {
        state.cluster_id = Some(ClusterId(id(1)));
        state.node_id = Some(NodeId(id(2)));
        state.drives.push(DriveEntry { drive_id: DriveId(id(3)), spec: "file:/a b.img?size=1GiB".parse().unwrap() });
        let address = "127.0.0.1".parse().unwrap();
        for door in
            [Door::Nvmf { address, port: 4420, nqn: None }, Door::Vhost { name: Some("x".parse().unwrap()) }, Door::VfioUser { name: None }]
        {
            state.exports.push(ExportEntry { volume_id: VolumeId(id(4)), door, controllers: Some(ControllerRange { first: 1, last: 9 }) });
        }
        state.peers.push(PeerAddress { node_id: NodeId(id(8)), address: "[::1]:4700".parse().unwrap() });
        for reason in [
            FenceReason::LogWriteFailed,
            FenceReason::FlushFailed,
            FenceReason::DrainWriteFailed,
            FenceReason::CheckpointWriteFailed,
            FenceReason::LogLost,
            FenceReason::Drive,
        ] {
            state.fences.push(FenceEntry { drive_id: DriveId(id(3)), reason: reason.into(), at_s: 5 });
        }
        state.openings.push(OpeningEntry { drive_id: DriveId(id(3)), store: 1, incarnation: "07".repeat(16), generation: 9 });
        let panic = "panicked at \"a.rs\":1:2: assertion `left == right` failed".to_owned();
        state.quarantines.push(QuarantineEntry { drive_id: DriveId(id(3)), store: 1, panic, at_s: 6 });
    }

    #[test]
    fn state_changed_is_read_back_by_the_next_life() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("a/b");
        let mut file = StateFile::open(&dir).unwrap();
        assert_eq!(*file.get(), NodeState::default());
        file.change(fill).unwrap();
        let again = StateFile::open(&dir).unwrap();
        assert_eq!(again.get(), file.get());
        assert_eq!(again.fence(DriveId(id(3))), Some(FenceReason::LogWriteFailed));
        assert_eq!(again.fence(DriveId(id(9))), None);
        assert!(again.quarantine(DriveId(id(3)), 1).is_some_and(|panic| panic.ends_with("failed")));
        assert_eq!(again.quarantine(DriveId(id(3)), 0), None);
    }

    #[test]
    fn opening_is_known_for_the_life_of_its_drive_and_never_goes_back() {
        let dir = tempfile::tempdir().unwrap();
        let (drive, life, other) = (DriveId(id(3)), penstock_wire::Incarnation([7; 16]), penstock_wire::Incarnation([8; 16]));
        let mut file = StateFile::open(dir.path()).unwrap();
        assert_eq!(file.opened(drive, 0, life), None);
        for (told, kept) in [(4, 4), (6, 6), (5, 6)] {
            file.note_opened(drive, 0, life, Generation(told)).unwrap();
            assert_eq!(StateFile::open(dir.path()).unwrap().opened(drive, 0, life), Some(Generation(kept)));
        }
        assert_eq!((file.opened(drive, 1, life), file.opened(drive, 0, other)), (None, None));
        file.note_opened(drive, 0, other, Generation(1)).unwrap();
        assert_eq!((file.opened(drive, 0, life), file.opened(drive, 0, other)), (None, Some(Generation(1))));
    }

    #[test]
    fn state_that_cannot_be_written_stays_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = StateFile::open(dir.path()).unwrap();
        file.change(fill).unwrap();
        let before = file.get().clone();
        // A directory in the temporary file's place: create fails whoever we are, root too.
        std::fs::create_dir(dir.path().join("node.toml.new")).unwrap();
        assert!(matches!(file.change(|s| s.drives.clear()), Err(StateError::Io { .. })));
        assert_eq!(*file.get(), before);
        assert_eq!(*StateFile::open(dir.path()).unwrap().get(), before);
    }

    #[test]
    fn state_of_a_crash_before_the_rename_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        StateFile::open(dir.path()).unwrap().change(fill).unwrap();
        std::fs::write(dir.path().join("node.toml.new"), "half a li").unwrap();
        assert_eq!(StateFile::open(dir.path()).unwrap().get().exports.len(), 3);
    }

    #[test]
    fn damaged_or_newer_state_is_refused_not_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        for text in ["version = 1\nfences = 3\n", "version = 2\n", "{", "version = 1\nfence = []\n"] {
            std::fs::write(dir.path().join(FILE), text).unwrap();
            let error = StateFile::open(dir.path()).unwrap_err();
            assert!(matches!(error, StateError::Damaged { .. }), "{text}: {error}");
        }
    }
}
