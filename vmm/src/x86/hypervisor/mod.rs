// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the machine needs of a hypervisor on x86 beyond what it needs everywhere: CPUID, interrupt messages, the
//! interrupt window, and the state that decoding an instruction takes.
//!
//! | file | hypervisor |
//! |---|---|
//! | `axvcpu.rs` | the module axvcpu |
//! | `kvm/` | KVM |

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Brief, Snapshot};
use axvcpu_uapi::vcpu::Event;
use axvcpu_uapi::x86::{Control, CpuidEntry, Debug, Events, General, Segments};

use crate::hypervisor::{Registers, Result, Vcpu, Vm};
use crate::x86::device::irq::MessageSink;

pub mod axvcpu;
pub mod kvm;

/// A virtual machine whose local APICs the hypervisor emulates; every other device is ours.
pub trait X86Vm: Vm<Vcpu: X86Vcpu> {
    /// The CPUID leaves that a guest may be given, with every feature that host and hypervisor can offer.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>>;

    /// Creates vCPU `id`, which is its local APIC id, too. Number 0 starts in real mode at `entry`, below 4 GiB, with a
    /// code segment based at the address's upper bits; the others wait for INIT and SIPI.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn create_vcpu(&mut self, id: u32, entry: GuestPhysAddr, cpuid: &[CpuidEntry]) -> Result<Self::Vcpu>;

    /// What delivers interrupt messages to the local APICs.
    fn messages(&self) -> Box<dyn MessageSink>;
}

/// A virtual CPU with its local APIC.
pub trait X86Vcpu:
    Vcpu + Registers<General> + Registers<Segments> + Registers<Control> + Registers<Debug> + Registers<Events>
{
    /// Asks for (or no longer for) an `InterruptWindow` exit as soon as the guest can take an external interrupt.
    fn request_interrupt_window(&mut self, on: bool);

    /// Hands over the external interrupt `vector`, which the 8259s have acknowledged. Says whether the vCPU took it: it
    /// holds one at a time.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn interrupt(&mut self, vector: u8) -> Result<bool>;

    /// Queues an exception or another event for the next entry.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn inject(&mut self, event: &Event) -> Result<()>;

    /// The general registers at the last exit, as [`set_general`](Self::set_general) has changed them since.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn general(&self) -> Result<General>;

    /// Changes the general registers after an exit, cheaper than [`Registers::set`] where the hypervisor allows it.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn set_general(&mut self, general: &General) -> Result<()>;

    /// Control registers and segments at the last exit, if that wants an instruction decoded.
    fn snapshot(&self) -> Option<Snapshot>;

    /// Some of that.
    fn brief(&self) -> Option<Brief> {
        self.snapshot().as_ref().map(Brief::from)
    }

    /// The extended state (FPU, SSE, AVX, ...) in the standard format of XSAVE.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn xsave(&self) -> Result<Vec<u8>>;

    /// Writes the extended state; `area` has the length and format that [`xsave`](Self::xsave) gives.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn set_xsave(&mut self, area: &[u8]) -> Result<()>;

    /// Carries out a decoded access of the guest to its xAPIC page, at byte `offset`: a write of the given value, or a
    /// read. The value read or written, or `None` if no register is there. Hypervisors that decode such accesses
    /// themselves never see it called.
    ///
    /// # Errors
    /// What the hypervisor reports.
    fn apic_access(&mut self, offset: u32, write: Option<u32>) -> Result<Option<u32>>;
}
