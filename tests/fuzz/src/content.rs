//! What hosts write in the images: every sector says which volume and sector it is for, so that a sector read anywhere can
//! be judged without a model of the whole history.

pub const SECTOR: usize = 512;

/// Fills `to` (whole sectors, the first being sector `first` of the volume) with the content of one write.
pub fn fill(to: &mut [u8], volume: u8, first: u64, version: u8) {
    for (i, sector) in to.chunks_exact_mut(SECTOR).enumerate() {
        fill_sector(sector, volume, first + i as u64, version);
    }
}

fn fill_sector(sector: &mut [u8], volume: u8, no: u64, version: u8) {
    let mut state = (no + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(volume) << 8 ^ u64::from(version);
    for word in sector.as_chunks_mut::<8>().0 {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = state.to_le_bytes();
    }
    sector[..8].copy_from_slice(&no.to_le_bytes());
    sector[8] = volume;
    sector[9] = version;
}

/// Whether every sector of `bytes` is zeros or some write to that very volume and place. Compares whole sectors: a loop over
/// bytes would be traced byte by byte, and cost more than all the rest.
pub fn is_legitimate(bytes: &[u8], volume: u8, first: u64) -> bool {
    let mut expected = [0; SECTOR];
    bytes.chunks_exact(SECTOR).enumerate().all(|(i, sector)| {
        if sector == [0; SECTOR] {
            return true;
        }
        fill_sector(&mut expected, volume, first + i as u64, sector[9]);
        sector == expected
    })
}
