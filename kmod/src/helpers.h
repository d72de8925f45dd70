/* SPDX-License-Identifier: GPL-2.0-only */
/* Prototypes of helpers.c, for the C compiler; Rust's are in ffi.rs. */
#ifndef AXVCPU_HELPERS_H
#define AXVCPU_HELPERS_H

#include <linux/types.h>
#include <linux/wait.h>

struct file;
struct file_operations;
struct mm_struct;
struct page;
struct rcuwait;
struct task_struct;
struct vm_area_struct;

/* The low bits of axvcpu_host_leaf(); the others are the page's address. Rust's are in ffi.rs. */
#define AXVCPU_LEAF_SHIFT	0x3f	/* the size of the mapping, as log2 of bytes */
#define AXVCPU_LEAF_USABLE	0x40	/* a CPU may read it without telling anybody */
#define AXVCPU_LEAF_WRITABLE	0x80	/* if it is usable: writes are allowed */
#define AXVCPU_LEAF_DIRTY	0x100	/* if it is usable: the host takes it for written */

unsigned long axvcpu_alloc_pages(unsigned int order);
void axvcpu_split_pages(unsigned long addr, unsigned int order);
void axvcpu_free_pages(unsigned long addr, unsigned int order);
u64 axvcpu_virt_to_phys(unsigned long addr);
u64 axvcpu_page_to_phys(struct page *page);
void axvcpu_mark_guest_page(struct page *page, bool dirty);
void axvcpu_put_guest_page(struct page *page);
bool axvcpu_access_ok(unsigned long addr, unsigned long size);
int axvcpu_insert_page(struct vm_area_struct *vma, unsigned long addr);
unsigned int axvcpu_host_leaf_shift(struct mm_struct *mm, unsigned long addr);
u64 axvcpu_host_leaf(struct mm_struct *mm, unsigned long addr);
int axvcpu_anon_fd(const char *name, const struct file_operations *fops, void *private);
void axvcpu_listen(struct file *file, struct wait_queue_entry *wait, wait_queue_func_t wake);
void axvcpu_preempt_disable(void);
void axvcpu_preempt_enable(void);
void axvcpu_irq_disable(void);
void axvcpu_irq_enable(void);
bool axvcpu_work_pending(void);
int axvcpu_handle_work(void);
void axvcpu_interrupt_and_wait(int cpu);
int axvcpu_wait(struct rcuwait *wait, bool (*ready)(const void *), const void *data);
void axvcpu_wake(struct rcuwait *wait);
int axvcpu_yield_to(struct task_struct *const *slot);

/* Each architecture's own. */
void axvcpu_send_ipi(int cpu);
void axvcpu_fpu_begin(void);
void axvcpu_fpu_end(void);

#ifdef CONFIG_ARM64
void axvcpu_flush_ipis(void);
#endif

#ifdef CONFIG_X86_64
unsigned int axvcpu_host_flags(void);
unsigned int axvcpu_l1d_flush(void);
unsigned int axvcpu_notification_vector(void);
void axvcpu_notify_posted(int cpu);
unsigned int axvcpu_apic_steps(void);
unsigned int axvcpu_tsc_khz(void);
bool axvcpu_tsc_stable(void);
#endif

#endif
