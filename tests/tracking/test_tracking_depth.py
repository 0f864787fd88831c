"""Evaluations with their adapter, alerts and the environment, read back from every tracker."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml
from trials import colour_task, make_recipe, write
from waiting import wait_until

from mm_moslora.config import TRACKERS, TrackConfig, ValidateConfig
from mm_moslora.tracking import SampleAnswer, Trackers, build_trackers, run_environment
from mm_moslora.tracking.run_environment import git_state
from mm_moslora.tracking.tracker import adapter_digest
from mm_moslora.utils.errors import ConfigError
from tests.tracking.tracked_run import SECRET, everything

CANARY = "pa55word-canary"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "moslora.safetensors").write_bytes(b"weights")
    return folder


def no_secret_below(folder: Path) -> None:
    assert [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()] == []


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed (make test-extras)")


def test_wandb_offline_file_holds_all_of_it(
    tmp_path: Path, sample: SampleAnswer, adapter: Path, read_run: Callable[[Path], dict[str, Any]]
) -> None:
    trackers = build_trackers(TrackConfig(trackers=["wandb"]), active=True)
    everything(trackers, tmp_path / "run", sample, adapter)
    assert trackers.names == ["jsonl", "wandb"]
    run = read_run(tmp_path / "run")
    rows = {key: value for row in run["history"] for key, value in row.items()}
    assert rows["adapter/mixer/moved"] == pytest.approx(0.3)
    assert rows["eval/shapes"] == 0.8
    assert run["alerts"] == [("Save failed", "Step 2: [redacted]")]
    assert {kind for kind, *_ in run["artifacts"]} >= {"adapter", "evaluation"}
    assert run["summary"]["eval/adapter"] == adapter_digest(adapter)
    assert "torch" in run["config"]["environment"]
    tables = [
        json.loads(path.read_text()) for name, path in run["files"] if name.endswith("table.json") and path.is_file()
    ]
    assert ["shapes", "tuned", 50, 0.8, 0.7, 0.9] in [row for table in tables for row in table["data"]]
    no_secret_below(tmp_path / "run")


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_the_command_line_and_remotes_reach_no_tracker_with_their_secrets(
    tmp_path: Path, sample: SampleAnswer, adapter: Path, tracker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb records `sys.argv` and the remote of the working folder by itself, in its binary file and beside it."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for arguments in ("init -q", f"remote add origin https://me:{CANARY}@example.org/x.git"):
        subprocess.run(["git", "-C", str(folder), *arguments.split()], check=True, capture_output=True)
    monkeypatch.chdir(folder)
    command = ["mm-moslora", "--url", f"https://me:{CANARY}@example.org/v1", "--api-key", CANARY, "--note=kept-word"]
    monkeypatch.setattr("sys.argv", command)
    everything(build_trackers(TrackConfig(trackers=[tracker]), active=True), tmp_path / "run", sample, adapter)
    if tracker == "wandb":  # its service writes a moment later
        wait_until(lambda: below(tmp_path / "run", "kept-word"), "the search cannot find what is there")
    assert below(tmp_path / "run", CANARY) == []


def below(folder: Path, text: str) -> list[Path]:
    """Files that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_tensorboard_holds_scores_and_alerts(tmp_path: Path, sample: SampleAnswer, adapter: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    everything(build_trackers(TrackConfig(trackers=["tensorboard"]), active=True), tmp_path / "run", sample, adapter)
    reader = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    reader.Reload()
    assert b"| shapes | tuned | 50 |" in reader.Tensors("evaluation/text_summary")[0].tensor_proto.string_val[0]
    assert b"Save failed" in reader.Tensors("alerts/text_summary")[0].tensor_proto.string_val[0]
    assert reader.Scalars("adapter/mixer/moved")[0].value == pytest.approx(0.3)
    no_secret_below(tmp_path / "run")


@needs("mlflow")
def test_mlflow_api_gives_it_back_and_a_resume_goes_on_in_the_same_run(
    tmp_path: Path, sample: SampleAnswer, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for resume_step in (None, 2):
        trackers = build_trackers(TrackConfig(trackers=["mlflow"], project="tests"), active=True)
        everything(trackers, tmp_path / "run", sample, adapter, resume_step=resume_step)
        assert trackers.names == ["jsonl", "mlflow"]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'run' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tests")
    (run,) = client.search_runs([experiment.experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3), (4, 0.25)]
    assert run.info.status == "FINISHED"
    assert run.data.params["optim.lr"] == "0.0001"
    assert run.data.params["note"] == "[redacted]"
    assert run.data.metrics["eval/shapes"] == 0.8
    assert run.data.tags["adapter.sha256"] == adapter_digest(adapter)
    scores = json.loads(Path(client.download_artifacts(run.info.run_id, "evaluation/step-2.json")).read_text())
    assert (scores["adapter"], scores["rows"][0]["mean"]) == (adapter_digest(adapter), 0.8)
    assert run.data.tags["alert.save_failed"] == "Step 2: [redacted]"
    assert [item.path for item in client.list_artifacts(run.info.run_id, "adapter/latest")] == [
        "adapter/latest/adapter_config.json", "adapter/latest/moslora.safetensors",
    ]  # fmt: skip
    answers = json.loads(Path(client.download_artifacts(run.info.run_id, "samples/answers/2.json")).read_text())
    assert answers["samples"][0]["prediction"] == "<b>red</b>"
    no_secret_below(tmp_path / "run")


@needs("trackio")
def test_trackio_gives_it_back(tmp_path: Path, sample: SampleAnswer, adapter: Path) -> None:
    """In a process of its own: trackio reads its folder from the environment once."""
    code = (
        "import sys; from pathlib import Path; from mm_moslora.tracking import SampleAnswer, build_trackers\n"
        "from mm_moslora.config import TrackConfig; from tests.tracking.tracked_run import everything\n"
        "root = Path(sys.argv[1]); config = TrackConfig(trackers=['trackio'], project='tests', name='run')\n"
        "trackers = build_trackers(config, active=True)\n"
        "sample = SampleAnswer(question='q', expected='red', prediction='red', image=root / 'picture.png')\n"
        "everything(trackers, root / 'run', sample, root / 'adapter')\n"
        "assert trackers.names == ['jsonl', 'trackio'], trackers.names\n"
        "from trackio.sqlite_storage import SQLiteStorage as s\n"
        "logs = s.get_logs('tests', 'run'); print([l['train/loss'] for l in logs if 'train/loss' in l])\n"
        "print(any(l.get('eval/shapes') == 0.8 for l in logs))\n"
        "print(s.get_run_config('tests', 'run')['note'])\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=240, cwd=root,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "[1.0, 0.5]" in done.stdout
    assert "True" in done.stdout
    assert "[redacted]" in done.stdout
    no_secret_below(tmp_path / "store")


def test_a_tracker_that_is_not_installed_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mm_moslora.tracking.is_installed", lambda _: False)
    for name in TRACKERS:
        with pytest.raises(ConfigError, match=rf"pip install '{name}>="):
            build_trackers(TrackConfig(trackers=[name]), active=True)


def test_git_state_names_commit_and_change_and_no_remote(tmp_path: Path, monkeypatch) -> None:
    assert git_state(tmp_path) == {}
    for command in (
        "init -q", "remote add origin https://me:secret@example.org/x.git", "config user.email a@b.c",
        "config user.name a",
    ):  # fmt: skip
        subprocess.run(["git", "-C", str(tmp_path), *command.split()], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run(["git", "-C", str(tmp_path), "add", "a"], check=True)
    subprocess.run(["git", "-C", str(tmp_path), "commit", "-qm", "a"], check=True)
    assert [*git_state(tmp_path)] == ["git_commit"]
    assert len(git_state(tmp_path)["git_commit"]) == 40
    assert "secret" not in json.dumps(git_state(tmp_path))
    monkeypatch.setattr(run_environment, "CHECKOUT", tmp_path)  # whose code runs anyway
    assert git_state(tmp_path)["git_changed"] is False
    monkeypatch.chdir(tmp_path.parent)
    assert run_environment.environment()["code_git_commit"] == git_state(tmp_path)["git_commit"]
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path)["git_changed"] is True


def test_the_sweep_file_makes_commands_that_the_trainer_takes(tmp_path: Path) -> None:
    """The command is started as wandb's agent starts it, with a trainer that writes down its arguments."""
    from mm_moslora.config import load_recipe, override_items

    sweep = yaml.safe_load((Path(__file__).parents[2] / "examples" / "wandb_sweep.yaml").read_text())
    assert sweep["command"][-1] == "${args_no_hyphens}"
    values = [f"{name}={spec['values'][0]}" for name, spec in sweep["parameters"].items() if "values" in spec]
    values += [f"{name}={spec['min']}" for name, spec in sweep["parameters"].items() if "min" in spec]
    assert len(values) == len(sweep["parameters"])
    trainer = tmp_path / "mm-moslora"
    trainer.write_text('#!/bin/sh\nfor word in "$@"; do echo "$word"; done\n')
    trainer.chmod(0o755)
    done = subprocess.run(
        [*sweep["command"][:-1], *values], capture_output=True, text=True, check=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "WANDB_RUN_ID": "trial7"},
    )  # fmt: skip
    verb, recipe, *overrides = done.stdout.split()
    assert (verb, recipe) == ("train", "RECIPE.yaml")
    trial = load_recipe("quickstart_tune", override_items(overrides))
    assert trial.train.output == "runs/sweep/trial7"
    assert trial.track.trackers == ["wandb"]
    assert (trial.adapter.rank, trial.optim.lr) == (8, 0.00005)
    assert sweep["metric"] == {"name": "validation/loss", "goal": "minimize"}


@pytest.fixture(scope="module")
def measured_run(language_folder: Path, vision_folder: Path, records: Path, tmp_path_factory) -> Iterator[Path]:
    """A folder with a run that was trained and measured through the command line, tracked by wandb offline."""
    from mm_moslora import cli

    folder = tmp_path_factory.mktemp("measured")
    parts = {"language": language_folder, "vision": vision_folder, "records": records}
    recipe = make_recipe(parts, folder / "run", "none", steps=2, validate_every=1)
    recipe = replace(
        recipe, data=replace(recipe.data, validation=recipe.data.train), validate=ValidateConfig(samples=2),
        track=TrackConfig(trackers=["wandb"]),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", SECRET)
        patch.setenv("SLURM_JOB_ID", "4711")
        patch.chdir(Path(__file__).parents[2])  # a repository
        task = colour_task(records.parent / "images", folder)
        assert cli.run(["train", write(recipe)]) == 0
        words = [task, "--limit", "4", "--model", str(folder / "run"), "--output", str(folder / "eval")]
        assert cli.run(["eval", "run", *words]) == 0
        yield folder


@pytest.mark.slow
def test_a_run_and_its_evaluation_are_one_run_of_wandb(
    measured_run: Path,
) -> None:
    from wandb_files import read_finished

    trained, measured = (read_finished(path) for path in sorted((measured_run / "run").rglob("*.wandb")))
    assert trained["id"] == measured["id"]
    rows = {key.removesuffix("/nrows") for run in (trained, measured) for row in run["history"] for key in row}
    assert {"train/loss", "validation/loss", "train/grad_norm", "adapter/mixer/moved", "system/memory_gib"} <= rows
    assert any(name.startswith("eval/") for name in rows)
    (weights,) = (measured_run / "run").glob("checkpoint-*/adapter")
    digest = adapter_digest(weights)
    assert f"sha256-{str(digest)[:12]}" in next(a for kind, _, a in trained["artifacts"] if kind == "adapter")
    assert measured["summary"]["eval/adapter"] == digest


def test_a_run_that_is_opened_again_gets_its_recipe_without_secrets(tmp_path: Path) -> None:
    tracker = Mock()
    Trackers([tracker], active=True).reopen({"optim": {"lr": 1e-4}, "note": SECRET}, tmp_path)
    tracker.reopen.assert_called_once_with({"optim": {"lr": 1e-4}, "note": "[redacted]"}, tmp_path)
