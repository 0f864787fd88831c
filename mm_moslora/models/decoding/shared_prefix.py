"""Attention to what several rows share, which is stored once; see `prefix_cache` for its shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

SHARED_PREFIX = "mm_moslora_branches"
"""Name under which the attention is registered with transformers."""


@dataclass
class SharedPrefix:
    """Keys and values that rows share, per layer ``[G, H, L, E]``."""

    keys: list[Tensor]
    values: list[Tensor]
    valid: Tensor
    """``[G, L]``, 0 where padded."""
    group_of: list[int]
    """The group of each row."""

    def __post_init__(self) -> None:
        self._arrange()

    def select(self, rows: Sequence[int]) -> None:
        """Keep, drop or repeat rows; groups without rows go."""
        chosen = [self.group_of[row] for row in rows]
        used = sorted(set(chosen))
        if len(used) < len(self.valid):
            groups = torch.tensor(used).to(self.valid.device, non_blocking=True)
            self.keys, self.values = [k[groups] for k in self.keys], [v[groups] for v in self.values]
            self.valid = self.valid[groups]
        number = {old: new for new, old in enumerate(used)}
        self.group_of = [number[group] for group in chosen]
        self._arrange()

    def _arrange(self) -> None:
        """Where the rows of each group are (``[G, R]``, filled up with row 0), and where each row went (``[B]``)."""
        members: list[list[int]] = [[] for _ in range(len(self.valid))]
        for row, group in enumerate(self.group_of):
            members[group].append(row)
        widest = max(len(rows) for rows in members)
        device = self.valid.device
        self._rows = torch.tensor([rows + [0] * (widest - len(rows)) for rows in members]).to(device, non_blocking=True)
        slots = {row: group * widest + i for group, rows in enumerate(members) for i, row in enumerate(rows)}
        self._padded = not bool(self.valid.all())
        slot_of_row = torch.tensor([slots[row] for row in range(len(self.group_of))])
        self._slots = slot_of_row.to(device, non_blocking=True)

    def scores(self, query: Tensor, layer: int) -> Tensor:
        """Attention scores ``[B, H, t, L]`` of scaled queries ``[B, H, t, E]``."""
        scores = self._gather(query) @ self.keys[layer].transpose(-1, -2)
        if self._padded:
            scores = scores.masked_fill(self.valid[:, None, None, :] == 0, float("-inf"))
        return self._scatter(scores)

    def mix(self, weights: Tensor, layer: int) -> Tensor:
        """Values ``[B, H, t, E]`` mixed by attention weights ``[B, H, t, L]``."""
        return self._scatter(self._gather(weights) @ self.values[layer])

    def _gather(self, rows: Tensor) -> Tensor:
        """``[B, H, t, X]`` -> ``[G, H, R * t, X]``."""
        grouped = rows[None] if len(self.valid) == 1 else rows[self._rows]
        return grouped.transpose(1, 2).flatten(2, 3)

    def _scatter(self, groups: Tensor) -> Tensor:
        """``[G, H, R * t, X]`` -> ``[B, H, t, X]``."""
        rows = groups.unflatten(2, (self._rows.shape[1], -1)).transpose(1, 2).flatten(0, 1)
        return rows if len(self.valid) == 1 else rows[self._slots]


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    branch_levels: Sequence[SharedPrefix] = (),
    branch_visible: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of new tokens to every level, outermost first, and, causally, to their row's own tokens.

    Takes queries ``[B, heads, t, E]`` and the row's own keys and values ``[B, H, T, E]``; gives ``[B, t, heads, E]``.
    `branch_visible`: bool ``[B, t, T]``, which of its row's own tokens each new token sees; None: all.
    """
    layer: Any = module.layer_idx
    rows, heads, new, width = query.shape
    shared = key.shape[1]
    # Query heads that share a key head are further queries of it.
    folded = query.reshape(rows, shared, heads // shared * new, width) * (scaling or width**-0.5)
    own = folded @ key.transpose(-1, -2)
    if branch_visible is not None:
        hidden = ~branch_visible[:, None, None]
        own = own.unflatten(2, (-1, new)).masked_fill(hidden, float("-inf")).flatten(2, 3)
    scores = torch.cat([*(level.scores(folded, layer) for level in branch_levels), own], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(value.dtype)
    *parts, last = weights.split([*(level.valid.shape[1] for level in branch_levels), key.shape[2]], dim=-1)
    mixed = last @ value
    for level, part in zip(branch_levels, parts, strict=True):
        mixed = mixed + level.mix(part, layer)
    return mixed.reshape(rows, heads, new, width).transpose(1, 2), None


def visible_tokens(valid: Tensor, new: int) -> Tensor | None:
    """Which of the own tokens each of the last `new` ones sees, bool ``[B, t, T]``; None when each sees all."""
    if new == 1 and bool(valid.all()):
        return None
    total = valid.shape[1]
    causal = torch.ones(new, total, dtype=torch.bool, device=valid.device).tril(total - new)
    return causal[None] & (valid[:, None, :] != 0)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
