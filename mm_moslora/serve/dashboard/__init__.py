"""A local dashboard over all runs of a folder, live while they train."""
