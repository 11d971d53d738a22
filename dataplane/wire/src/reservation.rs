//! Who of a volume's hosts may do what: NVMe reservations, as batches, directories and installs carry them.
//!
//! Always the whole state and never a change of it, so that one record tells everything and may take effect twice. Not here: which command
//! leads from one state to the next, and what is refused under one (the engine's).

use crate::codec::{Put, Take};
use crate::{DecodeError, HostId};

/// Hosts that may be registered with a volume at a time.
pub const REGISTRANTS_MAX: usize = 64;
const HEAD: usize = 24;
const ROW: usize = 24;
/// Bytes of an encoded state at most.
pub const RESERVATIONS_MAX: usize = HEAD + ROW * REGISTRANTS_MAX;
const WHAT: &str = "reservations";

/// What a reservation keeps from whom.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReservationKind {
    WriteExclusive = 1,
    ExclusiveAccess = 2,
    WriteExclusiveRegistrants = 3,
    ExclusiveAccessRegistrants = 4,
    WriteExclusiveAll = 5,
    ExclusiveAccessAll = 6,
}

impl ReservationKind {
    pub const ALL: [Self; 6] = [
        Self::WriteExclusive,
        Self::ExclusiveAccess,
        Self::WriteExclusiveRegistrants,
        Self::ExclusiveAccessRegistrants,
        Self::WriteExclusiveAll,
        Self::ExclusiveAccessAll,
    ];

    pub fn of(code: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    /// Every registrant holds it.
    pub fn is_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAll | Self::ExclusiveAccessAll)
    }
}

/// A host that is registered, and its key.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Registrant {
    pub host: HostId,
    pub key: u64,
}

/// A volume's reservations.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Reservations {
    /// How often registrations changed; wraps.
    pub generation: u32,
    /// What is held, and by whom: nobody in particular where every registrant holds it.
    pub held: Option<(ReservationKind, Option<HostId>)>,
    /// In order of registration; no host twice.
    pub registrants: Vec<Registrant>,
}

impl Reservations {
    pub fn registrant(&self, host: HostId) -> Option<&Registrant> {
        self.registrants.iter().find(|registrant| registrant.host == host)
    }

    pub fn encoded_len(&self) -> usize {
        HEAD + ROW * self.registrants.len()
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.encoded_len()];
        let mut w = Put::new(&mut bytes, 0);
        w.u32(self.generation);
        w.u8(self.held.map_or(0, |(kind, _)| kind as u8));
        w.u8(0);
        w.u16(self.registrants.len() as u16);
        w.bytes(&self.held.and_then(|(_, holder)| holder).unwrap_or_default().0);
        for registrant in &self.registrants {
            w.bytes(&registrant.host.0);
            w.u64(registrant.key);
        }
        bytes
    }

    /// # Errors
    /// When the bytes are not exactly a state that a volume can have.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut r = Take::new(bytes, 0, WHAT);
        let (generation, kind, zero, count) = (r.u32()?, r.u8()?, r.u8()?, usize::from(r.u16()?));
        let holder = HostId(r.id()?);
        if count > REGISTRANTS_MAX {
            return Err(DecodeError::Limit { what: "registrants of a volume", found: count as u64, limit: REGISTRANTS_MAX as u64 });
        }
        if zero != 0 || r.left() != count * ROW {
            return Err(DecodeError::Value { what: "bytes of reservations", found: bytes.len() as u64 });
        }
        let mut registrants: Vec<Registrant> = Vec::with_capacity(count);
        for _ in 0..count {
            let registrant = Registrant { host: HostId(r.id()?), key: r.u64()? };
            if registrant.host == HostId::default() || registrants.iter().any(|before| before.host == registrant.host) {
                return Err(DecodeError::Value { what: "host of a registrant, its place", found: registrants.len() as u64 });
            }
            registrants.push(registrant);
        }
        let held = match (kind, ReservationKind::of(kind)) {
            (0, _) => None,
            (_, Some(kind)) if kind.is_all() => Some((kind, None)),
            (_, Some(kind)) => Some((kind, Some(holder))),
            (other, None) => return Err(DecodeError::Value { what: "kind of a reservation", found: other.into() }),
        };
        let state = Self { generation, held, registrants };
        // Whoever holds it is registered, and names himself nowhere else.
        let fits = match held {
            None => holder == HostId::default(),
            Some((_, None)) => holder == HostId::default() && count > 0,
            Some((_, Some(holder))) => state.registrant(holder).is_some(),
        };
        if fits { Ok(state) } else { Err(DecodeError::Value { what: "holder of a reservation, its kind", found: kind.into() }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::reservations;
    use proptest::prelude::*;

    #[test]
    fn state_round_trips_and_the_largest_fits_its_bound() {
        let state = reservations();
        assert_eq!(Reservations::decode(&state.encode()), Ok(state));
        let registrants = (0..REGISTRANTS_MAX as u8).map(|i| Registrant { host: HostId([i + 1; 16]), key: u64::from(i) }).collect();
        let largest = Reservations { generation: u32::MAX, held: Some((ReservationKind::ExclusiveAccessAll, None)), registrants };
        assert_eq!(largest.encode().len(), RESERVATIONS_MAX);
        assert_eq!(Reservations::decode(&largest.encode()), Ok(largest));
    }

    #[test]
    fn states_that_no_volume_can_have_are_refused() {
        let good = reservations();
        let refused = |change: fn(&mut Reservations)| {
            let mut state = good.clone();
            change(&mut state);
            Reservations::decode(&state.encode()).unwrap_err()
        };
        refused(|state| state.registrants.clear());
        refused(|state| state.held = Some((ReservationKind::WriteExclusive, Some(HostId([9; 16])))));
        refused(|state| state.registrants[1].host = state.registrants[0].host);
        refused(|state| state.registrants[1].host = HostId::default());
        refused(|state| state.registrants = (1..=65).map(|i| Registrant { host: HostId([i; 16]), key: 1 }).collect());
        let mut bytes = good.encode();
        bytes[4] = 7;
        assert_eq!(Reservations::decode(&bytes), Err(DecodeError::Value { what: "kind of a reservation", found: 7 }));
        bytes[4] = 0;
        assert!(Reservations::decode(&bytes).is_err(), "nothing is held, and yet there is a holder");
        assert!(Reservations::decode(&good.encode()[..30]).is_err());
    }

    proptest! {
        #[test]
        fn mutated_state_decodes_to_what_encodes_alike_or_fails(at: u8, byte: u8, cut: u8) {
            let mut bytes = reservations().encode();
            let at = usize::from(at) % bytes.len();
            bytes[at] = byte;
            bytes.truncate(bytes.len() - usize::from(cut) % 4);
            if let Ok(state) = Reservations::decode(&bytes) {
                prop_assert_eq!(state.encode(), bytes);
            }
        }
    }
}
