"""Supervision of a run: its state file, its ranks, signals and divergence."""
