"""A collator for other trainers: turns examples into batches for stock models, padded or packed into one row.

Shapes: ``B`` examples, ``T`` tokens of the longest, ``S`` tokens of all, ``N`` images, ``H x W`` pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from mm_moslora.batch import IGNORED, Example, join_images, usable
from mm_moslora.utils.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Turns examples into keyword arguments of a stock LLaVA or language model, for `Trainer(data_collator=...)`.
    Other ready-made models need more inputs: see `mm_moslora.models.batching.padded_batch.PaddedCollator`.

    Bad records (`TrainingSet` gives None for them) are left out.
    """

    pad_token_id: int
    """Id of padding tokens; they are masked by position, so any id will do."""
    packed: bool = False
    """Pack all examples into one row with position ids that restart, by which flash-attention separates them."""
    pad_to_multiple_of: int = 1
    """Round ``T`` up to a multiple."""

    def __call__(self, examples: Sequence[Example | None]) -> dict[str, Any]:
        """Make a batch.

        Returns:
            `input_ids`, `labels` and, padded, `attention_mask`, int64 ``[B, T]``; or, packed, `position_ids`, all
            ``[1, S]``; `pixel_values` float32 ``[N, 3, H, W]`` and the model's other image inputs if there are images.

        Raises:
            DataError: no example can be used, or the model computes its positions from the pictures.
        """
        usable_examples = usable(examples)
        pictures = [picture.tensors for example in usable_examples for picture in example.pictures]
        if any("image_grid_thw" in tensors for tensors in pictures):
            raise DataError(
                "These examples are of a Qwen-VL model, which counts positions by its pictures. Use "
                "mm_moslora.models.batching.padded_batch.PaddedCollator(model=model) instead of Collator."
            )
        batch: dict[str, Any] = self._row(usable_examples) if self.packed else self._padded(usable_examples)
        return batch | join_images(pictures)

    def _padded(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rest = -max(example.length for example in examples) % self.pad_to_multiple_of

        def rows(tensors: list[Tensor], padding: int) -> Tensor:
            return pad(pad_sequence(tensors, batch_first=True, padding_value=padding), (0, rest), value=padding)

        return {
            "input_ids": rows([example.input_ids for example in examples], self.pad_token_id),
            "attention_mask": rows([torch.ones_like(example.input_ids) for example in examples], 0),
            "labels": rows([example.labels for example in examples], IGNORED),
        }

    def _row(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        positions = [torch.arange(example.length) for example in examples]
        return {
            "input_ids": torch.cat([example.input_ids for example in examples])[None],
            "position_ids": torch.cat(positions)[None],
            "labels": torch.cat([example.labels for example in examples])[None],
        }
