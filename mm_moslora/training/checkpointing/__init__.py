"""Checkpoint folders: which there are, whether they are whole, how one is committed."""
