"""Answers that count together: they are asked together, and scored together or not at all."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.protocol.model_interface import Answer, Request
from mm_moslora_eval.protocol.task import Task
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate
from mm_moslora_eval.run.paired_comparison import compare
from mm_moslora_eval.run.result_file import TaskResult, read_results, score_folder
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.measured_scores import aggregate, by_category
from mm_moslora_eval.scoring.score_differences import difference_of_scores
from mm_moslora_eval.scoring.scored_sample import Scored
from mm_moslora_eval.sources.document import DataSet, Document

from mm_moslora.launch.imported_code import import_file
from tests.eval.eval_fake import FakeModel

PAIRS = 'all_within {"columns": ["pair"]}'
FOURS = 'consecutive {"further": {"question": [[0, 1], [2, 3]]}, "size": 4}'
RULE = """
from mm_moslora_eval.scoring.answer_scoring import METRICS

@METRICS.add
def own_exact(parsed, document):
    if document.id == "1":
        raise RuntimeError("no score")
    return float(parsed in document.answers)
"""


class Knowing(FakeModel):
    """Right on all documents but some."""

    wrong: tuple[str, ...] = ()

    def _answer(self, request: Request) -> Answer:
        answer = super()._answer(request)
        return replace(answer, text="no" if request.id in self.wrong else "yes")


def questions(folder: Path, rules: str, *, count: int = 24) -> Task:
    """Ids from 1; documents 1 and 2, 3 and 4, ... are pairs; every other pair is of the category b."""
    folder.mkdir(exist_ok=True)
    rows = [
        {"question_id": str(n + 1), "text": f"{n}?", "answer": "yes", "pair": str(n // 2), "category": "ab"[n // 2 % 2]}
        for n in range(count)
    ]
    (folder / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = folder / "own.yaml"
    path.write_text(f"name: own\nsource: {{kind: llava, path: q.jsonl}}\n{rules}\n")
    return get_task(str(path))


def result_of(
    task: Task, output: Path, *, wrong: tuple[str, ...] = (), fail_on: tuple[str, ...] = (), **settings: Any
) -> TaskResult:
    model = Knowing(fail_on=fail_on)
    model.wrong = wrong
    given = EvaluationSettings(batch_size=8, rank=0, world_size=1, **settings)
    (result,) = evaluate(model, task, output, modes=("own",), baselines=(), settings=given)
    return result


def documents_of(spec: str, count: int = 24) -> tuple[Document, ...]:
    """Documents of an aggregation; the further column `unit` says which count together."""
    rows: dict[str, Any] = {
        PAIRS: [{"unit": n // 2, "pair": n // 2} for n in range(count)],
        FOURS: [{"id": n + 7, "unit": n // 4} for n in range(count)],
        "circular": [{"id": 1_000_000 * (n // 8) + n % 8, "unit": n % 8} for n in range(count)],
        "wemath": [{"unit": n // 3, "ID": n // 3, "key": ("1", "2", "multi")[n % 3]} for n in range(count)],
        "mme": [{"unit": n // 2, "category": "OCR", "question_id": n // 2} for n in range(count)],
        "hallusionbench": [
            {"unit": n // 4, "set_id": n // 4, "figure_id": n % 2, "question_id": n // 2 % 2} for n in range(count)
        ],
        SAME: [{"unit": n // 2, "pair": n // 2} for n in range(count)],
    }
    return tuple(
        Document(
            id=str(row.get("id", f"x{number}")), question="?", answers=("yes",), first_id=7,
            category=row.get("category", "ab"[row["unit"] % 2]), extra={key: str(row[key]) for key in row},
        )
        for number, row in enumerate(rows[spec])
    )  # fmt: skip


SAME = 'detailed_mean {"groups": {"same": ["pair"]}}'
GROUPED = (PAIRS, FOURS, "circular", "wemath", "mme", "hallusionbench", SAME)


@pytest.mark.parametrize("spec", GROUPED)
def test_answers_that_count_together_are_asked_together(spec: str) -> None:
    data = DataSet(documents=documents_of(spec), path="data", sha256="")

    def units(**settings: Any) -> list[str]:
        chosen = EvaluationSettings(rank=0, world_size=1, **settings).select(data, aggregation=spec)
        found = [document.extra["unit"] for document in chosen]
        assert [one for one in data.documents if one.extra["unit"] in found] == list(chosen)
        return found

    assert len(units(limit=1)) == len(units(samples=(data.documents[5].id,))) > 1
    assert 4 <= len(units(limit=7)) <= 7
    for seed in range(3):
        assert 8 <= len(units(limit=13, stratify="category", seed=seed)) <= 13
    assert len(units(limit=24, stratify="category")) == len(units(limit=100)) == 24


@pytest.mark.parametrize("spec", GROUPED)
def test_a_question_with_an_unscored_answer_has_no_score(spec: str) -> None:
    scores = [float(number % 5 > 0) for number in range(24)]
    scores[0] = scores[9] = math.nan
    samples = [
        Scored(document=document, text="", parsed="", score=score, cluster=document.id)
        for document, score in zip(documents_of(spec), scores, strict=True)
    ]
    gone = {samples[0].document.extra["unit"], samples[9].document.extra["unit"]}
    kept = [sample for sample in samples if sample.document.extra["unit"] not in gone]
    found, whole = aggregate(spec, samples), aggregate(spec, kept)
    assert (found.value, found.n, found.metrics) == (whole.value, len(kept), whole.metrics)
    assert found.stderr == whole.stderr
    assert by_category(spec, samples) == by_category(spec, kept)
    right = [replace(sample, score=1.0) for sample in samples]
    assert difference_of_scores(spec, [right], [samples]).b == whole.value


def test_a_sample_of_pairs_has_the_score_of_its_pairs(tmp_path: Path) -> None:
    task = questions(tmp_path / "data", "aggregation: {name: all_within, columns: [pair]}")
    wrong = tuple(str(number) for number in range(1, 25, 2))  # one of each pair
    for number, settings in enumerate([{"limit": 5}, {"limit": 8, "stratify": "category"}, {"samples": ("4", "8")}]):
        result = result_of(task, tmp_path / str(number), wrong=wrong, **settings)
        assert (result.score, result.n % 2) == (0.0, 0)
        assert not result.remarks or "together" not in "".join(result.remarks)


def test_groups_of_consecutive_ids_count_from_the_first_one_of_the_data(tmp_path: Path) -> None:
    rules = "aggregation: {name: consecutive, size: 4, further: {pair: [[0, 1], [2, 3]]}}"
    task = questions(tmp_path / "data", rules)
    result = result_of(task, tmp_path / "run", wrong=("8",), samples=("6", "10"))
    assert (result.n, result.score, result.metrics["pair"]) == (8, 0.5, 0.75)  # 5 to 8 and 9 to 12
    assert score_folder(tmp_path / "run" / result.folder).score == 0.5
    failed = result_of(task, tmp_path / "failed", wrong=("5", "6", "7", "8"), fail_on=("1",))
    assert (failed.score, failed.completed["score"], failed.completed["n"]) == (4 / 6, 4 / 5, 20)


def test_answers_that_are_left_out_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rule.py").write_text(RULE)
    import_file(tmp_path / "data/rule.py")
    rules = "metric: own_exact\naggregation: {name: consecutive, size: 4}"
    task = questions(tmp_path / "data", rules)
    wrong = ("5", "6", "7", "8")
    result = result_of(task, tmp_path / "run", wrong=wrong)
    assert (result.score, result.counts.ungraded, result.counts.left_out) == (4 / 5, 1, 3)
    assert "3 more are left out, because they count together with one of these. The score is over the other 20." in (
        "".join(result.remarks)
    )
    assert read_results(tmp_path / "run")[0].counts == result.counts
    other = result_of(task, tmp_path / "other", wrong=(*wrong, "9"))
    difference = compare(tmp_path / "run" / result.folder, tmp_path / "other" / other.folder).score
    assert (difference.a, difference.b, difference.questions) == (4 / 5, 3 / 5, 5)
    alone = result_of(task, tmp_path / "alone", limit=4)
    assert math.isnan(alone.score)
    assert "No question has a score of each of its answers" in alone.about["unscored"]


def test_a_pair_in_two_categories_is_right_in_neither_by_a_half() -> None:
    documents = [replace(one, category="ab"[number % 2]) for number, one in enumerate(documents_of(PAIRS))]
    samples = [
        Scored(document=one, text="", parsed="", score=float(number % 2), cluster=one.id)
        for number, one in enumerate(documents)
    ]
    assert [part.value for part in by_category(PAIRS, samples).values()] == [0.0, 0.0]


def test_rules_that_count_answers_together_say_where_the_documents_were_not_selected_for_them(tmp_path: Path) -> None:
    plain = questions(tmp_path / "data", "metric: exact")
    result = result_of(plain, tmp_path / "run", limit=5)
    assert result.n == 5
    pairs = replace(plain, aggregation=PAIRS)
    (remark,) = [one for one in score_folder(tmp_path / "run" / result.folder, rules=pairs).remarks if "too" in one]
    assert "The documents (first 5) were not selected for all_within" in remark
    whole = result_of(plain, tmp_path / "whole")
    assert not any("too" in one for one in score_folder(tmp_path / "whole" / whole.folder, rules=pairs).remarks)
