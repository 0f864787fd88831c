"""The log-likelihood of the reference: stored per document, aggregated, compared, and missing with a reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from mm_moslora_eval import eval_commands
from mm_moslora_eval.protocol.model_interface import Answer, OptionScore, Request
from mm_moslora_eval.protocol.task_registry import get_task
from mm_moslora_eval.run.evaluate_suite import compare, evaluate, read_samples
from mm_moslora_eval.run.result_file import TaskResult, read_results
from mm_moslora_eval.run.task_runner import EvaluationSettings
from mm_moslora_eval.scoring.reference_likelihood import likelihood_difference, mean_likelihood
from mm_moslora_eval.sources.document import Document

from mm_moslora.utils.errors import EvalError
from tests.eval.eval_data import write_questions
from tests.eval.eval_fake import FakeModel

ONE = EvaluationSettings(batch_size=4, rank=0, world_size=1)


class Likely(FakeModel):
    """Gives the reference of question qN the log-likelihood -N - more; that of q3 is not finite."""

    def __init__(self, more: float) -> None:
        super().__init__(fingerprint=f"likely{more}", fail_on=["q5"])
        self.more = more

    def _answer(self, request: Request) -> Answer:
        number = int(request.id.removeprefix("q"))
        value = math.nan if number == 3 else -number - self.more
        answer = super()._answer(request)
        assert request.reference
        return dataclasses.replace(answer, reference=OptionScore(logprob=value, tokens=2))


def test_it_is_stored_per_document_and_compared_in_pairs(tmp_path: Path) -> None:
    task = get_task(f"llava:{write_questions(tmp_path / 'data', count=12)}")
    runs = {more: tmp_path / f"run{more}" for more in (0.0, 0.5)}
    for more, run in runs.items():
        found = evaluate(Likely(more), task, run, settings=ONE)
        assert ["nats" in result.likelihood for result in found] == [True] * 3 + [False] * 2
        numbers = [-n - more for n in range(12) if n not in (3, 5)]
        own = found[0].likelihood
        assert (own["n"], own["missing"]) == (10, 2)
        assert own["nats"] == pytest.approx(sum(numbers) / 10)
        assert own["per_token"] == pytest.approx(own["nats"] / 2)
        assert own["low"] < own["nats"] - own["stderr"] < own["nats"] < own["high"] <= 0
        assert read_results(run)[0].likelihood == own
    row = read_samples(runs[0.0] / "questions@own" / "own")[7]
    assert row["reference"] == {"text": row["answers"][0], "logprob": -7.0, "tokens": 2}
    both = compare(*(run / "questions@own" / "own" for run in runs.values()))
    assert both.nats is not None
    assert (both.nats.left_out, both.nats.estimate.n) == (2, 10)
    assert "nats: A - B +0.5000 on every document; 2 documents without one are left out." in both.nats.text
    assert both.nats.text in eval_commands.comparison_text(both)
    shown = eval_commands.table(read_results(runs[0.0]))
    assert "nats" in shown.splitlines()[0]
    few = dataclasses.replace(ONE, limit=1)
    single = eval_commands.table(
        evaluate(Likely(0.5), task, tmp_path / "one", settings=few, modes=("own",), baselines=())
    )
    assert "-0.5000 ± - " in single


def reason(result: TaskResult) -> str:
    shown = eval_commands.table([result])
    assert "nats" not in shown.splitlines()[0]
    assert f"no likelihood: {result.likelihood['none']}." in shown
    return str(result.likelihood["none"])


def test_a_missing_likelihood_has_a_reason(tmp_path: Path) -> None:
    questions = write_questions(tmp_path / "data", count=4)
    task = get_task(f"llava:{questions}")
    own, *_ = evaluate(FakeModel(), task, tmp_path / "fake", settings=ONE, modes=("own",))
    assert reason(own) == "the backend gives no log-likelihoods of given texts"
    (thinker := FakeModel()).thinking_tokens = 64  # type: ignore[attr-defined]
    (own,) = evaluate(thinker, task, tmp_path / "thinks", settings=ONE, modes=("own",), baselines=())
    assert "asked to think" in reason(own)
    judged = dataclasses.replace(task, metric="mmvet_judge")
    (own,) = evaluate(FakeModel(), judged, tmp_path / "judged", settings=ONE, modes=("own",))
    assert reason(own) == "a judge compares the answers with the references"
    assert judged.reference_of(Document(id="a", question="?", answers=("x",))) == ""
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    questions.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "answer"}) + "\n" for row in rows))
    (own,) = evaluate(FakeModel(), task, tmp_path / "none", settings=ONE, modes=("own",))
    assert reason(own) == "the task has no references"


def test_the_reference_is_the_most_frequent_answer_in_the_tasks_own_words() -> None:
    document = Document(id="a", question="?", answers=("blue", "red", "red", "blue", "green"))
    assert document.reference == "blue", "of equally frequent ones the first"
    task = get_task("commonsense_boolq@official")
    assert task.reference_of(Document(id="a", question="?", answers=("true",))) == "the correct answer is true"
    with pytest.raises(EvalError, match=r"expected a text with \{answer\}"):
        dataclasses.replace(task, reference="true")


def test_one_document_and_none() -> None:
    assert mean_likelihood([{"reference": None}, {}], ["a", "b"]) == {}
    one = mean_likelihood([{"reference": {"logprob": -2.0, "tokens": 0}}], ["a"])
    assert (one["nats"], one["n"]) == (-2.0, 1)
    assert math.isnan(one["stderr"])
    assert math.isnan(one["per_token"])
    single = likelihood_difference([[-1.0, math.nan]], [[-2.0, -1.0]], ["a", "b"])
    assert single is not None
    assert single.text == (
        "Log-likelihood of the reference, nats: A -1.0000, B -2.0000, A - B +1.0000; 1 documents without one are "
        "left out."
    )
    assert likelihood_difference([[math.nan]], [[-2.0]], ["a"]) is None
