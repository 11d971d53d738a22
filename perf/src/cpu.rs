//! Who else used the CPUs while an arm ran.
//!
//! Own threads and foreign ones are told apart from /proc: run time in nanoseconds of every thread at both ends of a
//! turn. Short-lived threads escape that scan, so the coarser /proc/stat is read too, and the greater figure counts.
//! Time stolen by the hypervisor is foreign. Interrupt time and the kernel's own threads are nobody's: the arms' own packets and
//! disk writes are handled there. io_uring's workers are threads of the process that they work for, and come and go within a
//! turn: a process's own account, which keeps what they used, counts where it is greater than what its threads say.

use std::collections::HashMap;
use std::fs;
use std::io;

use serde::Serialize;

use crate::units::Nanos;

/// Above this share of the machine a turn is void (BENCH: foreign CPU > 1 %).
pub const FOREIGN_MAX: f64 = 0.01;

/// One tick of /proc/stat in nanoseconds (USER_HZ is 100 on every Linux).
const TICK: u64 = 10_000_000;

/// The state of the machine's CPU accounting at one moment.
pub struct CpuSnapshot {
    at: std::time::Instant,
    /// Run time of each thread, by (process, thread).
    run: HashMap<(u32, u32), u64>,
    /// Run time of each process in ticks, with that of its threads that ended.
    whole: HashMap<u32, u64>,
    /// Run time of all threads of the kernel's own.
    kernel: u64,
    /// Ticks of all CPUs in user, nice and system.
    busy_ticks: u64,
    stolen_ticks: u64,
    cpus: u64,
}

/// What others used between two snapshots, as shares of the whole machine's time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Foreign {
    pub share: f64,
    pub stolen_share: f64,
}

impl Foreign {
    /// True when the turn in between must not count.
    pub fn is_above(&self, share_max: f64) -> bool {
        self.share + self.stolen_share > share_max
    }
}

struct StatLine {
    busy: u64,
    stolen: u64,
    cpus: u64,
}

fn parse_stat(text: &str) -> Option<StatLine> {
    let mut lines = text.lines();
    let fields: Vec<u64> = lines.next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal
    let at = |index: usize| fields.get(index).copied();
    let cpus = lines.take_while(|line| line.starts_with("cpu")).count() as u64;
    Some(StatLine { busy: at(0)? + at(1)? + at(2)?, stolen: at(7).unwrap_or(0), cpus: cpus.max(1) })
}

/// PF_KTHREAD of the flags in /proc/PID/stat.
const KERNEL_THREAD: u64 = 0x0020_0000;

/// Whether /proc/PID/stat is of a thread of the kernel's own, and the process's user and system time in ticks.
fn parse_process(text: &str) -> Option<(bool, u64)> {
    // The name comes second, in parentheses, and may hold anything.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let at = |index: usize| fields.get(index)?.parse::<u64>().ok();
    Some((at(6)? & KERNEL_THREAD != 0, at(11)? + at(12)?))
}

#[derive(Default)]
struct Accounts {
    run: HashMap<(u32, u32), u64>,
    whole: HashMap<u32, u64>,
    kernel: u64,
}

fn accounts() -> Accounts {
    let numbers = |path: &str| -> Vec<u32> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    };
    let mut all = Accounts::default();
    for pid in numbers("/proc") {
        // Processes and threads end at any time; one that is gone has no line.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let Some((is_kernel, ticks)) = parse_process(&stat) else { continue };
        for tid in numbers(&format!("/proc/{pid}/task")) {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{tid}/schedstat")).unwrap_or_default();
            let Some(nanos) = text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok()) else { continue };
            if is_kernel {
                all.kernel += nanos;
            } else {
                all.run.insert((pid, tid), nanos);
            }
        }
        all.whole.insert(pid, ticks);
    }
    all
}

