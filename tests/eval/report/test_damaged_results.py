"""Results of a stranger, or damaged ones, hide no other result and stop no evaluation."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.run.evaluate_suite import compare
from mm_moslora_eval.run.result_file import TaskResult, read_results, write_results
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora.utils.errors import MoSLoRAError
from tests.eval.eval_data import write_questions
from tests.eval.eval_fake import FakeModel
from tests.odd_values import damaged, places

ODD: tuple[Any, ...] = (None, 1e308, "\ud800", [None], {"\udfff": [float("nan")]})


def evaluated_again(run: Path, data: Path) -> list[TaskResult]:
    settings = EvaluationSettings(batch_size=4, rank=0, world_size=1)
    task = f"llava:{data / 'questions.jsonl'}"
    return eval_commands.run(
        FakeModel(), [task], run, settings=settings, modes=("own", "wrong"), baselines=("majority",)
    )


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TaskResult]]:
    """A run with two image modes and a baseline, beside its data."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_questions(folder / "data", count=4)
    return folder, evaluated_again(folder / "run", folder / "data")


@pytest.fixture
def run(evaluated: tuple[Path, list[TaskResult]], tmp_path: Path) -> Path:
    return shutil.copytree(evaluated[0] / "run", tmp_path / "run")


def test_an_odd_value_in_an_entry_hides_no_other_result(run: Path, evaluated: tuple[Path, list[TaskResult]]) -> None:
    path = run / "results.json"
    stored = json.loads(path.read_text())
    first, *others = stored["results"]
    found = [place for place in places(first) if place]
    entries = [damaged(first, place, ODD[number % len(ODD)]) for number, place in enumerate(found)]
    path.write_text(json.dumps(stored | {"results": [*entries, *ODD, *others]}))
    assert [result.to_dict() for result in read_results(run)[-len(others) :]] == others
    write_results(run, evaluated[1])
    assert {result.mode for result in read_results(run)} >= {"own", "wrong", "majority"}
    path.write_text(json.dumps(stored | {"results": ODD[3]}))
    assert read_results(run) == []


@pytest.mark.parametrize("file", ["answers.jsonl", "*/documents.jsonl", "*/task.json", "*/samples.jsonl"])
def test_an_odd_value_in_a_view_stops_neither_the_scores_of_others_nor_a_resumed_run(
    run: Path, evaluated: tuple[Path, list[TaskResult]], file: str
) -> None:
    (path,) = run.glob(f"questions@own/own/{file}")
    text = path.read_text()
    lines = text.splitlines() if file.endswith(".jsonl") else [text]
    views = [folder / evaluated[1][0].folder for folder in (evaluated[0] / "run", run)]
    found = list(places(json.loads(lines[0])))
    for number, place in list(enumerate(found))[:: max(1, len(found) // 8)]:
        odd = json.dumps(damaged(json.loads(lines[0]), place, ODD[number % len(ODD)]))
        path.write_text("\n".join([odd, *lines[1:], ""]))
        (run / "results.json").unlink()
        for again in (lambda: compare(*views), lambda: eval_commands.score(run)):
            with suppress(MoSLoRAError):
                again()
        assert "wrong" in {result.mode for result in read_results(run)}
        path.write_text("\n".join([odd, *lines[1:], ""]))
        if file != "*/samples.jsonl":  # which scoring writes
            modes = [(result.mode, result.n) for result in evaluated_again(run, evaluated[0] / "data")]
            assert modes == [("own", 4), ("wrong", 4), ("majority", 4)]
