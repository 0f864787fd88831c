"""Training: optimiser groups, engines, checkpoints and the loop."""
