//! penstockd's config file and flags: anything is either settings or an error that names where it is wrong.

use crate::bytes::Choices;
use crate::node_config::{Config, ConfigError, Flags};
use clap::Parser;
use std::fs;
use std::path::PathBuf;
use std::sync::OnceLock;

/// A file that every run overwrites; in memory where the machine has such a place.
fn path() -> &'static PathBuf {
    static DIR: OnceLock<(tempfile::TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = DIR.get_or_init(|| {
        let parent = ["/dev/shm", "/tmp"].into_iter().find(|dir| fs::metadata(dir).is_ok()).unwrap_or(".");
        let dir = tempfile::Builder::new().prefix("penstock-fuzz-").tempdir_in(parent).expect("a scratch directory");
        let path = dir.path().join("c");
        (dir, path)
    });
    path
}

pub fn run(data: &[u8]) {
    let mut choices = Choices::new(data);
    let kind = choices.u8() % 2;
    let data = choices.rest();
    let flags = if kind == 0 {
        fs::write(path(), data).expect("the scratch file is writable");
        Flags { config: Some(path().clone()), ..Flags::default() }
    } else {
        let Ok(line) = std::str::from_utf8(data) else { return };
        match Flags::try_parse_from(std::iter::once("penstockd").chain(line.split(' '))) {
            // A path on the line would be read.
            Ok(flags) => Flags { config: None, ..flags },
            Err(_) => return,
        }
    };
    match Config::resolve(&flags) {
        Ok(config) => {
            assert!(!config.cores.is_empty(), "a node without cores");
            assert!(config.cores.windows(2).all(|pair| pair[0] < pair[1]), "cores twice: {:?}", config.cores);
            assert!(config.run_dir.is_absolute() && config.state_dir.is_absolute());
        }
        Err(ConfigError::Wrong { what, right, .. }) => assert!(!what.is_empty() && !right.is_empty(), "an error that says nothing"),
        Err(ConfigError::Unreadable { .. }) => assert!(std::str::from_utf8(data).is_err(), "a text file that cannot be read"),
    }
}

pub fn seeds() -> Vec<Vec<u8>> {
    let file = "run_dir = \"/run/penstock\"\nstate_dir = \"/var/lib/penstock\"\ncores = \"0-1,3\"\nno_huge = true\nmem_mib = 640\n\
                poll = \"adaptive\"\ndrives = [\"file:/srv/d0.img\", \"nvme:0000:00:04.0\"]\nstop_timeout_s = 20\n\n[nvmf]\n\
                listen = [\"127.0.0.1:4420\"]\n\n[log]\nlevel = \"debug\"\nformat = \"json\"\n";
    let lines = [
        "--no-huge --mem-mib 640 --cores 0x3 --poll busy --nvmf-listen [::1]:4420",
        "--run-dir /a --state-dir /b --drive bdev:x --log-level warn --log-format json --stop-timeout-s 3 --check-config",
    ];
    let mut seeds = vec![format!("\0{file}").into_bytes()];
    seeds.extend(lines.iter().map(|line| format!("\u{1}{line}").into_bytes()));
    seeds
}
