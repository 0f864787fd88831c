"""Hidden states of a vision tower; a frozen one runs without a graph, and once per picture.

Shapes: ``N`` pictures, ``L`` tokens of a picture before any is dropped, ``V`` width of the selected layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.models.vision.feature_cache import StepFeatureCache
from mm_moslora.utils.errors import ModelError

Layers = int | list[int]


def is_zero3_sharded(tower: nn.Module) -> bool:
    """Whether ZeRO-3 shards the tower's weights: all ranks must then run it together."""
    return any(hasattr(parameter, "ds_id") for parameter in tower.parameters())


def is_frozen(module: nn.Module) -> bool:
    """Whether nothing in a module trains, adapters included."""
    return not any(parameter.requires_grad for parameter in module.parameters())


def tower_states(tower: PreTrainedModel, layer: Layers, pixels: Tensor) -> Tensor:
    """Selected hidden states side by side, ``[N, L, V]``.

    Args:
        tower: any.
        layer: one or several.
        pixels: ``[N, 3, H, W]``.

    Raises:
        ModelError: the installed transformers does not give these layers.
    """
    output: Any = tower(pixels, output_hidden_states=layer, return_dict=True)
    states = [output.hidden_states[item] for item in ([layer] if isinstance(layer, int) else layer)]
    if any(state is None for state in states):
        raise ModelError(
            f"{type(tower).__name__} of transformers {transformers.__version__} does not give the hidden states of "
            f"feature_layer {layer}. Install a release in the range that `mm-moslora doctor` names."
        )
    return states[0] if len(states) == 1 else torch.cat(states, dim=-1)


def unique_states(
    tower: PreTrainedModel, layer: Layers, pixels: Tensor, *, keys: Sequence[str], memory: StepFeatureCache | None
) -> Tensor:
    """`tower_states` of a frozen tower without a graph; pictures with the same key are encoded once.

    The tower is in evaluation mode: dropout of a frozen tower is off in training, too.

    Args:
        tower: frozen.
        layer: selected.
        pixels: ``[N, 3, H, W]``.
        keys: ``N`` of them, or none.
        memory: pictures that were encoded before; None: this call alone counts.
    """
    if tower.training:
        tower.eval()
    sharded = is_zero3_sharded(tower)

    def encode(chosen: Tensor) -> Tensor:
        # Not inference mode: ZeRO-3 fetches weights of the layers behind the tower ahead of time, and these train.
        with torch.no_grad() if sharded else torch.inference_mode():
            return tower_states(tower, layer, chosen)

    return (memory or StepFeatureCache()).states(pixels, keys, encode, together=sharded)
