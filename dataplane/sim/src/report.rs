//! What runs came to, as text for people.
//!
//! Not here: judgement, and what is printed where (`main`, the tests).

use penstock_engine::Canary;

use crate::run::Outcome;

/// How many seeds a seeded bug lived, and what caught it.
pub fn canary_row(canary: Canary, caught: Option<&Outcome>, seeds: u64) -> String {
    let name = format!("{canary:?}");
    match caught {
        Some(outcome) => {
            let text = outcome.violation.as_deref().unwrap_or_default();
            let text: String = text.lines().next().unwrap_or_default().chars().take(110).collect();
            format!("  {name:<22} caught in {seeds:>4} seeds, by seed {}: {text}", outcome.seed)
        }
        None => format!("  {name:<22} NOT caught in {seeds} seeds"),
    }
}
