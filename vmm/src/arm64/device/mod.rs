// SPDX-License-Identifier: MIT OR Apache-2.0
//! The devices of the machine beside its serial port.
//!
//! | file | device |
//! |---|---|
//! | `clock.rs` | PL031 clock |

pub mod clock;
