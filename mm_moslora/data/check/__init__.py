"""Looking at data before a run."""
