//! Sizes as people type them (`10GiB`, `4k`, `1.5TiB`, `4096`) and as JSON carries them (bytes, a number).
//!
//! A bare letter is binary, as in lsblk, QEMU and fio: `4k` is 4096. `KB`, `MB`, `GB`, … are decimal, as their
//! standard says. Not here: rates and durations.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes. Serialized as a number; deserialized from a number or from text such as `"10GiB"`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    #[error("a size is missing: write for example 10GiB, 512MiB or 4096")]
    Empty,
    #[error("\"{text}\" is not a size: it must start with a number, for example 10GiB, 512MiB or 4096")]
    NoNumber { text: String },
    #[error("\"{unit}\" in \"{text}\" is not a unit: use B, KiB, MiB, GiB, TiB, PiB (or k, m, g, t, p), or the decimal kB, MB, GB, TB, PB")]
    UnknownUnit { text: String, unit: String },
    #[error("\"{text}\" is not a whole number of bytes: use a smaller unit")]
    NotWhole { text: String },
    #[error("\"{text}\" is too large: the most is 16EiB less one byte")]
    TooLarge { text: String },
}

const BINARY: [(&str, u32); 5] = [("PiB", 50), ("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
/// Digits after the point that are looked at; more cannot matter for a whole number of bytes below 16 EiB.
const FRACTION_DIGITS_MAX: usize = 18;
/// Longest text echoed back in an error.
const ECHO_MAX: usize = 64;

fn echo(text: &str) -> String {
    if text.chars().count() <= ECHO_MAX { text.to_owned() } else { text.chars().take(ECHO_MAX).chain("…".chars()).collect() }
}

fn unit_bytes(unit: &str) -> Option<u64> {
    Some(match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" | "ki" => 1 << 10,
        "m" | "mib" | "mi" => 1 << 20,
        "g" | "gib" | "gi" => 1 << 30,
        "t" | "tib" | "ti" => 1 << 40,
        "p" | "pib" | "pi" => 1 << 50,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        "pb" => 1_000_000_000_000_000,
        _ => return None,
    })
}

impl ByteSize {
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Rounded for people's eyes, three significant digits: `1.46 TiB`. [`fmt::Display`] is the exact form.
    pub fn rounded(self) -> String {
        for (unit, shift) in BINARY {
            if self.0 >= 1 << shift {
                let n = self.0 as f64 / (1u64 << shift) as f64;
                let decimals = if n >= 100.0 || self.0.trailing_zeros() >= shift {
                    0
                } else if n >= 10.0 {
                    1
                } else {
                    2
                };
                return format!("{n:.decimals$} {unit}");
            }
        }
        format!("{} B", self.0)
    }
}

/// The exact form, which parses back to the same number: the largest binary unit that divides it.
impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in BINARY {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(input: &str) -> Result<Self, SizeError> {
        let text = input.trim();
        if text.is_empty() {
            return Err(SizeError::Empty);
        }
        let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.' && c != '_').unwrap_or(text.len());
        let (number, unit) = text.split_at(number_end);
        let unit = unit.trim();
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let whole = whole.replace('_', "");
        if whole.is_empty() || fraction.contains(['.', '_']) || (number.contains('.') && fraction.is_empty()) {
            return Err(SizeError::NoNumber { text: echo(text) });
        }
        let unit_bytes = unit_bytes(unit).ok_or_else(|| SizeError::UnknownUnit { text: echo(text), unit: echo(unit) })?;
        let too_large = || SizeError::TooLarge { text: echo(text) };
        let whole: u64 = whole.parse().map_err(|_| too_large())?;
        let mut bytes = u128::from(whole) * u128::from(unit_bytes);
        let fraction = fraction.trim_end_matches('0');
        if !fraction.is_empty() {
            let not_whole = || SizeError::NotWhole { text: echo(text) };
            if fraction.len() > FRACTION_DIGITS_MAX {
                return Err(not_whole());
            }
            let scale = 10u128.pow(fraction.len() as u32);
            let numerator: u128 = fraction.parse().map_err(|_| not_whole())?;
            let scaled = numerator * u128::from(unit_bytes);
            if !scaled.is_multiple_of(scale) {
                return Err(not_whole());
            }
            bytes += scaled / scale;
        }
        u64::try_from(bytes).map(ByteSize).map_err(|_| too_large())
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct SizeVisitor;
        impl Visitor<'_> for SizeVisitor {
            type Value = ByteSize;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size: a number of bytes, or text such as \"10GiB\"")
            }
            fn visit_u64<E: de::Error>(self, v: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(v))
            }
            fn visit_i64<E: de::Error>(self, v: i64) -> Result<ByteSize, E> {
                u64::try_from(v).map(ByteSize).map_err(|_| E::invalid_value(de::Unexpected::Signed(v), &self))
            }
            fn visit_str<E: de::Error>(self, v: &str) -> Result<ByteSize, E> {
                v.parse().map_err(E::custom)
            }
        }
        d.deserialize_any(SizeVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn size_common_forms_parse() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4k", 4096),
            ("4K", 4096),
            ("4 KiB", 4096),
            ("10GiB", 10 << 30),
            ("1.5GiB", 3 << 29),
            ("1.50g", 3 << 29),
            ("1TB", 1_000_000_000_000),
            ("1_000", 1000),
            ("512b", 512),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn size_bad_forms_say_what_is_wrong() {
        for (text, part) in [
            ("", "missing"),
            ("GiB", "must start with a number"),
            ("-1", "must start with a number"),
            ("1.", "must start with a number"),
            ("1.2.3k", "must start with a number"),
            ("10 gigs", "\"gigs\""),
            ("0.3B", "whole number of bytes"),
            ("99999PiB", "too large"),
            ("99999999999999999999", "too large"),
        ] {
            let error = text.parse::<ByteSize>().unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn size_rounded_keeps_three_digits() {
        assert_eq!(ByteSize::gib(10).rounded(), "10 GiB");
        assert_eq!(ByteSize(1_500_000_000_000).rounded(), "1.36 TiB");
        assert_eq!(ByteSize(100).rounded(), "100 B");
    }

    proptest! {
        #[test]
        fn size_printed_parses_back(n: u64) {
            prop_assert_eq!(ByteSize(n).to_string().parse(), Ok(ByteSize(n)));
        }
        #[test]
        fn size_random_text_never_panics(text in "\\PC{0,40}") {
            let _ = text.parse::<ByteSize>();
        }
        #[test]
        fn size_random_number_and_unit_never_panics(text in "[0-9._]{0,30} ?[kKmMgGtTpPiIbB]{0,3}") {
            let _ = text.parse::<ByteSize>();
        }
        #[test]
        fn size_json_round_trips(n: u64) {
            let json = serde_json::to_string(&ByteSize(n)).unwrap();
            prop_assert_eq!(&json, &n.to_string());
            prop_assert_eq!(serde_json::from_str::<ByteSize>(&json).unwrap(), ByteSize(n));
        }
    }
}
