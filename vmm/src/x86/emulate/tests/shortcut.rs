// SPDX-License-Identifier: MIT OR Apache-2.0
//! The short way does what the long one does, and is not taken where anything is different.

use axvcpu_uapi::client::{Brief, Snapshot};
use axvcpu_uapi::exit::AccessFlags;
use axvcpu_uapi::x86::{Control, Segments};

use super::super::{Fault, Shortcuts};
use super::faults::{paged, set_leaf};
use super::*;

/// What the exit of an access to `at` shows of `cpu`.
fn shown(cpu: &CpuState, at: u64, access: AccessFlags) -> (Brief, Fault) {
    let [es, cs, ss, ds, fs, gs] = cpu.segments;
    let segments = Segments { es, cs, ss, ds, fs, gs, ..Segments::default() };
    let control = Control { cr0: cpu.cr0, cr3: cpu.cr3, cr4: cpu.cr4, efer: cpu.efer, ..Control::default() };
    let fault = Fault { addr: GuestPhysAddr::new(at), access, user_mode: cpu.cpl == 3 };
    (Brief::from(&Snapshot { control, segments }), fault)
}

/// A CPU before `mov [rdi], eax`, which is remembered, and its access.
fn known_store() -> (CpuState, Machine, Shortcuts, Fault) {
    const STORE: [u8; 2] = [0x89, 0x07];
    let (mut cpu, mut machine) = paged(0);
    machine.poke(CODE, &STORE);
    cpu.gpr[7] = DEVICE + 8;
    cpu.gpr[0] = 0x1122_3344;
    let (_, fault) = shown(&cpu, DEVICE + 8, AccessFlags::WRITE);
    let mut shortcuts = Shortcuts::new();
    shortcuts.learn(&Config::default(), &cpu, &fault, &mut machine).unwrap();
    (cpu, machine, shortcuts, fault)
}

/// Whether the short way is taken; if not, nothing may have happened.
fn taken(shortcuts: &Shortcuts, cpu: &CpuState, machine: &mut Machine, fault: &Fault) -> bool {
    let (brief, _) = shown(cpu, 0, AccessFlags::READ);
    let (mut general, events) = (cpu.general(), machine.events.len());
    let taken = shortcuts.take(&mut general, &brief, fault, machine).unwrap();
    assert!(taken || general == cpu.general() && machine.events.len() == events, "not taken, but something happened");
    taken
}

#[test]
fn moves_have_the_results_of_the_long_way() {
    const AT: u64 = DEVICE + 0x14;
    let (read, write) = (AccessFlags::READ, AccessFlags::WRITE);
    let moves: [(&[u8], AccessFlags); 20] = [
        (&[0x8b, 0x07], read),                                // mov eax, [rdi]
        (&[0x48, 0x8b, 0x07], read),                          // mov rax, [rdi]
        (&[0x66, 0x8b, 0x07], read),                          // mov ax, [rdi]
        (&[0x8a, 0x27], read),                                // mov ah, [rdi]
        (&[0x44, 0x8a, 0x07], read),                          // mov r8b, [rdi]
        (&[0x0f, 0xb6, 0x07], read),                          // movzx eax, byte [rdi]
        (&[0x48, 0x0f, 0xb7, 0x07], read),                    // movzx rax, word [rdi]
        (&[0x0f, 0xbe, 0x07], read),                          // movsx eax, byte [rdi]
        (&[0x48, 0x0f, 0xbf, 0x07], read),                    // movsx rax, word [rdi]
        (&[0x48, 0x63, 0x07], read),                          // movsxd rax, dword [rdi]
        (&[0x8b, 0x44, 0x4e, 0x10], read),                    // mov eax, [rsi + rcx*2 + 0x10]
        (&[0x67, 0x8b, 0x07], read),                          // mov eax, [edi]
        (&[0x65, 0x8b, 0x04, 0x25, 0x14, 0, 0, 0], read),     // mov eax, gs:[0x14]
        (&[0x8b, 0x05, 0x0e, 0xf0, 0x2f, 0x00], read),        // mov eax, [rip + 0x2ff00e]
        (&[0x89, 0x07], write),                               // mov [rdi], eax
        (&[0x4c, 0x89, 0x0f], write),                         // mov [rdi], r9
        (&[0x88, 0x27], write),                               // mov [rdi], ah
        (&[0x66, 0xc7, 0x07, 0x34, 0x12], write),             // mov word [rdi], 0x1234
        (&[0x48, 0xc7, 0x07, 0x00, 0x00, 0x00, 0x80], write), // mov qword [rdi], -0x80000000
        (&[0xa2, 0x14, 0x00, 0x30, 0x00, 0, 0, 0, 0], write), // mov [0x300014], al
    ];
    for (code, access) in moves {
        let (mut cpu, mut machine) = paged(0);
        machine.poke(CODE, code);
        machine.poke(AT, &[0x81, 0x92, 0xa3, 0xb4, 0xc5, 0xd6, 0xe7, 0xf8]);
        cpu.gpr = std::array::from_fn(|i| 0x0111_2222_3333_4400 * (i as u64 + 1));
        cpu.gpr[7] = AT;
        (cpu.gpr[6], cpu.gpr[1]) = (DEVICE, 2);
        cpu.segments[seg::GS].base = DEVICE;
        cpu.rflags |= rflags::RF | rflags::CF;

        let (mut expected, mut reference) = (cpu.clone(), machine.clone());
        assert_eq!(run(&mut expected, &mut reference).unwrap(), RETIRED, "{code:02x?}");
        let (brief, fault) = shown(&cpu, AT, access);
        let mut shortcuts = Shortcuts::new();
        shortcuts.learn(&Config::default(), &cpu, &fault, &mut machine).unwrap();
        let mut general = cpu.general();
        assert!(shortcuts.take(&mut general, &brief, &fault, &mut machine).unwrap(), "{code:02x?}");
        assert_eq!(general, expected.general(), "{code:02x?}");
        assert_eq!(machine.events, reference.events, "{code:02x?}");
    }
}

