//! Control's durable state behind one trait: redb embedded now, a shared store for a cluster later.
//!
//! A commit is durable when it returns, and all of it or nothing. A commit that fails leaves unknown what is on
//! disk, so the process ends and the next one reads it. Not here: what the records mean (penstock-model).

mod embedded;
mod migrate;

pub use embedded::EmbeddedStore;

use penstock_model::issuer::{Home, Mark};
use penstock_model::{Desired, Record};

#[derive(Clone, Debug)]
pub enum Write {
    Home(Home),
    Mark(Mark),
    Record(Record),
}

/// Everything that is stored; small enough to be held in memory whole.
#[derive(Clone, Debug, Default)]
pub struct Stored {
    pub home: Option<Home>,
    pub mark: Option<Mark>,
    pub desired: Desired,
}

pub trait Store: Send + Sync + 'static {
    fn load(&self) -> Result<Stored, StoreError>;
    /// Blocks until durable.
    fn commit(&self, writes: &[Write]) -> Result<(), StoreError>;
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("the store is open in another process: one penstock-control runs per state directory")]
    InUse,
    #[error("the store has format {found}, this program reads {expected}: use the program that wrote it, or a newer one")]
    Format { found: String, expected: u32 },
    #[error(
        "the store's {what} cannot be read: {reason}; restore it from a copy, or rebuild it with an empty state directory and `penstock pool import`"
    )]
    Damaged { what: String, reason: String },
    #[error("the store failed: {0}")]
    Failed(String),
}
