//! The daemon penstockd: flags, config, log; the rest is the library's.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use penstock_node::config::{Config, Flags};

fn main() -> ExitCode {
    let flags = Flags::parse();
    let config = match Config::resolve(&flags) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("penstockd: {error}");
            return ExitCode::from(2);
        }
    };
    if flags.check_config {
        println!("{config:#?}");
        return ExitCode::SUCCESS;
    }
    penstock_node::log::start(config.log_level, config.log_format);
    match penstock_node::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("penstockd: {error}");
            ExitCode::FAILURE
        }
    }
}
