"""Pictures through a vision tower that is frozen: without a graph, and each of them once, however often it is shown.

Shapes: ``N`` pictures, ``L`` tokens of a picture before any is dropped, ``V`` width of the selected layers together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moslora import distributed
from mm_moslora.batch import Batch
from mm_moslora.errors import ModelError
from mm_moslora.models.feature_store import FeatureStore, picture_key

Layers = int | list[int]


class PictureMemory:
    """What was already encoded: by an earlier micro-batch of the step, or by any run before (with a store).

    Args:
        store: features on disk; None: the step alone is remembered.
    """

    def __init__(self, store: FeatureStore | None = None) -> None:
        self.store = store
        self._to_come: Counter[str] = Counter()
        self._kept: dict[str, Tensor] = {}

    def begin_step(self, micro_batches: Sequence[Batch]) -> None:
        """Tell which micro-batches come, so that only pictures that more than one of them shows are kept."""
        self._kept.clear()
        shown = Counter(key for batch in micro_batches for key in set(batch.image_keys))
        self._to_come = Counter({key: count for key, count in shown.items() if count > 1})

    def states(self, tower: PreTrainedModel, layer: Layers, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        """Hidden states of pictures that are all different, ``[N, L, V]``.

        Args:
            tower: frozen.
            layer: selected.
            pixels: ``[N, 3, H, W]`` as the tower takes them.
            keys: ``N`` of them, from `picture_key`.
        """
        if is_cut_up(tower):
            return self._states_in_lockstep(tower, layer, pixels, keys)
        asked = [number for number, key in enumerate(keys) if key not in self._kept]
        if len(asked) == len(keys) and self.store is None:
            return self._keep(keys, frozen_states(tower, layer, pixels))

        def encode(numbers: Sequence[int]) -> Sequence[Tensor]:
            return list(frozen_states(tower, layer, _chosen(pixels, numbers))) if numbers else []

        found = self.store.fetch(keys, asked, encode) if self.store else encode(asked)
        rows = self._kept | {keys[number]: row for number, row in zip(asked, found, strict=True)}
        return self._keep(keys, torch.stack([rows[key].to(pixels.device, non_blocking=True) for key in keys]))

    def _states_in_lockstep(self, tower: PreTrainedModel, layer: Layers, pixels: Tensor, keys: Sequence[str]) -> Tensor:
        """ZeRO-3 gathers the tower's weights while it runs, so either all ranks run it or none does."""
        if self.store is None:
            return frozen_states(tower, layer, pixels)

        def encode(numbers: Sequence[int]) -> Sequence[Tensor]:
            (on_all_ranks,) = distributed.sum_over_ranks([float(len(numbers))])
            if not on_all_ranks:
                return []
            return list(frozen_states(tower, layer, _chosen(pixels, list(numbers) or [0])))[: len(numbers)]

        found = self.store.fetch(keys, range(len(keys)), encode)
        return torch.stack([row.to(pixels.device, non_blocking=True) for row in found])

    def _keep(self, keys: Sequence[str], states: Tensor) -> Tensor:
        for key, row in zip(keys, states, strict=True):
            if key in self._to_come:
                self._to_come[key] -= 1
                self._kept[key] = row
                if not self._to_come[key]:
                    del self._to_come[key], self._kept[key]
        return states


def is_cut_up(tower: nn.Module) -> bool:
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
    """`tower_states` without a graph; a frozen tower sees in training what it sees in evaluation (no dropout)."""
    if tower.training:
        tower.eval()
    if is_cut_up(tower):
        # Not inference mode: ZeRO-3 fetches weights of the layers behind the tower ahead of time, and these train.
        with torch.no_grad():
            return tower_states(tower, layer, pixels)
    with torch.inference_mode():
        states = tower_states(tower, layer, pixels)
    # A copy, because the projector keeps its input for the backward pass, which an inference tensor cannot be.
    return states.clone() if torch.is_grad_enabled() else states


def unique_states(
    tower: PreTrainedModel, layer: Layers, pixels: Tensor, *, keys: Sequence[str], memory: PictureMemory | None
) -> Tensor:
    """Hidden states of a frozen tower, ``[N, L, V]``; pictures with the same key are encoded once.

    Args:
        tower: frozen.
        layer: selected.
        pixels: ``[N, 3, H, W]``.
        keys: ``N`` of them, or none.
        memory: see `PictureMemory`; None: this call alone counts.
    """
    if len(keys) != pixels.shape[0]:
        if memory is None or memory.store is None:
            return frozen_states(tower, layer, pixels)
        keys = [picture_key(picture) for picture in pixels]
    unique = list(dict.fromkeys(keys))
    repeats = len(unique) < len(keys)
    chosen = _chosen(pixels, [keys.index(key) for key in unique]) if repeats else pixels
    known = PictureMemory() if memory is None else memory
    states = known.states(tower, layer, chosen, unique)
    return _chosen(states, [unique.index(key) for key in keys]) if repeats else states


def _chosen(rows: Tensor, numbers: Sequence[int]) -> Tensor:
    """Some rows; a list as an index would have the host wait until an accelerator has copied it."""
    return rows[torch.tensor(numbers).to(rows.device, non_blocking=True)]
