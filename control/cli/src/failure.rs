//! Why a command did not do what was asked, in words, and as an exit code.

use std::fmt;
use std::process::ExitCode;

use penstock_api::http::ApiError;

#[derive(Debug)]
pub enum Failure {
    /// Control refused, with the reason.
    Refused(ApiError),
    /// Control does not answer.
    Unreachable { api: String, reason: String },
    /// What was typed cannot be meant.
    Usage { message: String, hint: String },
    /// Taken in and durable, but not done when the wait ended.
    Unfinished { what: String, reason: String },
    /// Control answered something unintelligible.
    Garbled(String),
    /// The answer could not be written.
    Output(std::io::Error),
    /// Whoever read the answer has seen enough (`| head`): not a failure, but nothing more to do.
    Closed,
}

impl Failure {
    /// Documented in `penstock --help`.
    pub fn code(&self) -> u8 {
        match self {
            Self::Closed => 0,
            Self::Refused(_) | Self::Garbled(_) | Self::Output(_) => 1,
            Self::Usage { .. } => 2,
            Self::Unreachable { .. } => 3,
            Self::Unfinished { .. } => 4,
        }
    }

    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => {
                write!(f, "error: {}", error.message)?;
                error.hint.iter().try_for_each(|hint| write!(f, "\nhint: {hint}"))
            }
            Self::Unreachable { api, reason } => write!(
                f,
                "error: penstock-control does not answer at {api}: {reason}\n\
                 hint: start it (systemctl start penstock-control), or say where it is with --api or PENSTOCK_API"
            ),
            Self::Usage { message, hint } => write!(f, "error: {message}\nhint: {hint}"),
            Self::Unfinished { what, reason } => write!(
                f,
                "{what} is taken in, but not done yet: {reason}\n\
                 hint: it will be done when that has passed; look with `penstock node show`"
            ),
            Self::Garbled(reason) => write!(
                f,
                "error: penstock-control's answer is not understood: {reason}\n\
                 hint: check that penstock and penstock-control are of the same version"
            ),
            Self::Closed => Ok(()),
            Self::Output(error) => write!(f, "error: cannot write the answer: {error}"),
        }
    }
}
