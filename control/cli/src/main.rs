//! The command penstock: asks penstock-control, waits where waiting makes sense, and prints tables or JSON.
//!
//! Synchronous and small; it holds no state. Exit codes are part of its interface, see [`Failure::exit_code`].
#![forbid(unsafe_code)]

mod args;
mod client;
mod failure;
mod node;
mod output;
mod pool;
mod recover;
mod replica;
mod snapshot;
mod top;
mod transport;
mod volume;
mod wait;

use std::process::ExitCode;

use clap::Parser;

use args::{Args, Command};
use client::Client;
use failure::Failure;

fn run(args: Args) -> Result<(), Failure> {
    let client = Client::new(&args.api);
    let form = args.output;
    match args.command {
        Command::Pool(command) => pool::run(&client, form, command),
        Command::Volume(command) => volume::run(&client, form, command),
        Command::Replica(command) => replica::run(&client, form, command),
        Command::Snapshot(command) => snapshot::run(&client, form, command),
        Command::Node(command) => node::run(&client, form, command),
        Command::Id(command) => node::run_id(&client, form, command),
        Command::Top(options) => top::run(&client, form, &options),
        Command::Drain { drive } => pool::drain(&client, form, drive.as_deref()),
        Command::Scrub { drive, action } => pool::scrub(&client, form, &drive, action),
    }
}

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Closed) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit_code()
        }
    }
}
