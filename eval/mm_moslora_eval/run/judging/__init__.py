"""Grading by judges: their prompts, the scores of a task, agreement with graded answers."""
