//! What the hosts may expect: every volume's blocks as registers, fed with commands and their answers.
//!
//! It judges answers (an acknowledged write is never lost, a read is some order's truth, a lost block was destroyed by an
//! injected fault) and tells what a block may hold at any moment, for those who look at a drive directly.
//! Not here: the engine, drives, or the choice of commands.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use penstock_engine::{HostOp, Span, Status};

use crate::register::{Act, Clock, Contradiction, Patch, Register};
use crate::stamp::{BLOCK, Image, Place, SECTOR, SECTORS, WriteId, ZEROS, sector_of};

/// Bytes of a command that take effect together, per block at least.
const PIECE: u64 = 255 * 4096;

/// What a payload says: per volume block that the span touches, which sectors and which writes.
pub type Pieces = Vec<(u64, Patch)>;

/// The pieces of a span, all of one write.
pub fn pieces_of(span: Span, id: WriteId) -> Pieces {
    let (first, end) = (span.offset / SECTOR as u64, (span.offset + span.len) / SECTOR as u64);
    let mut pieces: Pieces = Vec::new();
    let mut at = first;
    while at < end {
        let block = at / SECTORS as u64;
        let stop = end.min((block + 1) * SECTORS as u64);
        let mask = (at..stop).fold(0u8, |m, s| m | 1 << (s % SECTORS as u64));
        let image = std::array::from_fn(|s| if mask & 1 << s != 0 { id } else { 0 });
        pieces.push((block, Patch { mask, image }));
        at = stop;
    }
    pieces
}

/// A command as the host means it.
#[derive(Clone, Debug)]
pub struct Command {
    pub serial: u64,
    pub volume: u32,
    pub op: HostOp,
    /// The write that its payload carries; 0 for none.
    pub id: WriteId,
    /// The write that a meddling guest puts there instead.
    pub other: Option<WriteId>,
    /// For compare-and-write: what the host expects.
    pub expect: Pieces,
}

#[derive(Default)]
struct Volume {
    blocks: BTreeMap<u64, Register>,
    size_blocks: u64,
    /// Every write that was ever sent, so that a stamp from nowhere is known as such at once.
    writes: BTreeSet<WriteId>,
    /// Volumes whose stamps may be seen here: its own, and what it was taken of.
    kin: BTreeSet<u32>,
    /// Snapshots of it that are on their way.
    snapshots: Vec<u32>,
}

impl Volume {
    /// The blocks that a command touches, which began there.
    fn touched_by(&mut self, span: Span) -> impl Iterator<Item = (u64, &mut Register)> {
        let blocks = span.offset / BLOCK as u64..(span.offset + span.len).div_ceil(BLOCK as u64);
        let mut registers = self.blocks.range_mut(blocks.clone());
        blocks.map(move |block| {
            let (_, register) = registers.next().filter(|(at, _)| **at == block).expect("answered, so begun");
            (block, register)
        })
    }
}

/// What is wrong, in words.
pub type Wrong = String;

#[derive(Default)]
pub struct Oracle {
    volumes: BTreeMap<u32, Volume>,
    now: u64,
    /// Stores' volumes whose metadata an injected fault hit: any block of theirs may be reported lost.
    clouded: BTreeSet<u32>,
    pub answers_judged: u64,
    pub reads_judged: u64,
    pub lost_accepted: u64,
}

impl Oracle {
    pub fn add_volume(&mut self, volume: u32, size_blocks: u64) {
        let fresh = self.volumes.insert(volume, Volume { size_blocks, kin: [volume].into(), ..Volume::default() }).is_none();
        assert!(fresh, "volume {volume} exists");
    }

    /// From now on until [`Self::end_snapshot`] the volume is kept, as another: what is done meanwhile may be in it.
    pub fn begin_snapshot(&mut self, volume: u32, snapshot: u32) {
        let v = self.volumes.get_mut(&volume).expect("known");
        v.snapshots.push(snapshot);
        let (blocks, writes, kin) = (v.blocks.clone(), v.writes.clone(), v.kin.clone());
        let kept = Volume { blocks, size_blocks: v.size_blocks, writes, kin, snapshots: Vec::new() };
        assert!(self.volumes.insert(snapshot, kept).is_none(), "volume {snapshot} exists");
        if self.clouded.contains(&volume) {
            self.clouded.insert(snapshot);
        }
    }

