// SPDX-License-Identifier: MIT OR Apache-2.0
//! The devices of a small PC.
//!
//! | file | device |
//! |---|---|
//! | `cmos.rs` | MC146818 clock and CMOS RAM |
//! | `debug.rs` | debug exit and debug console |
//! | `ioapic.rs` | I/O APIC |
//! | `irq.rs` | where interrupt lines lead |
//! | `keyboard.rs` | i8042, as far as resetting goes |
//! | `pci.rs` | PCI configuration ports of an empty bus, reset control |
//! | `pic.rs` | pair of 8259s |
//! | `pit.rs` | 8254 timer and port 0x61 |
//! | `power.rs` | ACPI sleep, reset control, system control port A |

pub mod cmos;
pub mod debug;
pub mod ioapic;
pub mod irq;
pub mod keyboard;
pub mod pci;
pub mod pic;
pub mod pit;
pub mod power;
