//! What nodes tell each other whether or not a group has something to say: that they live, how their drives are, how much room is left.
//!
//! One beat stands for all sleeping groups between two nodes, so that a thousand idle groups cost nothing.

use super::{Grow, limit, zeros};
use crate::codec::Take;
use crate::{DecodeError, DriveId, Incarnation};

const DRIVES_MAX: u16 = 256;
const SPACES_MAX: u16 = 1024;

/// How a drive is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DriveState {
    Serving,
    /// Takes no more writes.
    Fenced,
    /// Its members resolve what recovery could not judge.
    Resolving,
    Gone,
}

/// A drive of the node that beats.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Drive {
    pub drive: DriveId,
    pub incarnation: Incarnation,
    pub state: DriveState,
    /// How often it was opened. One that comes back with less than its peers recorded was restored, and is refused.
    pub opens: u64,
}

/// Blocks that new entries may still take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Room {
    /// Of the oplog's ring.
    pub ring_blocks: u64,
    /// Of the extents.
    pub blocks: u64,
}

/// Room in one store. Nobody tells it in a beat today: leaders reserve from the room in the answers of their groups' members.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    pub drive: DriveId,
    pub store: u32,
    pub room: Room,
}

/// A node's sign of life on one connection.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Beat {
    pub incarnation: Incarnation,
    /// Counts the beats of this direction, and the newest that came from the other: the time between is a round trip.
    pub count: u64,
    pub heard: u64,
    /// Bytes of frames that the sender will still take in before it must read on: the peer sends no more than that.
    pub window: u64,
    pub drives: Vec<Drive>,
    pub spaces: Vec<Space>,
}

impl Beat {
    pub(super) fn put(&self, w: &mut Grow) {
        w.bytes(&self.incarnation.0);
        w.u64(self.count);
        w.u64(self.heard);
        w.u64(self.window);
        w.u16(self.drives.len() as u16);
        w.u16(self.spaces.len() as u16);
        w.zeros(4);
        for drive in &self.drives {
            w.bytes(&drive.drive.0);
            w.bytes(&drive.incarnation.0);
            w.u64(drive.opens);
            w.u8(match drive.state {
                DriveState::Serving => 0,
                DriveState::Fenced => 1,
                DriveState::Resolving => 2,
                DriveState::Gone => 3,
            });
            w.zeros(7);
        }
        for space in &self.spaces {
            w.bytes(&space.drive.0);
            w.u32(space.store);
            w.zeros(4);
            w.u64(space.room.ring_blocks);
            w.u64(space.room.blocks);
        }
    }

    pub(super) fn take(r: &mut Take<'_>) -> Result<Self, DecodeError> {
        let incarnation = Incarnation(r.id()?);
        let count = r.count("count of a beat")?;
        let heard = r.count("beat that was heard")?;
        let window = r.count("window of a connection")?;
        let (drives, spaces) = (r.u16()?, r.u16()?);
        limit("drives of a beat", drives.into(), DRIVES_MAX.into())?;
        limit("stores of a beat", spaces.into(), SPACES_MAX.into())?;
        zeros(r, 4)?;
        let drives = (0..drives).map(|_| take_drive(r)).collect::<Result<_, _>>()?;
        let spaces = (0..spaces).map(|_| take_space(r)).collect::<Result<_, _>>()?;
        Ok(Self { incarnation, count, heard, window, drives, spaces })
    }
}

fn take_drive(r: &mut Take<'_>) -> Result<Drive, DecodeError> {
    let drive = DriveId(r.id()?);
    let incarnation = Incarnation(r.id()?);
    let opens = r.count("opens of a drive")?;
    let state = match r.u8()? {
        0 => DriveState::Serving,
        1 => DriveState::Fenced,
        2 => DriveState::Resolving,
        3 => DriveState::Gone,
        other => return Err(DecodeError::Value { what: "state of a drive", found: other.into() }),
    };
    zeros(r, 7)?;
    Ok(Drive { drive, incarnation, state, opens })
}

fn take_space(r: &mut Take<'_>) -> Result<Space, DecodeError> {
    let drive = DriveId(r.id()?);
    let store = r.u32()?;
    zeros(r, 4)?;
    let room = Room { ring_blocks: r.count("room in a ring")?, blocks: r.count("room in the extents")? };
    Ok(Space { drive, store, room })
}
