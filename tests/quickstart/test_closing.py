"""What the quickstart prints to go on with can be pasted, whatever its folder is called and its parts are."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from mm_moslora.quickstart import run
from mm_moslora.quickstart.run import _commands


@pytest.mark.parametrize("stock", [True, False])
def test_commands_survive_blanks_and_ask_for_a_layout_that_holds_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stock: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = {what: shlex.split(text)[1:] for what, text in _commands(tmp_path / "my run", Path("/a b"), stock=stock)}
    assert commands["Talk to it"] == ["chat", "my run/tune", "--image", "PICTURE"]
    assert commands["Hand it on"] == ["export", "my run/tune", "my run/handed-on", *([] if stock else ["--to", "hf"])]
    assert commands["Measure it again"][:3] == ["eval", "run", "llava:my run/data/test.jsonl@/a b"]


def test_the_report_is_written_when_the_run_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    monkeypatch.setattr(run, "_quickstart", lambda folder, **_: "Look at it.")
    monkeypatch.setattr(
        "mm_moslora.report.build_report",
        lambda folder, _: states.append(json.loads((folder / "state.json").read_text())["state"]),
    )
    assert run.quickstart(output=tmp_path) == 0
    assert states == ["finished"]
