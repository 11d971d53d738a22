//! Names that people give to volumes. They become parts of socket paths and NQNs, so their alphabet is narrow.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest name in bytes: a vhost socket path of run dir, `vhost/` and name stays below the 108 bytes of sun_path.
pub const NAME_BYTES_MAX: usize = 63;

/// A volume's name: 1 to 63 of `a-z A-Z 0-9 . _ -`, starting with a letter or digit, and not of the form of an id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[cfg_attr(feature = "openapi", schema(value_type = String, example = "db-0"))]
pub struct VolumeName(String);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("a name is missing: use 1 to {NAME_BYTES_MAX} letters, digits, '.', '_' or '-'")]
    Empty,
    #[error("the name has {length} bytes, the most is {NAME_BYTES_MAX}")]
    TooLong { length: usize },
    #[error(
        "{found:?} may not be in a name: use letters, digits, '.', '_' and '-', starting with a letter or digit"
    )]
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
            return Err(NameError::LooksLikeId {
                text: text.to_owned(),
            });
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn name_bad_forms_refused() {
        for bad in [
            "",
            ".hidden",
            "-x",
            "a/b",
            "a b",
            "ä",
            &"x".repeat(64),
            "0194a5c1-0000-8001-8000-000000000001",
        ] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad}");
        }
        assert!(
            "0194a5c1000080018000000000000001"
                .parse::<VolumeName>()
                .is_err()
        );
        assert!("db-0.main_x".parse::<VolumeName>().is_ok());
    }

    proptest! {
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
