//! Errors of penstockd's methods: codes of our own, below JSON-RPC's reserved range, each with a hint.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $name:ident = $code:literal, $word:literal;)+) => {
        /// What kind of thing went wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        #[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
        pub enum ErrorCode { $($(#[$doc])* $name,)+ }

        impl ErrorCode {
            pub const ALL: &[Self] = &[$(Self::$name),+];
            /// The JSON-RPC code.
            pub const fn code(self) -> i32 {
                match self { $(Self::$name => $code,)+ }
            }
            pub const fn from_code(code: i32) -> Option<Self> {
                match code { $($code => Some(Self::$name),)+ _ => None }
            }
            /// The word that the HTTP API and logs use.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$name => $word,)+ }
            }
        }
    };
}

codes! {
    /// The thing named does not exist.
    NotFound = -33001, "not_found";
    /// The name or place is taken.
    AlreadyExists = -33002, "already_exists";
    /// In use: exported, connected, or volumes live on it.
    Busy = -33003, "busy";
    /// The drive holds data that is not ours.
    ForeignData = -33004, "foreign_data";
    /// No room for it.
    Capacity = -33005, "capacity";
    /// The drive failed a flush and takes no writes until an operator clears it.
    Fenced = -33006, "fenced";
    /// The request itself is wrong; sending it again cannot help.
    Invalid = -33007, "invalid";
    /// Not yet or not now; sending it again later may help.
    NotReady = -33008, "not_ready";
    /// It contradicts what is there: same id with other properties, another cluster's claim.
    Conflict = -33009, "conflict";
    /// A bug, or something that has no better word.
    Internal = -33010, "internal";
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The `error` member of a response.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message} ({code})")]
pub struct RpcError {
    /// One of [`ErrorCode`], or one of JSON-RPC's or SPDK's own.
    pub code: i32,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<RpcErrorData>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RpcErrorData {
    /// What to do next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl RpcError {
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code: code.code(), message: message.into(), data: None }
    }

    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.data = Some(RpcErrorData { hint: Some(hint.into()) });
        self
    }

    /// `None` for a code that is not ours, such as JSON-RPC's -32601 (no such method).
    pub fn kind(&self) -> Option<ErrorCode> {
        ErrorCode::from_code(self.code)
    }

    pub fn hint(&self) -> Option<&str> {
        self.data.as_ref()?.hint.as_deref()
    }
}
