"""`mm-moslora compare` end to end on tiny models: tuning, seeds, a failing arm, continuing, the page, bad input."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import Preloaded
from trials import write_questions
from waiting import wait_until

from mm_moslora import cli
from mm_moslora.compare.comparison_cell import metrics, read_outcome
from mm_moslora.compare.comparison_run import exclusive
from mm_moslora.reporting.comparison.comparison_page import write_page
from mm_moslora.utils.errors import ConfigError
from tests.compare.comparisons import command

CHROMIUM = next((p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, language_folder: Path, vision_folder: Path, records: Path) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    write_questions(records, folder / "test.jsonl")
    (folder / "recipe.yaml").write_text(
        f"""
name: tiny
model: {{language: {language_folder}, vision: {{name: {vision_folder}}}}}
adapter: {{rank: 4, alpha: 8}}
data: {{train: [{{path: {records}, image_folder: {records.parent / "images"}}}], max_length: 256}}
train: {{steps: 5, global_batch: 8, micro_batch: 8, zero: none, precision: fp32}}
track: {{trackers: []}}
"""
    )
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, recipe: Path, records: Path) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    assert cli.run(command(recipe, records, out)) == 1, "runs of an arm fail"
    return out


@pytest.mark.slow
def test_a_comparison_tunes_runs_seeds_and_reports_the_arm_that_fails(finished: Path):
    results = json.loads((finished / "results.json").read_text())
    full, clipped, broken, diverging = results["arms"]
    assert [len(arm["seeds"]) for arm in results["arms"]] == [2, 2, 0, 0]
    for arm in (full, clipped):
        curve = {point["rate"]: point["value"] for point in arm["curve"]}
        assert arm["rate"] == min(curve, key=curve.get)
        assert arm["tasks"]["test"]["documents"] == 18
        assert arm["cost"]["steps"] == 5
        assert arm["cost"]["trainable"] > 0
    assert broken["rate"] is diverging["rate"] is None
    how = {failure["arm"]: (failure["status"], failure["reason"]) for failure in results["failures"]}
    assert how[broken["name"]][0] == "failed"
    assert "must be divisible" in how[broken["name"]][1]
    assert how[diverging["name"]][0] == "diverged"
    assert "2 steps in a row had a loss or gradient that is not finite" in how[diverging["name"]][1]
    (row,) = results["comparisons"]
    assert (row["arm"], row["reference"], row["seeds"]) == (clipped["name"], "full", 2)
    assert row["low"] <= row["difference"] <= row["high"]
    assert row["verdict"] == "nothing follows", "five steps teach nothing"
    assert all(set(arm["controls"]["test"]) >= {"rows", "above"} for arm in (full, clipped))
    assert any("no learning rate of the grid worked" in line for line in results["says"])
    tuning = {path.name for path in finished.glob("runs/*_tune0/checkpoint-*")}
    assert not tuning, "checkpoints of runs that only chose a rate stay"
    assert not (finished / "features").exists(), "ten GiB may stay"


@pytest.mark.slow
def test_validation_is_held_out_by_picture_and_never_trained_on(finished: Path):
    def pictures(name):
        lines = (finished / "data" / name).read_text().splitlines()
        return {json.loads(line).get("image") for line in lines} - {None}

    train, validation = pictures("train-0.jsonl"), pictures("validation-0.jsonl")
    assert train
    assert validation
    assert not train & validation


def test_a_call_that_fails_leaves_no_split_that_a_later_one_would_take(
    tmp_path: Path, recipe: Path, records: Path, capsys
):
    """Neither one that fails before the split, nor one whose share leaves nothing."""
    out, train = tmp_path / "out", tmp_path / "train.jsonl"
    lines = records.read_text().splitlines(keepends=True)
    train.write_text("".join(lines))
    line = command(recipe, records, out, "--only-report")
    line.append(f'--data.train=[{{"path": "{train}", "image_folder": "{records.parent / "images"}"}}]')
    wrong = list(line)
    wrong[wrong.index("--tasks") + 1] = "llava:mistyped.jsonl"
    assert cli.run(wrong) == 1
    assert not list(out.glob("data/*"))
    train.write_text("".join(lines[:-4]))
    little = list(line)
    little[little.index("--hold-out") + 1] = "1e-9"
    assert cli.run(little) == 1
    assert "Change --hold-out" in capsys.readouterr().err
    assert cli.run(line) == 0
    split = [len((out / "data" / f"{side}-0.jsonl").read_text().splitlines()) for side in ("train", "validation")]
    assert sum(split) == len(lines) - 4


@pytest.mark.parametrize("changed", ["records", "other file", "questions", "share", "base"])
def test_changed_data_are_refused_before_anything_runs(
    tmp_path: Path, recipe: Path, records: Path, language_folder: Path, capsys, changed: str
):
    """The split of the first call is not used for other data."""
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    train.write_text(records.read_text())
    test.write_text((recipe.parent / "test.jsonl").read_text())
    line = command(recipe, records, tmp_path / "out", "--only-report")
    line[line.index("--tasks") + 1] = f"llava:{test}@{records.parent / 'images'}"
    train_at = [f'--data.train=[{{"path": "{train}", "image_folder": "{records.parent / "images"}"}}]']
    language = tmp_path / "language"
    shutil.copytree(language_folder, language)
    train_at.append(f"--model.language={language}")
    assert cli.run([*line, *train_at]) == 0
    assert cli.run([*line, *train_at]) == 0
    capsys.readouterr()
    fewer = "".join(records.read_text().splitlines(keepends=True)[:-2])
    match changed:
        case "records":
            train.write_text(fewer)
        case "other file":
            (tmp_path / "other.jsonl").write_text(fewer)
            train_at[0] = train_at[0].replace(str(train), str(tmp_path / "other.jsonl"))
        case "questions":
            test.write_text("".join(test.read_text().splitlines(keepends=True)[:-1]))
        case "share":
            line[line.index("--hold-out") + 1] = "0.4"
        case "base":
            weights = language / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert cli.run([*line, *train_at]) == 1
    said = capsys.readouterr().err
    expected = {"questions": "test.jsonl", "share": "hold_out 0.3", "base": "model.language changed"}
    assert expected.get(changed, "data.train 1 changed") in said
    assert "choose another --output" in said.lower()


@pytest.mark.slow
def test_a_stopped_comparison_continues(tmp_path: Path, recipe: Path, records: Path, capsys):
    stop = command(recipe, records, tmp_path / "out", "--max-minutes", "0", arms="lora,moslora:kaiming", rates="1e-3")
    assert cli.run(stop) == 75
    assert cli.run([*stop[:-2], "--plan"]) == 0
    said = capsys.readouterr().out
    lora, moslora = re.findall(r"(lora|moslora:kaiming) +([\d,]+) +([\d.e-]+) +5 +[\d.]+ +[\d.]+ +[12] +[\d.]+\n", said)
    assert (lora[0], moslora[0]) == ("lora", "moslora:kaiming")
    assert int(lora[1].replace(",", "")) < int(moslora[1].replace(",", ""))
    assert re.search(r"all +[34] +\d", said)
    assert cli.run([*_without(stop[:-2], "--seeds"), "--seeds", "3"]) == 0, "seeds may be added"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [len(arm["seeds"]) for arm in results["arms"]] == [3, 3]
    assert any("not tuned" in line for line in results["says"])


def _without(line: list[str], option: str) -> list[str]:
    if option not in line:
        return line
    index = line.index(option)
    return [*line[:index], *line[index + 2 :]]


@pytest.mark.slow
def test_a_signal_saves_running_runs_and_the_same_command_continues(
    tmp_path: Path, recipe: Path, records: Path, python: Preloaded
):
    line = command(recipe, records, tmp_path / "out", "--train.steps", "400", arms="lora,moslora:kaiming", rates="1e-3")
    process = subprocess.Popen(
        [python.ours, "-m", "mm_moslora", *line], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    place = tmp_path / "out" / "runs" / "lora_lr0.001_seed0"
    wait_until(lambda: len(metrics(place)) >= 3, process=process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == 75
    assert read_outcome(place) is None
    assert list(place.glob("checkpoint-*")), "what was trained is lost"


def test_a_folder_with_other_files_is_refused_for_a_comparison(tmp_path: Path):
    (tmp_path / "results.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"already holds results\.json"), exclusive(tmp_path):
        pytest.fail("it would be overwritten")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    (tmp_path / "results.json").unlink()
    for _ in range(2):
        with exclusive(tmp_path):
            (tmp_path / "results.json").touch()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arms", "lora,moslra:kaiming"], "Did you mean 'moslora:kaiming'"),
        (["--arms", "lora"], "expected at least two"),
        (["--arms", "lora,lora"], "given twice"),
        (["--arms", "lora,lora@rnak=4"], "Did you mean 'rank'"),
        (["--arms", "lora,moslora:kaiming@mixer_init=zeros"], "expected one of"),
        (["--arms", "full,lora@targets=[nope]"], "Target 'nope' matches no module"),
        (["--lr", "fast"], "expected numbers"),
        (["--lr", "1e-4,-1"], "expected positive numbers"),
        (["--lr", "1e-4,1e-4"], "twice"),
        (["--seeds", "0"], "expected 1 or more"),
        (["--tasks", ""], "No test task"),
        (["--tasks", "gqa_testdv"], "Did you mean"),
        (["--reference", "dora"], "is not an arm"),
        (["--lr", "1e-4,2e-4", "--validation", "SAME"], "chosen on the reported data"),
        (["--lr", "1e-4,2e-4", "--validation", "COPY"], "chosen on the reported data"),
        (["--lr", "1e-4,2e-4", "--data.validation", "RECORDS"], "chosen on the reported data"),
        (["--gpus-per-run", "2"], "accelerator"),
        (["--parallel", "2", "--ray", "auto"], "--parallel is for this machine"),
        (["--parallel", "2", "--slurm", "YES"], "give one of them"),
        (["--optim.lrr", "1"], "unknown key"),
    ],
)
def test_bad_input_is_one_line(arguments, message, recipe: Path, records: Path, tmp_path: Path, capsys):
    line = command(recipe, records, tmp_path / "out", rates="1e-3")
    task = line[line.index("--tasks") + 1]
    file, images = task.removeprefix("llava:").split("@")
    shutil.copy(file, tmp_path / "copy.jsonl")
    known = {
        "SAME": task,
        "COPY": f"llava:{tmp_path / 'copy.jsonl'}@{images}",
        "RECORDS": json.dumps([{"path": file, "image_folder": images}]),
    }
    for key, value in zip(arguments[::2], arguments[1::2], strict=True):
        value = known.get(value, value)
        if value == "YES":  # a switch
            line.append(key)
            continue
        if key in line:
            line[line.index(key) + 1] = value
        else:
            line += [key, value]
    assert cli.run(line) == 1
    assert re.search(re.escape(message), capsys.readouterr().err), capsys.readouterr().err


def test_a_folder_of_another_comparison_or_version_is_refused(recipe: Path, records: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    line = command(recipe, records, out, "--only-report")
    assert cli.run(line) == 0  # claims the folder; nothing has run
    assert "No comparison yet" in capsys.readouterr().out
    assert cli.run([*line, "--limit", "3"]) == 1
    assert "was started with limit None" in capsys.readouterr().err
    stored = json.loads((out / "comparison.json").read_text())
    (out / "comparison.json").write_text(json.dumps(stored | {"format": 0}))
    assert cli.run(line) == 1
    assert "format 0, this version reads 2" in capsys.readouterr().err
    (out / "results.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ConfigError, match="format 9"):
        write_page(out / "results.json", out / "report.html")


@pytest.mark.slow
def test_the_same_command_only_reports_and_a_seed_can_be_added(finished: Path, recipe: Path, records: Path, capsys):
    kept = {path: path.stat().st_mtime_ns for path in finished.glob("runs/full_*/outcome.json")}
    line = command(recipe, records, finished, arms="full,full@optim.max_grad_norm=0.5")
    assert cli.run(line) == 0
    assert "4 runs with 2 new seeds" in capsys.readouterr().out
    line[line.index("--seeds") + 1] = "3"
    assert cli.run(line) == 0
    results = json.loads((finished / "results.json").read_text())
    assert [len(arm["seeds"]) for arm in results["arms"]] == [3, 3]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}, "a finished run was run again"
