// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interrupt controller: what a guest sees of it, and which interrupts reach it when.
//!
//! The guests begin with [`gic_code!`], which readies the vCPU's part of the controller, and take interrupts with [`HANDLER`].

use crate::gic_code;
use crate::harness::{self, Case, CaseResult, Stop};
use crate::machine::{Machine, GICD, GICR, RAM, VECTORS};
use crate::pin::{pin, Allowed, SELF};
use crate::{code, ensure, ensure_eq, table};
use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::arm64::{Gic, GIC_CLEAR_SPI, GIC_SET_SPI};
use axvcpu_uapi::client::{Apic, Errno, Error, Vm};
use axvcpu_uapi::exit::{AccessFlags, AxVCpuExitReason as Exit};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "gic/created-once-and-where-it-can-be" => created;
        "gic/says-what-it-is" => identity;
        "gic/registers-are-no-exits" => registers;
        "gic/undecoded-access-goes-to-the-program" => undecoded;
        "gic/spi-interrupts-a-running-guest" => running;
        "gic/spi-wakes-a-waiting-guest" => waiting;
        "gic/masked-interrupt-ends-wfi" => masked_wfi;
        "gic/level-stays-until-it-is-cleared" => level;
        "gic/edge-comes-once" => edge;
        "gic/disabled-interrupts-wait" => disabled;
        "gic/best-priority-first" => priorities;
        "gic/priority-mask-and-preemption" => preemption;
        "gic/more-than-list-registers" => many;
        "gic/more-active-than-list-registers" => many_active;
        "gic/group-0-is-fiq" => fiq;
        "gic/eventfd" => eventfd_edge;
        "gic/eventfd-resampled" => eventfd_level;
        "gic/moves-with-the-vcpu" => moves;
        "gic/state-survives-the-program" => survives;
    }
}

/// What interrupts are handled with: X10 is the INTID. `HVC` behind the acknowledgement and behind the end.
fn handler() -> &'static [u8] {
    code!(
        handler,
        "mrs x10, icc_iar1_el1",
        "mov x0, x10",
        "hvc #1",
        "msr icc_eoir1_el1, x10",
        "isb",
        "mov x0, #0xe0d",
        "hvc #2",
        "eret"
    )
}

/// X0 at the second `HVC` of the handler.
const END: u64 = 0xe0d;

/// A machine with a GIC, that is about to run `code` with the handler in place.
fn machine(code: &[u8]) -> Result<Machine, Stop> {
    let machine = Machine::with_gic(code)?;
    machine.write(VECTORS + 0x280, handler())?;
    Ok(machine)
}

fn set(machine: &Machine, intid: u32) -> CaseResult {
    Ok(machine.vm.signal_msi(GICD + GIC_SET_SPI, intid)?)
}

fn clear(machine: &Machine, intid: u32) -> CaseResult {
    Ok(machine.vm.signal_msi(GICD + GIC_CLEAR_SPI, intid)?)
}

/// Runs to the next hypercall, whose X0 must be `expected`.
fn expect(machine: &mut Machine, expected: u64, what: &str) -> CaseResult {
    let [found, ..] = machine.expect_call()?;
    ensure_eq!(found, expected, "{what}");
    Ok(())
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
    let mut m = machine(code)?;
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
    let mut m = machine(code)?;
    let [_, priorities, enabled, fewer, config, route, control] = m.expect_call()?;
    ensure_eq!((priorities, enabled), (0xa000, 0xffff_ffff), "priority and enables");
    ensure_eq!((fewer, config, route), (0xffff_fcff, 8, 3), "enables, configuration, route");
    ensure_eq!(control, 0x52, "group 1 is on");
    Ok(())
}

fn undecoded() -> CaseResult {
    let mut m = machine(gic_code!(undecoded, "ldp x0, x1, [x20]", "hvc #0"))?;
    m.expect(Exit::NestedPageFault { addr: GuestPhysAddr::new(GICD), access_flags: AccessFlags::READ })
}

fn running() -> CaseResult {
    let mut m = machine(gic_code!(running, "msr daifclr, #2", "mov x0, #7", "hvc #0", "2: b 2b"))?;
    expect(&mut m, 7, "the guest is ready")?;
    for round in 0..20 {
        let vm = m.vm.clone();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(3));
            vm.signal_msi(GICD + GIC_SET_SPI, 40)
        });
        expect(&mut m, 40, &format!("round {round}"))?;
        join(thread)??;
        clear(&m, 40)?;
        expect(&mut m, END, "its end")?;
    }
    Ok(())
}

fn join<T>(thread: thread::JoinHandle<T>) -> Result<T, Stop> {
    harness::joined(thread.join())
}

