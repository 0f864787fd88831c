"""Exports: Hugging Face, GGUF, the model card."""
