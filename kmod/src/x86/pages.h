/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The bits of the host's page-table entries, of pages and of huge ones alike,
 * that tell what a CPU may do with them as they are: see axvcpu_host_leaf().
 */
#ifndef AXVCPU_X86_PAGES_H
#define AXVCPU_X86_PAGES_H

#include <linux/pgtable.h>

/*
 * Userspace may read it. Not an entry with a protection key: what PKRU says of
 * that is not known where the guest's PKRU is loaded.
 */
static inline bool axvcpu_entry_usable(u64 entry)
{
	const u64 needed = _PAGE_PRESENT | _PAGE_USER;

	return (entry & (needed | _PAGE_SPECIAL | _PAGE_PKEY_MASK)) == needed;
}

static inline bool axvcpu_entry_writable(u64 entry)
{
	return entry & _PAGE_RW;
}

static inline bool axvcpu_entry_dirty(u64 entry)
{
	return entry & _PAGE_DIRTY;
}

#endif
