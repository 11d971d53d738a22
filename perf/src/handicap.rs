//! The negative controls of the ratios: extra work per I/O that must make a benchmark fail.
//!
//! A benchmark that passes whatever is added to our arm measures nothing. Each of these is a mistake that the design
//! forbids on the fast path: burning time, copying payload, sharing an atomic between cores.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Bytes of the copy handicap's two buffers together: larger than a second-level cache, so copies are cold.
const COPY_ARENA: usize = 16 << 20;

/// What is added per I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum HandicapKind {
    #[default]
    None,
    /// Nanoseconds of spinning.
    Spin(u64),
    /// Nanoseconds asleep.
    Sleep(u64),
    /// Bytes copied, cold.
    Copy(usize),
    /// Additions to one atomic that all lanes share.
    Atomic(u32),
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("handicap `{0}` is not understood: use none, spin:NANOSECONDS, sleep:NANOSECONDS, copy:BYTES or atomic:TIMES")]
pub struct HandicapError(String);

impl FromStr for HandicapKind {
    type Err = HandicapError;

    fn from_str(text: &str) -> Result<Self, HandicapError> {
        let bad = || HandicapError(text.to_owned());
        if text == "none" {
            return Ok(Self::None);
        }
        let (kind, amount) = text.split_once(':').ok_or_else(bad)?;
        let amount: u32 = amount.parse().map_err(|_| bad())?;
        match kind {
            "spin" => Ok(Self::Spin(amount.into())),
            "sleep" => Ok(Self::Sleep(amount.into())),
            "copy" if amount as usize <= COPY_ARENA / 2 => Ok(Self::Copy(amount as usize)),
            "atomic" => Ok(Self::Atomic(amount)),
            _ => Err(bad()),
        }
    }
}

impl fmt::Display for HandicapKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => write!(f, "none"),
            Self::Spin(nanos) => write!(f, "spin:{nanos}"),
            Self::Sleep(nanos) => write!(f, "sleep:{nanos}"),
            Self::Copy(bytes) => write!(f, "copy:{bytes}"),
            Self::Atomic(times) => write!(f, "atomic:{times}"),
        }
    }
}

/// The work itself, one per lane; lanes of one run share the atomic.
pub struct Handicap {
    kind: HandicapKind,
    arena: Vec<u8>,
    at: usize,
    shared: Arc<AtomicU64>,
}

impl Handicap {
    pub fn new(kind: HandicapKind, shared: Arc<AtomicU64>) -> Self {
        let arena = if matches!(kind, HandicapKind::Copy(_)) { vec![1; COPY_ARENA] } else { Vec::new() };
        Self { kind, arena, at: 0, shared }
    }

    pub fn none() -> Self {
        Self::new(HandicapKind::None, Arc::default())
    }

    /// Once per I/O.
    #[inline]
    pub fn apply(&mut self) {
        if self.kind != HandicapKind::None {
            self.work();
        }
    }

    #[cold]
    fn work(&mut self) {
        match self.kind {
            HandicapKind::None => {}
            HandicapKind::Spin(nanos) => {
                let end = Instant::now() + Duration::from_nanos(nanos);
                while Instant::now() < end {
                    std::hint::spin_loop();
                }
            }
            HandicapKind::Sleep(nanos) => std::thread::sleep(Duration::from_nanos(nanos)),
            HandicapKind::Copy(bytes) => {
                let (from, to) = self.arena.split_at_mut(COPY_ARENA / 2);
                if self.at + bytes > from.len() {
                    self.at = 0;
                }
                let range = self.at..self.at + bytes;
                to[range.clone()].copy_from_slice(&from[range]);
                std::hint::black_box(&to[self.at]);
                self.at += bytes;
            }
            HandicapKind::Atomic(times) => {
                for _ in 0..times {
                    self.shared.fetch_add(1, Ordering::SeqCst);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn handicap_printed_reads_back_equal() {
        for text in ["none", "spin:500", "sleep:700", "copy:4096", "atomic:3"] {
            assert_eq!(text.parse::<HandicapKind>().unwrap().to_string(), text);
        }
        assert!("slow".parse::<HandicapKind>().unwrap_err().to_string().contains("spin:NANOSECONDS"));
        assert!("copy:999999999".parse::<HandicapKind>().is_err());
    }

    #[test]
    fn handicap_of_atomics_touches_what_lanes_share() {
        let shared = Arc::new(AtomicU64::new(0));
        let mut lanes = [0; 2].map(|_| Handicap::new(HandicapKind::Atomic(3), shared.clone()));
        lanes.iter_mut().for_each(Handicap::apply);
        assert_eq!(shared.load(Ordering::SeqCst), 6);
    }

    #[test]
    fn handicap_of_copies_walks_its_arena_without_leaving_it() {
        let mut handicap = Handicap::new(HandicapKind::Copy(COPY_ARENA / 4 + 1), Arc::default());
        for _ in 0..5 {
            handicap.apply();
        }
        assert!(handicap.at <= COPY_ARENA / 2);
    }
}
