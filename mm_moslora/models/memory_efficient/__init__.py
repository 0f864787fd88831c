"""Decoder layers and heads that keep little for the backward pass."""
