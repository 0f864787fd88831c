"""Comparing ways to tune on one's own data: equal budget, tuned learning rates, seeds, and what the numbers can say."""
