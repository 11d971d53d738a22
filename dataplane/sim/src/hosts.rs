//! The hosts: which commands they send to which volume, and what they make of the answers.
//!
//! A volume has one host with a queue depth. Most commands go to a few hot blocks, so that they meet. Not here: orders of
//! the control side (`orders`), and judgement of contents (`oracle`).

use penstock_engine::{Event, FenceReason, HostOp, IoId, ReplicaNo, Span, Status};
use penstock_wire::{HostId, ReplicaShape};

use crate::content::{bytes_of, payload_of};
use crate::oracle::{Command, Pieces, pieces_of};
use crate::orders::Pending;
use crate::plan::Load;
use crate::register::Patch;
use crate::snapshots::layer_in;
use crate::stamp::{BLOCK, SECTOR, ZEROS};
use crate::world::{Coming, Standing, World};

/// A volume, with its host.
pub struct Volume {
    pub no: u32,
    pub shard: usize,
    pub shape: ReplicaShape,
    /// Its number in this life of the store, once told.
    pub replica: Option<ReplicaNo>,
    /// Its number as last told, in this life or before: numbers are not given twice.
    pub number: Option<ReplicaNo>,
    /// The store has acknowledged its creation.
    pub created: bool,
    pub pending: Option<Pending>,
    /// It is to go, or gone.
    pub doomed: bool,
    pub out: u32,
    /// Of a clone: the snapshot that it stands on, as the oracle's volume.
    pub origin: Option<u32>,
    hot: Vec<u64>,
    /// Next block that a filling host writes.
    cursor: u64,
}

impl Volume {
    pub fn new(no: u32, shard: usize, shape: ReplicaShape, hot: Vec<u64>) -> Volume {
        Volume {
            no,
            shard,
            shape,
            replica: None,
            number: None,
            created: false,
            pending: None,
            doomed: false,
            out: 0,
            origin: None,
            hot,
            cursor: 0,
        }
    }

    pub fn node_died(&mut self) {
        self.replica = None;
        self.out = 0;
    }

    pub fn bytes(&self) -> u64 {
        self.shape.blocks * BLOCK as u64
    }
}

impl World {
    /// Whether an answer or an order is still awaited from a store that may give it.
    pub fn hosts_wait(&self) -> bool {
        !self.alive || self.shards.iter().any(|s| !matches!(s.standing, Standing::Failed(_)) && (!s.ios.is_empty() || !s.orders.is_empty()))
    }

    /// A host gets its turn: sends some commands, or waits.
    pub fn think(&mut self, volume: u32) {
        if self.commands_left == 0 {
            return;
        }
        let Some(v) = self.volumes.get(&volume) else { return };
        let (shard, out) = (v.shard, v.out);
        if matches!(self.shards[shard].standing, Standing::Failed(_)) && self.alive {
            // Its commands would be refused for ever.
            self.commands_left -= self.commands_left.min(5);
            self.after(5_000, Coming::Think { volume });
            return;
        }
        if v.doomed && v.pending.is_none() && !v.created {
            return;
        }
        if self.alive {
            self.order_something(volume);
        }
        self.retry_orders(volume);
        let Some(pending) = self.volumes.get(&volume).map(|v| v.pending) else { return };
        let goes_on = self.may_go_on(pending);
        let v = &self.volumes[&volume];
        if !self.alive || !goes_on || !v.created || v.doomed {
            // A fence that nobody clears yet holds orders up for as long.
            if self.shards[shard].fence.is_some() {
                self.commands_left -= 1;
            }
            self.after(2_000, Coming::Think { volume });
            return;
        }
        let h = &self.plan.host;
        let burst = self.rng.within(1, 6).min(u64::from(h.queue_depth.saturating_sub(out)));
        for _ in 0..burst.min(self.commands_left) {
            self.send_one(volume);
        }
        let (_, hi) = self.plan.drives[self.shards[shard].drive].latency_us;
        let pause = if self.rng.below(self.plan.host.pause_one_in) == 0 {
            self.rng.within(20_000, 150_000)
        } else if self.rng.one_in(2) {
            self.rng.below(hi)
        } else {
            self.rng.below(hi * 8)
        };
        self.after(pause, Coming::Think { volume });
    }

    fn send_one(&mut self, volume: u32) {
        self.commands_left -= 1;
        if self.plan.host.snapshot_one_in > 0
            && self.rng.one_in(6)
            && let Some((no, op)) = self.read_of_snapshot(volume)
        {
            self.send(no, op, false);
            return;
        }
        let Some((op, bad)) = self.choose(volume) else { return };
        self.send(volume, op, bad);
    }

