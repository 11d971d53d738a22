//! Mending: an extent that most have otherwise is copied anew from one of them, as a member that is rebuilt copies it: through the own log, as of what the
//! source had applied, over nothing that is newer.
//!
//! Unlike a rebuild's, the copy goes to a member that may serve: it is taken in only once as much is applied here, so that nothing turns back. What cannot
//! be mended now, since its layer is being merged or there is no space, is found again by the next scrub.

use crate::map::LayerKey;
use crate::port::*;
use crate::rebuild::{Why, is_sound};
use crate::store::Store;
use penstock_wire::Index;
use penstock_wire::batch::CopyOp;
use penstock_wire::peer::{Copied, CopyAnswer, CopyAsk, MemberNo};

/// Extents that are to be mended at most: more are found again.
const MENDS_MAX: usize = 256;
/// Without an answer for this long another is asked.
const AGAIN_MS: u64 = 500;
/// After an answer that brought nothing, or that there was no room for.
const REST_MS: u64 = 100;
/// Each source is asked twice: the first ask that comes to it in its life it answers with nothing.
const TRIES: usize = 24;

/// An extent that is to be copied anew.
#[derive(Debug)]
pub(super) struct Mend {
    layer: LayerKey,
    extent: u32,
    /// Who has what most have.
    from: Vec<MemberNo>,
    tries: usize,
    rest: Millis,
    ask: Option<Out>,
    /// What came, and as of which entry.
    came: Option<(CopyOp, Index, Option<BufId>)>,
}

/// The ask that is out.
#[derive(Clone, Copy, Debug)]
struct Out {
    id: u64,
    to: MemberNo,
    end: Millis,
    /// What was applied here. A source that has not may leave to a snapshot's layer beneath what was merged here when that was removed.
    applied: Index,
}

impl Store {
    /// False: it is under way, or too many are.
    pub(super) fn begin_mend(&mut self, layer: LayerKey, extent: u32, from: Vec<MemberNo>) -> bool {
        let mends = &mut self.groups.compare.mends;
        if mends.len() >= MENDS_MAX || mends.iter().any(|mend| (mend.layer, mend.extent) == (layer, extent)) {
            return false;
        }
        mends.push(Mend { layer, extent, from, tries: 0, rest: self.now, ask: None, came: None });
        true
    }

    pub(super) fn settle_mends(&mut self, fx: &mut Effects) {
        // A source answers the newest ask of a member alone.
        let mends = std::mem::take(&mut self.groups.compare.mends);
        let mut asking: Vec<ReplicaNo> = mends.iter().filter(|mend| mend.ask.is_some()).map(|mend| mend.layer.replica).collect();
        for mut mend in mends {
            if self.mend_on(&mut mend, &mut asking, fx).is_some() {
                self.groups.compare.mends.push(mend);
            } else if let Some((_, _, Some(buf))) = mend.came {
                self.groups.release(buf);
            }
        }
    }

    /// `None`: it is over.
    fn mend_on(&mut self, mend: &mut Mend, asking: &mut Vec<ReplicaNo>, fx: &mut Effects) -> Option<()> {
        let (no, now) = (mend.layer.replica, self.now);
        // What is to be merged into the layer would show through what the copy leaves to the layer beneath.
        let is_one = self.told_to(mend.layer).is_some() && self.map.fold(mend.layer).count() == 1;
        if self.stage != crate::config::Stage::Serving || !self.may_feed(no) || !is_one || mend.tries >= TRIES {
            return None;
        }
        if mend.ask.is_some_and(|out| now >= out.end) {
            (mend.ask, mend.tries) = (None, (mend.tries / 2 + 1) * 2);
        }
        if mend.ask.is_some() || now < mend.rest {
            return Some(());
        }
        if let Some((op, applied, buf)) = &mend.came {
            if self.map.get(no)?.applied < *applied {
                return Some(());
            }
            if self.queue_copy(no, op.clone(), *applied, *buf, Why::Mend).is_ok() {
                return None;
            }
            (mend.rest, mend.tries) = (Millis(now.0 + REST_MS), mend.tries + 1);
            return Some(());
        }
        if asking.contains(&no) {
            return Some(());
        }
        let replica = self.map.get(no)?;
        let (segment, applied) = (replica.shape.segment, replica.applied);
        let (me, to) = (self.member(no)?.me, *mend.from.get(mend.tries / 2 % mend.from.len().max(1))?);
        let (id, first) = (self.number_word(), u64::from(mend.extent));
        let layer = mend.layer.layer.0;
        // What a clone stands on may be what is wrong: then its own layer has it from here on.
        let ask =
            CopyAsk { id, segment, from: me, to, layer, stands: false, first, until: first + 1, room: 1, changed: vec![CopyAsk::ANY] };
        mend.ask = Some(Out { id, to, end: Millis(now.0 + AGAIN_MS), applied });
        asking.push(no);
        self.send_word(no, to, PeerWord::CopyAsk(ask), fx);
        Some(())
    }

    /// An answer to a member that is not being rebuilt.
    pub(crate) fn on_mend_answer<M: Memory>(&mut self, no: ReplicaNo, answer: CopyAnswer, payload: Option<BufId>, mem: &M) -> Option<()> {
        let now = self.now;
        let is_out = |out: Out| (out.id, out.to) == (answer.id, answer.from);
        let mut mends = self.groups.compare.mends.iter_mut();
        let mend = mends.find(|mend| mend.layer.replica == no && mend.ask.is_some_and(is_out))?;
        let is_old = mend.ask.is_some_and(|out| answer.applied < out.applied);
        is_sound(&answer, payload, mem).then_some(())?;
        match answer.copied {
            Copied::Extent { extent, changed, states, crcs } if extent == u64::from(mend.extent) && !is_old => {
                let layer = mend.layer.layer.0;
                let buf = payload.filter(|_| !crcs.is_empty());
                mend.came = Some((CopyOp { layer, extent: mend.extent, changed, states, mask: u16::MAX, crcs }, answer.applied, buf));
                mend.ask = None;
                buf.into_iter().for_each(|buf| self.groups.hold(buf));
            }
            Copied::Extent { .. } => {}
            Copied::Done { .. } => {
                (mend.ask, mend.tries) = (None, mend.tries + 1);
                mend.rest = Millis(now.0 + if mend.tries % 2 == 0 { REST_MS } else { 0 });
            }
        }
        Some(())
    }
}
