// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Reset, INIT and start-up: what a vCPU's registers are then (APM vol. 2 table 14-1, SDM vol. 3 table 10-1), and the messages
//! that bring it about.

use axvcpu_uapi::x86::{DescriptorTable, Segment, Segments, RDX};

use super::{Guest, Registers};
use crate::apic::Mailbox;
use crate::backend::Backend;
use crate::cpuid::CpuidTable;
use crate::events::Activity;
use crate::exit::Pending;
use crate::hal::X86Hal;
use crate::regs::{cr0, rflags, DR6_FIXED, DR7_FIXED};

/// Segments after reset, with CS based at `code_base`. The TSS is a 32-bit one: with a 16-bit one in TR some CPUs refuse to enter
/// long mode (SDM vol. 2, MOV to control registers), and start-up code may do so before it loads TR.
fn segments_at_reset(code_base: u64, selector: u16) -> Segments {
    /// Attributes of a present, accessed, writable data segment.
    const DATA16: u16 = 0x93;
    /// Attributes of a present, accessed, readable code segment.
    const CODE16: u16 = 0x9b;
    /// Attributes of a present LDT.
    const LDT: u16 = 0x82;
    /// Attributes of a present, busy 32-bit TSS.
    const TSS32: u16 = 0x8b;
    let flat = Segment { base: 0, limit: 0xffff, selector: 0, attributes: DATA16 };
    let table = DescriptorTable { base: 0, limit: 0xffff, reserved: [0; 3] };
    Segments {
        es: flat,
        cs: Segment { base: code_base, selector, attributes: CODE16, ..flat },
        ss: flat,
        ds: flat,
        fs: flat,
        gs: flat,
        ldtr: Segment { attributes: LDT, ..flat },
        tr: Segment { attributes: TSS32, ..flat },
        gdtr: table,
        idtr: table,
    }
}

impl<H: X86Hal> Guest<H> {
    /// Registers as after reset or INIT (APM vol. 2 table 14-1, SDM vol. 3 table 10-1), about to execute at `code_base + rip` in
    /// real mode. Caches are on after reset, as firmware leaves them.
    pub(super) fn reset(&mut self, hw: &mut impl Backend<H>, code_base: u64, selector: u16, rip: u64) {
        let signature = self.cpuid.as_ref().map_or(0, CpuidTable::signature);
        let regs = hw.regs_mut();
        regs.set_segments(&segments_at_reset(code_base, selector));
        // INIT keeps CD and NW as they are.
        regs.set_cr0(cr0::ET | regs.cr0() & (cr0::CD | cr0::NW));
        regs.set_cr2(0);
        regs.set_cr3(0);
        regs.set_cr4(0);
        regs.set_efer(0);
        regs.set_dr6(DR6_FIXED);
        regs.set_dr7(DR7_FIXED);
        regs.set_rflags(rflags::FIXED);
        regs.set_rip(rip);
        regs.set_shadow(false);
        for register in 0..16 {
            regs.set_gpr(register, 0);
        }
        regs.set_gpr(RDX, signature.into());
        regs.flush_tlb();
        self.debug.set([0; 4]);
        hw.forget();
    }

    /// INIT: the boot processor starts at the reset vector, the others wait for a start-up IPI.
    fn init(&mut self, hw: &mut impl Backend<H>) {
        self.reset(hw, 0xffff_0000, 0xf000, 0xfff0);
        let boot_processor = self.vcpu_id == 0;
        self.events.reset(if boot_processor { Activity::Running } else { Activity::WaitForSipi });
        self.set_cr8(0);
        self.pending = Pending::None;
    }

    /// Takes what was posted. Whether there is something to run for.
    #[inline]
    pub(crate) fn prepare(&mut self, hw: &mut impl Backend<H>, mailbox: &Mailbox<H>) -> bool {
        if mailbox.pending() || !self.published {
            self.take_mail(hw, mailbox);
        }
        self.events.activity() == Activity::Running
            || self.update_activity(hw.regs())
            || self.msrs.interrupt_end.is_some()
            || mailbox.pending()
    }

    #[inline(never)]
    fn take_mail(&mut self, hw: &mut impl Backend<H>, mailbox: &Mailbox<H>) {
        let (init, sipi) = self.collect(mailbox);
        if init {
            self.init(hw);
        }
        if let Some(vector) = sipi.filter(|_| self.events.activity() == Activity::WaitForSipi) {
            self.reset(hw, u64::from(vector) << 12, u16::from(vector) << 8, 0);
            self.events.set_activity(Activity::Running);
        }
    }
}
