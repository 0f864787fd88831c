"""Padded rows: one sample per row, as the processors of ready-made models make them.

Prompts are read this way. Models without packed rows (`mm_moslora.models.batching.packed_batch`) train this way.

Shapes: ``G`` samples, ``T`` longest sample, ``S`` tokens of the batch, ``K`` supervised positions, ``D`` width.

Models get the inputs that their processors make, a type per token among them: Qwen-VL derives its three-part positions
from it, Gemma which tokens of a picture see each other, PaliGemma its prefix.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from mm_moslora.adapters.tree import base_model
from mm_moslora.batch import IGNORED, Batch, Example, usable
from mm_moslora.models.families import HOST_INPUTS, READ_INPUTS, vlm_family
from mm_moslora.utils.errors import ModelError


def padded_hidden(model: PreTrainedModel, batch: Batch, *, dummy: Batch | None = None) -> Tensor:
    """The hidden states at the supervised positions, one sample per row, padded on the right.

    Args:
        dummy: for a batch without images where other ranks have some: it runs as one more row with a weight of zero, so
            that all ranks take part in the same collectives.

    Returns:
        ``[K, D]``.

    Raises:
        ModelError: placeholders and images do not match.
    """
    host, shown = batch.on_host, batch
    rows = list(host.input_ids.split(batch.segment_lengths))
    if dummy is not None and not batch.images:
        rows.append(dummy.on_host.input_ids)
        shown = dummy
    first_answer = _first_supervised(host) + [len(row) for row in rows[len(batch.segment_lengths) :]]
    arguments = padded_inputs(model, rows, shown.pixel_values, readable(shown), answers=first_answer)
    try:
        hidden = model.model(**arguments, use_cache=False).last_hidden_state
    except ValueError as error:
        if "do not match" not in str(error):
            raise
        raise ModelError(f"{error}. Records: {', '.join(batch.ids[:4])}.") from error
    positions = _in_rows(host, hidden.shape[1]).to(hidden.device, non_blocking=True)
    chosen = hidden.flatten(0, 1)[positions]
    if len(rows) > len(batch.segment_lengths):
        chosen = chosen + 0.0 * hidden[-1].sum()
    return chosen


def padded_inputs(
    model: PreTrainedModel,
    rows: Sequence[Tensor],
    pixel_values: Tensor | None,
    image_inputs: dict[str, Tensor],
    *,
    answers: Sequence[int] | None,
    left: bool = False,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Keyword arguments of a model's forward pass.

    Args:
        rows: ``G`` samples of ids in main memory, different lengths.
        image_inputs: the other inputs of the pictures, on any device.
        answers: the start of each sample's first answer; None: these are prompts.
        left: pad on the left, so that all samples end together.
    """
    device = model.device if device is None else device
    whole = text_inputs(model, rows, left=left)
    if vlm_family(model.config.model_type).prefix:
        starts = torch.tensor([whole["input_ids"].shape[1]] * len(rows) if answers is None else [*answers])[:, None]
        whole["token_type_ids"] = (torch.arange(whole["input_ids"].shape[1])[None] >= starts).long()
    arguments: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in whole.items()}
    if pixel_values is not None or image_inputs:
        arguments |= picture_inputs(model, pixel_values, image_inputs, device=device)
    return arguments


