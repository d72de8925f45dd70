// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which interrupts come, and which first: enables, groups, priorities, and more of them than there are list registers.

use super::{
    clear, expect, machine, ready, set, spinning, told_code, CTLR, END, ICENABLER1, ICFGR2, ICFGR3, IGROUPR1,
    IPRIORITYR10, IPRIORITYR8, ISPENDR1, READY,
};
use crate::guests::interrupts::{nothing_comes, FIQ, IRQ};
use crate::harness::{Case, CaseResult};
use crate::{code, ensure_eq, table};

/// The cases.
pub(super) fn cases() -> Vec<Case> {
    table! {
        "gic/disabled-interrupts-wait" => disabled;
        "gic/best-priority-first" => priorities;
        "gic/priority-mask-and-preemption" => preemption;
        "gic/more-than-list-registers" => many;
        "gic/more-active-than-list-registers" => many_active;
        "gic/group-0-is-fiq" => fiq;
    }
}

fn disabled() -> CaseResult {
    // Disabled one by one: at the distributor, at the group, at the interface.
    let code = told_code!(
        disabled,
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
    let mut m = machine(code, &[(ICENABLER1, 1 << 8)])?;
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
    // 41 at 0x80, 42 at 0x20, 43 at 0x40, 40 at 0xa0; all pending at once, and latched, whether levels (40, 41) or edges.
    let stores = [(IPRIORITYR10, 0x4020_80a0), (ICFGR2, 0xa0 << 16), (ISPENDR1, 0xf00)];
    let mut m = machine(spinning(), &stores)?;
    for intid in [42, 43, 41, 40] {
        expect(&mut m, intid, "the next best")?;
        expect(&mut m, END, "its end")?;
    }
    expect(&mut m, READY, "the guest comes last")?;
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
    let mut m = ready(&[(IPRIORITYR10, 0x00f0_80a0), (ICFGR2, 0x2a << 16)])?;
    m.write(IRQ, nested)?;
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
    // SPIs 34 to 63 at priorities that rise with the number, all pending, edges.
    let mut stores = vec![(ICFGR2, !0), (ICFGR3, !0)];
    let priority = |intid: u32| (63 - intid) * 8;
    for first in (32..64).step_by(4) {
        let word = (0..4).map(|n| (priority(first + n) & 0xff) << (8 * n)).sum();
        stores.push((IPRIORITYR8 + first - 32, word));
    }
    stores.push((ISPENDR1, !3));
    let mut m = machine(spinning(), &stores)?;
    for intid in (34..64).rev() {
        expect(&mut m, intid, "the next best")?;
        expect(&mut m, END, "its end")?;
    }
    expect(&mut m, READY, "the guest comes last")?;
    nothing_comes(&mut m)
}

fn many_active() -> CaseResult {
    // With EOImode 1 all 20 are acknowledged and dropped, then deactivated in another order than they came.
    let code = told_code!(
        many_active,
        "mov x9, #2",
        "msr icc_ctlr_el1, x9",
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
    let mut m = machine(code, &[(ICFGR2, !0), (ICFGR3, !0), (ISPENDR1, 0xf_ffff)])?;
    let [_, active, pending, half, none, spurious, _] = m.expect_call()?;
    ensure_eq!((active, pending), (0xf_ffff, 0), "all are active");
    let gone = (11..=20).fold(0u64, |word, n| word | 1 << (7 * n % 20));
    ensure_eq!(half, 0xf_ffff & !gone, "half of them");
    ensure_eq!((none, spurious), (0, 1023), "none");
    Ok(())
}

fn fiq() -> CaseResult {
    let code =
        told_code!(fiq, "mov x9, #1", "msr icc_igrpen0_el1, x9", "msr daifclr, #1", "mov x0, #7", "hvc #0", "2: b 2b");
    let mut m = machine(code, &[(IGROUPR1, 0), (CTLR, 3)])?;
    let taken = code!(taken, "mrs x0, icc_iar0_el1", "hvc #0", "msr icc_eoir0_el1, x0", "eret");
    m.write(FIQ, taken)?;
    expect(&mut m, READY, "the guest is ready")?;
    set(&m, 40)?;
    expect(&mut m, 40, "by FIQ")
}
