"""The parts of a protocol by name: extractions, metrics and aggregations of this package, of others, and of a user.

A task names a part alone (`metric: within`) or with options, the keyword-only parameters of its function:

    metric: {name: within, relative: 0.05}
    metric: {file: my_metric.py, name: within_one}

Within this package both are one text, the name with its options as JSON, so that rules are compared, stored and shown
alike. Other packages add functions by entry points of the groups `mm_moslora_eval.extractions`, `.metrics` and
`.aggregations`.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache, partial, wraps
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, TypeVar, get_type_hints

from mm_moslora.utils.errors import ConfigError, EvalError, suggestion
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object, read_value
from mm_moslora_eval.scoring.trusted_code import code_hash, foreign_code, trusted_module
from mm_moslora_eval.sources.document import Document

Extractor = Callable[[str, Document], str]
Metric = Callable[[str, Document], float]
F = TypeVar("F", bound=Callable[..., Any])
KINDS = ("extraction", "metric", "aggregation", "over_samples")
"""Kinds of parts, which are keys of a task file."""
_FILE, _HASH = "file", "sha256"


def part_text(kind: str, value: Any, *, folder: Path) -> Any:
    """The text of a part that a task file gives as a mapping; anything else is returned as it is.

    A file gets its absolute path and its hash, so that other code is another rule.

    Args:
        kind: the key of the task file.
        value: its value.
        folder: where a relative path of a file starts.

    Raises:
        EvalError: no name, or a file that cannot be read.
    """
    if not isinstance(value, Mapping):
        return value
    options = {str(key): item for key, item in value.items() if key != "name"}
    name = value.get("name")
    if not isinstance(name, str) or " " in name:
        raise EvalError(f"{kind} is {dict(value)!r}, expected a mapping with `name` and the options of that {kind}.")
    if _FILE in options:
        file = folder / str(options[_FILE])
        options[_FILE] = str(file.absolute())
        options[_HASH] = code_hash(file, named=f"{kind}.file")
    return with_options(name, options)


def with_options(name: str, options: Mapping[str, Any]) -> str:
    """The text of a part with options."""
    return f"{name} {json.dumps(options, sort_keys=True, ensure_ascii=False)}" if options else name


@lru_cache(maxsize=512)
def _read(text: str) -> tuple[str, dict[str, Any]]:
    name, _, rest = text.partition(" ")
    try:
        return name, parse_object(rest) if rest else {}
    except StrictJsonError as error:
        raise EvalError(f"The options of {name!r} cannot be read: they are {rest[:200]!r}, which {error}.") from error


def name_of(part: str) -> str:
    """The name of a part without its options."""
    return part.partition(" ")[0]


def options_of(part: str) -> dict[str, Any]:
    """The options of a part."""
    return dict(_read(part)[1])


class NamedParts(Mapping[str, F], Generic[F]):
    """The functions of one kind. A key is a name, or a name with options; iterating gives the names.

    Args:
        kind: of `KINDS`, or another word, such as `grader`; the group of entry points is `mm_moslora_eval.KINDs`.
        shipped: this package's own functions.
        files: whether a user's file may hold such a function.
    """

    def __init__(self, kind: str, shipped: Mapping[str, F], *, files: bool = True) -> None:
        self.kind, self._shipped, self._files = kind, dict(shipped), files
        self._group = f"mm_moslora_eval.{kind.removesuffix('s')}s"

    def __getitem__(self, part: str) -> F:
        """The function, with its options.

        Raises:
            KeyError: no function has this name.
            EvalError: an option does not fit, or the code of a user's own is not trusted.
        """
        return _prepared(self, part)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        yield from self._shipped
        yield from (name for name in self._points() if name not in self._shipped)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, part: object) -> bool:
        """Whether the name is known; nothing is loaded. The name of a function in a user's file is."""
        if not isinstance(part, str):
            return False
        name, options = _read(part)
        if _FILE in options:
            return self._files
        return name in self._shipped or name in self._points()

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def check(self, part: str, *, also: Collection[str] = ()) -> None:
        """Refuse a part that no task can have; the code of other packages and of files is not loaded.

        Args:
            part: a key.
            also: further names, which take no options.

        Raises:
            EvalError: an unknown name, or options that do not fit.
        """
        name = name_of(part)
        if part in also:
            return
        if part not in self:
            known = [*self, *also]
            raise EvalError(f"{self.kind} {name!r} is not known.{suggestion(name, known)} Known: {', '.join(known)}.")
        if name in self._shipped and _FILE not in options_of(part):
            self[part]

    def origin(self, part: str) -> dict[str, str]:
        """Where a function of others comes from, for results: package and version, or file and hash; else empty."""
        name, options = _read(part)
        if _FILE in options:
            return {key: str(options[key]) for key in (_FILE, _HASH) if key in options}
        if name in self._shipped or name not in (points := self._points()):
            return {}
        package = points[name].dist
        return {"package": package.name, "version": package.version} if package is not None else {"package": "unknown"}

    def find(self, part: str) -> F:
        """The function without its options; see `__getitem__`."""
        name, options = _read(part)
        if _FILE in options:
            module = trusted_module(str(options[_FILE]), str(options.get(_HASH, "")))
            function = getattr(module, name, None)
            if not callable(function):
                known = [key for key, item in vars(module).items() if callable(item) and not key.startswith("_")]
                raise EvalError(f"{options[_FILE]} has no function {name!r}.{suggestion(name, known)}")
            return function  # type: ignore[no-any-return]
        if name in self._shipped:
            return self._shipped[name]
        point = self._points()[name]
        try:
            with foreign_code():
                return point.load()  # type: ignore[no-any-return]
        except Exception as error:  # whatever another package raises
            raise EvalError(
                f"The {self.kind} {name!r} of the entry point {point.value} cannot be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error

    def _points(self) -> Mapping[str, metadata.EntryPoint]:
        return _points_of(self._group, tuple(sys.path))


@lru_cache(maxsize=64)
def _points_of(group: str, path: tuple[str, ...]) -> Mapping[str, metadata.EntryPoint]:
    """Entry points of the packages on the path: a search opens a file of each of them."""
    return {point.name: point for point in metadata.entry_points(group=group)}


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of others, which cannot end the program."""

    @wraps(function)
    def guarded(*arguments: Any, **options: Any) -> Any:
        with foreign_code():
            return function(*arguments, **options)

    return guarded


@lru_cache(maxsize=512)
def _prepared(parts: NamedParts[Any], part: str) -> Any:
    function = parts.find(part)
    if parts.origin(part):
        function = _guarded(function)
    given = {key: value for key, value in options_of(part).items() if key not in (_FILE, _HASH)}
    where = f"The {parts.kind} {name_of(part)!r}"
    try:
        parameters = inspect.signature(function).parameters.values()
        hints = get_type_hints(function) if given else {}
    except (NameError, TypeError, ValueError) as error:
        raise EvalError(f"{where} has no parameters and types that can be read: {error}") from error
    keywords = {item.name: item for item in parameters if item.kind == item.KEYWORD_ONLY}
    for name in given.keys() - keywords.keys():
        known = f"It has {', '.join(keywords)}." if keywords else "It has none."
        raise EvalError(f"{where} has no option {name!r}.{suggestion(name, keywords)} {known}")
    missing = [name for name, item in keywords.items() if item.default is item.empty and name not in given]
    if missing:
        raise EvalError(f"{where} needs the option {missing[0]!r}: {{name: {name_of(part)}, {missing[0]}: ...}}.")
    if not given:
        return function
    try:
        read = {
            name: read_value(hints.get(name, Any), value, source=where, where=name) for name, value in given.items()
        }
    except ConfigError as error:
        raise EvalError(str(error)) from error
    return partial(function, **read)
