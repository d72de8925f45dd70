/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The bits of the host's page-table entries, of pages and of huge ones alike,
 * that tell what a CPU may do with them as they are: see axvcpu_host_leaf().
 */
#ifndef AXVCPU_ARM64_PAGES_H
#define AXVCPU_ARM64_PAGES_H

#include <linux/pgtable.h>

/*
 * Userspace may read it. Not an entry with a permission overlay: what POR_EL0
 * says of that is not known where the guest's is loaded.
 */
static inline bool axvcpu_entry_usable(u64 entry)
{
	const u64 needed = PTE_VALID | PTE_USER;

	return (entry & (needed | PTE_SPECIAL | PTE_PO_IDX_MASK)) == needed;
}

static inline bool axvcpu_entry_writable(u64 entry)
{
	return pte_write(__pte(entry));
}

static inline bool axvcpu_entry_dirty(u64 entry)
{
	return pte_hw_dirty(__pte(entry));
}

#endif
