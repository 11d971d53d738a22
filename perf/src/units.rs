//! Newtypes for sizes, offsets, indices and times, and the way people type them (`4KiB`, `10GiB`, `1.5s`).
//!
//! Deliberately not here: anything that knows about a device. A [`BlockIndex`] counts verify units, whose size the
//! run decides.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

/// An offset in bytes from the start of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteOffset(pub u64);

/// The index of a verify unit (see [`crate::content`]) from the start of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BlockIndex(pub u64);

/// The number of a write or trim within one run; it only grows, and 0 is never used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

/// A point in time or a span, in nanoseconds of the loop's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    pub fn from_secs_f64(secs: f64) -> Self {
        Self((secs * 1e9) as u64)
    }

    pub fn as_secs_f64(self) -> f64 {
        self.0 as f64 / 1e9
    }

    /// The span from `earlier` to `self`; zero when `earlier` is later.
    pub fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    pub fn plus(self, span: Self) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl From<std::time::Duration> for Nanos {
    fn from(span: std::time::Duration) -> Self {
        Self(u64::try_from(span.as_nanos()).unwrap_or(u64::MAX))
    }
}

/// Why a typed size or time was not understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnitError {
    #[error("`{0}` does not start with a number; write for example 4096, 4KiB or 1.5GiB")]
    NoNumber(String),
    #[error("`{0}` has the unknown unit `{1}`; use B, KiB, MiB, GiB, TiB (k, m, g, t mean the same)")]
    UnknownSizeUnit(String, String),
    #[error("`{0}` has the unknown unit `{1}`; use ns, us, ms, s, m or h")]
    UnknownTimeUnit(String, String),
    #[error("`{0}` is too large or not a whole number of its smallest unit")]
    OutOfRange(String),
}

fn split_number(text: &str) -> Result<(f64, &str), UnitError> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let number = text[..end].parse::<f64>().map_err(|_| UnitError::NoNumber(text.to_owned()))?;
    Ok((number, text[end..].trim()))
}

impl FromStr for ByteCount {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split_number(text)?;
        let shift = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kib" => 10,
            "m" | "mib" => 20,
            "g" | "gib" => 30,
            "t" | "tib" => 40,
            _ => return Err(UnitError::UnknownSizeUnit(text.to_owned(), unit.to_owned())),
        };
        let bytes = number * (1u64 << shift) as f64;
        if bytes.fract() != 0.0 || bytes >= u64::MAX as f64 {
            return Err(UnitError::OutOfRange(text.to_owned()));
        }
        Ok(Self(bytes as u64))
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >= 1 << shift {
                let whole = self.0 as f64 / (1u64 << shift) as f64;
                return if whole.fract() == 0.0 { write!(f, "{whole}{unit}") } else { write!(f, "{whole:.2}{unit}") };
            }
        }
        write!(f, "{}B", self.0)
    }
}

impl FromStr for Nanos {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let (number, unit) = split_number(text)?;
        let scale = match unit {
            "ns" => 1.0,
            "us" | "µs" => 1e3,
            "ms" => 1e6,
            "" | "s" => 1e9,
            "m" | "min" => 60e9,
            "h" => 3600e9,
            _ => return Err(UnitError::UnknownTimeUnit(text.to_owned(), unit.to_owned())),
        };
        let nanos = number * scale;
        if nanos >= u64::MAX as f64 {
            return Err(UnitError::OutOfRange(text.to_owned()));
        }
        Ok(Self(nanos as u64))
    }
}

impl fmt::Display for Nanos {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let n = self.0 as f64;
        match self.0 {
            0..1_000 => write!(f, "{} ns", self.0),
            1_000..1_000_000 => write!(f, "{:.1} µs", n / 1e3),
            1_000_000..1_000_000_000 => write!(f, "{:.1} ms", n / 1e6),
            _ => write!(f, "{:.2} s", n / 1e9),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn size_with_binary_unit_parses_to_bytes() {
        for (text, bytes) in [("4096", 4096), ("4k", 4096), ("4KiB", 4096), ("1.5GiB", 3 << 29), ("2 TiB", 2 << 40), ("0", 0)] {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
    }

    #[test]
    fn size_with_bad_text_says_what_would_be_right() {
        assert!("KiB".parse::<ByteCount>().unwrap_err().to_string().contains("4KiB"));
        assert!("4 parsecs".parse::<ByteCount>().unwrap_err().to_string().contains("parsecs"));
        assert_eq!("0.3B".parse::<ByteCount>(), Err(UnitError::OutOfRange("0.3B".into())));
    }

    #[test]
    fn size_printed_reads_back_equal() {
        for bytes in [0, 1, 512, 4096, 1 << 20, 3 << 29, 5 << 40] {
            let shown = ByteCount(bytes).to_string();
            assert_eq!(shown.parse(), Ok(ByteCount(bytes)), "{shown}");
        }
    }

    #[test]
    fn time_with_unit_parses_to_nanoseconds() {
        for (text, nanos) in [("10", 10_000_000_000), ("1.5ms", 1_500_000), ("20us", 20_000), ("2m", 120_000_000_000)] {
            assert_eq!(text.parse(), Ok(Nanos(nanos)), "{text}");
        }
        assert!("3 fortnights".parse::<Nanos>().is_err());
    }
}
