"""Results of a stranger, or damaged ones, hide no other result and stop no evaluation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.report.evaluation_page import write_report
from mm_moslora_eval.run.evaluate_suite import evaluate_tasks
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import TaskResult, read_results, write_results
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora.utils.errors import MoSLoRAError
from tests.eval.eval_data import write_questions
from tests.eval.eval_fake import FakeModel
from tests.odd_values import ODD, damaged, places

MORE = {
    "judge": {"model": "m", "calls": 1, "prompt_tokens": 2, "completion_tokens": 3, "cached": 0}, "differences": ["d"],
    "published": [{"model": "a", "score": 1.0, "source": "s"}], "learned_from": "", "asked_as": "own", "unverified": [],
}  # fmt: skip
NATS = {"n": 4, "missing": 0, "nats": -1.0, "stderr": 0.1, "low": -2.0, "high": 0.0}


def evaluated_again(run: Path, *, data: Path | None = None) -> list[TaskResult]:
    settings = EvaluationSettings(batch_size=4, rank=0, world_size=1)
    task = f"llava:{data or run.parent / 'data' / 'questions.jsonl'}"
    return evaluate_tasks(FakeModel(), [task], run, settings=settings, modes=("own", "wrong"), baselines=("majority",))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[TaskResult]]:
    """A run with two image modes and a baseline; its first entry has every part that an entry may have."""
    folder = tmp_path_factory.mktemp("evaluated")
    write_questions(folder / "data", count=4)
    run = folder / "run"
    results = evaluated_again(run)
    stored = json.loads((run / "results.json").read_text())
    stored["results"][0]["about"] |= MORE
    stored["results"][0] |= {"metrics": {"f1": 0.5}, "likelihood": NATS}
    (run / "results.json").write_text(json.dumps(stored))
    return run, results


@pytest.fixture
def run(evaluated: tuple[Path, list[TaskResult]], tmp_path: Path) -> Path:
    return shutil.copytree(evaluated[0], tmp_path / "run")


def _each(data: Any, number: int) -> Iterator[Any]:
    """Copies with an odd value in some places; all values together reach each place once."""
    found = [place for place in places(data) if place and place != ("format",) and "prompt" not in place]
    for place in found[number :: len(ODD)]:
        yield damaged(data, place, ODD[number])


@pytest.mark.parametrize("number", range(0, len(ODD), 5))
def test_an_odd_value_in_an_entry_hides_no_other_result_and_stops_no_evaluation(
    run: Path, evaluated: tuple[Path, list[TaskResult]], number: int
) -> None:
    stored = json.loads((run / "results.json").read_text())
    first, *others = stored["results"]
    entries = list(_each(first, number))
    for entry in entries:
        (run / "results.json").write_text(json.dumps(stored | {"results": [entry, *others]}))
        found = read_results(run)
        assert [result.to_dict() for result in found[-len(others) :]] == others
        assert "majority" in eval_commands.table(found)
    (run / "results.json").write_text(json.dumps(stored | {"results": [*entries, *others]}))
    assert "none (majority)" in write_report(run).read_text(encoding="utf-8")
    write_results(run, evaluated[1])
    assert {result.mode for result in read_results(run)} >= {"own", "wrong", "majority"}


@pytest.mark.parametrize("value", ODD)
def test_other_odd_parts_of_the_file_hide_no_result(run: Path, value: Any) -> None:
    path = run / "results.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"scored": value, "results": [value, *stored["results"]]}))
    assert "none (majority)" in write_report(run).read_text(encoding="utf-8")
    path.write_text(json.dumps(stored | {"results": value}))
    assert read_results(run) == []


@pytest.mark.parametrize("number", range(0, len(ODD), 5))
@pytest.mark.parametrize("file", ["samples.jsonl", "documents.jsonl", "task.json", "invocations.jsonl"])
def test_an_odd_value_beside_the_answers_hides_no_score(run: Path, number: int, file: str) -> None:
    (path,) = run.glob("questions@own/own/*/" + file) if file != "invocations.jsonl" else [run / file]
    lines = path.read_text().splitlines() if file.endswith(".jsonl") else [path.read_text()]
    for odd in _each(json.loads(lines[0]), number):
        path.write_text("\n".join([json.dumps(odd), *lines[1:]]))
        page = write_report(run).read_text(encoding="utf-8")
        assert page.count("<strong>") == 3


@pytest.mark.parametrize("number", range(0, len(ODD), 5))
@pytest.mark.parametrize("file", ["answers.jsonl", "*/documents.jsonl", "*/task.json", "*/samples.jsonl"])
def test_an_odd_value_in_a_view_stops_neither_the_scores_of_others_nor_a_resumed_run(
    run: Path, evaluated: tuple[Path, list[TaskResult]], number: int, file: str
) -> None:
    (path,) = run.glob(f"questions@own/own/{file}")
    text = path.read_text()
    lines = text.splitlines() if file.endswith(".jsonl") else [text]
    views = [evaluated[0] / evaluated[1][0].folder, run / evaluated[1][0].folder]
    for odd in [*_each(json.loads(lines[0]), number), ODD[number]]:
        path.write_text("\n".join([json.dumps(odd), *lines[1:], ""]))
        (run / "results.json").unlink()
        with suppress(MoSLoRAError):
            compare(*views)
        with suppress(MoSLoRAError):
            eval_commands.score(run)
        assert "wrong" in {result.mode for result in read_results(run)}
        with suppress(MoSLoRAError):
            compare(*views)
        if file != "*/samples.jsonl":  # which scoring writes
            path.write_text("\n".join([json.dumps(odd), *lines[1:], ""]))
        again = evaluated_again(run, data=evaluated[0].parent / "data" / "questions.jsonl")
        assert [(result.mode, result.n) for result in again] == [("own", 4), ("wrong", 4), ("majority", 4)]
