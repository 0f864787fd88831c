"""Models: vision encoders, projectors, assembly, export. Importing it registers them with the Auto classes."""

from mm_moslora.models.processing.llava_processor import VlmProcessor
from mm_moslora.models.vlm import VlmConfig, VlmForConditionalGeneration

__all__ = ["VlmConfig", "VlmForConditionalGeneration", "VlmProcessor"]
