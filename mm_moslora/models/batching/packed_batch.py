"""Packed rows of ready-made models: conversations one after another in one row, without padding.

Shapes: ``S`` tokens of the row, ``G`` conversations, ``T`` longest of them, ``K`` supervised positions, ``D`` width.

A model takes such a row where its attention is causal throughout. Its forward pass places the pictures and gets
positions that restart with every conversation; the three parts of Qwen-VL's are those of padded rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import Batch
from mm_moslora.models.batching.padded_batch import picture_inputs, readable, takes, text_inputs
from mm_moslora.models.families import vlm_family
from mm_moslora.models.memory_efficient.decoder_layers import packed_row_hidden
from mm_moslora.utils.errors import ModelError

ENCODED = "mm_encoder_outputs"
"""Keyword argument of forward passes: pictures that are already encoded."""


def packs(model: PreTrainedModel) -> bool:
    """Whether a ready-made model trains on packed rows; others get padded ones (`padded_batch`)."""
    return vlm_family(model.config.model_type).packed


def has_mrope(model: PreTrainedModel) -> bool:
    """Whether a token's position is a time, a height and a width, as in Qwen-VL."""
    return hasattr(model.base_model, "get_rope_index")


def packed_hidden(model: PreTrainedModel, batch: Batch, *, dummy: Batch | None = None) -> Tensor:
    """`packed_row_hidden` of a ready-made model, ``[K, D]``; `dummy` as in `padded_hidden`."""
    row = batch if dummy is None or batch.images else _with_stand_in(batch, dummy)
    try:
        inputs = {"input_ids": row.input_ids[None], "position_ids": _positions(model, row), **_pictures(model, row)}
        hidden = packed_row_hidden(model, row, **inputs)
    except ValueError as error:
        if "do not match" not in str(error):
            raise
        raise ModelError(f"{error}. Records: {', '.join(batch.ids[:4])}.") from error
    count = batch.supervised_tokens
    return hidden if row is batch else hidden[:count] + 0.0 * hidden[count:].sum()


def _with_stand_in(batch: Batch, dummy: Batch) -> Batch:
    """The batch with one more conversation at its end; the last position is supervised, too."""
    end = torch.tensor([batch.tokens + dummy.tokens - 1]).to(batch.input_ids.device, non_blocking=True)
    return replace(
        batch,
        input_ids=torch.cat((batch.input_ids, dummy.input_ids)),
        position_ids=torch.cat((batch.position_ids, dummy.position_ids)),
        segment_lengths=(*batch.segment_lengths, *dummy.segment_lengths),
        shared=batch.shared and (*batch.shared, 0),
        target_positions=torch.cat((batch.target_positions, end)),
        pixel_values=dummy.pixel_values,
        image_inputs=dummy.image_inputs,
        images=dummy.images,
        host=None if batch.host is None else _with_stand_in(batch.host, dummy.on_host),
    )


def _positions(model: PreTrainedModel, batch: Batch) -> Tensor:
    """``[1, S]``; of three parts ``[4, 1, S]``: the plain ones, which mark the starts of conversations, come first."""
    plain = batch.position_ids[None]
    if not has_mrope(model):
        return plain
    inner: Any = model.base_model
    host = batch.on_host  # the model reads ids and grids one by one
    inputs = text_inputs(model, host.input_ids.split(batch.segment_lengths))
    none = torch.zeros(0, 3, dtype=torch.long)
    grids = [host.image_inputs.get(f"{kind}_grid_thw", none) for kind in ("image", "video")]
    tokens = int((inputs["mm_token_type_ids"] > 0).sum())
    expected = int(torch.cat(grids).prod(dim=1).sum()) // inner.visual.spatial_merge_size**2
    if tokens != expected:
        raise ValueError(f"Image features and image tokens do not match, tokens: {tokens}, features: {expected}")
    times = {name: value for name, value in host.image_inputs.items() if name == "second_per_grid_ts"}
    # [3, G, T]
    parts, _ = inner.get_rope_index(**inputs, image_grid_thw=grids[0], video_grid_thw=grids[1], **times)
    flat = parts[:, inputs["attention_mask"].bool()]
    start = whole = 0
    for length, beginning in zip(host.segment_lengths, host.shared, strict=False):
        if beginning:  # a text behind the beginning of another conversation, whose pictures decide where it goes on
            flat[:, start : start + length] += flat[:, whole + beginning, None]
        else:
            whole = start
        start += length
    return torch.cat((plain[None], flat[:, None].to(plain.device, non_blocking=True)))


def _pictures(model: PreTrainedModel, batch: Batch) -> dict[str, Any]:
    """The pictures and videos as keyword arguments of the forward pass.

    Qwen-VL's would pass the keywords of the decoder's attention to the tower as well; its pictures are encoded before,
    together with its videos, so that the tower runs once on every rank.
    """
    if not batch.images:
        return {}
    inputs = picture_inputs(model, batch.pixel_values, readable(batch))
    return encoded_together(model, inputs) if has_mrope(model) else inputs


def encoded_together(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The pictures and videos among the inputs of a Qwen-VL model, encoded in one pass of its tower."""
    inner: Any = model.base_model
    if not takes(model, ENCODED):
        raise ModelError(
            f"{type(inner).__name__}.forward of transformers {transformers.__version__} does not take {ENCODED}: it "
            "would ignore the pictures. Install a release in the range that `mm-moslora doctor` names."
        )
    pixels = [inputs[name] for name in ("pixel_values", "pixel_values_videos") if name in inputs]
    grids = [inputs[name] for name in ("image_grid_thw", "video_grid_thw") if name in inputs]
    encoded = inner.get_image_features(
        pixel_values=torch.cat(pixels), image_grid_thw=torch.cat(grids), return_dict=True
    )
    pictures = len(inputs.get("image_grid_thw", ()))
    kinds = {"image": slice(pictures), "video": slice(pictures, None)}
    return {ENCODED: {kind: _some(encoded, part) for kind, part in kinds.items() if f"{kind}_grid_thw" in inputs}}


def _some(encoded: Any, part: slice) -> SimpleNamespace:
    """Some of the pictures and videos that a tower has encoded."""
    levels = getattr(encoded, "deepstack_features", None) or ()
    return SimpleNamespace(
        pooler_output=encoded.pooler_output[part], deepstack_features=[level[part] for level in levels]
    )
