//! What hosts are told of a controller and a namespace, corrected where SPDK's target says what is not so.
//!
//! Byte offsets: NVM Express base specification 2.0, figure 275 (Identify Controller); NVM command set 1.0, figure 97 (Identify
//! Namespace). Pure over the 4096 bytes.

const ONCS: usize = 520;
const VWC: usize = 525;
const FUSES: usize = 522;
const DLFEAT: usize = 33;
const RESCAP: usize = 31;
const NSFEAT: usize = 24;

const ONCS_COMPARE: u16 = 1 << 0;
const ONCS_WRITE_UNCORRECTABLE: u16 = 1 << 1;
const ONCS_DATASET_MANAGEMENT: u16 = 1 << 2;
const ONCS_WRITE_ZEROES: u16 = 1 << 3;
const ONCS_RESERVATIONS: u16 = 1 << 5;
const ONCS_VERIFY: u16 = 1 << 7;
const ONCS_COPY: u16 = 1 << 8;

/// Identify Controller: no volatile write cache, and the optional commands that [`crate::command`] reads, no others. Reservations are for hosts
/// that can be told apart: `named`.
pub fn controller(data: &mut [u8; 4096], named: bool) {
    data[VWC] &= !1;
    let told = u16::from_le_bytes([data[ONCS], data[ONCS + 1]]);
    let ours = (told & !(ONCS_COMPARE | ONCS_WRITE_UNCORRECTABLE | ONCS_RESERVATIONS | ONCS_VERIFY | ONCS_COPY))
        | ONCS_DATASET_MANAGEMENT
        | ONCS_WRITE_ZEROES
        | if named { ONCS_RESERVATIONS } else { 0 };
    data[ONCS..ONCS + 2].copy_from_slice(&ours.to_le_bytes());
    // Bit 0: compare and write, fused, which the engine decides atomically.
    data[FUSES] |= 1;
}

/// Identify Namespace: deallocated blocks read as zeros, space is thin, and reservations are of all types, lasting.
pub fn namespace(data: &mut [u8; 4096], named: bool) {
    // Bits 2:0 are 1 for zeros; bit 3, deallocation by Write Zeroes, which frees space here without being asked.
    data[DLFEAT] = 1 | 1 << 3;
    // Bit 0, through power loss; 6:1, each type; 7, Ignore Existing Key as of NVMe 1.3.
    data[RESCAP] = if named { 0xff } else { 0 };
    // Thin provisioning.
    data[NSFEAT] |= 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn controller_claims_what_we_do_and_nothing_else() {
        let mut data = [0xff; 4096];
        controller(&mut data, false);
        assert_eq!(data[VWC] & 1, 0);
        let oncs = u16::from_le_bytes([data[ONCS], data[ONCS + 1]]);
        for (bit, on) in [(0, false), (1, false), (2, true), (3, true), (5, false), (7, false), (8, false)] {
            assert_eq!(oncs >> bit & 1 == 1, on, "ONCS bit {bit}");
        }
        let mut data = [0; 4096];
        controller(&mut data, true);
        assert_eq!((data[ONCS], data[FUSES]), (0b10_1100, 1), "reservations too");
    }

    #[test]
    fn namespace_reads_zeros_after_deallocate() {
        let mut data = [0xff; 4096];
        namespace(&mut data, false);
        assert_eq!((data[DLFEAT] & 7, data[RESCAP], data[NSFEAT] & 1), (1, 0, 1));
        namespace(&mut data, true);
        assert_eq!(data[RESCAP], 0xff);
    }
}