/// Waits until the vCPU sleeps in the kernel, and then does something.
fn when_asleep(m: &Machine, then: impl FnOnce() -> CaseResult + Send + 'static) -> thread::JoinHandle<CaseResult> {
    let kicker = m.vcpu.kicker();
    thread::spawn(move || {
        // State 4: blocked.
        harness::wait_until("the vCPU to sleep", || Ok(kicker.stats()?.state == 4))?;
        then()
    })
}

fn waiting() -> CaseResult {
    let code = gic_code!(waiting, "msr daifclr, #2", "2: wfi", "mov x0, #9", "hvc #0", "b 2b");
    let mut m = machine(code)?;
    for _ in 0..5 {
        let vm = m.vm.clone();
        let thread = when_asleep(&m, move || Ok(vm.signal_msi(GICD + GIC_SET_SPI, 40)?));
        expect(&mut m, 40, "the interrupt first")?;
        join(thread)??;
        clear(&m, 40)?;
        expect(&mut m, END, "its end")?;
        expect(&mut m, 9, "then WFI ends")?;
    }
    Ok(())
}

fn masked_wfi() -> CaseResult {
    let code = gic_code!(masked_wfi, "wfi", "mrs x1, icc_hppir1_el1", "mrs x2, isr_el1", "mov x0, #9", "hvc #0");
    let mut m = machine(code)?;
    let vm = m.vm.clone();
    let thread = when_asleep(&m, move || Ok(vm.signal_msi(GICD + GIC_SET_SPI, 40)?));
    let [nr, highest, status, ..] = m.expect_call()?;
    join(thread)??;
    ensure_eq!((nr, highest, status), (9, 40, 1 << 7), "pending, but not taken");
    Ok(())
}

fn level() -> CaseResult {
    let mut m = machine(gic_code!(level, "msr daifclr, #2", "mov x0, #7", "hvc #0", "2: b 2b"))?;
    expect(&mut m, 7, "the guest is ready")?;
    set(&m, 40)?;
    for round in 0..5 {
        expect(&mut m, 40, &format!("round {round}"))?;
        expect(&mut m, END, "its end, with the line up")?;
    }
    clear(&m, 40)?;
    nothing_comes(&mut m)
}

/// The guest, which spins, is not interrupted.
fn nothing_comes(m: &mut Machine) -> CaseResult {
    let kicker = m.vcpu.kicker();
    let thread = thread::spawn(move || {
        thread::sleep(Duration::from_millis(30));
        kicker.kick()
    });
    m.expect(Exit::Interrupted)?;
    Ok(join(thread)??)
}

