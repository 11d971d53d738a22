//! The language in which people name drives: `file:/srv/a.img?size=10GiB`, `nvme:0000:00:04.0`, `malloc:m0?size=1GiB`.
//!
//! Grammar: `kind:place[?option=value[&option=value…]]`. Everything after the first `?` is options, so a path that
//! holds a `?` cannot be named. Not here: opening anything, or knowing whether it exists.
//!
//! To add a kind: a variant of [`DriveKind`], its arm in `parse_place` and in `Display`, its line in `KINDS`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::size::{ByteSize, SizeError};

/// Most stores a drive may be cut into: one per core, and no host has more cores for us.
pub const STORES_MAX: u16 = 256;
/// Longest spec accepted, in bytes.
pub const SPEC_BYTES_MAX: usize = 4096;

const KINDS: &str = "file:/path/to.img[?size=10GiB], block:/dev/sdx, nvme:0000:00:04.0[/1], vfio-user:/path/to/dir, \
                     malloc:name?size=1GiB or bdev:name";

/// A PCI address, `0000:00:04.0`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    pub domain: u32,
    pub bus: u8,
    pub device: u8,
    pub function: u8,
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl PciAddress {
    fn parse(text: &str) -> Option<Self> {
        let hex = |part: &str, digits: std::ops::RangeInclusive<usize>| {
            let plain = digits.contains(&part.len()) && part.bytes().all(|b| b.is_ascii_hexdigit());
            plain.then(|| u32::from_str_radix(part, 16).ok()).flatten()
        };
        let (rest, function) = text.rsplit_once('.')?;
        let mut parts = rest.split(':').rev();
        let device = hex(parts.next()?, 1..=2)?;
        let bus = hex(parts.next()?, 1..=2)?;
        let domain = parts.next().map_or(Some(0), |part| hex(part, 4..=8))?;
        let function = hex(function, 1..=1)?;
        if parts.next().is_some() || device > 0x1f || function > 7 {
            return None;
        }
        Some(Self { domain, bus: bus as u8, device: device as u8, function: function as u8 })
    }
}

/// What a drive is and where.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DriveKind {
    /// A regular file; created if it is absent and `size` is given.
    File { path: String, size: Option<ByteSize> },
    /// A block device of the kernel, through our io_uring adapter.
    Block { path: String },
    /// A namespace of an NVMe controller on PCIe, through SPDK's driver.
    Nvme { address: PciAddress, namespace: u32 },
    /// An NVMe controller over vfio-user: the directory that holds its `cntrl` socket.
    VfioUser { path: String },
    /// Memory, gone with the process.
    Malloc { name: String, size: ByteSize },
    /// An SPDK bdev that exists already.
    Bdev { name: String },
}

