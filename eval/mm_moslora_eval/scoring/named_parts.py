"""The parts of a protocol by name: those of this package, of the benchmarks' `rules.py`, and of imported files.

A task names a part alone (`metric: within`) or with options, the keyword-only parameters of its function:

    metric: {name: within, relative: 0.05}

Within this package both are one text, the name with its options as JSON, so that rules are compared, stored and shown
alike. A file that `--import` names adds functions with `add`.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache, partial, wraps
from typing import Any, Generic, TypeVar, get_type_hints

from mm_moslora.launch.imported_code import foreign_code, origin_of
from mm_moslora.utils.errors import ConfigError, EvalError, suggestion
from mm_moslora.utils.untrusted_data import StrictJsonError, parse_object, read_value
from mm_moslora_eval.sources.document import Document
from mm_moslora_eval.task_files.task_rules import all_rules, rule

Extractor = Callable[[str, Document], str]
Metric = Callable[[str, Document], float]
F = TypeVar("F", bound=Callable[..., Any])
KINDS = ("extraction", "metric", "aggregation", "over_samples")
"""Kinds of parts, which are keys of a task file."""


def part_text(kind: str, value: Any) -> Any:
    """The text of a part that a task file gives as a mapping; anything else is returned as it is."""
    if not isinstance(value, Mapping):
        return value
    options = {str(key): item for key, item in value.items() if key != "name"}
    name = value.get("name")
    if not isinstance(name, str) or " " in name:
        raise EvalError(f"{kind} is {dict(value)!r}, expected a mapping with `name` and the options of that {kind}.")
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
    """The functions of one kind. A key is a name, or a name with options; iterating gives the names."""

    def __init__(self, kind: str, shipped: Mapping[str, F], *, table: str = "") -> None:
        self.kind, self._shipped, self._table = kind, dict(shipped), table
        self._added: dict[str, F] = {}

    def add(self, function: F) -> F:
        """Add a function of an imported file under its own name, also as a decorator."""
        name = function.__name__
        if self._known(name) is not None and name not in self._added:
            raise EvalError(f"{self.kind} {name!r} is one of this package. Give the function another name.")
        self._added[name] = function
        _prepared.cache_clear()
        return function

    def __getitem__(self, part: str) -> F:
        """The function, with its options."""
        return _prepared(self, part)  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        yield from (*self._shipped, *(all_rules(self._table) if self._table else ()), *self._added)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, part: object) -> bool:
        """Whether the name is known."""
        return isinstance(part, str) and self._known(name_of(part)) is not None

    def _known(self, name: str) -> F | None:
        own = self._shipped.get(name) or self._added.get(name)
        return own or (rule(self._table, name) if self._table else None)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def check(self, part: str, *, also: Collection[str] = ()) -> None:
        """Refuse a part that no task can have."""
        name = name_of(part)
        if part not in self:
            if part in also:
                return
            known = [*self, *also]
            raise EvalError(
                f"{self.kind} {name!r} is not known.{suggestion(name, known)} Known: {', '.join(known)}. "
                "A file of your own that adds it is named on the command line: --import FILE.py."
            )
        self[part]

    def origin(self, part: str) -> dict[str, str]:
        """File and hash of a function of an imported file, for results; empty for one of this package."""
        added = self._added.get(name_of(part))
        return {} if added is None else origin_of(added)

    def meaning(self, name: str) -> str:
        """What a name stands for, and its options: the beginning of the docstring of its function."""
        function: Any = self.find(name)
        text = getattr(function, "func", getattr(function, "read", function)).__doc__ or ""
        parameters = inspect.signature(function).parameters.values()
        options = ", ".join(f"`{item.name}`" for item in parameters if item.kind == item.KEYWORD_ONLY)
        return " ".join(text.split("\n\n")[0].split()) + (f" Options: {options}." if options else "")

    def find(self, part: str) -> F:
        """The function without its options; see `__getitem__`."""
        found = self._known(name_of(part))
        if found is None:
            raise KeyError(part)
        return found


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
    given = options_of(part)
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
