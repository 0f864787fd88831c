"""Ranks with and without pictures in one forward pass, where ranks wait for each other in the vision tower.

Shapes: ``G`` padded rows, ``T`` tokens of the longest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from mm_moslora.batch import Batch, Example
from mm_moslora.models.batching.packed_batch import ENCODED, encoded_together, has_mrope
from mm_moslora.models.batching.padded_batch import padded_inputs, readable, takes
from mm_moslora.utils import distributed

PIXELS = ("pixel_values", "pixel_values_videos")


class SharedVision:
    """Has the tower run once on every rank in passes in which some rank has pictures or videos.

    Rows without any get a further one with a picture, which counts for nothing. It is put into a model's backbone,
    which ranks call equally often, except within `apart`.
    """

    def __init__(self, model: PreTrainedModel, stand_in: Example) -> None:
        self.model, self.stand_in, self.together = model, Batch.from_examples([stand_in]), True
        backbone: Any = model.base_model
        own = backbone.forward

        @functools.wraps(own)
        def forward(**inputs: Any) -> Any:
            return self._pass(own, inputs) if self.together else own(**inputs)

        backbone.forward = forward

    @contextmanager
    def apart(self) -> Iterator[None]:
        """A context in which the ranks do not wait for each other."""
        self.together = False
        try:
            yield
        finally:
            self.together = True

    def _pass(self, own: Any, inputs: dict[str, Any]) -> Any:
        shown = any(inputs.get(name) is not None for name in PIXELS)
        (needed,) = distributed.max_over_ranks([float(shown)])
        if not needed:
            return own(**inputs)
        if shown:
            return own(**self._encoded(inputs))
        rows, width = inputs["input_ids"].shape
        row, device = self.stand_in.input_ids, inputs["input_ids"].device
        pictures = (self.stand_in.pixel_values, readable(self.stand_in))
        more = padded_inputs(self.model, [row], *pictures, answers=None, device=device)
        output = own(**self._encoded(_joined(inputs, more)))
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden[:rows, :width] + 0.0 * hidden[rows:].sum()
        return output

    def _encoded(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The tower of some models would run once for pictures and once for videos."""
        if not (has_mrope(self.model) and takes(self.model, ENCODED)):
            return inputs
        given = {name: value for name, value in inputs.items() if value is not None}
        return {name: given[name] for name in given if name not in PIXELS} | encoded_together(self.model, given)


def _joined(inputs: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Padded inputs ``[G, T]`` with the further row, and its picture."""
    width = max(given["input_ids"].shape[1] for given in (inputs, more))

    def rows(name: str) -> Tensor:
        return torch.cat([F.pad(given[name], (0, width - given[name].shape[1])) for given in (inputs, more)])

    return {**inputs, **{name: rows(name) if name in inputs else value for name, value in more.items()}}
