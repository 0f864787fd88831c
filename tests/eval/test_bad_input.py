"""Every kind of bad input by name: a clear error or a counted record, never a wrong score and never a lost run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from mm_moslora_eval.protocol.model_interface import Answer, Request
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import evaluate, read_samples
from mm_moslora_eval.run.result_file import TaskResult
from mm_moslora_eval.run.task_runner import EvaluationSettings

from tests.eval.eval_data import picture
from tests.eval.eval_fake import FakeModel

Writer = Callable[..., Path]
ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


class Fixed(FakeModel):
    """Answers with given texts in the order of the documents' ids."""

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self.texts = texts

    def generate(self, requests: Sequence[Request], *, batch_size: int) -> Iterator[tuple[int, Answer]]:
        for index, request in enumerate(requests):
            yield index, Answer(text=self.texts[int(request.id)], tokens=1, finish_reason="stop")


def rows_of(texts: Sequence[str], encoded: str, **more: Any) -> list[dict[str, Any]]:
    base = {"image": encoded, "question": "What is it?", "hint": "nan", "A": "cat", "B": "dog", "answer": "A"}
    return [{"index": number, **base, **more} for number in range(len(texts))]


def score(path: Path, texts: Sequence[str], run: Path) -> tuple[TaskResult, list[dict[str, Any]]]:
    (result,) = evaluate(Fixed(texts), get_task(f"tsv:{path}"), run, modes=("own",), baselines=(), settings=ONE)
    assert result.n == result.counts.total == len(texts), "N scored equals N in the data"
    return result, read_samples(run / "bench@own" / "own")


def counted(path: Path, problem: str, run: Path) -> None:
    """Row 0 is valid and right. Row 1 is invalid: it is recorded, counts as wrong and does not affect row 0."""
    result, samples = score(path, ["A", "A"], run)
    assert (result.score, result.counts.failed, result.counts.scored) == (0.5, 1, 1)
    assert problem in samples[1]["error"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"image": "!!!! not base64 " * 8}, "not base64"),
        ({"image": "77"}, "does not exist"),
        ({"image": "1"}, "refers back to it"),
        ({"answer": "D"}, "not one of the options"),
        ({"answer": ""}, "no reference answer"),
        ({"question": "What\0is it?"}, "NUL byte"),
        ({"image": "", "image_path": "gone.png"}, "cannot be read"),
        ({"image": "", "image_path": "../../etc/passwd"}, "leaves /"),
    ],
    ids=[
        "base64 junk", "image index that points nowhere", "image index that points to itself",
        "answer letter outside the options", "no reference", "NUL", "missing image", "image outside the folder",
    ],
)  # fmt: skip
def test_a_bad_row_is_counted(
    change: dict[str, Any], problem: str, write_tsv: Writer, encoded: str, tmp_path: Path
) -> None:
    rows = rows_of(["A", "A"], encoded)
    counted(write_tsv([rows[0], rows[1] | change]), problem, tmp_path / "run")


def test_input_04_empty_and_endless_answers(write_tsv: Writer, encoded: str, tmp_path: Path) -> None:
    texts = ["", "   \n", "A " * 5000, "word " * 2000 + "B", "\0", "\ud800", "A\u2028"]
    result, samples = score(write_tsv(rows_of(texts, encoded)), texts, tmp_path / "run")
    assert [sample["parsed"] for sample in samples] == ["", "", "", "B", "", "", "A"]
    assert result.counts.not_inferable == 5
    assert result.score == pytest.approx(1 / 7)
    assert [sample["text"] for sample in samples] == [*texts[:5], "\ufffd", texts[6]], "answers are kept as they came"


def test_a_model_that_answers_code_is_not_run(write_tsv: Writer, encoded: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    texts = [f"__import__('pathlib').Path({str(marker)!r}).touch()"]
    score(write_tsv(rows_of(texts, encoded, A="", B="", answer="['x', 'y']")), texts, tmp_path / "run")
    assert not marker.exists()


def test_a_set_without_references_is_exported_and_a_missing_one_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    rows = [{"question_id": n, "image": "a.png", "text": f"Q{n}?"} for n in range(2)]
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = Fixed(["yes", "yes"])
    run = {"modes": ("own",), "baselines": (), "settings": ONE}
    (result,) = evaluate(model, get_task(f"llava:{path}"), tmp_path / "none", **run)
    assert "no reference answers" in result.about["unscored"]
    rows[0]["answer"] = "yes"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (result,) = evaluate(model, get_task(f"llava:{path}"), tmp_path / "one", **run)
    assert (result.score, result.counts.failed) == (0.5, 1)
