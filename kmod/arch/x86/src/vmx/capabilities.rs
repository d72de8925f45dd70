// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What a CPU's VMX can do, and the controls that follow from it (SDM vol. 3, appendix A): pure functions of the capability
//! MSRs.
//!
//! A capability MSR for controls has in its low half the bits that must be one and in its high half those that can be one.

use vcpu_core::npt::Levels;

use super::timer;

/// Pin-based VM-execution controls (SDM vol. 3 section 25.6.1).
pub(crate) mod pin {
    pub(crate) const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    pub(crate) const NMI: u32 = 1 << 3;
    pub(crate) const VIRTUAL_NMI: u32 = 1 << 5;
    pub(crate) const PREEMPTION_TIMER: u32 = 1 << 6;
    pub(crate) const POSTED_INTERRUPTS: u32 = 1 << 7;
}

/// Primary processor-based VM-execution controls (SDM vol. 3 section 25.6.2).
pub(crate) mod primary {
    pub(crate) const INTERRUPT_WINDOW: u32 = 1 << 2;
    pub(crate) const TSC_OFFSET: u32 = 1 << 3;
    pub(crate) const HLT: u32 = 1 << 7;
    pub(crate) const MWAIT: u32 = 1 << 10;
    pub(crate) const RDPMC: u32 = 1 << 11;
    pub(crate) const CR3_LOAD: u32 = 1 << 15;
    pub(crate) const CR3_STORE: u32 = 1 << 16;
    pub(crate) const CR8_LOAD: u32 = 1 << 19;
    pub(crate) const CR8_STORE: u32 = 1 << 20;
    pub(crate) const TPR_SHADOW: u32 = 1 << 21;
    pub(crate) const NMI_WINDOW: u32 = 1 << 22;
    pub(crate) const MOV_DR: u32 = 1 << 23;
    pub(crate) const IO: u32 = 1 << 24;
    pub(crate) const MSR_BITMAPS: u32 = 1 << 28;
    pub(crate) const MONITOR: u32 = 1 << 29;
    pub(crate) const SECONDARY: u32 = 1 << 31;
}

/// Secondary processor-based VM-execution controls.
pub(crate) mod secondary {
    pub(crate) const EPT: u32 = 1 << 1;
    pub(crate) const RDTSCP: u32 = 1 << 3;
    pub(crate) const X2APIC_MODE: u32 = 1 << 4;
    pub(crate) const VPID: u32 = 1 << 5;
    pub(crate) const WBINVD: u32 = 1 << 6;
    pub(crate) const UNRESTRICTED_GUEST: u32 = 1 << 7;
    pub(crate) const APIC_REGISTERS: u32 = 1 << 8;
    pub(crate) const INTERRUPT_DELIVERY: u32 = 1 << 9;
    pub(crate) const PAUSE_LOOP: u32 = 1 << 10;
    pub(crate) const INVPCID: u32 = 1 << 12;
    pub(crate) const ENCLS: u32 = 1 << 15;
    pub(crate) const ENCLV: u32 = 1 << 28;
}

/// VM-exit controls (SDM vol. 3 section 25.7.1).
pub(crate) mod exit {
    pub(crate) const SAVE_DEBUG: u32 = 1 << 2;
    pub(crate) const HOST_64: u32 = 1 << 9;
    pub(crate) const ACKNOWLEDGE: u32 = 1 << 15;
    pub(crate) const LOAD_PAT: u32 = 1 << 19;
    pub(crate) const LOAD_EFER: u32 = 1 << 21;
}

/// VM-entry controls (SDM vol. 3 section 25.8.1).
pub(crate) mod entry {
    pub(crate) const LOAD_DEBUG: u32 = 1 << 2;
    pub(crate) const IA32E: u32 = 1 << 9;
    pub(crate) const LOAD_PAT: u32 = 1 << 14;
    pub(crate) const LOAD_EFER: u32 = 1 << 15;
}

/// How far the CPU takes the local APIC off our hands. Each step includes those before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ApicSupport {
    /// Not at all.
    #[default]
    None,
    /// CR8 is the task priority: TPR shadow.
    TaskPriority,
    /// The CPU reads the registers for the guest, delivers its interrupts and ends them: APIC-register virtualization,
    /// virtual-interrupt delivery, x2APIC mode.
    Delivery,
    /// Other CPUs send interrupts to the guest while it runs: posted interrupts.
    Posted,
}

impl ApicSupport {
    /// As many steps of it.
    pub(crate) const fn steps(count: u8) -> Self {
        match count {
            0 => Self::None,
            1 => Self::TaskPriority,
            2 => Self::Delivery,
            _ => Self::Posted,
        }
    }

