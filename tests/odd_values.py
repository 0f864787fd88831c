"""Values that no program of this project writes, for the files that a stranger may have changed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, 0, -1, 10**299, 1e308, -1e308, float("nan"), float("inf"), "", "x", "\ud800", "\x1b[31m", [], ["x"],
    [[]], [None], {}, {"x": "x"}, {"\udfff": [float("nan")]},
)  # fmt: skip


def places(data: Any) -> Iterator[tuple[Any, ...]]:
    """The places of all values in plain data, the whole first."""
    yield ()
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, item in items:
        yield from ((key, *place) for place in places(item))


def damaged(data: Any, place: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place."""
    if not place:
        return value
    made = copy.deepcopy(data)
    group = made
    for key in place[:-1]:
        group = group[key]
    group[place[-1]] = value
    return made
