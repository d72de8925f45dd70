// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What an exit means: from the trap frame to what the vCPU does next.

use axvcpu_uapi::arm64::PSTATE_MODE;
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason as Exit};
use vcpu_core::GuestPhysAddr;

use crate::frame::TrapFrame;
use crate::psci;
use crate::syndrome::{class, FaultKind, Syndrome, SystemAccess, Transfer};

/// What an exit calls for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The host has an interrupt.
    HostInterrupt,
    /// An error of the hardware was reported while the guest ran.
    SystemError,
    /// The guest went to AArch32, which it does not have.
    AArch32,
    /// WFI: the guest waits.
    Wait,
    /// WFE: the guest gives way.
    Yield,
    /// A hypercall to `PC`, by HVC or SMC.
    Call {
        /// SMC: the PC is still at the instruction.
        smc: bool,
    },
    /// A trapped system register.
    System(SystemAccess),
    /// The instruction belongs to a feature that the guest does not have.
    Undefined,
    /// A stage 2 fault.
    Abort(Abort),
    /// A stage 2 fault of which nobody knows the address any more: the guest's own tables, or the memory that they are in, have
    /// changed since. The instruction will tell again.
    Lost,
    /// None that is known.
    Unknown,
}

/// A stage 2 fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Guest physical address.
    pub addr: GuestPhysAddr,
    /// What was tried.
    pub access: AccessFlags,
}

/// Offset in a page.
const OFFSET: u64 = 0xfff;

/// What the exit in `frame` calls for. `translate` gives the guest physical page of a guest virtual address, by the hardware,
/// for a read or a write.
pub fn classify(frame: &TrapFrame, translate: impl FnOnce(u64, bool) -> Option<u64>) -> Event {
    match frame.vector {
        0 => {}
        1 | 2 => return Event::HostInterrupt,
        3 => return Event::SystemError,
        5 | 6 => return Event::HostInterrupt,
        _ => return Event::AArch32,
    }
    if frame.general.pstate & (PSTATE_MODE & !15) != 0 {
        return Event::AArch32;
    }
    let syndrome = Syndrome(frame.esr);
    match syndrome.class() {
        class::WFX if syndrome.is_wfe() => Event::Yield,
        class::WFX => Event::Wait,
        class::HVC => Event::Call { smc: false },
        class::SMC => Event::Call { smc: true },
        class::SYSTEM => Event::System(syndrome.system_access()),
        class::FP | class::PAUTH | class::LS64 | class::SVE | class::SME | class::GCS => Event::Undefined,
        class::DATA_ABORT | class::INSTRUCTION_ABORT => abort(frame, syndrome, translate),
        _ => Event::Unknown,
    }
}

/// The stage 2 fault, if it is one that a mapping can cure.
fn abort(frame: &TrapFrame, syndrome: Syndrome, translate: impl FnOnce(u64, bool) -> Option<u64>) -> Event {
    let kind = syndrome.fault();
    if kind == FaultKind::Other {
        return Event::Unknown;
    }
    let walk = syndrome.in_table_walk();
    let write = syndrome.class() == class::DATA_ABORT && syndrome.is_write() && !syndrome.is_cache_maintenance();
    // HPFAR_EL2 holds bits 51:12 of the address in bits 43:4; for a permission fault that is not one of a table walk it
    // need not (Arm ARM D24.2.62).
    let page = if kind == FaultKind::Permission && !walk {
        let Some(page) = translate(frame.far, write) else { return Event::Lost };
        page
    } else {
        (frame.hpfar & 0x0fff_ffff_fff0) << 8
    };
    let mut access = match (syndrome.class(), write) {
        _ if walk => AccessFlags::READ.union(AccessFlags::PAGE_WALK),
        (class::INSTRUCTION_ABORT, _) => AccessFlags::EXECUTE,
        (_, true) => AccessFlags::WRITE,
        (_, false) => AccessFlags::READ,
    };
    if walk && write {
        // The hardware's update of an access or dirty flag.
        access = access.union(AccessFlags::WRITE);
    }
    if kind == FaultKind::Permission {
        access = access.union(AccessFlags::PRESENT);
    }
    // The walk's address is one of a table, not of what FAR_EL2 names.
    let offset = if walk { 0 } else { frame.far & OFFSET };
    Event::Abort(Abort { addr: GuestPhysAddr::new(page & !OFFSET | offset), access })
}

