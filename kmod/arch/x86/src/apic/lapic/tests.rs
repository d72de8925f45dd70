// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The local APIC's rules, register by register; and its priorities against a naive model.

mod model;

use std::collections::BTreeSet;
use std::vec::Vec;

use super::*;
use crate::apic::{reg, Delivery, Message, Shorthand, MSR_TSC_DEADLINE};
use crate::testing::TestHal;
use axvcpu_uapi::x86::LocalApic;

const FAULT: GuestResult<Effect> = Err(GeneralProtection);
const OK: GuestResult<Effect> = Ok(Effect::None);

fn at(now_ns: u64) -> impl Fn() -> Clock {
    move || Clock { now_ns, tsc: now_ns * 2, tsc_khz: 2_000_000 }
}

/// No access that is not to the timer may cost a look at the clocks.
fn no_clock() -> Clock {
    panic!("the clocks were read")
}

/// The CPU takes an interrupt, if there is one for it.
fn take(lapic: &mut Lapic) -> Option<u8> {
    let vector = lapic.pending_vector()?;
    lapic.acknowledge(vector);
    Some(vector)
}

fn config(id: u32) -> Config {
    Config { id, boot_processor: id == 0, x2apic: true, tsc_deadline: true }
}

type Lapic = super::Lapic<TestHal>;
type Mailbox = super::Mailbox<TestHal>;

fn new(config: Config) -> Lapic {
    Lapic::new(config).unwrap()
}

/// Everything that an APIC keeps, to be compared.
fn contents(lapic: &Lapic) -> (Vec<u32>, u64, u32, Timer) {
    let page = (0u16..0x1000).step_by(4).map(|offset| lapic.registers.get(offset)).collect();
    (page, lapic.base(), lapic.errors, lapic.timer.clone())
}

/// Enabled, in xAPIC mode, everything masked.
fn xapic(id: u32) -> Lapic {
    let mut lapic = new(Config { boot_processor: false, ..config(id) });
    lapic.write_page(reg::SVR, 0x1ff, &no_clock);
    lapic
}

/// Enabled, in x2APIC mode.
fn x2apic(id: u32) -> Lapic {
    let mut lapic = xapic(id);
    lapic.set_base(0xfee0_0c00).unwrap();
    lapic
}

const fn msr(offset: u16) -> u32 {
    0x800 + (offset / 16) as u32
}

/// Posts vectors and collects them.
fn post(lapic: &mut Lapic, vectors: &[(u8, bool)]) -> Posted {
    let mailbox = Mailbox::new();
    for (vector, level) in vectors {
        mailbox.post_interrupt(*vector, *level);
    }
    lapic.collect(&mailbox, &no_clock)
}

#[test]
fn reset_state_is_that_of_the_manual() {
    let mut lapic = new(Config { boot_processor: false, ..config(3) });
    for (offset, value) in [
        (reg::ID, 3 << 24),
        (reg::VERSION, 0x0005_0014),
        (reg::TPR, 0),
        (reg::PPR, 0),
        (reg::LDR, 0),
        (reg::DFR, u32::MAX),
        (reg::SVR, 0xff),
        (reg::ESR, 0),
        (reg::ICR, 0),
        (reg::ICR_HIGH, 0),
        (reg::LVT_TIMER, 0x1_0000),
        (reg::LVT_THERMAL, 0x1_0000),
        (reg::LVT_PERFORMANCE, 0x1_0000),
        (reg::LVT_LINT0, 0x1_0000),
        (reg::LVT_LINT1, 0x1_0000),
        (reg::LVT_ERROR, 0x1_0000),
        (reg::INITIAL_COUNT, 0),
        (reg::CURRENT_COUNT, 0),
        (reg::DIVIDE, 0),
    ] {
        assert_eq!(lapic.read_page(offset, &at(0)), value, "{offset:#x}");
    }
    assert_eq!(lapic.base(), 0xfee0_0800);
    assert!(!lapic.accepts_pic_interrupt());
}

#[test]
fn boot_processor_starts_in_virtual_wire_mode() {
    let lapic = new(config(0));
    assert_eq!(lapic.base(), 0xfee0_0900);
    assert!(lapic.accepts_pic_interrupt());
    assert!(lapic.identity().enabled);
}

