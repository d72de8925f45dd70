// SPDX-License-Identifier: MIT OR Apache-2.0
//! The machine as the instruction emulator sees it: RAM, devices, this CPU's local APIC and vector registers.

use axvcpu_uapi::addr::GuestPhysAddr;

use crate::hypervisor;
use crate::x86::emulate::{Bus, PortBus};
use crate::x86::hypervisor::X86Vcpu;
use crate::x86::layout::LOCAL_APIC;
use crate::x86::machine::Machine;
use crate::x86::paging::GuestMemory;

/// Offset of the XMM registers in an XSAVE area (SDM volume 1, table 10-2).
const XSAVE_XMM: usize = 160;
/// Offset of XSTATE_BV: which components are not in their initial state (SDM volume 1, section 13.4.2).
const XSAVE_XSTATE_BV: usize = 512;
/// XSTATE_BV: the SSE component.
const XSTATE_SSE: u8 = 1 << 1;
/// Size of the 16 XMM registers.
const XMM_BYTES: usize = 256;

/// One vCPU's view of the machine, for the time of one instruction.
pub(super) struct Access<'a, V> {
    vcpu: &'a mut V,
    machine: &'a Machine,
}

impl<'a, V: X86Vcpu> Access<'a, V> {
    pub(super) fn new(vcpu: &'a mut V, machine: &'a Machine) -> Self {
        Self { vcpu, machine }
    }

    /// Reads the local APIC. Its registers are 32 bits wide, at multiples of 16.
    fn apic_read(&mut self, offset: u32, data: &mut [u8]) -> Result<(), hypervisor::Error> {
        // Reserved space reads as zero.
        let value = self.vcpu.apic_access(offset & !3, None)?.unwrap_or(0);
        let bytes = value.to_le_bytes();
        let skip = (offset & 3) as usize;
        data.fill(0);
        for (byte, value) in data.iter_mut().zip(bytes.iter().skip(skip)) {
            *byte = *value;
        }
        Ok(())
    }

    /// Writes the local APIC. Only 32-bit writes to a register have an effect (SDM volume 3A, section 12.4.1.1).
    fn apic_write(&mut self, offset: u32, data: &[u8]) -> Result<(), hypervisor::Error> {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return Ok(()) };
        self.vcpu.apic_access(offset, Some(value)).map(drop)
    }
}

/// Where in the local APIC's page an address is.
fn apic_offset(at: GuestPhysAddr) -> Option<u32> {
    LOCAL_APIC.contains(&at.as_u64()).then(|| (at.as_u64() - LOCAL_APIC.start) as u32)
}

impl<V: X86Vcpu> GuestMemory for Access<'_, V> {
    type Error = hypervisor::Error;

    fn read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), hypervisor::Error> {
        if self.machine.ram.read(at, data).is_err() {
            data.fill(0xff);
        }
        Ok(())
    }

    fn compare_exchange(
        &mut self,
        at: GuestPhysAddr,
        width: usize,
        old: u64,
        new: u64,
    ) -> Result<bool, hypervisor::Error> {
        Ok(self.machine.ram.compare_exchange(at, width, old, new).unwrap_or(true))
    }
}

impl<V: X86Vcpu> Bus for Access<'_, V> {
    fn is_ram(&self, at: GuestPhysAddr, _write: bool) -> bool {
        let page = at.align_down(4096).as_u64();
        self.machine.ram.contains(&(page..page.saturating_add(4096)))
    }

    fn write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), hypervisor::Error> {
        // The caller has asked `is_ram`, and RAM never goes away.
        let _ = self.machine.ram.write_atomically(at, data);
        Ok(())
    }

    fn mmio_read(&mut self, at: GuestPhysAddr, data: &mut [u8]) -> Result<(), hypervisor::Error> {
        if let Some(offset) = apic_offset(at) {
            return self.apic_read(offset, data);
        }
        self.machine.mmio.read(at.as_u64(), data);
        Ok(())
    }

    fn mmio_write(&mut self, at: GuestPhysAddr, data: &[u8]) -> Result<(), hypervisor::Error> {
        if let Some(offset) = apic_offset(at) {
            return self.apic_write(offset, data);
        }
        self.machine.mmio.write(at.as_u64(), data);
        Ok(())
    }

    fn xmm_read(&mut self, index: usize) -> Result<[u8; 16], hypervisor::Error> {
        Ok(xmm(&self.vcpu.xsave()?, index))
    }

    fn xmm_write(&mut self, index: usize, value: [u8; 16]) -> Result<(), hypervisor::Error> {
        let mut area = self.vcpu.xsave()?;
        set_xmm(&mut area, index, value);
        self.vcpu.set_xsave(&area)
    }
}

impl<V: X86Vcpu> PortBus for Access<'_, V> {
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Result<(), hypervisor::Error> {
        self.machine.ports.read(port.into(), data);
        Ok(())
    }

    fn port_write(&mut self, port: u16, data: &[u8]) -> Result<(), hypervisor::Error> {
        self.machine.ports.write(port.into(), data);
        Ok(())
    }
}

/// An XMM register from an XSAVE area: zero while the SSE component is in its initial state.
fn xmm(area: &[u8], index: usize) -> [u8; 16] {
    let start = XSAVE_XMM + 16 * index;
    let in_use = area.get(XSAVE_XSTATE_BV).is_some_and(|bv| bv & XSTATE_SSE != 0);
    let value = area.get(start..start + 16).filter(|_| in_use);
    value.and_then(|bytes| bytes.try_into().ok()).unwrap_or_default()
}

fn set_xmm(area: &mut [u8], index: usize, value: [u8; 16]) {
    let Some(bv) = area.get_mut(XSAVE_XSTATE_BV) else { return };
    let was_in_use = *bv & XSTATE_SSE != 0;
    *bv |= XSTATE_SSE;
    if !was_in_use {
        if let Some(registers) = area.get_mut(XSAVE_XMM..XSAVE_XMM + XMM_BYTES) {
            registers.fill(0);
        }
    }
    let start = XSAVE_XMM + 16 * index;
    if let Some(register) = area.get_mut(start..start + 16) {
        register.copy_from_slice(&value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vector_registers_in_their_initial_state_are_zero() {
        let mut area = vec![0xaa; 576];
        area[XSAVE_XSTATE_BV] = 0b101;
        assert_eq!(xmm(&area, 3), [0; 16]);
        set_xmm(&mut area, 3, [7; 16]);
        assert_eq!(area[XSAVE_XSTATE_BV], 0b111);
        assert_eq!((xmm(&area, 3), xmm(&area, 2), xmm(&area, 15)), ([7; 16], [0; 16], [0; 16]));
        set_xmm(&mut area, 15, [9; 16]);
        assert_eq!((xmm(&area, 3), xmm(&area, 15)), ([7; 16], [9; 16]));
        assert_eq!(area[XSAVE_XMM + 256], 0xaa, "what follows is left alone");
    }

    #[test]
    fn short_areas_are_survived() {
        set_xmm(&mut [], 0, [1; 16]);
        assert_eq!(xmm(&[], 0), [0; 16]);
    }

    #[test]
    fn only_its_page_is_the_local_apic() {
        assert_eq!(apic_offset(GuestPhysAddr::new(0xfee0_0020)), Some(0x20));
        assert_eq!(apic_offset(GuestPhysAddr::new(0xfee0_1000)), None);
        assert_eq!(apic_offset(GuestPhysAddr::new(0xfedf_ffff)), None);
    }
}