    pub fn end_snapshot(&mut self, snapshot: u32) -> Result<(), Wrong> {
        let now = self.tick();
        self.volumes.values_mut().for_each(|v| v.snapshots.retain(|no| *no != snapshot));
        let v = self.volumes.get_mut(&snapshot).expect("begun");
        v.blocks.iter_mut().try_for_each(|(block, r)| r.cut_off(now).map_err(|c| at(snapshot, *block, c)))
    }

    /// A volume that begins as a snapshot is, and is at least as large.
    pub fn add_clone(&mut self, snapshot: u32, clone: u32, size_blocks: u64) -> Result<(), Wrong> {
        self.begin_snapshot(snapshot, clone);
        self.end_snapshot(clone)?;
        let v = self.volumes.get_mut(&clone).expect("begun");
        v.kin.insert(clone);
        v.size_blocks = size_blocks;
        Ok(())
    }

    /// The volume is gone, and nothing of it may be seen anywhere.
    pub fn drop_volume(&mut self, volume: u32) {
        self.volumes.remove(&volume);
        self.volumes.values_mut().for_each(|v| v.snapshots.retain(|no| *no != volume));
    }

    pub fn size_blocks(&self, volume: u32) -> u64 {
        self.volumes[&volume].size_blocks
    }

    /// The volume has another size; what a shrink cut off is zeros from now on.
    pub fn resize(&mut self, volume: u32, size_blocks: u64) {
        let kept = self.volumes.get(&volume).expect("known").snapshots.clone();
        kept.into_iter().for_each(|no| self.resize(no, size_blocks.max(self.size_blocks(no))));
        let v = self.volumes.get_mut(&volume).expect("known");
        v.size_blocks = size_blocks;
        for (_, register) in v.blocks.range_mut(size_blocks..) {
            assert_eq!(register.open_commands(), 0, "a volume is shrunk at rest");
            *register = Register::default();
        }
    }

    /// Any block of the volume may be reported lost from now on.
    pub fn cloud(&mut self, volume: u32) {
        let kept = self.volumes.iter().filter(|(_, v)| v.kin.contains(&volume)).map(|(no, _)| *no);
        self.clouded.extend(kept.chain([volume]));
    }

    /// For looks at a copy: the cloud was over the copy alone.
    pub fn uncloud(&mut self, volume: u32) {
        let kept: Vec<u32> = self.volumes.iter().filter(|(_, v)| v.kin.contains(&volume)).map(|(no, _)| *no).collect();
        self.clouded.retain(|no| *no != volume && !kept.contains(no));
    }

    pub fn is_clouded(&self, volume: u32) -> bool {
        self.clouded.contains(&volume)
    }

    /// An injected fault destroyed a copy of this image.
    pub fn destroy(&mut self, place: Place, image: Image) {
        for v in self.volumes.values_mut().filter(|v| v.kin.contains(&place.volume)) {
            v.blocks.entry(place.block).or_default().destroy(image);
        }
    }

    /// Whether the block may be reported lost.
    pub fn may_be_lost(&self, volume: u32, block: u64) -> bool {
        self.clouded.contains(&volume) || self.volumes.get(&volume).and_then(|v| v.blocks.get(&block)).is_some_and(Register::has_destroyed)
    }

    /// Volumes whose stamps a volume's blocks may show.
    pub fn kin(&self, volume: u32) -> &BTreeSet<u32> {
        &self.volumes[&volume].kin
    }

    /// Blocks that commands have touched.
    pub fn touched(&self, volume: u32) -> Vec<u64> {
        self.volumes.get(&volume).map_or(Vec::new(), |v| v.blocks.keys().copied().collect())
    }

    /// Whether a command may join the histories of all these blocks.
    pub fn has_room(&self, volume: u32, span: Span) -> bool {
        let v = &self.volumes[&volume];
        let (first, last) = (span.offset / BLOCK as u64, (span.offset + span.len).div_ceil(BLOCK as u64));
        let kept = v.snapshots.iter().map(|no| &self.volumes[no]);
        kept.chain([v]).all(|v| v.blocks.range(first..last).all(|(_, r)| r.has_room()))
    }

