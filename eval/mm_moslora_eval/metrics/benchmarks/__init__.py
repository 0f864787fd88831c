"""Metrics of single benchmarks, each after the benchmark's own evaluation code."""
