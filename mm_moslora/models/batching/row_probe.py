"""Whether the conversations of one row see each other in a decoder: a probe of a small random model of its class.

The first conversation of a row of two is changed; the second one must not move. Recurrences and convolutions that run
on, and masks without the positions that tell conversations apart, move it. Where two conversations share a beginning
that stands in the row once, the second one must be as it is alone.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mm_moslora.batch import Batch, Example
from mm_moslora.kernels.attention.attention_choice import choose_attention, set_attention
from mm_moslora.models.batching.small_models import SIZES, WORDS, layer_kinds, small_model
from mm_moslora.models.memory_efficient.decoder_layers import packed_row_hidden
from mm_moslora.utils.errors import reason_of

logger = logging.getLogger(__name__)

_LENGTHS = (21, 17)
_SHARED = 9
"""Tokens of a shared beginning."""
_ROUNDING = 2e-6
"""Share of the largest hidden value. Experts that get other tokens beside them round otherwise, by 1e-7."""
_FINDINGS: dict[str, RowFinding] = {}


@dataclass(frozen=True, kw_only=True)
class RowFinding:
    """What the probe found for one class of decoders."""

    moved: float | None
    """How far the second conversation moved, as a share of its largest hidden value; of a shared beginning, how far it
    is from what it is alone. None: the probe failed."""
    fault: str = ""
    """Why the probe failed."""

    @property
    def apart(self) -> bool:
        """Whether the conversations of a row are surely apart."""
        return self.moved is not None and self.moved <= _ROUNDING


def rows_of(model: PreTrainedModel, attention: str, *, shared: bool = False) -> RowFinding:
    """Probe the class of a decoder, once per layer pattern and attention; `shared`: with a beginning in common."""
    decoder = model.get_decoder()
    kinds = layer_kinds(getattr(decoder, "config", None))
    key = f"{type(decoder).__module__}.{type(decoder).__qualname__} {attention} {kinds} {shared}"
    if key not in _FINDINGS:
        begun = time.monotonic()
        _FINDINGS[key] = _probed(decoder, attention, _unlike_alone if shared else _moved)
        logger.debug("%s: the rows were probed in %.1f s.", type(decoder).__name__, time.monotonic() - begun)
    return _FINDINGS[key]


def _probed(decoder: PreTrainedModel, attention: str, measure: Callable[[PreTrainedModel], float]) -> RowFinding:
    fault = ""
    for sizes in SIZES:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
                torch.manual_seed(0)
                made = small_model(type(decoder), decoder.config, sizes)
                set_attention(made, choose_attention(made, attention, device=torch.device("cpu")).name)
                if math.isfinite(moved := measure(made)):
                    return RowFinding(moved=moved)
                fault = fault or "its hidden states are not finite"
        except Exception as error:  # configurations fit together in ways that only their classes know
            fault = fault or f"{type(error).__name__}: {reason_of(error)}"
    return RowFinding(moved=None, fault=fault)


def _moved(model: PreTrainedModel) -> float:
    first, second = (torch.randint(2, WORDS, (length,)) for length in _LENGTHS)
    before, after = (_second_of(model, first=row, second=second) for row in (first, first.flip(0)))
    return _distance(before, after)


def _unlike_alone(model: PreTrainedModel) -> float:
    first, second = (torch.randint(2, WORDS, (length,)) for length in _LENGTHS)
    second[:_SHARED] = first[:_SHARED]
    alone, shared = (_second_of(model, first=first, second=second, shared=count) for count in (0, _SHARED))
    return _distance(alone[_SHARED:], shared[_SHARED:])


def _distance(before: Tensor, after: Tensor) -> float:
    return float((before - after).abs().max() / before.abs().max())


def _second_of(model: PreTrainedModel, *, first: Tensor, second: Tensor, shared: int = 0) -> Tensor:
    """The hidden states of the second conversation of a row."""
    examples = [
        Example(id=str(number), input_ids=ids, supervised=torch.ones(len(ids)).bool())
        for number, ids in enumerate((first, second))
    ]
    batch = Batch.from_examples(examples, shared=(0, shared))
    hidden = packed_row_hidden(model, batch, input_ids=batch.input_ids[None], position_ids=batch.position_ids[None])
    return hidden[len(first) - 1 :]
