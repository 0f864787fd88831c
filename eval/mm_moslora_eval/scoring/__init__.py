"""Scores of answers, with error bars."""
