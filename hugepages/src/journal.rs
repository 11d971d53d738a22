//! What was changed, written down before it is changed. A line per record, synced, so that a crash at any moment leaves
//! a journal that names at least all that was done. Records name the state before, and undoing one works from any state
//! in between ([`crate::change`]), so one record too many does no harm.
//!
//! Nothing that is journaled survives a reboot of the machine, hence a journal of another boot is void.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::change::Change;
use crate::kernel::Kernel;
use crate::{Outcome, Problem};

const VERSION: u32 = 1;

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Journal { version: u32, boot_id: String },
    Intended { number: u64, change: Change },
    Unmade { number: u64 },
}

/// The open journal; holding it keeps every other run of this command out.
#[derive(Debug)]
pub struct Journal {
    file: File,
    path: PathBuf,
    boot_id: String,
    known: Known,
}

/// What the records say.
#[derive(Debug, Default)]
struct Known {
    standing: Vec<(u64, Change)>,
    next_number: u64,
    /// Bytes of whole records.
    length: u64,
}

impl Journal {
    /// Opens or makes the journal at `path`.
    ///
    /// # Errors
    /// Another run holds it; it can't be read or written; it holds what this version can't understand.
    pub fn open(path: &Path, kernel: &dyn Kernel) -> Outcome<Self> {
        let trouble = |e: std::io::Error| Problem::io(format!("journal {}", path.display()), &e);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(trouble)?;
        }
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).map_err(trouble)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Problem::new("another penstock-hugepages is changing this machine", "wait until it is done"));
            }
            Err(TryLockError::Error(err)) => return Err(trouble(err)),
        }
        let mut text = Vec::new();
        file.read_to_end(&mut text).map_err(trouble)?;
        let boot_id = boot_id(kernel);
        let known = Known::replay(&text, &boot_id, path)?;
        let mut journal = Self { file, path: path.into(), boot_id, known };
        journal.cut().map_err(trouble)?;
        Ok(journal)
    }

    /// The changes that stand, oldest first, without a lock and without writing: for `status` and `--dry-run`.
    pub fn peek(path: &Path, kernel: &dyn Kernel) -> Outcome<Vec<Change>> {
        let text = match fs::read(path) {
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            text => text.map_err(|e| Problem::io(format!("journal {}", path.display()), &e))?,
        };
        let known = Known::replay(&text, &boot_id(kernel), path)?;
        Ok(known.standing.into_iter().map(|(_, change)| change).collect())
    }

    /// Drops what follows the last whole record; all of it if nothing stands.
    fn cut(&mut self) -> std::io::Result<()> {
        if self.known.standing.is_empty() {
            self.known.length = 0;
        }
        self.file.set_len(self.known.length)?;
        self.file.seek(SeekFrom::End(0)).map(|_| ())
    }

    /// What stands and can be undone, oldest first.
    pub fn standing(&self) -> Vec<(u64, Change)> {
        self.known.standing.clone()
    }

    /// Writes down a change that is about to be made.
    pub fn intend(&mut self, change: &Change) -> Outcome<u64> {
        if self.known.length == 0 {
            let boot_id = self.boot_id.clone();
            self.append(&Record::Journal { version: VERSION, boot_id })?;
        }
        let number = self.known.next_number;
        self.append(&Record::Intended { number, change: change.clone() })?;
        self.known.next_number += 1;
        self.known.standing.push((number, change.clone()));
        Ok(number)
    }

    /// Writes down that a change was unmade.
    pub fn unmade(&mut self, number: u64) -> Outcome<()> {
        self.append(&Record::Unmade { number })?;
        self.known.standing.retain(|(n, _)| *n != number);
        if self.known.standing.is_empty() {
            self.cut().map_err(|e| self.trouble(&e))?;
        }
        Ok(())
    }

    fn append(&mut self, record: &Record) -> Outcome<()> {
        let mut line = serde_json::to_vec(record).expect("records are plain data");
        line.push(b'\n');
        let written = self.file.write_all(&line).and_then(|()| self.file.sync_data());
        if let Err(err) = written {
            // Half a record must not stand before a later whole one.
            let _ = self.file.set_len(self.known.length).and_then(|()| self.file.seek(SeekFrom::End(0)));
            return Err(self.trouble(&err));
        }
        self.known.length += line.len() as u64;
        Ok(())
    }

    fn trouble(&self, err: &std::io::Error) -> Problem {
        Problem::io(format!("journal {}", self.path.display()), err)
    }
}

fn boot_id(kernel: &dyn Kernel) -> String {
    kernel.read("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

impl Known {
    fn replay(text: &[u8], boot_id: &str, path: &Path) -> Outcome<Self> {
        let mut known = Self::default();
        // What follows the last line end was being written when the machine or the process died: not synced, so the
        // change was not begun.
        for line in text.split_inclusive(|&b| b == b'\n').filter(|l| l.ends_with(b"\n")) {
            let record: Record = serde_json::from_slice(line).map_err(|err| {
                let what = format!("journal {} holds a line that is no record ({err})", path.display());
                Problem::new(what, "keep a copy of it, undo by hand what it lists, then remove it")
            })?;
            match record {
                Record::Journal { version, .. } if version != VERSION => {
                    let what = format!("journal {} has version {version}, this command knows {VERSION}", path.display());
                    return Err(Problem::new(what, "run undo with the version that wrote it"));
                }
                Record::Journal { boot_id: of, .. } if of != boot_id => return Ok(Self::default()),
                Record::Journal { .. } => {}
                Record::Intended { number, change } => {
                    known.next_number = known.next_number.max(number.saturating_add(1));
                    known.standing.push((number, change));
                }
                Record::Unmade { number } => known.standing.retain(|(n, _)| *n != number),
            }
            known.length += line.len() as u64;
        }
        Ok(known)
    }
}

/// Makes the changes in order. If one fails, those of this call are unmade, newest first.
pub fn make_all(kernel: &mut dyn Kernel, journal: &mut Journal, changes: &[Change], mut say: impl FnMut(&str)) -> Outcome<()> {
    let mut made = Vec::new();
    for change in changes {
        let result = journal.intend(change).and_then(|number| {
            made.push((number, change.clone()));
            change.make(kernel)
        });
        match result {
            Ok(()) => say(&change.to_string()),
            Err(problem) => {
                say(&format!("failed: {change}; taking back what this run did"));
                return Err(match unmake_all(kernel, journal, made, say) {
                    Ok(_) => problem,
                    Err(second) => Problem::new(format!("{}; taking it back failed too: {}", problem.what, second.what), second.next),
                });
            }
        }
    }
    Ok(())
}

/// Unmakes changes, newest first; goes on past one that fails, which stays in the journal. Returns how many were unmade.
pub fn unmake_all(
    kernel: &mut dyn Kernel,
    journal: &mut Journal,
    changes: Vec<(u64, Change)>,
    mut say: impl FnMut(&str),
) -> Outcome<usize> {
    let (mut unmade, mut problem) = (0, None);
    for (number, change) in changes.into_iter().rev() {
        match change.unmake(kernel) {
            Ok(()) => {
                journal.unmade(number)?;
                say(&format!("undone: {change}"));
                unmade += 1;
            }
            Err(failed) => {
                say(&format!("not undone: {change}"));
                problem = Some(failed);
            }
        }
    }
    problem.map_or(Ok(unmade), Err)
}
