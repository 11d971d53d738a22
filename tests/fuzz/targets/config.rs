//! Fuzz target: see `penstock_fuzz::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: penstock_fuzz::seeds::if_asked(penstock_fuzz::config::seeds), |data: &[u8]| penstock_fuzz::config::run(data));
