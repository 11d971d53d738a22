//! Front doors: a volume as a bdev of ours, and NVMe-oF subsystems and vhost controllers over it.
//!
//! Each export is a bdev and a subsystem or controller of its own, since SPDK lets one bdev have one owner. Not here: which
//! volumes are exported (`node`), and what a command means to the data (the engine).

pub mod ana;
mod device;
mod export;
pub mod identify;

pub use device::ExportDevice;
pub use export::{ALL_CONTROLLERS, Export, ExportError, Opened, Target, VolumeFace};
