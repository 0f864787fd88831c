"""Which tokens of a packed row, of ``S`` tokens in the whole batch, a rank computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moslora.batch import Batch


@dataclass(frozen=True, kw_only=True)
class RowShare:
    """The part of every row that one of several ranks computes (`train.sequence_parallel`): consecutive tokens."""

    index: int = 0
    of: int = 1

    def width(self, batch: Batch) -> int:
        """Tokens of every rank; the last ranks may have padding among them."""
        return -(-batch.tokens // self.of)

    def padding(self, batch: Batch) -> int:
        """Tokens that are added to the row."""
        return self.of * self.width(batch) - batch.tokens

    def cut(self, row: Tensor, batch: Batch) -> Tensor:
        """This rank's part of ``[1, S, ...]``, padded with zeros."""
        width = self.width(batch)
        part = row[:, self.index * width : (self.index + 1) * width]
        missing = width - part.shape[1]
        return torch.cat((part, part.new_zeros(1, missing, *part.shape[2:])), dim=1) if missing else part

    def targets(self, batch: Batch) -> slice:
        """Which of the batch's supervised positions are in this rank's part."""
        ends = torch.tensor([self.index, self.index + 1]) * self.width(batch)
        return slice(*torch.searchsorted(batch.on_host.target_positions, ends).tolist())


WHOLE_ROW = RowShare()
"""The share of a rank that computes rows alone."""
