"""Utilities of all other packages: errors, files, paths, ranks, hardware, logging."""
