//! Shared harness of the whole-house tests.
#![forbid(unsafe_code)]

pub mod guest;
pub mod process;
