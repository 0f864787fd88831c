"""What differs between the preprocessing of a training and that of now, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, groupby, takewhile
from operator import eq
from typing import Any

import numpy as np
import torch
from torch import Tensor

TOLERANCE = 0.03
"""Largest accepted difference of the statistics of pixels, whose spread is near 1. The two backends of pictures of
transformers 5.24 differed by up to 0.017, at 28 pixels."""
_STRETCHES = 24
"""Stretches of a tensor of pixels of which mean and standard deviation are compared."""
_SHOWN = 60
"""Characters shown of a long value, from shortly before the first difference on."""


def differences(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, for people: what the first has `here`, and the second `in training`."""
    names = {number: token for number, _, token in own["prompt"]}
    missing = [f"{name} is missing here" for name in sorted(stored["tensors"].keys() - own["tensors"].keys())]
    return (
        (differing_ids(_ids(own["prompt"]), stored["prompt"], names) or differing_question(own, stored))
        + differing_counts(own, stored)
        + differing_tensors(own["tensors"], stored["tensors"])
        + missing
    )


def differing_question(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """The first difference of the tokens of a question alone."""
    return differing_ids(_ids(own["question"]), stored["question"], what="a question alone")


def differing_counts(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Differences of the tokens of pictures, and of the tokens that end answers."""
    counts, expected = (
        {f"the number of tokens of a picture of {size}": count for size, count in item["tokens_per_picture"].items()}
        | ({"the ids of tokens that end an answer": item["stop_ids"]} if item["stop_ids"] else {})
        for item in (own, stored)
    )
    return differing_values(counts, expected)


def _ids(runs: Sequence[Sequence[Any]]) -> list[int]:
    return list(chain.from_iterable([number] * count for number, count, _ in runs))


def as_tensor(value: Any) -> Tensor:
    """A tensor of an array, of nested lists, or of a list of tensors of one shape."""
    if isinstance(value, list) and value and isinstance(value[0], Tensor | np.ndarray):
        return torch.stack([torch.as_tensor(item) for item in value])
    return torch.as_tensor(value)


def tensor_summary(value: Tensor) -> dict[str, Any]:
    """Shape without leading ones, which programs differ in, and values: all of a few, statistics of many."""
    shape = list(value.shape)
    while shape and shape[0] == 1:
        del shape[0]
    flat = value.detach().flatten().double().cpu()
    if len(flat) > 2 * _STRETCHES:
        flat = torch.cat([torch.stack([part.mean(), part.std()]) for part in flat.tensor_split(_STRETCHES)])
    return {"shape": shape, "values": [round(number, 4) for number in flat.tolist()]}


def differing_tensors(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Differences of the tensors that both have; see `tensor_summary`."""
    differing = []
    for name in sorted(own.keys() & stored.keys()):
        (shape, values), (old_shape, old_values) = (
            (item[name]["shape"], item[name]["values"]) for item in (own, stored)
        )
        if shape != old_shape or len(values) != len(old_values):
            differing.append(f"{name} has shape {shape} here, {old_shape} in training")
            continue
        far = max(range(len(values)), key=lambda index: abs(values[index] - old_values[index]), default=None)
        if far is not None and not abs(values[far] - old_values[far]) <= TOLERANCE:
            what = ("mean", "spread")[far % 2] if len(values) == 2 * _STRETCHES else "a value"
            differing.append(f"{name}: {what} {values[far]:.4g} here, {old_values[far]:.4g} in training")
    return differing


def differing_ids(
    own: list[int], runs: Sequence[Sequence[Any]], names: Mapping[int, str] | None = None, *, what: str = "the prompt"
) -> list[str]:
    """The first difference of a prompt's tokens; stored are runs of one token: number, count, text."""
    stored = _ids(runs)
    if own == stored:
        return []
    first = _agreement(own, stored)
    texts = {number: str(token) for number, _, token in runs} | dict(names or {})
    shown = [_tokens(ids[max(0, first - 2) :], texts) for ids in (own, stored)]
    lengths = f"{len(own)} tokens here, {len(stored)} in training"
    return [f"{what} ({lengths}) has from token {first} on {shown[0]} here, {shown[1]} in training"]


def _agreement(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    return sum(takewhile(bool, map(eq, one, other)))


def _tokens(ids: Sequence[int], texts: Mapping[int, str]) -> str:
    """The next few different tokens, for people; of another program's tokens the texts may not be known."""
    groups = [(number, len(list(same))) for number, same in groupby(ids)][:8]
    words = [texts.get(number, f"[{number}]") + (f"*{count}" if count > 1 else "") for number, count in groups]
    return repr("".join(words)) if words else "nothing"


def differing_values(own: Mapping[str, Any], stored: Mapping[str, Any]) -> list[str]:
    """Differences of the values that both have."""
    keys = sorted(key for key in own.keys() & stored.keys() if own[key] != stored[key])
    return [
        f"{key} is {a} here, {b} in training" for key in keys for a, b in [_around(str(own[key]), str(stored[key]))]
    ]


def _around(one: str, other: str) -> tuple[str, str]:
    """Two texts, long ones from shortly before their first difference on."""
    if max(len(one), len(other)) <= _SHOWN:
        return one, other
    start = max(0, _agreement(one, other) - _SHOWN // 3)
    lead = "..." if start else ""
    return tuple(f"{lead}{text[start : start + _SHOWN]!r}" for text in (one, other))  # type: ignore[return-value]
