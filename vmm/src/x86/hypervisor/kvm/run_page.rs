// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a vCPU's run page holds on x86 only: port I/O, MSRs, and the interrupt window.

use axvcpu_uapi::exit::{AccessWidth, AxVCpuExitReason};

use crate::hypervisor::kvm::run_page::{get, RunPage};
use crate::hypervisor::kvm::transfer::Transfer;

/// Writes one field of the page.
macro_rules! set {
    ($page:expr, $($field:tt)+) => {
        // SAFETY: as for reading; the mapping is writable, and no reference to its bytes exists.
        (|value| unsafe { std::ptr::write_volatile(&raw mut (*$page.as_ptr()).$($field)+, value) })
    };
}

impl RunPage {
    /// Whether an external interrupt handed over now would be delivered at once.
    pub(super) fn ready_for_interrupt(&self) -> bool {
        get!(self, ready_for_interrupt_injection) != 0
    }

    /// Asks for `KVM_EXIT_IRQ_WINDOW_OPEN`, or no longer.
    pub(super) fn request_interrupt_window(&mut self, on: bool) {
        set!(self, request_interrupt_window)(on.into());
    }

    /// What `KVM_EXIT_IO` brings; `None` if it makes no sense.
    pub(super) fn port_io(&self) -> Option<Transfer> {
        let io = get!(self, __bindgen_anon_1.io);
        let item = AccessWidth::from_size(io.size.into())?;
        let length = item.size().checked_mul(usize::try_from(io.count).ok()?)?;
        let data = usize::try_from(io.data_offset).ok()?;
        let output = u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT;
        (data.checked_add(length)? <= self.size()).then(|| Transfer::port(io.port, item, output, data, length))
    }

    /// What `KVM_EXIT_X86_RDMSR` (`write` false) or `KVM_EXIT_X86_WRMSR` brings.
    pub(super) fn msr(&self, write: bool) -> AxVCpuExitReason {
        let msr = get!(self, __bindgen_anon_1.msr);
        let addr = msr.index.into();
        if write {
            AxVCpuExitReason::SysRegWrite { addr, value: msr.data }
        } else {
            AxVCpuExitReason::SysRegRead { addr, reg: 0 }
        }
    }

    /// Answers those two: a value, and whether the guest gets a general protection fault.
    pub(super) fn answer_msr(&mut self, value: u64, fault: bool) {
        set!(self, __bindgen_anon_1.msr.data)(value);
        set!(self, __bindgen_anon_1.msr.error)(fault.into());
    }

    /// The vector that `KVM_EXIT_IOAPIC_EOI` brings.
    pub(super) fn eoi_vector(&self) -> u8 {
        get!(self, __bindgen_anon_1.eoi.vector)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::kvm::run_page::tests::{page, SIZE};

    #[test]
    fn exits_that_make_no_sense_are_none() {
        let page = page();
        let io = |size, count, data_offset| kvm_bindings::kvm_run__bindgen_ty_1__bindgen_ty_4 {
            direction: 1,
            size,
            port: 0x10,
            count,
            data_offset,
        };
        set!(page, __bindgen_anon_1.io)(io(2, 3, 4096));
        assert_eq!(page.port_io(), Some(Transfer::port(0x10, AccessWidth::Word, true, 4096, 6)));
        for wrong in [io(3, 1, 4096), io(4, 1, SIZE as u64 - 3), io(1, u32::MAX, 4096), io(1, 1, u64::MAX)] {
            set!(page, __bindgen_anon_1.io)(wrong);
            assert_eq!(page.port_io(), None);
        }
    }
}
