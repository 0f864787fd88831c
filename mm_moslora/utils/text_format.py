"""Text for people, and whole numbers in environment variables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mm_moslora.utils.errors import ConfigError

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
LARGEST_PORT = 65_535
LARGEST_NUMBER = 10**9
"""Largest whole number that an environment variable may hold."""


def whole_number(
    environment: Mapping[str, str], name: str, default: int, *, least: int = 0, most: int = LARGEST_NUMBER
) -> int:
    """The number in an environment variable."""
    text = environment.get(name, "").strip()
    if not text:
        return default
    # Python reads digits of other scripts, and refuses very many.
    if not (text.isascii() and text.isdecimal() and len(text) < 20 and least <= int(text) <= most):
        up_to = "" if most == LARGEST_NUMBER else f" to {most}"
        raise ConfigError(
            f"The environment variable {name} is {text[:80]!r}, expected a whole number from {least}{up_to}. A "
            "launcher or a scheduler sets it; correct it, or unset it."
        )
    return int(text)


def visible(text: str) -> str:
    """Text without control characters, which terminals obey, and without unpaired surrogates, such as in file names."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def split_commas(text: str) -> list[str]:
    """Split at commas outside brackets; empty parts are dropped."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table with aligned columns, a line of dashes below the head."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [["-" * width for width in widths], *rows]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in (head, *lines))
    return ["  ".join(row).rstrip() for row in padded]


def format_seconds(seconds: float) -> str:
    """`42 s`, `3 min 05 s` or `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
