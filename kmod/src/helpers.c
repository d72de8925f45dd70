// SPDX-License-Identifier: GPL-2.0-only
/*
 * C side of ffi.rs: inline functions and macros of the kernel that Rust cannot
 * call, and functions that the kernel's bindings leave out. One call each, no
 * policy; what a function may be called from is said in ffi.rs. What each
 * architecture does in its own way is in x86/helpers.c and arm64/helpers.c.
 */
#include <linux/anon_inodes.h>
#include <linux/entry-virt.h>
#include <linux/eventfd.h>
#include <linux/gfp.h>
#include <linux/irqflags.h>
#include <linux/mm.h>
#include <linux/pgtable.h>
#include <linux/poll.h>
#include <linux/preempt.h>
#include <linux/rcupdate.h>
#include <linux/rcuwait.h>
#include <linux/sched.h>
#include <linux/sched/mm.h>
#include <linux/sched/task.h>
#include <linux/smp.h>
#include <linux/swap.h>
#include <linux/uaccess.h>
#include <linux/wait.h>

#include "helpers.h"
#ifdef CONFIG_X86_64
#include "x86/pages.h"
#else
#include "arm64/pages.h"
#endif

unsigned long axvcpu_alloc_pages(unsigned int order)
{
	return __get_free_pages(GFP_KERNEL_ACCOUNT | __GFP_ZERO | __GFP_NOWARN, order);
}

void axvcpu_split_pages(unsigned long addr, unsigned int order)
{
	split_page(virt_to_page((void *)addr), order);
}

void axvcpu_free_pages(unsigned long addr, unsigned int order)
{
	free_pages(addr, order);
}

u64 axvcpu_virt_to_phys(unsigned long addr)
{
	return __pa(addr);
}

u64 axvcpu_page_to_phys(struct page *page)
{
	return page_to_phys(page);
}

void axvcpu_mark_guest_page(struct page *page, bool dirty)
{
	/*
	 * The host must know before the guest can write: a nested page table has
	 * no dirty bit that it looks at, and it drops clean pages without a word.
	 */
	if (dirty)
		set_page_dirty_lock(page);
	mark_page_accessed(page);
}

void axvcpu_put_guest_page(struct page *page)
{
	put_page(page);
}

bool axvcpu_access_ok(unsigned long addr, unsigned long size)
{
	return access_ok((void __user *)addr, size);
}

int axvcpu_insert_page(struct vm_area_struct *vma, unsigned long addr)
{
	return vm_insert_page(vma, vma->vm_start, virt_to_page((void *)addr));
}

/*
 * An entry of the host's page tables that is memory and may be used by a CPU
 * as it is: its frame, the page's size and what the entry allows. Pages of
 * anonymous memory, shmem and hugetlb only: others may have owners that want
 * to be asked first (secretmem) or told (file systems), or no struct page.
 */
static u64 axvcpu_leaf(u64 entry, unsigned long pfn, unsigned int shift)
{
	u64 leaf = (u64)pfn << PAGE_SHIFT | shift;
	struct folio *folio;

	if (!axvcpu_entry_usable(entry))
		return leaf;
	folio = page_folio(pfn_to_page(pfn));
	if (!folio_test_swapbacked(folio) && !folio_test_hugetlb(folio))
		return leaf;
	/* As gup_fast does, since the guest's accesses do not show in the entry. */
	folio_set_referenced(folio);
	leaf |= AXVCPU_LEAF_USABLE;
	if (axvcpu_entry_writable(entry))
		leaf |= AXVCPU_LEAF_WRITABLE;
	if (axvcpu_entry_dirty(entry))
		leaf |= AXVCPU_LEAF_DIRTY;
	return leaf;
}

/*
 * How the host maps @addr: AXVCPU_LEAF_*, or 0 if it does not. Interrupts are
 * off, which keeps the tables from being freed, as in gup_fast; see
 * host_pfn_mapping_level() in arch/x86/kvm/mmu/mmu.c.
 */
