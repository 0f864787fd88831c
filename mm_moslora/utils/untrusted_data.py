"""Checked reading of JSON, JSON lines and YAML from files and services: the structure first, then types.

No other module parses these formats. A text costs what its length lets expect, and means one thing:

- Nesting and the number of items are limited, and those of YAML count as often as aliases repeat them.
- A key written twice is an error, since readers interpret it differently.
- Numbers have a size that a 64-bit float can hold. NaN and Infinity are no JSON; a caller that expects them, such as in
  a log of losses, asks for them (`constants`).
- Unpaired surrogates, which no UTF-8 text can hold, become U+FFFD. A caller that refuses them by name gets them
  (`surrogates`).

`build_strictly` and `build_known` then turn plain data into a dataclass. A value of another type is an error that names
its place, so callers need no checks of their own.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import json
import math
import re
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

import yaml

from mm_moslora.utils.errors import ConfigError, DataError, suggestion

MAX_DEPTH = 64
"""Deepest nesting; a record needs 5, the file of a tokenizer 12."""
MOST_ITEMS = 2 * 10**7
"""Most values of one JSON text. A value takes some 60 bytes of memory, and as few as two of the text."""
MOST_NODES = 10**5
"""Most values of a YAML text, those that aliases repeat included."""
MOST_YAML_CHARACTERS = 2**19
"""Longest YAML text. Python parses it at about 100 kB/s."""
MOST_LITERAL_CHARACTERS = 200_000
"""Longest Python literal."""
MOST_DIGITS = 300
"""Digits of the longest whole number."""
LARGEST = 10.0**MOST_DIGITS
"""Largest number of a dataclass; sums and percentages of such numbers are finite."""
_SUSPICIOUS = re.compile(r"\d{200}|\d[eE]\+?\d{3}")
"""Digits that may make a number too large; they may also stand in a text. 199 digits and e99 do not."""
_SURROGATE = re.compile(r"[\ud800-\udfff]|\\u[dD][89a-fA-F]")
"""Half of a surrogate pair, plain or as JSON escapes it; it may be half of a whole pair."""

T = TypeVar("T")
type_hints: Callable[[Any], dict[str, Any]] = functools.cache(typing.get_type_hints)
"""Types of the fields of a dataclass."""


class StrictJsonError(DataError):
    """One value that cannot be used. `deep` and `large` mark exceeded limits; otherwise the JSON is broken."""

    def __init__(self, message: str, *, deep: bool = False, large: bool = False) -> None:
        super().__init__(message)
        self.deep, self.large = deep, large


def parse_json(
    text: str | bytes | bytearray, *, max_depth: int = MAX_DEPTH, constants: bool = False, surrogates: bool = False,
    repeats: bool = False,
) -> Any:  # fmt: skip
    """Parse one JSON value.

    Args:
        text: the value; bytes are UTF-8.
        constants: accept NaN and Infinity, which are not JSON, as numbers.
        surrogates: keep unpaired surrogates, for a caller that refuses them.
        repeats: of a key written twice the last value counts, as in what a model answers.
    """
    if not isinstance(text, str):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            raise StrictJsonError(f"is not UTF-8 at byte {error.start}") from error
    groups = text.count("[") + text.count("{")
    if groups + text.count(",") > MOST_ITEMS:
        raise StrictJsonError(f"holds more than {MOST_ITEMS} values", large=True)
    hooks: dict[str, Any] = {"object_pairs_hook": dict if repeats else _without_repeats}
    if not constants:
        hooks["parse_constant"] = _no_constant
    if _SUSPICIOUS.search(text):  # Python's own parsing is twice as fast without these
        hooks |= {"parse_int": _whole, "parse_float": float if constants else _finite}
    try:
        value = json.loads(text, **hooks)
        if not surrogates and _SURROGATE.search(text):
            value = _encodable(value)
    except RecursionError as error:
        raise StrictJsonError(f"is nested more than {max_depth} levels deep", deep=True) from error
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise StrictJsonError(f"is not valid JSON ({error.msg} at {line}column {error.colno})") from error
    except ValueError as error:  # the hooks below
        raise StrictJsonError(f"is not valid JSON ({error})") from error
    if groups > max_depth and _too_deep(value, max_depth):
        raise StrictJsonError(f"is nested more than {max_depth} levels deep", deep=True)
    return value


def parse_object(text: str | bytes, *, constants: bool = False) -> dict[str, Any]:
    """Parse a JSON object; see `parse_json`."""
    value = parse_json(text, constants=constants)
    if not isinstance(value, dict):
        raise StrictJsonError(f"holds a {type(value).__name__}, expected an object")
    return value


def parse_lines(text: str, *, skip_damaged: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a log, one a line; empty lines are passed over, NaN and Infinity are numbers.

    Args:
        text: the lines, which end in line feeds only.
        skip_damaged: leave out other lines, such as the incomplete last one of a killed process.
    """
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_object(line, constants=True))
        except StrictJsonError as error:
            if not skip_damaged:
                raise StrictJsonError(
                    f"is damaged: line {number} {error}", deep=error.deep, large=error.large
                ) from None
    return rows


