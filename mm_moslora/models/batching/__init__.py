"""Packed and padded batches, as models take them."""
