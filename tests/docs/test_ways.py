"""The tables of docs/architecture.md name the files that a record, a question and a mixer pass."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_tables_of_the_ways_are_those_of_a_trace(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("ways", ROOT / "scripts/ways.py")
    assert spec is not None and spec.loader is not None  # noqa: PT018
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = script.DOCUMENT.read_text("utf-8")
    for name, way in script.ways(tmp_path).items():
        begin, end = (mark.format(name) for mark in script.MARKS)
        listed = re.findall(r"^\| \d+ \| `(\S+)`", text.partition(begin)[2].partition(end)[0], re.MULTILINE)
        assert listed == [path.as_posix() for path in way], f"{name}: run scripts/ways.py --write"
