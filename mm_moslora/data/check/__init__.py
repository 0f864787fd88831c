"""Checks and views of the data before a run."""
