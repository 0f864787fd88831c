"""Exports: Hugging Face, LLaVA, GGUF, the model card."""
