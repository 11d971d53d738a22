//! Statistics of paired runs: ratios, their median, and a bootstrap interval around it.
//!
//! Arms alternate within seconds (A B B A) because shared machines flip between two speeds for seconds at a time; the
//! figure is the median of per-pair ratios, and its uncertainty the 2.5–97.5 % percentiles of medians of resamples
//! (Efron 1979). Deliberately not here: what was measured, and which pairs are void.

use rand::{Rng, SeedableRng};
use rand_xoshiro::Xoshiro256PlusPlus;
use serde::Serialize;

/// Resamples behind one interval.
pub const RESAMPLES: usize = 10_000;

/// The median of paired ratios and its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    pub low: f64,
    pub median: f64,
    pub high: f64,
    pub pairs: usize,
}

/// The median; the mean of the middle two for an even count. `None` when empty.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let mid = sorted.len() / 2;
    match sorted.len() {
        0 => None,
        n if n % 2 == 1 => Some(sorted[mid]),
        _ => Some((sorted[mid - 1] + sorted[mid]) / 2.0),
    }
}

/// A percentile (0..=1) of sorted values by nearest rank.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let last = sorted.len() - 1;
    sorted[((last as f64 * fraction).round() as usize).min(last)]
}

/// Median of `ratios` with a bootstrap 95 % interval; the seed makes the figure repeatable from the same pairs.
/// `None` for fewer than three ratios, from which no interval can be drawn.
pub fn interval(ratios: &[f64], seed: u64) -> Option<Interval> {
    if ratios.len() < 3 {
        return None;
    }
    let mut rng = Xoshiro256PlusPlus::seed_from_u64(seed);
    let mut resample = vec![0.0; ratios.len()];
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            for value in &mut resample {
                *value = ratios[rng.random_range(0..ratios.len())];
            }
            median(&resample).expect("not empty")
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    Some(Interval { low: percentile(&medians, 0.025), median: median(ratios)?, high: percentile(&medians, 0.975), pairs: ratios.len() })
}

/// Which arm a turn belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The arm under test.
    Ours,
    /// The arm it is divided by.
    Peer,
}

/// The order of the two turns of pair `index`: A B, then B A, so that a drift in speed cancels.
pub fn order_of_pair(index: usize) -> [Side; 2] {
    if index.is_multiple_of(2) { [Side::Ours, Side::Peer] } else { [Side::Peer, Side::Ours] }
}

/// A limit that the whole interval must keep.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

impl Limit {
    /// True when the whole interval is within the limit.
    pub fn met_by(self, interval: &Interval) -> bool {
        match self {
            Self::AtMost(limit) => interval.high <= limit,
            Self::AtLeast(limit) => interval.low >= limit,
        }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtMost(limit) => write!(f, "≤ {limit}"),
            Self::AtLeast(limit) => write!(f, "≥ {limit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_of_odd_and_even_counts_is_the_middle() {
        assert_eq!(median(&[]), None);
        assert_eq!(median(&[3.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    }

    #[test]
    fn interval_of_equal_ratios_has_no_width() {
        let found = interval(&[1.1; 9], 1).unwrap();
        assert_eq!((found.low, found.median, found.high, found.pairs), (1.1, 1.1, 1.1, 9));
    }

    #[test]
    fn interval_of_two_ratios_is_refused() {
        assert_eq!(interval(&[1.0, 1.1], 1), None);
    }

    #[test]
    fn interval_with_one_outlier_keeps_the_median_and_stays_bounded() {
        let mut ratios = vec![1.0; 20];
        ratios[7] = 50.0;
        let found = interval(&ratios, 1).unwrap();
        assert_eq!((found.median, found.high), (1.0, 1.0));
    }

    #[test]
    fn interval_covers_the_true_median_about_as_often_as_it_says() {
        // 200 draws of 15 ratios from a known distribution: the 95 % interval must hold the true median in most of
        // them; the band is wide because the count is small, but a broken bootstrap falls far outside.
        let mut rng = Xoshiro256PlusPlus::seed_from_u64(42);
        let covered = (0..200)
            .filter(|draw| {
                let ratios: Vec<f64> = (0..15).map(|_| 1.0 + rng.random_range(-0.1..0.1)).collect();
                let found = interval(&ratios, *draw).unwrap();
                found.low <= 1.0 && 1.0 <= found.high
            })
            .count();
        assert!((175..=200).contains(&covered), "{covered} of 200");
    }

    #[test]
    fn interval_with_the_same_seed_is_the_same() {
        let ratios = [0.9, 1.0, 1.1, 1.05, 0.97];
        assert_eq!(interval(&ratios, 5), interval(&ratios, 5));
    }

    #[test]
    fn limit_is_met_only_by_the_whole_interval() {
        let found = Interval { low: 0.84, median: 0.9, high: 0.95, pairs: 9 };
        assert!(!Limit::AtLeast(0.85).met_by(&found));
        assert!(Limit::AtLeast(0.8).met_by(&found));
        assert!(!Limit::AtMost(0.9).met_by(&found));
        assert!(Limit::AtMost(0.95).met_by(&found));
    }

    #[test]
    fn pairs_alternate_so_that_each_arm_leads_as_often() {
        let turns: Vec<Side> = (0..4).flat_map(order_of_pair).collect();
        use Side::{Ours, Peer};
        assert_eq!(turns, [Ours, Peer, Peer, Ours, Ours, Peer, Peer, Ours]);
    }
}
