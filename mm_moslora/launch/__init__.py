"""Starting the ranks of a run: launchers and SLURM."""
