"""Single values of recipes, as command lines give them, and dataclasses as plain data."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, Union

from mm_moslora.utils.errors import ConfigError
from mm_moslora.utils.untrusted_data import parse_yaml_value


def parse_scalar(text: str) -> Any:
    """Read one value as YAML, and numbers as people write them (1e-4).

    Raises:
        ConfigError: not YAML, such as a bracket that is not closed.
    """
    try:
        value = parse_yaml_value(text) if text.strip() else ""
    except ConfigError as error:
        raise ConfigError(f"{text[:200]!r} is no YAML value: it {error}") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        try:
            return float(value)
        except ValueError:
            return value
    return value


def parse_text(text: str) -> str | None:
    """Read one value of a key that takes text: unchanged except for surrounding quotes; null is None."""
    bare = text.strip()
    if bare in ("null", "~"):
        return None
    quoted = len(bare) > 1 and bare[0] == bare[-1] and bare[0] in "'\""
    value = parse_scalar(bare) if quoted else text
    return value if isinstance(value, str) else text


def takes_text(kind: Any, keys: Sequence[str]) -> bool:
    """Whether the field at the end of a key path takes only text or None."""
    return kind_at(kind, keys) is str


def kind_at(kind: Any, keys: Sequence[str]) -> Any:
    """The type of the field at the end of a key path, without None."""
    for key in keys:
        kind = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            kind = typing.get_type_hints(kind).get(key)
        else:
            kind = (typing.get_args(kind) or (None,))[-1]
    return _without_none(kind)


def _without_none(kind: Any) -> Any:
    """X for `X | None`; any other type unchanged."""
    if typing.get_origin(kind) not in (Union, types.UnionType):
        return kind
    rest = [argument for argument in typing.get_args(kind) if argument is not type(None)]
    return rest[0] if len(rest) == 1 else kind


def set_dotted(kind: Any, data: Any, keys: list[str], value: Any, item: str) -> None:
    """Set one value of nested plain data in place.

    Args:
        keys: the key path. List items are addressed by number; the number after the last item appends one.

    Raises:
        ConfigError: the path goes through a value, or past the end of a list.
    """
    for depth, key in enumerate(keys):
        if isinstance(data, list):
            part: Any = _index(data, key, item)
        elif isinstance(data, dict):
            part = key
            data.setdefault(key, None)
        else:
            raise ConfigError(f"Override {item!r}: {'.'.join(keys[:depth])} holds a value, not a group of keys.")
        if depth == len(keys) - 1:
            data[part] = value
        elif data[part] is None:
            listed = typing.get_origin(kind_at(kind, keys[: depth + 1])) in (list, tuple)
            data[part] = [] if listed else {}
        data = data[part]


def _index(data: list[Any], key: str, item: str) -> int:
    """The index of a list item; the index after the last item appends one."""
    count = len(data)
    if not (key.isascii() and key.isdigit()) or int(key) > count:
        allowed = f"0 to {count - 1} change the items that it has, {count}" if count else "it has no item, 0"
        raise ConfigError(f"Override {item!r}: {key!r} is not an index of this list: {allowed} adds one.")
    if int(key) == count:
        data.append(None)
    return int(key)


def plain(value: Any) -> Any:
    """Dataclasses and tuples as mappings and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value
