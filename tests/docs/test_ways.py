"""The tables of docs/architecture.md name the files that a record, a question and a mixer pass."""

from __future__ import annotations

import re
from pathlib import Path

import ways
from marked_text import parts_of


def test_the_tables_of_the_ways_are_those_of_a_trace(tmp_path: Path) -> None:
    text = ways.DOCUMENT.read_text("utf-8")
    for name, way in ways.ways(tmp_path).items():
        listed = re.findall(r"^\| \d+ \| `(\S+)`", parts_of(text, name)[1], re.MULTILINE)
        assert listed == [path.as_posix() for path in way], f"{name}: run scripts/ways.py --write"
