"""What the quickstart prints to go on with can be pasted, whatever its folder is called and its parts are."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from mm_moslora.errors import ConfigError
from mm_moslora.quickstart import evaluation, run
from mm_moslora.quickstart.datasets import DatasetFiles
from mm_moslora.quickstart.run import Choice, _commands


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
    monkeypatch.setattr(run, "_quickstart", lambda *_: "Look at it.")
    monkeypatch.setattr(
        "mm_moslora.report.build_report",
        lambda folder, _: states.append(json.loads((folder / "state.json").read_text())["state"]),
    )
    for _ in range(2):
        assert run.quickstart(Choice(), output=tmp_path) == 0
    assert states == ["finished", "finished"]


@pytest.mark.parametrize("name", ["export/model.safetensors", "data/train.jsonl", "tune/notes.txt", "summary.json"])
def test_a_folder_of_the_user_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=f"already holds {name.partition('/')[0]}, and nothing shows"):
        run.quickstart(Choice(), output=tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "mine"


def test_an_export_that_no_quickstart_made_is_left_alone(tmp_path: Path) -> None:
    mine = tmp_path / "export" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(ConfigError, match="export is in the way and is not deleted"):
        run._export(tmp_path)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "{", "[]", '"x"'])
def test_damaged_notes_of_an_earlier_call_are_made_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "timing.json").write_text(text)
    assert run._Clock(tmp_path).total == 0
    (tmp_path / "evaluation.json").write_text(text or "{}")
    assert not evaluation._measured(tmp_path / "evaluation.json")


def test_a_run_folder_is_named_by_what_was_chosen() -> None:
    assert Choice().name == "quickstart"
    assert Choice(images="stamps", smoke=True).name == "quickstart-stamps-smoke"
    assert Choice(encoder="open_clip", precision="fp32", seed=2).name == "quickstart-open_clip-fp32-seed2"


def test_seed_and_precision_reach_both_stages(tmp_path: Path) -> None:
    files = DatasetFiles(
        images=tmp_path, align=tmp_path / "a", train=tmp_path / "b", test=tmp_path / "c", train_pictures=1, questions=1
    )
    choice = Choice(precision="fp32", seed=3)
    parts, plan = run._Parts(language=tmp_path, vision="v"), run.PLANS["easy-vqa", False]
    for recipe in run.recipes(parts, files, tmp_path, plan, choice):
        assert (recipe.train.seed, recipe.train.precision) == (3, "fp32")
