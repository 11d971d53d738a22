//! Which I/O comes next: kind, place and size, from one seed.
//!
//! The same [`Workload`] and device size give the same operations in the same order. Deliberately not here: when an
//! operation starts ([`crate::pace`]) and what it writes ([`crate::content`]).

use rand::{Rng, SeedableRng};
use rand_distr::{Distribution, Zipf};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::{Deserialize, Serialize};

use crate::units::{ByteCount, ByteOffset};

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OpKind {
    Read,
    Write,
    Trim,
}

impl OpKind {
    pub const ALL: [Self; 3] = [Self::Read, Self::Write, Self::Trim];

    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Trim => "trim",
        }
    }

    /// True when the operation changes what the device holds.
    pub fn mutates(self) -> bool {
        self != Self::Read
    }
}

/// One operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Op {
    pub kind: OpKind,
    pub offset: ByteOffset,
    pub length: ByteCount,
}

impl Op {
    pub fn end(&self) -> u64 {
        self.offset.0 + self.length.0
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        self.offset.0 < other.end() && other.offset.0 < self.end()
    }
}

/// Shares of each kind, in per cent; they sum to 100.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mix {
    pub read: u8,
    pub write: u8,
    pub trim: u8,
}

impl Mix {
    pub const READ: Self = Self { read: 100, write: 0, trim: 0 };
    pub const WRITE: Self = Self { read: 0, write: 100, trim: 0 };
}

impl std::str::FromStr for Mix {
    type Err = WorkloadError;

    /// `read`, `write`, `trim`, or three shares such as `70:25:5` (read:write:trim; a missing one is 0).
    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        let bad = || WorkloadError::Mix(text.to_owned());
        match text {
            "read" => return Ok(Self::READ),
            "write" => return Ok(Self::WRITE),
            "trim" => return Ok(Self { read: 0, write: 0, trim: 100 }),
            _ => {}
        }
        let shares = text.split(':').map(|share| share.trim().parse::<u8>().map_err(|_| bad())).collect::<Result<Vec<_>, _>>()?;
        let at = |index: usize| shares.get(index).copied().unwrap_or(0);
        let sum: u32 = shares.iter().map(|share| u32::from(*share)).sum();
        if shares.len() > 3 || sum != 100 {
            return Err(bad());
        }
        Ok(Self { read: at(0), write: at(1), trim: at(2) })
    }
}

/// How places are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Access {
    Random,
    Sequential,
    /// Zipf-distributed popularity with this exponent; popular places are scattered over the range.
    Zipf(f64),
}

impl std::str::FromStr for Access {
    type Err = WorkloadError;

    /// `random`, `sequential` or `zipf:1.1`.
    fn from_str(text: &str) -> Result<Self, WorkloadError> {
        match text.split_once(':') {
            None if text == "random" => Ok(Self::Random),
            None if text == "sequential" => Ok(Self::Sequential),
            Some(("zipf", exponent)) => exponent
                .parse::<f64>()
                .ok()
                .filter(|theta| *theta > 0.0 && theta.is_finite())
                .map(Self::Zipf)
                .ok_or_else(|| WorkloadError::Access(text.to_owned())),
            _ => Err(WorkloadError::Access(text.to_owned())),
        }
    }
}

/// Why a workload cannot run on a device.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum WorkloadError {
    #[error("mix `{0}` is not understood: use read, write, trim or shares that sum to 100 such as 70:25:5 (read:write:trim)")]
    Mix(String),
    #[error("access `{0}` is not understood: use random, sequential or zipf:1.1")]
    Access(String),
    #[error("block size {size} is not a multiple of the device's block of {unit} bytes")]
    BlockSize { size: u64, unit: u32 },
    #[error("range {offset}+{length} bytes does not hold one I/O of {size} bytes within a device of {device} bytes")]
    Range { offset: u64, length: u64, size: u64, device: u64 },
    #[error("queue depth {0} is out of range 1..={1}")]
    Depth(u32, u32),
    #[error("range starts at {offset}, which is not a multiple of the device's block of {unit} bytes")]
    Alignment { offset: u64, unit: u32 },
}

/// Greatest queue depth.
pub const DEPTH_MAX: u32 = 4096;

/// What to do; sizes in bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    pub seed: u64,
    pub block_size: ByteCount,
    pub mix: Mix,
    pub access: Access,
    pub depth: u32,
    pub range_offset: ByteOffset,
    /// `None`: to the end of the device.
    pub range_length: Option<ByteCount>,
}