#[test]
fn pic_interrupts_come_through_lint0() {
    let mut lapic = xapic(0);
    for (value, accepts) in [(0x700, true), (0x1_0700, false), (0x400, false), (0x31, false)] {
        lapic.write_page(reg::LVT_LINT0, value, &no_clock);
        assert_eq!(lapic.accepts_pic_interrupt(), accepts, "{value:#x}");
    }
    lapic.write_page(reg::LVT_LINT0, 0x700, &no_clock);
    lapic.write_page(reg::SVR, 0xff, &at(0));
    assert!(!lapic.accepts_pic_interrupt(), "disabled by software: masked");
    lapic.set_base(0xfee0_0000).unwrap();
    assert!(lapic.accepts_pic_interrupt(), "switched off: transparent");
}

#[test]
fn software_disable_masks_every_entry_and_keeps_them_masked() {
    let mut lapic = xapic(0);
    let entries = (reg::LVT_TIMER..=reg::LVT_ERROR).step_by(16);
    for offset in entries.clone() {
        lapic.write_page(offset, 0x31, &at(0));
        assert_eq!(lapic.read_page(offset, &no_clock), 0x31);
    }
    lapic.write_page(reg::SVR, 0xff, &at(0));
    for offset in entries.clone() {
        assert_eq!(lapic.read_page(offset, &no_clock), 0x1_0031);
        lapic.write_page(offset, 0x32, &at(0));
        assert_eq!(lapic.read_page(offset, &no_clock), 0x1_0032);
    }
    lapic.write_page(reg::SVR, 0x1ff, &at(0));
    for offset in entries {
        assert_eq!(lapic.read_page(offset, &no_clock), 0x1_0032, "enabling unmasks nothing");
    }
}

#[test]
fn lvt_entries_keep_only_their_bits() {
    let mut lapic = xapic(0);
    for (offset, bits) in [
        (reg::LVT_TIMER, 0x7_00ff),
        (reg::LVT_THERMAL, 0x1_07ff),
        (reg::LVT_PERFORMANCE, 0x1_07ff),
        (reg::LVT_LINT0, 0x1_a7ff),
        (reg::LVT_LINT1, 0x1_a7ff),
        (reg::LVT_ERROR, 0x1_00ff),
    ] {
        lapic.write_page(offset, u32::MAX, &at(0));
        assert_eq!(lapic.read_page(offset, &no_clock), bits, "{offset:#x}");
    }
    let mut lapic = new(Config { tsc_deadline: false, ..config(0) });
    lapic.write_page(reg::LVT_TIMER, u32::MAX, &at(0));
    assert_eq!(lapic.read_page(reg::LVT_TIMER, &no_clock), 0x3_00ff, "TSC-deadline mode is not offered");
}

#[test]
fn an_interrupt_goes_from_request_to_service_to_end() {
    let mut lapic = xapic(0);
    post(&mut lapic, &[(0x41, false), (0x52, true)]);
    assert_eq!(lapic.read_page(reg::IRR + 0x20, &no_clock), (1 << 1) | (1 << 18));
    assert_eq!(lapic.read_page(reg::TMR + 0x20, &no_clock), 1 << 18);
    assert_eq!(lapic.pending_vector(), Some(0x52));
    assert_eq!(take(&mut lapic), Some(0x52));
    assert_eq!((lapic.ppr(), lapic.pending_vector()), (0x50, None));
    assert_eq!(lapic.highest_request(), Some(0x41));
    assert_eq!(take(&mut lapic), None);
    assert_eq!(lapic.write_page(reg::EOI, 0, &no_clock), Effect::InterruptEnd(0x52));
    assert_eq!(take(&mut lapic), Some(0x41));
    assert_eq!(lapic.eoi(), Effect::None, "edge-triggered");
    assert_eq!(lapic.eoi(), Effect::None, "nothing in service");
    assert_eq!(lapic.ppr(), 0);
}

#[test]
fn the_same_vector_can_be_requested_while_in_service() {
    let mut lapic = xapic(0);
    post(&mut lapic, &[(0x41, false)]);
    take(&mut lapic);
    post(&mut lapic, &[(0x41, false)]);
    assert_eq!(lapic.pending_vector(), None);
    lapic.eoi();
    assert_eq!(take(&mut lapic), Some(0x41));
}

