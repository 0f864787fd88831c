"""What a model needs per token: kept activations counted on the meta device, weights and temporaries by arithmetic.

Shapes: ``T`` tokens, ``D`` LLM width, ``F`` MLP width, ``N`` images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.config import Recipe
from mm_moslora.errors import ModelError
from mm_moslora.models.skeleton import Skeleton, skeleton
from mm_moslora.models.vlm import takes_rows
from mm_moslora.training.flops import FlopCounter

NF4_BYTES = 0.516
"""Per weight: 4 bits and, doubly quantised, 0.127 bits of scale."""
PROBE = 256
"""Tokens with which activations are counted; they grow in proportion."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Sizes of a model, in bytes per token or image where not said otherwise."""

    parts: dict[str, tuple[int, int]]
    """Parameters and trainable ones by part."""
    frozen: int
    trainable: int
    weight_bytes: float
    """All frozen weights, as they are loaded."""
    value_bytes: int
    """Of a value in the compute dtype."""
    layers: int
    width: int
    vocabulary: int
    tokens_per_image: int
    kept_per_layer: float
    """Kept by one decoder layer for its backward pass."""
    kept_elsewhere: float
    """Kept by embeddings and the last norm."""
    kept_per_image: float
    """Kept by the projector, and by a tower that trains."""
    workspace_per_token: float
    workspace_per_image: float
    is_lean: bool
    """Whether decoder layers keep no more than about 8 of their width and twice the MLP's."""
    counter: FlopCounter


def footprint(recipe: Recipe, *, dtype: torch.dtype = torch.bfloat16) -> Footprint:
    """Measure a recipe's model on the meta device.

    Args:
        recipe: its parts' configurations are read.
        dtype: the compute dtype.
    """
    bones = skeleton(recipe, dtype=dtype)
    parts = bones.parameters()
    trainable = sum(mine for _, mine in parts.values())
    frozen = sum(total for total, _ in parts.values()) - trainable
    size = torch.finfo(dtype).bits // 8
    packed = bones.quantisable() if recipe.model.quantisation != "none" else 0
    each = {"none": 0.0, "nf4": NF4_BYTES, "int8": 1.0}[recipe.model.quantisation]
    config: Any = bones.model.config.get_text_config()
    inner = config.intermediate_size
    kept = _kept_by_layer(bones, dtype) / PROBE
    return Footprint(
        parts=parts, frozen=frozen, trainable=trainable, weight_bytes=(frozen - packed) * size + packed * each,
        value_bytes=size, layers=bones.layers, width=config.hidden_size, vocabulary=config.vocab_size,
        tokens_per_image=bones.tokens_per_image, kept_per_layer=kept,
        kept_elsewhere=config.hidden_size * (2 * size + 4), kept_per_image=_kept_per_image(bones, dtype),
        # A gated MLP's backward pass holds four of its inner width and as many of the model's.
        workspace_per_token=4 * (inner + config.hidden_size) * size,
        workspace_per_image=_tower_workspace(bones, size),
        is_lean=kept <= (10 * config.hidden_size + 2.5 * inner) * size,
        counter=FlopCounter(bones.model, layers=bones.layers),
    )  # fmt: skip


def kept_bytes(run: Callable[[], object], weights: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass of a computation, each storage once, weights left out."""
    own = {parameter.untyped_storage()._cdata for parameter in weights.parameters()}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            seen[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(tensor.untyped_storage().nbytes() for tensor in seen.values())
    del result
    return total


def _kept_by_layer(bones: Skeleton, dtype: torch.dtype) -> int:
    decoder: Any = bones.model.get_decoder()
    layer: Any = bones.held[0]
    width = bones.model.config.get_text_config().hidden_size
    with torch.device("meta"):
        hidden = torch.zeros(1, PROBE, width, dtype=dtype, requires_grad=True)
        positions = torch.zeros(1, PROBE, dtype=torch.long)
        rope = positions if not takes_rows(bones.model) else positions.expand(3, 1, PROBE)
        try:
            embeddings = decoder.rotary_emb(hidden, rope)
            arguments: dict[str, Any] = {"position_ids": positions, "position_embeddings": embeddings}
            if not takes_rows(bones.model):
                arguments["segment_lengths"] = (PROBE,)
            return kept_bytes(lambda: layer(hidden, attention_mask=None, **arguments), layer)
        except (AttributeError, TypeError) as error:
            raise ModelError(f"{type(layer).__name__} cannot be planned: {error}") from error


def _kept_per_image(bones: Skeleton, dtype: torch.dtype) -> float:
    inner: Any = getattr(bones.model, "model", None)
    tower, projector = getattr(inner, "vision_tower", None), getattr(inner, "multi_modal_projector", None)
    if tower is None or projector is None:
        return 0.0
    config = tower.config
    patches = (config.image_size // config.patch_size) ** 2
    with torch.device("meta"):
        features = torch.zeros(1, patches, config.hidden_size, dtype=dtype)
        kept = kept_bytes(lambda: projector(features), projector)
        if any(parameter.requires_grad for parameter in tower.parameters()):
            pixels = torch.zeros(1, 3, config.image_size, config.image_size, dtype=dtype, requires_grad=True)
            kept += kept_bytes(lambda: tower(pixels), tower)
    return float(kept)


def _tower_workspace(bones: Skeleton, size: int) -> float:
    tower: Any = getattr(getattr(bones.model, "model", None), "vision_tower", None)
    if tower is None:
        return 0.0
    config = tower.config
    patches = (config.image_size // config.patch_size) ** 2 + 1
    pixels = 3 * config.image_size**2 * (4 + size)
    return float(pixels + patches * size * (2 * config.intermediate_size + 4 * config.hidden_size))
