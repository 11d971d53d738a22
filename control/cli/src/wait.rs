//! Waits for what control has taken in and the node has not done yet, with a line on standard error that says why.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use penstock_api::http::{ApiError, Progress};
use penstock_api::rpc::ErrorCode;

use crate::failure::Failure;
use crate::output;

const LOOK_EVERY: Duration = Duration::from_millis(300);

/// A line that is overwritten on a terminal, and written once per change elsewhere.
struct Line {
    terminal: bool,
    last: String,
}

impl Line {
    fn write(&mut self, text: &str) {
        let mut err = std::io::stderr().lock();
        // A progress line that cannot be written is no reason to stop waiting.
        let _ = match self.terminal {
            true => write!(err, "\r\x1b[K{text}").and_then(|()| err.flush()),
            false if self.last != text => writeln!(err, "{text}"),
            false => Ok(()),
        };
        text.clone_into(&mut self.last);
    }

    fn end(&self) {
        if self.terminal && !self.last.is_empty() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

/// Looks until `look` says that there is nothing to wait for, or `limit` has passed. `None` from `look` means that
/// the thing is gone, which is what a removal waits for.
pub fn until_settled<T>(
    what: &str,
    limit: Duration,
    mut look: impl FnMut() -> Result<Option<(T, Progress)>, Failure>,
) -> Result<Option<T>, Failure> {
    let started = Instant::now();
    let mut line = Line { terminal: std::io::stderr().is_terminal(), last: String::new() };
    loop {
        let found = look()?;
        let reason = match found {
            None => {
                line.end();
                return Ok(None);
            }
            Some((thing, Progress::Settled)) => {
                line.end();
                return Ok(Some(thing));
            }
            Some((_, Progress::Refused { code, message, hint })) if code != ErrorCode::NotReady => {
                line.end();
                return Err(Failure::Refused(ApiError { code, message, hint }));
            }
            Some((_, progress)) => output::progress(&progress),
        };
        if started.elapsed() >= limit {
            line.end();
            return Err(Failure::Unfinished { what: what.to_owned(), reason });
        }
        let waited = if line.terminal { format!(" ({} s)", started.elapsed().as_secs()) } else { String::new() };
        line.write(&format!("{what} is {reason}{waited}"));
        std::thread::sleep(LOOK_EVERY.min(limit));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_ends_when_settled_gone_refused_or_over() {
        let mut looks = 0;
        let settled = until_settled("x", Duration::from_secs(60), || {
            looks += 1;
            let pending = Progress::Pending { reason: "the node is away".to_owned() };
            Ok(Some((looks, if looks < 3 { pending } else { Progress::Settled })))
        });
        assert_eq!(settled.unwrap(), Some(3));
        assert!(until_settled("x", Duration::ZERO, || Ok(None::<((), Progress)>)).unwrap().is_none());
        let refused = Progress::Refused { code: ErrorCode::Capacity, message: "full".to_owned(), hint: None };
        let refused = until_settled("x", Duration::from_secs(60), || Ok(Some(((), refused.clone())))).unwrap_err();
        assert_eq!(refused.code(), 1);
        let pending = Progress::Pending { reason: "the node is away".to_owned() };
        let over = until_settled("volume a", Duration::ZERO, || Ok(Some(((), pending.clone())))).unwrap_err();
        assert_eq!((over.code(), over.to_string().lines().count()), (4, 2));
    }
}
