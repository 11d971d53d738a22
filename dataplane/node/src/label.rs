//! What lies on a drive, and whether it may be opened, formatted or must be left alone. Pure.
//!
//! Foreign data is never overwritten unasked: anything that is not zero in the first MiB or the last block counts, known
//! signature or not. Not here: reading the drive (`drives`), or the label's bytes (`penstock_wire::label`).

use penstock_api::rpc::{DriveLabel, ErrorCode, RpcError};
use penstock_api::{ClusterId, DriveId, NodeId};
use penstock_wire::BLOCK;
use penstock_wire::label::Label;

/// Bytes from the start of a drive that are looked at.
pub const HEAD_BYTES: usize = 1 << 20;

/// What was found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Found {
    Blank,
    Ours(Label),
    /// `at` in bytes from the start.
    Foreign {
        what: String,
        at: u64,
    },
}

/// Offset, bytes, name. Offsets are those of the formats' own documents; longer and rarer ones come first, since some formats
/// carry an MBR besides.
const SIGNATURES: &[(usize, &[u8], &str)] = &[
    (512, b"EFI PART", "GPT partition table"),
    (4096, b"EFI PART", "GPT partition table"),
    (0, b"LUKS\xba\xbe", "LUKS encrypted volume"),
    (0, b"XFSB", "XFS file system"),
    (0, b"SPDKBLOB", "SPDK blobstore"),
    (0, b"bluestore block device", "Ceph BlueStore"),
    (0, b"QFI\xfb", "qcow2 image"),
    (0, b"hsqs", "squashfs"),
    (3, b"NTFS    ", "NTFS file system"),
    (82, b"FAT32", "FAT file system"),
    (54, b"FAT1", "FAT file system"),
    (512, b"LABELONE", "LVM physical volume"),
    (0, b"LABELONE", "LVM physical volume"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS file system"),
    (1080, b"\x53\xef", "ext4 file system"),
    (4086, b"SWAPSPACE2", "swap space"),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
    (0, b"\xfc\x4e\x2b\xa9", "Linux RAID member"),
    (32769, b"CD001", "ISO 9660 file system"),
    (65600, b"_BHRfS_M", "btrfs file system"),
    (131_072, b"\x0c\xb1\xba\x00", "ZFS member"),
    (510, b"\x55\xaa", "MBR partition table"),
];

fn first_nonzero(bytes: &[u8]) -> Option<usize> {
    // Chunks first: a blank MiB should not take a million steps.
    let chunk = bytes.chunks(64).position(|c| c.iter().any(|&b| b != 0))?;
    bytes[chunk * 64..].iter().position(|&b| b != 0).map(|at| chunk * 64 + at)
}

/// Looks at a drive's first bytes (up to [`HEAD_BYTES`]) and its last block, which starts at byte `last_at`.
pub fn look(head: &[u8], last: &[u8], last_at: u64) -> Found {
    assert!(head.len() >= BLOCK && last.len() == BLOCK, "a drive has at least a block");
    let damaged = match Label::decode(&head[..BLOCK]) {
        Ok(label) => return Found::Ours(label),
        Err(e) => e,
    };
    // Block 0 may be torn or gone while the copy is whole. Where something else lies there, somebody else owns the drive now.
    let like_ours = Label::looks_like(&head[..BLOCK]);
    if (like_ours || first_nonzero(&head[..BLOCK]).is_none())
        && let Ok(label) = Label::decode(last)
    {
        return Found::Ours(label);
    }
    if like_ours {
        return Found::Foreign { what: format!("damaged Penstock label ({damaged}), and no whole copy in the last block"), at: 0 };
    }
    for &(at, bytes, what) in SIGNATURES {
        if head.get(at..at + bytes.len()) == Some(bytes) {
            return Found::Foreign { what: what.to_owned(), at: at as u64 };
        }
    }
    if last.starts_with(b"EFI PART") || last[BLOCK - 512..].starts_with(b"EFI PART") {
        return Found::Foreign { what: "backup GPT partition table".to_owned(), at: last_at };
    }
    if let Some(at) = first_nonzero(head) {
        return Found::Foreign { what: "unknown data".to_owned(), at: at as u64 };
    }
    match first_nonzero(last) {
        Some(at) => Found::Foreign { what: "unknown data".to_owned(), at: last_at + at as u64 },
        None => Found::Blank,
    }
}

/// Who asks for the drive.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    pub cluster: ClusterId,
    pub node: NodeId,
    pub drive: DriveId,
    /// Destroys foreign data, and another cluster's.
    pub force: bool,
    /// Never formats.
    pub open_only: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    Format,
    Open(Label),
}

