"""Runs of the evaluation: asks models, stores and scores answers."""
