"""Adapted layers, by type of the base layer."""