#[test]
fn cr8_is_the_class_of_the_task_priority() {
    let mut lapic = x2apic(0);
    lapic.write_msr(msr(reg::TPR), 0x45, &no_clock).unwrap();
    assert_eq!((lapic.cr8(), lapic.ppr()), (4, 0x45));
    lapic.set_cr8(4);
    assert_eq!(lapic.ppr(), 0x45, "an unchanged CR8 keeps the low bits");
    post(&mut lapic, &[(0x4f, false)]);
    assert_eq!(lapic.pending_vector(), None, "same class");
    lapic.set_cr8(3);
    assert_eq!((lapic.ppr(), lapic.pending_vector()), (0x30, Some(0x4f)));
    lapic.set_cr8(15);
    assert_eq!(lapic.pending_vector(), None);
}

#[test]
fn illegal_vectors_are_errors() {
    let mut lapic = xapic(0);
    lapic.write_page(reg::LVT_ERROR, 0xee, &no_clock);
    post(&mut lapic, &[(15, false), (16, false)]);
    assert_eq!(take(&mut lapic), Some(0xee), "the error interrupt");
    assert_eq!(lapic.read_page(reg::ESR, &no_clock), 0, "not latched yet");
    lapic.write_page(reg::ESR, 0, &no_clock);
    assert_eq!(lapic.read_page(reg::ESR, &no_clock), 1 << 6);
    lapic.eoi();
    assert_eq!(take(&mut lapic), Some(16));
    assert_eq!(lapic.write_page(reg::ICR, 0x400f, &no_clock), Effect::None);
    lapic.write_page(reg::ESR, 0, &no_clock);
    assert_eq!(lapic.read_page(reg::ESR, &no_clock), 1 << 5);
}

#[test]
fn an_illegal_error_vector_does_not_recurse() {
    let mut lapic = xapic(0);
    lapic.write_page(reg::LVT_ERROR, 0x05, &no_clock);
    lapic.write_page(reg::ICR, 0x4001, &no_clock);
    lapic.write_page(reg::ESR, 0, &no_clock);
    assert_eq!(lapic.read_page(reg::ESR, &no_clock), (1 << 5) | (1 << 6));
    assert_eq!(lapic.highest_request(), None);
}

#[test]
fn reserved_offsets_of_the_page_are_errors() {
    for offset in [0x000, 0x010, 0x040, 0x070, 0x290, 0x2f0, 0x3a0, 0x3d0, 0x400, 0xff0] {
        let mut lapic = xapic(0);
        assert_eq!(lapic.read_page(offset, &at(0)), 0);
        lapic.write_page(reg::ESR, 0, &no_clock);
        assert_eq!(lapic.read_page(reg::ESR, &no_clock), 1 << 7, "{offset:#x}");
        lapic.write_page(offset, 1, &at(0));
        lapic.write_page(reg::ESR, 0, &no_clock);
        assert_eq!(lapic.read_page(reg::ESR, &no_clock), 1 << 7, "{offset:#x}");
    }
    let mut lapic = xapic(0);
    for offset in [reg::ID, reg::VERSION, reg::APR, reg::PPR, reg::RRD, reg::ISR, reg::TMR + 0x70, reg::CURRENT_COUNT] {
        let before = lapic.read_page(offset, &at(0));
        assert_eq!(lapic.write_page(offset, !before, &at(0)), Effect::None);
        assert_eq!(lapic.read_page(offset, &at(0)), before, "read-only: {offset:#x}");
    }
    lapic.read_page(reg::EOI, &no_clock);
    assert_eq!(lapic.read_page(reg::TPR + 4, &no_clock), 0);
    lapic.write_page(reg::TPR + 4, 0x20, &no_clock);
    assert_eq!(lapic.read_page(reg::TPR, &no_clock), 0);
    lapic.write_page(reg::ESR, 0, &no_clock);
    assert_eq!(lapic.read_page(reg::ESR, &no_clock), 0, "none of these is an error");
}

#[test]
fn the_page_is_there_in_xapic_mode_only() {
    let mut lapic = x2apic(0);
    assert_eq!(lapic.read_page(reg::SVR, &no_clock), u32::MAX);
    assert_eq!(lapic.write_page(reg::SVR, 0, &no_clock), Effect::None);
    assert_eq!(lapic.read_msr(msr(reg::SVR), &no_clock), Ok(0x1ff));
}

