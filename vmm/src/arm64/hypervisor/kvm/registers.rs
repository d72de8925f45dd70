// SPDX-License-Identifier: MIT OR Apache-2.0
//! Register sets of a vCPU of KVM, which reads and writes one register at a time (Linux `Documentation/virt/kvm/api.rst`,
//! `KVM_SET_ONE_REG`).

use axvcpu_uapi::arm64::{system_register, Fp, General, System};
use kvm_bindings::{
    KVM_REG_ARM64, KVM_REG_ARM64_SYSREG, KVM_REG_ARM_CORE, KVM_REG_SIZE_U128, KVM_REG_SIZE_U32, KVM_REG_SIZE_U64,
};

use super::Vcpu;
use crate::hypervisor::kvm::error::{refused, Error};
use crate::hypervisor::{Registers, Result};

/// A core register, by the offset of its 64 bits in `struct kvm_regs`, which is counted in 32-bit words.
const fn core(index: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE as u64 | (2 * index)
}

/// A system register, by its number in MRS.
const fn system(op0: u64, op1: u64, crn: u64, crm: u64, op2: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM64_SYSREG as u64 | system_register(op0, op1, crn, crm, op2)
}

/// `struct user_pt_regs` begins the structure: X0 to X30, SP_EL0, PC, PSTATE.
const SP_EL0: u64 = core(31);
const PC: u64 = core(32);
const PSTATE: u64 = core(33);
/// SP_EL1, ELR_EL1 and SPSR_EL1 follow.
const SP_EL1: u64 = core(34);
const ELR_EL1: u64 = core(35);
const SPSR_EL1: u64 = core(36);

/// V0 to V31 follow SPSR_EL1, the four SPSRs of AArch32 and four bytes of padding, 128 bits each; then FPSR and FPCR, of 32.
const fn vector(index: u64) -> u64 {
    KVM_REG_ARM64 | KVM_REG_SIZE_U128 | KVM_REG_ARM_CORE as u64 | (84 + 4 * index)
}
const FPSR: u64 = KVM_REG_ARM64 | KVM_REG_SIZE_U32 | KVM_REG_ARM_CORE as u64 | 212;
const FPCR: u64 = FPSR + 1;

/// The system registers that are in both [`System`] and KVM's list under their own numbers.
macro_rules! system_registers {
    ($($field:ident = ($($number:literal),+);)+) => {
        fn each_system_register(
            set: &mut System,
            mut access: impl FnMut(u64, &mut u64) -> std::result::Result<(), Error>,
        ) -> std::result::Result<(), Error> {
            access(SP_EL1, &mut set.sp_el1)?;
            access(ELR_EL1, &mut set.elr_el1)?;
            access(SPSR_EL1, &mut set.spsr_el1)?;
            $(access(system($($number),+), &mut set.$field)?;)+
            Ok(())
        }
    };
}

system_registers! {
    sctlr_el1 = (3, 0, 1, 0, 0);
    cpacr_el1 = (3, 0, 1, 0, 2);
    ttbr0_el1 = (3, 0, 2, 0, 0);
    ttbr1_el1 = (3, 0, 2, 0, 1);
    tcr_el1 = (3, 0, 2, 0, 2);
    esr_el1 = (3, 0, 5, 2, 0);
    afsr0_el1 = (3, 0, 5, 1, 0);
    afsr1_el1 = (3, 0, 5, 1, 1);
    far_el1 = (3, 0, 6, 0, 0);
    par_el1 = (3, 0, 7, 4, 0);
    mair_el1 = (3, 0, 10, 2, 0);
    amair_el1 = (3, 0, 10, 3, 0);
    vbar_el1 = (3, 0, 12, 0, 0);
    contextidr_el1 = (3, 0, 13, 0, 1);
    tpidr_el0 = (3, 3, 13, 0, 2);
    tpidrro_el0 = (3, 3, 13, 0, 3);
    tpidr_el1 = (3, 0, 13, 0, 4);
    csselr_el1 = (3, 2, 0, 0, 0);
    cntkctl_el1 = (3, 0, 14, 1, 0);
    mdscr_el1 = (2, 0, 0, 2, 2);
    mpidr_el1 = (3, 0, 0, 0, 5);
}

