// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest and its program see of the interrupt controller: how it is created, its registers, and whose they are.

use super::{expect, machine};
use crate::harness::{Case, CaseResult, Stop};
use crate::machine::{GICD, GICR, RAM};
use crate::{ensure_eq, gic_code, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{Gic, GIC_SET_SPI};
use axvcpu_uapi::client::{Apic, Errno, Error, Vm};
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason as Exit};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "gic/created-once-and-where-it-can-be" => created;
        "gic/says-what-it-is" => identity;
        "gic/registers-are-no-exits" => registers;
        "gic/undecoded-access-goes-to-the-program" => undecoded;
        "gic/state-survives-the-program" => survives;
    }
}

fn created() -> CaseResult {
    let system = crate::machine::open()?;
    let vm = system.create_vm()?;
    let good = Gic { distributor: GICD, redistributors: GICR, cpus: 2, flags: 0 };
    let refused = |vm: &Vm, gic, errno| -> CaseResult {
        ensure_eq!(vm.create_gic(gic), Err(Error::CreateGic(errno)), "{gic:x?}");
        Ok(())
    };
    let message = vm.signal_msi(GICD + GIC_SET_SPI, 40);
    ensure_eq!(message, Err(Error::SignalMsi(Errno::EOPNOTSUPP)), "a message without a GIC");
    refused(&vm, Gic { cpus: 0, ..good }, Errno::EINVAL)?;
    refused(&vm, Gic { cpus: 65, ..good }, Errno::EINVAL)?;
    refused(&vm, Gic { flags: 1, ..good }, Errno::EINVAL)?;
    refused(&vm, Gic { distributor: GICD + 0x1000, ..good }, Errno::EINVAL)?;
    refused(&vm, Gic { redistributors: GICD, ..good }, Errno::EINVAL)?;
    refused(&vm, Gic { redistributors: 0u64.wrapping_sub(0x1_0000), ..good }, Errno::EINVAL)?;
    let space = vm.create_address_space()?;
    let vcpu = |id| -> Result<_, Stop> {
        let mut vcpu = vm.create_vcpu(id)?;
        vcpu.set_entry(GuestPhysAddr::new(RAM))?;
        vcpu.set_ept_root(&space)?;
        Ok(vcpu)
    };
    let mut first = vcpu(0)?;
    ensure_eq!(first.setup(Apic::InKernel, &[]), Err(Error::Setup(Errno::ENODATA)), "set-up without a GIC");
    vm.create_gic(good)?;
    refused(&vm, good, Errno::EEXIST)?;
    first.setup(Apic::InKernel, &[])?;
    ensure_eq!(vcpu(2)?.setup(Apic::InKernel, &[]), Err(Error::Setup(Errno::EINVAL)), "no redistributor");
    for (address, intid) in [(GIC_SET_SPI, 31), (GIC_SET_SPI, 256), (0x50, 40)] {
        let message = vm.signal_msi(GICD + address, intid);
        ensure_eq!(message, Err(Error::SignalMsi(Errno::EINVAL)), "{intid} to {address:#x}");
    }
    Ok(())
}

fn identity() -> CaseResult {
    let code = gic_code!(
        identity,
        "ldr w1, [x20, #4]",
        "mov x9, #0xffe8",
        "ldr w2, [x20, x9]",
        "sub x9, x21, #0x10, lsl #12",
        "ldr x3, [x9, #8]",
        "mrs x4, id_aa64pfr0_el1",
        "mrs x5, icc_sre_el1",
        "mov x0, #0",
        "hvc #0"
    );
    let mut m = machine(code, &[])?;
    let [_, typer, pidr2, redistributor, pfr0, sre, _] = m.expect_call()?;
    ensure_eq!(typer & 31, 7, "256 INTIDs");
    ensure_eq!(pidr2 >> 4 & 15, 3, "GICv3");
    ensure_eq!(redistributor, 0, "vCPU 0 is not the last one");
    ensure_eq!((pfr0 >> 24 & 15, sre & 1), (1, 1), "the system registers are there");
    Ok(())
}

fn registers() -> CaseResult {
    // Enables, priorities by byte, configuration and routes of SPIs, read back.
    let code = gic_code!(
        registers,
        "mov w9, #0xa0",
        "strb w9, [x20, #0x429]",
        "ldr w1, [x20, #0x428]",
        "ldr w2, [x20, #0x104]",
        "mov w9, #0x300",
        "str w9, [x20, #0x184]",
        "ldr w3, [x20, #0x104]",
        "mov w9, #8",
        "str w9, [x20, #0xc08]",
        "ldr w4, [x20, #0xc08]",
        "mov x9, #0x6140",
        "mov x8, #3",
        "str x8, [x20, x9]",
        "ldr x5, [x20, x9]",
        "ldr w6, [x20]",
        "mov x0, #0",
        "hvc #0"
    );
    let mut m = machine(code, &[])?;
    let [_, priorities, enabled, fewer, config, route, control] = m.expect_call()?;
    ensure_eq!((priorities, enabled), (0xa000, 0xffff_ffff), "priority and enables");
    ensure_eq!((fewer, config, route), (0xffff_fcff, 8, 3), "enables, configuration, route");
    ensure_eq!(control, 0x52, "group 1 is on");
    Ok(())
}

fn undecoded() -> CaseResult {
    let mut m = machine(gic_code!(undecoded, "ldp x0, x1, [x20]", "hvc #0"), &[])?;
    m.expect(Exit::NestedPageFault { addr: GuestPhysAddr::new(GICD), access_flags: AccessFlags::READ })
}

fn survives() -> CaseResult {
    // The interface's registers are the vCPU's own: 0 as long as the program lets another one run between.
    let code = gic_code!(survives, "2: mrs x0, icc_pmr_el1", "hvc #0", "b 2b");
    let mut first = machine(code, &[])?;
    let other =
        gic_code!(survives_other, "mov x0, #0x40", "msr icc_pmr_el1, x0", "2: mrs x0, icc_pmr_el1", "hvc #0", "b 2b");
    let mut second = machine(other, &[])?;
    for _ in 0..20 {
        expect(&mut first, 0xf0, "the first one's mask")?;
        expect(&mut second, 0x40, "the second one's mask")?;
    }
    Ok(())
}