/// What a claim does with what was found.
///
/// # Errors
/// As control is told: nothing on the drive changes.
pub fn decide(found: Found, claim: Claim, drive_blocks: u64) -> Result<Decision, RpcError> {
    let refuse = |code, message: String, hint: &str| Err(RpcError::new(code, message).with_hint(hint));
    match found {
        Found::Blank if claim.open_only => refuse(
            ErrorCode::NotFound,
            format!("the drive is blank: drive {} is not on it", claim.drive),
            "check that this is the right disk; if its data is gone for good, remove the drive and add this one as new",
        ),
        Found::Foreign { what, at } if claim.open_only => refuse(
            ErrorCode::NotFound,
            format!("the drive holds {what} at byte {at} instead of drive {}", claim.drive),
            "check that this is the right disk",
        ),
        Found::Blank => Ok(Decision::Format),
        Found::Foreign { .. } if claim.force => Ok(Decision::Format),
        Found::Foreign { what, at } => refuse(
            ErrorCode::ForeignData,
            format!("the drive holds data that is not Penstock's: {what} at byte {at}"),
            "use another drive, or add it with force to destroy what is on it",
        ),
        Found::Ours(label) => {
            let on = ids(&label)?;
            if on.cluster_id != claim.cluster {
                if claim.force && !claim.open_only {
                    return Ok(Decision::Format);
                }
                return refuse(
                    ErrorCode::ForeignData,
                    format!("the drive belongs to cluster {}, this is cluster {}", on.cluster_id, claim.cluster),
                    "import it there, or add it with force to destroy that cluster's data",
                );
            }
            if on.drive_id != claim.drive || on.node_id != claim.node {
                return refuse(
                    ErrorCode::Conflict,
                    format!(
                        "the drive is drive {} of node {}, but was named as drive {} of node {}",
                        on.drive_id, on.node_id, claim.drive, claim.node
                    ),
                    "add it under the ids it carries (`penstock pool import` does)",
                );
            }
            if drive_blocks < label.drive_blocks {
                return refuse(
                    ErrorCode::Conflict,
                    format!("the drive has {drive_blocks} blocks of 4 KiB, but had {} when it was formatted", label.drive_blocks),
                    "data is missing at its end: restore the whole drive",
                );
            }
            Ok(Decision::Open(label))
        }
    }
}

/// A label's ids as the API writes them.
///
/// # Errors
/// When they are not ids that Penstock makes.
pub fn ids(label: &Label) -> Result<DriveLabel, RpcError> {
    let wrong = |what: &str, e: penstock_api::id::IdError| {
        RpcError::new(ErrorCode::Conflict, format!("the drive's label names a {what} that is no id: {e}"))
    };
    Ok(DriveLabel {
        cluster_id: ClusterId::from_bytes(label.cluster.0).map_err(|e| wrong("cluster", e))?,
        node_id: NodeId::from_bytes(label.node.0).map_err(|e| wrong("node", e))?,
        drive_id: DriveId::from_bytes(label.drive.0).map_err(|e| wrong("drive", e))?,
        incarnation: incarnation_number(&label.incarnation.0),
    })
}

/// The drive's life as a number that JSON carries exactly.
pub fn incarnation_number(incarnation: &[u8; 16]) -> u64 {
    u64::from_le_bytes(incarnation[..8].try_into().expect("eight bytes")) >> 11
}

#[cfg(test)]
mod tests {
    use super::*;
    use penstock_api::id::{ClusterTag, Id, IdParts, Incarnation as IdIncarnation, NodeNumber, Sequence};
    use penstock_wire::Incarnation;
    use proptest::prelude::*;

    const BLOCKS: u64 = 100_000;
    const LAST_AT: u64 = (BLOCKS - 1) * BLOCK as u64;

    fn id(cluster: u64, node: u16, sequence: u64) -> Id {
        Id::from_parts(IdParts {
            cluster: ClusterTag::new(cluster).unwrap(),
            node: NodeNumber::new(node).unwrap(),
            incarnation: IdIncarnation::FIRST,
            sequence: Sequence::new(sequence).unwrap(),
        })
    }

    fn claim() -> Claim {
        Claim { cluster: ClusterId(id(1, 0, 0)), node: NodeId(id(1, 1, 0)), drive: DriveId(id(1, 1, 5)), force: false, open_only: false }
    }

    fn label_of(claim: Claim) -> Label {
        let c = penstock_wire::ClusterId(claim.cluster.to_bytes());
        let n = penstock_wire::NodeId(claim.node.to_bytes());
        let d = penstock_wire::DriveId(claim.drive.to_bytes());
        Label::plan(c, n, d, Incarnation([9; 16]), BLOCKS, 1, 8192).unwrap()
    }

    fn head(at: usize, bytes: &[u8]) -> Vec<u8> {
        let mut head = vec![0; HEAD_BYTES];
        head[at..at + bytes.len()].copy_from_slice(bytes);
        head
    }

    #[test]
    fn zeros_are_blank() {
        assert_eq!(look(&head(0, b""), &[0; BLOCK], LAST_AT), Found::Blank);
    }

