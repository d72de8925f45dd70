// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvcpu-abuse [--list] [PATTERN]...`: misuses every ioctl, and expects the documented errno each time.
//!
//! The environment variable `AXVCPU_SEED` repeats a run of the random cases, which print their seed.

use axvcpu_tests::{abuse, harness};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.as_slice() {
        // Started by a case that needs another process.
        [option, what] if option == "--helper" => match abuse::help(what) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        _ => harness::main(&abuse::cases()),
    }
}