@dataclass(frozen=True, kw_only=True)
class PaddedCollator:
    """Collates examples to keyword arguments of a ready-made model, for other trainers (`Trainer(data_collator=...)`).

    Bad records (`TrainingSet` gives None) are left out.
    """

    model: nn.Module
    """The image-text-to-text model of transformers, with or without adapters."""

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Any]:
        """Make a batch in main memory.

        Returns:
            The keyword arguments (see `padded_inputs`), and `labels`, int64 ``[G, T]``.

        Raises:
            DataError: no example can be used.
        """
        batch = Batch.from_examples(usable(examples))
        rows = list(batch.input_ids.split(batch.segment_lengths))
        inputs = padded_inputs(
            cast(PreTrainedModel, base_model(self.model)),
            rows,
            batch.pixel_values,
            batch.image_inputs,
            answers=_first_supervised(batch),
            device=torch.device("cpu"),
        )
        labels = [example.labels for example in usable(examples)]
        return inputs | {"labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED)}


def text_inputs(model: PreTrainedModel, rows: Sequence[Tensor], *, left: bool = False) -> dict[str, Tensor]:
    """Ids and mask ``[G, T]`` in main memory, and the positions of pictures for models that take them."""
    side = "left" if left else "right"
    ids = pad_sequence(list(rows), batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    taken = [name for name in ("mm_token_type_ids", "token_type_ids") if takes(model, name)]
    if not taken:  # also a language model alone, which has no image token
        return inputs
    types = (ids == model.config.image_token_id).long()
    if (video := getattr(model.config, "video_token_id", None)) is not None:
        types += 2 * ((ids == video) & (types == 0))  # some have one token for both
    return inputs | dict.fromkeys(taken, types * mask)


def takes(model: PreTrainedModel, keyword: str) -> bool:
    """Whether the forward pass of a model has a keyword argument; it ignores unknown ones without an error."""
    return keyword in inspect.signature(type(model.base_model).forward).parameters


def picture_inputs(
    model: PreTrainedModel,
    pixel_values: Tensor | None,
    image_inputs: dict[str, Tensor],
    *,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """The keyword arguments of a model for the pictures and videos of all rows.

    Args:
        pixel_values: of all pictures in order; None where only videos have inputs.
        image_inputs: the other inputs of the pictures, on any device; see `readable`.
    """
    device = model.device if device is None else device
    inputs: dict[str, Any] = {} if pixel_values is None else {"pixel_values": pixel_values}
    inputs |= image_inputs
    if "batch_num_images" in inputs:
        inputs["batch_num_images"] = _runs(inputs["batch_num_images"])
    if vlm_family(model.config.model_type).one_image_list:  # read in order: all pictures go into one sample
        inputs = {name: value[None] for name, value in inputs.items()}
    dtype = model.dtype
    return {
        name: value
        if name in HOST_INPUTS
        else value.to(
            device, dtype if value.is_floating_point() and name not in READ_INPUTS else None, non_blocking=True
        )
        for name, value in inputs.items()
    }


def readable(batch: Batch) -> dict[str, Tensor]:
    """A batch's image inputs; those that the model reads as numbers are in main memory."""
    return {
        name: batch.on_host.image_inputs[name] if name in READ_INPUTS else value
        for name, value in batch.image_inputs.items()
    }


def _in_rows(batch: Batch, width: int) -> Tensor:
    """The supervised positions in the flattened padded rows of this width, ``[K]``."""
    ends = torch.tensor(batch.segment_lengths).cumsum(0)
    row = torch.bucketize(batch.target_positions, ends, right=True)
    starts = ends - torch.tensor(batch.segment_lengths)
    return batch.target_positions - starts[row] + row * width


def _first_supervised(batch: Batch) -> list[int]:
    """The start of the first answer within every sample; the sample's length where it has none."""
    positions = batch.target_positions.tolist()
    starts, offset = [], 0
    for length in batch.segment_lengths:
        inside = [position for position in positions if offset <= position < offset + length]
        starts.append(min(inside) + 1 - offset if inside else length)
        offset += length
    return starts


def _runs(counts: Tensor) -> Tensor:
    """LLaVA-OneVision's pictures per sample, from a count per picture (1: tiled, more: one of several, not tiled)."""
    runs: list[int] = []
    for tiled, group in itertools.groupby(counts.tolist(), key=lambda count: count == 1):
        length = len(list(group))
        if not tiled and length == 1:
            raise ModelError(
                "Truncation left one of several pictures, which LLaVA-OneVision would read as a tiled one. Raise "
                "data.max_length."
            )
        runs += [1] * length if tiled else [length]
    return torch.tensor(runs, device=counts.device)
