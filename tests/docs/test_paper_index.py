"""docs/paper_index.md names modules and functions that exist, in every row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.blocks import ROOT

ROWS = [
    row for row in (ROOT / "docs" / "paper_index.md").read_text().splitlines() if row.startswith("| ") and "`" in row
]
PLACE = re.compile(r"`(?P<file>[\w/]+\.py)(?:: (?P<names>[\w., ]+))?`")
BELOW = ("", "mm_moslora", "eval/mm_moslora_eval/metrics")


def found(place: str) -> Path:
    """The file of a place.

    Raises:
        AssertionError: no folder, or more than one, holds it.
    """
    files = [ROOT / folder / place for folder in BELOW if (ROOT / folder / place).is_file()]
    assert len(files) == 1, f"{place} is {files}"
    return files[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_method_has_its_module(row: str):
    places = list(PLACE.finditer(row))
    assert places
    for place in places:
        text = found(place["file"]).read_text()
        names = (place["names"] or "").split(", ")
        for name in filter(None, names):
            assert re.search(rf"^\s*(def|class) {name.split('.')[-1]}\b", text, re.M), f"{place['file']} has no {name}"
