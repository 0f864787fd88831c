"""FLOPs, throughput and mixer statistics of a run."""
