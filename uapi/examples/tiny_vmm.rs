// SPDX-License-Identifier: MIT OR GPL-2.0-only
//! A whole virtual machine monitor: 64 KiB of memory, one vCPU in real mode, a debug console at port 0xe9.
//!
//! `cargo run --example tiny_vmm --features client`, with the module loaded, prints the guest's greeting.

use axvcpu_uapi::addr::GuestPhysAddr;
use axvcpu_uapi::client::{Apic, Memory, Permissions, System};
use axvcpu_uapi::exit::AxVCpuExitReason;
use std::error::Error;
use std::io::Write;
use std::sync::Arc;

/// Where the program lies, and starts.
const CODE: GuestPhysAddr = GuestPhysAddr::new(0x1000);

/// Writes the text behind it to port 0xe9, and halts.
const PROGRAM: &[u8] = b"\
    \xbe\x0d\x10\
    \xac\
    \x84\xc0\
    \x74\x04\
    \xe6\xe9\
    \xeb\xf7\
    \xf4\
    Hello from the guest!\n\0";
//  1000 mov si, 0x100d
//  1003 lodsb
//  1004 test al, al
//  1006 jz 0x100c
//  1008 out 0xe9, al
//  100a jmp 0x1003
//  100c hlt

fn main() -> Result<(), Box<dyn Error>> {
    let system = System::open()?;
    let vm = system.create_vm()?;

    let memory = Arc::new(Memory::anonymous(64 << 10)?);
    memory.write(CODE.as_u64() as usize, PROGRAM)?;
    let space = vm.create_address_space()?;
    let _slot = space.map_all(GuestPhysAddr::new(0), memory, Permissions::RWX)?;

    let mut vcpu = vm.create_vcpu(0)?;
    vcpu.set_entry(CODE)?;
    vcpu.set_ept_root(&space)?;
    vcpu.setup(Apic::None, &system.supported_cpuid()?)?;

    let mut console = std::io::stdout();
    loop {
        match vcpu.run()?.reason {
            AxVCpuExitReason::IoWrite { port: 0xe9, data, .. } => console.write_all(&[data as u8])?,
            AxVCpuExitReason::Halt => return Ok(console.flush()?),
            AxVCpuExitReason::Nothing | AxVCpuExitReason::Interrupted => {}
            other => return Err(format!("the guest stopped at {:#x}: {other:x?}", vcpu.general().rip).into()),
        }
    }
}
