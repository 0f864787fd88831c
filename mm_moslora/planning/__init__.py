"""Checks before a run: memory, time and cost, the data, this machine."""
