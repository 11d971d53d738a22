//! Bounded waiting: a deadline, and polling up to one. Not for measuring time.

use super::{GuestError, Result};
use std::time::{Duration, Instant};

/// A point in time that a sequence of waits shares.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    at: Instant,
    limit: Duration,
}

impl Deadline {
    pub fn after(limit: Duration) -> Self {
        Deadline { at: Instant::now() + limit, limit }
    }

    pub fn left(&self) -> Duration {
        self.at.saturating_duration_since(Instant::now())
    }

    pub fn passed(&self) -> bool {
        self.left().is_zero()
    }

    pub fn limit(&self) -> Duration {
        self.limit
    }

    pub fn timeout(&self, what: impl Into<String>, detail: impl Into<String>) -> GuestError {
        GuestError::Timeout { what: what.into(), limit: self.limit, detail: detail.into() }
    }
}

/// Asks `probe` every 20 ms until it answers `Some`; an error of the probe ends the wait at once.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Deadline::after(limit);
    loop {
        if let Some(found) = probe()? {
            return Ok(found);
        }
        if deadline.passed() {
            return Err(deadline.timeout(what, ""));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wait_for_a_probe_that_never_answers_names_what_it_waited_for() {
        let err = wait_for::<()>("the impossible", Duration::from_millis(1), || Ok(None)).unwrap_err();
        assert!(err.to_string().contains("the impossible"), "{err}");
    }

    #[test]
    fn wait_for_a_probe_that_fails_ends_at_once() {
        let mut asked = 0;
        let err = wait_for::<()>("x", Duration::from_secs(60), || {
            asked += 1;
            Err(GuestError::failed("probe", "broken"))
        });
        assert!(matches!(err, Err(GuestError::Failed { .. })));
        assert_eq!(asked, 1);
    }
}
