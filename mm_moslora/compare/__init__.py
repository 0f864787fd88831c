"""Comparing ways to tune on one's own data: equal budgets, tuned learning rates, several seeds, statistics."""
