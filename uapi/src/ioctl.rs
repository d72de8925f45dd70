// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! ioctl numbers, encoded as Linux does (`include/uapi/asm-generic/ioctl.h`, the encoding of x86-64 and arm64):
//! bits 31:30 direction, 29:16 size of the argument, 15:8 type, 7:0 number.

use crate::layout::AbiStruct;
use crate::{arm64, aspace, system, vcpu, vm};

/// The type byte of every axvcpu ioctl.
pub const TYPE: u8 = 0xa7;

const NONE: u32 = 0;
const WRITE: u32 = 1;
const READ: u32 = 2;

const fn encode(dir: u32, nr: u8, size: usize) -> u32 {
    assert!(size < 1 << 14, "the size does not fit the ioctl encoding");
    (dir << 30) | ((size as u32) << 16) | ((TYPE as u32) << 8) | nr as u32
}
const fn none(nr: u8) -> u32 {
    encode(NONE, nr, 0)
}
const fn write<T: AbiStruct>(nr: u8) -> u32 {
    encode(WRITE, nr, T::SIZE)
}
const fn read<T: AbiStruct>(nr: u8) -> u32 {
    encode(READ, nr, T::SIZE)
}
const fn read_write<T: AbiStruct>(nr: u8) -> u32 {
    encode(READ | WRITE, nr, T::SIZE)
}

// On /dev/axvcpu.

/// Describes the module and the CPU: [`system::SystemInfo`]. Its number never changes.
pub const INFO: u32 = read::<system::SystemInfo>(0x00);
/// Reads the CPUID leaves that a guest may be given: [`system::CpuidTable`].
pub const SUPPORTED_CPUID: u32 = read_write::<system::CpuidTable>(0x01);
/// Creates a virtual machine and returns its file descriptor: [`system::CreateVm`].
pub const CREATE_VM: u32 = write::<system::CreateVm>(0x02);

// On a VM.

/// Creates an address space and returns its file descriptor: [`vm::CreateAddressSpace`].
pub const CREATE_ADDRESS_SPACE: u32 = write::<vm::CreateAddressSpace>(0x10);
/// Creates a vCPU and returns its file descriptor: [`vm::CreateVcpu`].
pub const CREATE_VCPU: u32 = write::<vm::CreateVcpu>(0x11);
/// Delivers a message-signalled interrupt to the in-kernel interrupt controllers: [`vm::Msi`].
pub const SIGNAL_MSI: u32 = write::<vm::Msi>(0x12);
/// Reads the VM's statistics: [`vm::VmStats`].
pub const VM_STATS: u32 = read::<vm::VmStats>(0x13);
/// Attaches an eventfd that interrupts the guest, or detaches it: [`vm::Irqfd`].
pub const IRQFD: u32 = write::<vm::Irqfd>(0x14);
/// Attaches an eventfd that the guest signals, or detaches it: [`vm::IoEventfd`].
pub const IOEVENTFD: u32 = write::<vm::IoEventfd>(0x15);
/// Creates the interrupt controller (AArch64): [`arm64::Gic`].
pub const CREATE_GIC: u32 = write::<arm64::Gic>(0x16);

// On an address space.

/// Maps a range of the caller's memory: [`aspace::MapRegion`].
pub const MAP: u32 = write::<aspace::MapRegion>(0x20);
/// Removes a range: [`aspace::Range`].
pub const UNMAP: u32 = write::<aspace::Range>(0x21);
/// Changes the access rights of a mapped range: [`aspace::ProtectRange`].
pub const PROTECT: u32 = write::<aspace::ProtectRange>(0x22);
/// Starts to log which pages of a range the guest writes: [`aspace::Range`].
pub const START_DIRTY_LOG: u32 = write::<aspace::Range>(0x23);
/// Reads the dirty log and clears it: [`aspace::DirtyLogRead`].
pub const READ_DIRTY_LOG: u32 = read_write::<aspace::DirtyLogRead>(0x24);
/// Stops logging.
pub const STOP_DIRTY_LOG: u32 = none(0x25);

// On a vCPU.

/// Sets the entry point: [`vcpu::Entry`].
pub const SET_ENTRY: u32 = write::<vcpu::Entry>(0x30);
/// Chooses the address space: [`vcpu::EptRoot`].
pub const SET_EPT_ROOT: u32 = write::<vcpu::EptRoot>(0x31);
/// Completes the vCPU: [`vcpu::Setup`].
pub const SETUP: u32 = write::<vcpu::Setup>(0x32);
/// Runs the guest until an exit that the caller must see; the exit is in the [`run`](crate::run) page.
pub const RUN: u32 = none(0x33);
/// Sets one general register: [`vcpu::Gpr`].
pub const SET_GPR: u32 = write::<vcpu::Gpr>(0x34);
/// Reads a register set: [`vcpu::RegisterSet`].
pub const GET_REGS: u32 = write::<vcpu::RegisterSet>(0x35);
/// Writes a register set: [`vcpu::RegisterSet`].
pub const SET_REGS: u32 = write::<vcpu::RegisterSet>(0x36);
/// Queues an event for the guest: [`vcpu::Event`].
pub const INJECT: u32 = write::<vcpu::Event>(0x37);
/// Makes the current or else the next [`RUN`] return, from any thread at any time.
pub const KICK: u32 = none(0x38);
/// Reads or writes a register of the in-kernel local APIC: [`vcpu::ApicAccess`].
pub const APIC_ACCESS: u32 = read_write::<vcpu::ApicAccess>(0x39);
/// Reads the vCPU's statistics: [`vcpu::VcpuStats`].
pub const VCPU_STATS: u32 = read::<vcpu::VcpuStats>(0x3a);

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_are_those_of_the_linux_encoding() {
        // Worked out by hand from asm-generic/ioctl.h: _IO(0xa7, 0x33) and _IOW(0xa7, 0x30, 8 bytes).
        assert_eq!(super::RUN, 0x0000_a733);
        assert_eq!(super::SET_ENTRY, 0x4008_a730);
        assert_eq!(super::INFO >> 30, 2);
        assert_eq!(super::APIC_ACCESS >> 30, 3);
    }
}
