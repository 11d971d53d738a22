//! Once warm, no request allocates: neither submitted, nor continued, refused or reaped. Alone in its binary, because it
//! counts every allocation of the process.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::rc::Rc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{BLOCK, LONG, block, create, scratch};
use penstock_uring::{AlignedBuf, ByteOffset, Finished, Ring, RingOpts, Token};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: hands everything to the system's allocator; the counter changes nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn warm_ring_allocates_nothing() {
    const DEPTH: u32 = 16;
    const SLICES: usize = 8;
    let dir = scratch();
    let mut ring: Ring<AlignedBuf, Vec<Rc<AlignedBuf>>> = Ring::new(RingOpts { depth: DEPTH, ..RingOpts::default() }).unwrap();
    let file = ring.attach(create(dir.path(), 1 << 20));
    let one = Rc::new(block(1, 1));
    let mut idle: Vec<Vec<Rc<AlignedBuf>>> = (0..DEPTH).map(|_| vec![one.clone(); SLICES]).collect();
    let mut turns = |turns: u64, ring: &mut Ring<AlignedBuf, Vec<Rc<AlignedBuf>>>| {
        for turn in 0..turns {
            while let Some(buf) = idle.pop() {
                let at = ByteOffset((turn % 8) * (SLICES * BLOCK) as u64);
                let Err(refused) = ring.submit_writev(Token(turn), file, at, buf) else { continue };
                idle.push(refused.buf);
                break;
            }
            while idle.len() < DEPTH as usize {
                assert!(ring.wait(LONG).unwrap());
                ring.reap(DEPTH as usize, |done| match done.what {
                    Finished::Write(buf) => {
                        assert_eq!(done.result, Ok((SLICES * BLOCK) as u32));
                        idle.push(buf);
                    }
                    other => panic!("{other:?}"),
                });
            }
        }
    };
    turns(4, &mut ring);
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    turns(100, &mut ring);
    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(ring.counters().completions, 104 * u64::from(DEPTH));
    assert_eq!(allocations, 0, "over {} requests", 100 * DEPTH);

    // The check can fail: one allocation is seen.
    drop(std::hint::black_box(Box::new(7u64)));
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, allocations + 1);
}
