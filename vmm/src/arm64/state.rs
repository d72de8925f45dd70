// SPDX-License-Identifier: MIT OR Apache-2.0
//! A vCPU's registers as text for people.

use std::fmt::Write as _;

use axvcpu_uapi::arm64::{General, System};

/// The registers of vCPU `id`, with ESR_EL2 of its last exit if that is known.
pub(super) fn registers(id: u32, general: &General, system: &System, syndrome: Option<u64>) -> String {
    let General { x, sp_el0, pc, pstate } = general;
    let mut text = format!("vCPU {id}: pc {pc:#x} pstate {pstate:#x}");
    if let Some(esr) = syndrome {
        let _ = write!(text, " esr_el2 {esr:#x}");
    }
    for (i, value) in x.iter().enumerate() {
        let _ = write!(text, "{}x{i:<2} {value:016x}", if i % 4 == 0 { "\n  " } else { " " });
    }
    let System { sp_el1, elr_el1, spsr_el1, sctlr_el1, ttbr0_el1, ttbr1_el1, tcr_el1, .. } = system;
    let System { esr_el1, far_el1, vbar_el1, .. } = system;
    let _ = write!(text, "\n  sp_el0 {sp_el0:x} sp_el1 {sp_el1:x} elr_el1 {elr_el1:x} spsr_el1 {spsr_el1:x}");
    let _ =
        write!(text, "\n  sctlr_el1 {sctlr_el1:x} ttbr0_el1 {ttbr0_el1:x} ttbr1_el1 {ttbr1_el1:x} tcr_el1 {tcr_el1:x}");
    let _ = write!(text, "\n  esr_el1 {esr_el1:x} far_el1 {far_el1:x} vbar_el1 {vbar_el1:x}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_shows_every_register() {
        let mut general = General { pc: 0x4008_0000, pstate: 0x3c5, ..General::default() };
        for (i, x) in general.x.iter_mut().enumerate() {
            *x = i as u64 * 0x1111;
        }
        let system = System { esr_el1: 0x9600_0045, far_el1: 0xdead, ..System::default() };
        let text = registers(2, &general, &system, Some(0x9300_0000));
        assert!(
            text.starts_with("vCPU 2: pc 0x40080000 pstate 0x3c5 esr_el2 0x93000000\n  x0  0000000000000000 x1"),
            "{text}"
        );
        for i in 0..31 {
            assert!(text.contains(&format!("{:016x}", i * 0x1111)), "{text}");
        }
        assert!(text.contains("esr_el1 96000045 far_el1 dead"), "{text}");
    }
}
