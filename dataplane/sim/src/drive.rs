//! Model of a drive: what lies on its media, what only its volatile cache holds, and what a power cut leaves.
//!
//! A write that completed lies in the cache: readable at once, on the media after a flush that was *submitted later*
//! completes, or whenever the drive likes. At a power cut every 512-byte sector of an unflushed block independently
//! holds the old bytes or those of any of the writes since: that covers loss, tearing and reordering.
//! A flush that fails may forget blocks: they stay readable as if they were safe, and the next power cut takes them (a page
//! cache that calls lost pages clean), or the next reset does (a device that is attached anew).
//! A power-safe drive has no such cache. Not here: which command completes when, and which fault is injected where
//! (`shard`, `faults`); a drive does not know what its bytes mean.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use crate::rng::Rng;
use crate::stamp::{BLOCK, SECTOR, SECTORS};

pub type Page = [u8; BLOCK];

/// All sectors of a block.
pub const WHOLE: u8 = 0xff;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Writes complete into a cache that a power cut empties.
    Volatile,
    /// What completed is on the media.
    PowerSafe,
}

/// A moment in the drive's order of completed writes; a flush covers all at or before the one of its submission.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Moment(pub u64);

#[derive(Clone, Debug)]
struct Version {
    when: Moment,
    page: Rc<Page>,
    /// A failed flush marked it clean: readable until the power goes, and no later flush will save it.
    forgotten: bool,
}

/// How thoroughly a power cut empties the cache. Drawn per cut, since the extremes find different bugs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    AllLost,
    AllKept,
    PerBlock,
    PerSector,
}

#[derive(Clone, Debug)]
pub struct Drive {
    kind: Kind,
    /// What a failed flush forgot is gone as soon as the drive's user is.
    resets: bool,
    media: Vec<Option<Rc<Page>>>,
    /// Blocks that the cache holds newer than the media, oldest version first.
    cache: BTreeMap<u64, Vec<Version>>,
    now: Moment,
    /// Blocks that fail to be read until they are written again.
    latent: BTreeSet<u64>,
    /// What a block held before its last write, for writes that turn out to have been lost.
    before: BTreeMap<u64, Option<Rc<Page>>>,
}

pub fn zero_page() -> Rc<Page> {
    Rc::new([0; BLOCK])
}

impl Drive {
    pub fn new(kind: Kind, resets: bool, blocks: u64) -> Self {
        Drive {
            kind,
            resets,
            media: vec![None; blocks as usize],
            cache: BTreeMap::new(),
            now: Moment(0),
            latent: BTreeSet::new(),
            before: BTreeMap::new(),
        }
    }

    pub fn kind(&self) -> Kind {
        self.kind
    }

    pub fn blocks(&self) -> u64 {
        self.media.len() as u64
    }

    pub fn now(&self) -> Moment {
        self.now
    }

    /// What a read finds; `None` is zeros that were never written.
    pub fn look(&self, at: u64) -> Option<&Rc<Page>> {
        match self.cache.get(&at).and_then(|v| v.last()) {
            Some(version) => Some(&version.page),
            None => self.media[at as usize].as_ref(),
        }
    }

    /// The bytes that a read finds.
    pub fn bytes(&self, at: u64) -> Page {
        self.look(at).map_or([0; BLOCK], |p| **p)
    }

    pub fn is_latent(&self, at: u64) -> bool {
        self.latent.contains(&at)
    }

    /// True while the media and the cache differ in this block.
    pub fn is_cached(&self, at: u64) -> bool {
        self.cache.contains_key(&at)
    }

    pub fn cached_blocks(&self) -> usize {
        self.cache.len()
    }

    /// A write of `page` takes effect in the sectors of `mask`; the others keep what they hold.
    pub fn write(&mut self, at: u64, page: Rc<Page>, mask: u8) {
        if mask == 0 {
            return;
        }
        self.now.0 += 1;
        let old = self.look(at).cloned();
        let page = if mask == WHOLE { page } else { overlay(old.as_deref(), &page, mask) };
        self.before.insert(at, old);
        self.latent.remove(&at);
        match self.kind {
            Kind::PowerSafe => self.media[at as usize] = Some(page),
            Kind::Volatile => {
                self.cache.entry(at).or_default().push(Version { when: self.now, page, forgotten: false });
            }
        }
    }

