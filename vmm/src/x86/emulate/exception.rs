// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest exceptions an emulated instruction can raise, with the vector and error code to inject.

use axvcpu_uapi::addr::GuestVirtAddr;

/// An exception for the guest (APM volume 2, chapter 8). All are faults: RIP stays at the instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #UD: the instruction is not available in this mode.
    InvalidOpcode,
    /// #NM: CR0.TS is set and the instruction uses vector registers.
    DeviceNotAvailable,
    /// #DE: division by zero, or the quotient does not fit.
    Divide,
    /// #SS with error code 0: limit or canonical violation through the stack segment.
    Stack,
    /// #GP with error code 0.
    GeneralProtection,
    /// #PF.
    PageFault {
        /// The linear address for CR2.
        address: GuestVirtAddr,
        /// Bits of [`crate::x86::paging::fault`].
        code: u32,
    },
    /// #AC with error code 0: misaligned access at CPL 3 with alignment checking on.
    Alignment,
}

impl Exception {
    /// The vector, 0 to 31.
    #[must_use]
    pub fn vector(self) -> u8 {
        match self {
            Exception::Divide => 0,
            Exception::InvalidOpcode => 6,
            Exception::DeviceNotAvailable => 7,
            Exception::Stack => 12,
            Exception::GeneralProtection => 13,
            Exception::PageFault { .. } => 14,
            Exception::Alignment => 17,
        }
    }

    /// The error code pushed with it, if the vector has one. (In real mode the processor pushes none.)
    #[must_use]
    pub fn error_code(self) -> Option<u32> {
        match self {
            Exception::Divide | Exception::InvalidOpcode | Exception::DeviceNotAvailable => None,
            Exception::Stack | Exception::GeneralProtection | Exception::Alignment => Some(0),
            Exception::PageFault { code, .. } => Some(code),
        }
    }
}
