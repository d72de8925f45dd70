// SPDX-License-Identifier: MIT OR Apache-2.0
//! Beside KVM: guests of both on the same CPUs at the same time, each of which checks that its registers, its memory, its
//! translations, its timer and its interrupts stay its own.

use super::watchful_code;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, CODE, DATA, GICD, GICR, HOLE, RAM, VECTORS};
use crate::{code, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{system_register, GIC_SET_SPI};
use axvcpu_uapi::client::{Backing, Memory};
use axvcpu_uapi::exit::{AccessWidth, AxVCpuExitReason as Exit};
use kvm_bindings::{
    kvm_create_device, kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, kvm_userspace_memory_region,
    kvm_vcpu_init, KVM_ARM_IRQ_TYPE_SHIFT, KVM_ARM_IRQ_TYPE_SPI, KVM_DEV_ARM_VGIC_CTRL_INIT, KVM_DEV_ARM_VGIC_GRP_ADDR,
    KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_VGIC_V3_ADDR_TYPE_DIST, KVM_VGIC_V3_ADDR_TYPE_REDIST,
};
use kvm_ioctls::{DeviceFd, Kvm, VcpuExit, VcpuFd, VmFd};
use nix::sys::pthread::pthread_kill;
use nix::sys::signal::{sigaction, SaFlags, SigAction, SigHandler, SigSet, Signal};
use std::os::unix::thread::JoinHandleExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "kvm/guests-of-both-on-the-same-cpus" => both, in 60;
        "kvm/beside-guests-that-fault" => faults, in 60;
        "kvm/interrupts-and-timers-of-both" => interrupts, in 60;
    }
}

/// Fills registers with X1, waits, and counts in X9 how often they were still what they must be. The word at DATA
/// must be X1 too. Then a write to HOLE: the count; a mismatch is told at HOLE + 8.
fn guard() -> &'static [u8] {
    watchful_code!(
        guard,
        "movz x10, #0x4010, lsl #16",
        "movz x11, #0x0900, lsl #16",
        "str x1, [x10]",
        "2: msr tpidr_el1, x1",
        "msr tpidr_el0, x1",
        "msr contextidr_el1, x1",
        "msr afsr0_el1, xzr",
        "msr far_el1, x1",
        "msr mair_el1, x1",
        "dup v7.2d, x1",
        "mov x3, #100",
        "3: subs x3, x3, #1",
        "b.ne 3b",
        "same mrs, tpidr_el1",
        "same mrs, tpidr_el0",
        "same mrs, far_el1",
        "same mrs, mair_el1",
        "same umov, v7.d[1]",
        "same ldr, [x10]",
        "add x9, x9, #1",
        "str x9, [x11]",
        "b 2b",
        "4: str x2, [x11, #8]",
        "b 4b"
    )
}

/// A [`gic_code!`] that goes round with a tick of its timer, which is X6 counts after the last, an SGI that it sends itself, and
/// SPI 40, an edge, that comes from outside. X7, X14 and X15 count them, X8 rounds. Then a write to HOLE: the rounds. The first
/// such write, of 0, is one before all rounds. If the
/// registers that X1 was put into do not have it any more, that is told at HOLE + 8.
fn interrupted() -> &'static [u8] {
    watchful_code!(
        gic_code! interrupted,
        "movz x11, #0x0900, lsl #16",
        "movz w9, #2, lsl #16",
        "str w9, [x20, #0xc08]",
        "mov x7, #0",
        "mov x8, #0",
        "mov x14, #0",
        "mov x15, #0",
        "mrs x6, cntfrq_el0",
        "mov x9, #500",
        "udiv x6, x6, x9",
        "mrs x9, cntvct_el0",
        "msr cntv_cval_el0, x9",
        "mov x9, #1",
        "msr cntv_ctl_el0, x9",
        "isb",
        "msr daifclr, #2",
        // Ready.
        "str x8, [x11]",
        "2: add x8, x8, #1",
        "msr tpidr_el1, x1",
        "msr contextidr_el1, x1",
        "dup v7.2d, x1",
        // A tick, waited for.
        "3: wfi",
        "cmp x7, x8",
        "b.lt 3b",
        // An SGI.
        "movz x9, #0x0300, lsl #16",
        "movk x9, #1",
        "msr icc_sgi1r_el1, x9",
        "isb",
        "6: cmp x14, x8",
        "b.lt 6b",
        // The SPI.
        "5: cmp x15, x8",
        "b.lt 5b",
        "same mrs, tpidr_el1",
        "same mrs, contextidr_el1",
        "same umov, v7.d[1]",
        "mrs x2, icc_pmr_el1",
        "cmp x2, #0xf0",
        "b.ne 4f",
        // As many as there were, and no more.
        "mov x2, x14",
        "cmp x14, x8",
        "b.ne 4f",
        "mov x2, x15",
        "cmp x15, x8",
        "b.ne 4f",
        "str x8, [x11]",
        "b 2b",
        "4: str x2, [x11, #8]",
        "b 4b"
    )
}

