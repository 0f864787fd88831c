"""The page of an evaluation, and what it leaves with a run."""
