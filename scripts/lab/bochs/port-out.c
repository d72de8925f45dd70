// SPDX-License-Identifier: MIT OR Apache-2.0
/*
 * port-out parallel|debug: standard input to the lab host's first parallel port or
 * to Bochs' debug port. Both take a character in a few instructions; the serial
 * port takes as long for it as the real thing, some 130,000.
 */
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <unistd.h>

enum {
	DEBUG_PORT = 0xe9,
	PARALLEL_DATA = 0x378,
	PARALLEL_CONTROL = 0x37a,
	STROBE = 1 << 0,
	INITIALIZED = 1 << 2, /* the line is active low: set, the printer works */
	SELECTED = 1 << 3,
};

static void to_debug(unsigned char byte)
{
	outb(byte, DEBUG_PORT);
}

static void to_parallel(unsigned char byte)
{
	outb(byte, PARALLEL_DATA);
	outb(INITIALIZED | SELECTED | STROBE, PARALLEL_CONTROL);
	outb(INITIALIZED | SELECTED, PARALLEL_CONTROL);
}

int main(int argc, char **argv)
{
	void (*put)(unsigned char);
	unsigned char buffer[4096];
	ssize_t length;

	if (argc == 2 && !strcmp(argv[1], "parallel"))
		put = to_parallel;
	else if (argc == 2 && !strcmp(argv[1], "debug"))
		put = to_debug;
	else
		return 2;
	if (ioperm(DEBUG_PORT, 1, 1) || ioperm(PARALLEL_DATA, 3, 1)) {
		perror("ioperm");
		return 1;
	}
	if (put == to_parallel) {
		outb(0, PARALLEL_CONTROL);
		outb(INITIALIZED | SELECTED, PARALLEL_CONTROL);
	}
	while ((length = read(0, buffer, sizeof(buffer))) > 0)
		for (ssize_t i = 0; i < length; i++)
			put(buffer[i]);
	return length < 0;
}
