"""Errors, files, paths, ranks, hardware, logging: what every other package stands on."""
