//! A fleet as the target of a guest: one path to each node, and what is struck each time is whoever leads.
//! Not here: what the guest does meanwhile ([`crate::guest::scenario`]), and links that are cut (chaos).

use super::fleet::{Fleet, Plan};
use super::{Result, failed};
use crate::guest::target::{Door, Identity, Target};
use crate::guest::wait::wait_for;
use penstock_api::ByteSize;
use penstock_api::rpc::{BlockSize, GroupPart};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::time::Duration;

/// For three nodes and an emulated guest on two cores that others want too.
const LIMIT: Duration = Duration::from_secs(240);
/// So many entries after a strike show that the guest has found the new leader.
const ENTRIES: u64 = 20;
/// What replicas are compared by.
const PIECE: u64 = 64 << 10;

/// What happened to a leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Strike {
    Kill,
    /// SIGSTOP: its connections stay open, and nothing answers.
    Pause,
}

pub struct FleetTarget {
    fleet: Fleet,
    volume: u64,
    /// In their order, and again from the first.
    strikes: Vec<Strike>,
    /// Who was struck so far, and in which term.
    struck: Vec<(Strike, usize, u64)>,
    /// The last of them has not come back.
    down: bool,
}

impl FleetTarget {
    /// Three nodes with a volume of so many bytes between them, ready to serve.
    pub fn new(volume: u64, strikes: &[Strike]) -> Result<Self> {
        let plan = Plan { drive: "1GiB", oplog: ByteSize::mib(64), volume: ByteSize(volume), block: BlockSize::B4096, ..Plan::default() };
        Ok(FleetTarget { fleet: Fleet::new(plan)?, volume, strikes: strikes.to_vec(), struck: Vec::new(), down: false })
    }

    /// Node and term of each leader that was struck.
    pub fn struck(&self) -> &[(Strike, usize, u64)] {
        &self.struck
    }

    pub fn explain(&self) -> String {
        format!("{:?}\n{}", self.struck, self.fleet.last_words())
    }

    /// Who leads, and its door.
    pub fn leader(&self) -> Result<(usize, Door)> {
        let leader = self.fleet.wait_for_leader()?;
        Ok((leader, self.doors().swap_remove(leader)))
    }

    /// Whoever leads meanwhile hands over to `node`.
    pub fn lead_from(&self, node: usize) -> Result<()> {
        self.fleet.transfer(node)
    }

    /// Waits until the guest's commands go on at another leader than `victim`, and answers which.
    fn others_serve(&self, victim: usize) -> Result<usize> {
        let others = || (0..self.fleet.len()).filter(|at| *at != victim);
        let mut first = None;
        wait_for("the guest to go on at another leader", LIMIT, || {
            let Some(leader) = self.fleet.leader_among(others()) else { return Ok(None) };
            let Some(group) = self.fleet.group(leader) else { return Ok(None) };
            let (who, began) = *first.get_or_insert((group.term, group.applied));
            if who != group.term {
                first = None;
                return Ok(None);
            }
            Ok((group.applied >= began + ENTRIES).then_some(leader))
        })
    }

    /// Waits until the member of `node` has all that `leader` had when this was called.
    fn caught_up(&self, node: usize, leader: usize) -> Result<()> {
        let target = self.fleet.group(leader).ok_or_else(|| failed("the leader", "does not answer"))?.last;
        wait_for(&format!("node {} to catch up to entry {target}", node + 1), LIMIT, || {
            let group = self.fleet.group(node);
            let there = |part| matches!(part, GroupPart::Follower | GroupPart::Leader);
            Ok(group.is_some_and(|group| there(group.part) && group.rebuild.is_none() && group.applied >= target).then_some(()))
        })
    }

    fn come_back(&mut self) -> Result<()> {
        let Some(&(strike, victim, _)) = self.struck.last().filter(|_| self.down) else { return Ok(()) };
        let leader = self.others_serve(victim)?;
        match strike {
            Strike::Kill => self.fleet.start(victim)?,
            Strike::Pause => self.fleet.pause(victim, false)?,
        }
        self.down = false;
        self.caught_up(victim, leader)
    }

    /// Digests of the volume as the replica of `node`, which has to lead for it, has it.
    fn digests(&self, node: usize) -> Result<Vec<u64>> {
        self.fleet.transfer(node)?;
        let mut line = self.fleet.doors()[node].connect()?;
        let digest = |offset| {
            let mut hasher = DefaultHasher::new();
            line.read(offset, PIECE as usize)?.hash(&mut hasher);
            Ok(hasher.finish())
        };
        (0..self.volume).step_by(PIECE as usize).map(digest).collect()
    }
}

impl Target for FleetTarget {
    fn start(&mut self) -> Result<()> {
        // The fleet itself runs since it was made.
        self.come_back().map_err(|e| failed(e.to_string(), self.explain()))?;
        self.fleet.wait_for_leader().map(drop)
    }

    fn kill(&mut self) -> Result<()> {
        let leader = self.fleet.wait_for_leader()?;
        let term = self.fleet.group(leader).ok_or_else(|| failed("the leader", "does not answer"))?.term;
        let strike = self.strikes[self.struck.len() % self.strikes.len()];
        match strike {
            Strike::Kill => self.fleet.kill(leader)?,
            Strike::Pause => self.fleet.pause(leader, true)?,
        }
        self.struck.push((strike, leader, term));
        self.down = true;
        Ok(())
    }

    fn door(&self) -> Door {
        self.doors().swap_remove(0)
    }

    fn doors(&self) -> Vec<Door> {
        self.fleet.doors().into_iter().map(|door| Door::NvmfTcp { port: door.address.port(), nqn: door.nqn }).collect()
    }

    fn identity(&self) -> Identity {
        Identity { write_cache: "write through", logical_block_size: 4096, discard: true, write_zeroes: true }
    }

    /// All replicas are equal, byte for byte, and the volume is not empty.
    fn audit(&mut self) -> Result<()> {
        self.fleet.wait_until_equal()?;
        let first = self.digests(0)?;
        if first.iter().all(|piece| *piece == first[0]) {
            return Err(failed("replicas", "nothing was written"));
        }
        for node in 1..self.fleet.len() {
            if let Some(piece) = first_difference(&first, &self.digests(node)?) {
                let what = format!("nodes 1 and {} differ from byte {} on", node + 1, piece as u64 * PIECE);
                return Err(failed("replicas", format!("{what}\n{}", self.explain())));
            }
        }
        Ok(())
    }
}

fn first_difference(one: &[u64], other: &[u64]) -> Option<usize> {
    (0..one.len().max(other.len())).find(|at| one.get(*at) != other.get(*at))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_difference_of_lists_is_found_in_length_too() {
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2, 3]), None);
        assert_eq!(first_difference(&[1, 2, 3], &[1, 5, 3]), Some(1));
        assert_eq!(first_difference(&[1, 2, 3], &[1, 2]), Some(2));
    }
}
