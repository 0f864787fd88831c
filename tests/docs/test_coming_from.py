"""The way from LLaVA: every key that is named exists."""

from __future__ import annotations

import re

import pytest

from mm_moslora.config import load_recipe
from mm_moslora.config.recipe_keys import leaves
from tests.docs.blocks import ROOT


@pytest.fixture(scope="module")
def rows() -> list[tuple[str, str]]:
    """Both columns of the table."""
    text = (ROOT / "docs" / "tutorials" / "coming_from.md").read_text(encoding="utf-8")
    table = text[text.index("| LLaVA | here |") :].partition("\n\n")[0]
    lines = [line for line in table.splitlines() if line.startswith(("| `", "| none"))]
    return [(left, right) for left, right in (line.strip("| ").split(" | ") for line in lines)]


def test_every_key_of_the_table_exists(rows: list[tuple[str, str]]) -> None:
    recipe = load_recipe("llava15_7b_pretrain").to_dict()
    known = set(leaves(recipe)) | {"data.train", "data.validation", "track.trackers"}
    keys = {key for _, right in rows for key in re.findall(r"`([a-z_]+\.[a-z_.]+)\b", right)}
    assert len(keys) > 25
    assert keys <= known, keys - known


def test_what_a_row_sets_is_a_recipe(rows: list[tuple[str, str]]) -> None:
    for _, right in rows:
        for key, value in re.findall(r"`([a-z_]+\.[a-z_.]+): ([^`]+)`", right):
            load_recipe("llava15_7b_pretrain", [f"{key}={value}"])