#[test]
fn x2apic_registers_exist_as_the_manual_says() {
    let mut lapic = x2apic(0x123);
    let readable = |lapic: &mut Lapic, index| lapic.read_msr(index, &at(0)).is_ok();
    let expected: BTreeSet<u32> = [0x802, 0x803, 0x808, 0x80a, 0x80d, 0x80f, 0x828, 0x830]
        .into_iter()
        .chain(0x810..=0x827)
        .chain(0x832..=0x839)
        .chain([0x83e])
        .collect();
    let got: BTreeSet<u32> = (0x7f0..0x910).filter(|index| readable(&mut lapic, *index)).collect();
    assert_eq!(got, expected);
    let got: BTreeSet<u32> = (0x7f0..0x910).filter(|index| x2apic(1).write_msr(*index, 0, &at(0)).is_ok()).collect();
    let writable = [0x808, 0x80b, 0x80f, 0x828, 0x830, 0x838, 0x83e, 0x83f];
    assert_eq!(got, writable.into_iter().chain(0x832..=0x837).collect());
    assert_eq!(lapic.read_msr(0x802, &no_clock), Ok(0x123));
    assert_eq!(lapic.read_msr(0x80d, &no_clock), Ok(0x12_0008));
    let mut lapic = xapic(0);
    assert!((0x800..0x900).all(|index| lapic.read_msr(index, &no_clock).is_err()), "xAPIC mode has no MSRs");
    assert!((0x800..0x900).all(|index| lapic.write_msr(index, 0, &no_clock).is_err()));
}

#[test]
fn x2apic_reserved_bits_fault() {
    for (offset, value) in [
        (reg::TPR, 0x100),
        (reg::EOI, 1),
        (reg::SVR, 0x400),
        (reg::SVR, 0x1_0000_01ff),
        (reg::ESR, 1),
        (reg::LVT_TIMER, 0x8_0000),
        (reg::LVT_TIMER, 0x100),
        (reg::LVT_TIMER, 0x4000),
        (reg::LVT_ERROR, 0x2_0000),
        (reg::LVT_LINT0, 0x800),
        (reg::INITIAL_COUNT, 1 << 32),
        (reg::DIVIDE, 4),
        (reg::ICR, 1 << 13),
        (reg::ICR, 1 << 16),
        (reg::ICR, 1 << 20),
        (reg::SELF_IPI, 0x100),
    ] {
        let mut lapic = x2apic(0);
        let before = contents(&lapic);
        assert_eq!(lapic.write_msr(msr(offset), value, &at(0)), FAULT, "{offset:#x} {value:#x}");
        assert_eq!(contents(&lapic), before);
    }
    let mut lapic = x2apic(0);
    assert_eq!(lapic.write_msr(msr(reg::LVT_LINT0), 0x5731, &no_clock), OK, "read-only bits are no fault");
    assert_eq!(lapic.read_msr(msr(reg::LVT_LINT0), &no_clock), Ok(0x731));
    assert_eq!(lapic.write_msr(msr(reg::LVT_TIMER), 0x1031, &at(0)), OK);
}

#[test]
fn base_transitions() {
    let mut lapic = xapic(5);
    lapic.write_page(reg::LDR, 0x2000_0000, &no_clock);
    lapic.write_page(reg::TPR, 0x20, &no_clock);
    lapic.write_page(reg::ICR_HIGH, 0x0300_0000, &no_clock);
    assert_eq!(lapic.set_base(0xfee0_0c00), Ok(()));
    assert_eq!((lapic.mode(), lapic.base()), (Mode::X2Apic, 0xfee0_0c00));
    assert_eq!(lapic.read_msr(msr(reg::TPR), &no_clock), Ok(0x20), "kept");
    assert_eq!(lapic.read_msr(msr(reg::ICR), &no_clock), Ok(0), "the high half is cleared");
    assert_eq!(lapic.set_base(0xfee0_0800), Err(GeneralProtection));
    assert_eq!(lapic.mode(), Mode::X2Apic);
    assert_eq!(lapic.set_base(0xfee0_0000), Ok(()));
    assert_eq!(lapic.set_base(0xfee0_0c00), Err(GeneralProtection));
    assert_eq!(lapic.set_base(0xfee0_0800), Ok(()));
    assert_eq!(lapic.read_page(reg::SVR, &no_clock), 0xff, "lost when it was off");
    assert_eq!(lapic.set_base(0xfec0_0800), Err(GeneralProtection), "the page does not move");
    assert_eq!(lapic.restore_base(0xfee0_0000), Ok(()));
    assert_eq!(lapic.restore_base(0xfee0_0c00), Ok(()), "from outside any mode may follow");
    assert_eq!(lapic.restore_base(0xfee0_0400), Err(AxError::InvalidRegister));
    let mut without = new(Config { x2apic: false, ..config(0) });
    assert_eq!(without.set_base(0xfee0_0d00), Err(GeneralProtection));
}

