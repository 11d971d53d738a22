//! Fuzz target: see `penstock_fuzz::api`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: penstock_fuzz::seeds::if_asked(penstock_fuzz::api::seeds), |data: &[u8]| penstock_fuzz::api::run(data));
