"""The HTML report of an evaluation, and its scores in the training run's folder."""
