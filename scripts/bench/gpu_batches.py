"""Shapes and batches of the GPU benchmark (`gpu.py`).

Shapes: ``G`` conversations of a batch, ``T`` tokens of the longest.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moslora.batch import IGNORED, Example, ProcessedImage

WITH_PICTURE = 0.939
"""Share of conversations with a picture in LLaVA's 665k mix; the others are texts."""
SUPERVISED = 0.45
"""Share of the text that is supervised; assumed."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a model and of its batches."""

    width: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision: tuple[int, int, int, int] = (1024, 4096, 24, 16)
    """Width, MLP width, layers and heads of the CLIP tower; the default is CLIP-L."""
    pixels: int = 336
    rank: int = 128
    conversations: int = 50
    """Of the three rotating batches together."""
    longest: int = 2048
    """Tokens of a conversation."""
    text_scale: float = 1.0
    """Factor on the lengths of LLaVA's texts."""
    new_tokens: int = 128
    """Decoded tokens per prompt."""

    @property
    def image_tokens(self) -> int:
        """Visual tokens of a picture."""
        return (self.pixels // 14) ** 2


SHAPES = {
    "llava-1.5-7b": Shape(width=4096, inner=11008, layers=32, heads=32, kv_heads=32, vocabulary=32_000),
    "3b": Shape(width=3072, inner=8192, layers=28, heads=24, kv_heads=8, vocabulary=128_256),
    "1b": Shape(width=2048, inner=8192, layers=16, heads=32, kv_heads=8, vocabulary=128_256),
    "tiny": Shape(
        width=64, inner=160, layers=2, heads=4, kv_heads=2, vocabulary=300, vision=(32, 64, 2, 2), pixels=28, rank=8,
        conversations=6, longest=64, text_scale=0.06, new_tokens=4,
    ),
}  # fmt: skip
"""3b and 1b have the language models of Llama 3.2, and `tiny` is for CPUs."""


def lengths_of(shape: Shape) -> list[list[int]]:
    """Tokens of the conversations of three batches of about equal sums, each with conversations of similar lengths.

    Texts are log-normal like those of LLaVA's 665k mix (mean 297 tokens). Grouping by length is LLaVA's order, so
    padded rows waste little.
    """
    rng = random.Random(0)
    lengths = []
    for _ in range(shape.conversations):
        text = max(8, round(min(1472, rng.lognormvariate(5.45, 0.7)) * shape.text_scale))
        picture = shape.image_tokens if rng.random() < WITH_PICTURE else 0
        lengths.append(min(shape.longest, text + picture))
    lengths.sort()
    batches: list[list[int]] = [[], [], []]
    reached, whole = 0, sum(lengths)
    for length in lengths:
        batches[min(2, 3 * reached // whole)].append(length)
        reached += length
    return batches


def examples(shape: Shape, lengths: Sequence[int], *, seed: int) -> list[Example]:
    """Conversations with one picture each, where it has room, and random text."""
    generator = torch.Generator().manual_seed(seed)
    conversations = []
    for number, length in enumerate(lengths):
        ids = torch.randint(3, shape.vocabulary - 1, (length,), generator=generator)
        visual = shape.image_tokens if length >= shape.image_tokens + 8 else 0
        ids[4 : 4 + visual] = shape.vocabulary - 1
        supervised = torch.zeros(length, dtype=torch.bool)
        supervised[length - max(1, round((length - visual) * SUPERVISED)) :] = True
        pixels = torch.randn(1, 3, shape.pixels, shape.pixels, generator=generator)
        pictures = [ProcessedImage(tensors={"pixel_values": pixels})] if visual else []
        conversations.append(Example(id=str(number), input_ids=ids, supervised=supervised, pictures=pictures))
    return conversations


def batches_of(shape: Shape) -> tuple[list[list[Example]], list[Example]]:
    """The three rotating batches, and a full one: eight conversations of the longest length."""
    rotating = [examples(shape, lengths, seed=seed) for seed, lengths in enumerate(lengths_of(shape))]
    return rotating, examples(shape, [shape.longest] * 8, seed=3)


def split(items: Sequence[Example], parts: int) -> list[list[Example]]:
    """The conversations in parts of similar sums of tokens; fewer parts where there are fewer conversations."""
    groups: list[list[Example]] = [[] for _ in range(min(parts, len(items)))]
    for item in sorted(items, key=lambda item: -item.length):
        min(groups, key=lambda group: sum(item.length for item in group)).append(item)
    return groups


def padded(items: Sequence[Example], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """A Hugging Face collator's batch: ``[G, T]`` ids, labels and mask, padded on the right, and all pictures."""
    rows = {"input_ids": [item.input_ids for item in items], "labels": [item.labels for item in items]}
    rows["attention_mask"] = [torch.ones(item.length, dtype=torch.long) for item in items]
    fill = {"input_ids": 0, "labels": IGNORED, "attention_mask": 0}
    made = {
        name: nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=fill[name]).to(device)
        for name, values in rows.items()
    }
    pictures = [picture.tensors["pixel_values"] for item in items for picture in item.pictures]
    return made | ({"pixel_values": torch.cat(pictures).to(device, dtype)} if pictures else {})