/// A drive as typed in `pool add`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DriveSpec {
    pub kind: DriveKind,
    /// The operator vouches that what the drive acknowledged survives power loss though it has no barrier.
    pub power_safe: bool,
    /// How many stores to cut it into; one per core if not said.
    pub stores: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DriveSpecError {
    #[error("\"{spec}\" does not start with a kind of drive: use {KINDS}")]
    NoKind { spec: String },
    #[error("\"{kind}\" is not a kind of drive: use {KINDS}")]
    UnknownKind { kind: String },
    #[error("a path is missing after \"{kind}:\": write for example {kind}:{example}")]
    NoPath { kind: &'static str, example: &'static str },
    #[error("the path \"{path}\" is relative: use an absolute path, since the node daemon runs in a directory of its own")]
    RelativePath { path: String },
    #[error("the path \"{path}\" holds a control character: rename it")]
    ControlCharacter { path: String },
    #[error("\"{text}\" is not a PCI address with an optional namespace: write for example nvme:0000:00:04.0 or nvme:0000:00:04.0/1")]
    BadPci { text: String },
    #[error("\"{text}\" is not a namespace: namespaces count from 1 to 4294967294")]
    BadNamespace { text: String },
    #[error("\"{name}\" is not a bdev's name: use 1 to 63 letters, digits, '.', '_', ':' or '-'")]
    BadName { name: String },
    #[error("option \"{option}\" does not exist for {kind} drives: they take {known}")]
    UnknownOption { option: String, kind: &'static str, known: &'static str },
    #[error("option \"{option}\" has no value: write {option}=VALUE")]
    NoValue { option: String },
    #[error("option \"{option}\" is given twice")]
    Twice { option: String },
    #[error("option size: {0}")]
    Size(#[from] SizeError),
    #[error("a malloc drive needs its size: write malloc:{name}?size=1GiB")]
    MallocWithoutSize { name: String },
    #[error("option size must be more than 0")]
    ZeroSize,
    #[error("option {option} is \"{value}\": use true or false")]
    BadBool { option: &'static str, value: String },
    #[error("option stores is \"{value}\": use a number from 1 to {STORES_MAX}")]
    BadStores { value: String },
    #[error("the drive spec has {length} bytes, the most is {SPEC_BYTES_MAX}")]
    TooLong { length: usize },
}

impl DriveSpec {
    pub fn new(kind: DriveKind) -> Self {
        Self { kind, power_safe: false, stores: None }
    }

    /// Whether everything on it is gone with the process, known from the spec alone.
    pub fn is_volatile(&self) -> bool {
        matches!(self.kind, DriveKind::Malloc { .. })
    }

    /// The spec without what only matters when the drive is made: two specs of equal place name the same drive.
    pub fn place(&self) -> String {
        match &self.kind {
            DriveKind::File { path, .. } => format!("file:{path}"),
            DriveKind::Malloc { name, .. } => format!("malloc:{name}"),
            _ => Self::new(self.kind.clone()).to_string(),
        }
    }

    fn kind_name(kind: &DriveKind) -> &'static str {
        match kind {
            DriveKind::File { .. } => "file",
            DriveKind::Block { .. } => "block",
            DriveKind::Nvme { .. } => "nvme",
            DriveKind::VfioUser { .. } => "vfio-user",
            DriveKind::Malloc { .. } => "malloc",
            DriveKind::Bdev { .. } => "bdev",
        }
    }
}

fn parse_path(kind: &'static str, example: &'static str, place: &str) -> Result<String, DriveSpecError> {
    if place.is_empty() {
        return Err(DriveSpecError::NoPath { kind, example });
    }
    if place.chars().any(char::is_control) {
        return Err(DriveSpecError::ControlCharacter { path: place.escape_default().to_string() });
    }
    if !place.starts_with('/') {
        return Err(DriveSpecError::RelativePath { path: place.to_owned() });
    }
    Ok(place.to_owned())
}

fn parse_name(name: &str) -> Result<String, DriveSpecError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b':');
    if name.is_empty() || name.len() > 63 || !name.bytes().all(plain) {
        return Err(DriveSpecError::BadName { name: name.chars().take(64).collect() });
    }
    Ok(name.to_owned())
}

/// `size` is filled in from the options afterwards.
fn parse_place(kind: &str, place: &str) -> Result<DriveKind, DriveSpecError> {
    Ok(match kind {
        "file" => DriveKind::File { path: parse_path("file", "/var/lib/penstock/d0.img", place)?, size: None },
        "block" => DriveKind::Block { path: parse_path("block", "/dev/sdx", place)? },
        "vfio-user" => DriveKind::VfioUser { path: parse_path("vfio-user", "/run/nvme0", place)? },
        "malloc" => DriveKind::Malloc { name: parse_name(place)?, size: ByteSize(0) },
        "bdev" => DriveKind::Bdev { name: parse_name(place)? },
        "nvme" => {
            let (address, namespace) = match place.split_once('/') {
                Some((address, namespace)) => (address, Some(namespace)),
                None => (place, None),
            };
            let address = PciAddress::parse(address).ok_or_else(|| DriveSpecError::BadPci { text: place.to_owned() })?;
            let namespace = match namespace {
                None => 1,
                Some(text) => text
                    .parse()
                    .ok()
                    .filter(|&n| n != 0 && n != u32::MAX && text.bytes().all(|b| b.is_ascii_digit()))
                    .ok_or_else(|| DriveSpecError::BadNamespace { text: text.to_owned() })?,
            };
            DriveKind::Nvme { address, namespace }
        }
        _ => {
            return Err(DriveSpecError::UnknownKind { kind: kind.chars().take(32).collect() });
        }
    })
}

