"""`eval run --shards N`: the same verb as N jobs, with the files of the undivided command."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from mm_moslora import cli
from mm_moslora.cli.evaluation.eval_options import QuestionOptions, ResultOptions, ServiceOptions
from mm_moslora.cli.evaluation.eval_run_verbs import AS_USUAL, EvaluationOptions
from mm_moslora.cli.shard_jobs import ShardJobs, words_of
from tests.eval.eval_data import contents, write_questions

pytestmark = pytest.mark.usefixtures("start_at_once")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """An evaluation of two models, which are files of answers."""
    data = write_questions(tmp_path / "data", count=40, pictures=20)
    for name, word in (("a", "blue"), ("b", "yes")):
        rows = [{"question_id": f"q{number}", "text": word} for number in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "eval")]))
    return ["eval", "run", f"llava:{data}", "--model", "replay:a.jsonl", "--model", "replay:b.jsonl", "--batch-size",
            "1", "--modes", "own", "--modes", "wrong", "--baselines", "majority", "--no-track"]  # fmt: skip


FOLDERS = ("replay-a.jsonl", "replay-b.jsonl")


def test_models_by_shards_have_the_results_of_the_undivided_runs(command: list[str], tmp_path: Path) -> None:
    for name, folder in (("replay:a.jsonl", FOLDERS[0]), ("replay:b.jsonl", FOLDERS[1])):
        one = [*command[:3], "--model", name, *command[7:]]
        assert cli.run([*one, "--output", f"whole/{folder}"]) == 0
    assert cli.run([*command, "--output", "run", "--shards", "2", "--parallel", "2"]) == 0
    for name in FOLDERS:
        assert contents(tmp_path / "run" / name) == contents(tmp_path / "whole" / name)
        shards = tmp_path / "run" / name / "shards"
        assert [path.name for path in sorted(shards.glob("*.log"))] == ["1-of-2.log", "2-of-2.log"]
        assert all(next((shards / f"{number}-of-2").rglob("answers.jsonl")).stat().st_size for number in (1, 2))
    assert json.loads((tmp_path / "run" / FOLDERS[0] / "run.json").read_text())["model"]["name"].count("a.jsonl") == 1


def test_a_model_that_fails_does_not_hide_the_others(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("no answers")
    assert cli.run([*command, "--output", "run", "--shards", "1"]) == 1
    assert re.search(r"replay-a\.jsonl/shards/1-of-1: the process ended with code 1; see ", capsys.readouterr().err)
    assert [(tmp_path / "run" / name / "results.json").exists() for name in FOLDERS] == [False, True]


def test_an_array_is_written_and_its_shards_are_merged(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    divided = [*command, "--output", "run", "--shards", "2", "--slurm"]
    answers = tmp_path / "a.jsonl"
    assert cli.run(divided) == 75
    assert "sbatch run/shards.sbatch" in capsys.readouterr().out
    script = (tmp_path / "run" / "shards.sbatch").read_text()
    assert "#SBATCH --array=0-3\n" in script
    for element in (3, 1, 0):
        subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": str(element)}, check=True)
    assert cli.run(divided) == 75  # one shard is not there
    script = (tmp_path / "run" / "shards.sbatch").read_text()
    assert "#SBATCH --array=0-0\n" in script
    subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}, check=True)
    assert cli.run(divided) == 0
    assert all((tmp_path / "run" / name / "results.json").exists() for name in FOLDERS)
    done = tmp_path / "run" / FOLDERS[0] / "shards" / "2-of-2" / "shard.json"
    whole = done.read_text()
    done.write_text(whole[:-30])
    assert cli.run(divided) == 1
    assert "Shard 2/2" in capsys.readouterr().err
    assert cli.run(divided) == 75  # it is repeated
    script = (tmp_path / "run" / "shards.sbatch").read_text()
    subprocess.run(["bash", "-c", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": "0"}, check=True)
    assert json.loads(done.read_text()) == json.loads(whole)
    divided[-2] = "3"
    assert cli.run(divided) == 1
    assert "shards of a division by 2, expected those of one by 3. Give --shards 2, or move" in capsys.readouterr().err
    assert not list(done.parents[1].glob("*-of-3*"))
    divided[-2] = "2"
    answers.write_text(answers.read_text().replace("blue", "green"))  # another model under the same name
    capsys.readouterr()
    assert cli.run(divided) == 1
    message = capsys.readouterr().err
    assert re.search(r"its --model is 'replay:a\.jsonl, files \w+', expected 'replay:a\.jsonl, files \w+'", message)


@pytest.mark.parametrize("other", ["replay:a.jsonl", "replay-a.jsonl", "replay:/a.jsonl", ".."])
def test_models_of_one_folder_are_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    command[command.index("replay:b.jsonl")] = other
    assert cli.run([*command, "--output", "out/run"]) == 1
    assert f"--model {other} has no folder of its own" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shards", "0"], "--shards is 0, expected 1 or more"),
        (["--shards", "2", "--shard", "1/2"], "leave it out"),
        (["--shards", "2", "--merge"], "leave it out"),
        (["--ray", "auto"], "about the jobs of --shards N"),
        (["--slurm"], "about the jobs of --shards N"),
        (["--parallel", "2"], "about the jobs of --shards N"),
        (["--shards", "2", "--slurm", "--ray", "auto"], "give one of them"),
    ],
)
def test_options_that_contradict_each_other(
    command: list[str], options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run([*command[:5], *command[7:], *options]) == 1  # one model
    assert message in capsys.readouterr().err


def test_the_words_of_a_command_give_its_options_again() -> None:
    options = EvaluationOptions(
        asked=QuestionOptions(limit=3), samples=("b", "-c"), results=ResultOptions(report=False), untuned=True,
        output=Path("y"), service=ServiceOptions(price="3/15"), jobs=ShardJobs(merge=True),
    )  # fmt: skip
    words = words_of(options)
    assert {"--limit=3", "--samples=b", "--samples=-c", "--no-report", "--output=y", "--price=3/15"} < set(words)
    again: dict[str, Any] = {}
    app = App()

    @app.default
    def verb(*tasks: str, options: EvaluationOptions = AS_USUAL) -> None:
        again.update(tasks=tasks, options=options)

    app(["a", *words], result_action="return_value")
    assert again == {"tasks": ("a",), "options": options}
