//! What a host is told: engine answers and refusals of our own as NVMe status.
//!
//! virtio-blk knows three answers, and SPDK's vhost turns every NVMe status but success into `VIRTIO_BLK_S_IOERR`, so one
//! table serves all doors. Not here: who sends it, or when.

use penstock_engine::Status;

/// Status code type and status code (NVM Express base specification 2.0, figures 93 to 99).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NvmeStatus {
    pub sct: u8,
    pub sc: u8,
}

impl NvmeStatus {
    const fn generic(sc: u8) -> Self {
        Self { sct: 0, sc }
    }
    const fn media(sc: u8) -> Self {
        Self { sct: 2, sc }
    }
    const fn path(sc: u8) -> Self {
        Self { sct: 3, sc }
    }

    pub const SUCCESS: Self = Self::generic(0x00);
    pub const INVALID_OPCODE: Self = Self::generic(0x01);
    pub const INVALID_FIELD: Self = Self::generic(0x02);
    pub const INTERNAL_ERROR: Self = Self::generic(0x06);
    pub const DATA_SGL_LENGTH_INVALID: Self = Self::generic(0x0f);
    /// The host names itself by 128 bits, and asked for a structure that has 64.
    pub const HOST_ID_INCONSISTENT: Self = Self::generic(0x18);
    /// What came of it is not known, and the host does it again.
    pub const COMMAND_INTERRUPTED: Self = Self::generic(0x21);
    pub const LBA_OUT_OF_RANGE: Self = Self::generic(0x80);
    pub const CAPACITY_EXCEEDED: Self = Self::generic(0x81);
    /// More commands are held than the node has places for; the host tries again.
    pub const NAMESPACE_NOT_READY: Self = Self::generic(0x82);
    pub const RESERVATION_CONFLICT: Self = Self::generic(0x83);
    pub const WRITE_FAULT: Self = Self::media(0x80);
    pub const UNRECOVERED_READ_ERROR: Self = Self::media(0x81);
    pub const COMPARE_FAILURE: Self = Self::media(0x85);
    /// Asymmetric access inaccessible: the host tries again, on another path if it has one.
    pub const PATH_INACCESSIBLE: Self = Self::path(0x02);

    pub fn is_success(self) -> bool {
        self == Self::SUCCESS
    }

    /// As SPDK's completion wants it: two answers have a kind of their own there.
    pub fn to_spdk(self) -> spdk_rs::Status {
        match self {
            Self::SUCCESS => spdk_rs::Status::Success,
            Self::COMPARE_FAILURE => spdk_rs::Status::Miscompare,
            Self { sct, sc } => spdk_rs::Status::Nvme(spdk_rs::NvmeStatus { sct, sc }),
        }
    }
}

impl From<Status> for NvmeStatus {
    fn from(status: Status) -> Self {
        match status {
            Status::Ok => Self::SUCCESS,
            Status::OutOfRange => Self::LBA_OUT_OF_RANGE,
            Status::Invalid => Self::INVALID_FIELD,
            Status::NoSpace => Self::CAPACITY_EXCEEDED,
            Status::Miscompare { .. } => Self::COMPARE_FAILURE,
            Status::Conflict => Self::RESERVATION_CONFLICT,
            Status::Unrecovered => Self::UNRECOVERED_READ_ERROR,
            Status::Fenced => Self::WRITE_FAULT,
            Status::NotReady => Self::PATH_INACCESSIBLE,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_engine_status_maps_to_the_code_of_the_specification() {
        for (status, sct, sc) in [
            (Status::Ok, 0, 0x00),
            (Status::Invalid, 0, 0x02),
            (Status::OutOfRange, 0, 0x80),
            (Status::NoSpace, 0, 0x81),
            (Status::Conflict, 0, 0x83),
            (Status::Fenced, 2, 0x80),
            (Status::Unrecovered, 2, 0x81),
            (Status::Miscompare { at: 7 }, 2, 0x85),
            (Status::NotReady, 3, 0x02),
        ] {
            let nvme = NvmeStatus::from(status);
            assert_eq!((nvme.sct, nvme.sc), (sct, sc), "{status:?}");
            assert_eq!(nvme.is_success(), status == Status::Ok, "only success may look like success: {status:?}");
        }
    }
}
