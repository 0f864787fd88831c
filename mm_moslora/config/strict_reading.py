"""Strict reading of plain data into dataclasses: an unknown key or a wrong type is an error that names the place.

Recipes, task files and stored protocols are read with it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

import yaml

from mm_moslora.utils.errors import ConfigError, suggestion

T = TypeVar("T")
_type_hints = functools.cache(typing.get_type_hints)


def build_strictly(kind: type[T], data: Mapping[str, Any], *, source: str) -> T:
    """Build a dataclass from plain data.

    Raises:
        ConfigError: an unknown or missing key, a wrong type or an impossible value.
    """
    return typing.cast(T, _build(kind, data, source, ""))


def read_value(kind: Any, data: Any, *, source: str, where: str) -> Any:
    """Read one value.

    Args:
        kind: its type, as an annotation has it.
        data: plain data.
        source: where it came from, for messages.
        where: the dotted key, for messages.

    Raises:
        ConfigError: a wrong type, or an unknown key of a dataclass.
    """
    return _build(kind, data, source, where)


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Read a YAML mapping; a key written twice is an error.

    Raises:
        ConfigError: not YAML, or not a mapping.
    """
    try:
        data = yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader that refuses repeated keys)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds {type(data).__name__}, expected a mapping of recipe keys.")
    return data


def parse_scalar(text: str) -> Any:
    """Read one value as YAML, and numbers as people write them (1e-4).

    Raises:
        ConfigError: not YAML, such as a bracket that is not closed.
    """
    try:
        value = yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        raise ConfigError(f"{text!r} is no YAML value: {error}") from error
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
    return _kind_at(kind, keys) is str


def _kind_at(kind: Any, keys: Sequence[str]) -> Any:
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
        kind: the dataclass that the data are for.
        data: mappings and lists.
        keys: the key path. List items are addressed by number; the number after the last item appends one.
        value: the new value.
        item: the override as the user wrote it, for messages.

    Raises:
        ConfigError: the path goes through a value, or past the end of a list.
    """
    for depth, key in enumerate(keys):
        if isinstance(data, list):
            place: Any = _place(data, key, item)
        elif isinstance(data, dict):
            place = key
            data.setdefault(key, None)
        else:
            raise ConfigError(f"Override {item!r}: {'.'.join(keys[:depth])} holds a value, not a group of keys.")
        if depth == len(keys) - 1:
            data[place] = value
        elif data[place] is None:
            listed = typing.get_origin(_kind_at(kind, keys[: depth + 1])) in (list, tuple)
            data[place] = [] if listed else {}
        data = data[place]


def _place(data: list[Any], key: str, item: str) -> int:
    """The index of a list item; the index after the last item appends one."""
    count = len(data)
    if not (key.isascii() and key.isdigit()) or int(key) > count:
        there = f"0 to {count - 1} change the items that it has, {count}" if count else "it has no item, 0"
        raise ConfigError(f"Override {item!r}: {key!r} is not an index of this list: {there} adds one.")
    if int(key) == count:
        data.append(None)
    return int(key)


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(
                    f"a key is itself a list or mapping (line {key_node.start_mark.line + 1}); a text with braces, "
                    "such as an unfilled placeholder, needs quotes"
                )
            if key in seen:
                raise yaml.YAMLError(f"key {key!r} is written twice (line {key_node.start_mark.line + 1})")
            seen.add(key)
        return super().construct_mapping(node, deep)


def plain(value: Any) -> Any:
    """Dataclasses and tuples as mappings and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def _build(kind: Any, data: Any, source: str, where: str) -> Any:
    """Turn plain data into `kind`, a dataclass or a typing form; the error names the value that does not fit."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _build_dataclass(kind, data, source, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, data, source, where)
    if origin is Literal:
        if data not in arguments:
            hint = suggestion(str(data), [str(item) for item in arguments])
            raise ConfigError(f"{source}: {where} is {data!r}, expected one of {', '.join(map(str, arguments))}.{hint}")
        return data
    if origin in (list, tuple):
        return _build_sequence(origin, arguments, data, source, where)
    if origin is dict:
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: {where} is {data!r}, expected a mapping.")
        return {key: _build(arguments[1], item, source, f"{where}.{key}") for key, item in data.items()}
    return _build_scalar(kind, data, source, where)


def _build_dataclass(kind: type, data: Any, source: str, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: {where or 'the recipe'} is {data!r}, expected a group of keys.")
    hints = _type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            path = f"{where}.{key}" if where else str(key)
            raise ConfigError(
                f"{source}: unknown key {path!r}.{suggestion(str(key), fields)} Known here: {', '.join(fields)}."
            )
    required = [
        name
        for name, item in fields.items()
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING and name not in data
    ]
    if required:
        missing = ", ".join(f"{where}.{name}" if where else name for name in required)
        raise ConfigError(f"{source}: missing {missing}.")
    prefix = f"{where}." if where else ""
    return kind(**{key: _build(hints[key], value, source, f"{prefix}{key}") for key, value in data.items()})


def _build_union(arguments: tuple[Any, ...], data: Any, source: str, where: str) -> Any:
    if data is None and type(None) in arguments:
        return None
    errors: list[ConfigError] = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _build(argument, data, source, where)
        except ConfigError as error:
            errors.append(error)
    raise errors[0]


def _build_sequence(origin: Any, arguments: tuple[Any, ...], data: Any, source: str, where: str) -> Any:
    if not isinstance(data, list | tuple):
        raise ConfigError(f"{source}: {where} is {data!r}, expected a list.")
    if origin is tuple and arguments[-1] is Ellipsis:
        return tuple(_build(arguments[0], item, source, f"{where}.{index}") for index, item in enumerate(data))
    if origin is tuple:
        if len(data) != len(arguments):
            raise ConfigError(f"{source}: {where} has {len(data)} items, expected {len(arguments)}.")
        pairs = zip(arguments, data, strict=True)
        return tuple(_build(kind, item, source, f"{where}.{index}") for index, (kind, item) in enumerate(pairs))
    return [_build(arguments[0], item, source, f"{where}.{index}") for index, item in enumerate(data)]


def _build_scalar(kind: Any, data: Any, source: str, where: str) -> Any:
    if kind is float and isinstance(data, str):  # YAML 1.1 reads 1e-4 as text
        data = parse_scalar(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        data = float(data)
    if kind is int and isinstance(data, float) and data.is_integer():
        data = int(data)
    if kind is Any or (isinstance(data, kind) and not (kind in (int, float) and isinstance(data, bool))):
        if kind is float and not math.isfinite(data):
            raise ConfigError(f"{source}: {where} is {data}, expected a finite number.")
        return data
    raise ConfigError(f"{source}: {where} is {data!r} ({type(data).__name__}), expected {kind.__name__}.")