impl FromStr for DriveSpec {
    type Err = DriveSpecError;

    fn from_str(spec: &str) -> Result<Self, DriveSpecError> {
        if spec.len() > SPEC_BYTES_MAX {
            return Err(DriveSpecError::TooLong { length: spec.len() });
        }
        let (kind, rest) = spec.split_once(':').ok_or_else(|| DriveSpecError::NoKind { spec: spec.chars().take(64).collect() })?;
        let (place, options) = match rest.split_once('?') {
            Some((place, options)) => (place, Some(options)),
            None => (rest, None),
        };
        let mut parsed = Self::new(parse_place(kind, place)?);
        let kind_name = Self::kind_name(&parsed.kind);
        let mut seen: Vec<&str> = Vec::new();
        for pair in options.into_iter().flat_map(|options| options.split('&')) {
            let (option, value) = pair
                .split_once('=')
                .filter(|(_, value)| !value.is_empty())
                .ok_or_else(|| DriveSpecError::NoValue { option: pair.trim_end_matches('=').to_owned() })?;
            if seen.contains(&option) {
                return Err(DriveSpecError::Twice { option: option.to_owned() });
            }
            seen.push(option);
            match (option, &mut parsed.kind) {
                ("size", DriveKind::File { size, .. }) => *size = Some(parse_size(value)?),
                ("size", DriveKind::Malloc { size, .. }) => *size = parse_size(value)?,
                ("power_safe", _) => {
                    parsed.power_safe =
                        value.parse().map_err(|_| DriveSpecError::BadBool { option: "power_safe", value: value.to_owned() })?;
                }
                ("stores", _) => {
                    let stores = value.parse().ok().filter(|n| (1..=STORES_MAX).contains(n));
                    let stores = stores.ok_or_else(|| DriveSpecError::BadStores { value: value.to_owned() })?;
                    parsed.stores = Some(stores);
                }
                (_, kind) => {
                    let known = match kind {
                        DriveKind::File { .. } | DriveKind::Malloc { .. } => "size, power_safe and stores",
                        _ => "power_safe and stores",
                    };
                    return Err(DriveSpecError::UnknownOption { option: option.to_owned(), kind: kind_name, known });
                }
            }
        }
        if let DriveKind::Malloc { name, size: ByteSize(0) } = &parsed.kind {
            return Err(DriveSpecError::MallocWithoutSize { name: name.clone() });
        }
        Ok(parsed)
    }
}

fn parse_size(value: &str) -> Result<ByteSize, DriveSpecError> {
    match value.parse()? {
        ByteSize(0) => Err(DriveSpecError::ZeroSize),
        size => Ok(size),
    }
}

/// The canonical form: it parses back to the same spec, and equal specs print alike.
impl fmt::Display for DriveSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut options = Vec::new();
        write!(f, "{}:", Self::kind_name(&self.kind))?;
        match &self.kind {
            DriveKind::File { path, size } => {
                f.write_str(path)?;
                options.extend(size.map(|size| format!("size={size}")));
            }
            DriveKind::Block { path } | DriveKind::VfioUser { path } => f.write_str(path)?,
            DriveKind::Nvme { address, namespace } => write!(f, "{address}/{namespace}")?,
            DriveKind::Malloc { name, size } => {
                f.write_str(name)?;
                options.push(format!("size={size}"));
            }
            DriveKind::Bdev { name } => f.write_str(name)?,
        }
        if self.power_safe {
            options.push("power_safe=true".to_owned());
        }
        options.extend(self.stores.map(|stores| format!("stores={stores}")));
        for (at, option) in options.iter().enumerate() {
            write!(f, "{}{option}", if at == 0 { '?' } else { '&' })?;
        }
        Ok(())
    }
}

impl TryFrom<String> for DriveSpec {
    type Error = DriveSpecError;
    fn try_from(text: String) -> Result<Self, DriveSpecError> {
        text.parse()
    }
}