#[test]
fn a_disabled_apic_delivers_nothing() {
    let mut lapic = xapic(0);
    lapic.set_base(0xfee0_0000).unwrap();
    post(&mut lapic, &[(0x41, false)]);
    assert_eq!((lapic.pending_vector(), lapic.highest_request()), (None, None));
    lapic.set_base(0xfee0_0800).unwrap();
    assert_eq!(lapic.highest_request(), None, "what came meanwhile is lost");
}

#[test]
fn interrupt_commands_leave_in_one_layout() {
    let mut lapic = xapic(0);
    lapic.write_page(reg::ICR_HIGH, 0x0300_0000, &no_clock);
    assert_eq!(lapic.write_page(reg::ICR, 0x0000_50fd, &no_clock), Effect::Ipi(0x0000_0003_0000_40fd));
    assert_eq!(lapic.read_page(reg::ICR, &no_clock), 0x40fd, "idle at once");
    lapic.write_page(reg::ICR_HIGH, 0xff00_0000, &no_clock);
    let Effect::Ipi(icr) = lapic.write_page(reg::ICR, 0x0000_4400, &no_clock) else { panic!("no IPI") };
    let message = Message::from_icr(icr, true).unwrap();
    assert!(message.broadcast);
    assert_eq!((message.delivery, message.shorthand), (Delivery::Nmi, Shorthand::None));
    let mut lapic = x2apic(0);
    assert_eq!(lapic.write_msr(msr(reg::ICR), 0x0000_00ff_0000_08fd, &no_clock), Ok(Effect::Ipi(0xff_0000_08fd)));
    assert!(!Message::from_icr(0xff_0000_08fd, true).unwrap().broadcast);
    assert_eq!(lapic.read_msr(msr(reg::ICR), &no_clock), Ok(0xff_0000_08fd));
}

#[test]
fn commands_that_need_nobody_else_stay_inside() {
    let mut lapic = x2apic(7);
    assert_eq!(lapic.write_msr(msr(reg::SELF_IPI), 0xf3, &no_clock), OK);
    assert_eq!(lapic.write_msr(msr(reg::ICR), 0x0004_00f1, &no_clock), OK);
    assert_eq!(lapic.write_msr(msr(reg::ICR), 0x000c_8500, &no_clock), OK, "INIT level de-assert");
    assert_eq!(lapic.write_msr(msr(reg::ICR), 0x0008_0200, &no_clock), OK, "SMI");
    assert_eq!(lapic.write_msr(msr(reg::ICR), 0x0008_0300, &no_clock), OK, "reserved");
    assert_eq!(take(&mut lapic), Some(0xf3));
    lapic.eoi();
    assert_eq!(take(&mut lapic), Some(0xf1));
    assert_eq!(lapic.write_msr(msr(reg::SELF_IPI), 0x0f, &no_clock), OK);
    lapic.write_msr(msr(reg::ESR), 0, &no_clock).unwrap();
    assert_eq!(lapic.read_msr(msr(reg::ESR), &no_clock), Ok(1 << 5));
    assert_eq!(lapic.write_msr(msr(reg::SVR), 0xff, &at(0)), OK);
    lapic.write_msr(msr(reg::SELF_IPI), 0xf3, &no_clock).unwrap();
    assert_eq!(lapic.highest_request(), None, "a disabled APIC takes none");
}

#[test]
fn identity_follows_the_registers() {
    let mut lapic = xapic(9);
    lapic.write_page(reg::LDR, 0xabff_ffff, &no_clock);
    lapic.write_page(reg::TPR, 0x33, &no_clock);
    let flat = Identity { id: 9, logical: 0xab, cluster: false, mode: Mode::XApic, enabled: true, priority: 0x33 };
    assert_eq!(lapic.identity(), flat);
    lapic.write_page(reg::DFR, 0x0000_0000, &no_clock);
    assert_eq!(lapic.read_page(reg::DFR, &no_clock), 0x0fff_ffff);
    assert_eq!(lapic.identity(), Identity { cluster: true, ..flat });
    lapic.write_page(reg::SVR, 0xff, &at(0));
    assert!(!lapic.identity().enabled);
    lapic.set_base(0xfee0_0c00).unwrap();
    assert_eq!(lapic.identity().mode, Mode::X2Apic);
}

