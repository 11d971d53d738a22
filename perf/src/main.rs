//! The command `penstock-perf`.
#![forbid(unsafe_code)]

fn main() {}
