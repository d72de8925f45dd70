// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! What enters the guest through its IDT: exceptions, NMIs, external and software interrupts, how two of them combine, and how
//! userspace describes one.

use axvcpu_uapi::vcpu::{
    Event, EVENT_EXCEPTION, EVENT_EXTERNAL_INTERRUPT, EVENT_HAS_ADDRESS, EVENT_HAS_ERROR_CODE, EVENT_NMI,
    EVENT_SOFTWARE_INTERRUPT,
};
use vcpu_core::{AxError, AxResult};

/// #DB.
pub(crate) const DB: u8 = 1;
/// #BP.
const BP: u8 = 3;
/// #OF.
const OF: u8 = 4;
/// #UD.
const UD: u8 = 6;
/// #DF.
pub(super) const DF: u8 = 8;
/// #GP.
const GP: u8 = 13;
/// #PF.
pub(super) const PF: u8 = 14;
/// #MC.
const MC: u8 = 18;
/// #AC.
pub(crate) const AC: u8 = 17;

/// Vectors of exceptions that push an error code: #DF, #TS, #NP, #SS, #GP, #PF, #AC, #CP, #VC, #SX.
const WITH_ERROR_CODE: u32 = 1 << 8 | 0x1f << 10 | 1 << 17 | 1 << 21 | 3 << 29;
/// Vectors that no exception has: NMI's, 9, 15, and those from 22 to 27 and 31. The hardware refuses to inject them.
const NO_EXCEPTION: u32 = 1 << 2 | 1 << 9 | 1 << 15 | 0x3f << 22 | 1 << 31;

/// An event that enters the guest through its IDT. The numbers are those of EVENTINJ and EXITINTINFO.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Injection {
    /// An external interrupt.
    External(u8),
    /// NMI.
    Nmi,
    /// An exception, with its error code where it has one.
    Exception(u8, Option<u32>),
    /// `INT n`.
    Software(u8),
}

impl Injection {
    /// #GP(0).
    pub(crate) const GENERAL_PROTECTION: Self = Self::Exception(GP, Some(0));
    /// #UD.
    pub(crate) const UNDEFINED: Self = Self::Exception(UD, None);
    /// #DB.
    pub(crate) const DEBUG: Self = Self::Exception(DB, None);

    /// Whether it is a fault: RFLAGS on the stack has RF set, so that an instruction breakpoint on the restarted instruction
    /// does not hit twice (APM vol. 2 sections 3.1.6 and 8.2). #DB is either, and comes with RF as it should be.
    pub(crate) const fn is_fault(self) -> bool {
        matches!(self, Self::Exception(vector, _) if !matches!(vector, DB | BP | OF | DF | MC))
    }

    /// Whether the guest's own instruction raises it, so that RIP is at that instruction until it is delivered and executing
    /// it again raises it again.
    pub(super) const fn is_software(self) -> bool {
        matches!(self, Self::Software(_) | Self::Exception(BP | OF, _))
    }
}

/// What becomes of an exception that is raised while another event is delivered (APM vol. 2 section 8.2.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Combined {
    /// The second is delivered.
    Second,
    /// #DF is.
    DoubleFault,
    /// The CPU shuts down.
    Shutdown,
}

/// Combines exception `second` with `first`, during whose delivery it was raised.
pub(super) fn combine(first: Injection, second: u8) -> Combined {
    let Injection::Exception(first, _) = first else { return Combined::Second };
    let contributory = |vector| matches!(vector, 0 | 10..=13 | 21);
    match first {
        DF if contributory(second) || second == PF => Combined::Shutdown,
        PF if contributory(second) || second == PF => Combined::DoubleFault,
        _ if contributory(first) && contributory(second) => Combined::DoubleFault,
        _ => Combined::Second,
    }
}

/// The event of this description, and the address for CR2.
pub(super) fn decode(event: &Event, vector: u8, protected_mode: bool) -> AxResult<(Injection, Option<u64>)> {
    let has_code = event.flags & EVENT_HAS_ERROR_CODE != 0;
    let has_address = event.flags & EVENT_HAS_ADDRESS != 0;
    if event.flags & !(EVENT_HAS_ERROR_CODE | EVENT_HAS_ADDRESS) != 0 {
        return Err(AxError::InvalidInput);
    }
    let injection = match event.kind {
        EVENT_EXTERNAL_INTERRUPT if event.flags == 0 => Injection::External(vector),
        EVENT_NMI if event.flags == 0 => Injection::Nmi,
        EVENT_SOFTWARE_INTERRUPT if event.flags == 0 => Injection::Software(vector),
        EVENT_EXCEPTION => {
            let bit = 1u32.checked_shl(vector.into()).ok_or(AxError::InvalidInput)?;
            // Real mode has no error codes.
            let expects_code = WITH_ERROR_CODE & bit != 0 && protected_mode;
            if NO_EXCEPTION & bit != 0 || has_code != expects_code || (has_address && vector != PF) {
                return Err(AxError::InvalidInput);
            }
            Injection::Exception(vector, has_code.then_some(event.error_code))
        }
        _ => return Err(AxError::InvalidInput),
    };
    Ok((injection, has_address.then_some(event.address)))
}

/// The description of an event.
pub(super) fn encode(injection: Injection, address: Option<u64>) -> Event {
    let (kind, vector, code) = match injection {
        Injection::External(vector) => (EVENT_EXTERNAL_INTERRUPT, vector, None),
        Injection::Nmi => (EVENT_NMI, 0, None),
        Injection::Exception(vector, code) => (EVENT_EXCEPTION, vector, code),
        Injection::Software(vector) => (EVENT_SOFTWARE_INTERRUPT, vector, None),
    };
    let flag = |condition, flag| if condition { flag } else { 0 };
    Event {
        kind,
        vector: vector.into(),
        error_code: code.unwrap_or(0),
        flags: flag(code.is_some(), EVENT_HAS_ERROR_CODE) | flag(address.is_some(), EVENT_HAS_ADDRESS),
        address: address.unwrap_or(0),
    }
}
