//! Names: of volumes and their sockets, which become parts of paths and so have a narrow alphabet, and NQNs.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name in bytes: a vhost socket path of run dir, `vhost/` and name stays below the 108 bytes of sun_path.
pub const NAME_BYTES_MAX: usize = 63;

/// A volume's name: 1 to 63 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit, and not of the form of an id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name is missing: use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-'")]
    Empty,
    #[error("the name has {length} bytes, the most is {NAME_BYTES_MAX}")]
    TooLong { length: usize },
    #[error("{found:?} may not be in a name: use letters, digits, '.', '_' and '-', starting with a letter or digit")]
    BadCharacter { found: char },
    #[error("\"{text}\" looks like an id: a name must be told apart from an id, choose another")]
    LooksLikeId { text: String },
}

impl VolumeName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VolumeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() {
            return Err(NameError::Empty);
        }
        if text.len() > NAME_BYTES_MAX {
            return Err(NameError::TooLong { length: text.len() });
        }
        let bad = text.chars().enumerate().find(|&(at, c)| {
            let inner = matches!(c, '.' | '_' | '-') && at > 0;
            !(c.is_ascii_alphanumeric() || inner)
        });
        if let Some((_, found)) = bad {
            return Err(NameError::BadCharacter { found });
        }
        // Any UUID form, ours or not, so that `volume show X` can never mean two things.
        if uuid::Uuid::try_parse(text).is_ok() {
            return Err(NameError::LooksLikeId { text: text.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for VolumeName {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> String {
        name.0
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// A node's name, of the same alphabet. Given by an operator; the node's id is what counts.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(VolumeName);

impl NodeName {
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }
}

impl FromStr for NodeName {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        text.parse().map(Self)
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Longest NQN in bytes (NVM Express base specification, 4.7).
pub const NQN_BYTES_MAX: usize = 223;

/// An NVMe qualified name, `nqn.2026-11.io.penstock:db-0`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Nqn(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NqnError {
    #[error("\"{text}\" is not an NQN: it must start with nqn.YYYY-MM. and a reversed domain, then ':' and a name")]
    BadForm { text: String },
    #[error("the NQN has {length} bytes, the most is {NQN_BYTES_MAX}")]
    TooLong { length: usize },
    #[error("{found:?} may not be in an NQN: use letters, digits, '.', '_', '-' and ':'")]
    BadCharacter { found: char },
}

impl Nqn {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Nqn {
    type Err = NqnError;

    fn from_str(text: &str) -> Result<Self, NqnError> {
        if text.len() > NQN_BYTES_MAX {
            return Err(NqnError::TooLong { length: text.len() });
        }
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-' | ':');
        if let Some(found) = text.chars().find(|&c| !plain(c)) {
            return Err(NqnError::BadCharacter { found });
        }
        let date = text.strip_prefix("nqn.").map(str::as_bytes);
        let dated = date.is_some_and(|date| {
            let form = b"dddd-dd.";
            date.len() > form.len() && form.iter().zip(date).all(|(&f, &b)| if f == b'd' { b.is_ascii_digit() } else { f == b })
        });
        if !dated || !text.contains(':') {
            return Err(NqnError::BadForm { text: text.to_owned() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for Nqn {
    type Error = NqnError;
    fn try_from(text: String) -> Result<Self, NqnError> {
        text.parse()
    }
}

impl From<Nqn> for String {
    fn from(nqn: Nqn) -> String {
        nqn.0
    }
}

impl fmt::Display for Nqn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn name_bad_forms_refused() {
        for bad in ["", ".hidden", "-x", "a/b", "a b", "ä", &"x".repeat(64), "0194a5c1-0000-8001-8000-000000000001"] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad}");
        }
        assert!("0194a5c1000080018000000000000001".parse::<VolumeName>().is_err());
        assert!("db-0.main_x".parse::<VolumeName>().is_ok());
    }

    #[test]
    fn nqn_forms_judged() {
        for good in ["nqn.2026-11.io.penstock:db-0", "nqn.2014-08.org.nvmexpress:uuid:0194a5c1"] {
            assert!(good.parse::<Nqn>().is_ok(), "{good}");
        }
        for bad in ["", "nqn.", "nqn.2026-11.", "nqn.2026-11.io.penstock", "nqn.26-11.io:x", "iqn.2026-11.io:x", "nqn.2026-11.io:a/b"] {
            assert!(bad.parse::<Nqn>().is_err(), "{bad}");
        }
        assert!(format!("nqn.2026-11.io:{}", "x".repeat(NQN_BYTES_MAX)).parse::<Nqn>().is_err());
    }

    proptest! {
        #[test]
        fn nqn_random_text_never_panics(text in "(nqn.)?\\PC{0,40}") {
            let _ = text.parse::<Nqn>();
        }
        #[test]
        fn name_accepted_is_a_plain_path_component(text in "\\PC{0,70}") {
            if let Ok(name) = text.parse::<VolumeName>() {
                prop_assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
                let json = serde_json::to_string(&name).unwrap();
                prop_assert_eq!(serde_json::from_str::<VolumeName>(&json).unwrap(), name);
            }
        }
    }
}