#[test]
fn what_is_no_plain_move_is_not_remembered() {
    let others: [&[u8]; 6] = [
        &[0x01, 0x07],       // add [rdi], eax
        &[0x87, 0x07],       // xchg [rdi], eax
        &[0xa5],             // movsd
        &[0xff, 0x37],       // push [rdi]
        &[0x8c, 0x1f],       // mov [rdi], ds
        &[0x0f, 0x11, 0x07], // movups [rdi], xmm0
    ];
    for code in others {
        let (mut cpu, mut machine) = paged(0);
        machine.poke(CODE, code);
        cpu.gpr[7] = DEVICE;
        let (_, fault) = shown(&cpu, DEVICE, AccessFlags::WRITE);
        let mut shortcuts = Shortcuts::new();
        shortcuts.learn(&Config::default(), &cpu, &fault, &mut machine).unwrap();
        assert!(!taken(&shortcuts, &cpu, &mut machine, &fault), "{code:02x?}");
    }
}

#[test]
fn another_access_goes_the_long_way() {
    let (cpu, mut machine, shortcuts, fault) = known_store();
    assert!(taken(&shortcuts, &cpu, &mut machine, &fault));
    let walk = AccessFlags::WRITE.union(AccessFlags::PAGE_WALK);
    for access in [AccessFlags::READ, walk, AccessFlags::EXECUTE] {
        assert!(!taken(&shortcuts, &cpu, &mut machine, &Fault { access, ..fault }), "{access:?}");
    }
    // Not the operand's, and memory.
    for addr in [DEVICE + 12, RAM + 8] {
        assert!(
            !taken(&shortcuts, &cpu, &mut machine, &Fault { addr: GuestPhysAddr::new(addr), ..fault }),
            "{addr:#x}"
        );
    }
    // In two pages.
    let crossing = CpuState { gpr: std::array::from_fn(|i| if i == 7 { DEVICE + 4094 } else { 0 }), ..cpu.clone() };
    let both = Fault { addr: GuestPhysAddr::new(DEVICE + 4094), ..fault };
    assert!(!taken(&shortcuts, &crossing, &mut machine, &both));
    assert!(taken(&shortcuts, &cpu, &mut machine, &fault), "it is still known");
}

#[test]
fn another_mode_goes_the_long_way() {
    let (cpu, mut machine, shortcuts, fault) = known_store();
    let changes: [fn(&mut CpuState); 7] = [
        |cpu| cpu.rip += 1,
        |cpu| cpu.rflags |= rflags::TF,
        |cpu| cpu.cr0 ^= bits::CR0_WP,
        |cpu| cpu.cr3 += 4096,
        |cpu| cpu.cr4 ^= bits::CR4_SMEP,
        |cpu| cpu.efer ^= bits::EFER_NXE,
        |cpu| cpu.segments[seg::CS].attributes ^= seg::LONG,
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let mut other = cpu.clone();
        change(&mut other);
        assert!(!taken(&shortcuts, &other, &mut machine, &fault), "change {i}");
    }
    assert!(!taken(&shortcuts, &cpu, &mut machine, &Fault { user_mode: true, ..fault }));
    assert!(taken(&shortcuts, &cpu, &mut machine, &fault), "it is still known");
}

#[test]
fn changed_code_goes_the_long_way() {
    let (cpu, mut machine, shortcuts, fault) = known_store();
    machine.poke(CODE + 1, &[0x0f]);
    assert!(!taken(&shortcuts, &cpu, &mut machine, &fault), "mov [rdi], ecx");
    machine.poke(CODE + 1, &[0x07]);
    assert!(taken(&shortcuts, &cpu, &mut machine, &fault));
    // What follows is not the instruction's.
    machine.poke(CODE + 2, &[0xcc]);
    assert!(taken(&shortcuts, &cpu, &mut machine, &fault));
}

#[test]
fn changed_tables_go_the_long_way() {
    let (cpu, mut machine, shortcuts, fault) = known_store();
    // The same instruction elsewhere would do, but nobody has looked.
    machine.poke(RAM, &[0x89, 0x07]);
    set_leaf(&mut machine, CODE, RAM | 0x23);
    assert!(!taken(&shortcuts, &cpu, &mut machine, &fault));
    set_leaf(&mut machine, CODE, 0);
    assert!(!taken(&shortcuts, &cpu, &mut machine, &fault), "not mapped");
}
