"""Checkpoint folders: listing, verification, the commit protocol, and the choice of one to resume from."""
