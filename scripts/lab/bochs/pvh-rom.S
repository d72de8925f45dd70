/* SPDX-License-Identifier: MIT OR Apache-2.0 */
/*
 * An option ROM that starts a Linux kernel which already lies in memory, by its
 * PVH entry (xen/include/public/arch-x86/hvm/start_info.h), so that no boot loader
 * and no decompressor is emulated.
 *
 * pvh_image.py lays the memory image out: the boot block at BLOCK, kernel and
 * initramfs behind it. All that changes from boot to boot is in the boot block,
 * so this ROM is assembled once. What it adds is the memory map of the BIOS.
 *
 * Bochs reads the image into host memory in one go, and gives guest blocks their
 * host memory in the order of first touch. So every block of the image has to be
 * touched in ascending order before anything touches another: see bochsrc.
 */
	.set	BASE, 0xd0000		# where bochsrc puts this ROM
	.set	BLOCK, 0x800000		# the boot block (pvh_image.py)
	.set	BLOCK_ENTRY, 0x00	#   u32: PVH entry of the kernel
	.set	BLOCK_END, 0x04		#   u32: end of the image
	.set	BLOCK_INFO, 0x40	#   struct hvm_start_info
	.set	INFO_MEMMAP, 40		#   u64: address of the memory map
	.set	INFO_ENTRIES, 48	#   u32: its number of entries
	.set	TOUCH, 0x800000		# block_size in bochsrc
	.set	MAP_SEGMENT, 0x1000	# the memory map, in free low memory
	.set	MAP_ENTRY, 24		# struct hvm_memmap_table_entry
	.set	SMAP, 0x534d4150	# 'SMAP', the signature of INT 15h, E820h

	.text
	.code16
rom:	.byte	0x55, 0xaa
	.byte	1			# length in 512-byte units
	jmp	start

start:	cli
	cld
	inb	$0x92, %al		# A20 on, no reset
	orb	$2, %al
	andb	$0xfe, %al
	outb	%al, $0x92

	movw	$MAP_SEGMENT, %ax
	movw	%ax, %es
	xorw	%di, %di
	xorl	%ebx, %ebx		# continuation: from the start
	xorl	%ebp, %ebp		# entries so far
next:	movl	$0xe820, %eax
	movl	$SMAP, %edx
	movl	$20, %ecx
	int	$0x15
	jc	mapped
	cmpl	$SMAP, %eax
	jne	mapped
	movl	$0, %es:20(%di)		# reserved
	addw	$MAP_ENTRY, %di
	incl	%ebp
	testl	%ebx, %ebx
	jnz	next

mapped:	cli
	lgdtl	%cs:(gdtr - rom)
	movl	%cr0, %eax
	orl	$1, %eax
	movl	%eax, %cr0
	ljmpl	$8, $(protected - rom + BASE)

	.code32
protected:
	movw	$16, %ax
	movw	%ax, %ds
	movw	%ax, %es
	movw	%ax, %ss
	movl	$BLOCK, %esi
	movl	BLOCK_END(%esi), %ecx	# touches the first block
touch:	movb	(%esi), %al
	addl	$TOUCH, %esi
	cmpl	%ecx, %esi
	jb	touch

	movl	$(BLOCK + BLOCK_INFO), %ebx	# start info: the entry's argument
	movl	$(MAP_SEGMENT * 16), INFO_MEMMAP(%ebx)
	movl	%ebp, INFO_ENTRIES(%ebx)
	jmp	*(BLOCK + BLOCK_ENTRY)

	.balign	8
gdt:	.quad	0
	.quad	0x00cf9b000000ffff	# code, flat
	.quad	0x00cf93000000ffff	# data, flat
gdtr:	.word	gdtr - gdt - 1
	.long	gdt - rom + BASE
