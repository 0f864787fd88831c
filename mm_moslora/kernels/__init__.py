"""Kernels: attention, fused elementwise operations, LoRA products, and the C++ library."""