#[test]
fn init_resets_all_but_id_and_mode() {
    let mut lapic = x2apic(3);
    lapic.write_msr(msr(reg::LVT_TIMER), 0xec, &at(0)).unwrap();
    lapic.write_msr(msr(reg::INITIAL_COUNT), 1000, &at(0)).unwrap();
    assert!(matches!(lapic.timer_update(Watch::Nobody, &no_clock), TimerUpdate::Arm(_)));
    let mailbox = Mailbox::new();
    mailbox.post_interrupt(0x41, false);
    mailbox.post_init();
    mailbox.post_sipi(0x9b);
    let posted = lapic.collect(&mailbox, &no_clock);
    assert_eq!(posted, Posted { init: true, sipi: Some(0x9b), ..Posted::default() });
    assert_eq!((lapic.mode(), lapic.highest_request()), (Mode::X2Apic, None));
    assert_eq!(lapic.read_msr(msr(reg::SVR), &no_clock), Ok(0xff));
    assert_eq!(lapic.read_msr(msr(reg::ID), &no_clock), Ok(3));
    assert_eq!(lapic.timer_update(Watch::Nobody, &no_clock), TimerUpdate::Cancel, "the host's timer is not forgotten");
    let mut boot = new(config(0));
    boot.init();
    assert_eq!(boot.base(), 0xfee0_0900);
    assert!(!boot.accepts_pic_interrupt(), "INIT knows no firmware");
}

#[test]
fn the_timer_interrupts_through_its_entry() {
    let mut lapic = xapic(0);
    lapic.write_page(reg::LVT_TIMER, 0x2_00ec, &at(0));
    lapic.write_page(reg::DIVIDE, 0xb, &at(0));
    lapic.write_page(reg::INITIAL_COUNT, 1_000_000, &at(0));
    assert_eq!(lapic.timer_update(Watch::Nobody, &no_clock), TimerUpdate::Arm(1_000_000));
    assert_eq!(lapic.read_page(reg::CURRENT_COUNT, &at(400_000)), 600_000);
    let mailbox = Mailbox::new();
    mailbox.post_timer();
    assert!(lapic.collect(&mailbox, &at(1_000_100)).timer);
    assert_eq!(take(&mut lapic), Some(0xec));
    assert_eq!(lapic.timer_update(Watch::Nobody, &no_clock), TimerUpdate::Arm(2_000_000));
    lapic.write_page(reg::LVT_TIMER, 0x3_00ec, &at(2_000_001));
    assert_eq!(lapic.highest_request(), Some(0xec), "it expired before it was masked");
}

#[test]
fn the_deadline_msr() {
    let mut lapic = x2apic(0);
    assert_eq!(lapic.write_msr(MSR_TSC_DEADLINE, 5000, &at(0)), OK);
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE, &at(0)), Ok(0), "another mode");
    lapic.write_msr(msr(reg::LVT_TIMER), 0x4_00ec, &at(0)).unwrap();
    lapic.write_msr(MSR_TSC_DEADLINE, 5000, &at(0)).unwrap();
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE, &at(0)), Ok(5000));
    assert_eq!(lapic.timer_update(Watch::Nobody, &no_clock), TimerUpdate::Arm(2500));
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE, &at(2500)), Ok(0), "seen as soon as somebody looks");
    assert_eq!(take(&mut lapic), Some(0xec));
    lapic.eoi();
    lapic.write_msr(MSR_TSC_DEADLINE, 1, &at(3000)).unwrap();
    assert_eq!(take(&mut lapic), Some(0xec), "a deadline in the past");
    assert_eq!(
        lapic.timer_update(Watch::Nobody, &no_clock),
        TimerUpdate::Cancel,
        "what was armed for the first deadline"
    );
    lapic.eoi();
    lapic.write_msr(MSR_TSC_DEADLINE, 20_000, &at(3000)).unwrap();
    lapic.tsc_changed(&|| Clock { now_ns: 3100, tsc: 30_000, tsc_khz: 2_000_000 });
    assert_eq!(take(&mut lapic), Some(0xec), "the TSC jumped over it");
    lapic.write_msr(MSR_TSC_DEADLINE, 20_000, &at(0)).unwrap();
    assert_eq!(lapic.timer_update(Watch::Exits, &no_clock), TimerUpdate::Arm(10_000));
    assert!(lapic.postpone(40_000, 0));
    assert_eq!(lapic.read_msr(MSR_TSC_DEADLINE, &at(0)), Ok(40_000));
    assert!(lapic.postpone(60_000, 0));
    assert_eq!(lapic.timer_update(Watch::Exits, &no_clock), TimerUpdate::Unchanged, "early enough");
    assert_eq!(lapic.timer_update(Watch::Nobody, &at(0)), TimerUpdate::Arm(30_000), "a sleeper is woken in time");
    let mut without = new(Config { tsc_deadline: false, ..config(0) });
    assert_eq!(without.write_msr(MSR_TSC_DEADLINE, 0, &at(0)), FAULT);
    assert_eq!(without.read_msr(MSR_TSC_DEADLINE, &at(0)), Err(GeneralProtection));
}

