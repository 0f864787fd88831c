"""mm_moslora: assemble a vision-language model, tune it with MoSLoRA, measure it, hand it on."""

__version__ = "0.1.0"