    /// What the CPU has.
    const fn new(msrs: &Msrs) -> Self {
        const DELIVERY: u32 = secondary::X2APIC_MODE | secondary::APIC_REGISTERS | secondary::INTERRUPT_DELIVERY;
        let task_priority = allows(msrs.primary, primary::TPR_SHADOW)
            && allows_zero(msrs.primary, primary::CR8_LOAD | primary::CR8_STORE);
        let delivery = task_priority && allows(msrs.secondary, DELIVERY);
        let posted = delivery && allows(msrs.pin, pin::POSTED_INTERRUPTS) && allows(msrs.exit, exit::ACKNOWLEDGE);
        Self::steps(task_priority as u8 + delivery as u8 + posted as u8)
    }
}

/// What a CPU lacks, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missing(pub(crate) &'static str);

/// The capability MSRs. Those for controls are the "true" ones where the CPU has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Msrs {
    /// IA32_VMX_BASIC.
    pub(crate) basic: u64,
    pub(crate) pin: u64,
    pub(crate) primary: u64,
    /// IA32_VMX_PROCBASED_CTLS2; 0 if there are no secondary controls.
    pub(crate) secondary: u64,
    pub(crate) exit: u64,
    pub(crate) entry: u64,
    /// IA32_VMX_MISC.
    pub(crate) misc: u64,
    /// IA32_VMX_EPT_VPID_CAP; 0 without EPT and VPID.
    pub(crate) ept_vpid: u64,
    pub(crate) cr0_fixed0: u64,
    pub(crate) cr0_fixed1: u64,
    pub(crate) cr4_fixed0: u64,
    pub(crate) cr4_fixed1: u64,
    /// CPUID 1 EAX, by which errata are known.
    pub(crate) signature: u32,
}

impl Msrs {
    /// Reads them by `read`. The CPU has VMX, and this `signature`.
    pub(crate) fn read(signature: u32, read: impl Fn(u32) -> u64) -> Self {
        let basic = read(0x480);
        // The true capability MSRs, from 0x48d on, tell of default controls that can be zero.
        let (pin, primary, exit, entry) =
            if basic >> 55 & 1 != 0 { (0x48d, 0x48e, 0x48f, 0x490) } else { (0x481, 0x482, 0x483, 0x484) };
        let primary = read(primary);
        let secondary = if allows(primary, primary::SECONDARY) { read(0x48b) } else { 0 };
        let has_ept_vpid = allows(secondary, secondary::EPT) || allows(secondary, secondary::VPID);
        Self {
            basic,
            pin: read(pin),
            primary,
            secondary,
            exit: read(exit),
            entry: read(entry),
            misc: read(0x485),
            ept_vpid: if has_ept_vpid { read(0x48c) } else { 0 },
            cr0_fixed0: read(0x486),
            cr0_fixed1: read(0x487),
            cr4_fixed0: read(0x488),
            cr4_fixed1: read(0x489),
            signature,
        }
    }
}

/// Whether the controls in `bits` can all be one.
const fn allows(msr: u64, bits: u32) -> bool {
    (msr >> 32) as u32 & bits == bits
}

/// Whether the controls in `bits` can all be zero.
const fn allows_zero(msr: u64, bits: u32) -> bool {
    msr as u32 & bits == 0
}

/// Controls with `wanted` set as far as they can be, and what must be one.
const fn controls(msr: u64, wanted: u32) -> u32 {
    (wanted | msr as u32) & (msr >> 32) as u32
}

/// Bits of a control register that VMX operation fixes (SDM vol. 3 section 24.8 and appendices A.7 and A.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Fixed {
    /// Must be one.
    pub(crate) ones: u64,
    /// Can be one.
    pub(crate) allowed: u64,
}

/// What a vCPU uses of the CPU's VMX. All CPUs of a machine are taken to be alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct VmxCapabilities {
    /// First word of a VMXON region and of a VMCS.
    pub(crate) revision: u32,
    pub(crate) pin: u32,
    pub(crate) primary: u32,
    /// Without RDTSCP and INVPCID, which depend on the guest: see [`Self::secondary_for`].
    secondary: u32,
    secondary_msr: u64,
    pub(crate) exit: u32,
    /// Without IA-32e mode, which depends on the guest's state.
    pub(crate) entry: u32,
    /// CR0, with PE and PG left to the guest, as unrestricted guests have them.
    pub(crate) cr0: Fixed,
    pub(crate) cr4: Fixed,
    /// The preemption timer counts once in `1 << n` cycles of the TSC.
    pub(crate) timer_shift: u32,
    /// A software event can be injected with an instruction length of 0.
    pub(crate) zero_length: bool,
    /// INVEPT of one EPTP; all of them otherwise.
    pub(crate) invept_single: bool,
    /// INVVPID of one VPID; all of them otherwise.
    pub(crate) invvpid_single: bool,
    /// Levels of the extended page table, if the CPU can walk five.
    pub(crate) five_levels: bool,
    /// For guests whose local APIC is ours.
    pub(crate) apic: ApicSupport,
}

