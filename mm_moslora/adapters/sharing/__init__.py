"""Factors that several adapted layers share: which layers, and what they read."""
