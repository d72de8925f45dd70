// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvcpu-load [--list] [PATTERN]...`: for a Linux guest with several CPUs: what they promise each other, under load.

fn main() -> std::process::ExitCode {
    axvcpu_tests::harness::main(&axvcpu_tests::load::cases())
}
