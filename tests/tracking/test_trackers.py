"""What trackers wrote is read back with the readers that people use."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from waiting import wait_until

from mm_moslora.config import TrackConfig
from mm_moslora.tracking import JsonlTracker, SampleAnswer, Trackers, build_trackers, read_metrics
from mm_moslora.tracking.tensorboard_tracker import TensorBoardTracker
from mm_moslora.tracking.tracker import MOST_FAILURES
from mm_moslora.tracking.wandb_tracker import WandbTracker

CHECKOUT = Path(__file__).parents[2]
ReadRun = Callable[[Path], dict[str, Any]]


class _Failing:
    name = "failing"

    def __init__(self) -> None:
        self.calls = 0

    def start(self, config: Mapping[str, Any], run_folder: Path, *, resume_step: int | None) -> None: ...

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls += 1
        raise ConnectionError("service at https://me:hunter2pw@example.org is gone")

    def log_samples(self, title: str, samples: Sequence[SampleAnswer], step: int) -> None: ...

    def log_folder(self, title: str, folder: Path, *, aliases: Sequence[str]) -> None: ...

    def finish(self, *, ending: str = "finished") -> None: ...


def test_resumed_curve_goes_on_without_gap_or_repetition(tmp_path: Path) -> None:
    first = JsonlTracker()
    first.start({}, tmp_path, resume_step=None)
    for step in range(1, 6):
        first.log({"loss": 10.0 - step}, step)
    with (tmp_path / "metrics.jsonl").open("a") as stream:  # killed while it wrote
        stream.write('{"step": 6, "lo')
    second = JsonlTracker()
    second.start({}, tmp_path, resume_step=3)
    for step in range(4, 7):
        second.log({"loss": 20.0 - step}, step)
    second.finish()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 9), (2, 8), (3, 7), (4, 16), (5, 15), (6, 14)]


def test_records_are_on_disk_at_once_and_valid_json_even_for_nan(tmp_path: Path) -> None:
    tracker = JsonlTracker()
    tracker.start({}, tmp_path, resume_step=None)
    tracker.log({"loss": float("nan"), "tokens": 3}, 1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert record["loss"] is None
    assert record["tokens"] == 3


def test_fresh_run_in_a_used_folder_keeps_the_old_curve_aside(tmp_path: Path) -> None:
    for value in (0.5, 1.0, 2.0):
        tracker = JsonlTracker()
        tracker.start({}, tmp_path, resume_step=None)
        tracker.log({"loss": value}, 1)
        tracker.finish()
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.previous.jsonl")] == [0.5]
    assert [row["loss"] for row in read_metrics(tmp_path / "metrics.previous1.jsonl")] == [1.0]


def test_a_disk_that_is_full_for_a_while_costs_no_record(
    tmp_path: Path, sample: SampleAnswer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trackers = Trackers([JsonlTracker()], active=True)
    trackers.start({}, tmp_path, resume_step=None)
    real = os.write

    def refuse(descriptor: int, data: bytes) -> int:
        if descriptor > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    trackers.log({"loss": 3.0}, 1)
    with monkeypatch.context() as full:
        full.setattr(os, "write", refuse)
        for step in (2, 3):
            trackers.log({"loss": 3.0 - step / 2}, step)
        trackers.log_samples("validation", [sample], 3)
    trackers.log({"loss": 1.0}, 4)
    trackers.log_samples("validation", [sample], 4)
    trackers.finish()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [row["step"] for row in read_metrics(tmp_path / "tracked_samples.jsonl")] == [3, 4]
    assert trackers.names == ["jsonl"]
    assert len([r for r in caplog.records if "metrics.jsonl cannot be written (No space left" in r.message]) == 1


def test_failing_tracker_warns_once_and_the_others_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failing, jsonl = _Failing(), JsonlTracker()
    trackers = Trackers([failing, jsonl], active=True)
    trackers.start({}, tmp_path, resume_step=None)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2, 3, 4):
            trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert failing.calls == MOST_FAILURES
    told = [record.message for record in caplog.records if "failing" in record.message]
    assert [message.rpartition("; ")[2] for message in told] == [
        "it is tried again.", "the run continues without it.",
    ]  # fmt: skip
    assert "hunter2pw" not in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 4


def test_only_rank_zero_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    trackers = build_trackers(TrackConfig(trackers=["tensorboard", "wandb"]))
    trackers.start({}, tmp_path, resume_step=None)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_tensorboard_reader_sees_one_point_per_step_after_a_resume(tmp_path: Path, sample: SampleAnswer) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume_step, steps in ((None, range(1, 6)), (3, range(4, 7))):
        tracker = TensorBoardTracker()
        tracker.start({"optim": {"lr": 1e-4}}, tmp_path, resume_step=resume_step)
        for step in steps:
            tracker.log({"loss": float(step), "validation_loss": 0.5, "lr/mixer": 1e-4}, step)
        tracker.log_samples("answers", [sample], 6)
        tracker.finish()
        ended = int(time.time())  # readers order the files of one second by process and count, as texts
        wait_until(lambda ended=ended: int(time.time()) > ended)
    reader = EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert [event.step for event in reader.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert {"validation/loss", "train/lr/mixer"} <= set(reader.Tags()["scalars"])
    assert reader.Images("answers/0")[0].width == 256
    assert (
        b"1e-4" in reader.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0]
        or b"0.0001" in (reader.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0])
    )
    assert b"<b>" not in reader.Tensors("answers/text_summary")[0].tensor_proto.string_val[0]


@pytest.mark.parametrize(
    ("ending", "code", "preempting"), [("finished", 0, False), ("stopped", 75, True), ("failed", 1, False)]
)
def test_wandb_tells_a_run_that_was_stopped_from_one_that_ended(
    ending: Any, code: int, preempting: bool, tmp_path: Path, read_run: ReadRun
) -> None:
    tracker = WandbTracker(TrackConfig())
    tracker.start({}, tmp_path, resume_step=None)
    tracker.finish(ending=ending)
    run = read_run(tmp_path)
    assert (run["exit"], run["preempting"]) == (code, preempting)


def test_wandb_names_come_from_the_recipe_its_variables_or_the_folder_in_this_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, read_run: ReadRun
) -> None:
    def started(number: int, **track: Any) -> dict[str, Any]:
        folder = tmp_path / f"mine{number}" / "tune"
        folder.mkdir(parents=True)
        trackers = build_trackers(TrackConfig(trackers=["wandb"], **track), active=True)
        trackers.start({}, folder, resume_step=None)
        trackers.finish()
        return read_run(folder)

    run = started(1, group="rates", job_type="train", notes="why", tags=["a", "b"])
    assert (run["project"], run["name"]) == ("mm_moslora", "mine1/tune")
    assert (run["group"], run["job_type"], run["notes"], run["tags"]) == ("rates", "train", "why", ["a", "b"])
    for name, value in {"PROJECT": "theirs", "NAME": "named", "TAGS": "x,y", "RUN_GROUP": "g", "NOTES": "n"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = started(2)
    assert (run["project"], run["name"], run["tags"], run["group"], run["notes"]) == (
        "theirs", "named", ["x", "y"], "g", "n",
    )  # fmt: skip
    assert "is ignored" not in caplog.text
    with caplog.at_level(logging.WARNING):
        run = started(3, project="ours", name="own")
    assert (run["project"], run["name"]) == ("ours", "own")
    assert "track.project is 'ours' in the recipe, so WANDB_PROJECT='theirs' is ignored." in caplog.text
    assert "WANDB_NAME='named' is ignored" in caplog.text


@pytest.mark.parametrize("name", ["scan.tiff", "torn.png", "missing.png", "pipe.png"])
def test_a_picture_that_cannot_be_shown_costs_no_tracker(name: str, tmp_path: Path, read_run: ReadRun) -> None:
    picture = tmp_path / name
    if name == "scan.tiff":
        Image.new("RGB", (40, 20), "red").save(picture)
    elif name == "pipe.png":
        os.mkfifo(picture)  # opened in the ordinary way, it waits for a writer for ever
    elif name == "torn.png":
        picture.write_bytes(b"\x89PNG\r\n\x1a\n")
    trackers = build_trackers(TrackConfig(trackers=["tensorboard", "wandb"]), active=True)
    trackers.start({}, tmp_path, resume_step=None)
    sample = SampleAnswer(question="q", expected="red", prediction="red", image=picture)
    trackers.log_samples("answers", [sample], 1)
    trackers.log({"loss": 1.0}, 2)
    trackers.finish()
    assert trackers.names == ["jsonl", "tensorboard", "wandb"]
    run = read_run(tmp_path)
    (table,) = [file for path, file in run["files"] if path.endswith("table.json")]
    ((shown, *cells),) = json.loads(table.read_text())["data"]
    assert cells == ["q", "red", "red", None]
    assert (shown is not None) == (name == "scan.tiff")


def test_an_offline_wandb_run_talks_to_nobody(tmp_path: Path) -> None:
    """The client's report on itself kept the process waiting for 10 s at its end."""
    code = f"""
from pathlib import Path
from mm_moslora.config import TrackConfig
from mm_moslora.tracking.wandb_tracker import WandbTracker
tracker = WandbTracker(TrackConfig(project="p"))
tracker.start({{}}, Path({str(tmp_path)!r}), resume_step=None)
tracker.log({{"loss": 1.0}}, 1)
tracker.finish()"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}", "HOME": str(tmp_path)}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=CHECKOUT)
        silent.settimeout(0)
        with pytest.raises(BlockingIOError):
            silent.accept()


@pytest.mark.parametrize("folder", ["wandb", ".wandb"])
@pytest.mark.parametrize("mode", ["online", "offline"])
def test_the_owner_of_the_working_folder_does_not_get_the_key(tmp_path: Path, folder: str, mode: str) -> None:
    """wandb takes the address from a file of the working folder before anything else."""
    code = f"""