impl Vcpu {
    fn read(&self, register: u64) -> std::result::Result<u64, Error> {
        let mut bytes = [0; 8];
        self.core.fd.get_one_reg(register, &mut bytes).map_err(refused("KVM_GET_ONE_REG"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn write(&self, register: u64, value: u64) -> std::result::Result<(), Error> {
        self.core.fd.set_one_reg(register, &value.to_le_bytes()).map_err(refused("KVM_SET_ONE_REG")).map(drop)
    }

    /// Writes the general registers.
    ///
    /// # Errors
    /// [`Error::Ioctl`].
    pub(super) fn set_general(&self, general: &General) -> std::result::Result<(), Error> {
        let General { x, sp_el0, pc, pstate } = general;
        for (index, value) in (0..).zip(x) {
            self.write(core(index), *value)?;
        }
        self.write(SP_EL0, *sp_el0)?;
        self.write(PC, *pc)?;
        self.write(PSTATE, *pstate)
    }
}

impl Registers<General> for Vcpu {
    fn get(&self) -> Result<General> {
        let mut general = General::default();
        for (index, value) in (0..).zip(&mut general.x) {
            *value = self.read(core(index))?;
        }
        general.sp_el0 = self.read(SP_EL0)?;
        general.pc = self.read(PC)?;
        general.pstate = self.read(PSTATE)?;
        Ok(general)
    }
    fn set(&mut self, general: &General) -> Result<()> {
        Ok(self.set_general(general)?)
    }
}

/// The virtual timer's registers, which KVM has under other numbers, stay as they are.
impl Registers<System> for Vcpu {
    fn get(&self) -> Result<System> {
        let mut set = System::default();
        each_system_register(&mut set, |register, value| {
            *value = self.read(register)?;
            Ok(())
        })?;
        Ok(set)
    }
    fn set(&mut self, set: &System) -> Result<()> {
        let mut set = *set;
        Ok(each_system_register(&mut set, |register, value| self.write(register, *value))?)
    }
}

impl Registers<Fp> for Vcpu {
    fn get(&self) -> Result<Fp> {
        let read =
            |register, bytes: &mut [u8]| self.core.fd.get_one_reg(register, bytes).map_err(refused("KVM_GET_ONE_REG"));
        let mut fp = Fp::default();
        for (index, halves) in (0..).zip(fp.v.chunks_exact_mut(2)) {
            let mut bytes = [0; 16];
            read(vector(index), &mut bytes)?;
            let value = u128::from_le_bytes(bytes);
            halves.copy_from_slice(&[value as u64, (value >> 64) as u64]);
        }
        for (register, value) in [(FPSR, &mut fp.fpsr), (FPCR, &mut fp.fpcr)] {
            let mut bytes = [0; 4];
            read(register, &mut bytes)?;
            *value = u32::from_le_bytes(bytes).into();
        }
        Ok(fp)
    }
    fn set(&mut self, fp: &Fp) -> Result<()> {
        let write = |register, bytes: &[u8]| {
            self.core.fd.set_one_reg(register, bytes).map_err(refused("KVM_SET_ONE_REG")).map(drop)
        };
        for (index, halves) in (0..).zip(fp.v.chunks_exact(2)) {
            let value = halves.iter().rev().fold(0u128, |value, half| value << 64 | u128::from(*half));
            write(vector(index), &value.to_le_bytes())?;
        }
        for (register, value) in [(FPSR, fp.fpsr), (FPCR, fp.fpcr)] {
            write(register, &(value as u32).to_le_bytes())?;
        }
        Ok(())
    }
}
