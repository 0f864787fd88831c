"""The quickstart's folder: which commands run there, and what is left alone when it is called again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mm_moslora.config import load_recipe
from mm_moslora.quickstart import model_assets, quickstart_run
from mm_moslora.utils.errors import ConfigError

Command = list[str]
Commands = tuple[list[Command], dict[str, int]]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, language_folder: Path, vision_folder: Path, easy: Path) -> Commands:
    """The commands of a quickstart that fetches nothing, and the exit codes that they are to have, by verb."""
    for name, folder in (("language_model", language_folder), ("dinov2", vision_folder), ("easy_vqa", easy)):
        monkeypatch.setattr(model_assets, name, lambda _say, folder=folder: folder)
    monkeypatch.setattr(model_assets, "check_readers", lambda: None)
    called, codes = list[Command](), dict[str, int]()

    return called, codes


def quickstart(commands: Commands, output: Path, **changes: Any) -> int:
    """Call it, with a size for tests."""
    called, codes = commands

    def run(words: Command) -> int:
        called.append(words)
        return codes.get(words[0], 0)

    options: dict[str, Any] = {"precision": "auto", "seed": 0, "smoke": True}
    return quickstart_run.quickstart(run, output=output, **(options | changes))


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("failing", "expected"), [("", 5), ("train", 1), ("eval", 3), ("export", 4)])
def test_the_verbs_run_in_order_until_one_fails(
    tmp_path: Path, commands: Commands, failing: str, expected: int
) -> None:
    called, codes = commands
    codes[failing] = 75
    assert quickstart(commands, tmp_path / "my run") == (75 if failing else 0)
    assert [words[0] for words in called] == ["train", "train", "eval", "export", "report"][:expected]


def test_seed_precision_and_the_first_stage_reach_the_recipes(tmp_path: Path, commands: Commands) -> None:
    quickstart(commands, tmp_path / "q", seed=3, precision="fp32")
    align, tune = (load_recipe(words[1]) for words in commands[0][:2])
    assert [(recipe.train.seed, recipe.train.precision) for recipe in (align, tune)] == [(3, "fp32")] * 2
    assert tune.model.projector.weights == align.train.output
    assert Path(align.data.train[0].path).is_file()
    assert Path(tune.data.train[0].path).is_file()


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"precision": "fp32"}, {"smoke": False}], ids=["seed", "precision", "size"]
)
def test_another_quickstart_in_the_folder_is_refused_and_changes_nothing(
    tmp_path: Path, commands: Commands, changes: dict[str, object]
) -> None:
    folder = tmp_path / "q"
    quickstart(commands, folder)
    before, ran = content(folder), len(commands[0])
    with pytest.raises(ConfigError, match=r"another quickstart.*Choose another --output"):
        quickstart(commands, folder, **changes)
    assert (content(folder), len(commands[0])) == (before, ran)
    quickstart(commands, folder)


def test_data_that_a_model_was_trained_on_are_not_replaced(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "q"
    quickstart(commands, folder)
    (folder / "tune" / "checkpoint-000001").mkdir(parents=True)
    (folder / "tune" / "checkpoint-000001" / "manifest.json").write_text("{}")
    monkeypatch.setattr(quickstart_run, "TURNS", 4)
    with pytest.raises(ConfigError, match=r"holds other data than requested, in train\.jsonl, and a"):
        quickstart(commands, folder)


@pytest.mark.parametrize("name", ["align.yaml", "data/train.jsonl", "tune/notes.txt"])
def test_a_folder_of_the_user_is_refused_before_anything_is_written(
    tmp_path: Path, commands: Commands, name: str
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match=f"already holds {name.partition('/')[0]}, and nothing shows"):
        quickstart(commands, tmp_path)
    assert content(tmp_path) == {tmp_path / name: b"mine"}
    assert not commands[0]


def test_an_export_that_exists_is_left_as_it_is(tmp_path: Path, commands: Commands) -> None:
    folder = tmp_path / "q"
    quickstart(commands, folder)
    (folder / "export").mkdir()
    quickstart(commands, folder)
    assert [words[0] for words in commands[0][5:]] == ["train", "train", "eval", "report"]
