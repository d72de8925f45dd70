// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvcpu-peer ROUNDS [PID]`: a guest of KVM that works and is checked for that many rounds, and then on for as long as
//! process PID lives.

use axvcpu_tests::peer;
use nix::{errno::Errno, sys::signal::kill, unistd::Pid};
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wishes = match arguments.as_slice() {
        [rounds] => rounds.parse().ok().map(|rounds: u64| (rounds, None)),
        [rounds, pid] => rounds.parse().ok().zip(pid.parse().ok().map(|pid| Some(Pid::from_raw(pid)))),
        _ => None,
    };
    let Some((at_least, beside)) = wishes else {
        eprintln!("usage: axvcpu-peer ROUNDS [PID]");
        return ExitCode::from(2);
    };
    let lives = |pid| kill(pid, None) != Err(Errno::ESRCH);
    match peer::run(|rounds| rounds >= at_least && !beside.is_some_and(lives)) {
        Ok(rounds) => {
            println!("{rounds} rounds, every result right");
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}
