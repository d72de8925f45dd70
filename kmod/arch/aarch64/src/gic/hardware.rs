// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! Moving a vCPU's CPU interface between memory and the CPU (IHI 0069 section 12.4). KVM uses the same registers: it loads all
//! that it needs for each of its vCPUs, but expects the list registers that it does not need to be empty, as they are left
//! here.

use super::interface::{Interface, COUNT, MAX_LISTS};
use crate::cpu::*;

/// What the CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    /// List registers.
    pub(crate) lists: usize,
    /// Bits of a priority that decide on preemption: 5 to 7.
    pub(crate) preemption_bits: u32,
}

impl Shape {
    /// That of the current CPU.
    ///
    /// # Safety
    /// At EL2 on a CPU with GICv3 system registers.
    pub(crate) unsafe fn host() -> Self {
        // SAFETY: The caller's promise.
        let vtr = unsafe { IchVtrEl2.get() };
        Self {
            lists: ((vtr & 31) as usize + 1).min(MAX_LISTS),
            preemption_bits: ((vtr >> 26 & 7) as u32 + 1).clamp(5, 7),
        }
    }
}

/// Calls a macro for each register of a set with its index.
macro_rules! each {
    ($do:ident: $($index:literal $name:ident),+) => { $($do!($index, $name);)+ };
}

macro_rules! lists {
    ($do:ident) => {
        each!($do: 0 IchLr0El2, 1 IchLr1El2, 2 IchLr2El2, 3 IchLr3El2, 4 IchLr4El2, 5 IchLr5El2, 6 IchLr6El2,
            7 IchLr7El2, 8 IchLr8El2, 9 IchLr9El2, 10 IchLr10El2, 11 IchLr11El2, 12 IchLr12El2, 13 IchLr13El2,
            14 IchLr14El2, 15 IchLr15El2)
    };
}

/// Writes the list registers, those that are not in use too, and the control register.
///
/// # Safety
/// At EL2, exceptions masked, on a CPU of this shape.
pub(crate) unsafe fn load_lists(interface: &Interface, shape: Shape) {
    macro_rules! load {
        ($index:literal, $name:ident) => {
            if $index < shape.lists {
                let [.., value] = interface.lists.first_chunk::<{ $index + 1 }>().copied().unwrap_or([0; $index + 1]);
                // SAFETY: The caller's promise; the CPU has the register, by its shape.
                unsafe { $name.set(value) };
            }
        };
    }
    lists!(load);
    // SAFETY: The caller's promise.
    unsafe { IchHcrEl2.set(interface.control) };
}

/// Reads the list registers that are in use, and empties them; and the control register with its count.
///
/// # Safety
/// After [`load_lists`], on the same CPU.
pub(crate) unsafe fn save_lists(interface: &mut Interface) {
    // SAFETY: The caller's promise. What was counted is in memory then, and counts no more.
    unsafe {
        interface.control = IchHcrEl2.get();
        if interface.control & COUNT != 0 {
            IchHcrEl2.set(interface.control & !COUNT);
            // For the mode that they were counted in.
            interface.vmcr = IchVmcrEl2.get();
        }
    }
    macro_rules! save {
        ($index:literal, $name:ident) => {
            if $index < interface.used {
                if let Some(value) = interface.lists.get_mut($index) {
                    // SAFETY: The caller's promise; what was in use is there.
                    *value = unsafe { $name.get() };
                    // SAFETY: As above.
                    unsafe { $name.set(0) };
                }
            }
        };
    }
    lists!(save);
}

/// Loads the interface.
///
/// # Safety
/// As [`load_lists`].
pub(crate) unsafe fn load(interface: &Interface, shape: Shape) {
    let [zero, one] = interface.active_priorities.map(|words| words.map(u64::from));
    // SAFETY: The caller's promise; there are registers for as many priorities as the CPU tells apart.
    unsafe {
        IchVmcrEl2.set(interface.vmcr);
        IchAp0R0El2.set(zero[0]);
        IchAp1R0El2.set(one[0]);
        if shape.preemption_bits >= 6 {
            IchAp0R1El2.set(zero[1]);
            IchAp1R1El2.set(one[1]);
        }
        if shape.preemption_bits >= 7 {
            IchAp0R2El2.set(zero[2]);
            IchAp1R2El2.set(one[2]);
            IchAp0R3El2.set(zero[3]);
            IchAp1R3El2.set(one[3]);
        }
        load_lists(interface, shape);
    }
}

/// Saves the interface, and leaves empty list registers behind.
///
/// # Safety
/// After [`load`], on the same CPU.
pub(crate) unsafe fn save(interface: &mut Interface, shape: Shape) {
    // SAFETY: As in `load`.
    unsafe {
        save_lists(interface);
        interface.vmcr = IchVmcrEl2.get();
        let [zero, one] = &mut interface.active_priorities;
        zero[0] = IchAp0R0El2.get() as u32;
        one[0] = IchAp1R0El2.get() as u32;
        if shape.preemption_bits >= 6 {
            zero[1] = IchAp0R1El2.get() as u32;
            one[1] = IchAp1R1El2.get() as u32;
        }
        if shape.preemption_bits >= 7 {
            zero[2] = IchAp0R2El2.get() as u32;
            one[2] = IchAp1R2El2.get() as u32;
            zero[3] = IchAp0R3El2.get() as u32;
            one[3] = IchAp1R3El2.get() as u32;
        }
    }
}
