//! Shows after each misdeed that the house still stands: the processes are the same ones and answer, and a volume takes a
//! write and gives back this one and those before it.

use super::house::{House, TcpDoor};
use super::{Result, failed};

const BLOCK: usize = 4096;
/// Blocks it writes in turn.
const BLOCKS: u64 = 64;

pub struct Witness {
    door: TcpDoor,
    pid: u32,
    written: u64,
}

fn content(round: u64) -> Vec<u8> {
    let mut bytes = round.to_le_bytes().repeat(BLOCK / 8);
    bytes[0] = 0xa5; // so that round 0 is not zeros
    bytes
}

impl Witness {
    /// Creates a volume of its own on one of the house's drives.
    #[track_caller]
    pub fn new(house: &mut House) -> Self {
        let door = house.add_volume("witness", "4MiB", BLOCK as u32);
        Witness { door, pid: house.node().id().expect("penstockd runs"), written: 0 }
    }

    /// penstockd was started again on purpose.
    pub fn expect_restarted(&mut self, house: &mut House) -> Result<()> {
        self.door = house.wait_for_door("witness")?;
        self.pid = house.node().id().expect("penstockd runs");
        Ok(())
    }

    /// # Errors
    /// What is not as it was before `deed`.
    pub fn look(&mut self, house: &mut House, deed: &str) -> Result<()> {
        self.try_look(house).map_err(|why| failed(format!("after {deed}"), why.to_string()))
    }

    /// As [`Self::look`], in a house whose control is not running.
    pub fn look_at_node(&mut self, house: &mut House, deed: &str) -> Result<()> {
        self.try_volume(house).map_err(|why| failed(format!("after {deed}"), why.to_string()))
    }

    fn try_look(&mut self, house: &mut House) -> Result<()> {
        house.expect_alive()?;
        self.try_volume(house)
    }

    fn try_volume(&mut self, house: &mut House) -> Result<()> {
        if house.node().id() != Some(self.pid) {
            return Err(failed("penstockd", "is another process"));
        }
        let mut line = self.door.connect()?;
        line.write(self.written % BLOCKS * BLOCK as u64, &content(self.written))?;
        self.written += 1;
        for round in self.written.saturating_sub(4)..self.written {
            if line.read(round % BLOCKS * BLOCK as u64, BLOCK)? != content(round) {
                return Err(failed("the witness's volume", format!("does not hold what write {round} put there")));
            }
        }
        Ok(())
    }

    pub fn door(&self) -> &TcpDoor {
        &self.door
    }
}