impl VmxCapabilities {
    /// Of a CPU with these MSRs.
    ///
    /// # Errors
    /// The first thing that the backend cannot do without.
    pub(crate) fn new(msrs: &Msrs) -> Result<Self, Missing> {
        const WRITE_BACK: u64 = 6;
        let ept = |bit: u32| msrs.ept_vpid >> bit & 1 != 0;
        let required = [
            (msrs.basic >> 50 & 0xf == WRITE_BACK, "write-back VMCS"),
            (allows(msrs.pin, pin::EXTERNAL_INTERRUPT | pin::NMI), "exits on interrupts"),
            (allows(msrs.pin, pin::VIRTUAL_NMI), "virtual NMIs"),
            (allows(msrs.primary, primary::MSR_BITMAPS), "MSR bitmaps"),
            (allows(msrs.primary, primary::SECONDARY), "secondary controls"),
            (
                allows(msrs.primary, REQUIRED_PRIMARY),
                "exits on HLT, I/O, CR8, debug registers, MONITOR, MWAIT and RDPMC",
            ),
            (allows(msrs.secondary, secondary::EPT), "EPT"),
            (allows(msrs.secondary, secondary::UNRESTRICTED_GUEST), "unrestricted guest"),
            (allows_zero(msrs.primary, primary::CR3_LOAD | primary::CR3_STORE), "CR3 accesses without exits"),
            (ept(6), "EPT with four levels"),
            (ept(14), "write-back EPT tables"),
            (ept(16), "EPT with 2 MiB pages"),
            (ept(20) && (ept(25) || ept(26)), "INVEPT"),
            (allows(msrs.exit, REQUIRED_EXIT), "PAT and EFER loads at exits"),
            (allows(msrs.entry, REQUIRED_ENTRY), "PAT and EFER loads at entries"),
        ];
        if let Some(&(_, name)) = required.iter().find(|(present, _)| !present) {
            return Err(Missing(name));
        }
        let invvpid = ept(32) && (ept(41) || ept(42));
        let vpid = if invvpid { secondary::VPID } else { 0 };
        let timer = if timer::reliable(msrs.signature) { pin::PREEMPTION_TIMER } else { 0 };
        Ok(Self {
            revision: msrs.basic as u32 & 0x7fff_ffff,
            pin: controls(msrs.pin, pin::EXTERNAL_INTERRUPT | pin::NMI | pin::VIRTUAL_NMI | timer),
            primary: controls(msrs.primary, REQUIRED_PRIMARY | primary::MSR_BITMAPS | primary::SECONDARY),
            secondary: controls(
                msrs.secondary,
                secondary::EPT
                    | secondary::UNRESTRICTED_GUEST
                    | secondary::WBINVD
                    | secondary::PAUSE_LOOP
                    | secondary::ENCLS
                    | secondary::ENCLV
                    | vpid,
            ),
            secondary_msr: msrs.secondary,
            exit: controls(msrs.exit, REQUIRED_EXIT),
            entry: controls(msrs.entry, REQUIRED_ENTRY),
            cr0: Fixed { ones: msrs.cr0_fixed0 & !UNRESTRICTED_CR0, allowed: msrs.cr0_fixed1 },
            cr4: Fixed { ones: msrs.cr4_fixed0, allowed: msrs.cr4_fixed1 },
            timer_shift: (msrs.misc & 0x1f) as u32,
            zero_length: msrs.misc >> 30 & 1 != 0,
            invept_single: ept(25),
            invvpid_single: ept(41),
            five_levels: ept(7),
            apic: ApicSupport::new(msrs),
        })
    }

    /// The secondary controls for a guest that has RDTSCP and INVPCID, or lacks them: then they raise #UD.
    pub(crate) const fn secondary_for(&self, rdtscp: bool, invpcid: bool) -> u32 {
        let rdtscp = if rdtscp { secondary::RDTSCP } else { 0 };
        let invpcid = if invpcid { secondary::INVPCID } else { 0 };
        self.secondary | controls(self.secondary_msr, rdtscp | invpcid)
    }

