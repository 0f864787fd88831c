"""The adapter's arithmetic, forward and backward."""
