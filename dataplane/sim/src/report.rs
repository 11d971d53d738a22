//! What runs came to, as text for people.
//!
//! Not here: judgement, and what is printed where (`main`, the tests).

use std::fmt::Write;
use std::time::Duration;

use crate::canaries::Seeded;
use crate::run::{Hunt, Outcome, Summary};

/// What a run violated and how to see it again; nothing for one that violated nothing.
pub fn violation_rows(outcome: &Outcome) -> String {
    match &outcome.violation {
        Some(violation) => format!("VIOLATION, seed {}: {}\n  replay: {}\n", outcome.seed, violation.text, outcome.replay),
        None => String::new(),
    }
}

/// All that many seeds from `from` did, met and checked, and what they violated.
pub fn summary_table(s: &Summary, from: u64, took: Duration) -> String {
    let mut text = String::new();
    for (title, rows) in [
        ("work done", &s.tally.work),
        ("faults injected, by class (number in FAULTS)", &s.tally.faults),
        ("invariants checked (number in FAULTS)", &s.tally.checks),
    ] {
        let _ = writeln!(text, "{title}");
        for (name, n) in rows {
            let _ = writeln!(text, "  {name:<58} {n:>12}");
        }
    }
    let seconds = took.as_secs_f64();
    let rate = s.events as f64 / seconds;
    let _ = writeln!(text, "seeds {} from {from}, events {}, hash {:016x}, {seconds:.1} s, {rate:.0} events/s", s.seeds, s.events, s.hash);
    let _ = writeln!(text, "violations {}", s.violations.len());
    for outcome in &s.violations {
        text += &violation_rows(outcome);
    }
    text
}

/// What a seeded bug breaks, and for each simulator that has to see it how many seeds it lived and what caught it.
pub fn canary_rows(seeded: &Seeded, hunts: &[Hunt]) -> String {
    let mut text = format!("  {:<22} {}\n", seeded.bug.name(), seeded.breaks);
    for Hunt { simulator, seeds, caught } in hunts {
        let _ = match caught.as_ref().and_then(|outcome| Some((outcome.seed, outcome.violation.as_ref()?))) {
            Some((seed, violation)) => {
                let what: String = violation.text.lines().next().unwrap_or_default().chars().take(130).collect();
                writeln!(text, "    {:<24} caught in {seeds:>4} seeds, by seed {seed}: {what}", simulator.title())
            }
            None => writeln!(text, "    {:<24} NOT caught in {seeds} seeds", simulator.title()),
        };
    }
    text
}
