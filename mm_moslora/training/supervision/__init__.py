"""Watching over a run: its state, ranks, signals, divergence."""
