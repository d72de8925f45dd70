// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What VMRUN and an exit overwrite in the VMCB, kept for the case that an entry is refused.

use super::{SegmentRegister, TableRegister, Vmcb};

/// A copy of the state that an exit overwrites. A refused entry may leave the host's registers in the VMCB (QEMU does), so
/// after one this copy is what the guest's state is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct HardwareState {
    es_to_ds: [[u64; 2]; 4],
    tables: [[u64; 2]; 2],
    cpl: u8,
    registers: [u64; 11],
    interrupt_shadow: u64,
}

impl Vmcb {
    /// Copies out everything that VMRUN and the exit change by themselves (APM vol. 2 section 15.6).
    #[inline]
    pub(crate) fn hardware_state(&self) -> HardwareState {
        HardwareState {
            es_to_ds: [
                self.pair(SegmentRegister::Es as usize),
                self.pair(SegmentRegister::Cs as usize),
                self.pair(SegmentRegister::Ss as usize),
                self.pair(SegmentRegister::Ds as usize),
            ],
            tables: [self.pair(TableRegister::Gdtr as usize), self.pair(TableRegister::Idtr as usize)],
            cpl: self.cpl(),
            registers: [
                self.efer(),
                self.cr0(),
                self.cr2(),
                self.cr3(),
                self.cr4(),
                self.dr6(),
                self.dr7(),
                self.rflags(),
                self.rip(),
                self.rsp(),
                self.rax(),
            ],
            interrupt_shadow: self.interrupt_shadow(),
        }
    }

    /// Puts it back.
    #[cold]
    pub(crate) fn restore_hardware_state(&mut self, state: &HardwareState) {
        let [es, cs, ss, ds] = state.es_to_ds;
        self.set_pair(SegmentRegister::Es as usize, es);
        self.set_pair(SegmentRegister::Cs as usize, cs);
        self.set_pair(SegmentRegister::Ss as usize, ss);
        self.set_pair(SegmentRegister::Ds as usize, ds);
        let [gdtr, idtr] = state.tables;
        self.set_pair(TableRegister::Gdtr as usize, gdtr);
        self.set_pair(TableRegister::Idtr as usize, idtr);
        self.set_cpl(state.cpl);
        let [efer, cr0, cr2, cr3, cr4, dr6, dr7, rflags, rip, rsp, rax] = state.registers;
        self.set_efer(efer);
        self.set_cr0(cr0);
        self.set_cr2(cr2);
        self.set_cr3(cr3);
        self.set_cr4(cr4);
        self.set_dr6(dr6);
        self.set_dr7(dr7);
        self.set_rflags(rflags);
        self.set_rip(rip);
        self.set_rsp(rsp);
        self.set_rax(rax);
        self.set_interrupt_shadow(state.interrupt_shadow);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use axvcpu_uapi::x86::{DescriptorTable, Segment};

    #[test]
    fn the_shadow_holds_all_that_an_exit_overwrites() {
        let mut vmcb = Vmcb::new();
        for (i, word) in vmcb.0.iter_mut().enumerate() {
            *word = i as u64;
        }
        let before = vmcb.0;
        let state = vmcb.hardware_state();
        let segment = Segment { base: !0, limit: !0, selector: !0, attributes: !0 };
        let table = DescriptorTable { base: !0, limit: !0, reserved: [0; 3] };
        for register in [SegmentRegister::Es, SegmentRegister::Cs, SegmentRegister::Ss, SegmentRegister::Ds] {
            vmcb.set_segment(register, &segment);
        }
        vmcb.set_table(TableRegister::Gdtr, &table);
        vmcb.set_table(TableRegister::Idtr, &table);
        vmcb.set_cpl(3);
        for set in [
            Vmcb::set_efer,
            Vmcb::set_cr0,
            Vmcb::set_cr2,
            Vmcb::set_cr3,
            Vmcb::set_cr4,
            Vmcb::set_dr6,
            Vmcb::set_dr7,
            Vmcb::set_rflags,
            Vmcb::set_rip,
            Vmcb::set_rsp,
            Vmcb::set_rax,
            Vmcb::set_interrupt_shadow,
        ] {
            set(&mut vmcb, !0);
        }
        assert_ne!(vmcb.0, before);
        vmcb.restore_hardware_state(&state);
        assert_eq!(vmcb.0, before);
    }
}
