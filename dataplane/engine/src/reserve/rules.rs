//! What a reservation command makes of a volume's reservations, and what they let a host do: NVM Express base specification 2.0, section 8.19.
//!
//! Pure tables over [`Reservations`]. Registered is a host, by its 128-bit id, whatever controllers and nodes it comes through. Not here: when a
//! command is looked at (`reserve`), and what is aborted by a preempt: writes of a host that lost its right find that out before they
//! are proposed, which is all that an abort could promise.

use crate::port::Status;
use penstock_wire::HostId;
use penstock_wire::reservation::{REGISTRANTS_MAX, Registrant, ReservationKind, Reservations};

/// What a host asks of a volume's reservations. `None` for a key: whatever it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reserve {
    Register {
        new: u64,
    },
    Unregister {
        key: Option<u64>,
    },
    /// Without a key also for a host that is not registered.
    Replace {
        key: Option<u64>,
        new: u64,
    },
    Acquire {
        key: u64,
        kind: ReservationKind,
    },
    /// With or without abort.
    Preempt {
        key: u64,
        victim: u64,
        kind: ReservationKind,
    },
    Release {
        key: u64,
        kind: ReservationKind,
    },
    Clear {
        key: u64,
    },
    /// Fill the command's payload, `len` bytes, with what [`report`] makes of the state.
    Report {
        len: u32,
    },
}

/// The state after the command; `None` where it changes nothing.
///
/// # Errors
/// What the host is told where it may not, or asks for what cannot be.
pub fn rule(state: &Reservations, host: HostId, what: Reserve) -> Result<Option<Reservations>, Status> {
    if host == HostId::default() {
        // One that does not say who it is cannot be told from another.
        return Err(Status::Invalid);
    }
    let own = state.registrant(host).map(|registrant| registrant.key);
    let with_key = |key: u64| if own == Some(key) { Ok(()) } else { Err(Status::Conflict) };
    let mut next = state.clone();
    match what {
        Reserve::Report { .. } => return Ok(None),
        Reserve::Register { new: 0 } | Reserve::Replace { new: 0, .. } => return Err(Status::Invalid),
        Reserve::Register { new } => match own {
            // Not an error, and counted.
            Some(key) if key == new => {}
            Some(_) => return Err(Status::Conflict),
            None => add(&mut next, host, new)?,
        },
        Reserve::Replace { key, new } => match (own, key) {
            (Some(own), _) if key.is_none_or(|key| key == own) => {
                next.registrants.iter_mut().filter(|registrant| registrant.host == host).for_each(|registrant| registrant.key = new);
            }
            (None, None) => add(&mut next, host, new)?,
            _ => return Err(Status::Conflict),
        },
        Reserve::Unregister { key } => {
            if own.is_none_or(|own| key.is_some_and(|key| key != own)) {
                return Err(Status::Conflict);
            }
            remove(&mut next, |registrant| registrant.host == host);
        }
        Reserve::Acquire { key, kind } => {
            with_key(key)?;
            match state.held {
                None => next.held = Some((kind, holder_of(kind, host))),
                Some((held, _)) if held == kind && holds(state, host) => return Ok(None),
                Some(_) => return Err(Status::Conflict),
            }
            // The generation counts registrations: this is none.
            return Ok(Some(next));
        }
        Reserve::Release { key, kind } => {
            with_key(key)?;
            match state.held {
                Some((held, _)) if holds(state, host) && held == kind => next.held = None,
                Some(_) if holds(state, host) => return Err(Status::Invalid),
                _ => return Ok(None),
            }
            return Ok(Some(next));
        }
        Reserve::Clear { key } => {
            with_key(key)?;
            (next.held, next.registrants) = (None, Vec::new());
        }
        Reserve::Preempt { key, victim, kind } => {
            with_key(key)?;
            preempt(&mut next, host, victim, kind)?;
        }
    }
    next.generation = state.generation.wrapping_add(1);
    Ok(Some(next))
}