    /// Sends a command. `bad` ones must be refused and are not told to the oracle.
    pub fn send(&mut self, volume: u32, op: HostOp, bad: bool) {
        let of = self.snapshots.get(&volume).map_or(volume, |snapshot| snapshot.of);
        let v = &self.volumes[&of];
        let shard = v.shard;
        let replica = v.number.expect("a volume that was created was told");
        let serial = self.next_serial;
        self.next_serial += 1;
        let writes = matches!(op, HostOp::Write(_) | HostOp::CompareWrite(_));
        let mut command = Command { serial, volume, op, id: 0, other: None, expect: Vec::new() };
        if writes {
            command.id = self.next_write;
            self.next_write += 2;
        }
        let direct = !self.rng.percent(self.plan.host.guest_percent);
        let meddles = !direct && self.rng.percent(self.plan.host.meddle_percent);
        let mut other = None;
        let payload = match op {
            _ if bad => vec![0; 2 * BLOCK],
            HostOp::Read(span) | HostOp::ReadSnapshot(_, span) => vec![0xcd; span.len as usize],
            HostOp::Write(span) => {
                if meddles {
                    command.other = Some(command.id + 1);
                    other = Some(payload_of(volume, span, command.id + 1));
                }
                payload_of(volume, span, command.id)
            }
            HostOp::CompareWrite(span) => {
                command.expect = self.guess(volume, span);
                let mut both = bytes_of(volume, &command.expect);
                both.extend(payload_of(volume, span, command.id));
                both
            }
            HostOp::Zero(_) | HostOp::Flush | HostOp::Reserve(_) => Vec::new(),
        };
        let s = &mut self.shards[shard];
        let io = s.free_ios.pop().unwrap_or_else(|| {
            s.io_count += 1;
            s.io_count - 1
        });
        s.mem.put(IoId(io), payload, direct, other);
        if bad {
            self.tally.fault("bad span from a host (28)");
        } else {
            self.oracle.begin(&command);
        }
        s.ios.insert(io, command);
        if bad {
            self.bad_serials.insert(serial);
        }
        self.volumes.get_mut(&of).expect("there").out += 1;
        self.tally.did("host commands", 1);
        self.feed(shard, Event::Host { io: IoId(io), replica, host: HostId::default(), op });
    }

    /// What a host expects to find: mostly one of the values that may be there.
    fn guess(&mut self, volume: u32, span: Span) -> Pieces {
        let mut pieces = pieces_of(span, 0);
        for (block, patch) in &mut pieces {
            let all = self.oracle.possible(volume, *block).unwrap_or_else(|wrong| panic!("{wrong}"));
            let image = self.rng.pick(&all);
            *patch = Patch { mask: patch.mask, image: Patch { image, ..*patch }.over(&ZEROS) };
            if self.rng.percent(15) {
                let s = patch.mask.trailing_zeros() as usize;
                patch.image[s] = if patch.image[s] == 0 { self.next_write + 1_000_000_000 } else { 0 };
            }
        }
        pieces
    }

    fn choose(&mut self, volume: u32) -> Option<(HostOp, bool)> {
        let h = self.plan.host.clone();
        let v = &self.volumes[&volume];
        let (total, unit) = (v.shape.blocks, u64::from(v.shape.logical_block));
        if self.rng.percent(h.bad_percent) {
            return Some((self.bad_op(volume), true));
        }
        if self.rng.percent(h.flush_percent) {
            return Some((HostOp::Flush, false));
        }
        let v = &self.volumes[&volume];
        let hot = self.rng.pick(&v.hot).min(total - 1);
        let blocks = if self.rng.percent(h.big_percent) {
            self.rng.within(64, 1100)
        } else if self.rng.percent(h.multi_percent) {
            self.rng.within(2, 24)
        } else {
            1
        };
        let mut first = if self.rng.percent(85) { hot } else { self.rng.below(total) };
        if matches!(h.load, Load::Fill | Load::Flood) && blocks > 1 && self.rng.percent(70) {
            first = v.cursor % total;
            self.volumes.get_mut(&volume).expect("there").cursor += blocks;
        }
        let blocks = blocks.min(total - first);
        let mut span = Span { offset: first * BLOCK as u64, len: blocks * BLOCK as u64 };
        if unit < BLOCK as u64 && self.rng.percent(h.sub_block_percent) {
            let cut = self.rng.below(8) * SECTOR as u64;
            span.offset += cut;
            span.len -= cut;
            let tail = self.rng.below((span.len / SECTOR as u64).min(8)) * SECTOR as u64;
            span.len -= tail;
        }
        if !self.oracle.has_room(volume, span) {
            return None;
        }
        let roll = self.rng.below(100) as u32;
        let is_clone = self.volumes.get(&volume).is_some_and(|v| v.origin.is_some());
        let op = if roll < h.read_percent {
            HostOp::Read(span)
        } else if roll < h.read_percent + h.zero_percent {
            HostOp::Zero(span)
        // What a host expects is stamped as its own volume's, and what a clone began with is not.
        } else if roll < h.read_percent + h.zero_percent + h.compare_percent && span.len <= 2 * BLOCK as u64 && !is_clone {
            HostOp::CompareWrite(span)
        } else {
            HostOp::Write(span)
        };
        Some((op, false))
    }

