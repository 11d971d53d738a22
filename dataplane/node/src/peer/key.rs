//! The cluster's key: what nodes of one cluster share and nobody else has. A node proves that it has it without showing it.
//!
//! Not here: what is proven ([`super::handshake`]), and how the key comes to all nodes, which is the operator's.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use hmac::{Hmac, Mac};
use penstock_wire::peer::PROOF;
use sha2::Sha256;

/// Shorter keys are refused.
pub const KEY_BYTES_MIN: usize = 32;
/// Longer files are not keys.
const KEY_BYTES_MAX: usize = 4096;

#[derive(Clone, PartialEq, Eq)]
pub struct ClusterKey(Arc<[u8]>);

impl std::fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ClusterKey(not shown)")
    }
}

/// How to make one, for errors.
pub const HOW_TO_MAKE: &str =
    "Make one with `(umask 077; head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \\n' > FILE)` and give all nodes of the cluster the same";

impl ClusterKey {
    /// Reads a key: hexadecimal digits and white space alone, or raw bytes.
    ///
    /// # Errors
    /// What is wrong with the file, and what would be right.
    pub fn read(path: &Path) -> Result<Self, (String, String)> {
        let shown = path.display();
        let make = || HOW_TO_MAKE.to_owned();
        let unreadable = |e: std::io::Error| (format!("the cluster key {shown} cannot be read: {e}"), make());
        let found = std::fs::metadata(path).map_err(unreadable)?;
        if !found.is_file() {
            return Err((format!("the cluster key {shown} is not a file"), make()));
        }
        if found.mode() & 0o007 != 0 {
            let what = format!("the cluster key {shown} is open to everybody on this machine (mode {:o})", found.mode() & 0o777);
            return Err((
                what,
                format!("Whoever has it is a node of the cluster: `chmod 600 {shown}`, and make another if it may have been read"),
            ));
        }
        if found.len() > KEY_BYTES_MAX as u64 {
            return Err((format!("the cluster key {shown} has {} bytes; the most is {KEY_BYTES_MAX}", found.len()), make()));
        }
        Self::parse(&std::fs::read(path).map_err(unreadable)?).map_err(|what| (format!("the cluster key {shown} {what}"), make()))
    }

    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let digits: Option<Vec<u8>> =
            bytes.iter().filter(|b| !b.is_ascii_whitespace()).map(|b| char::from(*b).to_digit(16).map(|digit| digit as u8)).collect();
        let key = match digits {
            Some(digits) if digits.len() % 2 != 0 => return Err(format!("has {} hexadecimal digits, an odd number", digits.len())),
            Some(digits) => digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect(),
            None => bytes.to_vec(),
        };
        if key.len() < KEY_BYTES_MIN {
            return Err(format!("is of {} bytes; the least is {KEY_BYTES_MIN}", key.len()));
        }
        Ok(Self(key.into()))
    }

    fn keyed(&self, parts: &[&[u8]]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("HMAC takes keys of any length");
        parts.iter().for_each(|part| mac.update(part));
        mac
    }

    /// HMAC-SHA-256 over the parts, one after the other.
    pub fn prove(&self, parts: &[&[u8]]) -> [u8; PROOF] {
        self.keyed(parts).finalize().into_bytes().into()
    }

    /// Whether `proof` is that; takes the same time wherever it differs.
    pub fn verifies(&self, parts: &[&[u8]], proof: &[u8; PROOF]) -> bool {
        self.keyed(parts).verify_slice(proof).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// RFC 4231, test case 2, with its key made long enough by HMAC's own rule (zeros change nothing up to a block).
    #[test]
    fn proof_is_the_hmac_of_the_rfc() {
        let mut key = b"Jefe".to_vec();
        key.resize(64, 0);
        let key = ClusterKey::parse(&key).unwrap();
        let proof = key.prove(&[b"what do ya want ", b"for nothing?"]);
        let text: String = proof.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(text, "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
        assert!(key.verifies(&[b"what do ya want for nothing?"], &proof));
        let mut wrong = proof;
        wrong[31] ^= 1;
        assert!(!key.verifies(&[b"what do ya want for nothing?"], &wrong));
    }

    #[test]
    fn key_in_hexadecimal_and_raw_is_the_same_key() {
        let raw: Vec<u8> = (200..232).collect();
        let text: String = raw.iter().map(|b| format!("{b:02x}")).collect();
        assert_eq!(ClusterKey::parse(&raw), ClusterKey::parse(format!("{text}\n").as_bytes()));
        assert!(!format!("{:?}", ClusterKey::parse(&raw)).contains("200"));
    }

    #[test]
    fn key_file_that_is_short_open_or_absent_is_refused_with_what_to_do() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let refused = |path: &Path| ClusterKey::read(path).unwrap_err();
        assert!(refused(&path).1.contains("/dev/urandom"));
        for (bytes, part) in [(&b"abcdef"[..], "3 bytes"), (b"abc", "odd"), (b"", "0 bytes"), (&[b'x'; 5000], "most is 4096")] {
            std::fs::write(&path, bytes).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert!(refused(&path).0.contains(part), "{:?}", refused(&path));
        }
        std::fs::write(&path, [b'x'; 32]).unwrap();
        ClusterKey::read(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(refused(&path).1.contains("chmod 600"));
        assert!(refused(dir.path()).0.contains("not a file"));
    }
}
