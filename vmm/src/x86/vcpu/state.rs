// SPDX-License-Identifier: MIT OR Apache-2.0
//! Register sets: from the module's form to the emulator's and back, and as text for people.

use std::fmt::Write as _;

use axvcpu_uapi::addr::GuestVirtAddr;
use axvcpu_uapi::client::Snapshot;
use axvcpu_uapi::x86::{self, Control, General, Segments};

use super::access::Access;
use crate::hypervisor::Registers;
use crate::x86::emulate::{self, seg, CpuState};
use crate::x86::hypervisor::X86Vcpu;
use crate::x86::machine::Machine;
use crate::x86::paging::{self, GuestMemory, PagingState};

/// What the emulator works on. `user_mode` is the module's answer, which is right where the segments are not (after SYSRET).
pub(super) fn to_emulator(general: &General, snapshot: &Snapshot, user_mode: bool) -> CpuState {
    let mut cpu = CpuState::from_registers(general, &snapshot.segments, &snapshot.control);
    cpu.cpl = match (user_mode, cpu.cpl) {
        (true, _) => 3,
        (false, 3) => 0,
        (false, level) => level,
    };
    cpu
}

/// The segments after an emulated instruction; descriptor tables, LDTR and TR stay.
pub(super) fn with_segments(before: Segments, cpu: &CpuState) -> Segments {
    let segment = |index: usize| cpu.segments[index];
    Segments {
        es: segment(seg::ES),
        cs: segment(seg::CS),
        ss: segment(seg::SS),
        ds: segment(seg::DS),
        fs: segment(seg::FS),
        gs: segment(seg::GS),
        ..before
    }
}

/// The CPU for people: registers, and the code at RIP if it can be read.
pub(super) fn describe(vcpu: &mut impl X86Vcpu, machine: &Machine, id: u32, config: &emulate::Config) -> String {
    let sets = (Registers::<General>::get(vcpu), Registers::<Control>::get(vcpu), Registers::<Segments>::get(vcpu));
    let (Ok(general), Ok(control), Ok(segments)) = sets else {
        return format!("vCPU {id}: its registers cannot be read");
    };
    let mut text = registers(id, &general, &control, &segments);
    let cpu = to_emulator(&general, &Snapshot { control, segments }, false);
    if let Some(code) = code_at_rip(&cpu, &mut Access::new(vcpu, machine), config) {
        text.push_str("\n  code");
        for byte in code {
            let _ = write!(text, " {byte:02x}");
        }
    }
    text
}

fn registers(id: u32, general: &General, control: &Control, segments: &Segments) -> String {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12", "r13", "r14", "r15",
    ];
    let mut text = format!("vCPU {id}: rip {:#x} rflags {:#x}", general.rip, general.rflags);
    for (i, (name, value)) in NAMES.iter().zip(general.gpr).enumerate() {
        let _ = write!(text, "{}{name} {value:016x}", if i % 4 == 0 { "\n  " } else { " " });
    }
    let Control { cr0, cr2, cr3, cr4, efer, .. } = control;
    let _ = write!(text, "\n  cr0 {cr0:x} cr2 {cr2:x} cr3 {cr3:x} cr4 {cr4:x} efer {efer:x}");
    for (name, segment) in [("cs", &segments.cs), ("ss", &segments.ss), ("ds", &segments.ds)] {
        let x86::Segment { selector, base, limit, attributes } = segment;
        let _ = write!(text, "\n  {name} {selector:04x} base {base:x} limit {limit:x} attributes {attributes:03x}");
    }
    text
}

/// Up to 15 bytes at RIP, as far as they lie in one page of RAM.
fn code_at_rip(cpu: &CpuState, memory: &mut Access<'_, impl X86Vcpu>, config: &emulate::Config) -> Option<Vec<u8>> {
    use crate::x86::emulate::Bus as _;
    let base = if cpu.is_64bit() { 0 } else { cpu.segments[seg::CS].base };
    let linear = GuestVirtAddr::new(base.wrapping_add(cpu.rip));
    let state = PagingState {
        cr0: cpu.cr0,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        efer: cpu.efer,
        // As the kernel's: what may be read is of no interest here.
        cpl: 0,
        ac: true,
        phys_bits: config.phys_bits,
        gib_pages: config.gib_pages,
    };
    let at = paging::translate(&state, memory, linear, paging::Access::Read).ok()?.gpa;
    if !memory.is_ram(at, false) {
        return None;
    }
    let count = (4096 - at.as_u64() % 4096).min(15) as usize;
    let mut code = vec![0; count];
    memory.read(at, &mut code).ok()?;
    Some(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> (General, Snapshot) {
        let mut general = General { rip: 0x1234, rflags: 0x246, ..General::default() };
        for (i, gpr) in general.gpr.iter_mut().enumerate() {
            *gpr = i as u64 * 0x1111;
        }
        let segment =
            |n: u16| x86::Segment { base: n.into(), limit: 100 + u32::from(n), selector: n << 3, attributes: 0x93 };
        let segments = Segments {
            es: segment(1),
            cs: segment(2),
            ss: segment(3),
            ds: segment(4),
            fs: segment(5),
            gs: segment(6),
            tr: segment(7),
            ..Segments::default()
        };
        let control = Control { cr0: 1, cr3: 2, cr4: 3, efer: 4, ..Control::default() };
        (general, Snapshot { control, segments })
    }

    #[test]
    fn registers_survive_the_way_to_the_emulator_and_back() {
        let (general, snapshot) = sample();
        let cpu = to_emulator(&general, &snapshot, false);
        assert_eq!(cpu.general(), general);
        assert_eq!(with_segments(snapshot.segments, &cpu), snapshot.segments);
        assert_eq!((cpu.cr0, cpu.cr3, cpu.cr4, cpu.efer), (1, 2, 3, 4));
    }

    #[test]
    fn privilege_follows_the_module() {
        let (general, mut snapshot) = sample();
        assert_eq!(to_emulator(&general, &snapshot, false).cpl, 0);
        assert_eq!(to_emulator(&general, &snapshot, true).cpl, 3);
        snapshot.segments.ss.attributes = 0x93 | 1 << 5;
        assert_eq!(to_emulator(&general, &snapshot, false).cpl, 1);
    }

    #[test]
    fn text_shows_every_register() {
        let (general, snapshot) = sample();
        let text = registers(3, &general, &snapshot.control, &snapshot.segments);
        assert!(text.starts_with("vCPU 3: rip 0x1234 rflags 0x246\n  rax 0000000000000000 rcx"), "{text}");
        for i in 0..16 {
            assert!(text.contains(&format!("{:016x}", i * 0x1111)), "{text}");
        }
    }
}