    /// Whether the preemption timer is used.
    pub(crate) const fn has_timer(&self) -> bool {
        self.pin & pin::PREEMPTION_TIMER != 0
    }

    /// Whether VPIDs are used.
    pub(crate) const fn has_vpid(&self) -> bool {
        self.secondary & secondary::VPID != 0
    }

    /// Whether loops of PAUSE exit.
    pub(crate) const fn has_pause_loop(&self) -> bool {
        self.secondary & secondary::PAUSE_LOOP != 0
    }

    /// Whether ENCLS exits: everywhere where it is more than #UD.
    pub(crate) const fn has_encls(&self) -> bool {
        self.secondary & secondary::ENCLS != 0
    }

    /// Whether ENCLV exits.
    pub(crate) const fn has_enclv(&self) -> bool {
        self.secondary & secondary::ENCLV != 0
    }

    /// Levels of the extended page table on a CPU with physical addresses of `phys_bits` bits.
    pub(crate) const fn levels(&self, phys_bits: u32) -> Levels {
        if self.five_levels && phys_bits > 48 {
            Levels::Five
        } else {
            Levels::Four
        }
    }
}

/// CR0.PE and CR0.PG, which an unrestricted guest may have clear.
const UNRESTRICTED_CR0: u64 = 1 | 1 << 31;
const REQUIRED_PRIMARY: u32 = primary::TSC_OFFSET
    | primary::HLT
    | primary::MWAIT
    | primary::RDPMC
    | primary::CR8_LOAD
    | primary::CR8_STORE
    | primary::MOV_DR
    | primary::IO
    | primary::MONITOR;
const REQUIRED_EXIT: u32 = exit::SAVE_DEBUG | exit::HOST_64 | exit::LOAD_PAT | exit::LOAD_EFER;
const REQUIRED_ENTRY: u32 = entry::LOAD_DEBUG | entry::LOAD_PAT | entry::LOAD_EFER;

