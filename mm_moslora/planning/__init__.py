"""Before a run: memory, time and cost, its data, this machine."""
