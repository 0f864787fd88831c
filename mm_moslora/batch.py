"""What travels from data to model: one `Example` per conversation, one `Batch` per micro-batch. Nothing else does.

Shapes: ``T`` tokens of one example, ``S`` tokens of the whole batch, ``G`` examples (segments) in the batch,
``N`` images, ``K`` supervised positions, ``H x W`` pixels.

A batch is **padding-free**: its examples lie behind each other in one row of ``S`` tokens, position ids restart with
every example, and attention never crosses from one example into the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Example:
    """One conversation, tokenised, its images decoded."""

    id: str
    """The record's own id, for logs and quarantine."""
    input_ids: Tensor
    """int64 ``[T]``; every image placeholder is already expanded to one token per visual token."""
    supervised: Tensor
    """bool ``[T]``; True where the token is an answer token or its end-of-turn and is to be predicted."""
    pixel_values: Tensor | None = None
    """float32 ``[n, 3, H, W]`` in the order of the placeholders, or None for text only."""

    def __post_init__(self) -> None:
        assert self.input_ids.ndim == 1
        assert self.input_ids.shape == self.supervised.shape
        assert self.supervised.dtype == torch.bool

    @property
    def length(self) -> int:
        """Tokens, visual tokens included."""
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, padding-free."""

    input_ids: Tensor
    """int64 ``[S]``."""
    position_ids: Tensor
    """int64 ``[S]``; 0, 1, 2, ... within each example."""
    segment_lengths: tuple[int, ...]
    """``G`` lengths that sum to ``S``."""
    target_positions: Tensor
    """int64 ``[K]``; positions whose next token is supervised. Only these reach the language-model head."""
    targets: Tensor
    """int64 ``[K]``; the supervised next tokens."""
    pixel_values: Tensor | None = None
    """float32 ``[N, 3, H, W]`` of all images, in order of their placeholders, or None."""
    ids: tuple[str, ...] = field(default=())
    """The examples' ids, for logs."""

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> Batch:
        """Lay examples behind each other.

        Args:
            examples: at least one; their order is kept.
        """
        assert examples, "a batch needs at least one example"
        position_ids, positions, targets = [], [], []
        offset = 0
        for example in examples:
            position_ids.append(torch.arange(example.length))
            # The first token of a conversation has no position that could predict it.
            supervised = example.supervised[1:].nonzero().flatten()
            positions.append(supervised + offset)
            targets.append(example.input_ids[1:][supervised])
            offset += example.length
        images = [example.pixel_values for example in examples if example.pixel_values is not None]
        return cls(
            input_ids=torch.cat([example.input_ids for example in examples]),
            position_ids=torch.cat(position_ids),
            segment_lengths=tuple(example.length for example in examples),
            target_positions=torch.cat(positions),
            targets=torch.cat(targets),
            pixel_values=torch.cat(images) if images else None,
            ids=tuple(example.id for example in examples),
        )

    @property
    def tokens(self) -> int:
        """Tokens in the batch, ``S``."""
        return int(self.input_ids.shape[0])

    @property
    def supervised_tokens(self) -> int:
        """Supervised tokens, ``K``."""
        return int(self.targets.shape[0])

    @property
    def images(self) -> int:
        """Images in the batch, ``N``."""
        return 0 if self.pixel_values is None else int(self.pixel_values.shape[0])

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "target_positions", "targets")
        }
        pixels = None if self.pixel_values is None else self.pixel_values.to(device, non_blocking=True)
        return replace(self, pixel_values=pixels, **moved)
