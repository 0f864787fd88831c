"""What travels from data to model: one `Example` per conversation, one `Batch` per micro-batch. Nothing else does.

Shapes: ``T`` tokens of one example, ``S`` tokens of the whole batch, ``G`` examples (segments) in the batch,
``N`` images, ``K`` supervised positions, ``H x W`` pixels.

A batch is **padding-free**: its examples lie behind each other in one row of ``S`` tokens, position ids restart with
every example, and attention never crosses from one example into the next. Models that cannot take such a row get the
same batch cut into padded rows (`mm_moslora.models.batching.padded_batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from mm_moslora.utils.errors import DataError

IGNORED = -100
"""Label of a token that is not supervised, in transformers' models."""


@dataclass(frozen=True, kw_only=True)
class ProcessedImage:
    """One picture, ready for a model."""

    placeholders: tuple[int, ...]
    """Token ids that stand for it in a conversation."""
    tensors: dict[str, Tensor]
    """What the model takes of it, pictures, tiles or patches first: `pixel_values`, `image_grid_thw`, ..."""
    key: str = ""
    """Names its pixels: equal keys, equal pixels. Empty: nothing is known; it counts as different from all others."""


class ImageProcessing(Protocol):
    """What turns pictures into tensors for one model."""

    @property
    def fixed(self) -> bool:
        """Whether every picture takes as many tokens as any other."""
        ...

    def see(self, images: Sequence[Any]) -> list[ProcessedImage]:
        """Prepare the RGB pictures (PIL images) of one conversation."""
        ...

    def placeholders(self, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, ...]]:
        """As many token ids as pictures of these widths and heights take, known without decoding them."""
        ...


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
    """float32 ``[n, 3, H, W]`` in the order of the placeholders, or None for text only. Ready-made models have shapes
    of their own, with pictures, tiles or patches first."""
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    """What else a model takes with its pictures (`image_grid_thw`, `image_sizes`, ...), pictures or tiles first."""
    images: int = 0
    """Pictures; 0 with `pixel_values` means one per entry."""
    image_keys: tuple[str, ...] = ()
    """`ProcessedImage.key` of every picture, or nothing."""
    image_rows: tuple[int, ...] = ()
    """How many entries of `pixel_values` (pictures, tiles, patches) every picture has, or nothing."""

    def __post_init__(self) -> None:
        if self.pixel_values is not None and not self.images:
            object.__setattr__(self, "images", int(self.pixel_values.shape[0]))
        if self.pixel_values is not None and not self.image_rows and self.images == self.pixel_values.shape[0]:
            object.__setattr__(self, "image_rows", (1,) * self.images)
        assert self.input_ids.ndim == 1
        assert self.input_ids.shape == self.supervised.shape
        assert self.supervised.dtype == torch.bool

    @classmethod
    def of(cls, *, id: str, input_ids: Tensor, supervised: Tensor, seen: Sequence[ProcessedImage]) -> Example:
        """An example with its pictures.

        Args:
            id: the record's own.
            input_ids: int64 ``[T]``.
            supervised: bool ``[T]``.
            seen: its pictures in order.
        """
        tensors = join_images([picture.tensors for picture in seen])
        pixels = tensors.pop("pixel_values", None)
        return cls(
            id=id, input_ids=input_ids, supervised=supervised, pixel_values=pixels, image_inputs=tensors,
            images=len(seen), image_keys=tuple(picture.key for picture in seen) if all(s.key for s in seen) else (),
            image_rows=tuple(int(picture.tensors["pixel_values"].shape[0]) for picture in seen),
        )  # fmt: skip

    @property
    def length(self) -> int:
        """Tokens, visual tokens included."""
        return int(self.input_ids.shape[0])

    @property
    def labels(self) -> Tensor:
        """The ids of supervised tokens, `IGNORED` elsewhere; the first, which no position predicts, never counts."""
        labels = self.input_ids.masked_fill(~self.supervised, IGNORED)
        labels[0] = IGNORED
        return labels


def usable(examples: Sequence[Example | None]) -> list[Example]:
    """The examples of a batch without those that turned out to be bad.

    Raises:
        DataError: none is left.
    """
    kept = [example for example in examples if example is not None]
    if not kept:
        raise DataError("None of the examples of a batch can be used. Run `mm-moslora data check`.")
    return kept


def join_images(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Lay the tensors of several pictures behind each other, padding further dimensions with zeros to the largest."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: _concatenate([part[name] for part in parts if name in part]) for name in names}


def _concatenate(tensors: Sequence[Tensor]) -> Tensor:
    shapes = {tensor.shape[1:] for tensor in tensors}
    if len(shapes) > 1:
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        padded = []
        for tensor in tensors:
            whole = tensor.new_zeros((tensor.shape[0], *largest))
            whole[tuple(slice(size) for size in tensor.shape)] = tensor
            padded.append(whole)
        tensors = padded
    return torch.cat(list(tensors))


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
    """float32 ``[N, 3, H, W]`` of all images, in order of their placeholders, or None; see `Example.pixel_values`."""
    image_inputs: dict[str, Tensor] = field(default_factory=dict)
    """See `Example.image_inputs`."""
    images: int = 0
    """Images in the batch, ``N``."""
    image_keys: tuple[str, ...] = ()
    """See `Example.image_keys`; ``N`` of them, or none."""
    image_rows: tuple[tuple[int, ...], ...] = ()
    """`Example.image_rows` of each of the ``G`` examples, or nothing where one of them does not say."""
    ids: tuple[str, ...] = field(default=())
    """The examples' ids, for logs."""
    host: Batch | None = field(default=None, repr=False)
    """On an accelerator: the batch in main memory that this one is a copy of."""

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
        parts = [
            example.image_inputs | {"pixel_values": example.pixel_values}
            for example in examples
            if example.pixel_values is not None
        ]
        tensors = join_images(parts)
        images = sum(example.images for example in examples)
        keys = tuple(key for example in examples for key in example.image_keys)
        rows = tuple(example.image_rows for example in examples)
        return cls(
            input_ids=torch.cat([example.input_ids for example in examples]),
            position_ids=torch.cat(position_ids),
            segment_lengths=tuple(example.length for example in examples),
            target_positions=torch.cat(positions),
            targets=torch.cat(targets),
            pixel_values=tensors.pop("pixel_values", None),
            image_inputs=tensors,
            images=images,
            image_keys=keys if len(keys) == images else (),
            image_rows=rows if all(len(own) == e.images for own, e in zip(rows, examples, strict=True)) else (),
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
    def on_host(self) -> Batch:
        """The same batch where its values can be read without waiting for an accelerator."""
        return self.host or self

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device; to an accelerator the host does not wait for the copy."""
        target = torch.device(device)
        if target.type == "cpu" and self.host is not None:
            return self.host
        copied = self._each(lambda tensor: tensor.to(target, non_blocking=target.type != "cpu"))
        return copied if target.type == "cpu" else replace(copied, host=self.on_host)

    def pin_memory(self) -> Batch:
        """The same batch in memory that an accelerator copies from while the host goes on; `DataLoader` calls it."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("input_ids", "position_ids", "target_positions", "targets")
        pixels = None if self.pixel_values is None else change(self.pixel_values)
        inputs = {name: change(value) for name, value in self.image_inputs.items()}
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in names}
        return replace(self, pixel_values=pixels, image_inputs=inputs, **changed)
