"""Facts of recipe keys, which stand at the keys as metadata of their fields, ways through a recipe, checks of values.

    workers: int | None = field(default=None, metadata=FREE)

A fact of a group holds for all keys in it. So a new key is one field: its type and default are read strictly and shown
by `mm-moslora config KEY`, and its facts say what a checkpoint, a path, an adapter and an objective make of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Union

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import type_hints

Facts = dict[str, str]

FREE: Facts = {"resume": "free"}
"""A resumed run may have another value: the computation stays the same. Without it the checkpoint is another run's."""
ROUNDING: Facts = {"resume": "rounding"}
"""A resumed run may have another value, which changes the order of summation only: losses agree to rounding."""
NO_NUMBERS: Facts = {"numbers": "none"}
"""It changes nothing that a run computes or measures, so that results of runs that differ in it count as the same."""

PATH: Facts = {"path": "file"}
"""A file or folder; relative ones start at the recipe file, and it may differ by host."""
OUTPUT: Facts = {"path": "output"}
"""A folder that need not exist."""
MODEL: Facts = {"path": "model"}
"""A folder, or a name that is looked up elsewhere."""
WEIGHTS: Facts = {"path": "weights"}
"""A file, or a tag of weights that is looked up elsewhere."""
TASK: Facts = {"path": "task"}
"""Tasks of the harness, whose names may hold paths."""
ENGINE: Facts = {"path": "engine"}
"""A name, or a file of DeepSpeed's settings."""

ANY_ADAPTER: Facts = {"adapter": "any"}
"""Of `model`: it changes neither the inputs of a model nor the outputs of its base, so that adapters that were trained
with another value fit. Every other key of `model` is compared."""
ASSEMBLED: Facts = {"model": "assembled"}
"""It has no effect on a ready-made model."""
OWN_LOOP: Facts = {"trl": ""}
"""TRL's trainers do not follow it; its value names objectives that do."""
OF_DPO: Facts = {"trl": "dpo"}
ANY_METHOD: Facts = {"peft": "any"}
"""Of `adapter`: read by all methods of PEFT, and not by MoSLoRA alone."""

BASE: Facts = {"inherit": "base"}
"""A recipe that starts from the weights of a run and names no base takes over the run's value."""
PICTURES: Facts = {"inherit": "pictures"}
"""It is taken over from the run in which a projector or an adapter was trained."""
PROMPTS: Facts = {"inherit": "prompts"}
"""It is taken over from the run in which an adapter was trained."""
FACTORS: Facts = {"inherit": "factors"}
"""The same, of `adapter`."""
VIDEOS: Facts = {"inherit": "videos"}
"""The same, of sources, where all sources of the run agree in it."""


def _without_none(kind: Any) -> Any:
    """X for `X | None`; any other type unchanged."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind
    rest = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    return rest[0] if len(rest) == 1 else kind


@functools.cache
def _at(kind: Any, keys: tuple[str, ...]) -> tuple[Any, Facts]:
    facts: Facts = {}
    for key in keys:
        kind = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            facts = facts | next((dict(item.metadata) for item in dataclasses.fields(kind) if item.name == key), {})
            kind = type_hints(kind).get(key)
        else:  # the number of an item, or the key of a mapping
            kind = (typing.get_args(kind) or (None,))[-1]
    return _without_none(kind), facts


def kind_at(kind: Any, keys: Sequence[str]) -> Any:
    """The type of the value at the end of a key path, without None."""
    return _at(kind, tuple(keys))[0]


def facts_at(kind: Any, key: str) -> Facts:
    """The facts of a dotted key and of the groups around it; those that are known, of a key that there is not."""
    return _at(kind, tuple(key.split(".")))[1]


def keys_with(kind: Any, name: str, *values: str, prefix: str = "") -> list[str]:
    """Dotted keys, in groups too, whose fact of that name has one of the values; lists are not entered."""
    found = []
    for item in dataclasses.fields(kind):
        inner, key = _without_none(type_hints(kind)[item.name]), f"{prefix}{item.name}"
        if item.metadata.get(name) in values:
            found.append(key)
        if dataclasses.is_dataclass(inner):
            found += keys_with(inner, name, *values, prefix=f"{key}.")
    return found


def changed_keys(value: Any, prefix: str = "") -> Iterator[tuple[str, Facts]]:
    """Dotted keys that do not have their default, in groups and lists of groups too, with their facts."""
    for item in dataclasses.fields(value):
        own, key = getattr(value, item.name), f"{prefix}{item.name}"
        groups = {f".{number}": part for number, part in enumerate(own)} if isinstance(own, list) else {"": own}
        if own and all(dataclasses.is_dataclass(part) for part in groups.values()):
            for number, part in groups.items():
                yield from changed_keys(part, f"{key}{number}.")
        elif own != (item.default_factory() if item.default_factory is not dataclasses.MISSING else item.default):
            yield key, dict(item.metadata)


def plain(value: Any) -> Any:
    """Dataclasses and tuples as mappings and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def leaves(data: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a recipe's dictionary by dotted key; empty lists and dictionaries are values."""
    items = data.items() if isinstance(data, Mapping) else enumerate(data) if isinstance(data, list) else ()
    below = {key: leaf for name, item in items for key, leaf in leaves(item, f"{prefix}{name}.").items()}
    return below or {prefix.rstrip("."): data}


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def at_least(name: str, value: float, minimum: float) -> None:
    """Raise `ConfigError` unless the value of the named key is at least the minimum."""
    require(value >= minimum, f"{name} is {value}, expected at least {minimum}.")


def positive(name: str, value: float) -> None:
    """Raise `ConfigError` unless the value of the named key is more than 0, and finite."""
    require(value > 0 and math.isfinite(value), f"{name} is {value}, expected more than 0, and finite.")
