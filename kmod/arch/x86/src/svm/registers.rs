// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A vCPU's registers as SVM keeps them: in the VMCB and in the frame of the world switch.

use axvcpu_uapi::x86::{Segment, Segments, RAX, RSP};
use vcpu_core::AxResult;
use x86::msr;

use super::switch::{self, Frame};
use super::vmcb::{HardwareState, SegmentRegister as S, TableRegister as T, Vmcb};
use crate::caps::Capabilities;
use crate::frame::Framed;
use crate::hal::X86Hal;
use crate::msr::PAT_RESET;
use crate::regs::{efer, privilege};
use crate::state::Registers;

/// The VMCB, the general registers, and what must be done about them at the next entry.
pub(crate) struct SvmRegisters<H: X86Hal> {
    pub(crate) vmcb: Framed<Vmcb, H>,
    pub(crate) frame: Framed<Frame, H>,
    /// The guest's translations are to be flushed.
    pub(crate) flush: bool,
    /// The CPU has not seen all of this yet: something was set that VMRUN checks, or that an exit overwrites, since the last
    /// exit.
    pub(crate) unchecked: bool,
    /// The hardware switches SPEC_CTRL.
    virtual_spec_ctrl: bool,
    /// [`switch::behind_vmrun`].
    behind_vmrun: u64,
}

impl<H: X86Hal> SvmRegisters<H> {
    pub(crate) fn new(caps: &Capabilities) -> AxResult<Self> {
        let mut vmcb = Framed::<Vmcb, H>::zeroed()?;
        let frame =
            Framed::new(Frame { common: crate::switch::Frame::new(), vmcb: vmcb.phys().as_u64(), host_vmcb: 0 })?;
        vmcb.set_g_pat(PAT_RESET);
        let (virtual_spec_ctrl, behind_vmrun) = (caps.virtual_spec_ctrl, switch::behind_vmrun());
        Ok(Self { vmcb, frame, flush: true, unchecked: true, virtual_spec_ctrl, behind_vmrun })
    }

    /// Whether the VMCB holds what VMRUN saves of the host, where an exit has to leave the guest's state. RIP and RAX tell: a guest
    /// does not know the second, and could only end itself by having both.
    ///
    /// QEMU's emulated CPU (10.0) has done that: an exit switches nested paging off in a word of flags, another CPU's XRSTOR, which
    /// clears a flag of the first CPU's there without a lock (`cpu_clear_ignne`), switches it on again, and the host's next
    /// instruction is a nested page fault, whose exit stores the host's state. The next entry then walks the host's page tables
    /// through the nested ones.
    #[inline]
    pub(super) fn holds_the_host(&self) -> bool {
        self.vmcb.rip() == self.behind_vmrun && self.vmcb.rax() == self.vmcb.phys().as_u64()
    }

    /// Clears what the hardware switches: it is not the guest's, and a failed vCPU can be looked at.
    #[cold]
    pub(super) fn forget_state(&mut self) {
        self.vmcb.restore_hardware_state(&HardwareState::default());
    }
}

impl<H: X86Hal> Registers for SvmRegisters<H> {
    fn gpr(&self, register: usize) -> u64 {
        match register {
            RAX => self.vmcb.rax(),
            RSP => self.vmcb.rsp(),
            _ => self.frame.common.gpr.get(register).copied().unwrap_or(0),
        }
    }

    #[inline]
    fn each_gpr(&self, mut show: impl FnMut(usize, u64)) {
        for (register, &value) in self.frame.common.gpr.iter().enumerate() {
            show(register, value);
        }
        show(RAX, self.vmcb.rax());
        show(RSP, self.vmcb.rsp());
    }

    fn set_gpr(&mut self, register: usize, value: u64) {
        match register {
            RAX => self.vmcb.set_rax(value),
            RSP => self.vmcb.set_rsp(value),
            _ => {
                if let Some(slot) = self.frame.common.gpr.get_mut(register) {
                    *slot = value;
                }
            }
        }
    }

    fn rip(&self) -> u64 {
        self.vmcb.rip()
    }

    fn set_rip(&mut self, value: u64) {
        self.vmcb.set_rip(value);
    }

    fn rflags(&self) -> u64 {
        self.vmcb.rflags()
    }

    fn set_rflags(&mut self, value: u64) {
        self.vmcb.set_rflags(value);
    }

    fn cr0(&self) -> u64 {
        self.vmcb.cr0()
    }

    fn set_cr0(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_cr0(value);
    }

    fn cr3(&self) -> u64 {
        self.vmcb.cr3()
    }

    fn cr4(&self) -> u64 {
        self.vmcb.cr4()
    }

    fn set_cr4(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_cr4(value);
    }

    fn efer(&self) -> u64 {
        self.vmcb.efer() & !efer::SVME
    }

    fn set_efer(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_efer(value | efer::SVME);
    }

    fn cr2(&self) -> u64 {
        self.vmcb.cr2()
    }

    fn set_cr2(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_cr2(value);
    }

    fn set_cr3(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_cr3(value);
    }

    fn segments(&self) -> Segments {
        Segments {
            es: self.vmcb.segment(S::Es),
            cs: self.vmcb.segment(S::Cs),
            ss: self.vmcb.segment(S::Ss),
            ds: self.vmcb.segment(S::Ds),
            fs: self.vmcb.segment(S::Fs),
            gs: self.vmcb.segment(S::Gs),
            ldtr: self.vmcb.segment(S::Ldtr),
            tr: self.vmcb.segment(S::Tr),
            gdtr: self.vmcb.table(T::Gdtr),
            idtr: self.vmcb.table(T::Idtr),
        }
    }

