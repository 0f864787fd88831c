"""mm_moslora: assemble a vision-language model, tune it with MoSLoRA, measure it, export it."""

import mm_moslora.utils  # noqa: F401  (its log filters, before anything imports peft or transformers)

__version__ = "0.1.0"