impl Workload {
    /// Checks the workload against a device and gives the length of its range in whole I/Os.
    pub fn validate(&self, device: ByteCount, unit: u32) -> Result<u64, WorkloadError> {
        if self.block_size.0 == 0 || !self.block_size.0.is_multiple_of(u64::from(unit)) {
            return Err(WorkloadError::BlockSize { size: self.block_size.0, unit });
        }
        if self.depth == 0 || self.depth > DEPTH_MAX {
            return Err(WorkloadError::Depth(self.depth, DEPTH_MAX));
        }
        if !self.range_offset.0.is_multiple_of(u64::from(unit)) {
            return Err(WorkloadError::Alignment { offset: self.range_offset.0, unit });
        }
        let rest = device.0.saturating_sub(self.range_offset.0);
        let length = self.range_length.map_or(rest, |length| length.0);
        let places = length / self.block_size.0;
        if places == 0 || length > rest {
            let (offset, size) = (self.range_offset.0, self.block_size.0);
            return Err(WorkloadError::Range { offset, length, size, device: device.0 });
        }
        Ok(places)
    }
}

enum Place {
    Random,
    Sequential { next: u64 },
    Zipf { ranks: Zipf<f64>, stride: u64 },
}

/// Gives the operations of a workload one after another, without end.
pub struct Generator {
    rng: Xoshiro256PlusPlus,
    place: Place,
    places: u64,
    base: u64,
    length: ByteCount,
    mix: Mix,
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// A stride near the golden section of `places` that shares no factor with it, so that rank → place is one to one.
fn scatter_stride(places: u64) -> u64 {
    let mut stride = ((places as f64 * 0.618_033_988_75) as u64).max(1);
    while gcd(stride, places) != 1 {
        stride += 1;
    }
    stride
}

impl Generator {
    /// For a device of `device` bytes in logical blocks of `unit` bytes.
    pub fn new(workload: &Workload, device: ByteCount, unit: u32) -> Result<Self, WorkloadError> {
        let places = workload.validate(device, unit)?;
        let place = match workload.access {
            Access::Random => Place::Random,
            Access::Sequential => Place::Sequential { next: 0 },
            Access::Zipf(theta) => Place::Zipf {
                ranks: Zipf::new(places as f64, theta).map_err(|_| WorkloadError::Access(format!("zipf:{theta}")))?,
                stride: scatter_stride(places),
            },
        };
        Ok(Self {
            rng: Xoshiro256PlusPlus::seed_from_u64(workload.seed),
            place,
            places,
            base: workload.range_offset.0,
            length: workload.block_size,
            mix: workload.mix,
        })
    }

    /// The next operation.
    pub fn next_op(&mut self) -> Op {
        let place = match &mut self.place {
            Place::Random => self.rng.random_range(0..self.places),
            Place::Sequential { next } => {
                let place = *next;
                *next = if place + 1 == self.places { 0 } else { place + 1 };
                place
            }
            Place::Zipf { ranks, stride } => {
                let rank = (ranks.sample(&mut self.rng) as u64 - 1).min(self.places - 1);
                // 128 bits: rank × stride passes 64 bits on large devices.
                ((u128::from(rank) * u128::from(*stride)) % u128::from(self.places)) as u64
            }
        };
        Op { kind: self.next_kind(), offset: ByteOffset(self.base + place * self.length.0), length: self.length }
    }

