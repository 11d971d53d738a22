//! Fuzz target: see `penstock_fuzz::store`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: penstock_fuzz::seeds::if_asked(penstock_fuzz::store::seeds), |data: &[u8]| penstock_fuzz::store::run(data));
