"""Kernels: attention, fused elementwise operations, and LoRA products."""
