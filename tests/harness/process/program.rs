//! Commands that end by themselves, run to their end within a limit.

use super::{Result, failed};
use crate::guest::target::{dying_with_us, signal};
use crate::guest::wait::wait_for;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// `None`: ended by a signal.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Outcome {
    #[track_caller]
    pub fn expect_ok(self, what: &str) -> Self {
        assert_eq!(self.code, Some(0), "{what}\n--- out ---\n{}\n--- err ---\n{}", self.out, self.err);
        self
    }

    /// All it said, for errors.
    pub fn said(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

/// A command under way. Killed when dropped.
pub struct Running {
    name: String,
    child: Option<Child>,
    dir: tempfile::TempDir,
}

/// Starts `program`; its output is kept aside in files, so that no pipe can fill.
pub fn start(program: &Path, arguments: &[String], environment: &[(&str, &str)]) -> Result<Running> {
    let name = program.display().to_string();
    let wrong = |e: std::io::Error| failed(name.clone(), e.to_string());
    let dir = tempfile::tempdir().map_err(wrong)?;
    let file = |which: &str| std::fs::File::create(dir.path().join(which)).map_err(wrong);
    let child = dying_with_us(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .stdout(file("out")?)
        .stderr(file("err")?)
        .spawn()
        .map_err(wrong)?;
    Ok(Running { name, child: Some(child), dir })
}

impl Running {
    /// Ctrl-C. Nothing, if it has ended already.
    pub fn interrupt(&mut self) -> Result<()> {
        let name = self.name.clone();
        let child = self.child.as_mut().expect("it was not waited for");
        match child.try_wait().map_err(|e| failed(name, e.to_string()))? {
            Some(_) => Ok(()),
            None => signal("-INT", child.id()),
        }
    }

    /// Its end; killed, and an error, if that takes longer than `limit`.
    pub fn wait(mut self, limit: Duration) -> Result<Outcome> {
        let name = self.name.clone();
        let child = self.child.as_mut().expect("it is waited for once");
        let ended = wait_for(&format!("the end of {name}"), limit, || child.try_wait().map_err(|e| failed(name.clone(), e.to_string())));
        match ended {
            Ok(status) => {
                self.child = None;
                Ok(Outcome { code: status.code(), out: self.text("out"), err: self.text("err") })
            }
            Err(why) => Err(failed(why.to_string(), format!("\n{}{}", self.text("out"), self.text("err")))),
        }
    }

    fn text(&self, which: &str) -> String {
        std::fs::read(self.dir.path().join(which)).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill(); // gone already is what is wanted
            let _ = child.wait();
        }
    }
}

pub fn run(program: &Path, arguments: &[String], limit: Duration) -> Result<Outcome> {
    start(program, arguments, &[])?.wait(limit)
}

/// Words as arguments.
pub fn words(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// Where a program of the build lies.
pub fn built(name: &str) -> Result<PathBuf> {
    crate::guest::penstock_target::built_program(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn program_run_gives_code_and_both_outputs() {
        let script = words("-c").into_iter().chain(["echo a; echo b >&2; exit 3".to_owned()]).collect::<Vec<_>>();
        let outcome = run(Path::new("/bin/sh"), &script, Duration::from_secs(20)).unwrap();
        assert_eq!((outcome.code, outcome.out.as_str(), outcome.err.as_str()), (Some(3), "a\n", "b\n"));
    }

    #[test]
    fn program_that_does_not_end_is_an_error_with_what_it_said() {
        let script = words("-c").into_iter().chain(["echo here; exec sleep 600".to_owned()]).collect::<Vec<_>>();
        let running = start(Path::new("/bin/sh"), &script, &[]).unwrap();
        wait_for("its first word", Duration::from_secs(20), || Ok((running.text("out") == "here\n").then_some(()))).unwrap();
        let error = running.wait(Duration::from_millis(30)).unwrap_err().to_string();
        assert!(error.contains("did not happen") && error.contains("here"), "{error}");
    }
}