    /// A flush that was submitted at `upto` completes well. Returns whether it had anything to save.
    pub fn flush(&mut self, upto: Moment) -> bool {
        let mut saved = false;
        let media = &mut self.media;
        self.cache.retain(|at, versions| {
            if let Some(i) = versions.iter().rposition(|v| v.when <= upto && !v.forgotten) {
                media[*at as usize] = Some(versions[i].page.clone());
                versions.drain(..=i);
                saved = true;
            }
            !versions.is_empty()
        });
        saved
    }

    /// A flush fails: of the blocks in `range`, some are saved, some stay in the cache, some are forgotten.
    /// Returns how many were forgotten.
    pub fn flush_fails(&mut self, range: std::ops::Range<u64>, rng: &mut Rng) -> u64 {
        let mut forgotten = 0;
        let blocks: Vec<u64> = self.cache.range(range).map(|(at, _)| *at).collect();
        for at in blocks {
            let versions = self.cache.get_mut(&at).expect("listed just now");
            match rng.below(3) {
                0 => {
                    let last = versions.last().expect("never empty").page.clone();
                    self.media[at as usize] = Some(last);
                    self.cache.remove(&at);
                }
                1 => {}
                _ => {
                    for v in versions.iter_mut() {
                        v.forgotten = true;
                    }
                    forgotten += 1;
                }
            }
        }
        forgotten
    }

    /// The drive's user is gone. A drive that is reset when the next one attaches loses what a failed flush forgot; one that
    /// is not goes on showing it. Returns how many blocks changed.
    pub fn released(&mut self) -> u64 {
        if !self.resets {
            return 0;
        }
        let mut lost = 0;
        self.cache.retain(|_, versions| {
            lost += u64::from(versions.last().is_some_and(|v| v.forgotten));
            versions.retain(|v| !v.forgotten);
            !versions.is_empty()
        });
        lost
    }

    /// The power goes. Returns how many blocks lost something.
    pub fn power_cut(&mut self, cut: Cut, rng: &mut Rng) -> u64 {
        let mut lost = 0;
        for (at, versions) in std::mem::take(&mut self.cache) {
            let old = self.media[at as usize].clone();
            let last = versions.last().expect("never empty").page.clone();
            let newest = versions.len();
            let draw = |rng: &mut Rng| rng.below(newest as u64 + 1) as usize;
            let kept = match cut {
                Cut::AllLost => old,
                // What a failed flush forgot is gone even from a cache that is kept.
                Cut::AllKept => versions.iter().rev().find(|v| !v.forgotten).map(|v| v.page.clone()).or(old),
                Cut::PerBlock => match draw(rng) {
                    0 => old,
                    i => Some(versions[i - 1].page.clone()),
                },
                Cut::PerSector => {
                    let mut page = old.as_deref().copied().unwrap_or([0; BLOCK]);
                    for s in 0..SECTORS {
                        if let i @ 1.. = draw(rng) {
                            let bytes = s * SECTOR..(s + 1) * SECTOR;
                            page[bytes.clone()].copy_from_slice(&versions[i - 1].page[bytes]);
                        }
                    }
                    Some(Rc::new(page))
                }
            };
            if kept.as_deref().unwrap_or(&[0; BLOCK]) != &*last {
                lost += 1;
            }
            self.media[at as usize] = kept;
        }
        lost
    }

    /// A drive like this one just after a power cut; this one stays as it is.
    pub fn after_cut(&self, cut: Cut, rng: &mut Rng) -> Drive {
        let mut twin = self.clone();
        twin.power_cut(cut, rng);
        twin
    }

    /// Replaces what the media holds, as only decay or a misdirected write does. The block must not be cached.
    pub fn corrupt(&mut self, at: u64, page: Option<Rc<Page>>) {
        assert!(!self.is_cached(at), "block {at} is cached: corrupting its media would not show");
        self.media[at as usize] = page;
    }

    pub fn set_latent(&mut self, at: u64) {
        self.latent.insert(at);
    }

    /// What the block held before it was last written, if it was written since the drive was new.
    pub fn before(&self, at: u64) -> Option<Option<Rc<Page>>> {
        self.before.get(&at).cloned()
    }

    /// All blocks of `range` that hold anything, for choosing among them.
    pub fn occupied(&self, range: std::ops::Range<u64>) -> Vec<u64> {
        range.filter(|at| self.look(*at).is_some()).collect()
    }

    /// Blocks that hold just that.
    pub fn holding(&self, page: &Page) -> Vec<u64> {
        (0..self.blocks()).filter(|at| self.look(*at).is_some_and(|found| **found == *page)).collect()
    }
}