/// An access to what is not memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceAccess {
    /// How, and by which register.
    pub transfer: Transfer,
    /// What is stored, in the access's width, if it is a store.
    pub store: Option<u64>,
}

impl DeviceAccess {
    /// The access that the exit in `frame` is about, if the hardware has decoded it and it lies in one page: what is behind that
    /// belongs to somebody else, and only the guest's tables say whether and where there is more.
    #[inline]
    pub fn of(frame: &TrapFrame) -> Option<Self> {
        let syndrome = Syndrome(frame.esr);
        if syndrome.class() != class::DATA_ABORT || syndrome.in_table_walk() || syndrome.is_cache_maintenance() {
            return None;
        }
        let transfer = syndrome.transfer()?;
        if (frame.far & OFFSET).wrapping_add(transfer.width.size() as u64) > OFFSET.wrapping_add(1) {
            return None;
        }
        let store = syndrome.is_write().then(|| frame.register(transfer.general) & transfer.width.mask());
        Some(Self { transfer, store })
    }

    /// The exit to userspace for it, at `addr`.
    #[inline]
    pub fn exit(self, addr: GuestPhysAddr) -> Exit {
        let Transfer { width, general: reg, general_width: reg_width, sign_extend: signed_ext } = self.transfer;
        match self.store {
            Some(data) => Exit::MmioWrite { addr, width, data },
            None => Exit::MmioRead { addr, width, reg, reg_width, signed_ext },
        }
    }
}

/// The hypercall in the guest's registers, for userspace.
pub fn hypercall(frame: &TrapFrame) -> Exit {
    let x = |number| frame.register(number);
    Exit::Hypercall { nr: x(0), args: [x(1), x(2), x(3), x(4), x(5), x(6)] }
}

/// The call in the guest's registers.
pub fn call(frame: &TrapFrame) -> psci::Outcome {
    psci::call([frame.register(0), frame.register(1), frame.register(2), frame.register(3)])
}

#[cfg(test)]
mod tests {
    use super::*;
    use axvcpu_uapi::exit::AccessWidth;

    fn frame(esr: u64, far: u64, hpfar: u64) -> TrapFrame {
        let mut frame = TrapFrame { esr, far, hpfar, ..TrapFrame::ZERO };
        frame.general.pstate = 0x3c5;
        frame.general.x[5] = 0xffff_ffff_1234_5678;
        frame
    }

    fn event(frame: &TrapFrame) -> Event {
        classify(frame, |_, _| unreachable!())
    }

    const TRANSLATION: u64 = 0x06;
    const PERMISSION: u64 = 0x0f;

    #[test]
    fn vectors() {
        for (vector, expected) in [
            (1, Event::HostInterrupt),
            (2, Event::HostInterrupt),
            (3, Event::SystemError),
            (4, Event::AArch32),
            (5, Event::HostInterrupt),
            (7, Event::AArch32),
        ] {
            assert_eq!(event(&TrapFrame { vector, ..frame(0, 0, 0) }), expected);
        }
    }

    #[test]
    fn classes() {
        for (class, iss, expected) in [
            (0x01, 0, Event::Wait),
            (0x01, 1, Event::Yield),
            (0x16, 0x42, Event::Call { smc: false }),
            (0x17, 0, Event::Call { smc: true }),
            (0x09, 0, Event::Undefined),
            (0x19, 0, Event::Undefined),
            (0x07, 0, Event::Undefined),
            (0x00, 0, Event::Unknown),
            (0x3f, 0, Event::Unknown),
            (0x24, 0x10, Event::Unknown), // an external abort
        ] {
            assert_eq!(event(&frame(class << 26 | iss, 0, 0)), expected, "{class:#x}");
        }
        let mut aarch32 = frame(0x16 << 26, 0, 0);
        aarch32.general.pstate = 0x10;
        assert_eq!(event(&aarch32), Event::AArch32);
    }

