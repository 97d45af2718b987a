//! The program `mlx-flash-attn`: exact attention on tensors in a file, the contract as a matrix of
//! checks, measurements, devices and pictures of tiles.
//!
//! Results go to stdout, messages to stderr. Exit status: 0 done, 1 a check failed, 2 bad input.
#![cfg_attr(not(feature = "cuda"), forbid(unsafe_code))]
#![deny(unsafe_code)]

mod args;
mod asked;
mod bench;
mod check;
mod cli;
mod devices;
mod files;
mod grid;
#[cfg(feature = "cuda")]
mod images;
mod input;
mod json;
mod measure;
mod output;
mod packed;
mod plot;
mod progress;
mod random;
mod run;
mod score;
mod sequences;
mod svg;
mod table;
mod tensors;
mod tiles;
mod verify;

use std::process::ExitCode;

use clap::Parser;

use cli::{Cli, Command};
use output::{Results, Status, message};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version come this way too, with status 0; a closed pipe is no concern.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
    };
    #[cfg(feature = "cuda")]
    if let Err(error) = images::trust_named() {
        message(format_args!("error: {error:#}"));
        return ExitCode::from(2);
    }
    let mut results = Results::stdout();
    let status = match &cli.command {
        Command::Run(args) => run::execute(args, &mut results),
        Command::Verify(args) => verify::execute(args, &mut results),
        Command::Bench(args) => bench::execute(args, &mut results),
        Command::Devices(args) => devices::execute(args, &mut results),
        Command::Tiles(args) => tiles::execute(args, &mut results),
        #[cfg(feature = "cuda")]
        Command::Images(args) => images::execute(args, &mut results),
    };
    match status.and_then(|status| results.finish().map(|()| status)) {
        Ok(status) => status.into(),
        Err(error) => {
            message(format_args!("error: {error:#}"));
            Status::BadInput.into()
        }
    }
}
