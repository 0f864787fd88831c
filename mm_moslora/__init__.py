"""mm_moslora: assemble a vision-language model, tune it with MoSLoRA, measure it, export it."""

import mm_moslora.renamed
import mm_moslora.utils

__version__ = "0.1.0"

mm_moslora.renamed.install()
