"""Texts that lie in files beside a data set, such as the subtitles of a video."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mm_moslora.utils.untrusted_files import FileError, read_text_below

if TYPE_CHECKING:
    from mm_moslora.data.images.record_picture import PictureRules

_TIMES = re.compile(r"\d+:\d+:\d+[.,]\d+\s*-->")
_MARKUP = re.compile(r"<[^<>]{0,200}>|\{\\[^{}]{0,200}\}")


def texts_beside(names: Mapping[str, str], rules: PictureRules) -> tuple[dict[str, str], str | None]:
    """The texts of files below the folder of the data, and the first problem.

    Args:
        names: column -> file; a file that does not exist is an empty text, of subtitles (.srt) the spoken lines count.
        rules: where files may lie.
    """
    found: dict[str, str] = {}
    for column, name in names.items():
        try:
            text = read_text_below(rules.folder, name) or ""
        except (FileError, UnicodeDecodeError) as error:
            return found, f"the {column} cannot be read: {error}"
        found[column] = spoken_lines(text) if name.endswith(".srt") else text
    return found, None


def spoken_lines(subtitles: str) -> str:
    """The lines of SubRip subtitles without numbers, times and markup; a line that is shown on is kept once."""
    spoken: list[str] = []
    lines = subtitles.replace("\r", "").split("\n")
    for number, line in enumerate(lines):
        following = lines[number + 1] if number + 1 < len(lines) else ""
        plain = _MARKUP.sub("", line).strip()
        counted = plain.isdecimal() and _TIMES.match(following.strip())
        if plain and not counted and not _TIMES.match(plain) and plain not in spoken[-1:]:
            spoken.append(plain)
    return "\n".join(spoken)
