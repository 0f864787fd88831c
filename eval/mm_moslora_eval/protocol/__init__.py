"""Tasks, prompts and the interface of models."""
