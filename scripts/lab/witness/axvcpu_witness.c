// SPDX-License-Identifier: GPL-2.0-only
/*
 * A witness for the test that the host finds all of its registers as they were
 * before a guest had the CPU: the test program cannot see EL2's.
 *
 * axvcpu makes the virtual timer's interrupt active right before it loads a guest
 * whose timer is due, and inactive right after it has put the host back
 * (axvcpu_hold_timer_irq; interrupts are off all the while). A probe there reads
 * the registers both times, and the processor state that it has interrupted.
 * In every second window it changes what can be changed without harm, so that
 * a register counts as put back only if it gets what it had, not what it
 * usually has.
 *
 * "pid" is the process whose guest it is: it has one, on one CPU. The file
 * axvcpu-witness of debugfs tells, after a line with the number of windows, of
 * each register that the CPU has: its name, in how many windows it was wrong,
 * and of the last of them what it should have been and what it was.
 */
#include <linux/debugfs.h>
#include <linux/kprobes.h>
#include <linux/module.h>
#include <linux/sched.h>
#include <linux/seq_file.h>
#include <asm/ptrace.h>
#include <asm/sysreg.h>

static int pid;
module_param(pid, int, 0);

/* A field of four bits of an ID register. */
#define FEATURE(id, shift) (read_sysreg_s(SYS_ID_AA64##id##_EL1) >> (shift) & 15)

#define ALWAYS true
#define PAUTH ((read_sysreg_s(SYS_ID_AA64ISAR1_EL1) & 0xff000ff0) || \
	       (read_sysreg_s(SYS_ID_AA64ISAR2_EL1) & 0xff00))
#define PMU (FEATURE(DFR0, 8) != 0 && FEATURE(DFR0, 8) != 15)
#define LISTS(n) ((read_sysreg_s(SYS_ICH_VTR_EL2) & 31) >= (n))

/*
 * Registers: name, encoding, whether the CPU has it, bits that may be changed in
 * the host, and bits that must be 0 behind a guest: if there are none, all must
 * be what they were. First those that axvcpu puts back. With HCR_EL2.E2H the
 * encodings of EL1's registers mean EL2's.
 */
