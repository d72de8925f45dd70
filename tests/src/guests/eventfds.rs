// SPDX-License-Identifier: MIT OR Apache-2.0
//! Eventfds that interrupt the guest ([`interrupts`]), and eventfds that the guest signals ([`signals`]).

mod interrupts;
mod signals;

use crate::harness::{Case, Stop};
use crate::machine::{Machine, Mode, CODE};
use axvcpu_uapi::client::Apic;

pub(super) fn cases() -> Vec<Case> {
    [interrupts::cases(), signals::cases()].into_iter().flatten().collect()
}

/// A machine whose APIC is enabled as soon as the code, an `enabling_code`, has run; vector 0x40 goes to CODE + 0x100.
fn machine(code: &[u8]) -> Result<Machine, Stop> {
    let m = Machine::with(Mode::Long, code, Apic::InKernel)?;
    m.vector(0x40, CODE + 0x100)?;
    Ok(m)
}

/// Code that enables the APIC itself, in x2APIC mode.
macro_rules! enabling_code {
    ($name:ident, $($line:literal),+ $(,)?) => {
        $crate::guests::x2apic::x2apic_code!($name, "write 0x80f, 0x1ff", $($line),+)
    };
}
use enabling_code;