fn edge() -> CaseResult {
    // SPI 40 is bit pair 8 of the third word.
    let code = gic_code!(
        edge,
        "movz w9, #2, lsl #16",
        "str w9, [x20, #0xc08]",
        "msr daifclr, #2",
        "mov x0, #7",
        "hvc #0",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    expect(&mut m, 7, "the guest is ready")?;
    set(&m, 40)?;
    set(&m, 40)?;
    expect(&mut m, 40, "both as one")?;
    // While it is active, another one waits.
    set(&m, 40)?;
    expect(&mut m, END, "the first one's end")?;
    expect(&mut m, 40, "the next")?;
    expect(&mut m, END, "its end")?;
    nothing_comes(&mut m)
}

fn disabled() -> CaseResult {
    // Disabled one by one: at the distributor, at the group, at the interface.
    let code = gic_code!(
        disabled,
        "mov w9, #0x100",
        "str w9, [x20, #0x184]",
        "msr daifclr, #2",
        "mov x0, #1",
        "hvc #0",
        "mrs x0, isr_el1",
        "hvc #0",
        "msr icc_igrpen1_el1, xzr",
        "mov w9, #0x100",
        "str w9, [x20, #0x104]",
        "isb",
        "mrs x0, isr_el1",
        "hvc #0",
        "str wzr, [x20]",
        "mov x9, #1",
        "msr icc_igrpen1_el1, x9",
        "isb",
        "mrs x0, isr_el1",
        "hvc #0",
        "mov w9, #2",
        "str w9, [x20]",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    expect(&mut m, 1, "the guest is ready")?;
    set(&m, 40)?;
    expect(&mut m, 0, "disabled")?;
    expect(&mut m, 0, "its group is off at the interface")?;
    expect(&mut m, 0, "its group is off at the distributor")?;
    expect(&mut m, 40, "at last")?;
    clear(&m, 40)?;
    expect(&mut m, END, "its end")
}

fn priorities() -> CaseResult {
    // 41 at 0x80, 42 at 0x20, 43 at 0x40, 40 at 0xa0; all pending at once.
    let code = gic_code!(
        priorities,
        "movz w9, #0x80a0",
        "movk w9, #0x4020, lsl #16",
        "str w9, [x20, #0x428]",
        "mov w9, #0xf00",
        "str w9, [x20, #0x204]",
        "mov w9, #0xa8",
        "movk w9, #0xaa, lsl #16",
        "str w9, [x20, #0xc08]",
        "msr daifclr, #2",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    // Written to GICD_ISPENDR, they are latched.
    for intid in [42, 43, 41, 40] {
        expect(&mut m, intid, "the next best")?;
        expect(&mut m, END, "its end")?;
    }
    nothing_comes(&mut m)
}

fn preemption() -> CaseResult {
    // The handler lets better ones in.
    let nested = code!(
        nested,
        "mrs x10, icc_iar1_el1",
        "mrs x11, elr_el1",
        "mrs x12, spsr_el1",
        "stp x10, x11, [sp, #-32]!",
        "str x12, [sp, #16]",
        "msr daifclr, #2",
        "mov x0, x10",
        "hvc #1",
        "msr daifset, #2",
        "ldr x12, [sp, #16]",
        "ldp x10, x11, [sp], #32",
        "msr elr_el1, x11",
        "msr spsr_el1, x12",
        "msr icc_eoir1_el1, x10",
        "isb",
        "orr x0, x10, #0x1000",
        "hvc #2",
        "eret"
    );
    // 40 at 0xa0, 41 at 0x80, 42 at 0xf0, which the mask keeps out; edges.
    let code = gic_code!(
        preemption,
        "movz w9, #0x80a0",
        "movk w9, #0xf0, lsl #16",
        "str w9, [x20, #0x428]",
        "movz w9, #0x2a, lsl #16",
        "str w9, [x20, #0xc08]",
        "msr daifclr, #2",
        "mov x0, #7",
        "hvc #0",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    m.write(VECTORS + 0x280, nested)?;
    expect(&mut m, 7, "the guest is ready")?;
    set(&m, 42)?;
    nothing_comes(&mut m)?;
    set(&m, 40)?;
    expect(&mut m, 40, "the first")?;
    set(&m, 40)?;
    set(&m, 41)?;
    expect(&mut m, 41, "a better one")?;
    expect(&mut m, 0x1000 | 41, "whose end comes first")?;
    expect(&mut m, 0x1000 | 40, "the first one's end")?;
    expect(&mut m, 40, "once more")?;
    expect(&mut m, 0x1000 | 40, "its end")?;
    nothing_comes(&mut m)
}

fn many() -> CaseResult {
    // SPIs 33 to 63 at priorities that fall with the number, all pending, edges.
    let code = gic_code!(
        many,
        "mov w9, #-1",
        "str w9, [x20, #0xc08]",
        "str w9, [x20, #0xc0c]",
        "add x8, x20, #0x421",
        "mov w9, #30",
        "3: lsl w7, w9, #3",
        "strb w7, [x8]",
        "add x8, x8, #1",
        "subs w9, w9, #1",
        "b.ge 3b",
        "mov w9, #0xf8",
        "msr icc_pmr_el1, x9",
        "mov w9, #-2",
        "str w9, [x20, #0x204]",
        "msr daifclr, #2",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    for intid in (33..64).rev() {
        expect(&mut m, intid, "the next best")?;
        expect(&mut m, END, "its end")?;
    }
    nothing_comes(&mut m)
}

fn many_active() -> CaseResult {
    // With EOImode 1 all 20 are acknowledged and dropped, then deactivated in another order than they came.
    let code = gic_code!(
        many_active,
        "mov x9, #2",
        "msr icc_ctlr_el1, x9",
        "mov w9, #-1",
        "str w9, [x20, #0xc08]",
        "str w9, [x20, #0xc0c]",
        "mov w9, #0xfffff",
        "str w9, [x20, #0x204]",
        "mov x8, #20",
        "3: mrs x7, icc_iar1_el1",
        "cmp x7, #1020",
        "b.hs 3b",
        "msr icc_eoir1_el1, x7",
        "isb",
        "subs x8, x8, #1",
        "b.ne 3b",
        "ldr w1, [x20, #0x304]",
        "ldr w2, [x20, #0x204]",
        "mov x8, #20",
        // (7 * n) modulo 20, for n from 20 down to 1.
        "4: mov x9, #7",
        "mul x9, x9, x8",
        "mov x7, #20",
        "udiv x6, x9, x7",
        "msub x9, x6, x7, x9",
        "add x9, x9, #32",
        "msr icc_dir_el1, x9",
        "isb",
        "cmp x8, #11",
        "b.ne 5f",
        "ldr w3, [x20, #0x304]",
        "5: subs x8, x8, #1",
        "b.ne 4b",
        "ldr w4, [x20, #0x304]",
        "mrs x5, icc_iar1_el1",
        "mov x0, #0",
        "hvc #0"
    );
    let mut m = machine(code)?;
    let [_, active, pending, half, none, spurious, _] = m.expect_call()?;
    ensure_eq!((active, pending), (0xf_ffff, 0), "all are active");
    let gone = (11..=20).fold(0u64, |word, n| word | 1 << (7 * n % 20));
    ensure_eq!(half, 0xf_ffff & !gone, "half of them");
    ensure_eq!((none, spurious), (0, 1023), "none");
    Ok(())
}

fn fiq() -> CaseResult {
    let code = gic_code!(
        fiq,
        "str wzr, [x20, #0x84]",
        "mov w9, #3",
        "str w9, [x20]",
        "mov x9, #1",
        "msr icc_igrpen0_el1, x9",
        "msr daifclr, #1",
        "mov x0, #7",
        "hvc #0",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    // FIQ from EL1 with SP_EL1.
    let taken = code!(taken, "mrs x0, icc_iar0_el1", "hvc #0", "msr icc_eoir0_el1, x0", "eret");
    m.write(VECTORS + 0x300, taken)?;
    expect(&mut m, 7, "the guest is ready")?;
    set(&m, 40)?;
    expect(&mut m, 40, "by FIQ")
}

fn eventfd() -> Result<EventFd, Stop> {
    Ok(EventFd::from_value_and_flags(0, EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?)
}

fn eventfd_edge() -> CaseResult {
    let code =
        gic_code!(eventfd_edge, "movz w9, #2, lsl #16", "str w9, [x20, #0xc08]", "msr daifclr, #2", "2: wfi", "b 2b");
    let mut m = machine(code)?;
    let event = eventfd()?;
    let bad = m.vm.attach_interrupt(&event, GICD, 40, None);
    ensure_eq!(bad, Err(Error::AttachInterrupt(Errno::EINVAL)), "no message");
    m.vm.attach_interrupt(&event, GICD + GIC_SET_SPI, 40, None)?;
    for _ in 0..5 {
        let signal = event.as_fd().try_clone_to_owned()?;
        let thread = when_asleep(&m, move || {
            nix::unistd::write(signal, &1u64.to_ne_bytes())?;
            Ok(())
        });
        expect(&mut m, 40, "the eventfd's interrupt")?;
        join(thread)??;
        expect(&mut m, END, "its end")?;
    }
    Ok(())
}

fn eventfd_level() -> CaseResult {
    let mut m = machine(gic_code!(eventfd_level, "msr daifclr, #2", "mov x0, #7", "hvc #0", "2: b 2b"))?;
    let (event, resample) = (eventfd()?, eventfd()?);
    m.vm.attach_interrupt(&event, GICD + GIC_SET_SPI, 40, Some(resample.as_fd()))?;
    expect(&mut m, 7, "the guest is ready")?;
    event.write(1)?;
    for round in 0..4 {
        expect(&mut m, 40, &format!("round {round}"))?;
        ensure_eq!(resample.read().err(), Some(nix::errno::Errno::EAGAIN), "not before its end");
        expect(&mut m, END, "its end")?;
        // The end is told with the maintenance interrupt, at the latest.
        nothing_comes(&mut m)?;
        ensure_eq!(resample.read()?, 1, "resampled");
        event.write(1)?;
    }
    Ok(())
}

fn moves() -> CaseResult {
    // An active interrupt goes with the vCPU, and so does the one that waits.
    let code = gic_code!(
        moves,
        "mov w9, #0x80",
        "strb w9, [x20, #0x429]",
        "msr daifclr, #2",
        "mov x0, #7",
        "hvc #0",
        "2: b 2b"
    );
    let mut m = machine(code)?;
    let allowed = Allowed::several()?;
    expect(&mut m, 7, "the guest is ready")?;
    set(&m, 41)?;
    for cpu in allowed.cpus.iter().cycle().take(40) {
        set(&m, 40)?;
        expect(&mut m, 40, "acknowledged on one CPU")?;
        pin(SELF, *cpu)?;
        clear(&m, 40)?;
        expect(&mut m, END, "ended on another")?;
        expect(&mut m, 41, "the other one")?;
        expect(&mut m, END, "and its end")?;
    }
    ensure!(m.vcpu.stats()?.migrations >= 10, "it has not moved");
    Ok(())
}

fn survives() -> CaseResult {
    // The interface's registers are the vCPU's own: 0 as long as the program lets another one run between.
    let code = gic_code!(survives, "2: mrs x0, icc_pmr_el1", "hvc #0", "b 2b");
    let mut first = machine(code)?;
    let other =
        gic_code!(survives_other, "mov x0, #0x40", "msr icc_pmr_el1, x0", "2: mrs x0, icc_pmr_el1", "hvc #0", "b 2b");
    let mut second = machine(other)?;
    for _ in 0..20 {
        expect(&mut first, 0xf0, "the first one's mask")?;
        expect(&mut second, 0x40, "the second one's mask")?;
    }
    Ok(())
}
