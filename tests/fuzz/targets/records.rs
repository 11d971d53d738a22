//! Fuzz target: see `penstock_fuzz::records`.
#![no_main]

libfuzzer_sys::fuzz_target!(init: penstock_fuzz::seeds::if_asked(penstock_fuzz::records::seeds), |data: &[u8]| penstock_fuzz::records::run(data));