/// EPTP for the table at `root` (SDM vol. 3 section 25.6.11): write-back tables, no accessed and dirty flags.
pub(crate) const fn ept_pointer(root: u64, levels: Levels) -> u64 {
    const WRITE_BACK: u64 = 6;
    root | (levels.count() as u64 - 1) << 3 | WRITE_BACK
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A CPU like a recent Core: everything that the backend asks for, and default-one controls.
    pub(crate) fn recent() -> Msrs {
        Msrs {
            basic: 0x00da_0400_0000_0013,
            pin: 0x0000_00ff_0000_0016,
            primary: 0xfff9_fffe_0400_6172,
            secondary: 0x0377_ffff_0000_0000,
            exit: 0x03ff_ffff_0003_6dfb,
            entry: 0x0003_ffff_0000_11fb,
            misc: 0x2004_81e5 | 1 << 30,
            ept_vpid: 0x0000_0f01_0673_4141,
            cr0_fixed0: 0x8000_0021,
            cr0_fixed1: 0xffff_ffff,
            cr4_fixed0: 0x2000,
            cr4_fixed1: 0x0077_2fff,
            signature: 0x706e5,
        }
    }

    #[test]
    fn a_recent_cpu_gets_all_controls() {
        let caps = VmxCapabilities::new(&recent()).unwrap();
        assert_eq!(caps.revision, 0x13);
        assert_eq!(caps.pin, 0x16 | 0x69);
        assert_eq!(caps.primary & REQUIRED_PRIMARY, REQUIRED_PRIMARY);
        assert_eq!(caps.primary & (primary::CR3_LOAD | primary::CR3_STORE), 0);
        assert_eq!(caps.primary & (primary::INTERRUPT_WINDOW | primary::NMI_WINDOW), 0, "asked for one by one");
        assert_eq!(caps.exit & 0x3_6dfb, 0x3_6dfb, "what must be one is one");
        assert!(caps.has_timer() && caps.has_vpid() && caps.has_pause_loop());
        assert!(caps.has_encls() && !caps.has_enclv(), "what exists exits");
        assert_eq!((caps.timer_shift, caps.zero_length), (5, true));
        assert_eq!(caps.cr0.ones, 0x20, "PE and PG are the guest's");
        assert_eq!(caps.cr4.ones, 0x2000);
        assert_eq!((caps.levels(46), caps.levels(52)), (Levels::Four, Levels::Four));
    }

    #[test]
    fn what_is_missing_is_named() {
        type Change = fn(&mut Msrs);
        let cases: [(Change, &str); 9] = [
            (|m| m.secondary &= !(1 << 33), "EPT"),
            (|m| m.secondary &= !(1 << 39), "unrestricted guest"),
            (|m| m.primary &= !(1 << 63), "secondary controls"),
            (|m| m.primary &= !(1 << 60), "MSR bitmaps"),
            (|m| m.primary |= 1 << 15, "CR3 accesses without exits"),
            (|m| m.pin &= !(1 << 37), "virtual NMIs"),
            (|m| m.ept_vpid &= !(1 << 20), "INVEPT"),
            (|m| m.ept_vpid &= !(1 << 16), "EPT with 2 MiB pages"),
            (|m| m.entry &= !(1 << 47), "PAT and EFER loads at entries"),
        ];
        for (change, name) in cases {
            let mut msrs = recent();
            change(&mut msrs);
            assert_eq!(VmxCapabilities::new(&msrs), Err(Missing(name)));
        }
    }

    #[test]
    fn what_can_be_done_without_is() {
        let mut msrs = recent();
        msrs.pin &= !(1 << 38);
        msrs.secondary &= !(1 << 42 | 1 << 44 | 1 << 35);
        msrs.ept_vpid &= !(1 << 32);
        let caps = VmxCapabilities::new(&msrs).unwrap();
        assert!(!caps.has_timer() && !caps.has_vpid() && !caps.has_pause_loop());
        assert!(!VmxCapabilities::new(&Msrs { signature: 0x106a5, ..recent() }).unwrap().has_timer(), "an erratum");
        assert_eq!(caps.secondary_for(true, true) & (secondary::RDTSCP | secondary::INVPCID), 0);
    }

    #[test]
    fn the_apic_comes_in_steps() {
        type Change = fn(&mut Msrs);
        let cases: [(Change, ApicSupport); 8] = [
            (|_| (), ApicSupport::Posted),
            (|m| m.pin &= !(1 << 39), ApicSupport::Delivery),
            (|m| m.exit &= !(1 << 47), ApicSupport::Delivery),
            (|m| m.secondary &= !(1 << 36), ApicSupport::TaskPriority),
            (|m| m.secondary &= !(1 << 40), ApicSupport::TaskPriority),
            (|m| m.secondary &= !(1 << 41), ApicSupport::TaskPriority),
            (|m| m.primary &= !(1 << 53), ApicSupport::None),
            (|m| m.primary |= 1 << 19, ApicSupport::None),
        ];
        for (number, (change, support)) in cases.into_iter().enumerate() {
            let mut msrs = recent();
            change(&mut msrs);
            assert_eq!(VmxCapabilities::new(&msrs).unwrap().apic, support, "case {number}");
        }
        for (steps, support) in [(0, ApicSupport::None), (2, ApicSupport::Delivery), (200, ApicSupport::Posted)] {
            assert_eq!(ApicSupport::steps(steps), support);
        }
    }

    #[test]
    fn rdtscp_and_invpcid_follow_the_guest() {
        let caps = VmxCapabilities::new(&recent()).unwrap();
        let both = secondary::RDTSCP | secondary::INVPCID;
        assert_eq!(caps.secondary_for(false, false) & both, 0);
        assert_eq!(caps.secondary_for(true, false) & both, secondary::RDTSCP);
        assert_eq!(caps.secondary_for(true, true) & both, both);
    }

    #[test]
    fn true_capabilities_are_read_where_they_exist() {
        let value = |index: u32| if index == 0x480 { 1 << 55 } else { u64::from(index) | 1 << 63 };
        let msrs = Msrs::read(0, value);
        assert_eq!((msrs.pin as u32, msrs.primary as u32), (0x48d, 0x48e));
        assert_eq!((msrs.exit as u32, msrs.entry as u32), (0x48f, 0x490));
        let msrs = Msrs::read(0, |index| if index == 0x480 { 0 } else { u64::from(index) });
        assert_eq!((msrs.pin as u32, msrs.primary as u32), (0x481, 0x482));
        assert_eq!((msrs.exit as u32, msrs.entry as u32), (0x483, 0x484));
        assert_eq!((msrs.secondary, msrs.ept_vpid), (0, 0), "MSRs that need not exist are not read");
    }

    #[test]
    fn ept_pointers_name_depth_and_type() {
        assert_eq!(ept_pointer(0x1234_5000, Levels::Four), 0x1234_501e);
        assert_eq!(ept_pointer(0x1234_5000, Levels::Five), 0x1234_5026);
    }
}