/// What takes the interrupts of [`interrupted`].
fn handler() -> &'static [u8] {
    code!(
        handler,
        "mrs x10, icc_iar1_el1",
        "cmp x10, #27",
        "b.eq 2f",
        "cmp x10, #40",
        "cinc x15, x15, eq",
        "cinc x14, x14, ne",
        "b 3f",
        "2: mrs x12, cntvct_el0",
        "add x12, x12, x6",
        "msr cntv_cval_el0, x12",
        "isb",
        "add x7, x7, #1",
        "3: msr icc_eoir1_el1, x10",
        "isb",
        "eret"
    )
}

/// A guest of KVM's that runs the same code at the same addresses.
struct KvmGuest {
    vcpu: VcpuFd,
    vm: VmFd,
    _gic: Option<DeviceFd>,
    /// Outlives the VM.
    _ram: Memory,
}

/// KVM's number of a core register: the offset in `struct user_pt_regs` in words of 32 bits (KVM API, section 4.68).
const fn core_register(offset: u64) -> u64 {
    0x6030_0000_0010_0000 | offset / 4
}

/// An error of KVM's.
fn failed(what: &str, error: kvm_ioctls::Error) -> Stop {
    Stop::Fail(format!("KVM: {what}: {error}"))
}

impl KvmGuest {
    /// A guest that has `mark` in X1 and is about to run `code`; with a GIC if `with_gic`.
    fn new(mark: u64, code: &[u8], with_gic: bool) -> Result<Self, Stop> {
        let kvm = Kvm::new().map_err(|_| Stop::Skip("there is no KVM beside us".into()))?;
        let vm = kvm.create_vm().map_err(|error| failed("VM", error))?;
        let ram = Memory::anonymous(4 << 20)?;
        ram.write((CODE - RAM) as usize, code)?;
        ram.write((VECTORS + 0x280 - RAM) as usize, handler())?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: RAM,
            memory_size: 4 << 20,
            userspace_addr: ram.start().as_ptr() as u64,
            flags: 0,
        };
        // SAFETY: the memory is the guest's alone and outlives the VM.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| failed("memory", error))?;
        let vcpu = vm.create_vcpu(0).map_err(|error| failed("vCPU", error))?;
        let mut target = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut target).map_err(|error| failed("target", error))?;
        vcpu.vcpu_init(&target).map_err(|error| failed("vCPU set-up", error))?;
        let set = |offset, value: u64| {
            vcpu.set_one_reg(core_register(offset), &value.to_le_bytes()).map_err(|error| failed("register", error))
        };
        set(8, mark)?; // X1
        set(8 * 9, 0)?; // X9
        set(256, CODE)?; // PC
        let set_system = |register: u64, value: u64| {
            let number = 0x6030_0000_0013_0000 | register;
            vcpu.set_one_reg(number, &value.to_le_bytes()).map_err(|error| failed("system register", error))
        };
        set_system(system_register(3, 0, 1, 0, 2), 3 << 20)?; // CPACR_EL1: SIMD and floating point
        set_system(system_register(3, 0, 12, 0, 0), VECTORS)?; // VBAR_EL1
        let gic = if with_gic { Some(Self::gic(&vm)?) } else { None };
        Ok(Self { vcpu, vm, _gic: gic, _ram: ram })
    }

    /// Gives the VM, whose vCPUs are there, its interrupt controller (KVM: devices/arm-vgic-v3).
    fn gic(vm: &VmFd) -> Result<DeviceFd, Stop> {
        let mut what = kvm_create_device { type_: kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3, fd: 0, flags: 0 };
        let device = vm.create_device(&mut what).map_err(|error| failed("GIC", error))?;
        let set = |group, attr: u32, value: Option<&u64>| {
            let addr = value.map_or(0, |value| std::ptr::from_ref(value) as u64);
            let attr = kvm_device_attr { group, attr: attr.into(), addr, flags: 0 };
            device.set_device_attr(&attr).map_err(|error| failed("GIC", error))
        };
        set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_DIST, Some(&GICD))?;
        set(KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_VGIC_V3_ADDR_TYPE_REDIST, Some(&GICR))?;
        set(KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT, None)?;
        Ok(device)
    }

    /// Makes SPI 40, an edge, pending.
    fn pulse(&self) -> CaseResult {
        let spi = KVM_ARM_IRQ_TYPE_SPI << KVM_ARM_IRQ_TYPE_SHIFT | 40;
        for high in [true, false] {
            self.vm.set_irq_line(spi, high).map_err(|error| failed("SPI", error))?;
        }
        Ok(())
    }

    /// Runs to the next write to device memory, which must be the count `expected`.
    fn round(&mut self, expected: u64) -> CaseResult {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::MmioWrite(addr, data)) => {
                    let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
                    ensure_eq!((addr, value), (HOLE, expected), "KVM's guest");
                    return Ok(());
                }
                Ok(other) => return Err(Stop::Fail(format!("KVM's guest: {other:?}"))),
                Err(error) if error.errno() == nix::libc::EINTR => harness::check_time()?,
                Err(error) => return Err(failed("run", error)),
            }
        }
    }
}