    /// What the block may hold if the node died now.
    pub fn possible(&self, volume: u32, block: u64) -> Result<Cow<'_, [Image]>, Wrong> {
        match self.volumes.get(&volume).and_then(|v| v.blocks.get(&block)) {
            Some(r) => r.possible().map_err(|c| at(volume, block, c)),
            None => Ok(Cow::Borrowed(&[ZEROS])),
        }
    }

    fn tick(&mut self) -> Clock {
        self.now += 1;
        Clock(self.now)
    }

    pub fn begin(&mut self, c: &Command) {
        let now = self.tick();
        for no in self.also(c) {
            let v = self.volumes.get_mut(&no).expect("known");
            v.writes.extend([c.id].into_iter().chain(c.other).filter(|id| *id != 0));
            let Some(span) = c.op.span() else { return };
            assert!(span.offset + span.len <= v.size_blocks * BLOCK as u64, "bad spans are not for the oracle");
            for (block, act) in acts_of(c, span) {
                v.blocks.entry(block).or_default().begin(c.serial, now, act);
            }
        }
    }

    /// The volume of a command, and the snapshots that it may get into.
    fn also(&self, c: &Command) -> Vec<u32> {
        let v = &self.volumes[&c.volume];
        [c.volume].into_iter().chain(v.snapshots.iter().copied()).collect()
    }

    /// Of a snapshot that is on its way a command's answer tells nothing: it may be in it.
    fn answered_meanwhile(&mut self, c: &Command, span: Span, status: Status, now: Clock) -> Result<(), Wrong> {
        for no in self.volumes[&c.volume].snapshots.clone() {
            let v = self.volumes.get_mut(&no).expect("on its way");
            for (block, r) in v.touched_by(span) {
                let judged = if c.op.reads() {
                    r.withdrawn(c.serial)
                } else if status == Status::Fenced {
                    r.haunting(c.serial)
                } else {
                    r.uncertain(c.serial, now)
                };
                judged.map_err(|why| at(no, block, why))?;
            }
        }
        Ok(())
    }

    /// A command that began was answered. `payload` is what a read filled.
    /// `fenced_before` says that the store was already known to be fenced when the command was sent, `unproven` that it was
    /// opened so: what nothing proves durable then reads as lost.
    pub fn answered(&mut self, c: &Command, status: Status, payload: &[u8], fenced_before: bool, unproven: bool) -> Result<(), Wrong> {
        let now = self.tick();
        self.answers_judged += 1;
        let clouded = unproven || self.clouded.contains(&c.volume);
        // The volume may have been deleted under its commands.
        if !self.volumes.contains_key(&c.volume) {
            return Ok(());
        }
        let Some(span) = c.op.span() else {
            return if matches!(status, Status::Ok | Status::NotReady | Status::Fenced) {
                Ok(())
            } else {
                Err(format!("{c:?} was answered {status:?}"))
            };
        };
        self.answered_meanwhile(c, span, status, now)?;
        let v = self.volumes.get_mut(&c.volume).expect("known");
        if status == Status::Unrecovered {
            if !clouded && !v.touched_by(span).any(|(_, r)| r.has_destroyed()) {
                return Err(format!("{c:?} was answered Unrecovered, and no fault destroyed anything there"));
            }
            self.lost_accepted += 1;
        }
        let seen = match (&c.op, status) {
            (HostOp::Read(_) | HostOp::ReadSnapshot(..), Status::Ok) => {
                self.reads_judged += 1;
                self.seen(c.volume, span, payload)?
            }
            _ => Vec::new(),
        };
        let differs = match status {
            Status::Miscompare { at } => {
                Some(((span.offset + u64::from(at)) / BLOCK as u64, ((span.offset + u64::from(at)) % BLOCK as u64) as usize / SECTOR))
            }
            _ => None,
        };
        let v = self.volumes.get_mut(&c.volume).expect("known");
        let lone = (span.offset % BLOCK as u64) + span.len <= BLOCK as u64;
        for (i, (block, r)) in v.touched_by(span).enumerate() {
            let judged = match (&c.op, status) {
                (HostOp::Read(_) | HostOp::ReadSnapshot(..), Status::Ok) => r.answered(c.serial, now, Some(Act::See(seen[i].1))),
                (HostOp::Write(_) | HostOp::Zero(_) | HostOp::CompareWrite(_), Status::Ok) => r.answered(c.serial, now, None),
                (HostOp::CompareWrite(_), Status::Miscompare { .. }) => {
                    let (bad_block, first) = differs.expect("a miscompare");
                    let expect = c.expect[i].1;
                    match block.cmp(&bad_block) {
                        std::cmp::Ordering::Less => r.answered(c.serial, now, Some(Act::See(expect))),
                        std::cmp::Ordering::Equal => r.answered(c.serial, now, Some(Act::Differ { expect: Box::new(expect), first })),
                        std::cmp::Ordering::Greater => r.withdrawn(c.serial),
                    }
                }
                (HostOp::Flush, Status::Unrecovered) => return Err(format!("{c:?} was answered {status:?}")),
                (_, Status::Unrecovered) if lone && !clouded => r.answered(c.serial, now, Some(Act::SeeLost)),
                (HostOp::Read(_) | HostOp::ReadSnapshot(..), Status::Unrecovered | Status::NotReady | Status::Fenced) => {
                    r.withdrawn(c.serial)
                }
                (_, Status::Unrecovered) => r.uncertain(c.serial, now),
                // A command above 1 MiB goes piece by piece: some of it may be there.
                (_, Status::NoSpace | Status::NotReady) if span.len > PIECE || matches!(c.op, HostOp::Zero(_)) => {
                    r.uncertain(c.serial, now)
                }
                (_, Status::NoSpace | Status::NotReady) => r.withdrawn(c.serial),
                (_, Status::Fenced) if fenced_before => r.withdrawn(c.serial),
                (_, Status::Fenced) => r.haunting(c.serial),
                _ => return Err(format!("{c:?} was answered {status:?}")),
            };
            judged.map_err(|why| at(c.volume, block, why))?;
        }
        Ok(())
    }

    /// The node died: no open command will be answered.
    pub fn crashed(&mut self) -> Result<(), Wrong> {
        let now = self.tick();
        for (no, v) in &mut self.volumes {
            for (block, r) in &mut v.blocks {
                r.crashed(now).map_err(|c| at(*no, *block, c))?;
            }
        }
        Ok(())
    }

    /// The node of one volume died.
    pub fn crashed_volume(&mut self, volume: u32) -> Result<(), Wrong> {
        let now = self.tick();
        let Some(v) = self.volumes.get_mut(&volume) else { return Ok(()) };
        v.blocks.iter_mut().try_for_each(|(block, r)| r.crashed(now).map_err(|c| at(volume, *block, c)))
    }

    /// Nobody will ever answer the command, or what it was answered tells nothing: it may have taken effect by now, and will not later.
    pub fn lapsed(&mut self, c: &Command) -> Result<(), Wrong> {
        let now = self.tick();
        self.end(c, |r| r.uncertain(c.serial, now))
    }

    /// The command changed nothing, or saw nothing that anyone heard of.
    pub fn withdrawn(&mut self, c: &Command) -> Result<(), Wrong> {
        self.end(c, |r| r.withdrawn(c.serial))
    }

    /// A command is over, for its volume and for the snapshots of it that are on their way.
    fn end(&mut self, c: &Command, mut end: impl FnMut(&mut Register) -> Result<(), Contradiction>) -> Result<(), Wrong> {
        let Some(span) = c.op.span().filter(|_| self.volumes.contains_key(&c.volume)) else { return Ok(()) };
        for no in self.also(c) {
            for (block, r) in self.volumes.get_mut(&no).expect("known").touched_by(span) {
                end(r).map_err(|why| at(no, block, why))?;
            }
        }
        Ok(())
    }

    /// Reads what a host was given: every sector must be whole, of this place, and of a write that was sent.
    fn seen(&self, volume: u32, span: Span, payload: &[u8]) -> Result<Pieces, Wrong> {
        let mut pieces = pieces_of(span, 0);
        let v = &self.volumes[&volume];
        let mut bytes = payload.chunks_exact(SECTOR);
        for (block, patch) in &mut pieces {
            for s in (0..SECTORS).filter(|s| patch.mask & 1 << s != 0) {
                let here = Place { volume, block: *block };
                let sector = bytes.next().ok_or("a payload shorter than its span")?;
                let (id, told) = sector_of(sector)
                    .ok_or_else(|| format!("{here:?} sector {s}: what was read is no host's data: {:02x?}", &sector[..32]))?;
                let of = |place: Place| Place { volume: if v.kin.contains(&place.volume) { volume } else { place.volume }, ..place };
                if told.is_some_and(|(place, sector)| (of(place), sector) != (here, s)) {
                    return Err(format!("{here:?} sector {s}: what was read belongs to {told:?}, write {id}"));
                }
                if id != 0 && !v.writes.contains(&id) {
                    return Err(format!("{here:?} sector {s}: write {id} was never sent"));
                }
                patch.image[s] = id;
            }
        }
        Ok(pieces)
    }
}