def parse_literal(text: str) -> Any:
    """The value of a text that is a Python literal, such as models answer; nothing is evaluated."""
    if len(text) > MOST_LITERAL_CHARACTERS:
        raise StrictJsonError(f"has more than {MOST_LITERAL_CHARACTERS} characters", large=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of an unknown escape
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise StrictJsonError(f"is no Python literal ({error})") from error


def encodable(text: str) -> str:
    """Text with U+FFFD for unpaired surrogates, which UTF-8 cannot hold; two halves of a pair become its character."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") if not text.isascii() else text


def _encodable(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_repeats([(encodable(key), _encodable(item)) for key, item in value.items()])
    if isinstance(value, list):
        return [_encodable(item) for item in value]
    return encodable(value) if isinstance(value, str) else value


def without_constants(value: Any) -> Any:
    """Plain data as JSON can hold it: None for NaN and infinity, texts without unpaired surrogates."""
    if isinstance(value, dict):
        return {encodable(str(key)): without_constants(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_constants(item) for item in value]
    if isinstance(value, str):
        return encodable(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _too_deep(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for group in level
            if isinstance(group, dict | list)
            for item in (group.values() if isinstance(group, dict) else group)
            if isinstance(item, dict | list)
        ]
        if not level:
            return False
    return True


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"key {key[:80]!r} is written twice")
    return mapping


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON value")


def _whole(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"a whole number has {len(text)} digits, at most {MOST_DIGITS} are read")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:40]} is too large for a number")
    return number


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, and aliases that repeat too much."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _size(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.YAMLError(
                    f"a key is itself a list or mapping (line {key_node.start_mark.line + 1}); a text with braces, "
                    "such as an unfilled placeholder, needs quotes"
                )
            if key in keys:
                raise yaml.YAMLError(f"key {key!r} is written twice (line {key_node.start_mark.line + 1})")
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        return encodable(super().construct_scalar(node))

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise yaml.YAMLError(f"a whole number has {len(node.value)} digits, at most {MOST_DIGITS} are read")
        if abs(value := super().construct_yaml_int(node)) > LARGEST:  # hexadecimal digits are worth more
            raise yaml.YAMLError(f"{node.value[:40]}... is above {LARGEST:g}, the largest number that is read")
        return value


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_yaml_int)


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Number of values of a YAML node, each counted as often as aliases repeat it; a long text counts more."""
    if id(node) not in sizes:
        sizes[id(node)] = MOST_NODES  # an alias within its own value is endless
        if isinstance(node, yaml.CollectionNode):
            items = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            sizes[id(node)] = 1 + sum(_size(item, sizes) for item in items)
        else:
            sizes[id(node)] = 1 + len(node.value) // 100
    if sizes[id(node)] > MOST_NODES:
        raise yaml.YAMLError(
            f"it holds more than {MOST_NODES} values, those that aliases (*name) repeat included "
            f"(line {node.start_mark.line + 1})"
        )
    return sizes[id(node)]


def parse_yaml_value(text: str) -> Any:
    """Parse one YAML value."""
    if len(text) > MOST_YAML_CHARACTERS:
        raise ConfigError(f"has {len(text)} characters, at most {MOST_YAML_CHARACTERS} of YAML are read")
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506  (a SafeLoader)
    except RecursionError as error:
        raise ConfigError("is not valid YAML: it is nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        raise ConfigError(
            f"is not valid YAML: {place}{getattr(error, 'problem', None) or error}. Close quotes and brackets, write "
            "`key: value`, and indent the keys of one section alike"
        ) from error
    except Exception as error:  # PyYAML raises errors of many kinds, for dates that do not exist and for `!!bool x`
        raise ConfigError(f"is not valid YAML: a value has another type than its tag ({error})") from error


def parse_yaml(text: str, *, source: str) -> dict[str, Any]:
    """Parse a YAML mapping."""
    try:
        data = parse_yaml_value(text)
    except ConfigError as error:
        raise ConfigError(f"{source} {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{source} holds {type(data).__name__}, expected a mapping of recipe keys.")
    return data


def build_strictly(kind: type[T], data: Mapping[str, Any], *, source: str) -> T:
    """Build a dataclass from plain data."""
    return typing.cast(T, read_value(kind, data, source=source, where=""))


def build_known(kind: type[T], data: Mapping[str, Any], *, source: str) -> T:
    """Build a dataclass, and those in it, from the keys that they have; see `build_strictly`. Null is a missing key."""
    return build_strictly(kind, _known(kind, data), source=source)


def _known(kind: Any, data: Any) -> Any:
    """The data without the keys that dataclasses do not have."""
    if dataclasses.is_dataclass(kind) and isinstance(data, Mapping):
        hints = type_hints(kind)
        return {key: _known(hints[key], item) for key, item in data.items() if key in hints and item is not None}
    parts = [part for part in typing.get_args(kind) if part not in (type(None), Ellipsis)]
    if len(parts) == 1 and typing.get_origin(kind) in (list, tuple) and isinstance(data, list | tuple):
        return [_known(parts[0], item) for item in data]
    return _known(parts[0], data) if len(parts) == 1 and isinstance(data, Mapping) else data


def read_value(kind: Any, data: Any, *, source: str, where: str) -> Any:
    """Read one value."""
    return _build(kind, data, source, where)


def _build(kind: Any, data: Any, source: str, where: str) -> Any:
    """Turn plain data into `kind`, a dataclass or a typing form; the error names the value that does not fit."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return data if isinstance(data, kind) else _build_dataclass(kind, data, source, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _build_union(arguments, data, source, where)
    if origin is Literal:
        if data not in arguments:
            hint = suggestion(str(data), [str(item) for item in arguments])
            raise ConfigError(f"{source}: {where} is {data!r}, expected one of {', '.join(map(str, arguments))}.{hint}")
        return data
    if origin in (list, tuple, Sequence):
        return _build_sequence(origin, arguments, data, source, where)
    if origin in (dict, Mapping):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{source}: {where} is {data!r}, expected a mapping.")
        odd = [key for key in data if arguments[0] is str and not isinstance(key, str)]
        if odd:
            raise ConfigError(
                f"{source}: {where} has the key {odd[0]!r}, expected a text. YAML reads yes, no, on, off and numbers "
                'as other values: write them in quotes, such as "yes".'
            )
        return {key: _build(arguments[1], item, source, f"{where}.{key}") for key, item in data.items()}
    return _build_scalar(kind, data, source, where)


def _build_dataclass(kind: type, data: Any, source: str, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: {where or 'the recipe'} is {data!r}, expected a group of keys.")
    hints = type_hints(kind)
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


_LARGEST_INTEGER = 2**63 - 1  # of a tensor's shape
_SCALARS = {float: "a number such as 1.0e-4", int: "a whole number", bool: "true or false", str: "text"}


def _build_scalar(kind: Any, data: Any, source: str, where: str) -> Any:
    if kind is float and isinstance(data, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            data = float(data)
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        data = float(data) if abs(data) <= LARGEST else math.inf
    if kind is int and isinstance(data, float) and data.is_integer():
        data = int(data)
    if kind is Any or (isinstance(data, kind) and not (kind in (int, float) and isinstance(data, bool))):
        most = LARGEST if kind is float else _LARGEST_INTEGER
        if kind in (int, float) and not abs(data) <= most:  # NaN is not, either
            shown = f"{float(data):g}" if isinstance(data, float) else "a longer number"
            raise ConfigError(f"{source}: {where} is {shown}, expected a finite number of at most {most:g}.")
        return data
    raise ConfigError(
        f"{source}: {where} is {data!r} ({type(data).__name__}), expected {_SCALARS.get(kind, kind.__name__)}."
    )
