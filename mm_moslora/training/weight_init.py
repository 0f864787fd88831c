"""How new parts of a model start: a projector from pictures and their answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.batch import Example, join_images
from mm_moslora.config import AdapterConfig, ModelConfig
from mm_moslora.data.record_examples import MeasuredRecords
from mm_moslora.models.assembly import Parts
from mm_moslora.models.projectors.projector_start import (
    embedding_scale,
    embedding_size,
    fit_to_words,
    fold_into,
    inputs_of,
    last_layer,
    linear_layers,
)
from mm_moslora.models.vlm import image_features, is_multimodal
from mm_moslora.utils import distributed
from mm_moslora.utils.progress_bar import Progress
from mm_moslora.utils.run_paths import is_adapter, projector_file

logger = logging.getLogger(__name__)

PICTURES_TO_SCALE, PICTURES_TO_STANDARDISE, PICTURES_TO_FIT = 8, 64, 1024
"""Numbers of pictures: few for the scale, more for the spread of every dimension, most for the fit to answers."""


def resumed_start(
    config: ModelConfig, model: ModelConfig, adapter: AdapterConfig, checkpoint: Path
) -> tuple[ModelConfig, AdapterConfig]:
    """The source of a resumed run's initial weights: its checkpoint, where the original ones are gone."""
    # Trained weights are loaded from the checkpoint's state later, so only frozen parts and shapes depend on this.
    weights, saved = config.projector.weights, checkpoint / "projector.safetensors"
    fresh = weights is None and model.vlm is None and not model.projector_trains and saved.is_file()
    if fresh or (weights and not projector_file(model.projector.weights or "").is_file()):
        model = replace(model, projector=replace(model.projector, weights=str(saved)))
    if adapter.weights and not is_adapter(adapter.weights):
        adapter = replace(adapter, weights=str(checkpoint / "adapter"))
    return model, adapter


@torch.no_grad()
def start_projector(config: ModelConfig, assembly: Parts, data: MeasuredRecords) -> None:
    """Fit a new projector to pictures and their answers, as asked: rank 0 computes, the others get its weights."""
    model, wanted = assembly.model, config.projector
    if not is_multimodal(model) or assembly.is_pretrained_vlm or wanted.weights:
        return
    if not (wanted.fit_to_answers or wanted.scale_to_embeddings):
        if config.language_mode != "frozen":
            logger.warning(
                "The projector starts from random weights while the language model trains. LLaVA trains the projector "
                "alone before: give that run as model.projector.weights, or set model.projector.fit_to_answers: true."
            )
        return
    projector = model.model.multi_modal_projector
    with distributed.failing_together("Fitting the projector"):
        if distributed.is_main():
            with _vision_on_training_device(model):
                _fit(assembly, data, to_answers=wanted.fit_to_answers)
    weights = {name: value.cpu() for name, value in projector.state_dict().items()}
    projector.load_state_dict(distributed.from_main(weights))


def _fit(assembly: Parts, data: MeasuredRecords, *, to_answers: bool) -> None:
    model = assembly.model
    projector, words = model.model.multi_modal_projector, cast(Tensor, model.get_input_embeddings().weight)
    pictures = [pixels for _, pixels in _spread_out(data, PICTURES_TO_STANDARDISE if to_answers else PICTURES_TO_SCALE)]
    if not pictures:
        logger.warning("The projector starts from random weights: no record of the training data has a picture.")
        return
    if to_answers:
        fold_into(projector, *_feature_spread(model, pictures))
        share = fit_to_words(projector, _features_and_words(assembly, data), size=embedding_size(words))
        if share is not None:
            logger.info("Projector fitted: visual tokens explain %.0f %% of the variance of the answers.", 100 * share)
            return
        logger.warning("The projector is not fitted to the answers: the answers, or the pictures, are all equal.")
    with last_layer(projector) as last:
        factor = embedding_scale(image_features(model, torch.cat(pictures[:PICTURES_TO_SCALE])), words)
    for parameter in last().parameters():
        parameter.mul_(factor)
    logger.info("Projector output scaled by %.3g to the norm of word embeddings.", factor)


def _spread_out(
    data: MeasuredRecords, count: int, *, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[Example, Tensor]]:
    """At most `count` records and their tiles ``[n, 3, H, W]``, evenly spaced: files are often sorted by content."""
    with_images = [index for index in range(len(data)) if data.has_image[index]]
    chosen = with_images
    if len(with_images) > count:
        chosen = [with_images[len(with_images) * nth // count] for nth in range(count)]
    for done, index in enumerate(chosen, start=1):
        example = data[index]
        if example is not None and example.pictures:
            yield example, join_images([picture.tensors for picture in example.pictures])["pixel_values"].flatten(0, -4)
        if on_progress is not None:
            on_progress(done, len(chosen))


def _feature_spread(model: PreTrainedModel, pictures: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the input of a projector's first linear layer, ``[V]`` each, fp32."""
    with inputs_of(linear_layers(model.model.multi_modal_projector)[0]) as taken:
        for pixels in pictures:
            image_features(model, pixels)
        spread, mean = torch.std_mean(taken().flatten(0, -2), dim=0, correction=0)
    return mean, spread


def _features_and_words(assembly: Parts, data: MeasuredRecords) -> Iterator[tuple[Tensor, Tensor]]:
    """Per picture, the first layer's input ``[n, Q, V]`` and the mean word embedding of the answers ``[n, D]``."""
    model, marks = assembly.model, torch.tensor(assembly.tokenizer.all_special_ids)
    words = cast(Tensor, model.get_input_embeddings().weight)
    progress = Progress("fit projector", 0, unit="picture")
    with inputs_of(linear_layers(model.model.multi_modal_projector)[0]) as taken:
        records = _spread_out(data, PICTURES_TO_FIT, on_progress=progress.of)
        while some := list(islice(records, PICTURES_TO_SCALE)):
            pixels, targets = [], []
            for example, images in some:
                answers = example.input_ids[example.supervised]
                if len(answers := answers[~torch.isin(answers, marks)]):
                    pixels.append(images)
                    targets.append(words[answers].float().mean(0).expand(len(images), -1))
            if pixels:
                image_features(model, torch.cat(pixels))
                yield taken(), torch.cat(targets)


@contextmanager
def _vision_on_training_device(model: PreTrainedModel) -> Iterator[None]:
    """Tower and projector on this rank's device inside the block, and then where they were."""
    parts: list[nn.Module] = [model.model.vision_tower, model.model.multi_modal_projector]
    before = next(parts[0].parameters()).device
    for part in parts:
        part.to(distributed.device())
    try:
        yield
    finally:
        for part in parts:
            part.to(before)