fn at(volume: u32, block: u64, why: Contradiction) -> Wrong {
    format!("volume {volume} block {block}: {}", why.0)
}

/// What a command does to each block of its span.
fn acts_of(c: &Command, span: Span) -> Vec<(u64, Act)> {
    match c.op {
        HostOp::Read(_) | HostOp::ReadSnapshot(..) => pieces_of(span, 0).into_iter().map(|(b, _)| (b, Act::Look)).collect(),
        HostOp::CompareWrite(_) => {
            let swap =
                |((b, expect), (_, put)): (&(u64, Patch), (u64, Patch))| (*b, Act::Swap { expect: Box::new(*expect), put: Box::new(put) });
            c.expect.iter().zip(pieces_of(span, c.id)).map(swap).collect()
        }
        _ => {
            let mut acts: Vec<(u64, Act)> = pieces_of(span, c.id).into_iter().map(|(b, p)| (b, Act::Put(vec![p]))).collect();
            let others = c.other.iter().flat_map(|other| pieces_of(span, *other));
            for ((_, act), (_, p)) in acts.iter_mut().zip(others) {
                if let Act::Put(puts) = act {
                    puts.push(p);
                }
            }
            acts
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stamp::fill;

    fn write(serial: u64, span: Span, id: WriteId) -> Command {
        Command { serial, volume: 1, op: HostOp::Write(span), id, other: None, expect: Vec::new() }
    }

    fn read(serial: u64, span: Span) -> Command {
        Command { op: HostOp::Read(span), id: 0, ..write(serial, span, 0) }
    }

    fn bytes(span: Span, id: WriteId) -> Vec<u8> {
        let mut out = vec![0; span.len as usize];
        for (i, sector) in out.chunks_exact_mut(SECTOR).enumerate() {
            let s = span.offset / SECTOR as u64 + i as u64;
            fill(sector, id, Place { volume: 1, block: s / 8 }, (s % 8) as usize);
        }
        out
    }

    #[test]
    fn pieces_of_a_span_cover_just_its_sectors() {
        let p = pieces_of(Span { offset: 3 * 512, len: 6 * 512 }, 9);
        assert_eq!(p.iter().map(|(b, p)| (*b, p.mask)).collect::<Vec<_>>(), vec![(0, 0b1111_1000), (1, 0b0000_0001)]);
    }

    #[test]
    fn acknowledged_write_that_a_crash_loses_is_caught() {
        let span = Span { offset: 4096, len: 8192 };
        let mut o = Oracle::default();
        o.add_volume(1, 16);
        o.begin(&write(1, span, 5));
        o.answered(&write(1, span, 5), Status::Ok, &[], false, false).expect("fine");
        o.crashed().expect("fine");
        o.begin(&read(2, span));
        o.answered(&read(2, span), Status::Ok, &bytes(span, 5), false, false).expect("it is there");
        o.begin(&read(3, span));
        let wrong = o.answered(&read(3, span), Status::Ok, &bytes(span, 0), false, false).expect_err("it is gone");
        assert!(wrong.contains("no order explains"), "{wrong}");
    }

    #[test]
    fn data_of_another_place_is_caught() {
        let span = Span { offset: 4096, len: 4096 };
        let mut o = Oracle::default();
        o.add_volume(1, 16);
        o.begin(&read(1, span));
        let wrong = o.answered(&read(1, span), Status::Ok, &bytes(Span { offset: 0, len: 4096 }, 5), false, false).expect_err("not ours");
        assert!(wrong.contains("belongs to"), "{wrong}");
    }

    #[test]
    fn unrecovered_without_a_fault_is_caught() {
        let span = Span { offset: 0, len: 4096 };
        let mut o = Oracle::default();
        o.add_volume(1, 16);
        o.begin(&read(1, span));
        assert!(o.answered(&read(1, span), Status::Unrecovered, &[], false, false).is_err());
    }
}
