"""Scores of drawn pictures as DreamBooth defines them (2208.12242): DINO and CLIP-I for likeness, CLIP-T for prompts.

Each is a mean cosine of embeddings: of every drawn picture with every picture of the subject (DINO's class token,
CLIP's picture embedding), or of a drawn picture with its prompt (CLIP).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mm_moslora.data.images.record_picture import open_image
from mm_moslora.diffusion.drawing import ValidationPictures
from mm_moslora.diffusion.pipeline_families import PipelineFamily
from mm_moslora.diffusion.subject_pictures import PictureSet
from mm_moslora.models.model_sizes import load_base
from mm_moslora.tracking import Trackers
from mm_moslora.utils import files
from mm_moslora.utils.errors import ModelError, reason_of

logger = logging.getLogger(__name__)

SCORES = "subject_scores.json"


def log_scores(
    family: PipelineFamily, subject: PictureSet, drawn: Sequence[Path], pictures: ValidationPictures,
    trackers: Trackers, step: int,
) -> None:  # fmt: skip
    """Score the last validation pictures and those of the untuned model; the log names an encoder that is missing.

    Args:
        family: of the run.
        subject: the subject's pictures.
        drawn: files of the last validation.
        pictures: what was drawn.
        trackers: get the scores as `eval/dino`, `eval/clip_i` and `eval/clip_t`.
        step: of the weights.
    """
    names = {"dino": family.recipe.validate.dino, "clip": family.recipe.validate.clip}
    prompts = [item.prompt for item in pictures.wanted]
    real = [open_image(item.path) for item in subject.pictures]
    scores: dict[str, dict[str, float]] = {}
    for label, paths in (("untuned", pictures.untuned), ("tuned", drawn)):
        images = [open_image(path) for path in paths]
        scores[label] = {}
        for kind, name in names.items():
            if name is not None and images:
                scores[label] |= _scored(kind, name, images, real, prompts)
    if not scores["tuned"]:
        return
    files.replace_json(pictures.run / SCORES, {"step": step, **scores})
    for name, value in scores["tuned"].items():
        logger.info("%s %.4f, untuned %.4f", name, value, scores["untuned"].get(name, float("nan")))
    trackers.log({f"eval/{name}": value for name, value in scores["tuned"].items()}, step)


def _scored(
    kind: str, name: str, images: list[Image.Image], real: list[Image.Image], prompts: list[str]
) -> dict[str, float]:
    from transformers import AutoImageProcessor, AutoModel, AutoProcessor

    reader: Any = AutoImageProcessor if kind == "dino" else AutoProcessor
    try:
        model = load_base(AutoModel, name, local_files_only=True).eval()
        process = reader.from_pretrained(name, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ModelError) as error:
        logger.warning("validate.%s %s is not at hand (%s): no %s scores.", kind, name, reason_of(error), kind)
        return {}
    groups = (images, real)
    with torch.no_grad():
        if kind == "dino":
            embedded = [model(**process(images=group, return_tensors="pt")).last_hidden_state[:, 0] for group in groups]
            return {"dino": _likeness(*embedded)}
        embedded = [
            _embedding(model.get_image_features(**process(images=group, return_tensors="pt"))) for group in groups
        ]
        texts = process(text=prompts, return_tensors="pt", padding=True, truncation=True)
        text_embedding = _embedding(model.get_text_features(**texts))
    agreement = F.cosine_similarity(embedded[0], text_embedding, dim=-1).mean()
    return {"clip_i": _likeness(*embedded), "clip_t": float(agreement)}


def _embedding(output: Any) -> Tensor:
    """The projected embedding: a tensor, or the field of an output, depending on the release of transformers."""
    embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return embedding


def _likeness(drawn: Tensor, real: Tensor) -> float:
    """Mean cosine of every drawn picture with every real one."""
    return float((F.normalize(drawn, dim=-1) @ F.normalize(real, dim=-1).T).mean())