/// Runs two guests of KVM's on threads of their own, with interrupts if `with_gic`, while `ours` runs here: each `least` rounds or more.
fn beside(with_gic: bool, least: u64, mut ours: impl FnMut(u64) -> CaseResult) -> CaseResult {
    extern "C" fn nothing(_: i32) {}
    let interrupts = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, and nobody else has one for this signal.
    unsafe { sigaction(Signal::SIGUSR1, &interrupts) }?;
    let stop = Arc::new(AtomicBool::new(false));
    let mut threads = Vec::new();
    for mark in [0xaaaa, 0xbbbb] {
        let mut guest = KvmGuest::new(mark, if with_gic { interrupted() } else { guard() }, with_gic)?;
        let (stop, done) = (Arc::clone(&stop), Arc::new(AtomicU64::new(0)));
        let rounds = Arc::clone(&done);
        let thread = std::thread::spawn(move || -> CaseResult {
            if with_gic {
                guest.round(0)?;
            }
            while !stop.load(Ordering::Relaxed) {
                harness::check_time()?;
                if with_gic {
                    guest.pulse()?;
                }
                guest.round(done.load(Ordering::Relaxed) + 1)?;
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        threads.push((thread, rounds));
    }
    let until = Instant::now() + Duration::from_secs(4);
    let mut rounds = 0;
    let mut result = Ok(());
    // For some time, and as long as it takes on a busy machine; a guest that does not come on is out of time.
    while result.is_ok()
        && threads.iter().all(|(thread, _)| !thread.is_finished())
        && (Instant::now() < until
            || rounds < least
            || threads.iter().any(|(_, rounds)| rounds.load(Ordering::Relaxed) < least))
    {
        rounds += 1;
        result = ours(rounds);
    }
    stop.store(true, Ordering::Relaxed);
    for (thread, _) in threads {
        // One that does not come back looks at the time.
        while !thread.is_finished() {
            pthread_kill(thread.as_pthread_t(), Signal::SIGUSR1)?;
            std::thread::sleep(Duration::from_millis(20));
        }
        harness::joined(thread.join())??;
    }
    result
}

fn both() -> CaseResult {
    let mut machine = Machine::new(guard())?;
    machine.modify(|general| general.x[1] = 0xcccc)?;
    beside(false, 100, |round| machine.expect(told(round)))
}

/// The exit by which a guest tells its rounds.
fn told(rounds: u64) -> Exit {
    Exit::MmioWrite { addr: GuestPhysAddr::new(HOLE), width: AccessWidth::Qword, data: rounds }
}

/// Interrupts of every kind on both sides, whose list registers and timers take turns in the same CPUs.
fn interrupts() -> CaseResult {
    let mut machine = Machine::with_gic(interrupted())?;
    machine.write(VECTORS + 0x280, handler())?;
    machine.modify(|general| general.x[1] = 0xcccc)?;
    machine.expect(told(0))?;
    beside(true, 20, |round| {
        machine.vm.signal_msi(GICD + GIC_SET_SPI, 40)?;
        machine.expect(told(round))
    })
}

/// Each round with its page of memory anew, so that both sides' translations change all the time.
fn faults() -> CaseResult {
    let code = code!(
        faults,
        "movz x10, #0x4010, lsl #16",
        "2: ldr x0, [x10]",
        "str x1, [x10]",
        "ldr x2, [x10]",
        "hvc #0",
        "b 2b"
    );
    let mut machine = Machine::new(code)?;
    machine.modify(|general| general.x[1] = 0xdddd)?;
    beside(false, 100, |round| {
        let [before, _, after, ..] = machine.expect_call()?;
        ensure_eq!((before, after), (0, 0xdddd), "round {round}");
        ensure_eq!(machine.read_u64(DATA)?, 0xdddd, "round {round}");
        machine.ram.discard((DATA - RAM) as usize, 0x1000)?;
        Ok(())
    })
}