u64 axvcpu_host_leaf(struct mm_struct *mm, unsigned long addr)
{
	pgd_t *pgdp, pgd;
	p4d_t *p4dp, p4d;
	pud_t *pudp, pud;
	pmd_t *pmdp, pmd;
	pte_t pte;

	lockdep_assert_irqs_disabled();
	pgdp = pgd_offset(mm, addr);
	pgd = READ_ONCE(*pgdp);
	if (pgd_none(pgd))
		return 0;
	p4dp = p4d_offset_lockless(pgdp, pgd, addr);
	p4d = READ_ONCE(*p4dp);
	if (p4d_none(p4d) || !p4d_present(p4d))
		return 0;
	pudp = pud_offset_lockless(p4dp, p4d, addr);
	pud = READ_ONCE(*pudp);
	if (pud_none(pud) || !pud_present(pud))
		return 0;
	if (pud_leaf(pud))
		return axvcpu_leaf(pud_val(pud), pud_pfn(pud) + ((addr & ~PUD_MASK) >> PAGE_SHIFT), PUD_SHIFT);
	pmdp = pmd_offset_lockless(pudp, pud, addr);
	pmd = READ_ONCE(*pmdp);
	if (pmd_none(pmd) || !pmd_present(pmd))
		return 0;
	if (pmd_leaf(pmd))
		return axvcpu_leaf(pmd_val(pmd), pmd_pfn(pmd) + ((addr & ~PMD_MASK) >> PAGE_SHIFT), PMD_SHIFT);
	/* All tables are in the direct map: there is no CONFIG_HIGHPTE here. */
	pte = READ_ONCE(*pte_offset_kernel(&pmd, addr));
	if (!pte_present(pte))
		return 0;
	return axvcpu_leaf(pte_val(pte), pte_pfn(pte), PAGE_SHIFT);
}

unsigned int axvcpu_host_leaf_shift(struct mm_struct *mm, unsigned long addr)
{
	unsigned long flags;
	u64 leaf;

	local_irq_save(flags);
	leaf = axvcpu_host_leaf(mm, addr);
	local_irq_restore(flags);
	return leaf & AXVCPU_LEAF_SHIFT;
}

int axvcpu_anon_fd(const char *name, const struct file_operations *fops, void *private)
{
	return anon_inode_getfd(name, fops, private, O_RDWR | O_CLOEXEC);
}

struct axvcpu_listen {
	poll_table table;
	struct wait_queue_entry *wait;
};

/* The callback's first call tells of signals from before; from then on none is missed. */
static void axvcpu_listen_queue(struct file *file, wait_queue_head_t *head, poll_table *table)
{
	struct wait_queue_entry *wait = container_of(table, struct axvcpu_listen, table)->wait;

	spin_lock_irq(&head->lock);
	__add_wait_queue(head, wait);
	wait->func(wait, TASK_NORMAL, 0, poll_to_key(0));
	spin_unlock_irq(&head->lock);
}

void axvcpu_listen(struct file *file, struct wait_queue_entry *wait, wait_queue_func_t wake)
{
	struct axvcpu_listen listen = { .wait = wait };

	init_waitqueue_func_entry(wait, wake);
	/* Before readers in userspace, which would take the count away. */
	wait->flags = WQ_FLAG_PRIORITY;
	init_poll_funcptr(&listen.table, axvcpu_listen_queue);
	vfs_poll(file, &listen.table);
}

void axvcpu_preempt_disable(void)
{
	preempt_disable();
}

void axvcpu_preempt_enable(void)
{
	preempt_enable();
}

void axvcpu_irq_disable(void)
{
	local_irq_disable();
}

void axvcpu_irq_enable(void)
{
	local_irq_enable();
}

bool axvcpu_work_pending(void)
{
	return xfer_to_guest_mode_work_pending();
}

int axvcpu_handle_work(void)
{
	if (!__xfer_to_guest_mode_work_pending())
		return 0;
	return xfer_to_guest_mode_handle_work();
}

static void axvcpu_nothing(void *unused)
{
}

void axvcpu_interrupt_and_wait(int cpu)
{
	/* -ENXIO: the CPU is going down and runs no task of ours. */
	smp_call_function_single(cpu, axvcpu_nothing, NULL, 1);
}

int axvcpu_wait(struct rcuwait *wait, bool (*ready)(const void *), const void *data)
{
	return rcuwait_wait_event(wait, ready(data), TASK_INTERRUPTIBLE);
}

void axvcpu_wake(struct rcuwait *wait)
{
	rcuwait_wake_up(wait);
}

int axvcpu_yield_to(struct task_struct *const *slot)
{
	struct task_struct *task;
	int yielded;

	/*
	 * A task in the slot is inside of RUN. It may leave that, and end, any
	 * moment, but what is left of it stays until all RCU readers are done.
	 */
	rcu_read_lock();
	task = READ_ONCE(*slot);
	if (task)
		get_task_struct(task);
	rcu_read_unlock();
	if (!task)
		return 0;
	yielded = yield_to(task, true);
	put_task_struct(task);
	return yielded;
}
