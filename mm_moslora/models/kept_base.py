"""Loading one base model several times in a process: the first call reads it, later ones copy what was read."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mm_moslora.config import ModelConfig
from mm_moslora.models.assembly import Parts, is_quantised, load_parts
from mm_moslora.utils.hardware import available_memory

logger = logging.getLogger(__name__)

MOST = 2
"""Models that are kept: the one in the dtype of training, and the one in fp32 into which adapters are merged."""
_SHARE = 0.25
"""A model is kept if it takes at most this share of the available memory; several processes may ask at once."""


@dataclass(frozen=True, kw_only=True)
class _Kept:
    config: ModelConfig
    dtype: torch.dtype
    device: torch.device | None
    before: list[Any]
    after: list[Any]
    """States of the random generators before and after the load; equal where it draws nothing."""
    parts: Parts
    """In main memory; nobody else has its tensors."""
    places: Mapping[str, torch.device]
    """Where each tensor was."""


class KeptBase:
    """`load_parts` for several runs in one process. Every call gives the same values as `load_parts`, in new tensors.

    What is done to the parts of one call (adapters, training, merging, changed forward methods) therefore does not
    reach the next one. Packed weights are read anew each time, and so is a model that would take too much memory.
    """

    def __init__(self) -> None:
        self._kept: list[_Kept] = []
        self.reads = self.copies = 0

    def __call__(
        self, config: ModelConfig, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> Parts:
        """The model of a recipe; see `load_parts`.

        Args:
            config: the recipe's `model`.
            dtype: dtype of every weight.
            device: where the weights go; None: main memory.
        """
        before = _generators()
        for kept in self._kept:
            same = (kept.config, kept.dtype, kept.device) == (config, dtype, device)
            if same and kept.before in (kept.after, before):
                if kept.before != kept.after:
                    _set_generators(kept.after)
                self.copies += 1
                return _copied(kept.parts, kept.places)
        self.reads += 1
        del self._kept[: max(0, len(self._kept) + 1 - MOST)]  # before there is another one
        parts = load_parts(config, dtype=dtype, device=device)
        places = {name: value.device for name, value in _tensors(parts.model)}
        size = sum(value.nbytes for _, value in _tensors(parts.model))
        if is_quantised(config) or not _is_plain(parts.model) or size > _SHARE * available_memory():
            return parts
        try:
            copied = _copied(parts, dict.fromkeys(places, torch.device("cpu")))
        except (TypeError, RuntimeError) as error:  # a module of another library that cannot be copied
            logger.info("The base model is read again for every run: %s", error)
            return parts
        self._kept.append(
            _Kept(
                config=config, dtype=dtype, device=device, before=before, after=_generators(), parts=copied,
                places=places,
            )
        )  # fmt: skip
        logger.info("The base model stays in memory for later runs (%.1f GiB).", size / 2**30)
        return parts


def _generators() -> list[Any]:
    """States of the random generators from which a load may draw, as plain values."""
    cuda = torch.cuda.get_rng_state().tolist() if torch.cuda.is_available() else []
    return [random.getstate(), torch.get_rng_state().tolist(), cuda]


def _set_generators(states: list[Any]) -> None:
    random.setstate(states[0])
    torch.set_rng_state(torch.tensor(states[1], dtype=torch.uint8))
    if states[2]:
        torch.cuda.set_rng_state(torch.tensor(states[2], dtype=torch.uint8))


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _is_plain(model: nn.Module) -> bool:
    """Whether all tensors are ordinary ones in memory of their own, so that copies of them make a copy of the model."""
    found = [value for _, value in _tensors(model)]
    whole = all(type(value.data) is Tensor and type(value) in (Tensor, nn.Parameter) for value in found)
    addresses = [value.untyped_storage().data_ptr() for value in found if value.numel()]
    return whole and len(set(addresses)) == len(addresses) and not any(value.is_meta for value in found)


def _copied(parts: Parts, places: Mapping[str, torch.device]) -> Parts:
    """A copy that shares nothing with the original, its tensors on other devices."""
    memo: dict[int, Any] = {}
    for name, value in _tensors(parts.model):
        moved = value.detach().to(places[name], copy=True)
        memo[id(value)] = nn.Parameter(moved, value.requires_grad) if isinstance(value, nn.Parameter) else moved
    return copy.deepcopy(parts, memo)