    fn bad_op(&mut self, volume: u32) -> HostOp {
        let v = &self.volumes[&volume];
        let (end, block) = (v.bytes(), BLOCK as u64);
        let span = match self.rng.below(6) {
            0 => Span { offset: end, len: block },
            1 => Span { offset: end - block, len: 2 * block },
            2 => Span { offset: u64::MAX - 511, len: block },
            3 => Span { offset: u64::MAX / 512 * 512, len: u64::MAX / 512 * 512 },
            4 => Span { offset: 100, len: block },
            _ => Span { offset: 0, len: block + 1 },
        };
        match self.rng.below(4) {
            0 => HostOp::Read(span),
            1 => HostOp::Write(span),
            2 => HostOp::Zero(span),
            _ => HostOp::CompareWrite(span),
        }
    }

    /// The store answered a command.
    pub fn replied(&mut self, shard: usize, io: IoId, status: Status) {
        let s = &mut self.shards[shard];
        let command = s.ios.remove(&io.0).unwrap_or_else(|| panic!("shard {shard} answers {io:?}, which is not out"));
        let payload = s.mem.take(io);
        s.free_ios.push(io.0);
        let of = self.snapshots.get(&command.volume).map_or(command.volume, |snapshot| snapshot.of);
        if let Some(v) = self.volumes.get_mut(&of) {
            v.out = v.out.saturating_sub(1);
        }
        if self.bad_serials.remove(&command.serial) {
            assert!(
                matches!(status, Status::OutOfRange | Status::Invalid | Status::NotReady | Status::Fenced),
                "{:?} leaves its volume or its alignment and was answered {status:?}",
                command.op
            );
            self.tally.check("bad spans refused");
            return;
        }
        self.check_status(shard, &command, status);
        let fenced_before = self.shards[shard].fenced_at.is_some_and(|at| command.serial >= at);
        if let Err(wrong) = self.oracle.answered(&command, status, &payload, fenced_before, self.shards[shard].opened_fenced) {
            panic!("shard {shard}, command {} {:?} answered {status:?}: {wrong}", command.serial, command.op);
        }
        self.tally.check("answers against the oracle (1, 2, 3, 4, 14, 19)");
        if status == Status::Ok
            && matches!(command.op, HostOp::Write(_) | HostOp::Zero(_) | HostOp::CompareWrite(_))
            && self.rng.one_in(self.plan.probe_one_in)
        {
            self.check_promise(shard, &command);
        }
    }

    /// Whether the store may say this now.
    fn check_status(&mut self, shard: usize, command: &Command, status: Status) {
        let s = &self.shards[shard];
        let changes = matches!(command.op, HostOp::Write(_) | HostOp::Zero(_) | HostOp::CompareWrite(_));
        match status {
            Status::Ok => assert!(
                !changes || s.fenced_at.is_none_or(|at| command.serial < at),
                "shard {shard} is fenced ({:?}) since command {:?}, and acknowledged command {} {:?}",
                s.fence,
                s.fenced_at,
                command.serial,
                command.op
            ),
            Status::Fenced => {
                assert!(s.fence.is_some() || s.command_failed, "{:?} was answered Fenced, and no command of the drive failed", command.op)
            }
            Status::NotReady => {
                let of = self.snapshots.get(&command.volume).map_or(command.volume, |snapshot| snapshot.of);
                let v = self.volumes.get(&of);
                // A snapshot may go while it is read, and its marker be among what the log lost.
                let is_lost = |no| {
                    let layer = s.store.as_ref().zip(v.and_then(|v| v.replica)).and_then(|(store, replica)| layer_in(store, replica, no));
                    s.fence == Some(FenceReason::LogLost) && layer.is_none()
                };
                let kept = self.snapshots.get(&command.volume).is_none_or(|s| !s.removed && !is_lost(s.no));
                let stays = v.is_some_and(|v| v.replica.is_some() && !v.doomed) && kept;
                let settled = s.standing == Standing::Serving && stays;
                assert!(!settled || command.serial < s.serves_since, "{:?} was answered NotReady by a store that serves", command.op);
            }
            Status::Unrecovered => self.tally.did("answers Unrecovered", 1),
            Status::NoSpace => {
                self.tally.fault("full drive (15)");
                self.check_full(shard, command);
            }
            Status::Miscompare { .. } => {
                assert!(matches!(command.op, HostOp::CompareWrite(_)), "{:?} was answered {status:?}", command.op);
                self.tally.did("miscompares", 1);
            }
            Status::OutOfRange | Status::Invalid | Status::Conflict => {
                panic!("{:?} is well formed and was answered {status:?}", command.op)
            }
        }
    }
}