fn overlay(old: Option<&Page>, new: &Page, mask: u8) -> Rc<Page> {
    let mut page = old.copied().unwrap_or([0; BLOCK]);
    for s in (0..SECTORS).filter(|s| mask & 1 << s != 0) {
        page[s * SECTOR..(s + 1) * SECTOR].copy_from_slice(&new[s * SECTOR..(s + 1) * SECTOR]);
    }
    Rc::new(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(b: u8) -> Rc<Page> {
        Rc::new([b; BLOCK])
    }

    fn byte(d: &Drive, at: u64) -> u8 {
        d.look(at).map_or(0, |p| p[0])
    }

    #[test]
    fn flush_saves_only_what_completed_before_its_submission() {
        let mut d = Drive::new(Kind::Volatile, false, 8);
        d.write(1, page(1), WHOLE);
        let submitted = d.now();
        d.write(2, page(2), WHOLE);
        d.write(1, page(3), WHOLE);
        assert!(d.flush(submitted));
        assert_eq!(byte(&d, 1), 3, "a read sees the cache");
        d.power_cut(Cut::AllLost, &mut Rng::new(1));
        assert_eq!((byte(&d, 1), byte(&d, 2)), (1, 0));
    }

    #[test]
    fn power_cut_tears_an_unflushed_block_at_any_sector() {
        let mut tears = BTreeSet::new();
        for seed in 0..200 {
            let mut d = Drive::new(Kind::Volatile, false, 2);
            d.write(0, page(1), WHOLE);
            d.flush(d.now());
            d.write(0, page(2), WHOLE);
            d.power_cut(Cut::PerSector, &mut Rng::new(seed));
            let p = d.look(0).expect("written");
            tears.insert((0..SECTORS).fold(0u8, |m, s| m | u8::from(p[s * SECTOR] == 2) << s));
        }
        assert!(tears.len() > 100, "only {} different tears", tears.len());
    }

    #[test]
    fn failed_flush_forgets_what_a_later_good_flush_does_not_save() {
        let mut rng = Rng::new(3);
        let mut d = Drive::new(Kind::Volatile, false, 64);
        for at in 0..64 {
            d.write(at, page(7), WHOLE);
        }
        let forgotten = d.flush_fails(0..64, &mut rng);
        assert!(forgotten > 5);
        d.flush(d.now());
        assert!((0..64).all(|at| byte(&d, at) == 7), "still readable");
        d.power_cut(Cut::AllKept, &mut rng);
        assert_eq!((0..64).filter(|at| byte(&d, *at) == 0).count() as u64, forgotten);
    }

    #[test]
    fn what_a_failed_flush_forgot_stays_readable_until_the_reset_of_a_drive_that_resets() {
        for resets in [false, true] {
            let mut rng = Rng::new(3);
            let mut d = Drive::new(Kind::Volatile, resets, 64);
            for at in 0..64 {
                d.write(at, page(7), WHOLE);
            }
            let forgotten = d.flush_fails(0..64, &mut rng);
            assert_eq!(d.released(), if resets { forgotten } else { 0 });
            assert_eq!((0..64).filter(|at| byte(&d, *at) == 0).count() as u64, if resets { forgotten } else { 0 });
        }
    }

    #[test]
    fn power_safe_drive_keeps_what_completed() {
        let mut d = Drive::new(Kind::PowerSafe, false, 2);
        d.write(0, page(5), WHOLE);
        assert_eq!(d.power_cut(Cut::AllLost, &mut Rng::new(1)), 0);
        assert_eq!(byte(&d, 0), 5);
    }

    #[test]
    fn torn_write_changes_only_its_sectors() {
        let mut d = Drive::new(Kind::PowerSafe, false, 1);
        d.write(0, page(1), WHOLE);
        d.write(0, page(2), 0b0000_0101);
        let p = d.look(0).expect("written");
        assert_eq!((0..SECTORS).map(|s| p[s * SECTOR]).collect::<Vec<_>>(), vec![2, 1, 2, 1, 1, 1, 1, 1]);
    }

    #[test]
    fn rewriting_a_block_heals_its_latent_error() {
        let mut d = Drive::new(Kind::PowerSafe, false, 1);
        d.set_latent(0);
        assert!(d.is_latent(0));
        d.write(0, page(1), WHOLE);
        assert!(!d.is_latent(0));
    }
}
