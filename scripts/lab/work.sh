#!/bin/sh
# SPDX-License-Identifier: MIT OR Apache-2.0
# shellcheck shell=dash
#
# work.sh ROUNDS: work whose results say whether the machine under it is sound, a line
# a round: integers, memory, pipes and processes, and floating point. It prints the
# same on every machine, so a guest's output is compared with its host's. (Of floating
# point only what IEEE 754 rounds one way.)

round=0
while [ "$round" -lt "$1" ]; do
	hash=$(seq "$round" $((round + 20000)) | gzip | gunzip | sha256sum | cut -c1-32)
	sum=$(awk -v n="$round" 'BEGIN {
		for (i = 1; i <= 20000; i++) s += i / (n + 3 * i)
		printf "%.12f", s
	}')
	echo "work $round: $hash $sum"
	round=$((round + 1))
done
