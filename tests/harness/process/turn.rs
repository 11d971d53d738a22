//! One house at a time, over all test programs of this machine: a file lock.

use super::{Result, failed};
use crate::guest::wait::wait_for;
use std::fs::{File, TryLockError};
use std::time::Duration;

/// More than all process tests together take.
const LIMIT: Duration = Duration::from_secs(900);

/// Held while a house stands.
#[derive(Debug)]
pub struct Turn(#[expect(dead_code, reason = "closing it gives the turn back")] File);

impl Turn {
    pub fn wait() -> Result<Self> {
        let path = std::env::temp_dir().join("penstock-process-tests.lock");
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| failed(path.display().to_string(), e.to_string()))?;
        wait_for("the turn of this test", LIMIT, || match file.try_lock() {
            Ok(()) => Ok(Some(())),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(e)) => Err(failed(path.display().to_string(), e.to_string())),
        })?;
        Ok(Turn(file))
    }
}
