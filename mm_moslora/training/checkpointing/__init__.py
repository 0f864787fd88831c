"""Checkpoint folders: listing, verification and the commit protocol."""