    fn set_segments(&mut self, s: &Segments) {
        self.unchecked = true;
        self.vmcb.set_segment(S::Es, &s.es);
        self.vmcb.set_segment(S::Cs, &s.cs);
        self.vmcb.set_segment(S::Ss, &s.ss);
        self.vmcb.set_segment(S::Ds, &s.ds);
        self.vmcb.set_segment(S::Fs, &s.fs);
        self.vmcb.set_segment(S::Gs, &s.gs);
        self.vmcb.set_segment(S::Ldtr, &s.ldtr);
        self.vmcb.set_segment(S::Tr, &s.tr);
        self.vmcb.set_table(T::Gdtr, &s.gdtr);
        self.vmcb.set_table(T::Idtr, &s.idtr);
        self.vmcb.set_cpl(privilege(s.ss.attributes));
    }

    fn code(&self) -> u16 {
        self.vmcb.segment(S::Cs).attributes
    }

    fn cpl(&self) -> u8 {
        self.vmcb.cpl()
    }

    fn dr6(&self) -> u64 {
        self.vmcb.dr6()
    }

    fn set_dr6(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_dr6(value);
    }

    fn dr7(&self) -> u64 {
        self.vmcb.dr7()
    }

    fn set_dr7(&mut self, value: u64) {
        self.unchecked = true;
        self.vmcb.set_dr7(value);
    }

    fn shadow(&self) -> bool {
        self.vmcb.interrupt_shadow() & 1 != 0
    }

    fn set_shadow(&mut self, shadow: bool) {
        self.vmcb.set_interrupt_shadow(shadow.into());
    }

    fn pat(&self) -> u64 {
        self.vmcb.g_pat()
    }

    fn set_pat(&mut self, value: u64) {
        self.vmcb.set_g_pat(value);
        // Cached translations carry the old memory types.
        self.flush = true;
    }

    fn set_tsc_offset(&mut self, value: u64) {
        self.vmcb.set_tsc_offset(value);
    }

    fn direct_msr(&self, index: u32) -> Option<u64> {
        let vmcb = &self.vmcb;
        Some(match index {
            msr::IA32_SYSENTER_CS => vmcb.sysenter_cs(),
            msr::IA32_SYSENTER_ESP => vmcb.sysenter_esp(),
            msr::IA32_SYSENTER_EIP => vmcb.sysenter_eip(),
            msr::IA32_STAR => vmcb.star(),
            msr::IA32_LSTAR => vmcb.lstar(),
            msr::IA32_CSTAR => vmcb.cstar(),
            msr::IA32_FMASK => vmcb.sfmask(),
            msr::IA32_FS_BASE => vmcb.segment(S::Fs).base,
            msr::IA32_GS_BASE => vmcb.segment(S::Gs).base,
            msr::IA32_KERNEL_GSBASE => vmcb.kernel_gs_base(),
            _ => return None,
        })
    }

    fn set_direct_msr(&mut self, index: u32, value: u64) -> bool {
        let vmcb = &mut self.vmcb;
        match index {
            msr::IA32_SYSENTER_CS => vmcb.set_sysenter_cs(value),
            msr::IA32_SYSENTER_ESP => vmcb.set_sysenter_esp(value),
            msr::IA32_SYSENTER_EIP => vmcb.set_sysenter_eip(value),
            msr::IA32_STAR => vmcb.set_star(value),
            msr::IA32_LSTAR => vmcb.set_lstar(value),
            msr::IA32_CSTAR => vmcb.set_cstar(value),
            msr::IA32_FMASK => vmcb.set_sfmask(value),
            msr::IA32_FS_BASE | msr::IA32_GS_BASE => {
                let register = if index == msr::IA32_FS_BASE { S::Fs } else { S::Gs };
                let segment = Segment { base: value, ..vmcb.segment(register) };
                vmcb.set_segment(register, &segment);
            }
            msr::IA32_KERNEL_GSBASE => vmcb.set_kernel_gs_base(value),
            _ => return false,
        }
        true
    }

    fn spec_ctrl(&self) -> u64 {
        if self.virtual_spec_ctrl {
            self.vmcb.spec_ctrl()
        } else {
            self.frame.common.spec_ctrl()
        }
    }

    fn set_spec_ctrl(&mut self, value: u64) {
        if self.virtual_spec_ctrl {
            self.vmcb.set_spec_ctrl(value);
        } else {
            self.frame.common.set_spec_ctrl(value);
        }
    }

    fn flush_tlb(&mut self) {
        self.flush = true;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestHal;

    /// The place is the instruction CLI in the world switch.
    #[test]
    #[cfg_attr(miri, ignore = "it reads code")]
    fn the_host_goes_on_behind_vmrun() {
        let start = switch::enter as *const () as u64;
        let behind = switch::behind_vmrun();
        assert!(behind > start && behind < start + 1024, "{start:#x} {behind:#x}");
        let code = (behind - 3) as *const [u8; 4];
        // SAFETY: Inside of `enter`, as just seen, which is longer than that; code can be read as bytes.
        assert_eq!(unsafe { code.read() }, [0x0f, 0x01, 0xd8, 0xfa]);
    }

    #[test]
    fn the_hosts_state_is_known_and_forgotten() {
        let mut regs = SvmRegisters::<TestHal>::new(&Capabilities::none()).unwrap();
        assert!(!regs.holds_the_host());
        regs.set_rip(switch::behind_vmrun());
        assert!(!regs.holds_the_host(), "a guest may have that RIP");
        regs.set_gpr(RAX, regs.vmcb.phys().as_u64());
        regs.set_cr3(0x1234_5000);
        assert!(regs.holds_the_host());
        regs.forget_state();
        assert!(!regs.holds_the_host());
        assert_eq!((regs.rip(), regs.gpr(RAX), regs.cr3()), (0, 0, 0));
    }
}