#define REGISTERS(R) \
	R(HCR_EL2, sys_reg(3, 4, 1, 1, 0), ALWAYS, 0, 0) \
	R(VBAR_EL2, sys_reg(3, 0, 12, 0, 0), ALWAYS, 0, 0) \
	R(SP_EL0, sys_reg(3, 0, 4, 1, 0), ALWAYS, 0, 0) \
	R(CPTR_EL2, sys_reg(3, 4, 1, 1, 2), ALWAYS, BIT(21), 0) \
	R(MDCR_EL2, sys_reg(3, 4, 1, 1, 1), ALWAYS, BIT(11), 0) \
	R(MDSCR_EL1, sys_reg(2, 0, 0, 2, 2), ALWAYS, BIT(15), 0) \
	R(CNTHCTL_EL2, sys_reg(3, 4, 14, 1, 0), ALWAYS, BIT(10), 0) \
	R(CNTVOFF_EL2, sys_reg(3, 4, 14, 0, 3), ALWAYS, BIT(12), 0) \
	R(TPIDR_EL0, sys_reg(3, 3, 13, 0, 2), ALWAYS, BIT(12), 0) \
	R(TPIDRRO_EL0, sys_reg(3, 3, 13, 0, 3), ALWAYS, BIT(12), 0) \
	R(PAR_EL1, sys_reg(3, 0, 7, 4, 0), ALWAYS, BIT(12), 0) \
	R(CSSELR_EL1, sys_reg(3, 2, 0, 0, 0), ALWAYS, BIT(1), 0) \
	R(HSTR_EL2, sys_reg(3, 4, 1, 1, 3), ALWAYS, BIT(1), 0) \
	R(ICC_SRE_EL2, sys_reg(3, 4, 12, 9, 5), ALWAYS, 0, 0) \
	R(ICC_PMR_EL1, sys_reg(3, 0, 4, 6, 0), ALWAYS, BIT(4), 0) \
	R(ICH_HCR_EL2, sys_reg(3, 4, 12, 11, 0), ALWAYS, BIT(10), 0) \
	R(HCRX_EL2, sys_reg(3, 4, 1, 2, 2), FEATURE(MMFR1, 40), BIT(11), 0) \
	R(HFGRTR_EL2, sys_reg(3, 4, 1, 1, 4), FEATURE(MMFR0, 56), BIT(0), 0) \
	R(HFGWTR_EL2, sys_reg(3, 4, 1, 1, 5), FEATURE(MMFR0, 56), BIT(0), 0) \
	R(HFGITR_EL2, sys_reg(3, 4, 1, 1, 6), FEATURE(MMFR0, 56), BIT(0), 0) \
	R(HDFGRTR_EL2, sys_reg(3, 4, 3, 1, 4), FEATURE(MMFR0, 56), BIT(0), 0) \
	R(HDFGWTR_EL2, sys_reg(3, 4, 3, 1, 5), FEATURE(MMFR0, 56), BIT(0), 0) \
	R(HFGRTR2_EL2, sys_reg(3, 4, 3, 1, 2), FEATURE(MMFR0, 56) >= 2, BIT(0), 0) \
	R(HFGWTR2_EL2, sys_reg(3, 4, 3, 1, 3), FEATURE(MMFR0, 56) >= 2, BIT(0), 0) \
	R(HFGITR2_EL2, sys_reg(3, 4, 3, 1, 7), FEATURE(MMFR0, 56) >= 2, BIT(0), 0) \
	R(HDFGRTR2_EL2, sys_reg(3, 4, 3, 1, 0), FEATURE(MMFR0, 56) >= 2, BIT(0), 0) \
	R(HDFGWTR2_EL2, sys_reg(3, 4, 3, 1, 1), FEATURE(MMFR0, 56) >= 2, BIT(0), 0) \
	R(MPAM2_EL2, sys_reg(3, 4, 10, 5, 0), FEATURE(PFR0, 40) || FEATURE(PFR1, 16), 0, 0) \
	/* Switched off; and nothing is listed. */ \
	R(CNTV_CTL_EL02, sys_reg(3, 5, 14, 3, 1), ALWAYS, 0, BIT(0)) \
	R(ICH_LR0_EL2, sys_reg(3, 4, 12, 12, 0), LISTS(0), 0, ~0ULL) \
	R(ICH_LR1_EL2, sys_reg(3, 4, 12, 12, 1), LISTS(1), 0, ~0ULL) \
	R(ICH_LR2_EL2, sys_reg(3, 4, 12, 12, 2), LISTS(2), 0, ~0ULL) \
	R(ICH_LR3_EL2, sys_reg(3, 4, 12, 12, 3), LISTS(3), 0, ~0ULL) \
	/* Those that it never touches, nor lets a guest touch. */ \
	R(SCTLR_EL2, sys_reg(3, 0, 1, 0, 0), ALWAYS, 0, 0) \
	R(TTBR0_EL2, sys_reg(3, 0, 2, 0, 0), ALWAYS, 0, 0) \
	R(TTBR1_EL2, sys_reg(3, 0, 2, 0, 1), ALWAYS, 0, 0) \
	R(TCR_EL2, sys_reg(3, 0, 2, 0, 2), ALWAYS, 0, 0) \
	R(MAIR_EL2, sys_reg(3, 0, 10, 2, 0), ALWAYS, 0, 0) \
	R(CONTEXTIDR_EL2, sys_reg(3, 0, 13, 0, 1), ALWAYS, 0, 0) \
	R(TPIDR_EL2, sys_reg(3, 4, 13, 0, 2), ALWAYS, 0, 0) \
	R(DBGBVR0_EL1, sys_reg(2, 0, 0, 0, 4), ALWAYS, 0, 0) \
	R(DBGBCR0_EL1, sys_reg(2, 0, 0, 0, 5), ALWAYS, 0, 0) \
	R(DBGWVR0_EL1, sys_reg(2, 0, 0, 0, 6), ALWAYS, 0, 0) \
	R(DBGWCR0_EL1, sys_reg(2, 0, 0, 0, 7), ALWAYS, 0, 0) \
	R(OSLSR_EL1, sys_reg(2, 0, 1, 1, 4), ALWAYS, 0, 0) \
	R(PMCR_EL0, sys_reg(3, 3, 9, 12, 0), PMU, 0, 0) \
	R(PMCNTENSET_EL0, sys_reg(3, 3, 9, 12, 1), PMU, 0, 0) \
	R(PMUSERENR_EL0, sys_reg(3, 3, 9, 14, 0), PMU, 0, 0) \
	R(PMINTENSET_EL1, sys_reg(3, 0, 9, 14, 1), PMU, 0, 0) \
	R(PMCCFILTR_EL0, sys_reg(3, 3, 14, 15, 7), PMU, 0, 0) \
	R(ICC_CTLR_EL1, sys_reg(3, 0, 12, 12, 4), ALWAYS, 0, 0) \
	R(ICC_BPR1_EL1, sys_reg(3, 0, 12, 12, 3), ALWAYS, 0, 0) \
	R(ICC_IGRPEN1_EL1, sys_reg(3, 0, 12, 12, 7), ALWAYS, 0, 0) \
	R(APIAKEYLO_EL1, sys_reg(3, 0, 2, 1, 0), PAUTH, 0, 0) \
	R(APIAKEYHI_EL1, sys_reg(3, 0, 2, 1, 1), PAUTH, 0, 0) \
	R(APIBKEYLO_EL1, sys_reg(3, 0, 2, 1, 2), PAUTH, 0, 0) \
	R(APDAKEYLO_EL1, sys_reg(3, 0, 2, 2, 0), PAUTH, 0, 0) \
	R(APDBKEYLO_EL1, sys_reg(3, 0, 2, 2, 2), PAUTH, 0, 0) \
	R(ZCR_EL2, sys_reg(3, 4, 1, 2, 0), FEATURE(PFR0, 32), 0, 0) \
	R(SMCR_EL2, sys_reg(3, 4, 1, 2, 6), FEATURE(PFR1, 24), 0, 0) \
	R(TPIDR2_EL0, sys_reg(3, 3, 13, 0, 5), FEATURE(PFR1, 24), 0, 0) \
	R(GCR_EL1, sys_reg(3, 0, 1, 0, 6), FEATURE(PFR1, 8) >= 2, 0, 0) \
	R(TFSR_EL2, sys_reg(3, 4, 5, 6, 0), FEATURE(PFR1, 8) >= 2, 0, 0)

