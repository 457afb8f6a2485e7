#![forbid(unsafe_code)]
//! The torch-free `overspill` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    ExitCode::from(overspill_cli::run(std::env::args_os()))
}
