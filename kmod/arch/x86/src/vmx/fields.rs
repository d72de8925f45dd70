// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The fields of a VMCS that this backend uses, each declared once with its encoding (SDM vol. 3, appendix B).
//!
//! An encoding tells a field's width and group itself (SDM vol. 3 section 25.11.2): bits 14:13 the width, bits 11:10 the
//! group; the tests hold each name against both.

/// Width of a field.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Width {
    Bits16,
    Bits32,
    Bits64,
    Natural,
}

/// What a field is for.
#[cfg(test)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    Control,
    ExitInformation,
    Guest,
    Host,
}

macro_rules! fields {
    ($($(#[$meta:meta])* $name:ident = $encoding:literal,)+) => {
        /// A field, by its encoding.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub(crate) enum Field { $($(#[$meta])* $name = $encoding,)+ }

        #[cfg(test)]
        const ALL: &[(Field, &str)] = &[$((Field::$name, stringify!($name)),)+];
    };
}

fields! {
    /// Virtual-processor identifier, not 0.
    ControlVpid = 0x0000,
    /// Vector by which another CPU tells that it has posted interrupts.
    ControlPostedVector = 0x0002,

    GuestEsSelector = 0x0800,
    GuestCsSelector = 0x0802,
    GuestSsSelector = 0x0804,
    GuestDsSelector = 0x0806,
    GuestFsSelector = 0x0808,
    GuestGsSelector = 0x080a,
    GuestLdtrSelector = 0x080c,
    GuestTrSelector = 0x080e,
    /// RVI in the low half: the highest virtual interrupt requested; SVI in the high one: the highest in service.
    GuestInterruptStatus = 0x0810,

    HostEsSelector = 0x0c00,
    HostCsSelector = 0x0c02,
    HostSsSelector = 0x0c04,
    HostDsSelector = 0x0c06,
    HostFsSelector = 0x0c08,
    HostGsSelector = 0x0c0a,
    HostTrSelector = 0x0c0c,

    /// Physical address of the MSR bitmap.
    ControlMsrBitmap = 0x2004,
    /// Added to the TSC that the guest reads.
    ControlTscOffset = 0x2010,
    /// Physical address of the local APIC's registers.
    ControlVirtualApic = 0x2012,
    /// Physical address of the posted-interrupt descriptor.
    ControlPostedDescriptor = 0x2016,
    /// EPTP: root of the extended page table, with its depth and memory type.
    ControlEptPointer = 0x201a,
    /// Vectors whose end exits, 64 in each field.
    ControlEoiExit0 = 0x201c,
    ControlEoiExit1 = 0x201e,
    ControlEoiExit2 = 0x2020,
    ControlEoiExit3 = 0x2022,
    /// Leaves of ENCLS that exit.
    ControlEnclsBitmap = 0x202e,
    /// Leaves of ENCLV that exit.
    ControlEnclvBitmap = 0x2036,
    /// Where an EPT violation happened.
    ExitGuestPhysicalAddress = 0x2400,
    /// All ones: no shadow VMCS.
    GuestLinkPointer = 0x2800,
    GuestDebugctl = 0x2802,
    GuestPat = 0x2804,
    GuestEfer = 0x2806,
    /// The four page-directory-pointer-table entries of PAE paging.
    GuestPdpte0 = 0x280a,
    GuestPdpte1 = 0x280c,
    GuestPdpte2 = 0x280e,
    GuestPdpte3 = 0x2810,
    HostPat = 0x2c00,
    HostEfer = 0x2c02,

    ControlPin = 0x4000,
    ControlPrimary = 0x4002,
    /// Vectors of exceptions that exit.
    ControlExceptionBitmap = 0x4004,
    ControlPageFaultMask = 0x4006,
    ControlPageFaultMatch = 0x4008,
    ControlCr3TargetCount = 0x400a,
    ControlExit = 0x400c,
    ControlExitMsrStoreCount = 0x400e,
    ControlExitMsrLoadCount = 0x4010,
    ControlEntry = 0x4012,
    ControlEntryMsrLoadCount = 0x4014,
    /// The event to inject.
    ControlEntryInterruption = 0x4016,
    ControlEntryErrorCode = 0x4018,
    /// Length of the instruction that an injected software event stands for.
    ControlEntryInstructionLength = 0x401a,
    /// A task priority class below this one exits.
    ControlTprThreshold = 0x401c,
    ControlSecondary = 0x401e,
    /// PAUSEs of a loop are at most so many cycles apart.
    ControlPauseGap = 0x4020,
    /// A loop of PAUSEs exits after so many cycles.
    ControlPauseWindow = 0x4022,

    /// Why VMLAUNCH or another instruction has failed.
    ExitInstructionError = 0x4400,
    ExitReason = 0x4402,
    /// The exception or NMI that is the exit.
    ExitInterruption = 0x4404,
    ExitInterruptionErrorCode = 0x4406,
    /// The event whose delivery the exit has interrupted.
    ExitVectoring = 0x4408,
    ExitVectoringErrorCode = 0x440a,
    ExitInstructionLength = 0x440c,

    GuestEsLimit = 0x4800,
    GuestCsLimit = 0x4802,
    GuestSsLimit = 0x4804,
    GuestDsLimit = 0x4806,
    GuestFsLimit = 0x4808,
    GuestGsLimit = 0x480a,
    GuestLdtrLimit = 0x480c,
    GuestTrLimit = 0x480e,
    GuestGdtrLimit = 0x4810,
    GuestIdtrLimit = 0x4812,
    GuestEsRights = 0x4814,
    GuestCsRights = 0x4816,
    GuestSsRights = 0x4818,
    GuestDsRights = 0x481a,
    GuestFsRights = 0x481c,
    GuestGsRights = 0x481e,
    GuestLdtrRights = 0x4820,
    GuestTrRights = 0x4822,
    /// Blocking by STI, by MOV SS, of NMIs.
    GuestInterruptibility = 0x4824,
    GuestActivity = 0x4826,
    GuestSysenterCs = 0x482a,
    /// Counts down while the guest runs.
    GuestPreemptionTimer = 0x482e,
    HostSysenterCs = 0x4c00,

    /// Bits of CR0 that the guest cannot change without an exit, and reads from the shadow.
    ControlCr0Mask = 0x6000,
    ControlCr4Mask = 0x6002,
    ControlCr0Shadow = 0x6004,
    ControlCr4Shadow = 0x6006,
    /// What the reason leaves open.
    ExitQualification = 0x6400,

    GuestCr0 = 0x6800,
    GuestCr3 = 0x6802,
    GuestCr4 = 0x6804,
    GuestEsBase = 0x6806,
    GuestCsBase = 0x6808,
    GuestSsBase = 0x680a,
    GuestDsBase = 0x680c,
    GuestFsBase = 0x680e,
    GuestGsBase = 0x6810,
    GuestLdtrBase = 0x6812,
    GuestTrBase = 0x6814,
    GuestGdtrBase = 0x6816,
    GuestIdtrBase = 0x6818,
    GuestDr7 = 0x681a,
    GuestRsp = 0x681c,
    GuestRip = 0x681e,
    GuestRflags = 0x6820,
    GuestPendingDebug = 0x6822,
    GuestSysenterEsp = 0x6824,
    GuestSysenterEip = 0x6826,

    HostCr0 = 0x6c00,
    HostCr3 = 0x6c02,
    HostCr4 = 0x6c04,
    HostFsBase = 0x6c06,
    HostGsBase = 0x6c08,
    HostTrBase = 0x6c0a,
    HostGdtrBase = 0x6c0c,
    HostIdtrBase = 0x6c0e,
    HostSysenterEsp = 0x6c10,
    HostSysenterEip = 0x6c12,
    HostRsp = 0x6c14,
    HostRip = 0x6c16,
}

impl Field {
    /// The operand of VMREAD and VMWRITE.
    #[inline]
    pub(crate) const fn encoding(self) -> u64 {
        self as u64
    }
}

/// The four fields of a segment register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SegmentFields {
    pub(crate) selector: Field,
    pub(crate) limit: Field,
    pub(crate) rights: Field,
    pub(crate) base: Field,
}

macro_rules! segment {
    ($selector:ident, $limit:ident, $rights:ident, $base:ident) => {
        SegmentFields { selector: Field::$selector, limit: Field::$limit, rights: Field::$rights, base: Field::$base }
    };
}

/// ES.
pub(crate) const ES: SegmentFields = segment!(GuestEsSelector, GuestEsLimit, GuestEsRights, GuestEsBase);
/// CS.
pub(crate) const CS: SegmentFields = segment!(GuestCsSelector, GuestCsLimit, GuestCsRights, GuestCsBase);
/// SS.
pub(crate) const SS: SegmentFields = segment!(GuestSsSelector, GuestSsLimit, GuestSsRights, GuestSsBase);
/// DS.
pub(crate) const DS: SegmentFields = segment!(GuestDsSelector, GuestDsLimit, GuestDsRights, GuestDsBase);
/// FS.
pub(crate) const FS: SegmentFields = segment!(GuestFsSelector, GuestFsLimit, GuestFsRights, GuestFsBase);
/// GS.
pub(crate) const GS: SegmentFields = segment!(GuestGsSelector, GuestGsLimit, GuestGsRights, GuestGsBase);
/// LDTR.
pub(crate) const LDTR: SegmentFields = segment!(GuestLdtrSelector, GuestLdtrLimit, GuestLdtrRights, GuestLdtrBase);
/// TR.
pub(crate) const TR: SegmentFields = segment!(GuestTrSelector, GuestTrLimit, GuestTrRights, GuestTrBase);

#[cfg(test)]
mod tests {
    use super::*;

    fn width(field: Field) -> Width {
        match field.encoding() >> 13 & 3 {
            0 => Width::Bits16,
            1 => Width::Bits64,
            2 => Width::Bits32,
            _ => Width::Natural,
        }
    }

    fn group(field: Field) -> Group {
        match field.encoding() >> 10 & 3 {
            0 => Group::Control,
            1 => Group::ExitInformation,
            2 => Group::Guest,
            _ => Group::Host,
        }
    }

    #[test]
    fn names_tell_the_group_that_the_encoding_has() {
        for &(field, name) in ALL {
            let expected = match name {
                _ if name.starts_with("Control") => Group::Control,
                _ if name.starts_with("Exit") => Group::ExitInformation,
                _ if name.starts_with("Guest") => Group::Guest,
                _ => Group::Host,
            };
            assert_eq!(group(field), expected, "{name}");
            // Bit 0 selects the high half of a 64-bit field, and bits 12 and 31:15 are reserved.
            assert_eq!(field.encoding() & !0x6ffe, 0, "{name}");
        }
    }

    #[test]
    fn names_tell_the_width_that_the_encoding_has() {
        for &(field, name) in ALL {
            let expected = match name {
                "ControlVpid" | "ControlPostedVector" | "GuestInterruptStatus" => Width::Bits16,
                _ if name.ends_with("Selector") => Width::Bits16,
                "ControlMsrBitmap" | "ControlTscOffset" | "ControlEptPointer" => Width::Bits64,
                "ControlEnclsBitmap" | "ControlEnclvBitmap" => Width::Bits64,
                "ControlVirtualApic" | "ControlPostedDescriptor" => Width::Bits64,
                _ if name.contains("EoiExit") => Width::Bits64,
                "ExitGuestPhysicalAddress" | "GuestLinkPointer" | "GuestDebugctl" => Width::Bits64,
                "GuestPat" | "GuestEfer" | "HostPat" | "HostEfer" => Width::Bits64,
                _ if name.contains("Pdpte") => Width::Bits64,
                "ControlCr0Mask" | "ControlCr4Mask" | "ControlCr0Shadow" | "ControlCr4Shadow" => Width::Natural,
                "ExitQualification" => Width::Natural,
                _ if name.ends_with("Limit") || name.ends_with("Rights") || name.ends_with("SysenterCs") => {
                    Width::Bits32
                }
                "GuestInterruptibility" | "GuestActivity" | "GuestPreemptionTimer" => Width::Bits32,
                _ if name.starts_with("Guest") || name.starts_with("Host") => Width::Natural,
                _ => Width::Bits32,
            };
            assert_eq!(width(field), expected, "{name}");
        }
    }

    #[test]
    fn no_encoding_is_used_twice() {
        let mut encodings: std::vec::Vec<u64> = ALL.iter().map(|(field, _)| field.encoding()).collect();
        let count = encodings.len();
        encodings.sort_unstable();
        encodings.dedup();
        assert_eq!(encodings.len(), count);
    }

    /// Appendix B typed in a second time: runs of fields that follow each other there, from the encoding of the first.
    #[test]
    fn encodings_are_those_of_appendix_b() {
        use Field::*;
        let runs: [(u64, &[Field]); 32] = [
            (0x0000, &[ControlVpid, ControlPostedVector]),
            (0x0810, &[GuestInterruptStatus]),
            (0x0c00, &[HostEsSelector, HostCsSelector, HostSsSelector, HostDsSelector, HostFsSelector, HostGsSelector]),
            (0x0c0c, &[HostTrSelector]),
            (0x2004, &[ControlMsrBitmap]),
            (0x2010, &[ControlTscOffset, ControlVirtualApic]),
            (0x2016, &[ControlPostedDescriptor]),
            (0x201a, &[ControlEptPointer, ControlEoiExit0, ControlEoiExit1, ControlEoiExit2, ControlEoiExit3]),
            (0x202e, &[ControlEnclsBitmap]),
            (0x2036, &[ControlEnclvBitmap]),
            (0x2400, &[ExitGuestPhysicalAddress]),
            (0x2800, &[GuestLinkPointer, GuestDebugctl, GuestPat, GuestEfer]),
            (0x280a, &[GuestPdpte0, GuestPdpte1, GuestPdpte2, GuestPdpte3]),
            (0x2c00, &[HostPat, HostEfer]),
            (0x4000, &[ControlPin, ControlPrimary, ControlExceptionBitmap, ControlPageFaultMask]),
            (0x4008, &[ControlPageFaultMatch, ControlCr3TargetCount, ControlExit, ControlExitMsrStoreCount]),
            (0x4010, &[ControlExitMsrLoadCount, ControlEntry, ControlEntryMsrLoadCount, ControlEntryInterruption]),
            (0x4018, &[ControlEntryErrorCode, ControlEntryInstructionLength]),
            (0x401c, &[ControlTprThreshold]),
            (0x401e, &[ControlSecondary, ControlPauseGap, ControlPauseWindow]),
            (0x4400, &[ExitInstructionError, ExitReason, ExitInterruption, ExitInterruptionErrorCode]),
            (0x4408, &[ExitVectoring, ExitVectoringErrorCode, ExitInstructionLength]),
            (0x4810, &[GuestGdtrLimit, GuestIdtrLimit]),
            (0x4824, &[GuestInterruptibility, GuestActivity]),
            (0x482a, &[GuestSysenterCs]),
            (0x482e, &[GuestPreemptionTimer]),
            (0x4c00, &[HostSysenterCs]),
            (0x6000, &[ControlCr0Mask, ControlCr4Mask, ControlCr0Shadow, ControlCr4Shadow]),
            (0x6400, &[ExitQualification]),
            (0x6800, &[GuestCr0, GuestCr3, GuestCr4]),
            (0x6816, &[GuestGdtrBase, GuestIdtrBase, GuestDr7, GuestRsp, GuestRip, GuestRflags, GuestPendingDebug]),
            (0x6824, &[GuestSysenterEsp, GuestSysenterEip]),
        ];
        for (first, fields) in runs {
            for (index, field) in (0u64..).zip(fields) {
                assert_eq!(field.encoding(), first + 2 * index, "{field:?}");
            }
        }
        let host = [HostCr0, HostCr3, HostCr4, HostFsBase, HostGsBase, HostTrBase, HostGdtrBase, HostIdtrBase];
        let host = host.iter().chain(&[HostSysenterEsp, HostSysenterEip, HostRsp, HostRip]);
        for (index, field) in (0u64..).zip(host) {
            assert_eq!(field.encoding(), 0x6c00 + 2 * index, "{field:?}");
        }
    }

    #[test]
    fn segments_follow_each_other_in_every_group() {
        for (index, fields) in (0u64..).zip([ES, CS, SS, DS, FS, GS, LDTR, TR]) {
            assert_eq!(fields.selector.encoding(), 0x800 + 2 * index);
            assert_eq!(fields.limit.encoding(), 0x4800 + 2 * index);
            assert_eq!(fields.rights.encoding(), 0x4814 + 2 * index);
            assert_eq!(fields.base.encoding(), 0x6806 + 2 * index);
        }
    }
}
