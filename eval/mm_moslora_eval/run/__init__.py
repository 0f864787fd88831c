"""Asking, storing, scoring a run."""