    #[test]
    fn every_signature_is_named_where_it_lies() {
        for &(at, bytes, what) in SIGNATURES {
            let found = look(&head(at, bytes), &[0; BLOCK], LAST_AT);
            assert_eq!(found, Found::Foreign { what: what.to_owned(), at: at as u64 });
        }
    }

    #[test]
    fn one_odd_byte_anywhere_looked_at_is_foreign() {
        assert_eq!(look(&head(777_777, b"x"), &[0; BLOCK], LAST_AT), Found::Foreign { what: "unknown data".to_owned(), at: 777_777 });
        let mut last = [0; BLOCK];
        last[4095] = 1;
        assert_eq!(look(&head(0, b""), &last, LAST_AT), Found::Foreign { what: "unknown data".to_owned(), at: LAST_AT + 4095 });
    }

    #[test]
    fn label_found_in_either_copy() {
        let label = label_of(claim());
        let block = label.encode();
        let last: &[u8] = &block;
        assert_eq!(look(&head(0, &block), &[0; BLOCK], LAST_AT), Found::Ours(label.clone()));
        assert_eq!(look(&head(0, b""), last, LAST_AT), Found::Ours(label.clone()));
        let mut torn = block.clone();
        torn[100..].fill(0);
        assert_eq!(look(&head(0, &torn), last, LAST_AT), Found::Ours(label));
        assert!(matches!(look(&head(0, &torn), &[0; BLOCK], LAST_AT), Found::Foreign { what, at: 0 } if what.contains("damaged")));
    }

    #[test]
    fn copy_of_label_behind_foreign_data_is_foreign() {
        let last = label_of(claim()).encode();
        assert!(matches!(look(&head(512, b"EFI PART"), &last, LAST_AT), Found::Foreign { .. }));
    }

    #[test]
    fn decision_table() {
        let ours = |claim| Found::Ours(label_of(claim));
        let foreign = || Found::Foreign { what: "XFS file system".to_owned(), at: 0 };
        let other_cluster = Claim { cluster: ClusterId(id(2, 0, 0)), ..claim() };
        let other_drive = Claim { drive: DriveId(id(1, 1, 6)), ..claim() };
        let other_node = Claim { node: NodeId(id(1, 2, 0)), ..claim() };
        let force = Claim { force: true, ..claim() };
        let open_only = Claim { open_only: true, ..claim() };
        let both = Claim { open_only: true, ..force };
        type Outcome = Result<&'static str, ErrorCode>;
        let table: [(&str, Found, Claim, Outcome); 16] = [
            ("blank", Found::Blank, claim(), Ok("format")),
            ("blank, open only", Found::Blank, open_only, Err(ErrorCode::NotFound)),
            ("blank, open only, force", Found::Blank, both, Err(ErrorCode::NotFound)),
            ("foreign", foreign(), claim(), Err(ErrorCode::ForeignData)),
            ("foreign, force", foreign(), force, Ok("format")),
            ("foreign, open only", foreign(), open_only, Err(ErrorCode::NotFound)),
            ("foreign, open only, force", foreign(), both, Err(ErrorCode::NotFound)),
            ("ours", ours(claim()), claim(), Ok("open")),
            ("ours, force", ours(claim()), force, Ok("open")),
            ("ours, open only", ours(claim()), open_only, Ok("open")),
            ("other cluster", ours(other_cluster), claim(), Err(ErrorCode::ForeignData)),
            ("other cluster, force", ours(other_cluster), force, Ok("format")),
            ("other cluster, open only, force", ours(other_cluster), both, Err(ErrorCode::ForeignData)),
            ("other drive", ours(other_drive), claim(), Err(ErrorCode::Conflict)),
            ("other drive, force", ours(other_drive), force, Err(ErrorCode::Conflict)),
            ("other node, force", ours(other_node), force, Err(ErrorCode::Conflict)),
        ];
        for (name, found, claim, outcome) in table {
            let decided = decide(found, claim, BLOCKS);
            let decided = decided.map(|d| if d == Decision::Format { "format" } else { "open" }).map_err(|e| {
                assert!(e.hint().is_some(), "{name}: says what to do");
                e.kind().unwrap()
            });
            assert_eq!(decided, outcome, "{name}");
        }
    }

    #[test]
    fn drive_that_shrank_is_refused_and_one_that_grew_is_not() {
        let found = || Found::Ours(label_of(claim()));
        assert_eq!(decide(found(), claim(), BLOCKS - 1).unwrap_err().kind(), Some(ErrorCode::Conflict));
        assert!(decide(found(), claim(), BLOCKS + 1).is_ok());
    }

    proptest! {
        #[test]
        fn anything_but_zeros_is_never_blank(at in 0..HEAD_BYTES, byte in 1u8..) {
            prop_assert_ne!(look(&head(at, &[byte]), &[0; BLOCK], LAST_AT), Found::Blank);
        }
    }
}
