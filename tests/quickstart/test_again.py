"""A quickstart's folder, called again: with another choice, with damaged notes, with another model in it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from mm_moslora.errors import ConfigError
from mm_moslora.quickstart import assets, run
from mm_moslora.quickstart.notes import QUICKSTART
from mm_moslora.quickstart.run import Choice
from mm_moslora.training.checkpoint import Manifest
from mm_moslora.training.commit import commit

SMOKE = Choice(smoke=True)
STEPS = {"align": 4, "tune": 8}


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch, language_folder: Path, vision_folder: Path, easy: Path) -> None:
    """What the quickstart would fetch."""
    for name, folder in (("language_model", language_folder), ("dinov2", vision_folder), ("easy_vqa", easy)):
        monkeypatch.setattr(assets, name, lambda _say, folder=folder: folder)
    monkeypatch.setattr(assets, "check_readers", lambda *_: None)


def trained(run_folder: Path, weights: bytes = b"weights") -> None:
    """Both stages as training leaves them, as far as the quickstart looks into them."""
    _, recipes = run._begin(run_folder, SMOKE, None)
    for recipe in recipes:
        place = Path(recipe.train.output)
        place.mkdir(parents=True, exist_ok=True)

        def write(part: Path) -> None:
            (part / "adapter").mkdir()
            (part / "adapter" / "adapter_model.safetensors").write_bytes(weights)
            (part / "projector.safetensors").write_bytes(b"projector of " + weights)

        commit(
            place,
            Manifest(
                step=STEPS[place.name], world_size=1, recipe=recipe.to_dict(), base={}, counters={}, trainable={},
                files={},
            ),
            write,
        )  # fmt: skip


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder in which a small quickstart ended."""
    folder = tmp_path / "q"
    (folder / "data").mkdir(parents=True)
    run.mark(folder, "quickstart")
    (folder / "run.lock").touch()
    trained(folder)
    (folder / "state.json").write_text('{"state": "finished", "ended": 1.0}')
    return folder


def content(folder: Path) -> dict[str, object]:
    """Every file, but for those that say which process looked last."""
    files = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    return {
        str(name): json.loads(path.read_bytes()) if name.name == "state.json" else path.read_bytes()
        for name, path in files.items()
        if name.name != "run.lock" and name.parts[0] != "heartbeat"
    }


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "older"])
@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": 1}, "seed"), ({"precision": "fp32"}, "precision"), ({"smoke": False}, "steps")],
    ids=["seed", "precision", "plan"],
)
def test_another_quickstart_is_refused_and_changes_nothing(
    finished: Path, change: dict[str, object], said: str, noted: bool
) -> None:
    if not noted:
        (finished / QUICKSTART).unlink()
    before = content(finished)
    with pytest.raises(ConfigError, match=rf"holds another quickstart: .*{said}.*Choose another --output") as refused:
        run.quickstart(dataclasses.replace(SMOKE, **change), output=finished)
    assert "train.output" not in str(refused.value)
    assert content(finished) == before


def test_data_that_a_model_was_trained_on_are_not_replaced_by_those_of_another_plan(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished / QUICKSTART).unlink()
    monkeypatch.setitem(run.PLANS, ("easy-vqa", True), dataclasses.replace(SMOKE.plan, train_images=20))
    before = content(finished)
    with pytest.raises(ConfigError, match=r"holds other data than are asked for, in align.jsonl, train.jsonl, and a"):
        run.quickstart(SMOKE, output=finished)
    assert content(finished) == before


def test_a_part_that_cannot_be_fetched_leaves_a_finished_run_finished(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_say: object) -> Path:
        raise assets.AssetError("no network")

    monkeypatch.setattr(assets, "language_model", fail)
    before = content(finished)
    with pytest.raises(assets.AssetError):
        run.quickstart(SMOKE, output=finished)
    assert content(finished) == before