    #[test]
    fn aborts_find_their_address_and_access() {
        let abort = |addr, access| Event::Abort(Abort { addr: GuestPhysAddr::new(addr), access });
        // A load at IPA 0x9000018, far away in virtual memory; the faulting IPA's bits 51:12 are in bits 43:4.
        let load = frame(0x24 << 26 | TRANSLATION, 0xffff_8000_1234_5018, 0x9000 << 4);
        assert_eq!(event(&load), abort(0x0900_0018, AccessFlags::READ));
        let store = frame(load.esr | 1 << 6, load.far, load.hpfar);
        assert_eq!(event(&store), abort(0x0900_0018, AccessFlags::WRITE));
        let clean = frame(load.esr | 1 << 6 | 1 << 8, load.far, load.hpfar);
        assert_eq!(event(&clean), abort(0x0900_0018, AccessFlags::READ), "cache maintenance writes nothing");
        let fetch = frame(0x20 << 26 | TRANSLATION, 0x4000, 0x4 << 4);
        assert_eq!(event(&fetch), abort(0x4000, AccessFlags::EXECUTE));
        let walk = frame(0x24 << 26 | 1 << 7 | TRANSLATION, 0x1234, 0x8000 << 4);
        assert_eq!(event(&walk), abort(0x0800_0000, AccessFlags::READ.union(AccessFlags::PAGE_WALK)));
        // A permission fault: HPFAR_EL2 says nothing.
        let denied = frame(0x24 << 26 | 1 << 6 | PERMISSION, 0x7018, 0);
        let found = classify(&denied, |far, write| {
            assert_eq!((far, write), (0x7018, true));
            Some(0x4567_8000)
        });
        assert_eq!(found, abort(0x4567_8018, AccessFlags::WRITE.union(AccessFlags::PRESENT)));
        assert_eq!(classify(&denied, |_, _| None), Event::Lost);
    }

    #[test]
    fn mmio_is_what_the_syndrome_describes() {
        let addr = GuestPhysAddr::new(0x0900_0000);
        let mmio = |frame: &TrapFrame| DeviceAccess::of(frame).map(|access| access.exit(addr));
        // STRH W5.
        let store = frame(0x24 << 26 | 1 << 24 | 1 << 22 | 5 << 16 | 1 << 6 | TRANSLATION, 0, 0);
        assert_eq!(mmio(&store), Some(Exit::MmioWrite { addr, width: AccessWidth::Word, data: 0x5678 }));
        // STR XZR.
        let zero = frame(0x24 << 26 | 1 << 24 | 3 << 22 | 31 << 16 | 1 << 15 | 1 << 6 | TRANSLATION, 0, 0);
        assert_eq!(mmio(&zero), Some(Exit::MmioWrite { addr, width: AccessWidth::Qword, data: 0 }));
        // LDR X5, at the end of a page and across it.
        let load = 0x24 << 26 | 1 << 24 | 3 << 22 | 5 << 16 | 1 << 15 | TRANSLATION;
        assert!(mmio(&frame(load, 0x7ff8, 0)).is_some());
        assert_eq!(mmio(&frame(load, 0x7ff9, 0)), None);
        // LDP and the like.
        assert_eq!(mmio(&frame(0x24 << 26 | TRANSLATION, 0, 0)), None);
        assert_eq!(mmio(&frame(0x20 << 26 | 1 << 24 | TRANSLATION, 0, 0)), None);
        assert_eq!(mmio(&frame(0x24 << 26 | 1 << 24 | 1 << 7 | TRANSLATION, 0, 0)), None);
    }
}
