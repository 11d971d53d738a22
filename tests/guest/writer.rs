//! The marked workload inside a guest: several threads write numbered generations to a block device with O_DIRECT and
//! journal each acknowledgement on a second device. See `penstock::guest::acks` for the formats and why that is sound.
//! Not here: verification (the host does it on rebuilt images), pacing, read traffic.
//!
//! usage: writer <device> <journal> <blocks> <threads> <writes per thread> <seed> <sync|nosync>
//!
//! With `sync` each write is followed by fdatasync before it counts as acknowledged: for raw drives with a volatile
//! cache. With `nosync` the write's completion is taken as the promise: right for a volume that has no such cache, and
//! the negative control on a raw drive.
#![forbid(unsafe_code)]

use penstock::guest::acks::{BLOCK, BlockNumber, Generation, ack_record, stamp};
use penstock::guest::replay::Dice;
use std::fs::{File, OpenOptions};
use std::io::{self, Error, ErrorKind};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

const O_DIRECT: i32 = 0o40_000; // asm-generic and x86; the guests are x86-64
const LONGEST: u64 = 16; // blocks of one write
const JOURNAL_SECTORS_PER_THREAD: u64 = 1024;

struct Plan {
    device: String,
    journal: String,
    blocks: u64,
    threads: u64,
    writes: u64,
    seed: u64,
    sync: bool,
}

fn main() -> io::Result<()> {
    let plan = parse(std::env::args().skip(1).collect())?;
    let mut total = 0;
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.threads)
            .map(|thread| {
                scope.spawn({
                    let plan = &plan;
                    move || work(plan, thread)
                })
            })
            .collect();
        for worker in workers {
            total += worker.join().map_err(|_| Error::other("a writing thread panicked"))??;
        }
        Ok::<(), Error>(())
    })?;
    println!("{total} writes acknowledged");
    Ok(())
}

fn parse(words: Vec<String>) -> io::Result<Plan> {
    let usage = || Error::new(ErrorKind::InvalidInput, "usage: writer <device> <journal> <blocks> <threads> <writes> <seed> <sync|nosync>");
    let [device, journal, blocks, threads, writes, seed, sync]: [String; 7] = words.try_into().map_err(|_| usage())?;
    let number = |text: String| text.parse::<u64>().map_err(|_| usage());
    let plan = Plan {
        device,
        journal,
        blocks: number(blocks)?,
        threads: number(threads)?,
        writes: number(writes)?,
        seed: number(seed)?,
        sync: match sync.as_str() {
            "sync" => true,
            "nosync" => false,
            _ => return Err(usage()),
        },
    };
    if plan.threads == 0 || plan.blocks / plan.threads < LONGEST {
        return Err(Error::new(ErrorKind::InvalidInput, format!("each thread needs at least {LONGEST} blocks of its own")));
    }
    Ok(plan)
}

/// Each thread has a stretch of blocks to itself, so that its own order is the block's order.
fn work(plan: &Plan, thread: u64) -> io::Result<u64> {
    let open = |path: &str| {
        OpenOptions::new().write(true).custom_flags(O_DIRECT).open(path).map_err(|e| Error::new(e.kind(), format!("{path}: {e}")))
    };
    let (device, journal) = (open(&plan.device)?, open(&plan.journal)?);
    let stretch = plan.blocks / plan.threads;
    let first = thread * stretch;
    let mut dice = Dice::new(plan.seed ^ thread.rotate_left(48));
    let mut generations = vec![0; stretch as usize];
    let mut memory = Aligned::new(LONGEST as usize * BLOCK);
    let mut record = Aligned::new(BLOCK);

    for count in 0..plan.writes {
        let length = 1 + dice.below(LONGEST);
        let at = dice.below(stretch - length + 1);
        let bytes = memory.slice(length as usize * BLOCK);
        let mut acks = Vec::with_capacity(length as usize);
        for (i, block) in bytes.chunks_exact_mut(BLOCK).enumerate() {
            let place = at + i as u64;
            generations[place as usize] += 1;
            let (number, generation) = (BlockNumber(first + place), Generation(generations[place as usize]));
            stamp(number, generation, block);
            acks.push((number, generation));
        }
        write(&device, &plan.device, bytes, (first + at) * BLOCK as u64)?;
        if plan.sync {
            device.sync_data()?;
        }
        let sector = record.slice(512);
        ack_record(&acks, sector);
        let slot = thread * JOURNAL_SECTORS_PER_THREAD + count % JOURNAL_SECTORS_PER_THREAD;
        write(&journal, &plan.journal, sector, slot * 512)?;
    }
    Ok(plan.writes)
}

fn write(file: &File, path: &str, bytes: &[u8], offset: u64) -> io::Result<()> {
    file.write_all_at(bytes, offset).map_err(|e| Error::new(e.kind(), format!("{path} at byte {offset}: {e}")))
}

/// O_DIRECT wants memory aligned to the device's sectors; a page suits all.
struct Aligned {
    memory: Vec<u8>,
    begin: usize,
}

impl Aligned {
    fn new(size: usize) -> Self {
        let memory = vec![0; size + BLOCK];
        let begin = memory.as_ptr().align_offset(BLOCK);
        assert!(begin < BLOCK, "a page boundary lies within a page");
        Aligned { memory, begin }
    }

    fn slice(&mut self, length: usize) -> &mut [u8] {
        &mut self.memory[self.begin..self.begin + length]
    }
}
