// SPDX-License-Identifier: GPL-2.0-only
/* The part of ../helpers.c that is x86's own. */
#include <linux/cpumask.h>
#include <linux/smp.h>
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
