//! Fuzz target: see `penstock_fuzz::peer`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: penstock_fuzz::seeds::if_asked(penstock_fuzz::peer::seeds), |data: &[u8]| penstock_fuzz::peer::run(data));