import logging
from pathlib import Path
from mm_moslora.config import TrackConfig
from mm_moslora.tracking import build_trackers
logging.basicConfig(level="WARNING")
trackers = build_trackers(TrackConfig(trackers=["wandb"]), active=True)
trackers.start({{}}, Path({str(tmp_path)!r}), resume_step=None)
trackers.log({{"loss": 1.0}}, 1)
trackers.finish()
print(trackers.names)"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        address = f"http://127.0.0.1:{stranger.getsockname()[1]}"
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "settings").write_text(f"[default]\nbase_url = {address}\nhttp_proxy = {address}\n")
        environment |= {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "HOME": str(tmp_path / "home")}
        environment |= {"WANDB_MODE": mode, "PYTHONSAFEPATH": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path, capture_output=True, text=True
        )
        stranger.settimeout(0)
        with pytest.raises(BlockingIOError):
            stranger.accept()
    assert done.stdout.strip() == "['jsonl']"
    assert f"{folder}/settings would decide" in done.stderr
    assert "Loading settings" not in done.stderr


def test_resumed_wandb_run_keeps_its_id(tmp_path: Path) -> None:
    ids = []
    for resume_step in (None, 1, None):
        tracker = WandbTracker(TrackConfig(project="tests"))
        tracker.start({}, tmp_path, resume_step=resume_step)
        tracker.finish()
        ids.append((tmp_path / "wandb_id.txt").read_text())
    assert ids[0] == ids[1] != ids[2]