impl CpuSnapshot {
    pub fn take() -> io::Result<Self> {
        let stat = parse_stat(&fs::read_to_string("/proc/stat")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/stat does not start with a `cpu` line"))?;
        let Accounts { run, whole, kernel } = accounts();
        let at = std::time::Instant::now();
        Ok(Self { at, run, whole, kernel, busy_ticks: stat.busy, stolen_ticks: stat.stolen, cpus: stat.cpus })
    }

    /// What processes other than `own` used from `self` to `later`.
    pub fn foreign_until(&self, later: &Self, own: &[u32]) -> Foreign {
        let span = Nanos::from(later.at - self.at).0.max(1) * self.cpus;
        let mut scanned = 0;
        let mut of_own: HashMap<u32, u64> = own.iter().map(|pid| (*pid, 0)).collect();
        for (thread, nanos) in &later.run {
            let used = nanos.saturating_sub(self.run.get(thread).copied().unwrap_or(0));
            *of_own.get_mut(&thread.0).unwrap_or(&mut scanned) += used;
        }
        let ticks = |snapshot: &Self, pid: u32| snapshot.whole.get(&pid).copied().unwrap_or(0) * TICK;
        let ours: u64 = of_own.iter().map(|(pid, used)| (*used).max(ticks(later, *pid).saturating_sub(ticks(self, *pid)))).sum();
        let kernel = later.kernel.saturating_sub(self.kernel);
        // Two ticks a CPU are the resolution of that clock: less than that is no finding.
        let busy = (later.busy_ticks - self.busy_ticks) * TICK;
        let unseen = busy.saturating_sub(ours + scanned + kernel + 2 * TICK * self.cpus);
        let stolen = later.stolen_ticks.saturating_sub(self.stolen_ticks) * TICK;
        Foreign { share: (scanned + unseen) as f64 / span as f64, stolen_share: stolen as f64 / span as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const STAT: &str = "cpu  100 5 20 4000 3 1 2 7 0 0\ncpu0 50 5 10 2000 3 1 2 7 0 0\ncpu1 50 0 10 2000 0 0 0 0 0 0\nintr 1\n";

    fn snapshot(ms: u64, run: &[(u32, u64)], busy: u64, stolen: u64) -> CpuSnapshot {
        CpuSnapshot {
            at: std::time::Instant::now() + Duration::from_millis(ms),
            run: run.iter().map(|(pid, ms)| ((*pid, *pid), ms * 1_000_000)).collect(),
            whole: HashMap::new(),
            kernel: 0,
            busy_ticks: busy,
            stolen_ticks: stolen,
            cpus: 2,
        }
    }

    #[test]
    fn stat_line_gives_busy_without_idle_and_interrupts() {
        let stat = parse_stat(STAT).unwrap();
        assert_eq!((stat.busy, stat.stolen, stat.cpus), (125, 7, 2));
        assert!(parse_stat("nonsense").is_none());
    }

    #[test]
    fn own_processes_are_not_foreign_and_others_are() {
        let before = snapshot(0, &[(1, 100), (2, 50)], 15, 0);
        let after = snapshot(1000, &[(1, 1100), (2, 150)], 125, 0);
        let foreign = before.foreign_until(&after, &[1]);
        assert!((foreign.share - 0.05).abs() < 0.001, "{foreign:?}");
        assert!(foreign.is_above(FOREIGN_MAX));
        assert!(!before.foreign_until(&after, &[1, 2]).is_above(FOREIGN_MAX));
    }

    #[test]
    fn thread_that_came_and_went_shows_in_the_coarse_clock() {
        let before = snapshot(0, &[(1, 0)], 0, 0);
        let after = snapshot(1000, &[(1, 1000)], 150, 0);
        assert!((before.foreign_until(&after, &[1]).share - 0.23).abs() < 0.001);
    }

    #[test]
    fn workers_that_ended_and_kernel_threads_are_not_foreign() {
        let (mut before, mut after) = (snapshot(0, &[(1, 0)], 0, 0), snapshot(1000, &[(1, 900)], 150, 0));
        // 1.5 s of busy time: 0.9 s by a thread that lives, 0.3 s by one that ended, 0.3 s by the kernel.
        (before.whole, after.whole) = (HashMap::from([(1, 10)]), HashMap::from([(1, 130)]));
        after.kernel = 300_000_000;
        assert!(!before.foreign_until(&after, &[1]).is_above(FOREIGN_MAX));
        before.whole.clear();
        after.whole.clear();
        assert!(before.foreign_until(&after, &[1]).is_above(FOREIGN_MAX));
    }

    #[test]
    fn process_line_with_an_odd_name_is_read() {
        let line = "7 (a) (b c) S 1 7 7 0 -1 2129984 0 0 0 0 30 12 0 0 20 0 1 0";
        assert_eq!(parse_process(line), Some((true, 42)));
        assert_eq!(parse_process(&line.replace("2129984", "4194304")), Some((false, 42)));
        assert_eq!(parse_process("7 (x) S"), None);
    }

    #[test]
    fn stolen_time_is_foreign() {
        let foreign = snapshot(0, &[], 0, 0).foreign_until(&snapshot(1000, &[], 0, 3), &[]);
        assert!(foreign.is_above(FOREIGN_MAX), "{foreign:?}");
    }

    #[test]
    fn real_snapshots_see_this_process_run() {
        let before = CpuSnapshot::take().unwrap();
        let start = std::time::Instant::now();
        while start.elapsed() < Duration::from_millis(50) {
            std::hint::black_box(0);
        }
        let after = CpuSnapshot::take().unwrap();
        let as_foreign = before.foreign_until(&after, &[]).share;
        let as_own = before.foreign_until(&after, &[std::process::id()]).share;
        assert!(as_foreign > as_own, "{as_foreign} {as_own}");
    }
}
