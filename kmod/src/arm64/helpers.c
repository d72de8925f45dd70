// SPDX-License-Identifier: GPL-2.0-only
/* The part of ../helpers.c that is arm64's own. */
#include <linux/percpu.h>
#include <linux/smp.h>
#include <asm/neon.h>

#include "../helpers.h"

static void axvcpu_leave_guest(void *unused)
{
	/* The interrupt has done it. */
}

static DEFINE_PER_CPU(call_single_data_t, axvcpu_csd) =
	CSD_INIT(axvcpu_leave_guest, NULL);

/*
 * Rescheduling interrupts cannot be sent by modules here. One request for each
 * CPU is enough: while it is under way (-EBUSY) the interrupt is yet to come.
 */
void axvcpu_send_ipi(int cpu)
{
	if (get_cpu() != cpu && cpu_online(cpu))
		smp_call_function_single_async(cpu, per_cpu_ptr(&axvcpu_csd, cpu));
	put_cpu();
}

void axvcpu_flush_ipis(void)
{
	/* Behind what axvcpu_send_ipi() has queued, since queues keep their order. */
	on_each_cpu(axvcpu_leave_guest, NULL, 1);
}

/*
 * Where the kernel keeps the FPU state that we have lent the FPU with, should it
 * be needed for somebody else: not in a window, which is not preempted, but by
 * a softirq behind it. One for each CPU does, as the window stays on its CPU.
 */
static DEFINE_PER_CPU(struct user_fpsimd_state, axvcpu_fpsimd);

void axvcpu_fpu_begin(void)
{
	preempt_disable();
	kernel_neon_begin(this_cpu_ptr(&axvcpu_fpsimd));
}

void axvcpu_fpu_end(void)
{
	kernel_neon_end(this_cpu_ptr(&axvcpu_fpsimd));
	preempt_enable();
}