def test_unreachable_wandb_falls_back_to_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, read_run: ReadRun
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("mm_moslora.tracking.wandb_tracker.INIT_SECONDS", 3.0)
    trackers = Trackers([WandbTracker(TrackConfig(project="tests"))], active=True)
    with caplog.at_level(logging.WARNING):
        trackers.start({}, tmp_path, resume_step=None)
    trackers.log({"loss": 1.0}, 1)
    trackers.finish()
    assert trackers.names == ["wandb"]
    assert "wandb sync" in caplog.text
    offline = next(tmp_path.glob("wandb/offline-run-*"))
    assert [row["train/loss"] for row in read_run(offline)["history"]] == [1.0]


def test_no_secret_reaches_any_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = ["hf_" + "Q7x" * 10, "env-canary-value-1234", "cfg-canary-pass"]
    monkeypatch.setenv("SOME_API_KEY", canaries[1])
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    trackers = build_trackers(TrackConfig(trackers=["tensorboard", "wandb"]), active=True)
    config = {"a": canaries[0], "b": [f"x {canaries[1]}"], "password": canaries[2], "kept": "kept-canary"}
    trackers.start(config, run_folder, resume_step=None)
    sample = SampleAnswer(question=f"what is {canaries[0]}", expected=canaries[1], prediction=canaries[1])
    trackers.log_samples("answers", [sample], 1)
    trackers.finish()
    assert trackers.names == ["jsonl", "tensorboard", "wandb"]
    written = b"".join(path.read_bytes() for path in run_folder.rglob("*") if path.is_file())
    assert b"kept-canary" in written
    assert [canary for canary in canaries if canary.encode() in written] == []
