"""A run folder of a stranger may hold anything. Its page is written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mm_moslora.reporting import build_report
from tests.odd_values import ODD, damaged, places

FILES = ("summary.json", "evaluation.json", "samples.json", "mixers.json", "state.json")
AGREED = ("format",)
"""Keys that decide whether a run is read."""


@pytest.mark.parametrize("file", FILES)
def test_a_run_with_an_odd_value_anywhere_has_a_page(run_folder: Path, file: str, tmp_path: Path) -> None:
    """Each value stands at one of the places, so that all values together reach many of them."""
    data = json.loads((run_folder / file).read_text())
    found = [place for place in places(data) if place != AGREED]
    for number, value in enumerate(ODD):
        (run_folder / file).write_text(json.dumps(damaged(data, found[number * 7 % len(found)], value)))
        build_report(run_folder, tmp_path / "page.html")


def test_a_recipe_that_is_no_yaml_hides_nothing_else(run_folder: Path, tmp_path: Path) -> None:
    texts = (r'"\uD800": {"a": "\uDFFF"}', "a: !!bool x", 'a: !!int ""', "a: !!timestamp x", "lr: 0x" + "f" * 298, "[")
    for text in texts:
        (run_folder / "config.yaml").write_text(text)
        assert "85.0" in build_report(run_folder, tmp_path / "page.html").read_text(encoding="utf-8")


def test_odd_numbers_of_a_log_hide_nothing_else(run_folder: Path, tmp_path: Path) -> None:
    for key in ("loss", "\ud800", "step", "tokens_per_second", "lr/adapter"):
        with (run_folder / "metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps({"step": 401, key: value}) + "\n" for value in ODD)
        assert "85.0" in build_report(run_folder, tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_folder_whose_name_is_no_utf_8_has_a_page(run_folder: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff\xfe"))
    shutil.copytree(run_folder, odd)
    (odd / "summary.json").write_text("{}")
    assert "85.0" in build_report(odd, tmp_path / "page.html").read_text(encoding="utf-8")
