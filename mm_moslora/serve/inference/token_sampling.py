"""Sampling the next token of one answer.

Shapes: ``C`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moslora.models.decoding.prefix_cache import likeliest


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling settings; the defaults are greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0 takes the most likely token."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this total probability."""
    presence_penalty: float = 0.0
    """Subtracted from the logit of a token that has occurred."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token once per occurrence."""
    seed: int | None = None
    """The same seed gives the same answer, whatever else is in the batch."""

    def generator(self, choice: int) -> torch.Generator:
        """The random generator of one answer.

        Args:
            choice: the index of the answer in its request.
        """
        made = torch.Generator()
        if self.seed is None:
            made.seed()
        else:
            made.manual_seed((self.seed + choice) % 2**63)
        return made


def choose(logits: Tensor, sampling: Sampling, occurrences: Mapping[int, int], generator: torch.Generator) -> int:
    """Sample the next token.

    Args:
        logits: fp32 ``[C]``; not changed.
        sampling: settings.
        occurrences: occurrences of each token so far.
        generator: used when the temperature is not zero.

    Raises:
        ModelError: a logit is NaN, or none is finite.
    """
    if occurrences and (sampling.presence_penalty or sampling.frequency_penalty):
        tokens = torch.tensor(list(occurrences), device=logits.device)
        counts = torch.tensor(list(occurrences.values()), dtype=logits.dtype, device=logits.device)
        logits = logits.index_add(
            0, tokens, -(sampling.presence_penalty + sampling.frequency_penalty * counts)
        )  # fmt: skip
    _, (token,) = likeliest(logits[None])
    if sampling.temperature == 0:
        return token
    highest = logits[token]
    # Subtracting the maximum first keeps the smallest temperature from overflowing.
    probabilities = ((logits - highest).double().cpu() / sampling.temperature).softmax(dim=-1)
    if sampling.top_p < 1:
        sorted_ones, order = probabilities.sort(descending=True)
        beyond = sorted_ones.cumsum(dim=-1) - sorted_ones >= sampling.top_p
        probabilities[order[beyond]] = 0.0
    return int(torch.multinomial(probabilities, 1, generator=generator))
