"""Launchers of training ranks: torchrun, DeepSpeed and SLURM."""
