//! Sizes as people type and read them: `64MiB`, `1GiB`. Binary units alone; `MB` could mean either and is refused.

use std::fmt;
use std::str::FromStr;

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is no size; write for instance 64MiB or 2GiB");
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let shift = match unit.trim_start() {
            "" | "B" => 0,
            "KB" | "MB" | "GB" | "TB" => {
                return Err(format!("\"{unit}\" could be decimal or binary; write {}iB", &unit.trim_start()[..1]));
            }
            unit => {
                let known = UNITS.iter().find(|(name, _)| unit == *name || unit == &name[..1]);
                known.ok_or_else(wrong)?.1
            }
        };
        let too_large = || format!("\"{text}\" is more than {} bytes", u64::MAX);
        number.checked_mul(1 << shift).map(Self).ok_or_else(too_large)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = UNITS.iter().find(|(_, shift)| self.0 >= 1 << shift && self.0.is_multiple_of(1 << shift));
        match exact {
            Some((name, shift)) => write!(f, "{}{name}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_in_binary_units() {
        for (text, bytes) in [("0", 0), ("4096", 4096), ("2M", 2 << 20), ("64MiB", 64 << 20), ("1 GiB", 1 << 30), ("3T", 3 << 40)] {
            assert_eq!(text.parse::<Bytes>(), Ok(Bytes(bytes)), "{text}");
        }
    }

    #[test]
    fn ambiguous_or_wrong_sizes_say_what_would_be_right() {
        assert!("64MB".parse::<Bytes>().unwrap_err().contains("write MiB"));
        for text in ["", "MiB", "-1", "1.5GiB", "1XiB", "1gib", "99999999999TiB", "184467440737095516160"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn shown_sizes_read_back(bytes: u64) {
            prop_assert_eq!(Bytes(bytes).to_string().parse(), Ok(Bytes(bytes)));
        }

        #[test]
        fn any_text_is_a_size_or_an_error(text in ".*") {
            let _ = text.parse::<Bytes>();
        }
    }
}
