"""What an adapter's options may be: numbers, words that PEFT's annotations list, and names of modules.

PEFT checks no types, and some of its options name files, models or Python modules, which it opens. A value is permitted
for what it is, so that an option of a later PEFT that names a file is refused, too.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import peft

from mm_moslora.utils.errors import AdapterError

_MODULES = (
    "target_modules", "exclude_modules", "modules_to_save", "feedforward_modules", "layers_pattern",
    "target_parameters", "target_modules_bd_a", "target_modules_bd_b",
)  # fmt: skip
"""Options that hold names of modules, or regular expressions for them."""
_BY_MODULE = ("trainable_token_indices", "target_svd_config")
"""Mappings with names of modules as keys, besides those whose name ends in `_pattern`."""
_MODULE = re.compile(r"[^/~:\x00-\x1f]{0,1000}")
"""Names of modules and regular expressions for them; no path with a folder and no address."""
_ENDLESS = re.compile(r"\)[*+{]")
"""A group that repeats: its search can take exponential time, and names of modules need none."""
_WIDE = re.compile(r"(?:\.|\\[wWDS]|\])[*+{]")
"""A repetition that matches almost anything; each multiplies the time of a search by the length of a name."""
_MOST_WIDE = 4
_WORDS = {
    "bias": r"none|all|[a-z0-9]+_only",
    "act_fn": r"[a-z0-9_]+",  # of transformers' table
    "wavelet_family": r"[a-z]+[0-9.]*",  # of a table in PEFT
    "init_lora_weights": "lora_ga",  # besides the annotated ones
    "init_weights": "uniform",  # TinyLoRA annotates a text
    "mixer_init": r"[a-z_]+",
    "mixer_pattern": r"[a-z_]+",
    "factor_form": r"[a-z_]+",
}
"""Options whose words are in no annotation; PEFT or this package checks them against a table."""
_OF_FOLDERS = {item.name for item in dataclasses.fields(peft.PeftConfig)}
"""Fields about the folder itself (the name of the base, `auto_mapping` and others), which no layer reads."""


def permitted_options(kind: type[Any], options: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The method's own options in a folder or a recipe, without what its configuration does not know."""
    hints = typing.get_type_hints(kind)
    fields = {item.name: item for item in dataclasses.fields(kind) if item.init and item.name not in _OF_FOLDERS}
    for name, value in ((name, value) for name, value in options.items() if name in fields):
        if value != fields[name].default and (odd := next(_refused(name, value, hints[name]), None)):
            raise AdapterError(
                f"{source} sets {odd[0]} to {odd[1]!r}. Options may be numbers, words that PEFT lists, and names of "
                "modules; others may name files, models or code, which PEFT would open, or never end. Leave it out."
            )
    return {name: value for name, value in options.items() if name in fields}


def _refused(name: str, value: Any, hint: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a value that are not permitted, with their names."""
    option = name.rpartition(".")[2]
    parts = list(_parts(hint))
    nested = next((part for part in parts if dataclasses.is_dataclass(part)), None)
    if value is None or isinstance(value, bool | int | float):
        return
    if isinstance(value, str):
        literals = (part for part in parts if typing.get_origin(part) is Literal)
        words = [_pattern(word) for part in literals for word in typing.get_args(part)]
        words += [_WORDS[option]] if option in _WORDS else []
        fits = any(re.fullmatch(word, value, re.IGNORECASE) for word in words)
        if not fits and not (option in _MODULES and _is_module(value)):
            yield name, value
    elif isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _refused(name, item, None)
    elif nested is not None:
        own = vars(value) if dataclasses.is_dataclass(value) else value
        inner = typing.get_type_hints(nested)
        for key, item in own.items() if isinstance(own, Mapping) else [("", object())]:
            yield from _refused(f"{name}.{key}", item, inner[key]) if key in inner else [(f"{name}.{key}", item)]
    elif isinstance(value, Mapping) and (option.endswith("_pattern") or option in _BY_MODULE):
        for key, item in value.items():
            if not (isinstance(key, str) and _is_module(key)):
                yield name, key
            yield from _refused(name, item, None)
    else:
        yield name, value


def _is_module(text: str) -> bool:
    """Whether a text is the name of a module, or an expression for some that is found in short time."""
    try:
        re.compile(text if _MODULE.fullmatch(text) else "(")
    except (re.error, RecursionError, OverflowError):
        return False
    plain = re.sub(r"\\[^wWDS]", "x", text)  # escaped signs repeat nothing
    return not _ENDLESS.search(plain) and len(_WIDE.findall(plain)) <= _MOST_WIDE


def _parts(hint: Any) -> Iterator[Any]:
    """The alternatives of an annotation."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for part in typing.get_args(hint):
            yield from _parts(part)
    else:
        yield hint


def _pattern(word: Any) -> str:
    """A word of an annotation as an expression; brackets stand for a number, as in `pissa_niter_[number of iters]`."""
    return re.sub(r"\\\[.*?\\\]", r"\\d{1,3}", re.escape(str(word)))