#[test]
fn state_round_trips() {
    for base in [0xfee0_0800, 0xfee0_0c00] {
        let mut lapic = xapic(5);
        lapic.write_page(reg::LDR, 0x2000_0000, &no_clock);
        lapic.write_page(reg::DFR, 0x0fff_ffff, &no_clock);
        lapic.restore_base(base).unwrap();
        post(&mut lapic, &[(0x41, false), (0x93, true), (0xfe, true)]);
        take(&mut lapic);
        let mut state = lapic.state(&at(100));
        let set = |state: &mut LocalApic, offset: u16, value| state.regs[usize::from(offset / 16)] = value;
        set(&mut state, reg::TPR, 0x23);
        set(&mut state, reg::LVT_TIMER, 0x2_00ec);
        set(&mut state, reg::LVT_LINT0, 0x700);
        set(&mut state, reg::ESR, 0x60);
        set(&mut state, reg::ICR, 0x40fd);
        set(&mut state, reg::ICR_HIGH, 0x0300_0000);
        set(&mut state, reg::DIVIDE, 0xb);
        set(&mut state, reg::INITIAL_COUNT, 1_000_000);
        set(&mut state, reg::CURRENT_COUNT, 400_000);
        let mut copy = new(config(5));
        copy.restore_base(base).unwrap();
        assert_eq!(copy.set_state(&state, &at(100)), Ok(()));
        set(&mut state, reg::PPR, 0xf0);
        let mut saved = copy.state(&at(100));
        set(&mut saved, reg::APR, 0);
        set(&mut state, reg::APR, 0);
        assert_eq!(saved, state, "{base:#x}");
        assert_eq!(copy.timer_update(Watch::Nobody, &no_clock), TimerUpdate::Arm(400_100));
        assert!(copy.accepts_pic_interrupt());
        assert_eq!(copy.eoi(), Effect::InterruptEnd(0xfe));
        assert_eq!(take(&mut copy), Some(0x93));
    }
}

#[test]
fn bad_state_is_refused_and_changes_nothing() {
    let good = xapic(5).state(&at(0));
    for (offset, value) in [
        (reg::ID, 6 << 24),
        (reg::TPR, 0x100),
        (reg::SVR, 0x1000),
        (reg::LDR, 1),
        (reg::DFR, 0xf000_0000),
        (reg::ISR, 1),
        (reg::IRR, 1 << 15),
        (reg::ESR, 0x100),
        (reg::ICR, 1 << 12),
        (reg::ICR_HIGH, 1),
        (reg::LVT_TIMER, 1 << 20),
        (reg::LVT_ERROR, 0x700),
        (reg::DIVIDE, 4),
        (reg::CURRENT_COUNT, 1),
    ] {
        let mut lapic = xapic(5);
        let mut state = good;
        state.regs[usize::from(offset / 16)] = value;
        let before = contents(&lapic);
        assert_eq!(lapic.set_state(&state, &at(0)), Err(AxError::InvalidRegister), "{offset:#x}");
        assert_eq!(contents(&lapic), before);
    }
    let mut state = good;
    state.regs[usize::from(reg::SVR / 16)] = 0xff;
    state.regs[usize::from(reg::LVT_LINT0 / 16)] = 0x700;
    assert_eq!(xapic(5).set_state(&state, &at(0)), Err(AxError::InvalidRegister), "unmasked while disabled");
    assert_eq!(xapic(5).set_state(&good, &at(0)), Ok(()));
}
