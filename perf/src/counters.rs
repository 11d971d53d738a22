//! Cycles and instructions of whole processes, user and kernel, over one turn of an arm.
//!
//! Reads Linux's perf events directly: one group (cycles, instructions) on every thread that a process has when the turn
//! starts; threads born later are inherited by theirs. Deliberately not here: dividing them by I/Os.

use std::fs;
use std::io;

use perf_event::events::Hardware;
use perf_event::{Builder, Counter};
use serde::{Deserialize, Serialize};

/// What was counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counts {
    pub cycles: u64,
    pub instructions: u64,
}

impl Counts {
    pub fn plus(self, other: Self) -> Self {
        Self { cycles: self.cycles + other.cycles, instructions: self.instructions + other.instructions }
    }
}

/// Why nothing could be counted.
#[derive(Debug, thiserror::Error)]
pub enum CountersError {
    #[error("this machine has no counters for cycles and instructions (a hypervisor may hide them): {source}")]
    Absent { source: io::Error },
    #[error("process {pid} cannot be counted: {source}; perf events need root or kernel.perf_event_paranoid ≤ 1")]
    Open { pid: u32, source: io::Error },
    #[error("process {pid}: its threads cannot be listed: {source}; it may have ended")]
    Threads { pid: u32, source: io::Error },
    #[error("counters could not be read: {0}")]
    Read(io::Error),
    #[error("counters ran for {running_percent:.0} % of the time; something else uses them, so their figures are estimates and not taken")]
    Multiplexed { running_percent: f64 },
}

/// Counters attached to some processes, at rest until started.
pub struct Counters {
    cycles: Vec<Counter>,
    instructions: Vec<Counter>,
}

/// Threads of a process now.
pub fn threads(pid: u32) -> io::Result<Vec<i32>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        if let Some(tid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) {
            found.push(tid);
        }
    }
    Ok(found)
}

/// ENOENT, ENODEV and EOPNOTSUPP: the kernel knows no such event here.
fn is_absent(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(2 | 19 | 95))
}

/// True where cycles and instructions can be counted at all.
pub fn are_available() -> bool {
    !matches!(Counters::attach(&[std::process::id()]), Err(CountersError::Absent { .. }))
}

/// CPU time that all threads of some processes have used so far, in nanoseconds. What is left where there are no counters.
pub fn cpu_nanos(pids: &[u32]) -> io::Result<u64> {
    let mut sum = 0;
    for &pid in pids {
        for tid in threads(pid)? {
            // Threads end at any time; one that is gone has no line.
            let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).unwrap_or_default();
            sum += text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()).unwrap_or(0);
        }
    }
    Ok(sum)
}

impl Counters {
    /// Attaches to every thread of the processes.
    pub fn attach(pids: &[u32]) -> Result<Self, CountersError> {
        let mut counters = Self { cycles: Vec::new(), instructions: Vec::new() };
        for &pid in pids {
            for tid in threads(pid).map_err(|source| CountersError::Threads { pid, source })? {
                let open = |event: Hardware| {
                    let mut builder = Builder::new(event);
                    builder.observe_pid(tid).any_cpu().inherit(true).include_kernel();
                    builder.build()
                };
                match (open(Hardware::CPU_CYCLES), open(Hardware::INSTRUCTIONS)) {
                    (Ok(cycles), Ok(instructions)) => {
                        counters.cycles.push(cycles);
                        counters.instructions.push(instructions);
                    }
                    // A thread that ended between listing and opening has nothing left to count.
                    (Err(error), _) | (_, Err(error)) if error.raw_os_error() == Some(3) => {}
                    (Err(source), _) | (_, Err(source)) if is_absent(&source) => return Err(CountersError::Absent { source }),
                    (Err(source), _) | (_, Err(source)) => return Err(CountersError::Open { pid, source }),
                }
            }
        }
        Ok(counters)
    }

    fn all(&mut self) -> impl Iterator<Item = &mut Counter> {
        self.cycles.iter_mut().chain(&mut self.instructions)
    }

    /// Counts from zero.
    pub fn start(&mut self) -> Result<(), CountersError> {
        for counter in self.all() {
            counter.reset().and_then(|()| counter.enable()).map_err(CountersError::Read)?;
        }
        Ok(())
    }

    /// Stops and gives what was counted since the start.
    pub fn stop(&mut self) -> Result<Counts, CountersError> {
        for counter in self.all() {
            counter.disable().map_err(CountersError::Read)?;
        }
        let sum = |counters: &mut [Counter]| {
            counters.iter_mut().try_fold(0, |sum, counter| {
                let data = counter.read_count_and_time().map_err(CountersError::Read)?;
                if data.time_running < data.time_enabled / 100 * 99 {
                    let running_percent = data.time_running as f64 / data.time_enabled as f64 * 100.0;
                    return Err(CountersError::Multiplexed { running_percent });
                }
                Ok(sum + data.count)
            })
        };
        Ok(Counts { cycles: sum(&mut self.cycles)?, instructions: sum(&mut self.instructions)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spin(rounds: u64) -> u64 {
        (0..rounds).fold(1, |sum, round| std::hint::black_box(sum ^ round))
    }

    /// Where the machine shows no counters there is nothing to test; the ratio command says so to the user.
    fn attached() -> Option<Counters> {
        match Counters::attach(&[std::process::id()]) {
            Ok(counters) => Some(counters),
            Err(error) => {
                eprintln!("not tested: {error}");
                None
            }
        }
    }

    #[test]
    fn ten_times_the_work_counts_about_ten_times_the_instructions() {
        let Some(mut counters) = attached() else { return };
        let mut count = |rounds| {
            counters.start().unwrap();
            spin(rounds);
            counters.stop().unwrap().instructions as f64
        };
        // Other tests of this process run beside and are counted too, so only the order of magnitude can be asked for.
        let little = count(10_000_000);
        let much = count(400_000_000);
        assert!(little > 2e7, "{little}");
        assert!(much > 1e9, "{much}");
    }

    #[test]
    fn cpu_time_grows_while_we_spin() {
        let before = cpu_nanos(&[std::process::id()]).unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < std::time::Duration::from_millis(30) {
            spin(1000);
        }
        assert!(cpu_nanos(&[std::process::id()]).unwrap() > before);
    }

    #[test]
    fn process_that_does_not_exist_is_named() {
        let error = Counters::attach(&[u32::MAX / 4]).err().unwrap();
        assert!(error.to_string().contains(&(u32::MAX / 4).to_string()), "{error}");
    }
}
