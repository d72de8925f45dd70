// SPDX-License-Identifier: GPL-2.0-only
/* The part of ../helpers.c that is x86's own. */
#include <linux/cpumask.h>
#include <linux/moduleparam.h>
#include <linux/smp.h>
#include <asm/apic.h>
#include <asm/cpufeature.h>
#include <asm/fpu/api.h>
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

static unsigned int apic_steps = 1;
module_param(apic_steps, uint, 0444);
MODULE_PARM_DESC(apic_steps,
		 "What the CPU may do for guests' local APICs, if it can: 0 nothing, 1 the task priority, 2 also interrupt delivery, 3 also posted interrupts (default 1)");

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

/* The bits are those of Mitigations in x86/ffi.rs. */
unsigned int axvcpu_mitigations(void)
{
	unsigned int bits = 0;

	if (boot_cpu_has(X86_FEATURE_CLEAR_CPU_BUF_VM))
		bits |= 1 << 0;
	if (boot_cpu_has(X86_FEATURE_RSB_VMEXIT) || boot_cpu_has(X86_FEATURE_RSB_VMEXIT_LITE))
		bits |= 1 << 1;
	if (boot_cpu_has(X86_FEATURE_UNRET))
		bits |= 1 << 2;
	if (boot_cpu_has(X86_FEATURE_IBPB_ON_VMEXIT))
		bits |= 1 << 3;
	if (boot_cpu_has(X86_FEATURE_IBPB_EXIT_TO_USER))
		bits |= 1 << 4;
	return bits;
}

unsigned int axvcpu_tsc_khz(void)
{
	return tsc_khz;
}

bool axvcpu_tsc_stable(void)
{
	return !check_tsc_unstable();
}
