//! PCI addresses, and the names the kernel gives to NVMe namespaces.

use std::fmt;
use std::str::FromStr;

/// A PCI function: `domain:bus:device.function`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl FromStr for PciAddress {
    type Err = String;

    /// `0000:00:04.0`, or without the domain.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("\"{text}\" is no PCI address; write for instance 0000:00:04.0");
        let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
            let fits = digits.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            if fits { u32::from_str_radix(part, 16).ok() } else { None }
        };
        let parse = || {
            let (head, function) = text.rsplit_once('.')?;
            let (head, device) = head.rsplit_once(':')?;
            let (domain, bus) = head.rsplit_once(':').unwrap_or(("0000", head));
            Some(Self {
                domain: hex(domain, 4..=8)?,
                bus: hex(bus, 2..=2)? as u8,
                device: hex(device, 2..=2).filter(|&d| d < 32)? as u8,
                function: hex(function, 1..=1).filter(|&f| f < 8)? as u8,
            })
        };
        parse().ok_or_else(wrong)
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl serde::Serialize for PciAddress {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for PciAddress {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// The block device of a namespace, from its name under the controller: `nvme0n1` is itself; with multipath the
/// controller holds a hidden path `nvme0c1n1`, and what is mounted is `nvme0n1`. `None` for anything else.
pub fn namespace_device(name: &str) -> Option<String> {
    let number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let (instance, namespace) = name.strip_prefix("nvme")?.rsplit_once('n')?;
    let (subsystem, controller) = instance.split_once('c').unwrap_or((instance, "0"));
    let fits = number(namespace) && number(subsystem) && number(controller);
    fits.then(|| format!("nvme{subsystem}n{namespace}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn addresses_are_read_with_and_without_domain() {
        for (text, shown) in [("0000:00:04.0", "0000:00:04.0"), ("AF:1f.7", "0000:af:1f.7"), ("10001:02:00.0", "10001:02:00.0")] {
            assert_eq!(text.parse::<PciAddress>().unwrap().to_string(), shown);
        }
        for text in ["", "nvme0", "0000:00:04", "0000:00:20.0", "0000:00:04.8", "0:0:4.0", "0000:00:04.0/1", "+000:00:04.0"] {
            assert!(text.parse::<PciAddress>().unwrap_err().contains("0000:00:04.0"), "{text}");
        }
    }

    #[test]
    fn namespace_names_lead_to_their_block_device() {
        assert_eq!(namespace_device("nvme0n1").as_deref(), Some("nvme0n1"));
        assert_eq!(namespace_device("nvme3c12n4").as_deref(), Some("nvme3n4"));
        for name in ["nvme0", "ng0n1", "hwmon3", "nvmen1", "nvme0n", "nvme0cn1", "power", "nvme0n1p1"] {
            assert_eq!(namespace_device(name), None, "{name}");
        }
    }

    proptest! {
        #[test]
        fn shown_addresses_read_back(domain: u32, bus: u8, device in 0u8..32, function in 0u8..8) {
            let address = PciAddress { domain, bus, device, function };
            prop_assert_eq!(address.to_string().parse(), Ok(address));
            let json = serde_json::to_string(&address).unwrap();
            prop_assert_eq!(serde_json::from_str::<PciAddress>(&json).unwrap(), address);
        }

        #[test]
        fn any_text_is_an_address_or_an_error(text in ".*") {
            let _ = text.parse::<PciAddress>();
            let _ = namespace_device(&text);
        }
    }
}
