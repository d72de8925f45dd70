// SPDX-License-Identifier: GPL-2.0-only
/* The part of ../helpers.c that is arm64's own. */
#include <linux/interrupt.h>
#include <linux/irq.h>
#include <linux/of.h>
#include <linux/of_irq.h>
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

static unsigned int axvcpu_timer_irq;

/*
 * The virtual timer's interrupt, as the device tree tells of it
 * (Documentation/devicetree/bindings/timer/arm,arch_timer.yaml): the one called
 * "virt", or the third. It is mapped already, by the driver of the host's timer
 * or by KVM. With ACPI it is not found, and the guests' timers are masked.
 */
void axvcpu_find_timer_irq(void)
{
	struct device_node *node = of_find_compatible_node(NULL, NULL, "arm,armv8-timer");
	int index;

	if (!node)
		return;
	index = of_property_match_string(node, "interrupt-names", "virt");
	axvcpu_timer_irq = irq_of_parse_and_map(node, index < 0 ? 2 : index);
	of_node_put(node);
}

u32 axvcpu_timer_intid(void)
{
	struct irq_data *data = axvcpu_timer_irq ? irq_get_irq_data(axvcpu_timer_irq) : NULL;

	/* The interrupt controller at the root of the hierarchy counts in INTIDs. */
	return data ? irqd_to_hwirq(data) : 0;
}

void axvcpu_hold_timer_irq(bool hold)
{
	irq_set_irqchip_state(axvcpu_timer_irq, IRQCHIP_STATE_ACTIVE, hold);
}
