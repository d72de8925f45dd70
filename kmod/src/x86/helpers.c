// SPDX-License-Identifier: GPL-2.0-only
/* The part of ../helpers.c that is x86's own. */
#include <linux/cpu.h>
#include <linux/cpumask.h>
#include <linux/moduleparam.h>
#include <linux/sched/smt.h>
#include <linux/smp.h>
#include <asm/apic.h>
#include <asm/cpufeature.h>
#include <asm/fpu/api.h>
#include <asm/msr.h>
#include <asm/tsc.h>

#include "../helpers.h"

void axvcpu_send_ipi(int cpu)
{
	if (get_cpu() != cpu && cpu_online(cpu))
		arch_smp_send_reschedule(cpu);
	put_cpu();
}

/*
 * KVM's vector for posted interrupts. Its handler does nothing, so whoever owns
 * the CPU when it arrives is unharmed: it looks for what was posted before it
 * enters a guest again. 0 for none.
 */
unsigned int axvcpu_notification_vector(void)
{
	return IS_ENABLED(CONFIG_KVM) ? POSTED_INTR_VECTOR : 0;
}

void axvcpu_notify_posted(int cpu)
{
	if (get_cpu() != cpu && cpu_online(cpu))
		__apic_send_IPI_mask(cpumask_of(cpu), POSTED_INTR_VECTOR);
	put_cpu();
}

static unsigned int apic_steps = 3;
module_param(apic_steps, uint, 0444);
MODULE_PARM_DESC(apic_steps,
		 "What the CPU may do for guests' local APICs, if it can: 0 nothing, 1 the task priority, 2 also interrupt delivery, 3 also posted interrupts (default)");

unsigned int axvcpu_apic_steps(void)
{
	return apic_steps;
}

void axvcpu_fpu_begin(void)
{
	kernel_fpu_begin_mask(0);
}

void axvcpu_fpu_end(void)
{
	kernel_fpu_end();
}

static unsigned int l1d_flush = 1;
module_param(l1d_flush, uint, 0444);
MODULE_PARM_DESC(l1d_flush,
		 "When the L1 data cache is flushed before guests, on CPUs with L1TF: 0 never, 1 after the host has run, 2 at each entry (default 1)");

unsigned int axvcpu_l1d_flush(void)
{
	return l1d_flush;
}

/* The hypervisor below this kernel flushes the L1 data cache for it. */
static bool axvcpu_skips_l1d_flush(void)
{
	u64 capabilities = 0;

	if (boot_cpu_has(X86_FEATURE_ARCH_CAPABILITIES))
		rdmsrq(MSR_IA32_ARCH_CAPABILITIES, capabilities);
	return capabilities & ARCH_CAP_SKIP_VMENTRY_L1DFLUSH;
}

/* The bits are those of HostFlags in arch/x86/src/mitigations.rs. */
unsigned int axvcpu_host_flags(void)
{
	return boot_cpu_has(X86_FEATURE_CLEAR_CPU_BUF_VM) << 0 |
	       (boot_cpu_has(X86_FEATURE_RSB_VMEXIT) ||
		boot_cpu_has(X86_FEATURE_RSB_VMEXIT_LITE)) << 1 |
	       boot_cpu_has(X86_FEATURE_UNRET) << 2 |
	       boot_cpu_has(X86_FEATURE_IBPB_ON_VMEXIT) << 3 |
	       boot_cpu_has(X86_FEATURE_IBPB_EXIT_TO_USER) << 4 |
	       boot_cpu_has(X86_FEATURE_CLEAR_BHB_VMEXIT) << 5 |
	       boot_cpu_has(X86_FEATURE_KERNEL_IBRS) << 6 |
	       boot_cpu_has_bug(X86_BUG_L1TF) << 7 |
	       axvcpu_skips_l1d_flush() << 8 |
	       cpu_mitigations_off() << 9 |
	       sched_smt_active() << 10 |
	       boot_cpu_has_bug(X86_BUG_ITLB_MULTIHIT) << 11;
}

unsigned int axvcpu_tsc_khz(void)
{
	return tsc_khz;
}

bool axvcpu_tsc_stable(void)
{
	return !check_tsc_unstable();
}
