//! Two kinds of outcome: [`Errno`] from SPDK's calls, and [`NvmeStatus`] / [`Status`] for I/O. No policy on what to do with them.

use std::fmt;

/// A failure of an SPDK call, by its errno (positive).
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    pub const NOMEM: Errno = Errno(libc::ENOMEM);
    pub const INVAL: Errno = Errno(libc::EINVAL);
    pub const BUSY: Errno = Errno(libc::EBUSY);
    pub const EXIST: Errno = Errno(libc::EEXIST);
    pub const NODEV: Errno = Errno(libc::ENODEV);
    pub const AGAIN: Errno = Errno(libc::EAGAIN);
    pub const NOTSUP: Errno = Errno(libc::ENOTSUP);
    pub const IO: Errno = Errno(libc::EIO);
    /// The target thread, or the app, has stopped.
    pub const SHUTDOWN: Errno = Errno(libc::ESHUTDOWN);

    pub const fn new(errno: i32) -> Errno {
        Errno(errno)
    }

    pub const fn raw(self) -> i32 {
        self.0
    }

    /// SPDK's convention: 0 is success, negative is an errno.
    pub(crate) fn check(rc: i32) -> Result<(), Errno> {
        if rc == 0 { Ok(()) } else { Err(Errno(rc.abs())) }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // std's text is "No such device (os error 19)".
        std::io::Error::from_raw_os_error(self.0).fmt(f)
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({self})")
    }
}

impl std::error::Error for Errno {}

/// An NVMe status: code type and code (NVM Express Base Specification 2.0, 3.3.3.2.1). `OK` is 0/0.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct NvmeStatus {
    pub sct: u8,
    pub sc: u8,
}

impl NvmeStatus {
    pub const OK: NvmeStatus = NvmeStatus { sct: 0, sc: 0x00 };
    pub const INVALID_OPCODE: NvmeStatus = NvmeStatus { sct: 0, sc: 0x01 };
    pub const INVALID_FIELD: NvmeStatus = NvmeStatus { sct: 0, sc: 0x02 };
    pub const DATA_TRANSFER_ERROR: NvmeStatus = NvmeStatus { sct: 0, sc: 0x04 };
    pub const INTERNAL_DEVICE_ERROR: NvmeStatus = NvmeStatus { sct: 0, sc: 0x06 };
    pub const ABORTED_BY_REQUEST: NvmeStatus = NvmeStatus { sct: 0, sc: 0x07 };
    pub const ABORTED_SQ_DELETION: NvmeStatus = NvmeStatus { sct: 0, sc: 0x08 };
    pub const INVALID_NAMESPACE: NvmeStatus = NvmeStatus { sct: 0, sc: 0x0b };
    pub const NAMESPACE_WRITE_PROTECTED: NvmeStatus = NvmeStatus { sct: 0, sc: 0x20 };
    pub const LBA_OUT_OF_RANGE: NvmeStatus = NvmeStatus { sct: 0, sc: 0x80 };
    pub const CAPACITY_EXCEEDED: NvmeStatus = NvmeStatus { sct: 0, sc: 0x81 };
    pub const NAMESPACE_NOT_READY: NvmeStatus = NvmeStatus { sct: 0, sc: 0x82 };
    pub const RESERVATION_CONFLICT: NvmeStatus = NvmeStatus { sct: 0, sc: 0x83 };
    pub const CONFLICTING_ATTRIBUTES: NvmeStatus = NvmeStatus { sct: 1, sc: 0x80 };
    pub const WRITE_FAULT: NvmeStatus = NvmeStatus { sct: 2, sc: 0x80 };
    pub const UNRECOVERED_READ: NvmeStatus = NvmeStatus { sct: 2, sc: 0x81 };
    pub const COMPARE_FAILURE: NvmeStatus = NvmeStatus { sct: 2, sc: 0x85 };
    /// Path: internal path error. The host retries on another path.
    pub const PATH_INTERNAL: NvmeStatus = NvmeStatus { sct: 3, sc: 0x00 };
    /// Path: asymmetric access inaccessible. The host retries on another path, where there is one.
    pub const PATH_INACCESSIBLE: NvmeStatus = NvmeStatus { sct: 3, sc: 0x02 };
    /// Path: asymmetric access transition.
    pub const PATH_TRANSITION: NvmeStatus = NvmeStatus { sct: 3, sc: 0x03 };
}

impl NvmeStatus {
    /// Whether the same command would fail again, so that the host is told not to retry it.
    pub const fn is_final(self) -> bool {
        match self.sct {
            0 => matches!(self.sc, 0x01 | 0x02 | 0x0b | 0x20 | 0x80 | 0x83),
            1 => true,
            _ => false,
        }
    }
}

impl fmt::Display for NvmeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVMe status {}/0x{:02x} (sct/sc)", self.sct, self.sc)
    }
}

impl fmt::Debug for NvmeStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NvmeStatus({}/0x{:02x})", self.sct, self.sc)
    }
}

impl std::error::Error for NvmeStatus {}

/// The answer to a host's I/O.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    Success,
    /// Success with a result in dword 0 of the completion; NVMe hosts alone see it.
    SuccessWith(u32),
    /// vhost turns any of these into VIRTIO_BLK_S_IOERR.
    Nvme(NvmeStatus),
    /// What compare-and-write compared was different; nothing was written.
    Miscompare,
    Aborted,
}

impl From<NvmeStatus> for Status {
    fn from(status: NvmeStatus) -> Status {
        if status == NvmeStatus::OK { Status::Success } else { Status::Nvme(status) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errno_from_c_takes_either_sign_and_names_itself() {
        assert_eq!(Errno::check(0), Ok(()));
        assert_eq!(Errno::check(-libc::ENODEV), Err(Errno::NODEV));
        assert_eq!(Errno::check(libc::EBUSY), Err(Errno::BUSY));
        assert!(Errno::NODEV.to_string().contains("No such device"));
    }

    #[test]
    fn nvme_status_of_a_bad_command_is_final_and_of_a_path_or_medium_is_not() {
        assert!(NvmeStatus::INVALID_OPCODE.is_final() && NvmeStatus::LBA_OUT_OF_RANGE.is_final());
        for passing in [NvmeStatus::PATH_INACCESSIBLE, NvmeStatus::CAPACITY_EXCEEDED, NvmeStatus::NAMESPACE_NOT_READY] {
            assert!(!passing.is_final(), "{passing}");
        }
        assert!(!NvmeStatus::UNRECOVERED_READ.is_final());
    }

    #[test]
    fn nvme_status_zero_is_success() {
        assert_eq!(Status::from(NvmeStatus::OK), Status::Success);
        assert_eq!(Status::from(NvmeStatus::PATH_INACCESSIBLE), Status::Nvme(NvmeStatus { sct: 3, sc: 2 }));
    }
}
