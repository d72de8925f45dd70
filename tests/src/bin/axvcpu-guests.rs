// SPDX-License-Identifier: MIT OR Apache-2.0
//! `axvcpu-guests [--hypervisor axvcpu|kvm] [--list] [PATTERN]...`: runs the table of assembled guests, or the cases whose name contains a
//! pattern.

fn main() -> std::process::ExitCode {
    axvcpu_tests::harness::main(&axvcpu_tests::guests::cases())
}
