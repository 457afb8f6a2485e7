#![forbid(unsafe_code)]
//! The `overspill` commands, as a library: the torch-free program and the wheel's entry point both call [`run`].
//!
//! One module a command family. Exit codes: 0 done, 1 bad data or a failed operation, 2 misuse. Results go to
//! standard output, progress and one-line errors to standard error.

mod bar;
mod bench;
mod chain;
mod doctor;
mod plan;
mod serve;
mod sessions;
mod table;
mod tpde;

use std::ffi::OsString;

use clap::{Parser, Subcommand};

/// Train, load and serve more than the GPU's memory holds.
#[derive(Debug, Parser)]
#[command(name = "overspill", version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Weights as lossless deltas: pack, apply, verify, inspect and compare checkpoints.
    Tpde(tpde::Args),
    /// Every checkpoint of a training run in one folder: commit, log, restore, verify, gc.
    Chain(chain::Args),
    Doctor(doctor::Args),
    Bench(bench::Args),
    Plan(plan::Args),
    Serve(serve::Args),
    Sessions(sessions::Args),
}

/// How a command ended without doing its job.
#[derive(Debug)]
enum Failure {
    /// Asked for something that makes no sense: exit code 2.
    Misuse(String),
    /// Bad data, or the system refused: exit code 1.
    Failed(String),
}

impl From<overspill_tpde::Error> for Failure {
    fn from(error: overspill_tpde::Error) -> Self {
        match error {
            overspill_tpde::Error::Misuse { what } => Failure::Misuse(what),
            error => Failure::Failed(error.to_string()),
        }
    }
}

/// Runs the command line `args`, program name first, and returns the exit code. This program has no model to serve.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    run_with(args, |_| Err("this program has no models; `pip install overspill[serve]` has".to_owned()))
}

/// As [`run`], where `serve` runs a server with the options of `overspill serve`, as JSON, or says why it cannot.
pub fn run_with(
    args: impl IntoIterator<Item = OsString>,
    serve: impl FnOnce(&str) -> std::result::Result<(), String>,
) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are answers, not errors; clap knows which stream and code each has.
            let _ = error.print();
            return error.exit_code() as u8;
        }
    };
    if matches!(cli.command, Command::Tpde(_) | Command::Chain(_)) {
        stop_on_signals();
    }
    let outcome = match cli.command {
        Command::Tpde(args) => tpde::run(args),
        Command::Chain(args) => chain::run(args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Plan(args) => plan::run(&args),
        Command::Sessions(args) => sessions::run(&args),
        Command::Serve(args) => args.to_json().and_then(|options| serve(&options).map_err(Failure::Failed)),
    };
    let (code, message) = match outcome {
        Ok(()) => return 0,
        Err(Failure::Failed(message)) => (1, message),
        Err(Failure::Misuse(message)) => (2, message),
    };
    eprintln!("overspill: {}", message.replace('\n', " "));
    code
}

/// On SIGINT, SIGTERM and SIGHUP the operation ends as if it had failed, which leaves nothing behind; a second one ends
/// the process at once.
fn stop_on_signals() {
    let stop = || {
        if overspill_tpde::stop() {
            std::process::exit(1);
        }
    };
    // Refused only where a command ran before in this process: then the signals are caught already.
    let _ = ctrlc::set_handler(stop);
}