    fn next_kind(&mut self) -> OpKind {
        // Pure mixes draw nothing, which keeps their cost per I/O down.
        match self.mix {
            Mix { read: 100, .. } => OpKind::Read,
            Mix { write: 100, .. } => OpKind::Write,
            Mix { trim: 100, .. } => OpKind::Trim,
            Mix { read, write, .. } => match self.rng.random_range(0..100u8) {
                draw if draw < read => OpKind::Read,
                draw if draw < read + write => OpKind::Write,
                _ => OpKind::Trim,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn workload() -> Workload {
        Workload {
            seed: 1,
            block_size: ByteCount(4096),
            mix: Mix { read: 70, write: 25, trim: 5 },
            access: Access::Random,
            depth: 8,
            range_offset: ByteOffset(0),
            range_length: None,
        }
    }

    const DEVICE: ByteCount = ByteCount(1000 * 4096);

    fn draw(workload: &Workload, count: usize) -> Vec<Op> {
        let mut generator = Generator::new(workload, DEVICE, 512).unwrap();
        (0..count).map(|_| generator.next_op()).collect()
    }

    #[test]
    fn same_seed_gives_the_same_operations_and_another_seed_others() {
        let other = Workload { seed: 2, ..workload() };
        assert_eq!(draw(&workload(), 500), draw(&workload(), 500));
        assert_ne!(draw(&workload(), 500), draw(&other, 500));
    }

    #[test]
    fn mix_shares_are_kept_within_sampling_error() {
        let mut counts = HashMap::new();
        for op in draw(&workload(), 20_000) {
            *counts.entry(op.kind).or_insert(0) += 1;
        }
        for (kind, share) in [(OpKind::Read, 70), (OpKind::Write, 25), (OpKind::Trim, 5)] {
            let got = counts[&kind] as f64 / 200.0;
            assert!((got - f64::from(share)).abs() < 2.0, "{kind:?}: {got} %");
        }
    }

    #[test]
    fn range_is_never_left_and_operations_are_aligned_to_it() {
        let ranged = Workload { range_offset: ByteOffset(512), range_length: Some(ByteCount(10 * 4096 + 100)), ..workload() };
        for op in draw(&ranged, 2_000) {
            assert!(op.offset.0 >= 512 && op.end() <= 512 + 10 * 4096, "{op:?}");
            assert_eq!((op.offset.0 - 512) % 4096, 0);
        }
    }

    #[test]
    fn sequential_walks_the_range_and_wraps() {
        let sequential = Workload { access: Access::Sequential, range_length: Some(ByteCount(3 * 4096)), ..workload() };
        let places: Vec<u64> = draw(&sequential, 7).iter().map(|op| op.offset.0 / 4096).collect();
        assert_eq!(places, [0, 1, 2, 0, 1, 2, 0]);
    }

    #[test]
    fn zipf_is_skewed_as_its_law_says_and_scattered() {
        let zipf = Workload { access: Access::Zipf(1.2), ..workload() };
        let mut counts: HashMap<u64, u32> = HashMap::new();
        for op in draw(&zipf, 50_000) {
            *counts.entry(op.offset.0 / 4096).or_insert(0) += 1;
        }
        let mut by_count: Vec<(u64, u32)> = counts.into_iter().collect();
        by_count.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        // P(1)/P(2) = 2^1.2 = 2.30.
        let ratio = f64::from(by_count[0].1) / f64::from(by_count[1].1);
        assert!((2.0..2.6).contains(&ratio), "{ratio}");
        assert!(by_count[0].0.abs_diff(by_count[1].0) > 100, "popular places are neighbours");
    }

    #[test]
    fn scatter_is_one_to_one_for_awkward_counts() {
        for places in [1, 2, 6, 97, 1000, 4096] {
            let stride = scatter_stride(places);
            let mut seen: Vec<u64> = (0..places).map(|rank| rank * stride % places).collect();
            seen.sort_unstable();
            assert_eq!(seen, (0..places).collect::<Vec<_>>());
        }
    }

    #[test]
    fn workload_that_does_not_fit_is_refused_with_both_sides() {
        let odd = Workload { block_size: ByteCount(1000), ..workload() };
        assert_eq!(odd.validate(DEVICE, 512), Err(WorkloadError::BlockSize { size: 1000, unit: 512 }));
        let long = Workload { range_length: Some(ByteCount(DEVICE.0 + 1)), ..workload() };
        assert!(matches!(long.validate(DEVICE, 512), Err(WorkloadError::Range { .. })));
        let deep = Workload { depth: DEPTH_MAX + 1, ..workload() };
        assert_eq!(deep.validate(DEVICE, 512), Err(WorkloadError::Depth(DEPTH_MAX + 1, DEPTH_MAX)));
    }

    #[test]
    fn mix_and_access_parse_or_say_what_would_be_right() {
        assert_eq!("70:25:5".parse(), Ok(workload().mix));
        assert_eq!("write".parse(), Ok(Mix::WRITE));
        assert!("70:31".parse::<Mix>().unwrap_err().to_string().contains("sum to 100"));
        assert_eq!("zipf:0.9".parse(), Ok(Access::Zipf(0.9)));
        assert!("zipf:-1".parse::<Access>().is_err());
    }
}
