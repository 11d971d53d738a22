//! Directories of our own for sockets and files, with mode 0700.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Names tried before giving up.
const TRIES: u32 = 1000;

/// Makes a new directory below `base` whose name starts with `name`. One that a killed process left behind under the same
/// process id is passed over.
///
/// # Errors
/// When none can be made.
pub fn directory(base: &Path, name: &str) -> io::Result<PathBuf> {
    for attempt in 0..TRIES {
        let path = base.join(format!("{name}-{}-{attempt}", std::process::id()));
        match std::fs::DirBuilder::new().mode(0o700).create(&path) {
            Ok(()) => return Ok(path),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error),
        }
    }
    Err(io::ErrorKind::AlreadyExists.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directory_left_behind_is_passed_over() {
        let base = tempfile::tempdir().unwrap();
        let (first, second) = (directory(base.path(), "x").unwrap(), directory(base.path(), "x").unwrap());
        assert_ne!(first, second);
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(second).unwrap().permissions().mode() & 0o777, 0o700);
    }

    #[test]
    fn base_that_does_not_exist_is_an_error() {
        assert!(directory(Path::new("/nonexistent"), "x").is_err());
    }
}