fn preempt(next: &mut Reservations, host: HostId, victim: u64, kind: ReservationKind) -> Result<(), Status> {
    let holder_key = match next.held {
        Some((_, Some(holder))) => next.registrant(holder).map(|holder| holder.key),
        // Held by all: who names nobody takes it from all of them.
        Some((_, None)) => Some(0),
        None => None,
    };
    if holder_key == Some(victim) {
        let everybody = victim == 0;
        next.registrants.retain(|registrant| registrant.host == host || !everybody && registrant.key != victim);
        next.held = Some((kind, holder_of(kind, host)));
        return Ok(());
    }
    if victim == 0 {
        return Err(Status::Invalid);
    }
    if !next.registrants.iter().any(|registrant| registrant.key == victim) {
        return Err(Status::Conflict);
    }
    remove(next, |registrant| registrant.key == victim);
    Ok(())
}

fn add(next: &mut Reservations, host: HostId, key: u64) -> Result<(), Status> {
    if next.registrants.len() == REGISTRANTS_MAX {
        return Err(Status::NoSpace);
    }
    next.registrants.push(Registrant { host, key });
    Ok(())
}

/// Whose registration is gone does not hold anything; what all held is gone with the last of them.
fn remove(next: &mut Reservations, gone: impl Fn(&Registrant) -> bool) {
    next.registrants.retain(|registrant| !gone(registrant));
    let holds_on = match next.held {
        Some((_, Some(holder))) => next.registrant(holder).is_some(),
        Some((_, None)) => !next.registrants.is_empty(),
        None => false,
    };
    if !holds_on {
        next.held = None;
    }
}

fn holder_of(kind: ReservationKind, host: HostId) -> Option<HostId> {
    (!kind.is_all()).then_some(host)
}

fn holds(state: &Reservations, host: HostId) -> bool {
    match state.held {
        Some((_, Some(holder))) => holder == host,
        Some((_, None)) => state.registrant(host).is_some(),
        None => false,
    }
}

/// Whether a host may read, or do anything that is more than reading.
pub fn permits(state: &Reservations, host: HostId, writes: bool) -> bool {
    use ReservationKind::*;
    let Some((kind, _)) = state.held else { return true };
    match kind {
        WriteExclusive => !writes || holds(state, host),
        ExclusiveAccess => holds(state, host),
        WriteExclusiveRegistrants | WriteExclusiveAll => !writes || state.registrant(host).is_some(),
        ExclusiveAccessRegistrants | ExclusiveAccessAll => state.registrant(host).is_some(),
    }
}

/// Bytes of the head of a report, and of each registrant in it.
const REPORT_HEAD: usize = 64;
const REPORT_ROW: usize = 64;
/// Bytes of a report at most.
pub const REPORT_MAX: usize = REPORT_HEAD + REPORT_ROW * REGISTRANTS_MAX;

/// The extended reservation status data structure (figure 287): hosts are named by 128 bits, and by no controller. Reservations always last through a
/// loss of power here.
pub fn report(state: &Reservations) -> Vec<u8> {
    let mut bytes = vec![0; REPORT_HEAD + REPORT_ROW * state.registrants.len()];
    bytes[0..4].copy_from_slice(&state.generation.to_le_bytes());
    bytes[4] = state.held.map_or(0, |(kind, _)| kind as u8);
    bytes[5..7].copy_from_slice(&(state.registrants.len() as u16).to_le_bytes());
    bytes[9] = 1;
    for (registrant, row) in state.registrants.iter().zip(bytes[REPORT_HEAD..].chunks_mut(REPORT_ROW)) {
        row[0..2].copy_from_slice(&u16::MAX.to_le_bytes());
        row[2] = u8::from(holds(state, registrant.host));
        row[8..16].copy_from_slice(&registrant.key.to_le_bytes());
        row[16..32].copy_from_slice(&registrant.host.0);
    }
    bytes
}

#[cfg(test)]
mod tests;
