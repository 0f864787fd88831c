"""Reading prompts into a decoder so that what several rows share is stored and attended to once.

Shapes: ``B`` rows, ``G`` groups, ``R`` rows per group at most, ``T`` tokens so far, ``t`` new tokens, ``L`` tokens of a
level, ``H`` key-value heads, ``E`` head width, ``D`` LLM width, ``C`` vocabulary.

Text grows like a tree, and each fork ends a *level*. Keys and values of a level exist once per group of rows that came
out of the fork; a row attends to every level of its ancestors and to its own tokens under one softmax.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mm_moslora.models.families import decoder_family
from mm_moslora.models.transformers_patches import attention_within
from mm_moslora.utils.errors import ModelError

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


_ROOM = 64
"""Tokens by which a full cache grows at least, so that a decoding step does not copy it."""


class _RoomyLayer(DynamicLayer):
    """Keys and values of one layer in a buffer with room, so that appending a token does not copy the rest."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take over dtype and device; the inherited way has the host wait for a copy to the device, layer by layer."""
        self.device = key_states.device
        self.keys, self.values = key_states.new_empty(0), value_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start, more = self.get_seq_length(), key_states.shape[-2]
        if start == 0:
            self.keys, self.values = key_states, value_states
            return self.keys, self.values
        if not self._buffers or self._buffers[0].shape[-2] < start + more:
            self._buffers = [self._roomier(old, more) for old in (self.keys, self.values)]
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : start + more, :] = new
        self.keys, self.values = (buffer[..., : start + more, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, drop or repeat rows; the next append makes room again."""
        super().batch_select_indices(indices)
        self._buffers = []

    def drop_columns(self, count: int) -> None:
        """Forget the first tokens of every row."""
        self.keys, self.values = self.keys[..., count:, :], self.values[..., count:, :]
        self._buffers = []

    def join(self, other: _RoomyLayer) -> None:
        """Put the rows of another layer behind one's own; the shorter is padded on its left."""
        longest = max(self.get_seq_length(), other.get_seq_length())
        self.keys, self.values = (
            torch.cat([nn.functional.pad(x, (0, 0, longest - x.shape[-2], 0)) for x in pair])
            for pair in ((self.keys, other.keys), (self.values, other.values))
        )
        self._buffers = []

    @staticmethod
    def _roomier(old: Tensor, more: int) -> Tensor:
        length = old.shape[-2]
        buffer = old.new_empty(*old.shape[:-2], length + more + _ROOM, old.shape[-1])
        buffer[..., :length, :] = old
        return buffer


class Decoder:
    """Rows of text in the middle of decoding: their cache, their mask and the logits at their ends."""

    logits: Tensor
    """fp32 ``[B, C]``, of the last token of each row."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._config = model.get_decoder().config
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self._levels: list[SharedPrefix] = []
        self._valid: Tensor | None = None
        self._length: Tensor | int = 0
        cache = DynamicCache(config=model.config.get_text_config())
        self.can_share = all(type(layer) is DynamicLayer for layer in cache.layers)
        """Whether rows may be padded in their middle; with a sliding window they may not."""
        self._plain = self.can_share and decoder_family(self._config.model_type).plain_attention
        self._cache = self._empty_cache() if self.can_share else cache

    def start(self, arguments: Mapping[str, Any]) -> None:
        """Run a first row (`input_ids` ``[1, T]``) as the model takes it, pictures and all; only tokens may follow.

        The positions of what follows count on from the last one that the decoder got, whatever the model counts.
        """
        positions: list[Tensor] = []

        def note(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
            if kwargs.get("position_ids") is not None:
                positions.append(kwargs["position_ids"])

        hook = self._model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            output = self._model(**arguments, use_cache=True, logits_to_keep=1, **{self._cache_name: self._cache})
        finally:
            hook.remove()
        self._valid = torch.ones_like(arguments["input_ids"])
        last = positions[0].amax() + 1 if positions else self._valid.sum()
        self._length = last.to(self._valid.device).view(1, 1)
        self.logits = output.logits[:, -1].float()

    def append(self, rows: Sequence[Tensor], *, head: bool = True) -> None:
        """Run more embeddings ``[t_b, D]`` of every row; without `head` no logits, because the rows go on at once."""
        embeddings = pad_sequence(list(rows), batch_first=True, padding_side="left")
        tokens = [torch.ones(len(row), dtype=torch.long, device=row.device) for row in rows]
        valid = pad_sequence(tokens, batch_first=True, padding_side="left")
        self.extend(embeddings, valid, keep=1 if head else torch.empty(0, dtype=torch.long, device=valid.device))

    def extend(self, embeddings: Tensor, valid: Tensor, *, keep: int | Tensor = 1) -> Tensor:
        """Run more embeddings ``[B, t, D]``, those that count by `valid` ``[B, t]``; fp32 logits ``[B, kept, C]``.

        `keep`: how many of the last tokens get logits (0: all), or their numbers.
        """
        self._valid = valid if self._valid is None else torch.cat([self._valid, valid], dim=1)
        positions = (self._length + valid.cumsum(dim=1) - 1).clamp_min(0)
        self._length = self._length + valid.sum(dim=1, keepdim=True)
        if isinstance(keep, int):  # as numbers, so that they are copied: linear layers take seconds for a strided slice
            keep = torch.arange(valid.shape[1], device=valid.device)[-keep:]
        arguments: dict[str, Any] = {"attention_mask": self._valid, self._cache_name: self._cache}
        if self._levels:
            arguments |= {"attention_mask": None, "branch_levels": self._levels}
            arguments["branch_visible"] = visible_tokens(self._valid, valid.shape[1])
        with attention_within(self._model, SHARED_PREFIX) if self._levels else nullcontext():
            output = self._model(
                inputs_embeds=embeddings, position_ids=positions, use_cache=True, logits_to_keep=keep,
                **arguments,
            )  # fmt: skip
        logits = output.logits.float()
        self.logits = logits[:, -1:].flatten(0, 1)
        return logits

    def forked(self, rows: Sequence[int]) -> Decoder:
        """Another decoder that goes on from the given rows (see `branch`), while this one stays as it is."""
        other = copy.copy(self)
        other._levels = [copy.copy(level) for level in self._levels]
        other._cache = copy.copy(self._cache)
        other._cache.layers = [copy.copy(layer) for layer in self._cache.layers]
        other.branch(rows)
        return other

    def branch(self, rows: Sequence[int]) -> None:
        """Fork: the new rows go on from the given ones, each of which may be named several times."""
        if not self._plain:
            self.select(rows)
            return
        assert self._valid is not None
        for level in self._levels:
            level.select(rows)
        layers: Sequence[Any] = self._cache.layers
        keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
        level = SharedPrefix(keys=keys, values=values, valid=self._valid, group_of=list(range(len(self._valid))))
        level.select(rows)
        self._levels.append(level)
        self._cache, self._valid = self._empty_cache(), None
        self._keep_rows(rows)

    def select(self, rows: Sequence[int]) -> None:
        """Keep, drop or repeat rows, with copies of what is theirs alone."""
        assert self._valid is not None
        indices = torch.tensor(rows).to(self._valid.device, non_blocking=True)
        for level in self._levels:
            level.select(rows)
        self._cache.batch_select_indices(indices)
        self._valid = self._valid[indices]
        self._keep_rows(rows)

    def join(self, other: Decoder) -> None:
        """Put the rows of another decoder behind one's own and use it up; both can share and have no forks."""
        assert self.can_share
        assert not self._levels
        assert not other._levels
        masks = []
        for decoder in (self, other):
            assert decoder._valid is not None
            empty = int((decoder._valid.cumsum(dim=1) == 0).all(dim=0).sum())
            layers: Sequence[Any] = decoder._cache.layers
            for layer in layers if empty else ():
                layer.drop_columns(empty)
            masks.append(decoder._valid[:, empty:])
        mine, theirs = self._cache.layers, other._cache.layers
        pairs: Sequence[tuple[Any, Any]] = list(zip(mine, theirs, strict=True))
        for own, new in pairs:
            own.join(new)
        longest = max(mask.shape[1] for mask in masks)
        self._valid = torch.cat([nn.functional.pad(mask, (longest - mask.shape[1], 0)) for mask in masks])
        lengths: Sequence[Any] = (self._length, other._length)
        self._length = torch.cat(list(lengths))
        self.logits = torch.cat([self.logits, other.logits])

    def _keep_rows(self, rows: Sequence[int]) -> None:
        indices = torch.tensor(rows).to(self.logits.device, non_blocking=True)
        self.logits = self.logits[indices] if len(self.logits) else self.logits
        if isinstance(self._length, Tensor):
            self._length = self._length[indices.to(self._length.device)]

    def _empty_cache(self) -> DynamicCache:
        cache = DynamicCache(config=self._model.config.get_text_config())
        cache.layers = [_RoomyLayer() for _ in cache.layers]
        return cache


def likeliest(logits: Tensor) -> tuple[Tensor, list[int]]:
    """The token ``[B]`` with the largest of each row of logits ``[B, C]``, there and here; the host waits once."""
    tokens = logits.argmax(dim=-1)  # of NaN, where there is one
    numbers, highest = torch.stack((tokens.double(), logits.gather(-1, tokens[..., None]).flatten().double())).tolist()
    if wrong := [value for value in highest if not math.isfinite(value)]:
        raise logits_error(wrong[0])
    return tokens, [int(number) for number in numbers]


def logits_error(highest: float) -> ModelError:
    """The error for logits whose largest is not finite."""
    return ModelError(
        f"The largest of the model's logits is {highest}, so no token can be chosen. Its weights or a picture's "
        "features are damaged, or too large for its number format: try another checkpoint, or fp32."
    )