impl From<DriveSpec> for String {
    fn from(spec: DriveSpec) -> String {
        spec.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn spec_forms_of_the_contract_print_canonically() {
        for (typed, printed) in [
            ("file:/a/b.img", "file:/a/b.img"),
            ("file:/a/b.img?size=1024MiB", "file:/a/b.img?size=1GiB"),
            ("block:/dev/sdb?stores=2&power_safe=true", "block:/dev/sdb?power_safe=true&stores=2"),
            ("nvme:0000:00:04.0", "nvme:0000:00:04.0/1"),
            ("nvme:00:04.0/2", "nvme:0000:00:04.0/2"),
            ("vfio-user:/run/x", "vfio-user:/run/x"),
            ("malloc:m0?size=1g", "malloc:m0?size=1GiB"),
            ("bdev:Nvme0n1", "bdev:Nvme0n1"),
        ] {
            assert_eq!(typed.parse::<DriveSpec>().unwrap().to_string(), printed, "{typed}");
        }
    }

    #[test]
    fn spec_bad_forms_name_what_would_be_right() {
        for (typed, part) in [
            ("/dev/sdb", "does not start with a kind"),
            ("disk:/dev/sdb", "\"disk\" is not a kind"),
            ("file:", "a path is missing"),
            ("file:a.img", "relative"),
            ("file:/a\nb", "control character"),
            ("file:/a?size=0", "more than 0"),
            ("file:/a?size=big", "must start with a number"),
            ("file:/a?size=", "no value"),
            ("file:/a?size=1g&size=2g", "given twice"),
            ("block:/dev/sdb?size=1g", "they take power_safe and stores"),
            ("nvme:0000:00:44.0", "not a PCI address"),
            ("nvme:0000:00:04.0/0", "not a namespace"),
            ("nvme:0000:00:04.0/+1", "not a namespace"),
            ("malloc:m0", "write malloc:m0?size=1GiB"),
            ("malloc:?size=1g", "not a bdev's name"),
            ("bdev:a/b", "not a bdev's name"),
            ("file:/a?power_safe=yes", "use true or false"),
            ("file:/a?stores=0", "from 1 to 256"),
        ] {
            let error = typed.parse::<DriveSpec>().unwrap_err().to_string();
            assert!(error.contains(part), "{typed}: {error}");
        }
    }

    #[test]
    fn spec_place_ignores_options() {
        let place = |text: &str| text.parse::<DriveSpec>().unwrap().place();
        assert_eq!(place("file:/a?size=1g&stores=2"), place("file:/a"));
        assert_eq!(place("nvme:00:04.0"), place("nvme:0000:00:04.0/1?power_safe=true"));
        assert_ne!(place("file:/a"), place("block:/a"));
    }

    fn any_kind() -> impl Strategy<Value = DriveKind> {
        let size = (1u64..).prop_map(ByteSize);
        prop_oneof![
            ("/[^?\\pC]{0,30}", proptest::option::of(size.clone())).prop_map(|(path, size)| DriveKind::File { path, size }),
            "/[^?\\pC]{0,30}".prop_map(|path| DriveKind::Block { path }),
            "/[^?\\pC]{0,30}".prop_map(|path| DriveKind::VfioUser { path }),
            (any::<u32>(), any::<u8>(), 0u8..32, 0u8..8, 1..u32::MAX).prop_map(|(domain, bus, device, function, namespace)| {
                DriveKind::Nvme { address: PciAddress { domain, bus, device, function }, namespace }
            }),
            ("[a-zA-Z0-9._:-]{1,63}", size).prop_map(|(name, size)| DriveKind::Malloc { name, size }),
            "[a-zA-Z0-9._:-]{1,63}".prop_map(|name| DriveKind::Bdev { name }),
        ]
    }

    proptest! {
        #[test]
        fn spec_printed_parses_back(
            kind in any_kind(),
            power_safe: bool,
            stores in proptest::option::of(1..=STORES_MAX),
        ) {
            let spec = DriveSpec { kind, power_safe, stores };
            prop_assert_eq!(spec.to_string().parse(), Ok(spec));
        }
        #[test]
        fn spec_random_text_never_panics(text in "\\PC{0,60}") {
            let _ = text.parse::<DriveSpec>();
        }
        #[test]
        fn spec_random_tail_never_panics(
            kind in "(file|block|nvme|vfio-user|malloc|bdev)", tail in ":[/0-9a-f.:?&=sizetorp_]{0,40}"
        ) {
            let _ = format!("{kind}{tail}").parse::<DriveSpec>();
        }
    }
}
