"""A run folder of a stranger may hold anything. Its page is written, and the runs beside it are shown."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from mm_moslora.reporting import build_report
from mm_moslora.reporting.run_page import MOST_RUNS
from mm_moslora.serve.dashboard.dashboard_app import create_board
from tests.odd_values import ODD, damaged, places

FILES = ("summary.json", "evaluation.json", "samples.json", "mixers.json", "state.json")
AGREED = ("format",)
"""Keys that decide whether a run is read."""


def _shown(good: Path, *bad: Path) -> None:
    """Each damaged run has a page, as many as a page takes have one with the good run, and all are on one board."""
    out = good.parent / "page.html"
    for run in bad:
        build_report([run], out)
    for first in range(0, len(bad), MOST_RUNS - 1):
        page = build_report([good, *bad[first : first + MOST_RUNS - 1]], out).read_text(encoding="utf-8")
        assert "Demo run" in page, "the good run is missing"
        assert "85.0" in page
    client = TestClient(create_board(good.parent), base_url="http://127.0.0.1")
    rows = {row["id"]: row for row in client.get("/api/runs").json()["runs"]}
    assert rows[good.name]["scores"] == {"shapes": 0.85}
    assert len(rows) > len(bad)  # stages that the state does not name are runs
    for name in rows:
        assert client.get("/api/run", params={"id": name}).status_code == 200


@pytest.mark.parametrize("file", FILES)
def test_runs_with_an_odd_value_anywhere_hide_no_other(run_folder: Path, file: str, tmp_path: Path) -> None:
    """Each value stands at one of the places, so that all values together reach many of them."""
    data, bad = json.loads((run_folder / file).read_text()), []
    found = [place for place in places(data) if place != AGREED]
    for number, value in enumerate(ODD):
        bad.append(shutil.copytree(run_folder, tmp_path / f"bad-{number}"))
        (bad[-1] / file).write_text(json.dumps(damaged(data, found[number * 7 % len(found)], value)))
    _shown(run_folder, *bad)


def test_recipes_that_are_no_yaml_hide_no_other_run(run_folder: Path, tmp_path: Path) -> None:
    texts = (r'"\uD800": {"a": "\uDFFF"}', "a: !!bool x", 'a: !!int ""', "a: !!timestamp x", "lr: 0x" + "f" * 298, "[")
    bad = [shutil.copytree(run_folder, tmp_path / f"bad-{number}") for number in range(len(texts))]
    for folder, text in zip(bad, texts, strict=True):
        (folder / "tune" / "config.yaml").write_text(text)
    _shown(run_folder, *bad)


def test_odd_numbers_of_a_log_hide_no_other_run(run_folder: Path, tmp_path: Path) -> None:
    keys = ("loss", "\ud800", "step", "tokens_per_second", "lr/adapter")
    bad = [shutil.copytree(run_folder, tmp_path / f"bad-{number}") for number in range(len(keys))]
    for folder, key in zip(bad, keys, strict=True):
        with (folder / "tune" / "metrics.jsonl").open("a") as stream:
            stream.writelines(json.dumps({"step": 401, key: value}) + "\n" for value in ODD)
    _shown(run_folder, *bad)


def test_a_folder_whose_name_is_no_utf_8_is_shown_beside_the_others(run_folder: Path, tmp_path: Path) -> None:
    bad = Path(os.fsdecode(os.fsencode(tmp_path) + b"/b\xff\xfe"))
    shutil.copytree(run_folder, bad)
    (bad / "summary.json").write_text("{}")
    _shown(run_folder, bad)
    client = TestClient(create_board(tmp_path), base_url="http://127.0.0.1")
    assert {row["id"] for row in client.get("/api/runs").json()["runs"]} == {"run", r"b\xff\xfe"}
    assert client.get("/api/run", params={"id": r"b\xff\xfe"}).json()["tasks"]
    assert TestClient(create_board(bad), base_url="http://127.0.0.1").get("/api/runs").status_code == 200
