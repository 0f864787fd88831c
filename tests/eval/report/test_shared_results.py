"""Results for others: the hub's model-index, one table of several models."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.result_file import TaskResult, read_results
from mm_moslora_eval.run.task_runner import EvaluationSettings

from mm_moslora import cli
from tests.eval.eval_fake import FakeModel

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


def measured(folder: Path, question_file: Path, *, name: str = "fake", **options: object) -> list[TaskResult]:
    model = FakeModel(fingerprint=name, **options)  # type: ignore[arg-type]
    model.name = name
    return evaluate(model, get_task(f"llava:{question_file}"), folder, settings=ONE, modes=("own", "blind"))


def test_a_model_card_takes_the_results(question_file: Path, tmp_path: Path) -> None:
    result = measured(tmp_path / "run", question_file, name="runs/my-model")[0]
    assert cli.run(["eval", "export", str(tmp_path / "run"), str(tmp_path / "card.yaml"), "--to", "model-index"]) == 0
    card = ModelCard(f"---\n{(tmp_path / 'card.yaml').read_text()}---\n# text\n")
    assert card.data.model_name == "my-model"
    (found,) = card.data.eval_results
    assert found.metric_value == result.score
    assert found.task_type == "image-text-to-text"
    assert found.dataset_name == "questions of questions.jsonl"
    assert found.metric_type == "letter_or_exact"
    assert found.metric_args["documents"] == 12
    assert found.metric_args["low"] == result.low
    card.data.to_yaml()


def test_protocols_and_selections_of_one_set_stay_apart(question_file: Path, tmp_path: Path) -> None:
    from mm_moslora_eval.run.result_file import write_results

    (tmp_path / "t.yaml").write_text(
        f"name: t\nsource: {{kind: llava, path: {question_file}}}\nprotocols: {{a: {{}}, b: {{metric: equal}}}}\n"
    )
    for protocol in "ab":
        evaluate(FakeModel(), get_task(f"{tmp_path / 't.yaml'}@{protocol}"), tmp_path / "run", settings=ONE,
                 modes=("own",), baselines=())  # fmt: skip
    few = EvaluationSettings(batch_size=4, rank=0, world_size=1, limit=4)
    evaluate(FakeModel(), get_task(f"{tmp_path / 't.yaml'}@a"), tmp_path / "run", settings=few, modes=("own",))
    unscored = next(result for result in read_results(tmp_path / "run") if result.scored)
    write_results(tmp_path / "run", [type(unscored)(**{**vars(unscored), "task": "other", "score": math.nan})])
    assert cli.run(["eval", "export", str(tmp_path / "run"), str(tmp_path / "model-index"), "--to", "model-index"]) == 0
    found = ModelCard(f"---\n{(tmp_path / 'model-index').read_text()}---\n").data.eval_results
    assert {(row.dataset_config, row.metric_args["protocol"]) for row in found} == {
        (None, "a"), (None, "b"), ("first 4 of 12", "a"),
    }  # fmt: skip


def exported(run: Path, folder: Path) -> Any:
    """The only row of the model card."""
    assert cli.run(["eval", "export", str(run), str(folder / "model-index"), "--to", "model-index"]) == 0
    (row,) = ModelCard(f"---\n{(folder / 'model-index').read_text()}---\n").data.eval_results
    return row


def other(value: Any) -> Any:
    """A value of the same kind that no task has."""
    if isinstance(value, bool):
        return not value
    return value + 0.5 if isinstance(value, float) else value + 3 if isinstance(value, int) else "changed"


def test_an_export_replaces_no_file_and_needs_scores(
    question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(tmp_path / "run", question_file)
    (tmp_path / "kept.yaml").write_text("mine")
    line = ["eval", "export", str(tmp_path / "run")]
    assert cli.run([*line, str(tmp_path / "kept.yaml"), "--to", "model-index"]) == 1
    assert (tmp_path / "kept.yaml").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert cli.run(["eval", "export", str(tmp_path / "empty"), str(tmp_path / "x"), "--to", "model-index"]) == 1
    assert "no scored results" in capsys.readouterr().err


def test_one_table_holds_several_models(
    question_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = measured(tmp_path / "a", question_file, name="a|b")[0]
    measured(tmp_path / "b", question_file, name="second", fail_on=["q1", "q2"])
    few = EvaluationSettings(batch_size=4, rank=0, world_size=1, limit=4)
    model = FakeModel()
    model.name = "second"
    evaluate(model, get_task(f"llava:{question_file}"), tmp_path / "c", settings=few, modes=("own",))
    runs = [str(tmp_path / name) for name in "abc"]
    assert cli.run(["eval", "table", *runs, "--html", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    head, _, whole, part, *notes = text.splitlines()
    assert f"second ({runs[1]})" in head
    assert f"{first.score * 100:.1f} % (" in whole
    assert whole.rstrip().endswith("-")
    assert part.startswith("questions, first 4 of 12  4")
    assert part.split("4   ", 1)[1].lstrip().startswith("-")
    assert "* questions, second" in notes[0]
    assert "2 of 12 answers failed and count as wrong" in notes[0]
    page = (tmp_path / "page.html").read_text()
    assert "2 of 12 answers failed" in page
    assert cli.run(["eval", "table", *runs, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| task | n | a\\|b | second (")
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert cli.run(["eval", "table", runs[0], str(tmp_path)]) == 1
    assert cli.run(["eval", "table"]) == 1
    assert cli.run(["eval", "table", runs[2], "--mode", "blind"]) == 1
