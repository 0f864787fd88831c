"""Attention of packed rows: variable-length kernels, matrix products on a CPU, the C++ kernel."""
