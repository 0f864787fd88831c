"""Find the same modules or tensors under other names: by structure and shapes, if there is exactly one way."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from mm_moslora.utils.errors import AdapterError

Shapes = Mapping[str, Sequence[int]]


def map_names(names: Shapes, others: Shapes, *, source: str, target: str, least: int = 1) -> dict[str, str]:
    """Names with shapes -> names of the same shapes elsewhere; what has no partner is left out.

    Equal names with equal shapes belong together. For the rest beginnings are exchanged, such as ``model.`` for
    ``model.language_model.``: the exchange that places most names, of those the one with the longest common end.

    Args:
        least: parts between points that two names have in common at their ends, at least.

    Raises:
        AdapterError: two exchanges place the names equally well.
    """
    found = {name: name for name, shape in names.items() if name in others and list(others[name]) == list(shape)}
    left, free = names.keys() - found, others.keys() - found.keys()
    while left:
        first = min(left)
        ways = {}
        for old, new, common in _exchanges(first, names[first], {name: others[name] for name in free}, least):
            placed = {name: new + name.removeprefix(old) for name in left if name.startswith(old)}
            fitting = {a: b for a, b in placed.items() if b in free and list(others[b]) == list(names[a])}
            ways[tuple(sorted(fitting.items()))] = (len(fitting), common)
        order = sorted(sorted(ways), key=lambda way: ways[way], reverse=True)
        if len(order) > 1 and ways[order[0]] == ways[order[1]]:
            raise AdapterError(
                f"The names of {source} fit those of {target} in two ways: {first} may be {dict(order[0])[first]} or "
                f"{dict(order[1])[first]}. Rename the one that is meant."
            )
        placed = dict(order[0]) if order else {}
        found |= placed
        left, free = left - {first} - placed.keys(), free - set(placed.values())
    return found


def _exchanges(name: str, shape: Sequence[int], others: Shapes, least: int) -> set[tuple[str, str, int]]:
    """Beginnings to exchange, old and new, with how many parts follow them, from what could be one name."""
    parts, ways = name.split("."), set()
    for other, size in others.items():
        common = _common_end(parts, other.split("."))
        if common >= least and list(size) == list(shape):
            end = ".".join(parts[len(parts) - common :])
            ways.add((name.removesuffix(end), other.removesuffix(end), common))
    return ways


def _common_end(parts: Sequence[str], others: Sequence[str]) -> int:
    """How many parts are equal, from the last one on."""
    pairs = zip(reversed(parts), reversed(others), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def exchanged(mapping: Mapping[str, str]) -> dict[str, str]:
    """What a mapping exchanges: beginning -> beginning, for messages; empty where names are equal."""
    result = {}
    for name, other in mapping.items():
        if name != other:
            parts = name.split(".")
            end = ".".join(parts[len(parts) - _common_end(parts, other.split(".")) :])
            result[name.removesuffix(end)] = other.removesuffix(end)
    return result
