// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small kernels of each format, made here; what the loaders leave in memory; and images that are refused.
