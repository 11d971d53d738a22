//! Bounded waiting: a deadline, and polling up to one. Not for measuring time.

use super::{GuestError, Result};
use std::time::{Duration, Instant};

/// A bound that a sequence of waits shares. It counts time in which somebody was looking: of the time between two looks no
/// more than [`LOOK`], so that a machine that slept, or processes that were stopped, come back with the rest of it.
#[derive(Debug)]
pub struct Deadline {
    limit: Duration,
    left: Duration,
    looked: Instant,
}

/// Whoever waits looks at least so often.
const LOOK: Duration = Duration::from_secs(2);

impl Deadline {
    pub fn after(limit: Duration) -> Self {
        Deadline { limit, left: limit, looked: Instant::now() }
    }

    pub fn left(&mut self) -> Duration {
        self.left_at(Instant::now())
    }

    fn left_at(&mut self, now: Instant) -> Duration {
        let since = now.saturating_duration_since(self.looked);
        self.looked = now;
        self.left = self.left.saturating_sub(since.min(LOOK));
        self.left
    }

    /// How long to block before the next look.
    pub fn look(&mut self) -> Duration {
        self.left().min(LOOK)
    }

    pub fn passed(&mut self) -> bool {
        self.left().is_zero()
    }

    pub fn timeout(&self, what: impl Into<String>, detail: impl Into<String>) -> GuestError {
        GuestError::Timeout { what: what.into(), limit: self.limit, detail: detail.into() }
    }
}

/// Asks `probe` every 20 ms until it answers `Some`; an error of the probe ends the wait at once.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let mut deadline = Deadline::after(limit);
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
    fn deadline_counts_time_between_looks_and_no_long_absence() {
        let mut deadline = Deadline::after(Duration::from_secs(5));
        let start = deadline.looked;
        let mut left_at = |ms| deadline.left_at(start + Duration::from_millis(ms)).as_millis();
        assert_eq!(left_at(300), 4700);
        assert_eq!(left_at(3_600_000), 2700, "an hour's sleep");
        assert_eq!([3_601_000, 3_602_000, 3_603_000].map(&mut left_at), [1700, 700, 0]);
    }

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
