"""A quickstart's folder, called again: with another choice, with damaged notes, with another model in it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mm_moslora_eval.run.run_claim import open_run
from trials import commit

from mm_moslora.quickstart import model_assets, quickstart_evaluation, quickstart_run
from mm_moslora.quickstart.instruction_data import DatasetFiles
from mm_moslora.quickstart.quickstart_notes import QUICKSTART, StageClock
from mm_moslora.quickstart.quickstart_run import QuickstartOptions
from mm_moslora.training.checkpointing.checkpoint_folder import Manifest
from mm_moslora.utils.errors import ConfigError
from tests.eval.eval_fake import FakeModel

SMOKE = QuickstartOptions(smoke=True)
STEPS = {"align": 4, "tune": 8}


@pytest.fixture(autouse=True)
def _parts(monkeypatch: pytest.MonkeyPatch, language_folder: Path, vision_folder: Path, easy: Path) -> None:
    """What the quickstart would fetch."""
    for name, folder in (("language_model", language_folder), ("dinov2", vision_folder), ("easy_vqa", easy)):
        monkeypatch.setattr(model_assets, name, lambda _say, folder=folder: folder)
    monkeypatch.setattr(model_assets, "check_readers", lambda *_: None)


def trained(run_folder: Path, weights: bytes = b"weights") -> None:
    """Both stages as training leaves them, as far as the quickstart looks into them."""
    _, recipes = quickstart_run._begin(run_folder, SMOKE, None)
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
    quickstart_run.mark(folder, "quickstart")
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
        quickstart_run.quickstart(dataclasses.replace(SMOKE, **change), output=finished)
    assert "train.output" not in str(refused.value)
    assert content(finished) == before


def test_data_that_a_model_was_trained_on_are_not_replaced_by_those_of_another_plan(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finished / QUICKSTART).unlink()
    monkeypatch.setitem(quickstart_run.SIZES, ("easy-vqa", True), dataclasses.replace(SMOKE.size, train_images=20))
    before = content(finished)
    with pytest.raises(ConfigError, match=r"holds other data than requested, in align.jsonl, train.jsonl, and a"):
        quickstart_run.quickstart(SMOKE, output=finished)
    assert content(finished) == before


def test_a_part_that_cannot_be_fetched_leaves_a_finished_run_finished(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_say: object) -> Path:
        raise model_assets.AssetError("no network")

    monkeypatch.setattr(model_assets, "language_model", fail)
    before = content(finished)
    with pytest.raises(model_assets.AssetError):
        quickstart_run.quickstart(SMOKE, output=finished)
    assert content(finished) == before


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '"x"', '{"align": "x"}', '{"align": null}', '{"align": {}}', '{"align": NaN}', "\xff"]
)
def test_damaged_times_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    (tmp_path / "timing.json").write_text(text, encoding="latin-1")
    clock = StageClock(tmp_path)
    with clock.stage("align"):
        pass
    assert clock.total < 60
    assert "timing.json is damaged" in caplog.text


@pytest.mark.parametrize("text", ["", "{}", "[]", '[{"name": "tuned"}]', "[1]", '[{"categories": 3}]'])
def test_damaged_scores_are_measured_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    assert quickstart_evaluation.measured(tmp_path, {}) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"tokens_per_image": "x", "memory_gib": 1}'])
@pytest.mark.parametrize("earlier", [True, False])
def test_a_damaged_summary_of_the_tuned_stage_ends_no_finished_quickstart(
    finished: Path, easy: Path, text: str, earlier: bool
) -> None:
    summary = finished / "summary.json"
    if earlier:
        summary.write_text('{"tokens_per_image": 9, "memory_gib": 1.5, "learned": 1}')
    (finished / "tune" / "summary.json").write_text(text)
    data = DatasetFiles.below(finished / "data", easy)
    quickstart_run._summarise(finished, data, SMOKE, clock=StageClock(finished), exported={"stock": True})
    said = json.loads(summary.read_text())
    assert said["description"].startswith("dinov2 + 9 visual tokens + Smol" if earlier else "dinov2 + Smol")
    assert said["memory_gib"] > 0


ROW = {"name": "tuned", "label": "Tuned", "n": 4, "mean": 0.5, "low": 0.1, "high": 0.9, "categories": {}}


def test_scores_of_another_model_or_other_data_are_not_shown(finished: Path, easy: Path) -> None:
    data = DatasetFiles.below(finished / "data", easy)
    (finished / "evaluation.json").write_text(json.dumps([ROW | quickstart_evaluation.subject_of(finished, data)]))
    assert quickstart_evaluation.measured(finished, quickstart_evaluation.subject_of(finished, data))
    for stage in ("align", "tune"):
        shutil.rmtree(finished / stage)
    trained(finished, b"others")
    assert quickstart_evaluation.measured(finished, quickstart_evaluation.subject_of(finished, data)) is None

    (finished / "evaluation.json").write_text(json.dumps([ROW | quickstart_evaluation.subject_of(finished, data)]))
    data.test.write_text(data.test.read_text().partition("\n")[0] + "\n")
    assert quickstart_evaluation.measured(finished, quickstart_evaluation.subject_of(finished, data)) is None


def test_an_export_of_another_model_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def export_model(_model: object, part: Path) -> SimpleNamespace:
        made.append(len(made) + 1)
        (part / "model.safetensors").write_text(str(len(made)))
        return SimpleNamespace(architecture="a", stock=True, max_logit_difference=0.0)

    monkeypatch.setattr("mm_moslora.models.export.export_huggingface.export_model", export_model)
    monkeypatch.setattr("mm_moslora.models.load_model.load", lambda _: None)
    monkeypatch.setattr("mm_moslora.data.preprocessing_print.check_preprocessing", lambda *_: True)
    monkeypatch.setattr("mm_moslora.data.preprocessing_print.hand_on_preprocessing", lambda *_: None)
    for model, count in (("one", 1), ("one", 1), ("two", 2), ("two", 2)):
        quickstart_run._export(tmp_path, model=model)
        assert (tmp_path / "export" / "model.safetensors").read_text() == str(count)
    (tmp_path / "export.json").write_text('{"model": "two"}')
    assert quickstart_run._export(tmp_path, model="two")["stock"]


def test_answers_of_another_model_are_kept_aside(tmp_path: Path) -> None:
    place = tmp_path / "own"
    for name, aside in (("first", False), ("first", False), ("second", True)):
        model = FakeModel(fingerprint=name)
        quickstart_evaluation._set_aside_other(place, model)
        with open_run(place, model):
            pass
        assert (tmp_path / "own.other").is_dir() == aside
