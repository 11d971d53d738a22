//! Processor time of a process, from `/proc/PID/stat`.

use super::{Result, failed};
use std::time::Duration;

/// USER_HZ, which Linux fixes at 100 in what it tells programs.
const TICKS_PER_SECOND: u32 = 100;

/// User and system time of all threads of a process so far.
pub fn processor_time(pid: u32) -> Result<Duration> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path).map_err(|e| failed(path.clone(), e.to_string()))?;
    ticks(&text).map(|ticks| Duration::from_secs(ticks) / TICKS_PER_SECOND).ok_or_else(|| failed(path, text))
}

/// Fields 14 and 15 of proc(5)'s stat. The second field holds the name in brackets, with any character in it.
fn ticks(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace().skip(11);
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(next()? + next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_with_a_nasty_name_is_read() {
        assert_eq!(ticks("7 (a) b (c) R 1 7 7 0 -1 4194304 10 0 0 0 123 45 0 0 20 0 1"), Some(168));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn processor_time_of_a_process_that_works_grows() {
        let before = processor_time(std::process::id()).unwrap();
        crate::guest::wait::wait_for("time to pass", Duration::from_secs(30), || {
            std::hint::black_box((0..1_000_000u64).fold(0, |a: u64, b| a.wrapping_mul(31).wrapping_add(b)));
            Ok((processor_time(std::process::id())? > before).then_some(()))
        })
        .unwrap();
    }
}
