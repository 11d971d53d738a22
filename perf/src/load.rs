//! What an adapter drives: something that wants operations submitted and is told how they ended.
//!
//! [`crate::session::Session`] generates a workload, [`crate::verify::VerifyPass`] reads back what one left. An adapter
//! (SPDK's bdev layer, or the fake device of the tests) needs to know no more than this.

use crate::sample::Sample;
use crate::session::{Outcome, Submission, Tag};
use crate::units::Nanos;

/// A load as its adapter sees it. All times are of the adapter's monotonic clock.
pub trait Load {
    /// Starts the clock; once, before anything else.
    fn begin(&mut self, now: Nanos);
    /// Once per turn of the loop.
    fn turn(&mut self, now: Nanos);
    /// The next operation to submit now; `None` when there is none until a completion or a later time.
    fn next(&mut self, now: Nanos) -> Option<Submission>;
    /// Fills the buffer of a write about to be submitted.
    fn prepare(&self, tag: Tag, buffer: &mut [u8]);
    /// The submission came back: the target's queue is full.
    fn refused(&mut self, tag: Tag, now: Nanos);
    /// An operation ended; `data` is what a read brought.
    fn done(&mut self, tag: Tag, outcome: &Outcome, now: Nanos, data: &[u8]);
    /// No more starts.
    fn stop(&mut self, now: Nanos);
    /// Finished at once; what is outstanding is in doubt.
    fn abandon(&mut self, now: Nanos);
    fn is_finished(&self) -> bool;
    /// True from the last start to the last completion.
    fn is_draining(&self) -> bool;
    /// Time since the last completion while something is outstanding.
    fn silence(&self, now: Nanos) -> Nanos;
    /// Swaps the current window for an empty one.
    fn take_window(&mut self, empty: Sample, now: Nanos) -> Sample;
}
