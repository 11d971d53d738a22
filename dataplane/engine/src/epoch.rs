//! Which reads may still look at space that was given back: space is reused only when none can.
//!
//! Reads enter the current epoch. Giving space back closes that epoch; the space is free when every read of it and of
//! those before has left.

use std::collections::VecDeque;

/// An epoch of reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub struct Epoch(u64);

#[derive(Debug, Default)]
pub struct Epochs {
    /// Epoch of `out[0]`.
    first: u64,
    out: VecDeque<u32>,
}

impl Epochs {
    pub fn enter(&mut self) -> Epoch {
        if self.out.is_empty() {
            self.out.push_back(0);
        }
        *self.out.back_mut().expect("one epoch is always there") += 1;
        Epoch(self.first + self.out.len() as u64 - 1)
    }

    pub fn leave(&mut self, epoch: Epoch) {
        let at = (epoch.0 - self.first) as usize;
        assert!(self.out[at] > 0, "a read left epoch {} twice", epoch.0);
        self.out[at] -= 1;
        while self.out.len() > 1 && self.out[0] == 0 {
            self.out.pop_front();
            self.first += 1;
        }
    }

    /// Closes the current epoch: what is given back now is free once [`Self::passed`] says so of it.
    pub fn close(&mut self) -> Epoch {
        let now = self.first + self.out.len().saturating_sub(1) as u64;
        if self.out.back().is_none_or(|out| *out == 0) {
            // Nobody is in it: whatever was open before it still counts, itself does not.
            return Epoch(now.wrapping_sub(1));
        }
        self.out.push_back(0);
        Epoch(now)
    }

    /// Whether every read of `epoch` and before has left.
    pub fn passed(&self, epoch: Epoch) -> bool {
        epoch.0 == u64::MAX || epoch.0 < self.first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn space_is_free_only_after_the_reads_that_could_see_it() {
        let mut epochs = Epochs::default();
        let nobody = epochs.close();
        assert!(epochs.passed(nobody));
        let early = epochs.enter();
        let closed = epochs.close();
        let late = epochs.enter();
        assert!(!epochs.passed(closed));
        epochs.leave(early);
        assert!(epochs.passed(closed));
        let second = epochs.close();
        assert!(!epochs.passed(second));
        epochs.leave(late);
        assert!(epochs.passed(second));
    }
}