struct host_register {
	const char *name;
	u64 (*get)(void);
	void (*set)(u64 value);
	u64 changeable;
	u64 zero;
	bool there;
	u64 own;	/* what the host has */
	u64 expected;	/* the same, or changed */
	u64 found;
	unsigned long wrong;
};

#define ACCESSORS(name, encoding, there, changeable, zero) \
	static u64 get_##name(void) { return read_sysreg_s(encoding); } \
	static void set_##name(u64 value) { write_sysreg_s(value, encoding); }
REGISTERS(ACCESSORS)

#define ELEMENT(name, encoding, there, changeable, zero) \
	{ #name, get_##name, set_##name, changeable, zero },
static struct host_register registers[] = { REGISTERS(ELEMENT) };

/* Parts of the processor state, as in SPSR_EL2: DAIF is not changed. */
static struct {
	const char *name;
	u64 bits;
	bool there;
	unsigned long wrong;
} parts[] = {
	{ "PAN", BIT(22) }, { "UAO", BIT(23) }, { "DIT", BIT(24) },
	{ "SSBS", BIT(12) }, { "TCO", BIT(25) }, { "DAIF", PSR_D_BIT | PSR_A_BIT | PSR_I_BIT | PSR_F_BIT },
};

static u64 pstate_changeable, pstate_own, pstate_expected, pstate_found;
static bool inside;
static unsigned long windows;

static void look_before(struct pt_regs *regs)
{
	bool change = windows & 1;
	struct host_register *r;

	for (r = registers; r < registers + ARRAY_SIZE(registers); r++) {
		if (!r->there)
			continue;
		r->own = r->get();
		if (change && r->changeable) {
			r->set(r->own ^ r->changeable);
			isb();
		}
		r->expected = r->zero ? 0 : r->get();
	}
	pstate_own = regs->pstate;
	if (change)
		regs->pstate ^= pstate_changeable;
	pstate_expected = regs->pstate;
	inside = true;
}

static void look_after(struct pt_regs *regs)
{
	struct host_register *r;
	int i;

	if (!inside)
		return;
	inside = false;
	windows++;
	for (r = registers; r < registers + ARRAY_SIZE(registers); r++) {
		u64 found;

		if (!r->there)
			continue;
		found = r->get();
		if (r->zero ? found & r->zero : found != r->expected) {
			r->wrong++;
			r->found = found;
		}
		if (r->changeable)
			r->set(r->own);
	}
	isb();
	for (i = 0; i < ARRAY_SIZE(parts); i++) {
		if (!parts[i].there || !((regs->pstate ^ pstate_expected) & parts[i].bits))
			continue;
		parts[i].wrong++;
		pstate_found = regs->pstate;
	}
	regs->pstate &= ~pstate_changeable;
	regs->pstate |= pstate_own & pstate_changeable;
}

static int at_hold(struct kprobe *probe, struct pt_regs *regs)
{
	if (current->tgid == pid) {
		/* The argument is a bool. */
		if (regs->regs[0] & 0xff)
			look_before(regs);
		else
			look_after(regs);
	}
	return 0;
}
NOKPROBE_SYMBOL(at_hold);

static struct kprobe probe = {
	.symbol_name = "axvcpu_hold_timer_irq",
	.pre_handler = at_hold,
};

static int witness_show(struct seq_file *file, void *unused)
{
	const struct host_register *r;
	int i;

	seq_printf(file, "windows %lu\n", windows);
	for (r = registers; r < registers + ARRAY_SIZE(registers); r++)
		if (r->there)
			seq_printf(file, "%s %lu %#llx %#llx\n", r->name, r->wrong, r->expected,
				   r->wrong ? r->found : r->expected);
	for (i = 0; i < ARRAY_SIZE(parts); i++)
		if (parts[i].there)
			seq_printf(file, "%s %lu %#llx %#llx\n", parts[i].name, parts[i].wrong, pstate_expected,
				   parts[i].wrong ? pstate_found : pstate_expected);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(witness);

static struct dentry *file;

static int __init witness_init(void)
{
	int error, i = 0;

#define IS_THERE(name, encoding, condition, changeable, zero) registers[i++].there = (condition);
	REGISTERS(IS_THERE)
	parts[0].there = FEATURE(MMFR1, 20);
	parts[1].there = FEATURE(MMFR2, 4);
	parts[2].there = FEATURE(PFR0, 48);
	parts[3].there = FEATURE(PFR1, 4) >= 2;
	parts[4].there = FEATURE(PFR1, 8) >= 2;
	parts[5].there = true;
	for (i = 0; i < 5; i++)
		if (parts[i].there)
			pstate_changeable |= parts[i].bits;

	error = register_kprobe(&probe);
	if (!error)
		file = debugfs_create_file("axvcpu-witness", 0400, NULL, NULL, &witness_fops);
	return error;
}
module_init(witness_init);

static void __exit witness_exit(void)
{
	debugfs_remove(file);
	unregister_kprobe(&probe);
}
module_exit(witness_exit);

MODULE_DESCRIPTION("A witness of what axvcpu does to the host's registers, for a test");
MODULE_LICENSE("GPL");
