// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! The one fault that register accesses raise in the guest.
#![forbid(unsafe_code)]

/// The access is not allowed: the guest gets #GP(0), and nothing has changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// Result of a guest's access to a register.
pub type GuestResult<T = ()> = Result<T, GeneralProtection>;
