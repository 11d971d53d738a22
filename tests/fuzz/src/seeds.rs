//! Writes a target's seeds where scripts/fuzz.sh asks for them: by the target itself, as nothing else links libFuzzer.

use std::fs;
use std::path::PathBuf;

/// Writes `seeds` into the directory that `PENSTOCK_FUZZ_SEEDS` names and leaves; does nothing when it names none.
pub fn if_asked(seeds: fn() -> Vec<Vec<u8>>) {
    let Some(dir) = std::env::var_os("PENSTOCK_FUZZ_SEEDS").map(PathBuf::from) else { return };
    let written = fs::create_dir_all(&dir)
        .and_then(|()| seeds().iter().enumerate().try_for_each(|(no, seed)| fs::write(dir.join(format!("seed-{no:03}")), seed)));
    if let Err(error) = written {
        eprintln!("the seeds cannot be written to {}: {error}", dir.display());
        std::process::exit(1);
    }
    std::process::exit(0);
}
