"""A tiny exported LLaVA with different answers to different questions."""

from __future__ import annotations

from pathlib import Path

import torch


def export_tiny(folder: Path, language: Path, vision: Path) -> Path:
    from mm_moslora.config import ModelConfig, VisionConfig
    from mm_moslora.models.assembly import load_parts
    from mm_moslora.models.processing.llava_processor import save_processor

    torch.manual_seed(3)  # the projector, too
    assembly = load_parts(ModelConfig(language=str(language), vision=VisionConfig(name=str(vision))))
    for name, weight in assembly.model.model.language_model.named_parameters():
        if "layers" in name and weight.ndim == 2:
            torch.nn.init.normal_(weight, std=0.3)
    assembly.model.save_pretrained(folder)
    save_processor(assembly.processor, folder)
    return folder
