//! A leader that cannot send an entry, because nobody gives it the payload.

use super::*;

/// A leader whose last entry nobody else has, and that entry.
fn alone() -> (Bench, usize, Index) {
    let mut bench = Bench::new(3);
    let leader = bench.leader();
    bench.propose(leader, 7);
    for other in (0..3).filter(|at| *at != leader) {
        bench.linked[other] = false;
    }
    let index = bench.propose(leader, 8);
    assert!(bench.view(leader).committed < index);
    (bench, leader, index)
}

#[test]
fn uncommitted_entry_that_two_words_could_not_carry_is_sent_once_it_can_be() {
    let (mut bench, leader, index) = alone();
    // The second word fails when the member leads no more.
    for _ in 0..2 {
        bench.groups[leader].cannot_send(index);
    }
    assert_eq!(bench.view(leader).part, Part::Follower);
    let behind = bench.other(leader);
    bench.linked[behind] = true;
    for _ in 0..3 {
        // Whoever lacks the entry cannot win, and disturbs.
        bench.tick(60);
    }
    let leads = bench.leader();
    assert_eq!(leads, leader, "it alone has the entry");
    assert!(bench.view(leader).committed > index, "{:?}", bench.view(leader));
    assert_eq!(bench.applied[behind].last(), Some(&index));
}
