"""Pictures through a vision tower that is frozen: without a graph, and each of them once, however often it is shown.

Shapes: ``N`` pictures, ``L`` tokens of a picture before any is dropped, ``V`` width of the selected layers together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora.batch import Batch
from mm_moslora.models.vision.feature_cache import FeatureCache, FeatureStore, pixel_hash
from mm_moslora.utils import distributed
from mm_moslora.utils.errors import ModelError

Layers = int | list[int]


class StepFeatureCache:
    """What was already encoded: by an earlier micro-batch of the step, or by any run before (with a store).

    Args:
        store: features on disk; None: the step alone is remembered.
    """

    def __init__(self, store: FeatureStore | None = None) -> None:
        self.cache = FeatureCache(memory_bytes=math.inf, store=store)
        self._to_come: Counter[str] = Counter()

    @property
    def store(self) -> FeatureStore | None:
        """Features on disk."""
        return self.cache.store

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Tell which micro-batches come, so that only pictures that a later one shows again stay in memory."""
        self.cache.forget()
        self._to_come = Counter(key for batch in micro_batches for key in set(batch.image_keys))

    def states(self, tower: PreTrainedModel, layer: Layers, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        """Hidden states of pictures, ``[N, L, V]``.

        Args:
            tower: frozen.
            layer: selected.
            pixels: ``[N, 3, H, W]`` as the tower takes them.
            keys: ``N`` of them, from `pixel_hash`; those with the same key are encoded once.
        """
        cut_up = is_zero3_sharded(tower)

        def encode(numbers: Sequence[int]) -> Sequence[Tensor]:
            count = float(len(numbers))
            if cut_up and self.store is not None:
                (count,) = distributed.sum_over_ranks([count])
            if not count:
                return []
            whole = len(numbers) == len(pixels)
            chosen = pixels if whole else _chosen(pixels, list(numbers) or [0])
            return list(frozen_states(tower, layer, chosen))[: len(numbers)]

        rows = self.cache.get_many(keys, encode, device=pixels.device)
        self._to_come -= Counter(set(keys))
        # ZeRO-3 gathers the tower's weights while it runs, so either all ranks run it or none does: memory is left out,
        # and about what is on disk they agree.
        self.cache.forget(keys if cut_up else [key for key in keys if key not in self._to_come])
        return torch.stack(rows)


def is_zero3_sharded(tower: nn.Module) -> bool:
    """Whether ZeRO-3 shares out the tower's weights: all ranks must then run it together."""
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


def frozen_states(tower: PreTrainedModel, layer: Layers, pixels: Tensor) -> Tensor:
    """`tower_states` without a graph, to be copied by who keeps them for a backward pass.

    A frozen tower sees in training what it sees in evaluation (no dropout).
    """
    if tower.training:
        tower.eval()
    # Not inference mode: ZeRO-3 fetches weights of the layers behind the tower ahead of time, and these train.
    with torch.no_grad() if is_zero3_sharded(tower) else torch.inference_mode():
        return tower_states(tower, layer, pixels)


def unique_states(
    tower: PreTrainedModel, layer: Layers, pixels: Tensor, *, keys: Sequence[str], memory: StepFeatureCache | None
) -> Tensor:
    """Hidden states of a frozen tower, ``[N, L, V]``; pictures with the same key are encoded once.

    Args:
        tower: frozen.
        layer: selected.
        pixels: ``[N, 3, H, W]``.
        keys: ``N`` of them, or none.
        memory: see `StepFeatureCache`; None: this call alone counts.
    """
    known = StepFeatureCache() if memory is None else memory
    if len(keys) != pixels.shape[0]:
        # Without a store nothing is gained by knowing which are the same.
        keys = [str(number) if known.store is None else pixel_hash(row) for number, row in enumerate(pixels)]
    return known.states(tower, layer, pixels, keys)


def _chosen(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some rows; a list as an index would have the host wait until an accelerator has copied it."""
    return rows[torch.tensor(numbers).to(rows.device, non_blocking=True)]
